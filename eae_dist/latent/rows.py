"""Latents that are spread over all ranks, and sums over them that are bit-identical however the rows are spread.

The rows are numbered in rank order and cut into blocks of a fixed size. Each rank computes with whole blocks, so the sums of a
block come from the same operations on every rank. `ExactSum` adds the blocks without rounding, so their order has no effect. The
bits are the same if ranks have equally many threads and processors of one kind; otherwise results agree up to rounding.
n: rows of all ranks, d: latent dimensions, W: ranks.
"""

import math
from collections.abc import Iterator

import torch

from eae_dist.distributed import gather_padded, rank, row_counts, sum_over_ranks, world_size
from eae_dist.errors import UserError

BLOCK = 2048


class Rows:
    """The rows of the blocks that begin on this rank.

    `n`: rows on all ranks, `d`: dimensions, `first`: number of the first row here.
    Latents [b, d] are this rank's rows of a matrix that is spread over the ranks in contiguous runs in rank order; b may differ
    and be 0. Rows of a block that begins on an earlier rank move to that rank; meanwhile a rank holds W blocks. Call it on every
    rank. Raises ValueError on every rank for a wrong shape, no rows at all, or a value that is not finite.
    """

    def __init__(self, latents: torch.Tensor):
        if latents.ndim != 2:
            raise ValueError(f"a density is fitted to latents [rows, dimensions], got shape {tuple(latents.shape)}")
        latents = latents.detach()
        counts = row_counts(len(latents), latents.device)
        self.n, self.d = sum(counts), latents.shape[1]
        self._check(latents)
        stops = [sum(counts[: i + 1]) for i in range(len(counts))]
        starts = [0, *stops[:-1]]
        # The head of a rank: its rows in a block that begins on an earlier rank.
        heads = [min(-start % BLOCK, count) for start, count in zip(starts, counts, strict=True)]
        mine, start, stop = heads[rank()], starts[rank()], stops[rank()]
        self.first, self.local = start + mine, latents[mine:]
        if any(heads):
            all_heads = gather_padded(latents[:mine].contiguous(), heads)
            if self.first < stop:  # the last block that begins here continues in the heads of the next ranks
                missing = min(-stop % BLOCK, self.n - stop)
                following = sum(heads[: rank() + 1])
                if missing:
                    self.local = torch.cat([self.local, all_heads[following : following + missing]])

    def _check(self, latents: torch.Tensor) -> None:
        own = sum(int((~part.isfinite()).any(1).sum()) for part in latents.split(65_536))
        found = torch.tensor([[own, self.d]], dtype=torch.int64, device=latents.device)
        bad, widths = gather_padded(found, [1] * world_size()).unbind(1)
        if self.n == 0:
            raise UserError("a density needs at least one latent, got none on any rank")
        if widths.min() != widths.max() or self.d == 0:
            raise ValueError(f"latents must have the same number of dimensions, at least 1, on every rank, got {widths.tolist()}")
        if bad.sum():
            raise UserError(f"{int(bad.sum())} of {self.n} latents are not finite; was the encoder trained to the end?")

    def blocks(self) -> Iterator[torch.Tensor]:
        """Yields the blocks that begin on this rank, float64 [up to BLOCK, d]."""
        for block in self.local.split(BLOCK) if len(self.local) else ():
            yield block.double()

    def numbered_blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yields the same blocks, each with the number of its first row."""
        for position, block in enumerate(self.blocks()):
            yield self.first + position * BLOCK, block

    def mean(self) -> torch.Tensor:
        """Returns the mean of all rows, float64 [d]. Call it and the methods below on every rank."""
        total = ExactSum(self, self.d, self.largest())
        for block in self.blocks():
            total.add(block.sum(0))
        return total.result() / self.n

    def covariance(self, mean: torch.Tensor) -> torch.Tensor:
        """Returns the mean of (x - mean)(x - mean)^T, float64 [d, d]."""
        total = ExactSum(self, self.d * self.d, (2 * self.largest()) ** 2)
        for block in self.blocks():
            centered = block - mean
            total.add((centered.T @ centered).flatten())
        return total.result().view(self.d, self.d) / self.n

    def largest(self) -> float:
        """Returns the largest absolute value on all ranks."""
        here = max((float(part.abs().max()) for part in self.local.split(65_536) if len(part)), default=0.0)
        return float(self.over_ranks(torch.tensor([here], dtype=torch.float64)).max())

    def over_ranks(self, x: torch.Tensor) -> torch.Tensor:
        """Gathers a small tensor of every rank, [...] -> [W, ...], on the CPU."""
        return gather_padded(x[None].to(self.local.device), [1] * world_size()).cpu()


class ExactSum:
    """The sum of a float64 vector over the blocks of all ranks; the order of addition changes no bit.

    Each summand is cut into three parts. The parts are multiples of powers of two that are coarse enough for every partial sum to
    be exact (below 2^52 multiples). What is smaller than the finest multiple is dropped: 2^-140 of the bound on the whole sum at
    10^6 rows. So the bound may be very loose.
    """

    def __init__(self, rows: Rows, size: int, bound: float):
        """bound: the most that a row adds to any component."""
        exponent = math.ceil(math.log2(max(bound, 1e-100) * rows.n))
        blocks = math.ceil(math.log2(-(-rows.n // BLOCK)))  # each block leaves at most half a coarser multiple to the finer part
        grids = [2.0 ** (exponent - 49 + part * (blocks - 49)) for part in range(3)]
        self._magic = [1.5 * 2.0**52 * grid for grid in grids]  # x + magic is rounded to a multiple of the grid
        self._parts = torch.zeros(3, size, dtype=torch.float64, device=rows.local.device)

    def add(self, x: torch.Tensor) -> None:
        """Adds the sums [size] of one block."""
        for part, magic in zip(self._parts, self._magic, strict=True):
            multiple = (x + magic) - magic
            part += multiple
            x = x - multiple  # exact

    def result(self) -> torch.Tensor:
        """Returns the sum over all ranks. Call it on every rank."""
        return sum_over_ranks(self._parts).sum(0)
