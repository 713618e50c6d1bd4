"""Checkpoints are written in the background; training pauses only for the copy in memory.

A checkpoint has the state of the step in which it was copied. `checkpoint.save` writes it atomically.
"""

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from pathlib import Path
from typing import Any

import torch

from eae_dist.config import Config
from eae_dist.training import checkpoint as checkpoints

log = logging.getLogger("eae_dist")


class AsyncCheckpoints:
    """Writes the checkpoints of a run one after the other, on one rank. At its end, the context waits for the last one.

    An OSError of `checkpoint.save` is stored until `wait` or `raise_failure` raises it.
    """

    def __init__(self, run: Path, config: Config):
        self._run, self._config = run, config
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future | None = None
        self._buffers: dict[tuple, torch.Tensor] = {}

    def __enter__(self) -> "AsyncCheckpoints":
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self._thread.shutdown()
        failure = None if self._writing is None else self._writing.exception()
        if failure not in (None, error):  # otherwise the error that ends the run would hide it
            log.error("error: %s", failure)

    def start(self, model_state: dict, optimizer_state: dict, state: dict, *, copied: bool = False) -> None:
        """Starts `checkpoint.save` with copies of its arguments, and then links `best` to state["best_step"].

        Waits for the previous checkpoint and raises its failure, because there is only one copy in memory, on the CPU.
        copied: the optimizer state is already a copy.
        """
        self.wait()
        model_state, state = self._copy(model_state, ("model",)), self._copy(state)
        if not copied:
            optimizer_state = self._copy(optimizer_state, ("optimizer",))
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
        self._writing = self._thread.submit(self._write, model_state, optimizer_state, state)

    def wait(self) -> None:
        """Waits until the last checkpoint is on the disk. Raises OSError if it could not be written."""
        if self._writing is not None:
            self._writing.result()

    def raise_failure(self) -> None:
        """Raises OSError if writing the last checkpoint has already failed; does not wait."""
        if self._writing is not None and self._writing.done():
            self._writing.result()

    def last(self) -> Path | None:
        """Waits until this rank writes no checkpoint; returns the newest checkpoint on the disk, or None."""
        if self._writing is not None:
            wait_for([self._writing])
        return checkpoints.latest(self._run)

    def _write(self, model_state: dict, optimizer_state: dict, state: dict) -> None:
        checkpoints.save(self._run, self._config, model_state, optimizer_state, state)
        checkpoints.mark_best(self._run, state["best_step"])
        checkpoints.prune(self._run, self._config.train.keep)

    def _copy(self, value: Any, place: tuple = ()) -> Any:
        """Copies dicts, lists and tensors. Tensor memory is reused, because a copy into new memory takes twice the time."""
        if isinstance(value, dict):
            return {key: self._copy(item, (*place, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [self._copy(item, (*place, number)) for number, item in enumerate(value)]
        if not isinstance(value, torch.Tensor):
            return value
        if place not in self._buffers:
            self._buffers[place] = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return self._buffers[place].copy_(value, non_blocking=True)
