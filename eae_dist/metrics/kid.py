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

MOST_PRODUCTS = 2**24  # pairs of rows, 128 MiB; up to this, the kernels of all pairs are computed once for all subsets


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

    x and y are all ranks' rows, in the same order on every rank (gather_rows). Call it on every rank: each computes some subsets,
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
    values = torch.zeros(subsets, dtype=torch.float64, device=x.device)
    x, y = x.double(), y.double()
    once = max(len(x), len(y)) ** 2 <= min(subsets * size**2, MOST_PRODUCTS)
    kernels = [_kernel(a, b) for a, b in ((x, x), (y, y), (x, y))] if once else None
    for i in range(rank(), subsets, world_size()):
        of_x, of_y = (_subset(derive_key(seed, i, side), len(z), size).to(z.device) for side, z in enumerate((x, y)))
        if kernels is None:
            values[i] = squared_mmd(x[of_x], y[of_y])
        else:
            pairs = ((of_x, of_x), (of_y, of_y), (of_x, of_y))
            values[i] = _squared_mmd(*(kernel[a][:, b] for kernel, (a, b) in zip(kernels, pairs, strict=True)))
    values = sum_over_ranks(values)
    return KernelDistance(values.mean().item(), values.std(correction=0).item(), subsets, size)


def squared_mmd(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Returns the unbiased estimate of MMD^2 from rows [s, f] and [s', f]."""
    return _squared_mmd(_kernel(x, x), _kernel(y, y), _kernel(x, y))


def _squared_mmd(xx: torch.Tensor, yy: torch.Tensor, xy: torch.Tensor) -> torch.Tensor:
    """Returns the same from the kernels of all pairs; a row does not form a pair with itself."""
    within = sum((k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1)) for k in (xx, yy))
    return within - 2 * xy.mean()


def _kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _subset(key: int, n: int, size: int) -> torch.Tensor:
    """Returns `size` different row numbers below n, int64: those with the smallest hashes."""
    return torch.from_numpy(permutation(n, key)[:size])
