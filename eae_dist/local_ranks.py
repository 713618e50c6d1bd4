"""Commands that start their own ranks: all local GPUs, or as many CPU ranks as --nproc says.

Under a launcher (torchrun, accelerate, srun) they join its ranks.
"""

import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from accelerate import PartialState

from eae_dist.distributed import ending_ranks, rank

Result = TypeVar("Result")


def run_on_ranks(module: str, nproc: int | None, command: Sequence[str], work: Callable[[], Result]) -> Result | None:
    """What `work` returns on rank 0, None on the others; `work` runs on every rank.

    Where more ranks are wanted and no launcher made them, this process becomes torchrun with `python -m module command`. What
    a user can set right (ValueError, OSError) ends the process with one line.
    """
    gpus = torch.cuda.device_count()
    count = nproc or gpus or 1
    if 0 < gpus < count:
        sys.exit(f"error: --nproc={count} wants a GPU each, there are {gpus}; lower --nproc")
    if "RANK" not in os.environ and count > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "-m", module]
        os.execv(sys.executable, [sys.executable, *launcher, *command])
    PartialState(cpu=not torch.cuda.is_available())
    first = rank() == 0
    if first:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
    with ending_ranks():
        result = work()
    return result if first else None
