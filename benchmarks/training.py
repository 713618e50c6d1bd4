"""Training: the cost of two ranks against one, and of the entropy in a step. CPU time per image, of all ranks together.

Both train the same global batch, with one thread per rank, so CPU time per image would be the same if ranks had no cost. One rank
is a plain process, without DDP. Beside it stands one rank with half the batch: a small batch costs more per image by itself.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.images import write_shards
from benchmarks.steps import ENTROPY_ROWS
from benchmarks.table import Row, at_most

# Network -> image shape, global batch, launches of each kind, rounds per launch, steps per round, the most that ranks may cost.
CASES = {"small": ((1, 32, 32), 128, 2, 4, 10, 1.3), "rae32": ((3, 32, 32), 64, 1, 2, 1, 1.2)}
ENTROPY_NETWORK, SHARE = "rae32", 0.02


def rows() -> Iterator[Row]:
    """Yields the rows of the table."""
    for network, (shape, batch, launches, rounds, steps, bound) in CASES.items():
        kinds = {"one": (1, batch), "half": (1, batch // 2), "two": (2, batch)}
        rounds_of: dict[str, list] = {kind: [] for kind in kinds}
        with tempfile.TemporaryDirectory() as folder:
            settings = settings_of(network, shape, Path(folder))
            for _ in range(launches):
                for kind, (ranks, images) in kinds.items():
                    measured = launch(ranks, rounds, steps, *settings, f"train.global_batch={images}")
                    rounds_of[kind] += measured["rounds"]
            if network == ENTROPY_NETWORK:
                large = launch(1, 1, 1, *settings, f"train.global_batch={ENTROPY_ROWS}")
        one, half, two = (median(measured) for measured in rounds_of.values())
        yield Row(
            f"training step, {network}, batch {batch}: two ranks, one rank",
            milliseconds(two),
            milliseconds(one),
            **at_most(bound, cpu(two) / cpu(one)),
            beside=f"wall {two['wall'] / one['wall']:.2f}x; of CPU time, system {in_system(two)} and {in_system(one)}; one rank "
            f"with half the batch {cpu(half) / cpu(one):.2f}x",
        )
    term, step = cpu(median(large["entropy"])), cpu(large["rounds"][0]) * ENTROPY_ROWS
    yield Row(
        f"entropy of {ENTROPY_ROWS:,} latents: training step, {ENTROPY_NETWORK}, batch {ENTROPY_ROWS:,}",
        f"{term * 1e3:.1f} ms",
        f"{step:.1f} s",
        f"{term / step:.3%}",
        f"at most {SHARE:.0%}",
        term / step <= SHARE,
    )


def settings_of(network: str, shape: tuple[int, int, int], folder: Path) -> tuple[str, ...]:
    """Writes shards of 1,024 images into the folder, and returns the settings of a run of this network on them."""
    root = write_shards(folder / "shards", shape, "png", shards=4, samples=256)
    return f"data.root={root}", "data.validation=null", f"train.output={folder}/run", f"model.network={network}"


def launch(ranks: int, rounds: int, steps: int, *settings: str) -> dict:
    """Returns what `benchmarks.steps` reports on this many local ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    arguments = ["-m", "benchmarks.steps", str(rounds), str(steps), "train.device=cpu", "train.trackers=[]", *settings]
    done = subprocess.run([sys.executable, *launcher, *arguments], capture_output=True, text=True, env=os.environ)
    if done.returncode:
        raise RuntimeError(f"benchmarks.steps failed on {ranks} ranks: {done.stderr[-3000:]}")
    return json.loads(done.stdout)


def median(costs: list[dict[str, float]]) -> dict[str, float]:
    """Returns the medians of the costs, by name."""
    return {name: statistics.median(cost[name] for cost in costs) for name in costs[0]}


def cpu(cost: dict[str, float]) -> float:
    """Returns user and system time together."""
    return cost["user"] + cost["system"]


def in_system(cost: dict[str, float]) -> str:
    """Returns the share of system time as text."""
    return f"{cost['system'] / cpu(cost):.0%}"


def milliseconds(cost: dict[str, float]) -> str:
    """Returns the CPU time per image as text."""
    return f"{cpu(cost) * 1e3:.2f} ms/image"
