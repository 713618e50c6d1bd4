"""Scanning one tar file of others: where its samples lie, and that training will be able to read them.

Only images (.png .jpg .jpeg .webp .npy) and .cls files are read. Other files in a shard are counted and ignored.
"""

import builtins
import io
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from eae_dist.data.decoding import SHARD_FORMATS, decode_image
from eae_dist.data.pixels import AS_THEY_ARE, Reading, Rules, read_pixels
from eae_dist.data.shard_index import MEMBER_DTYPE
from eae_dist.data.tars import members_of
from eae_dist.errors import UserError
from eae_dist.numerics.atomic_files import sha256_of

ENCODINGS = {"png": "png", "jpg": "jpg", "jpeg": "jpg", "webp": "webp", "npy": "raw"}  # extension -> encoding
EXTENSIONS = (*ENCODINGS, "cls")
LABEL = re.compile(rb"\s*(-1|\d{1,18})\s*")
ONE_HEADER = "all raw images must have the same header: write them in one shape with one version of numpy"


@dataclass(frozen=True)
class ShardScan:
    """The content of one tar file. shape: (h, w) of its images, None without images. first: the key of the first image.

    members: structured [n] of (key, offset, bytes, label, crc32), in the order of the tar.
    ignored: the number of ignored members of each kind. found: how many images have each of TRAITS, are "gray" and are "color".
    """

    name: str
    bytes: int
    sha256: str
    members: np.ndarray
    first: str
    shape: tuple[int, int] | None
    channels: frozenset[int]
    encodings: frozenset[str]
    npy_header: builtins.bytes | None
    ignored: Counter
    found: Counter = field(default_factory=Counter)


def index_shard(path: Path, rules: Rules = AS_THEY_ARE, decode: int = 0) -> ShardScan:
    """Scans one tar file and reads all its images by the rules.

    decode: the number of images from the start that are also decoded as training does.
    Raises ValueError if the file is compressed, truncated or damaged, and for unusable samples.
    """
    images: dict[str, tuple] = {}  # key -> extension, offset, bytes, crc32
    labels: dict[str, int] = {}
    ignored, found = Counter[str](), Counter[str]()
    shape, raw, channels, encodings = None, None, set(), set()
    for key, extension, offset, data in members_of(path, EXTENSIONS, ignored):
        where = f"{path}: sample {key!r}"
        if extension == "cls":
            if key in labels:
                raise UserError(f"{where} has two labels; keys must be unique")
            if not (label := LABEL.fullmatch(data)):
                raise UserError(f"{where}: its .cls must be an integer in ASCII, got {data[:20]!r}")
            labels[key] = int(label[1])
            continue

        if key in images:
            raise UserError(f"{where} has several images (.{images[key][0]}, .{extension}); one image a key")
        encodings.add(ENCODINGS[extension])
        if "raw" in encodings and len(encodings) > 1:
            raise UserError(f"{where} is .{extension}, others are not; raw (.npy) and encoded images cannot be mixed")
        if extension == "npy":
            raw = raw or RawImage.parse(data, where)
            if not data.startswith(raw.header):
                raise UserError(f"{where} and {next(iter(images))!r} have different npy headers; {ONE_HEADER}")
            if len(data) != raw.bytes:
                raise UserError(f"{where} has {len(data)} bytes, its npy header implies {raw.bytes}")
            here, depth = raw.shape, raw.channels
        else:
            reading = _reading(data, where, rules, decode > len(images))
            here, depth = reading.pixels.shape[:2], reading.depth
            found.update(reading.traits)
        if shape is not None and here != shape:
            raise different_sizes(f"{where} is {size_text(here)}", f"{next(iter(images))!r} is {size_text(shape)}")
        shape = here
        channels.add(depth)
        found["gray" if depth == 1 else "color"] += 1
        images[key] = (extension, offset, len(data), zlib.crc32(data))

    if strays := labels.keys() - images.keys():
        ignored[".cls without an image"] += len(strays)
    members = np.zeros(len(images), dtype=[("key", bytes_dtype(images)), *MEMBER_DTYPE])
    members["key"] = [key.encode() for key in images]
    members["label"] = [labels.get(key, -1) for key in images]
    for column, name in enumerate(("offset", "bytes", "crc32"), start=1):
        members[name] = [row[column] for row in images.values()]
    return ShardScan(
        name=path.name,
        bytes=path.stat().st_size,
        sha256=sha256_of(path),
        members=members,
        first=next(iter(images), ""),
        shape=shape,
        channels=frozenset(channels),
        encodings=frozenset(encodings),
        npy_header=None if raw is None else raw.header,
        ignored=ignored,
        found=found,
    )


@dataclass(frozen=True)
class RawImage:
    """The common npy header of raw images and its content. shape: (h, w). bytes: the length of the whole file."""

    header: bytes
    shape: tuple[int, int]
    channels: int
    bytes: int

    @classmethod
    def parse(cls, data: builtins.bytes, where: str) -> "RawImage":
        """Reads the header of one .npy file, uint8 [h, w] or [h, w, c] in C order. Raises ValueError for any other array."""
        file = io.BytesIO(data)
        try:
            version = np.lib.format.read_magic(file)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
            shape, fortran_order, dtype = read(file)
        except Exception as error:  # numpy parses the header as a Python literal and raises many types
            raise UserError(f"{where} is not a readable .npy file ({error})") from error
        image = len(shape) in (2, 3) and min(shape) > 0 and shape[2:] in ((), (1,), (3,))
        if dtype != np.uint8 or fortran_order or not image:
            order = "Fortran" if fortran_order else "C"
            raise UserError(f"{where} is {dtype} {list(shape)} in {order} order; expected uint8 [h, w, 1 or 3] in C order")
        header = data[: file.tell()]
        return cls(header, (shape[0], shape[1]), shape[2] if len(shape) == 3 else 1, len(header) + math.prod(shape))


def _reading(data: bytes, where: str, rules: Rules, decode: bool) -> Reading:
    try:
        reading = read_pixels(io.BytesIO(data), rules, formats=SHARD_FORMATS)
        if decode and (trained := decode_image(data, reading.depth, rules).shape[:2]) != reading.pixels.shape[:2]:
            raise UserError(f"training reads it as {size_text(trained)}, Pillow as {size_text(reading.pixels.shape[:2])}")
        return reading
    except ValueError as error:
        advice = "repair it, or pack the tar again without it: `pack webdataset TARS... OUT --skip-bad`"
        raise UserError(f"{where} is not a usable PNG, JPEG or WebP image ({error}); {advice}") from error


def bytes_dtype(names: Iterable[str]) -> str:
    """Returns the dtype that holds all these names in UTF-8."""
    return f"S{max((len(name.encode()) for name in names), default=1)}"


def size_text(shape: tuple[int, int]) -> str:
    """Returns (height, width) as people say it: width x height."""
    return f"{shape[1]}x{shape[0]}"


def different_sizes(one: str, other: str) -> UserError:
    """Returns the error for two images of different sizes."""
    return UserError(
        f"{one}, {other} (width x height); all must have one size: `pack webdataset TARS... OUT --size N` resizes them"
    )
