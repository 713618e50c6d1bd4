"""Stopping of all ranks at the same step after a signal to any rank."""

import os
import signal
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist

from eae_dist.distributed.collectives import world_size
from eae_dist.distributed.waits import waiting

# The parent process, if it is a launcher. A parent that is a shell may end before its children, so it does not count.
LAUNCHERS = {"accelerate": "ACCELERATE_DYNAMO_BACKEND", "torchrun": "TORCHELASTIC_RUN_ID", "our own": "EAE_DIST_LAUNCHED"}
RING = 64  # ranks; a message takes about 0.1 ms between machines, so that an answer comes in 13 ms
_LAUNCHER = os.getppid() if set(LAUNCHERS.values()) & os.environ.keys() else None


def launcher_process() -> int | None:
    """Returns the process id of accelerate's or torchrun's launcher, if this process was started by one that still runs."""
    started_by = {LAUNCHERS["accelerate"], LAUNCHERS["torchrun"]} & os.environ.keys()
    return _LAUNCHER if started_by and os.getppid() == _LAUNCHER else None


class StopRequest:
    """Turns SIGTERM and Ctrl-C on any rank into a decision of all ranks to stop after the same step.

    The end of a launcher counts as a signal, because a killed launcher leaves its ranks running.
    In its context, these signals are only recorded and do not end the process; a second Ctrl-C interrupts at once.
    Call `start_asking` before a step and `asked` after it: a separate gloo group exchanges the flags while the step computes. A
    question costs each rank two messages of a byte, but takes as long as 2 W of them one after the other, around the ring of W
    ranks. So of many ranks it is open for several steps, `1 + W // RING`, before the answer is waited for.
    """

    def __init__(self, timeout: float):
        """timeout: seconds after which a rank stops waiting for the answers of the others."""
        self._timeout = timedelta(seconds=timeout)

    def __enter__(self) -> "StopRequest":
        self._signal: int | None = None
        self._group: dist.ProcessGroup | None = None
        if world_size() > 1:
            group = dist.new_group(backend="gloo", timeout=self._timeout)
            assert isinstance(group, dist.ProcessGroup)  # every rank is in it
            self._group = group
        self._steps, self._open = 0, 1 + world_size() // RING  # steps since the question; steps until its answer
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal is not None:
            raise KeyboardInterrupt
        self._signal = number

    @property
    def signalled(self) -> bool:
        """True if this rank got a signal; the other ranks may not know it yet."""
        left_behind = _LAUNCHER is not None and os.getppid() != _LAUNCHER
        return left_behind or self._signal is not None

    def start_asking(self) -> None:
        """Starts to exchange the flags of all ranks, unless they are being exchanged."""
        if self._steps == 0:
            self._flag = torch.tensor([self.signalled], dtype=torch.uint8)
            if self._group is not None:
                pending = dist.all_reduce(self._flag, dist.ReduceOp.MAX, group=self._group, async_op=True)
                assert pending is not None  # this rank is in the group
                self._pending = pending

    def asked(self) -> bool:
        """True if any rank had got a signal when the question that ends with this step was asked; the same on every rank."""
        self._steps = (self._steps + 1) % self._open
        if self._steps > 0:
            return False
        if self._group is not None:
            with waiting():
                self._pending.wait()
        return bool(self._flag)

    def asked_now(self) -> bool:
        """Asks and waits for the answer. A question that is open stays open."""
        flag = torch.tensor([self.signalled], dtype=torch.uint8)
        if self._group is not None:
            with waiting():
                dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group)
        return bool(flag)
