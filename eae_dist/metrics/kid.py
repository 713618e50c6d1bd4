"""The kernel distance between two sets of features; with Inception features it is the KID (Binkowski et al. 2018).

    MMD^2 = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j),    k(x, y) = (x.y / f + 1)^3

It is unbiased at any number of samples. So, unlike the Fréchet distance, it may be compared between different numbers of samples.
n: rows, f: features, s: rows of a subset.
"""

from typing import NamedTuple

import torch

from eae_dist.data.order import permutation
from eae_dist.distributed import rank, sum_over_ranks, world_size
from eae_dist.numerics.keyed_random import derive_key

TILE = 512  # rows whose kernels are computed at a time


class KernelDistance(NamedTuple):
    """Mean and standard deviation (divided by n, not n - 1) over the subsets."""

    mean: float
    std: float
    subsets: int
    subset_size: int


@torch.no_grad()
def kernel_distance(
    x: torch.Tensor, y: torch.Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> KernelDistance:
    """Returns the mean of MMD^2 over random subsets of the rows of x [n, f] and y [n', f], in float64.

    x and y are all ranks' rows, in the same order on every rank (gather_rows). Call it on every rank: each computes some kernels,
    and the result is the same on any number of ranks. Subset i depends only on (seed, i) and the numbers of rows. subset_size is
    lowered to the rows of the smaller set; if both sets have exactly that many rows, there is one subset. Raises ValueError for
    fewer than two rows.
    """
    size = min(subset_size, len(x), len(y))
    if size < 2 or subsets < 1 or x.shape[1:] != y.shape[1:]:
        raise ValueError(
            f"the kernel distance needs at least 2 rows per set, equal numbers of features and a subset, got "
            f"{tuple(x.shape)} and {tuple(y.shape)}, {subsets} subsets of {subset_size}"
        )
    if len(x) == len(y) == size:
        subsets = 1
    x, y = x.double(), y.double()
    numbers = [[_subset(derive_key(seed, i, side), len(z), size) for i in range(subsets)] for side, z in enumerate((x, y))]
    of_x, of_y = (torch.stack(rows).to(x.device) for rows in numbers)
    if max(len(x), len(y)) <= subsets**0.5 * size:
        values = _squared_mmds(x, y, of_x, of_y)
    else:  # the subsets have fewer pairs than the whole sets
        values = torch.zeros(subsets, dtype=torch.float64, device=x.device)
        for i in range(rank(), subsets, world_size()):
            values[i] = squared_mmd(x[of_x[i]], y[of_y[i]])
        values = sum_over_ranks(values)
    return KernelDistance(values.mean().item(), values.std(correction=0).item(), subsets, size)


def squared_mmd(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Returns the unbiased estimate of MMD^2 from rows [s, f] and [s', f]."""
    kernels = ((_kernel(z, z), len(z)) for z in (x, y))
    # A row does not form a pair with itself.
    within = sum((kernel.sum() - kernel.diagonal().sum()) / (n * (n - 1)) for kernel, n in kernels)
    return within - 2 * _kernel(x, y).mean()


def _squared_mmds(x: torch.Tensor, y: torch.Tensor, of_x: torch.Tensor, of_y: torch.Tensor) -> torch.Tensor:
    """Returns squared_mmd of each subset, float64 [subsets], from row numbers [subsets, s]; every kernel is computed once."""
    size = of_x.shape[1]
    in_x, in_y = (x.new_zeros(len(rows), len(z)).scatter_(1, rows, 1) for z, rows in ((x, of_x), (y, of_y)))
    within = x.new_zeros(len(of_x))
    for z, subset in ((x, in_x), (y, in_y)):
        itself = (z.square().sum(1) / z.shape[1] + 1) ** 3
        within += (_sums_of_kernels(z, z, subset, subset) - subset @ itself) / (size * (size - 1))
    return within - 2 * _sums_of_kernels(x, y, in_x, in_y) / size**2


def _sums_of_kernels(x: torch.Tensor, y: torch.Tensor, in_x: torch.Tensor, in_y: torch.Tensor) -> torch.Tensor:
    """Returns the sum over the pairs of each subset, float64 [subsets]; in_x [subsets, n] is 1 where the subset has the row.

    The ranks share the tiles of rows. Their sums are added in the tiles' order, so they do not depend on the number of ranks.
    """
    starts = range(0, len(x), TILE)
    sums = x.new_zeros(len(starts), len(in_x))
    for i in range(rank(), len(starts), world_size()):
        rows = slice(starts[i], starts[i] + TILE)
        sums[i] = ((in_x[:, rows] @ _kernel(x[rows], y)) * in_y).sum(1)
    return sum_over_ranks(sums).sum(0)


def _kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _subset(key: int, n: int, size: int) -> torch.Tensor:
    """Returns `size` different row numbers below n, int64: those with the smallest hashes."""
    return torch.from_numpy(permutation(n, key)[:size])
