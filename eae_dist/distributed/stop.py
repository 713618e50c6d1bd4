"""A signal to any rank, as one decision of all ranks to stop."""

import os
import signal
from datetime import timedelta

import torch
import torch.distributed as dist

from eae_dist.distributed.collectives import waiting, world_size

# The process that started this one, where it is a launcher: a shell may end before what it started.
LAUNCHERS = {"accelerate": "ACCELERATE_DYNAMO_BACKEND", "torchrun": "TORCHELASTIC_RUN_ID", "our own": "EAE_DIST_LAUNCHED"}
_LAUNCHER = os.getppid() if set(LAUNCHERS.values()) & os.environ.keys() else None


class StopRequest:
    """Turns SIGTERM and Ctrl-C on any rank into one decision of all ranks to stop after the same step.

    The end of a rank's launcher counts as such a signal: one that is killed leaves its ranks behind.
    Used as a context, in which these signals are noted and no longer end the process; a second Ctrl-C interrupts at once.
    `start_asking` and `asked` bracket a step: the question travels over a gloo group of its own while the step computes.
    `signalled`: whether this rank was; others may not know yet.
    """

    def __init__(self, timeout: float):
        """timeout: seconds after which a rank gives up waiting for the others' answer."""
        self._timeout = timedelta(seconds=timeout)

    def __enter__(self) -> "StopRequest":
        self._signal: int | None = None
        self._group = dist.new_group(backend="gloo", timeout=self._timeout) if world_size() > 1 else None
        self._flags = torch.zeros(world_size(), dtype=torch.uint8)
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        if number == signal.SIGINT and self._signal is not None:
            raise KeyboardInterrupt
        self._signal = number

    @property
    def signalled(self) -> bool:
        left_behind = _LAUNCHER is not None and os.getppid() != _LAUNCHER
        return left_behind or self._signal is not None

    def start_asking(self) -> None:
        flags = torch.full_like(self._flags, self.signalled)
        if self._group is None:
            self._flags = flags
        else:
            self._pending = dist.all_to_all_single(self._flags, flags, group=self._group, async_op=True)

    def asked(self) -> bool:
        """Whether any rank had been signalled when this step began; the same answer on every rank."""
        if self._group is not None:
            with waiting():
                self._pending.wait()
        return bool(self._flags.any())
