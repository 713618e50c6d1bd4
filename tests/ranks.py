"""Ranks that start in a tenth of a second: forked from a server that has imported torch and this package once.

There is no launcher that would end all of them when one fails: a test sees what each rank does by itself.
"""

import json
import multiprocessing
import os
import random
import runpy
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from eae_dist.config import load_config
from eae_dist.data.stream import ShardStream
from eae_dist.distributed import ending_ranks, rank
from eae_dist.training.loop import train
from eae_dist.training.metrics_log import TrainingDiverged

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["eae_dist.train", "torch._dynamo"])  # the second by every optimizer, in a second or more


@dataclass(frozen=True)
class Ended:
    """How each rank ended (0, or the negative number of the signal that killed it), and what it printed."""

    codes: list[int]
    said: list[str]


def free_port() -> int:
    """A port that nobody listens at on any address, below those that the system gives to connections."""
    while True:
        port = random.SystemRandom().randrange(10_000, 30_000)
        with socket.socket() as free, suppress(OSError):
            free.bind(("", port))
            return port


def run_ranks(
    ranks: int,
    logs: Path,
    work: Callable,
    *arguments,
    environment: Mapping[str, str] | None = None,
    timeout: float = 120,
    hanging: Sequence[int] = (),
) -> Ended:
    """Calls `work` on so many ranks, each with a log of its own in the folder; one that has not ended in time fails the test.

    hanging: ranks that are killed when the others have ended.
    """
    logs.mkdir(parents=True, exist_ok=True)
    variables = {"WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "OMP_NUM_THREADS": 1}
    variables |= environment or {}
    processes = []
    files = [logs / f"rank-{number}.log" for number in range(ranks)]
    for number, log in enumerate(files):
        mine = {name: str(value) for name, value in (variables | {"RANK": number, "LOCAL_RANK": number}).items()}
        processes.append(FORKS.Process(target=_rank, args=(mine, log, work, arguments)))
    for process in processes:
        process.start()
    end = time.monotonic() + timeout
    awaited = [(number, process) for number, process in enumerate(processes) if number not in hanging]
    for _, process in awaited:
        process.join(max(0, end - time.monotonic()))
    late = [number for number, process in awaited if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    said = [log.read_text() for log in files]
    assert not late, f"ranks {late} still ran after {timeout} s:\n" + "\n".join(said)
    return Ended([process.exitcode for process in processes], said)


def _rank(environment: dict[str, str], log: Path, work: Callable, arguments: Sequence) -> None:
    os.environ |= environment
    torch.set_num_threads(1)
    # A launched rank forks its loader's workers. Ranks of a fork server would have theirs from one too, which imports torch anew.
    multiprocessing.set_start_method("fork", force=True)
    with open(log, "wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    work(*arguments)


def train_in_turn(*runs: list[str]) -> None:
    """Trains one run after the other as `python -m eae_dist.train` with these arguments would, on the same ranks.

    Each is broken once, after its first checkpoint.
    """
    with ending_ranks(TrainingDiverged):
        for arguments in runs:
            config = load_config(arguments)
            os.environ["SABOTEUR_MARK"] = f"{config.train.output}.mark"
            os.environ["SABOTEUR_AWAITS"] = f"{config.train.output}/checkpoints/latest"
            with noting_keys(Path(f"{config.train.output}.keys")):
                train(config)


def try_in_turn(*runs: list[str]) -> None:
    """As `train_in_turn`, for runs that every rank ends with an error, which it says."""
    with ending_ranks():
        for arguments in runs:
            try:
                train(load_config(arguments))
            except (ValueError, OSError, TrainingDiverged) as error:
                print(f"error: {error}", flush=True)
            else:
                print("no error", flush=True)


@contextmanager
def noting_keys(folder: Path) -> Iterator[None]:
    """Every rank notes the samples of each step that it takes; a step that is taken again takes the place of its first try."""
    folder.mkdir(exist_ok=True)
    original = ShardStream.__iter__

    def noted(stream):
        for step, batch in enumerate(original(stream), start=stream.start_step):
            (folder / f"{step}-{rank()}.json").write_text(json.dumps(batch["key"]))
            yield batch

    ShardStream.__iter__ = noted
    try:
        yield
    finally:
        ShardStream.__iter__ = original


def noted_keys(folder: Path, steps: int) -> list[str]:
    """The samples of a run in their order, over all ranks."""
    notes = [sorted(folder.glob(f"{step}-*.json")) for step in range(steps)]
    return [key for step in notes for note in step for key in json.loads(note.read_text())]


def run_script(script: str, *arguments: str) -> None:
    """Runs a script as torchrun would on this rank."""
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
