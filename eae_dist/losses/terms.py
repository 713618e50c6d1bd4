"""Loss terms as pure functions of this rank's rows.

Every term returns a *share*: the mean of the shares over ranks is the term of the global batch. Under blocks
(`distributed.blocks`) the share of every rank is that term, with the gradient of this rank's rows.

b: this rank's rows, n: all rows, d: latent dimensions, W: ranks.
"""

from collections.abc import Iterable

import torch

from eae_dist.distributed import (
    active_blocks,
    by_block,
    gather_for_blocks,
    gather_rows,
    rank,
    row_counts,
    split_rows,
    world_size,
)
from eae_dist.errors import UserError

IMQ_SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
ROWS = 1024


def squared_error(reconstruction: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Returns the squared error per image, [b, c, h, w] x 2 -> [b], in float32 or better.

    Raises ValueError for unequal shapes.
    """
    if reconstruction.shape != images.shape:
        raise UserError(f"the decoder (model.decoder) returned {tuple(reconstruction.shape)} for images {tuple(images.shape)}")
    return by_block(lambda x, y: (x.to(y.dtype) - y).square().flatten(1).sum(1), reconstruction, images)


def mean_share(per_row: torch.Tensor, rows: int) -> torch.Tensor:
    """Returns this rank's share W/n * sum of the mean over n = `rows` rows on all ranks, [b] -> scalar.

    Ranks may hold different numbers of rows.
    """
    blocks = active_blocks()
    if blocks is None:
        return per_row.sum() * (world_size() / rows)
    return blocks.sum([part.sum() for part in split_rows(per_row, blocks.sizes)]) / rows


def gaussian_divergence(mean: torch.Tensor, log_sigma: torch.Tensor) -> torch.Tensor:
    """Returns KL(N(mean, sigma^2) || N(0, I)) per row in nats, [b, d] x 2 -> [b]."""
    return by_block(lambda m, s: 0.5 * (m.square() + (2 * s).exp() - 1 - 2 * s).sum(1), mean, log_sigma)


def kernel_discrepancy(latents: torch.Tensor, prior: torch.Tensor, counts: list[int] | None = None) -> torch.Tensor:
    """Returns MMD^2 between the latents of all ranks and as many prior draws, [b, d] x 2 -> scalar share; it can be negative.

    The kernel is inverse multiquadratic, sum_s C_s / (C_s + |x - y|^2) with C_s = 2 d s. The estimate is unbiased within each set
    and has the factor 2/n^2 across the sets (Tolstikhin et al. 2018, with the constants of the official RAE code). Each rank
    compares its rows with the rows of all ranks. counts: the rows of each rank, if they are known.
    """
    counts = counts or row_counts(len(latents), latents.device)
    n, start = sum(counts), sum(counts[: rank()])
    every_prior, blocks = gather_rows(prior, counts=counts), active_blocks()
    if blocks is None:
        within, across = _kernel_sums(latents, gather_rows(latents, counts=counts), prior, every_prior, start)
        return world_size() * (within / (n * (n - 1)) - 2 * across / n**2)
    sums = []
    every = blocks.once_each(gather_for_blocks(latents, counts))
    for rows, everyone, draws in zip(split_rows(latents, blocks.sizes), every, prior.split(blocks.sizes), strict=True):
        sums.append(_kernel_sums(rows, everyone, draws, every_prior, start))
        start += len(rows)
    within, across = blocks.sum(sums)
    return within / (n * (n - 1)) - 2 * across / n**2


def _kernel_sums(
    latents: torch.Tensor, everyone: torch.Tensor, prior: torch.Tensor, every_prior: torch.Tensor, start: int
) -> torch.Tensor:
    """Returns the sums of the kernel within the two sets and across them, [2]; start: number of the first row in both sets."""
    within = imq_kernel(latents, everyone, start) + imq_kernel(prior, every_prior, start)
    return torch.stack([within, imq_kernel(latents, every_prior)])


def imq_kernel(x: torch.Tensor, y: torch.Tensor, offset: int | None = None) -> torch.Tensor:
    """Returns the sum of the kernel over all pairs of rows, [b, d] x [n, d] -> scalar.

    offset: row i of x is row offset + i of y, and a row is not paired with itself. None: x and y are different sets.
    """
    total = x.new_zeros(())
    place = torch.arange(len(y), device=x.device)
    for start, rows in zip(range(0, len(x), ROWS), x.split(ROWS), strict=False):  # x may be a whole split
        squared = rows.square().sum(1)[:, None] + y.square().sum(1) - 2 * rows @ y.T
        if offset is not None:
            itself = place[start : start + len(rows), None] + offset == place
            squared = squared.masked_fill(itself, torch.inf)
        scales = (2 * x.shape[1] * scale for scale in IMQ_SCALES)
        total = total + sum((c / (c + squared)).sum() for c in scales)
    return total


def sum_of_squares(weights: Iterable[torch.Tensor]) -> torch.Tensor:
    """Returns the sum of the squares of all entries."""
    return torch.as_tensor(sum(weight.square().sum() for weight in weights))
