"""The distance of latents from N(0, I), which tells whether images decoded from samples of N(0, I) can be good.

n: rows, d: dimensions, s: directions.
"""

import numpy as np
import torch

from eae_dist.distributed import gather_padded, message_device, rank, world_size
from eae_dist.losses.entropy import knn_entropy
from eae_dist.losses.sliced import random_directions
from eae_dist.numerics.keyed_random import derive_key, normal, row_keys

DIRECTIONS, DRAWS = range(2)  # streams of random keys


def gaussianity(latents: torch.Tensor, *, directions: int = 512, seed: int = 0) -> dict[str, float | int]:
    """Returns two measures of latents [n, d], and the same measures of n samples of N(0, I), because both depend on n.

    `sliced_wasserstein`: see the function below. `entropy`: the nearest-neighbor estimate [nats]; it is lower than for samples if
    the latents fill N(0, I) less evenly. The measures of the samples end in `_of_draws`. Call it on every rank with the same
    latents: the result is the same on any number of ranks, up to rounding. Raises ValueError for fewer than 2 rows.
    """
    if latents.ndim != 2 or len(latents) < 2:
        raise ValueError(f"gaussianity needs latents [n, d] with at least 2 rows, got shape {tuple(latents.shape)}")
    latents = latents.detach().double().cpu()
    draws = normal(row_keys(derive_key(seed, DRAWS), np.arange(len(latents))), latents.shape[1])
    measured: dict[str, float | int] = {"images": len(latents)}
    for rows, ending in ((latents, ""), (draws, "_of_draws")):
        measured["sliced_wasserstein" + ending] = sliced_wasserstein(rows, directions=directions, seed=seed)
        measured["entropy" + ending] = entropy(rows)
    return measured


def sliced_wasserstein(latents: torch.Tensor, *, directions: int = 512, seed: int = 0) -> float:
    """Returns the sliced 2-Wasserstein distance of the rows [n, d] from N(0, I) (Bonneel et al. 2015).

    Its square is the mean, over random directions u, of (1/n) sum_i (x_(i) - q_i)^2. The x_(i) are the coordinates of the rows
    along u in ascending order; the q_i are the quantiles of N(0, 1) at (i - 1/2)/n.
    """
    latents = latents.double()
    u = random_directions(derive_key(seed, DIRECTIONS), directions, latents)
    places = (torch.arange(len(latents), dtype=torch.float64) + 0.5) / len(latents)
    coordinates = (latents @ u.T).sort(0).values
    return (coordinates - torch.special.ndtri(places)[:, None]).square().mean().sqrt().item()


def entropy(latents: torch.Tensor) -> float:
    """Returns the nearest-neighbor entropy of rows [n, d] that every rank has, in nats; each rank computes a part of it."""
    start, stop = (part * len(latents) // world_size() for part in (rank(), rank() + 1))
    share = knn_entropy(latents[start:stop].to(message_device()))
    return float(gather_padded(share[None], [1] * world_size()).mean())
