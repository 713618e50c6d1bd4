"""Trains one objective on one data set on any number of ranks:

    accelerate launch -m eae_dist.train [--config FILE.yaml ...] [key=value ...]

The same command with the same run folder continues from its last checkpoint. The training loop is `training/loop.py`.
"""

import os
import sys
from collections.abc import Sequence

from eae_dist.config import load_config
from eae_dist.distributed import barrier, ending_ranks
from eae_dist.distributed.launch import srun_ranks
from eae_dist.training.loop import train
from eae_dist.training.metrics_log import TrainingDiverged


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command on this rank; argv: default: the command line."""
    os.environ |= srun_ranks(os.environ)
    with ending_ranks(TrainingDiverged):
        train(load_config(sys.argv[1:] if argv is None else argv))
        barrier()


if __name__ == "__main__":
    main()
