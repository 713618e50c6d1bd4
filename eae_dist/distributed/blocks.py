"""Blocks of rows, whose sums have the same bits on any number of ranks.

With `train.blocks=V` the rows of a global batch are cut into V *blocks*. Rank r of W holds V/W neighboring ones. Whatever is
computed per row or per block is computed for one block at a time, so that its shapes do not depend on W. Whatever is summed over
rows is summed within each block, and then over the blocks as one binary tree:

    ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7))        V = 8; of 4 ranks, the first adds 0 + 1, the second 2 + 3, ...

V and W are powers of two, so that a rank holds a whole subtree, and any W gives the same additions.

A value that follows from such a sum is the same on every rank. It goes back to the blocks by `one_per_block`, whose gradient is
the sum over blocks; the gradient of the sum is one copy per block. So gradients of sums are complete on every rank. Under blocks,
a loss term is the value of the global batch on every rank, and the gradients of the weights are summed over ranks.

Without train.blocks, the rows of a rank are one block, the sum over ranks has any order, and its gradient is summed over ranks in
place of that of `one_per_block` (`ordered=False`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from eae_dist.distributed.collectives import (
    add_over_ranks,
    add_pairwise,
    exchanged_parts,
    gather_padded,
    gathered_sums,
    rank,
    sum_over_ranks,
    world_size,
)
from eae_dist.distributed.waits import waiting


@dataclass(frozen=True)
class Blocks:
    """The blocks that this rank holds, for one step or one validation.

    sizes: rows of each block. leaves: the copies of the weights are leaves, which keep the gradient of each block over several
    backward passes until `take_gradients` sums them.
    """

    sizes: tuple[int, ...]
    leaves: bool = False
    _copies: dict[torch.Tensor, tuple[torch.Tensor, ...]] = field(default_factory=dict)

    def sum(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Returns `sum_of_blocks` of one tensor per block."""
        return sum_of_blocks(parts, ordered=True)

    def once_each(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns `one_per_block` of x."""
        return one_per_block(x, len(self.sizes), ordered=True)

    def weights(self, parameter: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns the parameter once per block: autograd first sums over the uses in a block and then over blocks.

        The sum over ranks is left to DDP (`gradient_tree`) or to the caller.
        """
        if parameter not in self._copies:
            copies: tuple[torch.Tensor, ...] = _OnePerBlock.apply(parameter, len(self.sizes), False)
            if self.leaves:
                copies = tuple(copy.detach().requires_grad_(parameter.requires_grad) for copy in copies)
            self._copies[parameter] = copies
        return self._copies[parameter]

    def take_gradients(self) -> list[torch.Tensor]:
        """Sets the gradient of every parameter to the sum over this rank's blocks, and returns them. Needs `leaves`."""
        taken = []
        for parameter, copies in self._copies.items():
            gradients = [copy.grad for copy in copies if copy.grad is not None]
            assert len(gradients) in (0, len(copies)), "a weight has a gradient in some blocks only"
            if gradients:
                parameter.grad = torch.empty_like(parameter).copy_(add_pairwise(gradients))
                taken.append(parameter.grad)
        return taken


_ACTIVE: ContextVar[Blocks | None] = ContextVar("blocks", default=None)


@contextmanager
def in_blocks(blocks: Blocks | None) -> Iterator[Blocks | None]:
    """A context for the forward pass of rows that are cut into these blocks; None: they are not cut.

    Backward passes may run outside, in any thread.
    """
    before = _ACTIVE.set(blocks)
    try:
        yield blocks
    finally:
        _ACTIVE.reset(before)


def active_blocks() -> Blocks | None:
    """Returns the blocks of the surrounding `in_blocks`, or None."""
    return None if torch.compiler.is_compiling() else _ACTIVE.get()


def block_sizes(rows: int) -> tuple[tuple[int, ...], bool]:
    """Returns the rows of each of this rank's blocks, and whether sums over blocks are ordered: (rows,), False without blocks."""
    blocks = active_blocks()
    return ((rows,), False) if blocks is None else (blocks.sizes, True)


def local_blocks(edges: np.ndarray, row_ids: np.ndarray, *, leaves: bool = False) -> Blocks:
    """Returns this rank's blocks of ascending rows: block i of V has the rows with edges[i] <= number < edges[i + 1].

    edges: int64 [V + 1]. row_ids: numbers of this rank's rows, int64 [b].
    """
    held = (len(edges) - 1) // world_size()
    cuts = np.searchsorted(row_ids, edges[rank() * held : (rank() + 1) * held + 1])
    assert cuts[0] == 0 and cuts[-1] == len(row_ids), "a row lies outside of this rank's blocks"
    return Blocks(tuple(np.diff(cuts).tolist()), leaves)


def by_block(function: Callable[..., torch.Tensor], *rows: torch.Tensor) -> torch.Tensor:
    """Returns function(*rows), computed block by block: [b, ...] for each argument -> [b, ...].

    The kernels of a row's result can depend on the number of rows: vectors of rows end in a remainder that rounds differently.
    """
    blocks = active_blocks()
    if blocks is None:
        return function(*rows)
    return joined([function(*part) for part in zip(*(split_rows(x, blocks.sizes) for x in rows), strict=True)])


def split_rows(x: torch.Tensor, sizes: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """Returns the rows of x as parts of so many rows, without a copy. It can be differentiated twice.

    Unlike those of Tensor.split and torch.cat, both derivatives keep the memory format, on which the order of sums depends.
    """
    return _Split.apply(x, tuple(sizes))


def joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns the rows of all parts, the reverse of `split_rows`; without a copy if there is one part."""
    return _Join.apply(*parts)


def sum_of_blocks(parts: Sequence[torch.Tensor], ordered: bool) -> torch.Tensor:
    """Returns the sum over the blocks of all ranks of one tensor per block, in the same shape. Call on every rank.

    It can be differentiated twice; the gradient of each part is the gradient of the sum. It must be the same on all ranks, or
    without order it is summed over them.
    """
    return _SumOfBlocks.apply(*parts) if ordered else sum_over_ranks(parts[0])


def one_per_block(x: torch.Tensor, count: int, ordered: bool) -> tuple[torch.Tensor, ...]:
    """Returns x, which is the same on all ranks, once for each of this rank's `count` blocks.

    It can be differentiated twice; the gradient of x is the sum over the blocks of all ranks, or without order that of this rank.
    """
    return _OnePerBlock.apply(x, count, True) if ordered else (x,)


def gather_for_blocks(x: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Returns the rows of all ranks, [b, ...] -> [n, ...]; counts: from `row_counts`.

    The gradient is that of this rank's rows; it must be the same on all ranks, as behind `one_per_block`.
    """
    return _GatherForBlocks.apply(x, counts) if world_size() > 1 else x


# A bucket of gradients whose exchange has started: its future, the gradients, the received parts and the work to wait for.
Exchange = tuple[torch.futures.Future[torch.Tensor], torch.Tensor, torch.Tensor, Any]


def gradient_tree(started: list[Exchange], bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """A communication hook for DDP: gradients become their sum over ranks as a tree, not their mean.

    Parts of a bucket are exchanged while backward goes on. The last bucket waits for all of them, adds them and gathers the sums,
    so that every rank calls its collectives in the same order. started: an empty list, the state of the hook.
    """
    gradients = bucket.buffer()
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future(devices=[gradients.device] if gradients.is_cuda else [])
    started.append((future, gradients, *exchanged_parts(gradients, async_op=True)))
    if bucket.is_last():
        for future_of_one, like, parts, work in started:
            with waiting():
                work.wait()
            future_of_one.set_result(gathered_sums(parts, like))
        started.clear()
    return future


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, sizes: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
        return x.split(sizes)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return joined(gradients), None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, first: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        ctx.sizes = [len(part) for part in (first, *others)]
        # One part with gaps in memory is copied as several would be, because other kernels would compute with it.
        dense = first.is_contiguous() or (first.ndim == 4 and first.is_contiguous(memory_format=torch.channels_last))
        # A slice keeps all strides, a view would not: kernels also heed strides that mean nothing, as that of a single channel.
        return torch.cat([first, *others]) if others or not dense else first[:]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return split_rows(gradient, ctx.sizes)


class _SumOfBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *parts: torch.Tensor) -> torch.Tensor:
        ctx.count = len(parts)
        return add_over_ranks(add_pairwise(parts))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return one_per_block(gradient, ctx.count, True)


class _OnePerBlock(torch.autograd.Function):
    """over_ranks: whether the gradient is the sum over the blocks of all ranks, or over those of this rank."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, count: int, over_ranks: bool) -> tuple[torch.Tensor, ...]:
        ctx.over_ranks = over_ranks
        return tuple(x.view_as(x) for _ in range(count))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return sum_of_blocks(gradients, True) if ctx.over_ranks else add_pairwise(gradients), None, None


class _GatherForBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, counts: list[int]) -> torch.Tensor:
        ctx.counts = counts
        return gather_padded(x, counts)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        start = sum(ctx.counts[: rank()])
        return gradient[start : start + ctx.counts[rank()]], None
