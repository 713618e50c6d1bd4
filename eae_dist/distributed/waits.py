"""How long a thread waits in collectives for the other ranks."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar


class Stopwatch:
    """Adds up measured seconds."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Adds the seconds of its context."""
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start

    def taken(self) -> float:
        """Returns the seconds added since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


_WAITS: ContextVar[Stopwatch | None] = ContextVar("waits", default=None)


@contextmanager
def measured_waits() -> Iterator[Stopwatch]:
    """Yields a stopwatch that runs while this thread is in a collective. It measures nothing for NCCL, which does not block."""
    before = _WAITS.set(watch := Stopwatch())
    try:
        yield watch
    finally:
        _WAITS.reset(before)


def waiting() -> AbstractContextManager[None]:
    """Returns a context whose time counts as waiting in `measured_waits`."""
    watch = _WAITS.get()
    return nullcontext() if watch is None else watch.running()
