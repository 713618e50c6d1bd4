"""Reports of unexpected failures of a rank, on stderr and in the run folder."""

import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from eae_dist.distributed import OtherRankFailed, failed_ranks, of_collective, rank, world_size


@contextmanager
def reported_crashes(
    run: Path,
    step: Callable[[], int],
    last_checkpoint: Callable[[], Path | None],
    timeout: float,
    *known: type[Exception],
) -> Iterator[None]:
    """Reports any exception except the `known` types, whose message is enough, and raises it again.

    The report names rank, host, step and last checkpoint, and the ranks that failed or do not answer if it was a collective that
    failed; such a rank then raises OtherRankFailed. They answer within a tenth of the timeout, at most 10 seconds. The report is
    printed to stderr and written with the traceback to run/crashes/rank-R.txt. timeout: in seconds.
    """
    try:
        yield
    except known:
        raise
    except Exception as error:
        where = f"rank {rank()} of {world_size()} on {platform.node()}"
        said = f"{where} failed in step {step() + 1}: {type(error).__name__}: {error}"
        blamed = failed_ranks(min(timeout / 10, 10.0)) if of_collective(error) else ""
        if blamed:
            said = f"{where} could not go on in step {step() + 1}: {blamed}"
        last = last_checkpoint()  # may wait for a checkpoint, so it comes after the answer to the other ranks
        if last is None:
            said += "\nno checkpoint was saved yet; run the same command to start again"
        else:
            said += f"\nthe last checkpoint is {last}; run the same command to continue from it"
        print(said, file=sys.stderr, flush=True)
        try:
            (run / "crashes").mkdir(exist_ok=True)
            text = f"{time.strftime('%Y-%m-%d %H:%M:%S')}\n{said}\n\n{traceback.format_exc()}"
            (run / "crashes" / f"rank-{rank()}.txt").write_text(text)
        except OSError as unwritten:  # the failure may be the disk
            print(f"{run}/crashes cannot be written: {unwritten}", file=sys.stderr, flush=True)
        if blamed:
            raise OtherRankFailed(blamed) from error
        raise
