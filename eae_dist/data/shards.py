"""The folder of shards: its index, and reading samples from it by offset.

A data set is a folder of tar files in WebDataset form (`KEY.png` + `KEY.cls`, or `KEY.npy`) with an index beside them:

    index.json                  totals, image shape, classes, source, license; the sha256 of every table
    train.shards.npy            the shard table of a split: name, samples, bytes, sha256 of every tar
    train-000000.members.npy    the members of a shard: key, offset, bytes, label, crc32 of every image

The tables are plain structured arrays, so that a split of 10^6 shards is opened by mapping one file. `build_index` makes
them for shards from anywhere; nothing in a shard is ever unpickled, and only the images and `.cls` files are read.
"""

import hashlib
import io
import json
import os
import re
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from eae_dist.data.decode import decode_image
from eae_dist.durable import sha256_of

INDEX_VERSION = 1
SHARD_NAME = re.compile(r"(?P<split>.+)-\d{6,}\.tar")
SHARD_DTYPE = [("samples", "<i8"), ("bytes", "<i8"), ("sha256", "S64"), ("members_sha256", "S64")]
MEMBER_DTYPE = [("offset", "<i8"), ("bytes", "<i8"), ("label", "<i8"), ("crc32", "<u4")]
OPEN_FILES = 256  # well below the usual limit of 1,024 for a process


@dataclass(frozen=True)
class Split:
    """One split: its shard table, structured [S] of (name, samples, bytes, sha256, members_sha256)."""

    name: str
    samples: int
    table: np.ndarray


@dataclass(frozen=True)
class ShardIndex:
    """What `index.json` says. `image_shape` is (c, h, w); `npy_header` is the header that all raw members share, else None."""

    root: Path
    sha256: str
    name: str
    image_shape: tuple[int, int, int]
    npy_header: bytes | None
    classes: list[str]
    info: dict

    @classmethod
    def load(cls, root: str | Path) -> "ShardIndex":
        """Reads and checks `root/index.json`. Raises FileNotFoundError or ValueError with what to do."""
        root = Path(root)
        path = root / "index.json"
        if not path.is_file():
            what = "has no index.json" if root.is_dir() else "is not a folder" if root.exists() else "does not exist"
            raise FileNotFoundError(
                f"data.root={root} {what}; make shards with `python -m eae_dist.pack SOURCE {root}`, or index tar files that "
                f"lie there with `python -m eae_dist.pack --index {root}`"
            )
        text = path.read_bytes()
        try:
            info = json.loads(text)
            if info["version"] != INDEX_VERSION:
                raise ValueError(f"version {info['version']}, this program reads version {INDEX_VERSION}")
            info["splits"] = dict(info["splits"])
            header = info["image"]["npy_header"]
            return cls(
                root=root,
                sha256=hashlib.sha256(text).hexdigest(),
                name=info["name"],
                image_shape=tuple(info["image"]["shape"]),
                npy_header=None if header is None else bytes.fromhex(header),
                classes=info["classes"],
                info=info,
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} cannot be read as a shard index ({error}); write it again with `pack --index`") from error

    def split(self, name: str) -> Split:
        """The split of that name; an unknown one is a ValueError that names the known."""
        splits = self.info["splits"]
        if name not in splits:
            raise ValueError(f"data set {self.name} has no split {name!r}; it has {', '.join(sorted(splits))}")
        path = self.root / f"{name}.shards.npy"
        if not path.is_file() or sha256_of(path) != splits[name]["table_sha256"]:
            raise ValueError(f"{path} is missing or is not the table that index.json was written with (checksum mismatch)")
        return Split(name, splits[name]["samples"], np.load(path, mmap_mode="r", allow_pickle=False))


def member_table_path(root: Path, shard: str) -> Path:
    return root / (shard.removesuffix(".tar") + ".members.npy")


def safe_shard_path(root: Path, name: str) -> Path:
    """The path of a shard named in an index, which must stay inside the data set's folder."""
    if PurePosixPath(name).name != name or name in ("", ".", "..") or ":" in name:
        raise ValueError(f"{root}/index.json names the shard {name!r}; a shard is a plain file name inside that folder")
    return root / name


class ShardReader:
    """Reads samples of one split by (shard, member), checking each one's crc32 and shape.

    `open_shards`: how many shards are in use at once; their member tables stay in memory.
    """

    def __init__(self, index: ShardIndex, split: str, open_shards: int = OPEN_FILES):
        self.index = index
        self.split = index.split(split)
        self.open_shards = open_shards
        self._open_caches()

    def _open_caches(self):
        self._file = lru_cache(maxsize=OPEN_FILES)(self._open_file)
        self._members = lru_cache(maxsize=max(self.open_shards, OPEN_FILES))(self._load_members)

    def __getstate__(self):  # a worker process opens its own files
        return {"index": self.index, "split": self.split, "open_shards": self.open_shards}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._open_caches()

    def read(self, shards: np.ndarray, members: np.ndarray) -> dict:
        """Rows (shards[i], members[i]), both int64 [b] -> {"image": uint8 [b, c, h, w], "label": int64 [b], "key": list of str}.

        Label -1 where a sample has none. The channels of a pixel lie together in memory (channels_last), as in the files.
        A damaged sample is a ValueError that names the shard and the sample.
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
                image = decode_image(data, channels)
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

    def _shard_path(self, shard: int) -> Path:
        return safe_shard_path(self.index.root, self.split.table["name"][shard].decode())

    def _open_file(self, shard: int):
        path, wanted = self._shard_path(shard), int(self.split.table["bytes"][shard])
        if not path.is_file():
            raise FileNotFoundError(f"{path} is named in the index and missing; restore it or pack the data set again")
        if (size := path.stat().st_size) != wanted:
            kind = "truncated" if size < wanted else "not the file that was indexed"
            raise ValueError(f"{path} is {kind}: {size} bytes, the index says {wanted}; restore it or run `pack --index` again")
        return open(path, "rb", buffering=0)

    def _load_members(self, shard: int) -> np.ndarray:
        path = member_table_path(self.index.root, self._shard_path(shard).name)
        data = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(data).hexdigest().encode() != self.split.table["members_sha256"][shard]:
            raise ValueError(f"{path} is missing or is not the table that the index was written with (checksum mismatch)")
        return np.load(io.BytesIO(data), allow_pickle=False)

    def _damaged(self, shard: int, key: str, why: str) -> ValueError:
        path = self._shard_path(shard)
        return ValueError(
            f"sample {key!r} of {path} is damaged: {why}; see all damage with `python -m eae_dist.pack --verify {path.parent}`"
        )
