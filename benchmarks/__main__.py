"""Runs benchmarks, all or the named ones, and prints a markdown table:

    python -m benchmarks [entropy] [stream] [training] [blocks] [limit] [running] [activations] [mixture] [peer] [judging]
                         [search] [service]

Competitors take turns in one process, with one thread each, and their medians are compared. Runs on several ranks and peak memory
are measured in separate processes. "CPU" is the processor time of all threads of a process, user and system; other work on the
machine affects it far less than wall time.
"""

import os
import platform
import sys

import torch

from benchmarks import activations, blocks, entropy, judging, limit, mixture, peer, running, search, service, stream, training
from benchmarks.table import HEADER
from eae_dist.distributed.start import keep_freed_memory

BENCHMARKS = {
    "entropy": entropy.rows,
    "stream": stream.rows,
    "training": training.rows,
    "blocks": blocks.rows,
    "limit": limit.rows,
    "running": running.rows,
    "activations": activations.rows,
    "mixture": mixture.rows,
    "peer": peer.rows,
    "judging": judging.rows,
    "search": search.rows,
    "service": service.rows,
}


def main() -> None:
    """Runs the command line."""
    names = sys.argv[1:] or list(BENCHMARKS)
    if unknown := [name for name in names if name not in BENCHMARKS]:
        sys.exit(f"error: there is no benchmark {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that are started
    torch.set_num_threads(1)
    keep_freed_memory()  # as training does on CPUs; it applies to all competitors
    print(f"{platform.machine()}, {os.cpu_count()} processors, torch {torch.__version__}, one thread a process\n")
    print(HEADER, flush=True)
    for name in names:
        for row in BENCHMARKS[name]():
            print(row, flush=True)


if __name__ == "__main__":
    main()
