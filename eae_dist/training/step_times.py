"""Timing of steps on every rank (reading, waiting for other ranks, own work), and profiler traces of single steps."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile, schedule

from eae_dist.distributed import gather_rows, message_device, rank
from eae_dist.distributed.waits import Stopwatch

SKIPPED = 3  # steps before a trace: the first ones allocate memory, the last one warms up the profiler


class StepTimes:
    """Sums of times over the steps since the last line of the log; use `with times.step(): with times.reading(): ...`.

    waits: stopwatch of the collectives (`measured_waits`). On CPUs the wait of DDP for gradients is counted as well. On GPUs
    the host does not wait; use a trace.
    """

    def __init__(self, rows: int, waits: Stopwatch, model: torch.nn.Module | None):
        """rows: number of this rank's rows in a batch. model: None if its gradients are averaged by our own collectives."""
        self.rows, self.steps, self._waits = rows, 0, waits
        self._step, self._reading, self._gradients = Stopwatch(), Stopwatch(), Stopwatch()
        self.reading = self._reading.running
        if isinstance(model, DistributedDataParallel) and model.device_type == "cpu":
            model.register_comm_hook(None, self._reduced)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Measures one step."""
        if self.steps == 0:
            self._waits.taken()  # drops the waits of validation and other work between steps
        with self._step.running():
            yield
        self.steps += 1

    def _reduced(self, group: Any, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Computes the default mean of DDP; this rank waits from the start of the last bucket, when its gradients are done."""
        start = time.perf_counter()

        def arrived(future: torch.futures.Future[torch.Tensor]) -> torch.Tensor:
            if bucket.is_last():
                self._gradients.seconds += time.perf_counter() - start
            return future.value()

        return allreduce_hook(group, bucket).then(arrived)

    def record(self) -> dict[str, float | list[float]]:
        """Returns the times since the last call, for the log; a list has one number per rank. Call on every rank.

        rank_images_per_second: rows of a rank over the seconds of its own work. rank_data_wait, rank_communication_wait: seconds
        per step. straggler_spread: (longest - shortest own work of a rank) / mean.
        """
        steps, rows = max(self.steps, 1), self.rows * self.steps
        reading, waits = self._reading.taken(), self._waits.taken() + self._gradients.taken()
        own = max(self._step.taken() - reading - waits, 1e-9)
        self.steps = 0
        here = torch.tensor([[rows / own, reading / steps, waits / steps, own]], dtype=torch.float64)
        speeds, readings, waits, works = gather_rows(here.to(message_device())).cpu().T
        return {
            "rank_images_per_second": speeds.tolist(),
            "rank_data_wait": readings.tolist(),
            "rank_communication_wait": waits.tolist(),
            "straggler_spread": float((works.max() - works.min()) / works.mean()),
        }


def traced(steps: int, folder: Path) -> AbstractContextManager[profile | None]:
    """Returns a context that yields a profiler, or None for 0 steps. Call its `step()` after each step.

    After the last profiled step it writes folder/rank-R.json.
    """
    if not steps:
        return nullcontext()

    def write(profiler: profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / f"rank-{rank()}.json"))

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    once = schedule(wait=SKIPPED - 1, warmup=1, active=steps, repeat=1)
    return profile(activities=activities, schedule=once, on_trace_ready=write)
