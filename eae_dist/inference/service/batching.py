"""One thread that computes all requests. Requests that wait for the same computation are joined into one batch.

No request waits for a batch to grow: the next batch is what arrived during the previous one.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

log = logging.getLogger("eae_dist")

Computation = Callable[..., tuple[np.ndarray, ...]]  # rows [b, ...] and arguments -> arrays [b, ...]


class Busy(RuntimeError):
    """Too many rows wait. `seconds`: about how long to wait before asking again."""

    def __init__(self, waiting: int, seconds: int):
        super().__init__(f"the service is busy: {waiting:,} images wait; ask again in {seconds} s")
        self.seconds = seconds


class Closed(RuntimeError):
    """The service is stopping."""


@dataclass(frozen=True, eq=False)
class Job:
    """The rows of one request, and the future for its answer."""

    kind: tuple  # the computation's name and arguments; jobs of equal kinds are joined
    rows: np.ndarray
    answer: Future = field(default_factory=Future)


class Batcher:
    """Computes what is submitted, in its own thread, until `close`.

    computations: functions by name. batch: the most rows per call. waiting: the most rows that may wait; further rows are
    refused.
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

    def submit(self, name: str, rows: np.ndarray, *arguments: Any) -> "Future[tuple[np.ndarray, ...]]":
        """Returns a future of the arrays that the computation makes of these rows. Raises Busy or Closed."""
        job = Job((name, *arguments), rows)
        with self._changed:
            if self._closed:
                raise Closed("the service is stopping")
            if self.waiting + len(rows) > self._most:
                raise Busy(self.waiting, min(max(math.ceil(self.waiting * self._seconds_a_row), 1), 60))
            self.waiting += len(rows)
            self._jobs.append(job)
            self._changed.notify()
        return job.answer

    def close(self) -> None:
        """Stops the thread after its current batch. Requests that wait get Closed."""
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
            except Exception as error:  # any error: it is the answer to these requests, and the thread continues
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
        """Returns the job that has waited longest, with jobs of the same kind that fit in the batch.

        The list is empty when the service stops.
        """
        with self._changed:
            while True:
                while not self._jobs and not self._closed:
                    self._changed.wait()
                if self._closed:
                    for job in self._jobs:
                        if job.answer.set_running_or_notify_cancel():
                            job.answer.set_exception(Closed("the service is stopping"))
                    self._jobs.clear()
                    return []
                taken: list[Job] = []
                left: deque[Job] = deque()
                rows = 0
                for job in self._jobs:
                    alike = not taken or (job.kind == taken[0].kind and rows + len(job.rows) <= self._batch)
                    if not alike:
                        left.append(job)
                        continue
                    self.waiting -= len(job.rows)
                    if job.answer.set_running_or_notify_cancel():  # otherwise the client has gone
                        taken.append(job)
                        rows += len(job.rows)
                self._jobs = left
                if taken:
                    return taken
