"""Failures are passed to all ranks: an error on one rank ends all ranks with its message, instead of a timeout."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from eae_dist.distributed.collectives import from_rank_zero, gather_objects, is_initialized, rank, world_size
from eae_dist.distributed.stop import launcher_process

Result = TypeVar("Result")


class RankZeroFailed(RuntimeError):
    """Raised on the other ranks when rank 0 failed in work that it does for all ranks."""


@contextmanager
def on_rank_zero() -> Iterator[bool]:
    """A context for work that only rank 0 does: yields True on rank 0; a failure on rank 0 is raised on every rank.

        with on_rank_zero() as is_rank_zero:
            if is_rank_zero: ...

    The other ranks raise RankZeroFailed with the message of rank 0, instead of waiting until the timeout.
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
    """Returns the result of `work` on this rank. Call on every rank.

    A ValueError or OSError on one rank ends all ranks: the others raise an OSError with the message of that rank.
    """
    result: Result
    failure: Exception | None = None
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


def require_equal(value: object, what: str) -> None:
    """Raises ValueError on every rank unless the value (picklable, small) is the same on all; `what` names it."""
    every = gather_objects(value)
    if other := [at for at, theirs in enumerate(every) if theirs != every[0]]:
        raise ValueError(
            f"rank {other[0]} has other {what} than rank 0, but both are ranks of one job: {every[other[0]]}, {every[0]}. "
            f"Separate jobs under one launcher need SLURM_STEP_NUM_TASKS=1 and no RANK in their environment"
        )


@contextmanager
def ending_ranks(*known: type[Exception]) -> Iterator[None]:
    """The context of a command: it destroys the process group at the end, and prints an expected error as one line.

    Expected errors are ValueError and OSError, printed by the rank on which they occur, and the `known` errors, which occur on
    every rank and are printed by rank 0.
    """
    try:
        yield
    except RankZeroFailed:  # rank 0 prints the message
        sys.exit(1)
    except known as error:
        sys.exit(last_word(f"error: {error}") if rank() == 0 else 1)
    except (ValueError, OSError) as error:
        where = f" [rank {rank()}]" if world_size() > 1 else ""
        sys.exit(last_word(f"error{where}: {error}"))
    finally:
        if is_initialized():
            dist.destroy_process_group()


def last_word(text: str) -> str:
    """Returns the text, and prints it once more when the launcher of this rank has ended, within at most 30 seconds.

    accelerate and torchrun print a traceback of their own after a rank has failed, below which nobody looks for the cause.
    """
    launcher = launcher_process()
    if launcher is not None and os.fork() == 0:
        try:
            os.setsid()  # a launcher ends the process groups of its ranks
            end = time.monotonic() + 30
            while _runs(launcher) and time.monotonic() < end:
                time.sleep(0.02)
            os.write(2, f"{text}\n".encode(errors="replace"))
        finally:
            os._exit(0)
    return text


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError:
        return False
    return True


def silent_ranks(patience: float) -> list[int]:
    """Returns the ranks that do not call this function within `patience` seconds: those that ended or hang.

    The ranks that saw a collective fail call it. They communicate through the store of the process group, not by a collective.
    """
    store = dist.distributed_c10d._get_default_store()  # there is no public name for it
    silent = set(range(world_size())) - {rank()}

    def ask() -> None:
        with suppress(RuntimeError):  # the process that held the store has ended
            store.set(f"eae_dist/alive/{rank()}", "")
        for other in sorted(silent):
            with suppress(RuntimeError):  # the other rank did not call
                store.wait([f"eae_dist/alive/{other}"], timedelta(seconds=max(end - time.monotonic(), 0.1)))
                silent.discard(other)

    # In a thread, because a store behind a broken network may never answer, not even with a timeout.
    end = time.monotonic() + patience
    (thread := threading.Thread(target=ask, daemon=True)).start()
    thread.join(patience + 1)
    return sorted(silent)
