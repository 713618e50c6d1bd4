"""How far latents are from N(0, I), by their projections on random directions: each should be N(0, 1).

Both terms are *shares*, as in `losses/terms.py`. n: rows on all W ranks, b: rows on this rank, d: dimensions, m: directions.
"""

import numpy as np
import torch

from eae_dist.distributed import (
    active_blocks,
    block_sizes,
    gather_for_blocks,
    gather_rows,
    rank,
    row_counts,
    split_rows,
    sum_of_blocks,
    world_size,
)
from eae_dist.numerics.keyed_random import normal, row_keys

LARGEST, KNOTS = 5.0, 17  # the integral of the Epps-Pulley statistic goes from -LARGEST to LARGEST


def random_directions(key: int, count: int, like: torch.Tensor) -> torch.Tensor:
    """Returns uniformly distributed unit vectors for latents `like`, [b, d] -> [count, d]; row i depends on (key, i) alone."""
    draws = normal(row_keys(key, np.arange(count)), like.shape[1], like.device)
    return torch.nn.functional.normalize(draws).to(like)


def epps_pulley(latents: torch.Tensor, directions: torch.Tensor, n: int) -> torch.Tensor:
    """Returns the Epps-Pulley statistic of the projections of all n rows, [b, d] x [m, d] -> scalar share, mean over directions.

    It is the integral of |c(t) - exp(-t^2/2)|^2 exp(-t^2/2) over t, where c is the empirical characteristic function of the
    projections (Epps & Pulley 1983), by the trapezoids of LeJEPA (Balestriero & LeCun 2025): 17 knots in [-5, 5]. LeJEPA
    multiplies by n. Here it is left out, so that a weight fits any batch. Only the 2 (KNOTS + 1)/2 m sums of c go over ranks.
    """
    sizes, ordered = block_sizes(len(latents))
    t = torch.linspace(0, LARGEST, KNOTS // 2 + 1, dtype=latents.dtype, device=latents.device)  # the integrand is even

    def sums(rows: torch.Tensor) -> torch.Tensor:
        projections = rows @ directions.T
        angles = [projections * knot for knot in t]  # one knot at a time fits into a cache
        return torch.stack([torch.stack([angle.cos().sum(0), angle.sin().sum(0)]) for angle in angles])

    real, imaginary = (sum_of_blocks([sums(rows) for rows in split_rows(latents, sizes)], ordered) / n).unbind(1)
    normal_function = torch.exp(-t.square() / 2)[:, None]
    error = (real - normal_function).square() + imaginary.square()
    return 2 * torch.trapezoid(error * normal_function, t, dim=0).mean()


def sliced_wasserstein(latents: torch.Tensor, directions: torch.Tensor, counts: list[int] | None = None) -> torch.Tensor:
    """Returns the squared Wasserstein-2 distance of the projections of all n rows from N(0, 1), [b, d] x [m, d] -> scalar share.

    It is the mean over directions. The sorted projections are compared with the expected order statistics of n draws of N(0, 1),
    as approximated by Blom (1958). Kolouri et al. (2019) compare them with sorted draws. The mean of their gradient over draws
    is the gradient here, which has no noise of draws and costs half. Each rank sorts the projections of all rows on its part of
    the directions. counts: the rows of each rank, if they are known.
    """
    counts = counts or row_counts(len(latents), latents.device)
    n, m, blocks = sum(counts), len(directions), active_blocks()
    places = torch.arange(1, n + 1, dtype=torch.float64, device=latents.device)
    expected = torch.special.ndtri((places - 3 / 8) / (n + 1 / 4)).to(latents)

    def squares(every: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        return (own @ every.T).sort(1).values.sub(expected).square().sum()

    if blocks is None:
        own = directions.tensor_split(world_size())[rank()]
        return squares(gather_rows(latents, counts=counts), own) * (world_size() / (n * m))
    copies = blocks.once_each(gather_for_blocks(latents, counts))
    parts = directions.tensor_split(world_size() * len(copies))[rank() * len(copies) :]
    return blocks.sum([squares(every, own) for every, own in zip(copies, parts, strict=False)]) / (n * m)
