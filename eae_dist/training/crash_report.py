"""What is said, and kept in the run folder, when a rank fails at something that no setting explains."""

import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from eae_dist.distributed import rank, silent_ranks, world_size


@contextmanager
def reported_crashes(
    run: Path,
    step: Callable[[], int],
    last_checkpoint: Callable[[], Path | None],
    timeout: float,
    *known: type[Exception],
) -> Iterator[None]:
    """Reports any exception but the `known`, which say themselves what is wrong, and passes it on.

    The report names rank, host, step, last checkpoint and the ranks that do not answer within a tenth of the timeout, in
    seconds, at most 10; it goes to stderr and, with the traceback, into run/crashes/rank-R.txt.
    """
    try:
        yield
    except known:
        raise
    except Exception as error:
        where = f"rank {rank()} of {world_size()} on {platform.node()}"
        said = f"{where} failed in step {step() + 1}: {type(error).__name__}: {error}"
        patience = min(timeout / 10, 10.0)
        if world_size() > 1 and (silent := silent_ranks(patience)):
            said += f"\nrank {', '.join(map(str, silent))} ended or hangs: no answer within {patience:g} seconds"
        last = last_checkpoint()  # which may have to wait for it: the other ranks are answered before
        if last is None:
            said += "\nno checkpoint was saved yet; the same command starts anew"
        else:
            said += f"\nthe last checkpoint is {last}; the same command goes on from there"
        print(said, file=sys.stderr, flush=True)
        try:
            (run / "crashes").mkdir(exist_ok=True)
            text = f"{time.strftime('%Y-%m-%d %H:%M:%S')}\n{said}\n\n{traceback.format_exc()}"
            (run / "crashes" / f"rank-{rank()}.txt").write_text(text)
        except OSError as unwritten:  # the disk may be what failed
            print(f"{run}/crashes cannot be written: {unwritten}", file=sys.stderr, flush=True)
        raise
