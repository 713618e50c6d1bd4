"""Atomic writing of files, and checksums."""

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from eae_dist.errors import UserFileError


def sha256_of(path: Path) -> str:
    """Returns the sha256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fsync(path: Path) -> None:
    """Waits until the content of a file, or the list of names of a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Names the path in every OSError: that of a full disk has no file name."""
    try:
        yield
    except OSError as error:
        raise UserFileError(f"{path} could not be written: {error.strerror or error}") from error


def replace_file(path: Path, data: bytes | str) -> None:
    """Writes `data` to a temporary file and renames it to `path`; a reader sees the old or the new content, never a part.

    Several processes, also on several machines, may replace the same file; the content of one of them remains. Raises OSError.
    """
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        with naming(path):
            aside.write_bytes(data.encode() if isinstance(data, str) else data)
            fsync(aside)
            os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    fsync(path.parent)
