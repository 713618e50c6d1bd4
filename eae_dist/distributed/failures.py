"""Failures are passed to all ranks: an error on one rank ends all ranks with its message, instead of a timeout."""

import gc
import os
import select
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from eae_dist.distributed.collectives import from_rank_zero, gather_objects, is_initialized, rank, world_size
from eae_dist.distributed.hanging import end_later, process_name
from eae_dist.distributed.stop import launcher_process
from eae_dist.errors import UserError, is_users

Result = TypeVar("Result")
PATIENCE = 5.0  # seconds within which a live rank answers


class OtherRankFailed(RuntimeError):
    """Raised on the ranks that cannot go on because another one failed; the message names it."""


class RankZeroFailed(OtherRankFailed):
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

    An error on one rank ends all ranks: the others raise OtherRankFailed with the message of that rank.
    """
    result: Result
    failure: Exception | None = None
    try:
        result = work()
    except Exception as error:
        if of_collective(error):  # the ranks cannot talk to each other
            raise
        failure = error
    every = gather_objects(None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    for who, message in enumerate(every):
        if message is not None:
            raise OtherRankFailed(f"rank {who} failed: {message}")
    return result


def require_equal(value: object, what: str) -> None:
    """Raises ValueError on every rank unless the value (picklable, small) is the same on all; `what` names it."""
    every = gather_objects(value)
    if other := [at for at, theirs in enumerate(every) if theirs != every[0]]:
        raise UserError(
            f"rank {other[0]} has other {what} than rank 0, but both are ranks of one job: {every[other[0]]}, {every[0]}. "
            f"Separate jobs under one launcher need SLURM_STEP_NUM_TASKS=1 and no RANK in their environment"
        )


@contextmanager
def ending_ranks(*known: type[Exception]) -> Iterator[None]:
    """The context of a command: it says why the command failed, and leaves the process group.

    An error that a user can set right is one line, printed by the rank on which it occurs; so are the `known` errors, which occur
    on every rank and are printed by rank 0. Any other error keeps its traceback. A rank whose collective failed because another
    rank ended names that rank.
    """
    failed = True
    try:
        yield
        failed = False
    except RankZeroFailed:  # rank 0 says why
        sys.exit(1)
    except OtherRankFailed as error:
        sys.exit(last_word(f"error{_where()}: {error}"))
    except known as error:
        sys.exit(last_word(f"error: {error}") if rank() == 0 else 1)
    except Exception as error:
        where = _where()
        if of_collective(error):
            told = traceback.format_exc()
            # Ranks that wait for this one, in a ring, notice the failure only when it has left; then they can answer.
            if blamed := failed_ranks(PATIENCE, partial(_drop_group, error)):
                text = f"error{where}: {blamed}; this rank was waiting ({first_line(error)}). "
                sys.exit(last_word(text + "Find the cause in what that rank printed, then start the same command again"))
            sys.exit(told.rstrip())
        _tell_failure(error)
        if is_users(error):
            sys.exit(last_word(f"error{where}: {error}"))
        traceback.print_exc()  # before the group is left, which may wait for other ranks or end the process
        sys.exit(1)
    finally:
        _leave_group(failed)


def _leave_group(failed: bool) -> None:
    if is_initialized():
        if failed and dist.get_backend() == "nccl":  # leaving in order would wait for messages of ranks that have ended
            dist.distributed_c10d._abort_process_group()
        else:
            dist.destroy_process_group()


def _drop_group(error: BaseException) -> None:
    """Leaves the group and closes its connections, which the frames of the traceback would keep open."""
    traceback.clear_frames(error.__traceback__)
    _leave_group(failed=True)
    gc.collect()


def last_word(text: str) -> str:
    """Returns the text, and prints it once more when the launcher of this rank has ended, within at most 30 seconds.

    accelerate and torchrun print a traceback of their own after a rank has failed, below which nobody looks for the cause. Where
    the system has no pidfd (Linux before 5.3, other systems), the text is not printed once more.
    """
    launcher = launcher_process()
    if launcher is None or not hasattr(os, "pidfd_open"):
        return text
    with suppress(OSError):
        # It is readable from the launcher's end on, also before whoever started the launcher has asked how it ended.
        ended = os.pidfd_open(launcher)
        if os.fork() == 0:
            try:
                os.setsid()  # a launcher ends the process groups of its ranks
                select.select([ended], [], [], 30)
                os.write(2, f"{text}\n".encode(errors="replace"))
            finally:
                os._exit(0)
        os.close(ended)
    return text


def _where() -> str:
    return f" [rank {rank()}]" if world_size() > 1 else ""


def first_line(error: BaseException) -> str:
    """Returns the first line of a message; torch's may go on with a stack of C++."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def of_collective(error: BaseException) -> bool:
    """True if a message between ranks failed, and not what a rank computes: only then is another rank to blame.

    NCCL and the store have types of errors of their own; gloo raises RuntimeError that begins with a path of its source.
    """
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and "gloo/" in first_line(error))


def _tell_failure(error: Exception) -> None:
    """Leaves word of this rank's failure: for the other ranks in the store, and for torchrun, which repeats it at the end."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        get_error_handler().record_exception(error)
    if world_size() > 1:
        told = f"{type(error).__name__}: {first_line(error)}"
        _within(PATIENCE, lambda: _store().set(f"eae_dist/failed/{rank()}", told))


def tell_process() -> None:
    """Leaves the name of this rank's process for the others, which end it if it hangs. Does nothing on systems without /proc."""
    with suppress(OSError):
        _store().set(f"eae_dist/process/{rank()}", process_name(os.getpid()))


def failed_ranks(patience: float, leave: Callable[[], None] = lambda: None) -> str:
    """Returns which ranks failed, ended or hang, as a phrase; "" if all answer. Call where a collective has failed.

    A rank that ended left its error, or does not call this function within `patience` seconds, as the ranks do that saw a
    collective fail. They talk through the store of the process group, not by a collective. A rank on this machine that hangs is
    killed some seconds later.
    leave: is called before the others are asked, and may leave the group.
    """
    if world_size() == 1:
        return ""
    store, me, others = _store(), rank(), set(range(world_size())) - {rank()}
    leave()
    end, silent, told, hanging = time.monotonic() + patience, set(others), {}, []

    def answered(question: str, other: int) -> bool:
        try:
            store.wait([f"eae_dist/{question}/{other}"], timedelta(seconds=max(end - time.monotonic(), 0.1)))
        except dist.DistStoreError:  # it did not call
            return False
        return True

    def ask() -> None:
        store.set(f"eae_dist/alive/{me}", "")
        silent.difference_update([other for other in sorted(others) if answered("alive", other)])
        for other in sorted(silent):
            if store.check([f"eae_dist/failed/{other}"]):
                told[other] = store.get(f"eae_dist/failed/{other}").decode()
            elif store.check([f"eae_dist/process/{other}"]):
                hanging.append(store.get(f"eae_dist/process/{other}").decode())
        store.set(f"eae_dist/asked/{me}", "")

    # The process that serves the store is rank 0, or torchrun, which outlives the ranks.
    if not _within(patience + 1, ask):
        return "rank 0, or the machine or network that it is on, ended or hangs"
    if me == 0:  # the others ask its store
        end = time.monotonic() + patience
        _within(patience + 1, lambda: [answered("asked", other) for other in others - silent])
    end_later(hanging)
    if told:
        return ", ".join(f"rank {other} failed ({why})" for other, why in told.items())
    if not silent:
        return ""
    return f"rank {', '.join(map(str, sorted(silent)))} ended or hangs: no answer within {patience:g} seconds"


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()  # there is no public name for it


def _within(seconds: float, action: Callable[[], object]) -> bool:
    """True if the action ended in time and the store answered; a store behind a broken network may never answer."""
    done = []

    def act() -> None:
        with suppress(RuntimeError):  # the process that served the store has ended
            action()
            done.append(True)

    (thread := threading.Thread(target=act, daemon=True)).start()
    thread.join(seconds)
    return bool(done)
