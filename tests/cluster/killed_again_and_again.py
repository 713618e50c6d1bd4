"""A training that kills itself as a seed says: torchrun ... killed_again_and_again.py KILLS PLAN [key=value ...]

Each start takes the next line of the plan, "rank step": that rank is killed in that step of the start, before any of it is done.
KILLS holds a file for each kill so far. torchrun starts all ranks anew after each.
"""

import os
import signal
import sys
from pathlib import Path

from eae_dist.data.stream import ShardStream
from eae_dist.distributed import rank
from eae_dist.train import main

kills, plan, *arguments = sys.argv[1:]
original = ShardStream.__iter__


def killed(stream):
    done = len(list(Path(kills).iterdir()))
    lines = Path(plan).read_text().splitlines()
    who, when = map(int, lines[done].split()) if done < len(lines) else (-1, -1)
    for step, batch in enumerate(original(stream)):
        if step == when and rank() == who:
            (Path(kills) / f"{done}-rank-{who}-step-{stream.start_step + step}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch


ShardStream.__iter__ = killed
main(arguments)
