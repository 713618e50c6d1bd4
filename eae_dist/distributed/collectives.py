"""Collectives: communication between ranks.

Every function also works without a process group (one rank). Every rank must call the communicating functions the same number
of times, in the same order. W: ranks, b: this rank's rows, n: all rows.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from eae_dist.distributed.waits import waiting
from eae_dist.errors import UserError

Value = TypeVar("Value")
MESSAGE = 6_500_000  # entries averaged in one message, 25 MiB of float32
DEVICES = {"nccl": "cuda"}  # backend -> device of the tensors that it sends, if that is not the CPU


def is_initialized() -> bool:
    """True if there is a process group."""
    return dist.is_available() and dist.is_initialized()


def rank(group: "dist.ProcessGroup | None" = None) -> int:
    """Returns the rank of this process; 0 without a process group."""
    return dist.get_rank(group) if is_initialized() else 0


def world_size(group: "dist.ProcessGroup | None" = None) -> int:
    """Returns the number of ranks; 1 without a process group."""
    return dist.get_world_size(group) if is_initialized() else 1


def gather_rows(x: torch.Tensor, group: "dist.ProcessGroup | None" = None, counts: list[int] | None = None) -> torch.Tensor:
    """Returns the rows of all ranks in rank order, [b, ...] -> [n, ...]; b may differ between ranks.

    counts: from `row_counts`, if they are known.
    It can be differentiated twice. The gradient of a row is the sum of its gradients over all ranks. So if each rank computes a
    loss from the gathered rows, the mean of the gradients over ranks (as in DDP) is the gradient of the mean loss.
    """
    if world_size(group) == 1:
        return x
    return _GatherRows.apply(x, counts or row_counts(len(x), x.device, group), group)


def row_counts(rows: int, device: torch.device | str, group: "dist.ProcessGroup | None" = None) -> list[int]:
    """Returns the number of rows on each rank, in rank order. The host waits for a GPU."""
    world = world_size(group)
    if world == 1:
        return [rows]
    return _of_every_rank(torch.tensor(rows, dtype=torch.int64, device=device), group).tolist()


def sum_over_ranks(x: torch.Tensor, group: "dist.ProcessGroup | None" = None) -> torch.Tensor:
    """Returns the sum of x over ranks, in the same shape. It can be differentiated twice; the gradient is summed over ranks."""
    if world_size(group) == 1:
        return x
    if group is None and torch.compiler.is_compiling():
        return _opaque_sum(x)
    return _SumOverRanks.apply(x, group)


def average_over_ranks(tensors: Iterable[torch.Tensor]) -> None:
    """Replaces each tensor in place by its mean over ranks, with few messages and without gradient."""
    _replace_in_messages(tensors, lambda x: sum_over_ranks(x) / world_size())


def add_tensors_over_ranks(tensors: Iterable[torch.Tensor]) -> None:
    """Replaces each tensor in place by its sum over ranks as in `add_over_ranks`, with few messages and without gradient."""
    _replace_in_messages(tensors, add_over_ranks)


def _replace_in_messages(tensors: Iterable[torch.Tensor], reduce: Callable[[torch.Tensor], torch.Tensor]) -> None:
    if world_size() == 1:
        return
    waiting: list[torch.Tensor] = []
    for tensor in tensors:
        waiting.append(tensor)
        if sum(t.numel() for t in waiting) >= MESSAGE:
            _replace(waiting, reduce)
            waiting = []
    _replace(waiting, reduce)


def _replace(tensors: list[torch.Tensor], reduce: Callable[[torch.Tensor], torch.Tensor]) -> None:
    if not tensors:
        return
    reduced = reduce(torch.cat([tensor.flatten() for tensor in tensors]))
    for tensor, here in zip(tensors, reduced.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(here.view(tensor.shape))


def gather_padded(x: torch.Tensor, counts: list[int], group: "dist.ProcessGroup | None" = None) -> torch.Tensor:
    """Returns the rows of all ranks, [b, ...] -> [n, ...], without gradient; counts: from `row_counts`."""
    world, longest = world_size(group), max(counts)
    if world == 1:
        return x
    if len(x) < longest:
        x = torch.cat([x, x.new_zeros(longest - len(x), *x.shape[1:])])
    everyone = _of_every_rank(x, group)
    if min(counts) == longest:
        return everyone.flatten(0, 1)
    return torch.cat([part[:count] for part, count in zip(everyone, counts, strict=True)])


def exchange_rows(x: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Sends to each rank its rows of x, and returns what all ranks sent to this one, in rank order: [n, ...] -> [W, b, ...].

    The rows for rank 0 come first. counts: from `row_counts`, the rows that each rank gets from every other. Without gradient.
    """
    world, mine = world_size(), counts[rank()]
    if world == 1:
        return x[None]
    received = x.new_empty(world * mine, *x.shape[1:])
    with waiting():
        dist.all_to_all_single(received, x.contiguous(), [mine] * world, counts)
    return received.view(world, mine, *x.shape[1:])


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, counts: list[int], group: "dist.ProcessGroup | None") -> torch.Tensor:
        ctx.counts, ctx.group = counts, group
        return gather_padded(x, counts, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        # An all_reduce, of which each rank keeps its rows, because gloo before torch 2.7 has no reduce_scatter.
        start = sum(ctx.counts[: rank(ctx.group)])
        summed = sum_over_ranks(gradient.contiguous(), ctx.group)
        return summed[start : start + ctx.counts[rank(ctx.group)]], None, None


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: "dist.ProcessGroup | None") -> torch.Tensor:
        ctx.group = group
        return _sum(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return sum_over_ranks(gradient.contiguous(), ctx.group), None


def _sum(x: torch.Tensor, group: "dist.ProcessGroup | None") -> torch.Tensor:
    if _is_small(x, group):
        return _of_every_rank(x, group).sum(0, dtype=x.dtype)
    out = x.clone()
    with waiting():
        dist.all_reduce(out, group=group)
    return out


def add_over_ranks(x: torch.Tensor) -> torch.Tensor:
    """Returns the sum of x over ranks, added pairwise: (x_0 + x_1) + (x_2 + x_3) + ..., without gradient.

    For a power of two of ranks, this is one binary tree. A large x is sent twice like in a ring, but in fewer messages: each rank
    adds one part of x of all ranks and then sends the sum to all.
    """
    world = world_size()
    if world == 1:
        return x
    if _is_small(x, None):
        return add_pairwise(_of_every_rank(x, None).unbind())
    return gathered_sums(exchanged_parts(x)[0], x)


def exchanged_parts(x: torch.Tensor, *, async_op: bool = False) -> "tuple[torch.Tensor, dist.Work | None]":
    """Sends part r of W of a flattened x to rank r; returns the received parts [W, m] and the work to wait for, or None.

    The last part is filled up with zeros.
    """
    world = world_size()
    m = -(-x.numel() // world)
    filling = m * world - x.numel()
    sent = torch.nn.functional.pad(x.flatten(), (0, filling)) if filling else x.flatten()
    received = torch.empty_like(sent)
    with waiting():
        work = dist.all_to_all_single(received, sent, async_op=async_op)
    return received.view(world, m), work


def gathered_sums(parts: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Returns the sum over ranks from the parts that `exchanged_parts` received: every rank adds its part. Shape of `like`."""
    return _of_every_rank(add_pairwise(parts.unbind()), None).flatten()[: like.numel()].view(like.shape)


def add_pairwise(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns the sum of tensors as a binary tree over their order: neighbors are added until one is left."""
    parts = list(parts)
    while len(parts) > 1:
        parts = [sum(parts[place + 1 : place + 2], start=parts[place]) for place in range(0, len(parts), 2)]
    return parts[0]


@torch.library.custom_op("eae_dist::sum_over_ranks", mutates_args=())
def _opaque_sum(x: torch.Tensor) -> torch.Tensor:
    """A sum over ranks that torch.compile keeps as one operator, because a collective would break the graph."""
    return _sum(x, None)


_opaque_sum.register_fake(torch.empty_like)
_opaque_sum.register_autograd(lambda ctx, gradient: _opaque_sum(gradient.contiguous()))


def _of_every_rank(x: torch.Tensor, group: "dist.ProcessGroup | None") -> torch.Tensor:
    """Returns x of every rank in rank order, [...] -> [W, ...]; x must have the same shape on all ranks."""
    everyone = x.new_empty(world_size(group), *x.shape)
    with waiting():
        if _is_small(x, group):
            dist.all_to_all_single(everyone, x.expand_as(everyone).contiguous(), group=group)
        else:
            # torch 2.14 renamed all_gather_into_tensor and warns about the old name.
            gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
            gather(everyone.flatten(), x.flatten(), group=group)
    return everyone


def _is_small(x: torch.Tensor, group: "dist.ProcessGroup | None") -> bool:
    """True if gloo is fastest when each rank sends x directly to each other rank: a third of the time of a small all_reduce.

    The collectives of gloo pass messages around a ring of ranks, which is faster above about 1 MiB received.
    """
    return x.device.type == "cpu" and 0 < x.numel() * x.element_size() * world_size(group) <= 2**20


def gather_objects(value: Value) -> list[Value]:
    """Returns the values (picklable, small) of all ranks in rank order; for diagnostics and decisions, not for tensors."""
    if world_size() == 1:
        return [value]
    values = [value] * world_size()
    dist.all_gather_object(values, value)
    return values


def from_rank_zero(value: Value) -> Value:
    """Returns the value (picklable, small) of rank 0 on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


class _Form(NamedTuple):
    """Stands for a tensor that rank 0 will send."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


def tensors_from_rank_zero(tree: Value) -> Value:
    """Returns the nested dicts and lists of rank 0 on every rank, with tensors on the CPU; the other ranks' are not looked at.

    Each tensor is a message, and keeps its memory format.
    """
    if world_size() == 1:
        return tree
    device, first = message_device(), rank() == 0

    def form(leaf: Any) -> Any:
        return _Form(tuple(leaf.shape), leaf.stride(), leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf

    def sent(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            dist.broadcast(leaf.to(device).contiguous(), src=0)
        return leaf

    def received(leaf: Any) -> Any:
        if not isinstance(leaf, _Form):
            return leaf
        dist.broadcast(message := torch.empty(leaf.shape, dtype=leaf.dtype, device=device), src=0)
        return torch.empty_strided(leaf.shape, leaf.stride, dtype=leaf.dtype).copy_(message)

    forms = from_rank_zero(_mapped(form, tree) if first else None)
    with waiting():
        return _mapped(sent, tree) if first else _mapped(received, forms)


def _mapped(change: Callable[[Any], Any], tree: Any) -> Any:
    """Returns nested dicts and lists in which everything else is changed."""
    if isinstance(tree, dict):
        return {key: _mapped(change, item) for key, item in tree.items()}
    if isinstance(tree, list):
        return [_mapped(change, item) for item in tree]
    return change(tree)


def barrier() -> None:
    """Waits until every rank has called it."""
    if world_size() > 1:
        dist.barrier()


def ranks_of_group(group: str | None) -> int:
    """Returns the number of ranks per group of `objective.group`: those of a machine for "node", all for None.

    Call on every rank. Raises ValueError on every rank if such groups are not possible.
    """
    world = world_size()
    if group == "node":
        of_machines = gather_objects(int(os.environ.get("LOCAL_WORLD_SIZE", world)))
        ranks = of_machines[0]
        if other := sorted(set(of_machines) - {ranks}):
            raise UserError(
                f"objective.group=node needs the same number of ranks on every machine, but there are {ranks} on one and "
                f"{other[0]} on another; start as many on each, or set objective.group to a number of ranks"
            )
    elif group is None or (group.isdecimal() and int(group) > 0):
        ranks = int(group or world)
    else:
        raise UserError(f"objective.group={group} is neither node nor a number of ranks")
    if world % ranks:
        raise UserError(f"objective.group={group} cannot split {world} ranks into groups of {ranks}")
    return ranks


def subgroup(ranks: int, timeout: float) -> "dist.ProcessGroup | None":
    """Returns the process group of `ranks` consecutive ranks that contains this one; None for all ranks. Call on every rank.

    timeout: in seconds; a new group would not take that of the other groups.
    """
    if ranks == world_size():
        return None
    limit = timedelta(seconds=timeout)
    groups = [dist.new_group(range(start, start + ranks), timeout=limit) for start in range(0, world_size(), ranks)]
    own = groups[rank() // ranks]
    assert isinstance(own, dist.ProcessGroup)  # this rank is in it
    return own


def set_group_timeouts(timeout: float) -> None:
    """Sets the timeout in seconds of every process group that there is, also of those that a library made."""
    torch_name = "set_timeout" if hasattr(dist.distributed_c10d, "set_timeout") else "_set_pg_timeout"  # before torch 2.14
    for group in list(dist.distributed_c10d._world.pg_map):
        getattr(dist.distributed_c10d, torch_name)(timedelta(seconds=timeout), group)


def message_device() -> str:
    """Returns the device of tensors to send: NCCL supports only GPUs."""
    return DEVICES.get(dist.get_backend(), "cpu") if is_initialized() else "cpu"
