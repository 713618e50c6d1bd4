"""The cost of `train.blocks`: CPU time per image of all ranks together, divided by that of the same ranks without blocks."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.table import Row, at_most
from benchmarks.training import cpu, launch, median, milliseconds, settings_of

# Network -> image shape, global batch, launches of each kind, rounds per launch, steps per round, and the most that blocks may
# cost where at least half as many ranks share them.
CASES = {"small": ((1, 32, 32), 128, 2, 4, 8, None), "rae32": ((3, 32, 32), 128, 1, 2, 1, 1.15)}
RANKS, BLOCKS = (1, 2, 4), 8


def rows() -> Iterator[Row]:
    """Yields the rows of the table."""
    for network, (shape, batch, launches, rounds, steps, bound) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            settings = *settings_of(network, shape, Path(folder)), f"train.global_batch={batch}"
            for ranks in RANKS:
                costs: dict[int, list] = {blocks: [] for blocks in sorted({0, ranks, 2 * ranks, BLOCKS})}
                for _ in range(launches):
                    for blocks, measured in costs.items():
                        measured += launch(ranks, rounds, steps, *settings, f"train.blocks={blocks}")["rounds"]
                without = median(costs.pop(0))
                for blocks, measured in costs.items():
                    ratio = cpu(median(measured)) / cpu(without)
                    yield Row(
                        f"training step, {network}, batch {batch}, {ranks} ranks, {blocks} blocks: without blocks",
                        milliseconds(median(measured)),
                        milliseconds(without),
                        **(at_most(bound, ratio) if bound and blocks <= 2 * ranks else {"ratio": f"{ratio:.2f}x"}),
                    )
