"""Processes on this machine: commands that start their own ranks, and commands that run in parallel.

A command on ranks uses all local GPUs, or --nproc CPU ranks. Under a launcher (torchrun, accelerate, srun) it uses the ranks of
the launcher.
"""

import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import TypeVar

import torch

from eae_dist.distributed import barrier, ending_ranks, rank, require_equal
from eae_dist.distributed.processes import available_cores
from eae_dist.distributed.start import Start, srun_ranks, start_without_engine
from eae_dist.distributed.stop import LAUNCHERS
from eae_dist.errors import UserError

Result = TypeVar("Result")


def run_on_ranks(
    module: str, nproc: int | None, command: Sequence[str], how: Callable[[], Start], work: Callable[[], Result]
) -> Result | None:
    """Runs `work` on every rank; returns its result on rank 0 and None on the others.

    If more than one rank is needed and there is no launcher, this process is replaced by torchrun with `python -m module
    command`. how: returns how the ranks start. Errors end the process as `ending_ranks` says.
    """
    with ending_ranks():
        settings, launcher = how(), "RANK" in os.environ or srun_ranks(os.environ)
        gpus = 0 if settings.device == "cpu" else torch.cuda.device_count()
        if nproc is not None and nproc < 1:
            raise UserError(f"--nproc={nproc} must be at least 1")
        count = nproc or gpus or 1
        if 0 < gpus < count:
            raise UserError(f"--nproc={count} needs as many GPUs, but there are {gpus}; lower --nproc, or set train.device=cpu")
        if count > 1 and not launcher:
            os.execv(sys.executable, launched(module, count, command))
        start_without_engine(settings)
        first = rank() == 0
        if first:
            logging.basicConfig(level=logging.INFO, format="%(message)s")
        require_equal(list(command), "arguments")
        result = work()
        barrier()  # the result is told only if every rank has done its part
    return result if first else None


def launched(module: str, ranks: int, command: Sequence[str]) -> list[str]:
    """Returns the command line for `python -m module command` on `ranks` local ranks."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    return [sys.executable, *torchrun, "-m", module, *command]


class CommandFailed(RuntimeError):
    """A command ended with an error; the message has its last error line and the path of its full output."""


class JobPool:
    """Runs commands of this package, at most `jobs` at a time, each on an equal part of the local GPUs or CPU cores.

    nproc: ranks per command. `call` may be called from `jobs` threads. Raises ValueError under a launcher, and if there are
    fewer GPUs than ranks.
    """

    def __init__(self, jobs: int, nproc: int | None):
        if "RANK" in os.environ or srun_ranks(os.environ):
            raise UserError("this command starts its own ranks; call it without a launcher")
        if jobs < 1 or (nproc is not None and nproc < 1):
            raise UserError(f"--jobs={jobs} and --nproc={nproc} must be at least 1")
        gpus = []
        if torch.cuda.is_available():
            named = os.environ.get("CUDA_VISIBLE_DEVICES")
            gpus = named.split(",") if named else [str(gpu) for gpu in range(torch.cuda.device_count())]
        self.jobs, self.ranks = jobs, nproc or len(gpus) // jobs or 1
        if gpus and jobs * self.ranks > len(gpus):
            raise UserError(
                f"--jobs={jobs} with {self.ranks} rank(s) each needs {jobs * self.ranks} GPUs, but there are {len(gpus)}"
            )
        threads = str(max(available_cores() // (jobs * self.ranks), 1))
        self._environments: SimpleQueue[dict[str, str]] = SimpleQueue()
        for job in range(jobs):
            environment = {"OMP_NUM_THREADS": threads, **os.environ, "SLURM_STEP_NUM_TASKS": "1", LAUNCHERS["our own"]: "1"}
            if gpus:
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[job * self.ranks : (job + 1) * self.ranks])
            self._environments.put(environment)
        self._lock = Lock()
        self._running: set[subprocess.Popen] = set()
        self._stopped = False

    def call(self, module: str, command: Sequence[str], output: Path) -> None:
        """Runs `python -m module command` to its end and writes its output to a file. Raises CommandFailed."""
        environment = self._environments.get()
        try:
            with open(output, "w") as file:
                line = launched(module, self.ranks, command)
                with self._lock:
                    if self._stopped:
                        raise CommandFailed("not started: the pool was stopped")
                    # A new session does not get the signals of our process group (Ctrl-C, SLURM); `stop` sends the signal.
                    # torchrun that gets a signal twice leaves its ranks before they have saved.
                    process = subprocess.Popen(
                        line, env=environment, start_new_session=True, stdin=subprocess.DEVNULL, stdout=file, stderr=file
                    )
                    self._running.add(process)
                status = process.wait()
                with self._lock:
                    self._running.discard(process)
        finally:
            self._environments.put(environment)
        if status != 0:
            text = output.read_text(errors="replace")
            # An error includes its indented lines; a progress bar may precede it on the line.
            errors = re.findall(r"error: .*(?:\n  .*)*", text)
            last = ["it said nothing", *text.strip().splitlines()[-1:], *errors[-1:]][-1]
            raise CommandFailed(f"{module.rpartition('.')[2]} ended with status {status}: {last} (all of it: {output})")

    def stop(self) -> None:
        """Asks running commands to end (training saves first) and starts no more commands."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()
