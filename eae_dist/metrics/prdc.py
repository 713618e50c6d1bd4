"""How well two sets of features cover each other, measured with balls around each row that reach to its k-th nearest other row.

Precision and recall: Kynkaanniemi et al. 2019; density and coverage: Naeem et al. 2020. A point on the surface of a ball is in
the ball: every comparison is <=, as in the first paper; some programs use <.

Features are rounded to a power-of-two grid, 2^-24 of the longest row or finer. Squared distances are then integers below 2^53,
which are exact in float64, also in matrix products. So duplicates and ties stay exact, and counts do not depend on tiles or
ranks. n: real rows, m: generated rows, f: features.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from eae_dist.distributed import gather_rows, rank, sum_over_ranks, world_size
from eae_dist.errors import UserError

TILE = 2**22  # distances computed at once: 32 MiB


class PRDC(NamedTuple):
    """The scores of a generated set.

    `precision`: share of generated rows in the ball of a real row. `recall`: share of real rows in the ball of a generated row.
    `density`: number of real rows' balls that a generated row is in, divided by k; may exceed 1. `coverage`: share of real rows
    whose ball has a generated row in it.
    """

    precision: float
    recall: float
    density: float
    coverage: float


@torch.no_grad()
def precision_recall_density_coverage(real: torch.Tensor, generated: torch.Tensor, *, k: int = 3, k_density: int = 5) -> PRDC:
    """Returns the scores of generated [m, f] against real [n, f] rows; the same bits on any number of ranks.

    Both are all ranks' rows, in the same order on every rank (gather_rows). Call it on every rank: each compares some rows with
    all others. k: for precision and recall; k_density: for density and coverage. The scores depend on n and m, so compare them
    only at equal numbers. Raises ValueError for sets of k or fewer rows.
    """
    k_most = max(k, k_density)
    if min(k, k_density) < 1 or len(real) <= k_most or len(generated) <= k:
        raise UserError(
            f"the neighbors k={k} and k_density={k_density} need more real and generated rows than that, got "
            f"{len(real)} and {len(generated)}"
        )
    real, generated = _on_grid(real, generated)
    near = _nearest_others(real, k_most)
    real_radii, density_radii = near[:, k - 1], near[:, k_density - 1]
    generated_radii = _nearest_others(generated, k)[:, k - 1]

    recalled, covered = (torch.zeros(len(real), dtype=torch.int64, device=real.device) for _ in range(2))
    precise, hits = recalled.new_zeros(()), recalled.new_zeros(())
    for rows, distances in _tiles(generated, real):
        precise += (distances <= real_radii).any(1).sum()
        recalled += (distances <= generated_radii[rows, None]).sum(0)
        in_ball = distances <= density_radii
        hits += in_ball.sum()
        covered += in_ball.sum(0)
    counts = sum_over_ranks(torch.cat([precise[None], hits[None], recalled, covered]))
    (precise, hits), (recalled, covered) = counts[:2].tolist(), counts[2:].view(2, -1)
    n, m = len(real), len(generated)
    return PRDC(
        precision=precise / m,
        recall=int((recalled > 0).sum()) / n,
        density=hits / (k_density * m),
        coverage=int((covered > 0).sum()) / n,
    )


def _on_grid(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns both sets relative to the middle of x, as integers in float64, in units of one power-of-two grid."""
    if x.ndim != 2 or x.shape[1:] != y.shape[1:] or not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError(f"expected finite features [n, f] and [m, f], got {tuple(x.shape)} and {tuple(y.shape)}")
    x, y = x.double(), y.double()
    middle = (x.amin(0) + x.amax(0)) / 2
    x, y = x - middle, y - middle
    longest = max(x.square().sum(1).max().item(), y.square().sum(1).max().item())
    # |x - y|^2, and every partial sum of it as |x|^2 + |y|^2 - 2 x.y, is at most 4 |longest|^2. The unit keeps this below
    # 2^53, with some room for the rounding.
    unit = 2.0 ** math.floor((50 - math.log2(longest)) / 2) if longest > 0 else 1.0
    return (x * unit).round_(), (y * unit).round_()


def _nearest_others(x: torch.Tensor, k: int) -> torch.Tensor:
    """Returns the squared distances of every row to its k nearest other rows, ascending, [n, f] -> [n, k]."""
    near = [x.new_zeros(0, k)]
    for rows, distances in _tiles(x, x):
        distances.diagonal(rows.start).fill_(torch.inf)
        near.append(distances.topk(k, 1, largest=False, sorted=True).values)
    return gather_rows(torch.cat(near))


def _tiles(queries: torch.Tensor, keys: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yields slices of this rank's run of the queries, and their squared distances to all keys, [rows, keys]."""
    first, stop = (part * len(queries) // world_size() for part in (rank(), rank() + 1))
    norms, height = keys.square().sum(1), max(1, TILE // len(keys))
    for start in range(first, stop, height):
        rows = slice(start, min(start + height, stop))
        query = queries[rows]
        yield rows, torch.addmm(norms, query, keys.T, alpha=-2).add_(query.square().sum(1, keepdim=True))
