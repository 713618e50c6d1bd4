"""What a run does beside its steps, on one rank: it reads, saves and starts again.

    python -m benchmarks.running key=value ...      trains to the end of a first step, and prints the CPU time [s] until then

optimizing: Adam's step in one kernel (train.fused) against torch's default, which takes the weights one by one on a CPU, and
against torch's operations on lists of tensors (foreach).
reading: the wait for data over the time of a step, from the log of a run with one loader worker.
saving: how long a save keeps training waiting, against a clone of each tensor of weights, buffers and Adam's state. The write in
the background ends before the other's turn. It is wall time, because the thread that writes has CPU time too.
starting: a process from its start to the end of its first step, for a resumed run and for a new one. The run at step 10 was
trained. The run at step 10,000 is the same run with another step in its checkpoint, and as many lines in its log as it would
have.
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.images import write_shards
from benchmarks.table import Row, Seconds, at_most, take_turns
from eae_dist import train as command
from eae_dist.config import load_config
from eae_dist.objectives import build_objective, resolve
from eae_dist.training import checkpoint as checkpoints
from eae_dist.training import loop as training
from eae_dist.training.async_checkpoint import AsyncCheckpoints

SHAPE, BATCH, IMAGES = (1, 32, 32), 128, 1024  # for the small network
SHARE, LINES, STEPS_PER_LINE = 0.02, 12, 10
NOTHING_ELSE = ("train.sample_every=1000000", "train.save_every=1000000")  # before the end
LARGE, LARGE_SHAPE = "rae32", (3, 32, 32)
COPIES, SAVES = 1.5, 9
RESUMED_AT, LONGER, STARTS = (10, 10_000), 1.2, 7


def rows() -> Iterator[Row]:
    """Yields the rows of the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        root = write_shards(folder / "shards", SHAPE, "png", shards=4, samples=IMAGES // 4)
        settings = [f"data.root={root}", "data.validation=null", "train.device=cpu", f"train.global_batch={BATCH}"]
        yield from optimizing("small", SHAPE, 301)
        yield from optimizing(LARGE, LARGE_SHAPE, 9)
        yield reading(folder / "reading", settings)
        yield saving(folder / "saving")
        yield from starting(folder, settings)


def optimizing(network: str, shape: tuple[int, int, int], rounds: int) -> Iterator[Row]:
    """Yields the rows on the optimizer's step for a network."""
    config = resolve(load_config([f"model.network={network}"]), shape)
    steps = {}
    for kind in ("fused", "default", "foreach"):
        parameters = list(build_objective(config.model, config.objective, shape, 0).parameters())
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        steps[kind] = torch.optim.Adam(parameters, fused=kind == "fused" or None, foreach=kind == "foreach" or None).step
        steps[kind]()  # makes the state
    turns = take_turns(steps, rounds)
    for kind in ("default", "foreach"):
        columns = (f"{turns[which].cpu * 1e3:.2f} ms" for which in ("fused", kind))
        yield Row(f"Adam's step, {network}, fused: {kind}", *columns, f"{turns[kind].cpu / turns['fused'].cpu:.1f}x")


def reading(run: Path, settings: Sequence[str]) -> Row:
    """Returns the row on the wait for data."""
    train(run, (LINES + 1) * STEPS_PER_LINE, *settings, "data.workers=1", *NOTHING_ELSE)
    lines = records(run)[1:]  # the worker started during the first line
    wait, step = (
        statistics.median(values)
        for values in zip(*((line["rank_data_wait"][0], BATCH / line["images_per_second"]) for line in lines), strict=True)
    )
    columns = (f"{wait * 1e3:.2f} ms", f"{step * 1e3:.0f} ms", f"{wait / step:.2%}", f"at most {SHARE:.0%}", wait / step <= SHARE)
    return Row(f"wait for data, one worker: training step, small, batch {BATCH}", *columns)


def saving(run: Path) -> Row:
    """Returns the row on saves."""
    config = resolve(load_config([f"model.network={LARGE}"]), LARGE_SHAPE)
    objective = build_objective(config.model, config.objective, LARGE_SHAPE, 0)
    optimizer = torch.optim.Adam(objective.parameters())
    for parameter in objective.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()

    def clones() -> list[torch.Tensor]:
        moments = [tensor for state in optimizer.state_dict()["state"].values() for tensor in state.values()]
        return [tensor.clone() for tensor in (*objective.state_dict().values(), *moments)]

    with AsyncCheckpoints(run, config) as saves:

        def start() -> None:
            saves.start(objective.state_dict(), optimizer.state_dict(), {"step": 1, "best_step": 0})

        seconds = take_turns({"save": start, "write": saves.wait, "clones": clones}, SAVES)
    return Row(
        f"save, {LARGE} with Adam's state, training waits: clones of all tensors",
        *(f"{seconds[what].wall * 1e3:.0f} ms" for what in ("save", "clones")),
        **at_most(COPIES, seconds["save"].wall / seconds["clones"].wall),
        beside=f"wall; written in {seconds['write'].wall:.1f} s more",
    )


def starting(folder: Path, settings: Sequence[str]) -> Iterator[Row]:
    """Yields the rows on starts."""
    first, later = RESUMED_AT
    runs = {0: folder / "new", first: folder / "first", later: folder / "later"}
    train(runs[first], first, *settings)
    shutil.copytree(runs[first], runs[later], symlinks=True)
    set_clock(runs[later], later)
    starts: dict[int, list[Seconds]] = {step: [] for step in runs}
    for _ in range(STARTS):
        for step, run in runs.items():
            starts[step].append(first_step(run, later + 1, *settings))
        shutil.rmtree(runs[0])
    cpu, wall = (
        {step: statistics.median(getattr(start, clock) for start in starts[step]) for step in runs} for clock in ("cpu", "wall")
    )
    for step in RESUMED_AT:
        yield Row(
            f"start to the first step, small, resumed at step {step:,}: new run",
            f"{cpu[step]:.2f} s",
            f"{cpu[0]:.2f} s",
            **at_most(LONGER, cpu[step] / cpu[0]),
            beside=f"wall {wall[step] / wall[0]:.2f}x",
        )


def set_clock(run: Path, step: int) -> None:
    """Changes the checkpoint and the log of a run to those of a run at that step."""
    found = checkpoints.open_checkpoint(run)
    state = found.state | {"step": step, "images": step * BATCH}
    checkpoints.save(run, found.config, found.model_state(), found.optimizer_state(), state)
    line = records(run)[-1]
    lines = [json.dumps(line | {"step": at, "images": at * BATCH}) for at in range(STEPS_PER_LINE, step + 1, STEPS_PER_LINE)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def records(run: Path) -> list[dict]:
    """Returns the lines of a run's log."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def arguments(run: Path, steps: int, *settings: str) -> list[str]:
    """Returns the arguments of a run with this many steps."""
    return [*settings, f"train.output={run}", f"train.epochs={steps * BATCH / IMAGES}"]


def train(run: Path, steps: int, *settings: str) -> None:
    """Trains a run in a process. Raises RuntimeError if that fails."""
    command = [sys.executable, "-m", "eae_dist.train", *arguments(run, steps, *settings)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"eae_dist.train failed: {done.stderr[-3000:]}")


def first_step(run: Path, steps: int, *settings: str) -> Seconds:
    """Returns the seconds from the start of a process to the end of its first step, in a run with this many steps."""
    command, start = [sys.executable, "-m", "benchmarks.running", *arguments(run, steps, *settings)], time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        said, wall = process.stdout.readline(), time.perf_counter() - start
        _, errors = process.communicate()
    if not said:
        raise RuntimeError(f"benchmarks.running failed: {errors[-3000:]}")
    return Seconds(float(said), wall)


def main() -> None:
    """Trains to the end of the first step."""
    step = training.training_step

    def only(*arguments):
        step(*arguments)
        print(time.process_time(), flush=True)
        sys.exit()

    training.training_step = only
    command.main()


if __name__ == "__main__":
    main()
