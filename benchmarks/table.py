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


def of_limit(bound: float, share: float) -> dict:
    """Returns the columns from ratio to met, for a share of what is possible."""
    return {"ratio": f"{share:.2f}x", "target": f"at least {bound:g}x", "met": share >= bound}


@dataclass(frozen=True)
class Seconds:
    """Median times of one turn. cpu: of all threads of the process. thread: CPU time of the calling thread, if it was taken."""

    cpu: float
    wall: float
    thread: float = float("nan")


def take_turns(competitors: dict[str, Callable[[], object]], rounds: int) -> dict[str, Seconds]:
    """Calls each competitor in turn, `rounds` times, so that other work on the machine affects all of them equally."""
    taken: dict[str, list[tuple[float, float, float]]] = {name: [] for name in competitors}
    for _ in range(rounds):
        for name, work in competitors.items():
            before = clocks()
            work()
            taken[name].append(tuple(after - start for after, start in zip(clocks(), before, strict=True)))
    return {name: Seconds(*map(statistics.median, zip(*turns, strict=True))) for name, turns in taken.items()}


def clocks() -> tuple[float, float, float]:
    """Returns the times of `Seconds`."""
    return time.process_time(), time.perf_counter(), time.thread_time()
