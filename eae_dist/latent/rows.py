"""Latents that lie on all ranks, and sums over them that do not depend, to the last bit, on which rank has which rows.

The rows, numbered through in rank order, are cut into blocks of a fixed size. Each rank computes with whole blocks, so that
every block's sums come from the same operations wherever it lies, and `ExactSum` adds blocks without any rounding, so that
their order is immaterial. (Same bits: with as many threads a rank, on processors of one kind; else to rounding.)
n: rows of all ranks, d: latent dimensions, W: ranks.
"""

import math
from collections.abc import Iterator

import torch

from eae_dist.distributed import gather_padded, rank, row_counts, sum_over_ranks, world_size

BLOCK = 2048


class Rows:
    """The rows of the blocks that begin on this rank: `n` rows on all ranks, `d` wide, `first` the number of the first here.

    Latents [b, d] are this rank's rows, of a matrix that lies on the ranks in contiguous runs in rank order; b may differ
    and be 0. Rows of a block that an earlier rank begins move there: a rank holds W blocks for a moment. Call on every rank.
    Raises ValueError on every rank for a wrong shape, no rows at all, or a value that is not finite.
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
        # A rank's head: its rows in a block that begins before them.
        heads = [min(-start % BLOCK, count) for start, count in zip(starts, counts, strict=True)]
        mine, start, stop = heads[rank()], starts[rank()], stops[rank()]
        self.first, self.local = start + mine, latents[mine:]
        if any(heads):
            all_heads = gather_padded(latents[:mine].contiguous(), heads)
            if self.first < stop:  # the last block that begins here goes on in the heads of the next ranks
                missing = min(-stop % BLOCK, self.n - stop)
                following = sum(heads[: rank() + 1])
                if missing:
                    self.local = torch.cat([self.local, all_heads[following : following + missing]])

    def _check(self, latents: torch.Tensor) -> None:
        bad = sum(int((~part.isfinite()).any(1).sum()) for part in latents.split(65_536))
        found = torch.tensor([[bad, self.d]], dtype=torch.int64, device=latents.device)
        bad, widths = gather_padded(found, [1] * world_size()).unbind(1)
        if self.n == 0:
            raise ValueError("a density needs at least one latent, got none on any rank")
        if widths.min() != widths.max() or self.d == 0:
            raise ValueError(f"latents must have the same number of dimensions, at least 1, on every rank, got {widths.tolist()}")
        if bad.sum():
            raise ValueError(f"{int(bad.sum())} of {self.n} latents are not finite; was the encoder trained to the end?")

    def blocks(self) -> Iterator[torch.Tensor]:
        """The blocks that begin on this rank, float64 [up to BLOCK, d]."""
        for block in self.local.split(BLOCK) if len(self.local) else ():
            yield block.double()

    def numbered_blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """The same with the number of each block's first row."""
        for position, block in enumerate(self.blocks()):
            yield self.first + position * BLOCK, block

    def mean(self) -> torch.Tensor:
        """float64 [d]. Call on every rank, as the following."""
        total = ExactSum(self, self.d, self.largest())
        for block in self.blocks():
            total.add(block.sum(0))
        return total.result() / self.n

    def covariance(self, mean: torch.Tensor) -> torch.Tensor:
        """The mean of (x - mean)(x - mean)^T, float64 [d, d]."""
        total = ExactSum(self, self.d * self.d, (2 * self.largest()) ** 2)
        for block in self.blocks():
            centered = block - mean
            total.add((centered.T @ centered).flatten())
        return total.result().view(self.d, self.d) / self.n

    def largest(self) -> float:
        """The largest absolute value of all."""
        here = max((float(part.abs().max()) for part in self.local.split(65_536) if len(part)), default=0.0)
        return float(self.over_ranks(torch.tensor([here], dtype=torch.float64)).max())

    def over_ranks(self, x: torch.Tensor) -> torch.Tensor:
        """A small tensor of every rank, [...] -> [W, ...], on the CPU."""
        return gather_padded(x[None].to(self.local.device), [1] * world_size()).cpu()


class ExactSum:
    """A float64 vector, summed over the blocks of all ranks so that the order of addition changes no bit.

    Each summand is cut into three parts, multiples of powers of two so coarse that every partial sum of each is exact (below
    2^52 of them). What lies below the finest is dropped: 2^-140 of the bound on the whole sum at 10^6 rows, so the bound may
    be very loose.
    """

    def __init__(self, rows: Rows, size: int, bound: float):
        """bound: no row adds more than this to any component."""
        exponent = math.ceil(math.log2(max(bound, 1e-100) * rows.n))
        blocks = math.ceil(math.log2(-(-rows.n // BLOCK)))  # each leaves at most half a coarser multiple to the finer part
        grids = [2.0 ** (exponent - 49 + part * (blocks - 49)) for part in range(3)]
        self._magic = [1.5 * 2.0**52 * grid for grid in grids]  # x + magic is rounded to a multiple of the grid
        self._parts = torch.zeros(3, size, dtype=torch.float64, device=rows.local.device)

    def add(self, x: torch.Tensor) -> None:
        for part, magic in zip(self._parts, self._magic, strict=True):
            multiple = (x + magic) - magic
            part += multiple
            x = x - multiple  # exact

    def result(self) -> torch.Tensor:
        """The sum over all ranks. Call on every rank."""
        return sum_over_ranks(self._parts).sum(0)
