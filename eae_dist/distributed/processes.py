"""Parallel tasks in processes, with the results in the order of the tasks."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


def run_tasks(function: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Generator[Result, None, None]:
    """Yields `function(task)` for every task in order, computed by `workers` processes; 1 computes in this process.

    At most two tasks per worker are held at a time, so `tasks` may generate large objects. The processes end when the iterator is
    closed or when this process ends for any reason. Raises the errors of `function`, and ChildProcessError if a process dies.
    """
    if workers == 1:
        yield from map(function, tasks)
        return
    # A fork of this process would keep its open files and their locks. A fork server imports torch once for all workers.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["eae_dist.data.indexing", "webdataset.writer"])
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        running: deque = deque()
        try:
            for task in tasks:
                running.append(pool.submit(function, task))
                if len(running) >= 2 * workers:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        except BrokenProcessPool as error:
            raise ChildProcessError("a worker process died (out of memory?); try again with fewer --workers") from error
        except BaseException:
            for process in pool._processes.values():  # a public method, terminate_workers, exists only from Python 3.14 on
                process.terminate()
            raise


def available_cores() -> int:
    """Returns the number of CPU cores that this process may use; a scheduler can limit them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_worker() -> None:
    # Ctrl-C reaches the whole process group; the parent decides when its workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # this thread runs in a worker
    parent.join()
    os._exit(1)
