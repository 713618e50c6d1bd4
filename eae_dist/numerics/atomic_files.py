"""Files that appear whole or not at all, and their checksums."""

import hashlib
import os
import secrets
from pathlib import Path


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fsync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, data: bytes | str) -> None:
    """Writes `data` aside, then puts it in the place of `path`; whoever reads finds the old content or the new, never a part.

    Several processes may replace the same file, also on several machines: the content of one of them remains.
    """
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        aside.write_bytes(data.encode() if isinstance(data, str) else data)
        fsync(aside)
        os.replace(aside, path)
    except OSError as error:  # a full disk is met without a name
        raise OSError(f"{path} could not be written: {error.strerror or error}") from error
    finally:
        aside.unlink(missing_ok=True)
    fsync(path.parent)
