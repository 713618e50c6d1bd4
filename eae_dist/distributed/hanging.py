"""Ends the process of a rank that hangs, because launchers wait for this process: torchrun for 30 seconds, others for ever."""

import itertools
import os
import platform
import select
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

GRACE = 15.0  # seconds in which a rank that was only slow can still say why, and end by itself


def process_name(pid: int) -> str:
    """Returns a name that no other process has: machine, process id and start. Raises OSError if there is no such process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return f"{platform.node()} {pid} {fields[19]}"


def end_later(names: Iterable[str]) -> None:
    """Kills those of the named processes that run on this machine, unless they end within GRACE seconds; does not wait for it.

    Where the system has no pidfd (Linux before 5.3, other systems), it kills none.
    """
    found = []
    for name in names:
        with suppress(OSError, AttributeError):
            process = os.pidfd_open(pid := int(name.split()[1]))
            if process_name(pid) == name:
                found.append(process)
            else:
                os.close(process)
    with suppress(OSError):
        if found and os.fork() == 0:
            _wait_and_kill(found)


def _wait_and_kill(processes: list[int]) -> NoReturn:
    try:
        os.setsid()  # a launcher ends the process groups of its ranks
        for before, after in itertools.pairwise([-1, *sorted(processes), 2**16]):  # the other ranks see the connections end
            os.closerange(before + 1, after)
        end = time.monotonic() + GRACE
        while processes and (left := end - time.monotonic()) > 0:
            ended, _, _ = select.select(processes, [], [], left)
            processes = [process for process in processes if process not in ended]
        for process in processes:
            signal.pidfd_send_signal(process, signal.SIGKILL)
    finally:
        os._exit(0)
