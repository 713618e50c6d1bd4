"""Files that several processes share by locks (flock): one writes, others read, and what nobody has open may be removed."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def alone(path: Path) -> Iterator[BinaryIO]:
    """Yields the file at `path`, for one process at a time. It is created if missing, and removed at the end if not renamed."""
    while True:
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(file, path):
                continue  # the previous holder renamed or removed it
            try:
                yield file
            finally:
                if _is_at(file, path):
                    os.unlink(path)
                # Unlocks explicitly, because a process forked in the meantime has the file open as well.
                fcntl.flock(file, fcntl.LOCK_UN)
            return


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def touch(path: Path) -> bool:
    """Marks a file as used now; returns False if it does not exist."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def remove_unless_used(path: str) -> bool:
    """Removes a file that no process has open and locked; returns False if one has, or if it is gone already."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
            return True
    except (BlockingIOError, FileNotFoundError):  # in use or already removed
        return False
