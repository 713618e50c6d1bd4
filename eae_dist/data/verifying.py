"""Checking a data set: every file against its checksum in the index, and every image by decoding it."""

import os
import tempfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from eae_dist.data.decoding import decode_image
from eae_dist.data.remote import Cache, FetchError, RemoteFolder
from eae_dist.data.shard_index import LocalFolder, ShardIndex, member_table, plain_name
from eae_dist.distributed.processes import run_tasks


@dataclass(frozen=True)
class _File:
    """A file of a data set. table: the name and sha256 of its member table if it is a shard, else None."""

    index: ShardIndex
    folder: LocalFolder | RemoteFolder
    name: str
    sha256: str
    table: tuple[str, str] | None = None


def verify(root: Path | str, workers: int = 1, cache: Cache | None = None) -> list[str]:
    """Compares every table and tar file of a data set with the index, and decodes every image as training does.

    Returns one line per damaged file. Remote files are read from their address, not from the cache. Raises OSError if there is
    no index.
    """
    problems, files = [], []
    try:
        index = ShardIndex.load(root, cache)
        splits = dict(index.info["splits"])
    except (ValueError, KeyError, TypeError) as error:
        return [f"{root}/index.json is damaged ({error})"]
    for split, totals in splits.items():
        try:
            table = index.table(split)
            counted = {"samples": int(table["samples"].sum()), "shards": len(table), "bytes": int(table["bytes"].sum())}
            for what, count in counted.items():
                if totals[what] != count:
                    problems.append(f"{root}/index.json: split {split} has {totals[what]} {what}, its table {count}")
        except (ValueError, KeyError, TypeError, FetchError) as error:
            problems.append(f"split {split} in {root}/index.json cannot be checked ({error})")
            continue
        for row in table:
            name = plain_name(root, row["name"].decode())
            members = (member_table(name), row["members_sha256"].decode())
            files.append(_File(index, index.tars, name, row["sha256"].decode(), members))
            files.append(_File(index, index.tables, *members))
    with closing(run_tasks(_damage, files, min(workers, max(1, len(files))))) as checked:
        found = tqdm(checked, total=len(files), desc="verifying", unit=" files", disable=None)
        return problems + [problem for problem in found if problem]


def _damage(file: _File) -> str | None:
    try:
        with tempfile.TemporaryFile() as copy:
            if isinstance(file.folder, RemoteFolder) and file.table is not None:  # its images are decoded from a copy
                found = file.folder.copy(file.name, copy)
            else:
                found = file.folder.digest(file.name)
            if found != file.sha256:
                return f"{file.folder.place(file.name)} is damaged: its sha256 is not the index's"
            if file.table is None:
                return None
            if file.folder.remote:
                copy.flush()
                return _undecodable(file.index, file.table, copy.fileno(), file.folder.place(file.name))
            with open(file.folder.place(file.name), "rb") as shard:
                return _undecodable(file.index, file.table, shard.fileno(), shard.name)
    except FetchError as error:
        return str(error)
    except FileNotFoundError:
        return f"{file.folder.place(file.name)} is missing"
    except OSError as error:
        return f"{file.folder.place(file.name)} cannot be read ({error.strerror})"


def _undecodable(index: ShardIndex, table: tuple[str, str], shard: int, place: str) -> str | None:
    """Returns a line about the images of a shard, open as a descriptor, that training cannot read. place: its name for people."""
    bad = []
    try:
        with index.open_table(table[0], table[1], "the index") as file:
            members = np.load(file.name, allow_pickle=False)
    except (ValueError, OSError):
        return None  # it has a line of its own
    channels = index.image_shape[0]
    for key, offset, length in zip(*(members[name].tolist() for name in ("key", "offset", "bytes")), strict=True):
        data = os.pread(shard, length, offset)
        try:
            if index.npy_header is not None:
                fits = data.startswith(index.npy_header) and len(data) == len(index.npy_header) + int(np.prod(index.image_shape))
                shape = index.image_shape if fits else None
            else:
                pixels = decode_image(data, channels, index.rules)
                shape = (pixels.shape[2], *pixels.shape[:2])
            if shape != index.image_shape:
                raise ValueError(f"its shape is {shape or 'another'}, the index says {index.image_shape} (c, h, w)")
        except ValueError as error:
            bad.append(f"{key.decode()!r} ({error})")
    if not bad:
        return None
    several = f"{len(bad):,} images, the first: {bad[0]}" if len(bad) > 1 else bad[0]
    return f"{place} holds what training cannot read: {several}; index or pack the data set again"
