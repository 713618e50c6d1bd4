"""Writing the index of a folder of tar shards; `shard_index.py` describes the format and reads it.

    index_shard             scans one tar file for its tables and the properties of its images
    write_index             writes the tables of all shards and splits, then `index.json`
    build_index             does both for existing shards in a folder
    build_remote_index      does both for shards at an address
    verify                  compares every checksum of a data set and lists damaged files

Only images (.png .jpg .jpeg .webp .npy) and .cls files are read. Other files in a shard are counted and ignored.
"""

import builtins
import fnmatch
import hashlib
import io
import json
import math
import re
import tarfile
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import braceexpand
import numpy as np
from PIL import Image, ImageFile
from tqdm import tqdm

from eae_dist.data.remote import Cache, FetchError, RemoteFolder, checked_address
from eae_dist.data.shard_index import (
    INDEX_VERSION,
    MEMBER_DTYPE,
    SHARD_DTYPE,
    SHARD_NAME,
    LocalFolder,
    ShardIndex,
    member_table,
    plain_name,
)
from eae_dist.distributed.processes import run_tasks
from eae_dist.errors import UserError, UserFileError
from eae_dist.numerics.atomic_files import replace_file, sha256_of

ENCODINGS = {"png": "png", "jpg": "jpg", "jpeg": "jpg", "webp": "webp", "npy": "raw"}  # extension -> encoding
LABEL = re.compile(rb"\s*(-1|\d{1,18})\s*")
COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
TAR_NAME = re.compile(r"[^.].*\.(tar|tgz|tar\.(gz|bz2|xz|zst))")
ONE_HEADER = "all raw images must have the same header: write them in one shape with one version of numpy"
SORTED_BY_CLASS = 0.1  # a class correlation above this is worth a warning


@dataclass(frozen=True)
class ShardScan:
    """The content of one tar file. shape: (h, w) of its images, None without images. first: the key of the first image.

    members: structured [n] of (key, offset, bytes, label, crc32), in the order of the tar.
    ignored: the number of ignored members of each kind.
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


def index_shard(path: Path) -> ShardScan:
    """Scans one tar file. Raises ValueError if it is compressed, truncated or damaged, and for unusable samples."""
    images: dict[str, tuple] = {}  # key -> extension, offset, bytes, crc32
    labels: dict[str, int] = {}
    ignored: Counter = Counter()
    shape, raw, channels, encodings = None, None, set(), set()
    for key, extension, offset, data in _images_and_labels(path, ignored):
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
            here, depth = _encoded_shape(data, where)
        if shape is not None and here != shape:
            raise _different_sizes(f"{where} is {_size(here)}", f"{next(iter(images))!r} is {_size(shape)}")
        shape = here
        channels.add(depth)
        images[key] = (extension, offset, len(data), zlib.crc32(data))

    if strays := labels.keys() - images.keys():
        ignored[".cls without an image"] += len(strays)
    members = np.zeros(len(images), dtype=[("key", _bytes_dtype(images)), *MEMBER_DTYPE])
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


def write_index(
    root: Path,
    splits: dict[str, list[ShardScan]],
    *,
    name: str,
    classes: list[str],
    source: str,
    license: str,
    preprocessing: str,
    seed: int | None,
    channels: int | None = None,
    base: str | None = None,
) -> dict:
    """Writes the tables of all shards and then `root/index.json`; returns the content of index.json.

    seed: seed of the order of the samples, None if unknown. channels: 1 or 3; default: that of the images.
    base: the address of the shards, None if they are in the folder of the index.
    Raises ValueError for incompatible shards, before any file is written.
    """
    image = _image_of_all([scan for scans in splits.values() for scan in scans], channels)
    for split, scans in splits.items():
        _refuse_repeated_keys(split, scans)

    info: dict[str, Any] = {
        "version": INDEX_VERSION,
        "name": name,
        "image": image,
        "classes": classes,
        "source": source,
        "license": license,
        "preprocessing": preprocessing,
        "seed": seed,
        **({} if base is None else {"base": base}),
        "splits": {},
    }
    for split, scans in splits.items():
        table = np.zeros(len(scans), dtype=[("name", _bytes_dtype([scan.name for scan in scans])), *SHARD_DTYPE])
        for row, scan in enumerate(scans):
            digest = _write_table(root / member_table(scan.name), scan.members)
            table[row] = (scan.name.encode(), len(scan.members), scan.bytes, scan.sha256, digest)
        info["splits"][split] = {
            "samples": int(table["samples"].sum()),
            "shards": len(table),
            "bytes": int(table["bytes"].sum()),
            "table_sha256": _write_table(root / f"{split}.shards.npy", table),
            "class_correlation": class_correlation([scan.members["label"] for scan in scans]),
        }
    replace_file(root / "index.json", json.dumps(info, indent=2) + "\n")
    return info


def build_index(root: Path, split: str | None = None, workers: int = 1) -> tuple[dict, list[str]]:
    """Indexes the tar shards in `root`; returns the content of index.json, and notes for the user.

    A shard belongs to the split in its name (train-000000.tar: train); with `split`, all shards belong to that split. The name,
    classes, source, license and preprocessing of an earlier index are kept. Raises ValueError or OSError with advice.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserFileError(f"{root} is not a folder; give the folder that holds the tar shards")
    paths = sorted(path for path in root.iterdir() if TAR_NAME.fullmatch(path.name))
    if not paths:
        raise UserError(f"{root} holds no .tar file; give the folder that holds the tar shards")
    for path in paths:
        _refuse_compressed(path)
    split_of = _splits_of([path.name for path in paths], root, split)
    return _index_all(root, index_shard, paths, split_of, workers, name=root.resolve().name)


def build_remote_index(
    pattern: str, out: Path, cache: Cache, split: str | None = None, workers: int = 1
) -> tuple[dict, list[str]]:
    """Writes the index of the shards at an address into `out`, as `build_index` does for a folder; the shards stay there.

    pattern: FOLDER/train-{000000..000009}.tar; for S3 also FOLDER/*.tar, or FOLDER for all shards. Each shard is fetched once
    into the cache folder and removed after its scan.
    """
    folder, names = remote_shards(pattern, cache)
    split_of = _splits_of(names, folder.base, split)
    out.mkdir(parents=True, exist_ok=True)
    cache.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="indexing-", dir=cache.folder) as aside:
        tasks = [(folder, name, Path(aside)) for name in names]
        return _index_all(
            out, _index_remote_shard, tasks, split_of, workers, name=folder.base.rpartition("/")[2], base=folder.base
        )


def remote_shards(pattern: str, cache: Cache) -> tuple[RemoteFolder, list[str]]:
    """Returns the folder of an address with a pattern, and the sorted names of the matching shards."""
    checked_address(re.sub(r"[{},*]", "", pattern), "--index ")
    if pattern.endswith("/") or not pattern.endswith((".tar", "}")):
        pattern = pattern.rstrip("/") + "/*.tar"
    base, _, last = pattern.rpartition("/")
    folder = RemoteFolder(checked_address(base, "--index "), cache)
    try:
        names = list(braceexpand.braceexpand(last))
    except ValueError as error:
        raise UserError(f"--index {pattern}: the braces do not match; write for example train-{{000000..000009}}.tar") from error
    if any("*" in name for name in names):
        if not folder.base.startswith("s3:"):
            raise UserError(
                f"--index {pattern}: a web server has no list of its files; name them: {base}/train-{{000000..000009}}.tar"
            )
        found = folder.names()
        names = [name for wanted in names for name in fnmatch.filter(found, wanted)]
    if not names:
        raise UserError(f"--index {pattern}: there is no such file; give the folder that holds the tar shards")
    return folder, sorted(set(names))


def _index_remote_shard(task: tuple[RemoteFolder, str, Path]) -> ShardScan:
    folder, name, aside = task
    path = aside / name
    try:
        with open(path, "wb") as file:
            folder.copy(name, file)
        return index_shard(path)
    except ValueError as error:
        raise UserError(str(error).replace(str(path), folder.place(name))) from error
    finally:
        path.unlink(missing_ok=True)


def _splits_of(names: list[str], root: Path | str, split: str | None) -> dict[str, str]:
    """Returns the split of each shard."""
    if split is not None and not re.fullmatch(r"\w[\w.-]*", split):
        raise UserError(f"--split {split!r} must be a plain name such as train")
    split_of = {}
    for name in names:
        found = SHARD_NAME.fullmatch(plain_name(root, name))
        if split is not None:
            split_of[name] = split
        elif found is not None:
            split_of[name] = found["split"]
        else:
            raise UserError(f"{root}/{name} has no split in its name (as train-000000.tar has); name it with --split NAME")
    return split_of


def _index_all(
    root: Path, scan_of: Callable, tasks: list, split_of: dict[str, str], workers: int, *, name: str, base: str | None = None
) -> tuple[dict, list[str]]:
    """Scans every shard and writes the index into `root`; returns the content of index.json, and notes for the user."""
    splits: dict[str, list[ShardScan]] = {}
    with closing(run_tasks(scan_of, tasks, min(workers, len(tasks)))) as scans:
        for scan in tqdm(scans, total=len(tasks), desc="indexing", unit=" shards", disable=None):
            splits.setdefault(split_of[scan.name], []).append(scan)

    every = [scan for scans in splits.values() for scan in scans]
    notes = []
    ignored = sum((scan.ignored for scan in every), Counter())
    left_alone = ", ".join(f"{count:,} {kind}" for kind, count in ignored.most_common())
    if not any(len(scan.members) for scan in every):
        wanted = " ".join(f".{extension}" for extension in ENCODINGS)
        raise UserError(f"the shards in {base or root} hold no image ({wanted}); they hold {left_alone or 'nothing at all'}")
    if ignored:
        notes.append(f"members left alone: {left_alone}")
    if len(frozenset().union(*(scan.channels for scan in every))) > 1:
        notes.append("gray and color images are mixed; all are read as RGB")
    names = {"name": name, "classes": [], "source": "", "license": "", "preprocessing": "as found in shards"}
    if kept := _names_in_index(root, names):
        notes.append(f"kept from the previous index.json: {', '.join(kept)}")
    info = write_index(root, splits, **(names | kept), seed=None, base=base)
    for name, totals in info["splits"].items():
        if (rho := totals["class_correlation"] or 0) > SORTED_BY_CLASS:
            notes.append(
                f"the shards of split {name} are sorted by class (class correlation {rho:.2f}; 0: shuffled, 1: one class a "
                f"shard), which makes batch means drift; pack the images again in random order, as `pack imagefolder` does"
            )
    return info, notes


def verify(root: Path | str, workers: int = 1, cache: Cache | None = None) -> list[str]:
    """Compares every table and tar file of a data set with the index; returns one line per damaged file.

    Remote files are read from their address, not from the cache. Raises OSError if there is no index.
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
            files.append((index.tars, name, row["sha256"].decode()))
            files.append((index.tables, member_table(name), row["members_sha256"].decode()))
    with closing(run_tasks(_damage, files, min(workers, max(1, len(files))))) as checked:
        found = tqdm(checked, total=len(files), desc="verifying", unit=" files", disable=None)
        return problems + [problem for problem in found if problem]


def class_correlation(labels: list[np.ndarray]) -> float | None:
    """Returns how similar the classes within a shard are, compared with the whole split; labels: int64 [n_s] of every shard.

    It is the intraclass correlation of the class indicators (one-way random effects, analysis-of-variance estimate, summed over
    classes). With S shards of n_s samples, n_sc of them of class c, and N = sum n_s, N_c = sum_s n_sc:

        between = (sum n_sc^2 / n_s  -  sum N_c^2 / N) / (S - 1)
        within = (N  -  sum n_sc^2 / n_s) / (N - S)
        n_0 = (N - sum n_s^2 / N) / (S - 1)
        rho = (between - within) / (between + (n_0 - 1) within)

    It is about 0 for shuffled shards, 1 if every shard has one class, and None for fewer than two shards or classes.
    """
    labels = [shard for shard in labels if len(shard)]
    sizes = np.array([len(shard) for shard in labels], dtype=np.float64)
    shards, total = len(sizes), sizes.sum()
    of_class: Counter = Counter()
    alike = 0.0  # sum n_sc^2 / n_s
    for shard in labels:
        classes, counts = np.unique(shard, return_counts=True)
        of_class.update(dict(zip(classes.tolist(), counts.tolist(), strict=True)))
        alike += (counts.astype(np.float64) ** 2).sum() / len(shard)
    if shards < 2 or len(of_class) < 2 or total == shards:
        return None
    between = (alike - sum(count**2 for count in of_class.values()) / total) / (shards - 1)
    within = (total - alike) / (total - shards)
    n_0 = (total - (sizes**2).sum() / total) / (shards - 1)
    return float((between - within) / (between + (n_0 - 1) * within))


def image_channels(image: ImageFile.ImageFile) -> int:
    """Returns 1 for a gray image, 3 for any other. Raises ValueError for more than 8 bits a channel, which would be lost."""
    # A 16-bit color image has mode RGB; only the raw mode of the decoder (RGB;16B) shows the bits. BGR;16 is 16 bits a pixel.
    deep_ppm = any(
        codec in ("ppm", "ppm_plain") and isinstance(args, tuple) and args[1] > 255 for codec, _, _, args in image.tile
    )
    if image.mode[0] in "IF" or deep_ppm or re.search(r";16[BLNS]", str(image.tile)):
        raise UserError(f"more than 8 bits a channel (mode {image.mode})")
    return 1 if image.mode in ("1", "L", "LA", "La") else 3


def _encoded_shape(data: bytes, where: str) -> tuple[tuple[int, int], int]:
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
            shape, channels = (image.height, image.width), image_channels(image)
            image.load()  # decodes with Pillow, because other decoders ignore damage in a PNG or crash
            if image.format == "WEBP" and is_gray(np.asarray(image.convert("RGB"))):  # WebP has no gray images
                channels = 1
            return shape, channels
    except Exception as error:  # Pillow raises many types for a damaged file
        raise UserError(f"{where} is not a usable PNG, JPEG or WebP image ({error})") from error


def is_gray(pixels: np.ndarray) -> bool:
    """True if the channels of an image, uint8 [h, w, 3], are equal apart from the rounding of a lossy format."""
    return int(np.ptp(pixels, axis=2).max()) <= 2


def _images_and_labels(path: Path, ignored: Counter) -> Iterator[tuple[str, str, int, bytes]]:
    """Yields key, extension, offset and bytes of every image and .cls of a tar; counts the other members in `ignored`.

    The key is the member's name up to the first dot of its base name, as in webdataset.
    """
    _refuse_compressed(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    # Otherwise tarfile keeps every header in memory.
                    tar.members.clear()  # type: ignore[attr-defined]  # the types of the standard library lack it
                    folder, slash, base = member.name.rpartition("/")
                    key, _, extension = base.partition(".")
                    extension = extension.lower()
                    if not member.isreg() or member.issparse():
                        ignored["folders" if member.isdir() else "links and special files"] += 1
                    elif not key or not extension:
                        ignored["files without a key or an extension"] += 1
                    elif extension != "cls" and extension not in ENCODINGS:
                        ignored[f".{extension}"] += 1
                    elif not _is_utf8(member.name):
                        raise UserError(f"{path}: the name of member {member.name!r} is not UTF-8; rename it")
                    elif member.offset_data + member.size > size:
                        raise tarfile.ReadError(f"the data of {member.name!r} ends early")
                    else:
                        file.seek(member.offset_data)
                        yield folder + slash + key, extension, member.offset_data, file.read(member.size)
                end = tar.offset
        except tarfile.TarError as error:
            raise _truncated(path, str(error)) from error
        # tarfile stops at any unreadable header. The true end consists of zeros, and nothing follows it.
        file.seek(end)
        rest = file.read(tarfile.BLOCKSIZE)
        if len(rest) < tarfile.BLOCKSIZE:
            raise _truncated(path, "its end mark is missing")
        while rest:
            if rest.strip(b"\0"):
                raise _truncated(path, f"from byte {end} on it is neither a member nor the end mark")
            rest = file.read(1 << 20)


def _is_utf8(name: str) -> bool:
    try:
        return bool(name.encode())
    except UnicodeEncodeError:  # tarfile decodes invalid bytes to surrogates
        return False


def _bytes_dtype(names: Iterable[str]) -> str:
    return f"S{max((len(name.encode()) for name in names), default=1)}"


def _refuse_compressed(path: Path) -> None:
    with open(path, "rb") as file:
        start = file.read(8)
    for magic, program in COMPRESSED.items():
        if start.startswith(magic):
            raise UserError(f"{path} is compressed, but samples are read by their offset; unpack it with `{program}` first")


def _truncated(path: Path, why: str) -> UserError:
    return UserError(f"{path} is truncated, damaged or not a tar file ({why}); fetch or write it again")


def _size(shape: tuple[int, int]) -> str:
    return f"{shape[1]}x{shape[0]}"


def _different_sizes(one: str, other: str) -> UserError:
    return UserError(f"{one}, {other} (width x height); all must have one size: resize them (`pack imagefolder --size`)")


def _image_of_all(scans: list[ShardScan], channels: int | None) -> dict:
    """Returns the "image" entry of index.json. Raises ValueError if the shards differ in it."""
    shapes = [(scan, scan.shape) for scan in scans if scan.shape is not None]
    if not shapes:
        raise UserError("there is no image in any shard")
    first, shape = shapes[0]
    for scan, here in shapes:
        if here != shape:
            one, other = (f"{s.first!r} of {s.name} is {_size(size)}" for s, size in ((first, shape), (scan, here)))
            raise _different_sizes(one, other)
        if ("raw" in scan.encodings) != ("raw" in first.encodings):
            raise UserError(f"{first.name} and {scan.name}: raw (.npy) and encoded images cannot be mixed")
        if scan.npy_header != first.npy_header:
            raise UserError(f"{first.name} and {scan.name} have different npy headers; {ONE_HEADER}")
    encodings = frozenset[str]().union(*(scan.encodings for scan, _ in shapes))
    found = frozenset[int]().union(*(scan.channels for scan, _ in shapes))
    return {
        "shape": [channels or max(found), *shape],
        "encoding": next(iter(encodings)) if len(encodings) == 1 else "mixed",
        "npy_header": None if first.npy_header is None else first.npy_header.hex(),
    }


def _refuse_repeated_keys(split: str, scans: list[ShardScan]) -> None:
    keys = np.sort(np.concatenate([scan.members["key"] for scan in scans]))
    if len(repeated := keys[1:][keys[1:] == keys[:-1]]):
        holders = [scan.name for scan in scans if (scan.members["key"] == repeated[0]).any()]
        key = repeated[0].decode()
        raise UserError(f"split {split} has the key {key!r} twice ({', '.join(holders)}); keys must be unique")


def _names_in_index(root: Path, names: Iterable[str]) -> dict:
    """Returns the entries `names` of an existing index, so that a new index keeps them."""
    try:
        known = ShardIndex.load(root).info
    except (FileNotFoundError, ValueError):
        return {}
    return {name: known[name] for name in names if name in known}


def _damage(file: tuple[LocalFolder | RemoteFolder, str, str]) -> str | None:
    folder, name, sha256 = file
    try:
        return None if folder.digest(name) == sha256 else f"{folder.place(name)} is damaged: its sha256 is not the index's"
    except FetchError as error:
        return str(error)
    except FileNotFoundError:
        return f"{folder.place(name)} is missing"
    except OSError as error:
        return f"{folder.place(name)} cannot be read ({error.strerror})"


def _write_table(path: Path, table: np.ndarray) -> str:
    """Writes a table as .npy and returns the file's sha256."""
    data = io.BytesIO()
    np.save(data, table, allow_pickle=False)
    replace_file(path, data.getvalue())
    return hashlib.sha256(data.getvalue()).hexdigest()
