"""Failures that every rank hears of: an error on one rank ends all of them, with its message, instead of a wait for a timeout."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from eae_dist.distributed.collectives import from_rank_zero, gather_objects, is_initialized, rank, world_size

Result = TypeVar("Result")


class RankZeroFailed(RuntimeError):
    """Rank 0 failed at what it does for all; raised on the other ranks."""


@contextmanager
def on_rank_zero() -> Iterator[bool]:
    """Work that only rank 0 does and that may fail: yields whether this is rank 0; a failure there is raised on every rank.

        with on_rank_zero() as is_rank_zero:
            if is_rank_zero: ...

    The other ranks raise RankZeroFailed with rank 0's message instead of waiting for it until the timeout.
    """
    failure = None
    try:
        yield rank() == 0
    except Exception as error:
        failure = error
    message = from_rank_zero(None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    if message is not None:
        raise RankZeroFailed(message)


def on_every_rank(work: Callable[[], Result]) -> Result:
    """What `work` returns here. What a user can set right (ValueError, OSError) on one rank ends all; call on every rank.

    The others raise an OSError with that rank's message.
    """
    failure = result = None
    try:
        result = work()
    except (ValueError, OSError) as error:
        failure = error
    every = gather_objects(None if failure is None else str(failure))
    if failure is not None:
        raise failure
    for who, message in enumerate(every):
        if message is not None:
            raise OSError(f"rank {who}: {message}")
    return result


def require_equal(value, what: str) -> None:
    """Raises ValueError on every rank unless all were given the same value (picklable, small); `what` names it."""
    every = gather_objects(value)
    if other := [at for at, theirs in enumerate(every) if theirs != every[0]]:
        raise ValueError(
            f"rank {other[0]} was given other {what} than rank 0, but they are ranks of one job: {every[other[0]]}, {every[0]}. "
            f"Separate jobs under one launcher want SLURM_STEP_NUM_TASKS=1 and no RANK in their environment"
        )


@contextmanager
def ending_ranks(*known: type[Exception]) -> Iterator[None]:
    """What a command runs in: leaves the process group at the end, and ends in one line for what a user can set right.

    That is ValueError and OSError, said by the rank that met it, and the `known` errors that every rank meets, said by rank 0.
    """
    try:
        yield
    except RankZeroFailed:  # rank 0 says it
        sys.exit(1)
    except known as error:
        sys.exit(f"error: {error}" if rank() == 0 else 1)
    except (ValueError, OSError) as error:
        where = f" [rank {rank()}]" if world_size() > 1 else ""
        sys.exit(f"error{where}: {error}")
    finally:
        if is_initialized():
            dist.destroy_process_group()


def silent_ranks(patience: float) -> list[int]:
    """The ranks that do not call this within so many seconds: after a collective failed, those that ended or hang.

    Called by the ranks that saw it fail. They meet in the store through which the ranks found each other, not by a collective.
    """
    store = dist.distributed_c10d._get_default_store()  # there is no public name for it
    silent = set(range(world_size())) - {rank()}

    def ask() -> None:
        with suppress(RuntimeError):  # the store has ended with the process that held it
            store.set(f"eae_dist/alive/{rank()}", "")
        for other in sorted(silent):
            with suppress(RuntimeError):  # it did not come
                store.wait([f"eae_dist/alive/{other}"], timedelta(seconds=max(end - time.monotonic(), 0.1)))
                silent.discard(other)

    # In a thread, because a store behind a broken network answers nothing at all, not even that the time is over.
    end = time.monotonic() + patience
    (thread := threading.Thread(target=ask, daemon=True)).start()
    thread.join(patience + 1)
    return sorted(silent)
