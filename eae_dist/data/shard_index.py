"""The index of a folder of shards, and reading samples from it by offset.

A data set is a folder of tar files in WebDataset format (`KEY.png` + `KEY.cls`, or `KEY.npy`) with index files:

    index.json                  totals, image shape, classes, source, license; the sha256 of every table
    train.shards.npy            the shard table of a split: name, samples, bytes, sha256 of every tar
    train-000000.members.npy    the members of a shard: key, offset, bytes, label, crc32 of every image

The whole folder, or only its tar files (`base` in the index), may be at an address: `remote.py` fetches them.

The tables are plain structured arrays, so that a split of 10^6 shards is opened by mapping one file. `build_index` creates them
for shards of any origin. No part of a shard is unpickled, and only images and `.cls` files are read.
"""

import hashlib
import io
import json
import logging
import os
import re
import threading
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
import torch

from eae_dist.config import DataConfig
from eae_dist.data.decoding import decode_image
from eae_dist.data.pixels import Rules
from eae_dist.data.remote import FETCHES, Cache, FetchAhead, RemoteFolder
from eae_dist.data.servers import checked_address, is_address
from eae_dist.data.split_names import split_called
from eae_dist.errors import MissingFile, UserError
from eae_dist.numerics.atomic_files import sha256_of
from eae_dist.numerics.json_files import check_form

INDEX_VERSION = 1
SHARD_NAME = re.compile(r"(?P<split>.+)-\d{6,}\.tar")
FEW_DIGITS = re.compile(r"(?P<split>.+?)([-_.]?\d+(-of-\d+)?)?\.tar")  # of names with a split's word in them
SHARD_DTYPE = [("samples", "<i8"), ("bytes", "<i8"), ("sha256", "S64"), ("members_sha256", "S64")]
MEMBER_DTYPE = [("offset", "<i8"), ("bytes", "<i8"), ("label", "<i8"), ("crc32", "<u4")]
OPEN_FILES = 256  # well below the usual limit of 1,024 for a process

log = logging.getLogger("eae_dist")


@dataclass(frozen=True)
class Split:
    """One split. table: its shards, structured [S] of (name, samples, bytes, sha256, members_sha256)."""

    name: str
    samples: int
    table: np.ndarray


@dataclass(frozen=True)
class LocalFolder:
    """The files of a folder; `RemoteFolder` has the same methods for an address."""

    root: Path
    remote = False

    def place(self, name: str) -> str:
        """Returns the path of a file."""
        return str(self.root / name)

    def digest(self, name: str) -> str:
        """Returns the sha256 of a file."""
        return sha256_of(self.root / name)

    def open(self, name: str, sha256: str, size: int | None = None, stop: threading.Event | None = None) -> BinaryIO:
        """Opens the file and checks its size if it is given; the content is checked when a sample is read.

        Raises FileNotFoundError or ValueError.
        """
        path = self.root / name
        if not path.is_file():
            raise MissingFile(f"{path} is named in the index and missing; restore it or pack the data set again")
        if size is not None and (found := path.stat().st_size) != size:
            kind = "truncated" if found < size else "not the file that was indexed"
            raise UserError(f"{path} is {kind}: {found} bytes, the index says {size}; restore it or run `pack --index` again")
        return open(path, "rb", buffering=0)


@dataclass(frozen=True)
class ShardIndex:
    """The content of `index.json`. image_shape: (c, h, w). rules: how images are read.

    npy_header: the common header of raw members, else None. tables, tars: the folders of the tables and of the shards.
    """

    root: Path | str
    sha256: str
    name: str
    image_shape: tuple[int, int, int]
    rules: Rules
    npy_header: bytes | None
    classes: list[str]
    info: dict
    tables: LocalFolder | RemoteFolder
    tars: LocalFolder | RemoteFolder

    @classmethod
    def load(cls, root: str | Path, cache: Cache | None = None) -> "ShardIndex":
        """Reads and checks `root/index.json`; root is a folder, or an address that is read through `cache`.

        cache: default: that of the default configuration. Raises OSError or ValueError with advice.
        """
        cache = cache or Cache.of(DataConfig())
        tables: LocalFolder | RemoteFolder
        path: str | Path
        if is_address(root):
            tables = RemoteFolder(checked_address(root, "data.root"), cache)
            path, text = tables.place("index.json"), tables.read("index.json")
        else:
            tables = LocalFolder(root := Path(root))
            path = root / "index.json"
            if not path.is_file():
                what = "has no index.json" if root.is_dir() else "is not a folder" if root.exists() else "does not exist"
                raise MissingFile(
                    f"data.root={root} {what}; make shards with `python -m eae_dist.pack SOURCE {root}`, or index existing tar "
                    f"files with `python -m eae_dist.pack --index {root}`"
                )
            text = path.read_bytes()
        try:
            check_form(info := json.loads(text), {"version": int})
            if info["version"] != INDEX_VERSION:
                raise ValueError(f"version {info['version']}, this program reads version {INDEX_VERSION}")
            check_form(info, {"name": str, "image": dict, "splits": dict, "classes": list})
            for split in info["splits"].values():
                check_form(split, {"samples": int, "table_sha256": str})
            check_form(info["image"], {"shape": list})
            header = info["image"]["npy_header"]
            base = info.get("base")
            if base is not None and tables.remote:
                raise ValueError(f"it has a base, {base}, but the shards of an index on a server lie beside it")
            return cls(
                root=root,
                sha256=hashlib.sha256(text).hexdigest(),
                name=info["name"],
                image_shape=tuple(info["image"]["shape"]),
                rules=Rules.of(info["image"]),
                npy_header=None if header is None else bytes.fromhex(header),
                classes=info["classes"],
                info=info,
                tables=tables,
                tars=tables if base is None else RemoteFolder(checked_address(base, "base"), cache),
            )
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{path} cannot be read as a shard index ({error}); write it again with `pack --index`") from error

    def split(self, name: str, setting: str | None = None) -> Split:
        """Returns the split of that name. Raises ValueError that lists the known names and the `setting` to change."""
        splits = self.info["splits"]
        if name not in splits:
            known, change = ", ".join(sorted(splits)), f"; change {setting}" if setting else ""
            raise UserError(f"data set {self.name} has no split {name!r}; it has {known}{change}")
        table = self.table(name)
        if (samples := splits[name]["samples"]) != table["samples"].sum():
            index = self.tables.place("index.json")
            raise UserError(f"{index} says {samples} samples of {name}, its table {table['samples'].sum()}; see `pack --index`")
        return Split(name, samples, table)

    def table(self, name: str) -> np.ndarray:
        """Returns the table of the shards of a split. Raises ValueError if it is missing or its checksum differs."""
        sha256 = self.info["splits"][name]["table_sha256"]
        with self.open_table(f"{name}.shards.npy", sha256, "index.json") as file:
            return np.load(file.name, mmap_mode="r", allow_pickle=False)

    def open_table(self, name: str, sha256: str, holder: str, stop: threading.Event | None = None) -> BinaryIO:
        """Opens a table whose checksum is in `holder`. Raises ValueError if it is missing or its checksum differs."""
        try:
            file = self.tables.open(name, sha256, stop=stop)
            about = os.fstat(file.fileno())
            if _sha256_of_version(file.name, about.st_ino, about.st_size, about.st_mtime_ns) == sha256:
                return file
        except FileNotFoundError:
            pass
        raise UserError(
            f"{self.tables.place(name)} is missing or is not the table that {holder} was written with (checksum mismatch)"
        )


@lru_cache(maxsize=OPEN_FILES)
def _sha256_of_version(path: str, *_version: int) -> str:
    """Returns the sha256 of a table. It is computed once per process, until the file is replaced: a split is opened often."""
    return sha256_of(Path(path))


def member_table(shard: str) -> str:
    """Returns the name of the member table of a shard."""
    return shard.removesuffix(".tar") + ".members.npy"


def split_in_name(shard: str) -> str | None:
    """Returns the split in the name of a shard, or None: what stands before the number of six digits or more.

    Before fewer digits, or none, it must end with the usual name of a split: train-0007.tar, photos-validation-00.tar, test.tar.
    """
    if found := SHARD_NAME.fullmatch(shard):
        return found["split"]
    found = FEW_DIGITS.fullmatch(shard)
    return found["split"] if found and split_called(re.split(r"[-_.]", found["split"])[-1]) else None


def plain_name(root: Path | str, name: str) -> str:
    """Returns the name of a shard in the index of `root`. Raises ValueError unless it is a plain file name."""
    if PurePosixPath(name).name != name or name in ("", ".", "..") or ":" in name:
        raise UserError(f"{root}/index.json names the shard {name!r}; a shard is a plain file name inside that folder")
    return name


class ShardReader:
    """Reads samples of one split by (shard, member), and checks the crc32 and the shape of each.

    open_shards: number of shards in use at once: half of them are open, half are opened next; their member tables stay in memory.
    A copy of a reader opens its own files.
    """

    def __init__(self, index: ShardIndex, split: str, open_shards: int = OPEN_FILES):
        self.index = index
        self.split = index.split(split)
        self.open_shards = open_shards
        self._open_caches()

    def _open_caches(self) -> None:
        self._ahead = FetchAhead()
        # An open remote shard stays in the cache, so no more shards are open than there are lanes.
        files = min(OPEN_FILES, max(1, self.open_shards // 2)) if self.index.tars.remote else OPEN_FILES
        self._file = lru_cache(maxsize=files)(self._open_file)
        self._members = lru_cache(maxsize=max(self.open_shards, OPEN_FILES))(self._load_members)

    def __getstate__(self) -> dict[str, Any]:  # a worker process opens its own files
        return {"index": self.index, "split": self.split, "open_shards": self.open_shards}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open_caches()

    def read(self, shards: np.ndarray, members: np.ndarray) -> dict:
        """Reads (shards[i], members[i]), both int64 [b] -> {"image": uint8 [b, c, h, w], "label": int64 [b], "key": [str]}.

        A sample without a label has label -1. The memory format is channels_last, as in the files.
        Raises ValueError that names the shard and the sample if one is damaged.
        """
        rows = len(shards)
        offsets, sizes, labels = (np.empty(rows, dtype=np.int64) for _ in range(3))
        checksums = np.empty(rows, dtype=np.uint32)
        keys: list[str] = [""] * rows
        for shard in np.unique(shards).tolist():
            here = np.flatnonzero(shards == shard)
            table = self._members(shard)[members[here]]
            offsets[here], sizes[here], labels[here] = table["offset"], table["bytes"], table["label"]
            checksums[here] = table["crc32"]
            for row, key in zip(here.tolist(), table["key"].tolist(), strict=True):
                keys[row] = key.decode()
        read = self._read_encoded if self.index.npy_header is None else self._read_raw
        image = read(list(zip(shards.tolist(), offsets.tolist(), sizes.tolist(), checksums.tolist(), keys, strict=True)))
        return {"image": image, "label": torch.from_numpy(labels), "key": keys}

    def _read_encoded(self, rows: list[tuple]) -> torch.Tensor:
        channels, height, width = self.index.image_shape
        pixels = np.empty((len(rows), height, width, channels), dtype=np.uint8)
        for row, (shard, offset, size, checksum, key) in enumerate(rows):
            data = os.pread(self._file(shard).fileno(), size, offset)
            if zlib.crc32(data) != checksum:
                raise self._damaged(shard, key, "its checksum is not the index's")
            try:
                image = decode_image(data, channels, self.index.rules)
            except ValueError as error:
                raise self._damaged(shard, key, str(error)) from error
            if image.shape != pixels.shape[1:]:
                found = (image.shape[2], *image.shape[:2])
                raise self._damaged(shard, key, f"its shape is {found}, the index says {self.index.image_shape} (c, h, w)")
            pixels[row] = image
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)

    def _read_raw(self, rows: list[tuple]) -> torch.Tensor:
        channels, height, width = self.index.image_shape
        header = self.index.npy_header
        assert header is not None  # otherwise `read` calls _read_encoded
        header_crc = zlib.crc32(header)
        pixels = np.empty((len(rows), height, width, channels), dtype=np.uint8)
        flat = pixels.reshape(len(rows), -1)
        found = bytearray(len(header))
        expected_size = len(header) + flat.shape[1]
        for row, (shard, offset, size, checksum, key) in enumerate(rows):
            if size != expected_size:
                raise self._damaged(shard, key, f"it has {size} bytes, {self.index.image_shape} (c, h, w) needs {expected_size}")
            os.preadv(self._file(shard).fileno(), [found, flat[row]], offset)
            if found != header or zlib.crc32(flat[row], header_crc) != checksum:
                raise self._damaged(shard, key, "its checksum is not the index's")
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)

    def fetch(self, shards: Iterable[int]) -> None:
        """Fetches the files of these shards that are not cached, in parallel; does nothing for a local folder. Raises OSError."""
        wanted = [file for shard in shards for file in self._remote_files(shard)]
        missing = [file for file in wanted if not file[0].keeps(file[2])]
        if not missing:
            return
        bytes_, base = sum(size or 0 for *_, size in missing), missing[0][0].base
        log.info("fetching %d files, %s MB, from %s before the first batch", len(missing), f"{bytes_ / 1e6:,.1f}", base)
        stop = threading.Event()
        with ThreadPoolExecutor(FETCHES) as pool:
            try:
                for _ in pool.map(lambda file: file[0].fetch(*file[1:], stop=stop), missing):
                    pass
            except BaseException:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def fetch_ahead(self, shards: Iterable[int]) -> None:
        """Requests these shards in the background; does nothing for a local folder."""
        for shard in shards:
            for file in self._remote_files(shard):
                self._ahead.ask(*file)

    def stop_fetching(self) -> None:
        """Ends all fetches, also the fetch of a `read` in another thread, which then fails."""
        self._ahead.close()

    def close(self) -> None:
        """Ends all fetches and closes the shards."""
        self._ahead.close()
        self._file.cache_clear()

    def _remote_files(self, shard: int) -> list[tuple[RemoteFolder, str, str, int | None]]:
        """Returns folder, name, sha256 and bytes (None: unknown) of each remote file of a shard."""
        index, row = self.index, self.split.table[shard]
        files: list[tuple[RemoteFolder, str, str, int | None]] = []
        if isinstance(index.tars, RemoteFolder):
            name = self._shard_name(shard)
            files.append((index.tars, name, row["sha256"].decode(), int(row["bytes"])))
            if isinstance(index.tables, RemoteFolder):
                files.append((index.tables, member_table(name), row["members_sha256"].decode(), None))
        return files

    def _shard_name(self, shard: int) -> str:
        return plain_name(self.index.root, self.split.table["name"][shard].decode())

    def _open_file(self, shard: int) -> BinaryIO:
        row = self.split.table[shard]
        sha256 = row["sha256"].decode()
        self._ahead.forget(sha256)
        return self.index.tars.open(self._shard_name(shard), sha256, int(row["bytes"]), self._ahead.stop)

    def _load_members(self, shard: int) -> np.ndarray:
        name, sha256 = member_table(self._shard_name(shard)), self.split.table["members_sha256"][shard].decode()
        with self.index.open_table(name, sha256, "the index", self._ahead.stop) as file:
            return np.load(io.BytesIO(file.read()), allow_pickle=False)

    def _damaged(self, shard: int, key: str, why: str) -> UserError:
        return UserError(
            f"sample {key!r} of {self.index.tars.place(self._shard_name(shard))} is damaged: {why}; see all damage with "
            f"`python -m eae_dist.pack --verify {self.index.root}`"
        )
