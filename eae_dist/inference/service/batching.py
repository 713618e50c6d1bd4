"""One thread computes for everyone, and what waits for the same computation becomes one batch.

Nobody is kept waiting so that a batch may grow: whatever came while the batch before was computed is the next one.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

log = logging.getLogger("eae_dist")

Computation = Callable[..., tuple[np.ndarray, ...]]  # rows [b, ...] and arguments -> arrays [b, ...]


class Busy(RuntimeError):
    """As many rows wait as may; `seconds`: in about how long to ask again."""

    def __init__(self, waiting: int, seconds: int):
        super().__init__(f"the service is busy: {waiting:,} images wait; ask again in {seconds} s")
        self.seconds = seconds


class Closed(RuntimeError):
    """The service ends."""


@dataclass(frozen=True, eq=False)
class Job:
    kind: tuple  # the computation's name and arguments; equal ones are joined
    rows: np.ndarray
    answer: Future = field(default_factory=Future)


class Batcher:
    """Computes what is submitted, in its own thread, until `close`.

    computations: by name. batch: most rows of a call. waiting: most rows that may wait; more are refused.
    """

    def __init__(self, computations: Mapping[str, Computation], batch: int, waiting: int):
        self._computations, self._batch, self._most = computations, batch, waiting
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self.waiting = 0  # rows
        self._seconds_a_row = 0.0
        self._thread = threading.Thread(target=self._work, name="batches", daemon=True)
        self._thread.start()

    def submit(self, name: str, rows: np.ndarray, *arguments) -> "Future[tuple[np.ndarray, ...]]":
        """The arrays that the computation makes of these rows, once it has. Raises Busy, or Closed."""
        job = Job((name, *arguments), rows)
        with self._changed:
            if self._closed:
                raise Closed("the service ends")
            if self.waiting + len(rows) > self._most:
                raise Busy(self.waiting, min(max(math.ceil(self.waiting * self._seconds_a_row), 1), 60))
            self.waiting += len(rows)
            self._jobs.append(job)
            self._changed.notify()
        return job.answer

    def close(self) -> None:
        """Ends the thread after the batch that it is at. What waits gets Closed."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while jobs := self._next():
            (name, *arguments), started = jobs[0].kind, time.monotonic()
            rows = np.concatenate([job.rows for job in jobs])
            try:
                parts = [
                    self._computations[name](rows[start : start + self._batch], *arguments)
                    for start in range(0, len(rows), self._batch)
                ]
                results = [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]
            except Exception as error:  # of whatever kind: these requests are told, and the thread lives on
                log.exception("%s of %d rows failed", name, len(rows))
                for job in jobs:
                    job.answer.set_exception(error)
                continue
            first = 0
            for job in jobs:
                stop = first + len(job.rows)
                job.answer.set_result(tuple(array[first:stop] for array in results))
                first = stop
            seconds_a_row = (time.monotonic() - started) / len(rows)
            self._seconds_a_row = 0.8 * self._seconds_a_row + 0.2 * seconds_a_row if self._seconds_a_row else seconds_a_row

    def _next(self) -> list[Job]:
        """The job that waits longest, with those like it as far as a batch has room; none when the service ends."""
        with self._changed:
            while True:
                while not self._jobs and not self._closed:
                    self._changed.wait()
                if self._closed:
                    for job in self._jobs:
                        if job.answer.set_running_or_notify_cancel():
                            job.answer.set_exception(Closed("the service ends"))
                    self._jobs.clear()
                    return []
                taken, left, rows = [], deque(), 0
                for job in self._jobs:
                    alike = not taken or (job.kind == taken[0].kind and rows + len(job.rows) <= self._batch)
                    if not alike:
                        left.append(job)
                        continue
                    self.waiting -= len(job.rows)
                    if job.answer.set_running_or_notify_cancel():  # else whoever asked has gone
                        taken.append(job)
                        rows += len(job.rows)
                self._jobs = left
                if taken:
                    return taken
