"""A line of the table, and the clock for its numbers."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

HEADER = "| what | ours | theirs | ratio | target | met | beside |\n| --- | ---: | ---: | ---: | --- | --- | --- |"


@dataclass(frozen=True)
class Row:
    """A comparison. `ratio`: with its unit; `target`: what the ratio should be, empty if it is shown only for scale."""

    what: str
    ours: str
    theirs: str
    ratio: str
    target: str = ""
    met: bool | None = None
    beside: str = ""

    def __str__(self) -> str:
        met = {True: "yes", False: "NO", None: ""}[self.met]
        return f"| {' | '.join((self.what, self.ours, self.theirs, self.ratio, self.target, met, self.beside))} |"


def at_least(bound: float, ratio: float) -> dict:
    """Returns the columns from ratio to met, for a lower bound."""
    return {"ratio": f"{ratio:.1f}x", "target": f"at least {bound:g}x", "met": ratio >= bound}


def at_most(bound: float, ratio: float) -> dict:
    """Returns the columns from ratio to met, for an upper bound."""
    return {"ratio": f"{ratio:.2f}x", "target": f"at most {bound:g}x", "met": ratio <= bound}


@dataclass(frozen=True)
class Seconds:
    """Median times of one turn."""

    cpu: float
    wall: float


def take_turns(competitors: dict[str, Callable[[], object]], rounds: int) -> dict[str, Seconds]:
    """Calls each competitor in turn, `rounds` times, so that other work on the machine affects all of them equally."""
    cpu, wall = ({name: [] for name in competitors} for _ in range(2))
    for _ in range(rounds):
        for name, work in competitors.items():
            cpu_start, wall_start = time.process_time(), time.perf_counter()
            work()
            cpu[name].append(time.process_time() - cpu_start)
            wall[name].append(time.perf_counter() - wall_start)
    return {name: Seconds(statistics.median(cpu[name]), statistics.median(wall[name])) for name in competitors}
