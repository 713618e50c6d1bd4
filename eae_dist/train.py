"""Trains one objective on one data set on any number of ranks:

    accelerate launch -m eae_dist.train [--config FILE.yaml ...] [key=value ...]

The same command with the same run folder continues from its last checkpoint. The training loop is `training/loop.py`.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from accelerate.commands.config.config_args import default_config_file

from eae_dist.config import load_config
from eae_dist.distributed import barrier, ending_ranks
from eae_dist.training.launcher_defaults import note_on_defaults
from eae_dist.training.loop import train
from eae_dist.training.metrics_log import TrainingDiverged


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command on this rank; argv: default: the command line."""
    note = note_on_defaults(os.environ, launcher_command(), Path(default_config_file))
    if note and os.environ.get("RANK", "0") == "0":
        print(note, file=sys.stderr, flush=True)
    with ending_ranks(TrainingDiverged):
        train(load_config(sys.argv[1:] if argv is None else argv))
        barrier()


def launcher_command() -> str:
    """Returns the command line of the process that started this one; empty where the system does not tell."""
    try:
        return Path(f"/proc/{os.getppid()}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


if __name__ == "__main__":
    main()
