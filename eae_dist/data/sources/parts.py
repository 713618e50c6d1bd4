"""Images that come in large files, such as tars on a server.

Every file is read once. Its images are kept aside, fitted and encoded, until all are known and can be written in random order.

Part             a file with samples, in a folder or at an address
convert_parts    converts all files in several processes; what an interrupted pack has converted is not converted again
EncodedImages    the converted images, a sequence of the bytes of image files

A part leaves two files: NUMBER.images, the encoded images end to end, and NUMBER.json, which says what they are and whose
presence says that the part is done.
"""

import builtins
import fcntl
import io
import json
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np
from PIL import Image
from tqdm import tqdm

from eae_dist.data.encoding import Encoding
from eae_dist.data.image_files import ENDINGS, kinds_of_damage, left_out
from eae_dist.data.pixels import Fit, Reading, Rules, read_pixels, scaled_values
from eae_dist.data.tars import left_alone
from eae_dist.distributed.processes import run_tasks
from eae_dist.errors import UserError
from eae_dist.numerics.atomic_files import fsync, replace_file
from eae_dist.numerics.json_files import read_json, sealed

LOCK, OPTIONS, FAILED = ".lock", "options.json", "failed"


class Part(Protocol):
    """A file with samples."""

    @property
    def name(self) -> str:
        """The name that users know."""
        ...

    def identity(self) -> dict:
        """What tells that the file is still the one that was converted, as JSON holds it."""
        ...

    def content(self, folder: Path, report: dict) -> Iterator[tuple[str, str, Any]]:
        """Yields ("image", key, bytes or array), ("label", key, int or str) and ("bad", key, reason), in any order.

        folder: where a file may be fetched to. report: takes what else is worth keeping.
        """
        ...


@dataclass(frozen=True)
class Conversion:
    """What is done to every image."""

    rules: Rules
    fit: Fit
    encoding: Encoding


@dataclass(frozen=True)
class EncodedImages:
    """Images in the files of parts; an item is the bytes of one image file, which raises ValueError if they are damaged.

    part, offset, bytes, crc32: int64 [n]. channels: of all.
    """

    folder: Path
    part: np.ndarray
    offset: np.ndarray
    bytes: np.ndarray
    crc32: np.ndarray
    channels: int

    @overload
    def __getitem__(self, i: int) -> builtins.bytes: ...
    @overload
    def __getitem__(self, i: np.ndarray) -> "EncodedImages": ...
    def __getitem__(self, i: "int | np.ndarray") -> "builtins.bytes | EncodedImages":
        if isinstance(i, np.ndarray):
            return EncodedImages(self.folder, self.part[i], self.offset[i], self.bytes[i], self.crc32[i], self.channels)
        path = images_file(self.folder, self.part[i])
        with open(path, "rb") as file:
            data = os.pread(file.fileno(), int(self.bytes[i]), int(self.offset[i]))
        if zlib.crc32(data) != self.crc32[i]:
            raise UserError(f"{path} is damaged; remove {path.with_suffix('.json')}, and its images are converted again")
        return data


@dataclass(frozen=True)
class Converted:
    """All parts after their conversion. The rows of all parts stand one behind the other.

    keys: unique. labels: int, str or None. part: int64 [n], the number of each row's part. reports: of each part.
    """

    images: EncodedImages
    keys: list[str]
    labels: list
    part: np.ndarray
    reports: list[dict]
    found: Counter
    notes: tuple[str, ...]
    finish: Callable[[], None]


def convert_parts(
    parts: list[Part], conversion: Conversion, folder: Path, options: dict, skip_bad: bool, workers: int
) -> Converted:
    """Converts all parts into `folder`, which stays for the next try if this one fails.

    options: whatever else decides the result. Raises ValueError for images of several sizes, for bad samples unless skip_bad,
    and if the folder holds parts that were converted with other options or belong to a pack that is running.
    """
    record = {"rules": asdict(conversion.rules), "fit": asdict(conversion.fit), "encoding": asdict(conversion.encoding)} | options
    finish = opened(folder, json.loads(json.dumps(record | {"parts": [part.name for part in parts]})))
    try:
        return _converted(parts, conversion, folder, finish, skip_bad, workers)
    except UserError:
        (folder / FAILED).touch()  # the error may advise other options
        raise


def _converted(
    parts: list[Part], conversion: Conversion, folder: Path, finish: Callable[[], None], skip_bad: bool, workers: int
) -> Converted:
    tasks = ((number, part, conversion, folder) for number, part in enumerate(parts))
    reports, first = [], None  # first: the name and shape of the first part with an image
    with (
        closing(run_tasks(convert_part, tasks, min(workers, len(parts)))) as results,
        tqdm(results, total=len(parts), desc="converting", unit=" files", disable=None) as progress,
    ):
        for part, report in zip(parts, progress, strict=True):
            reports.append(report)
            for size, key in report["sizes"].items():
                first = first or (f"{part.name}/{key}", size)
                if size != first[1]:
                    one, other = f"{first[0]} is {first[1]}", f"{part.name}/{key} is {size}"
                    raise UserError(f"{one}, {other} (width x height); all must have one size: give --size N to resize them")
    bad = {f"{part.name}/{key}": why for part, report in zip(parts, reports, strict=True) for key, why in report["bad"].items()}
    rows = [len(report["keys"]) for report in reports]
    notes = left_out(bad, sum(rows) + len(bad), skip_bad, "samples")
    if not sum(rows):
        ignored = sum((Counter(report.get("ignored")) for report in reports), Counter[str]())
        why = kinds_of_damage(bad) or left_alone(ignored, [ending[1:] for ending in ENDINGS]) or "they are empty"
        raise UserError(f"there is no usable image in {', '.join(part.name for part in parts[:3])}: {why}")
    if kept := sum(report["kept"] for report in reports):
        notes += (f"{kept:,} of {len(parts):,} files had been converted by an interrupted pack",)
    found = sum((Counter(report["found"]) for report in reports), Counter[str]())
    channels = conversion.rules.channels or (3 if found["color"] else 1)
    if conversion.encoding.format == "raw" and conversion.rules.channels is None and found["gray"] and found["color"]:
        raise UserError("gray and color images are mixed, which --format raw cannot hold; give --channels 3 or --channels 1")
    sizes, sums = ([np.array(report[what], dtype=np.int64) for report in reports] for what in ("bytes", "crc32"))
    number = np.repeat(np.arange(len(parts)), rows)
    offsets = np.concatenate([np.cumsum(size) - size for size in sizes])
    keys, said = unique_keys(parts, reports)
    return Converted(
        images=EncodedImages(folder, number, offsets, np.concatenate(sizes), np.concatenate(sums), channels),
        keys=keys,
        labels=[label for report in reports for label in report["labels"]],
        part=number,
        reports=reports,
        found=found,
        notes=notes + said,
        finish=finish,
    )


def opened(folder: Path, options: dict) -> Callable[[], None]:
    """Creates or continues a folder of parts and locks it; returns the function that removes it. Raises ValueError.

    What an interrupted pack has converted is kept from a pack with other options; what a failed one has, is converted again.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / LOCK).exists():
        raise UserError(f"{folder} is in the way and was not created by pack; remove it")
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / LOCK, "w")  # noqa: SIM115  it is open until `finish`
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise UserError(f"another pack is writing {folder}; wait for it or give another folder") from None
    known, failed = folder / OPTIONS, folder / FAILED
    advice = f"remove the folder {folder}, and all files are converted again"
    if known.is_file() and (before := read_json(known, {}, advice, is_sealed=True)) != options:
        if failed.exists():
            shutil.rmtree(folder)
            lock.close()
            return opened(folder, options)
        lock.close()
        differ = [name for name in options if before.get(name) != options[name]]
        raise UserError(
            f"{folder} holds what an interrupted pack has converted with other options ({', '.join(differ)}); give the same, or "
            f"remove that folder"
        )
    replace_file(known, sealed(options))
    failed.unlink(missing_ok=True)

    def finish() -> None:
        shutil.rmtree(folder)
        lock.close()

    return finish


def images_file(folder: Path, part: int) -> Path:
    """Returns the file with the encoded images of a part."""
    return folder / f"{part:06d}.images"


def convert_part(task: tuple[int, Part, Conversion, Path]) -> dict:
    """Converts a part, unless that was done before, and returns its report."""
    number, part, conversion, folder = task
    done, identity = folder / f"{number:06d}.json", part.identity()
    if done.is_file() and (report := read_json(done, {"identity": dict}, "remove it", is_sealed=True))["identity"] == identity:
        return report | {"kept": True}
    report = {"identity": identity, "kept": False}
    sizes: dict[str, str] = {}  # "WxH" -> the first key with it
    bad: dict[str, str] = {}
    labels: dict[str, int | str | None] = {}
    found: Counter[str] = Counter()
    rows: dict[str, tuple[bytes, str, list[str]]] = {}  # key -> encoded image, size, what is to be counted
    for kind, key, value in part.content(folder, report):
        if kind == "bad":
            bad[key] = value
        elif kind == "label":
            labels[key] = value
        elif key in rows:
            bad[key] = "its key comes twice"
        else:
            try:
                reading = array_reading(value, conversion.rules) if isinstance(value, np.ndarray) else read_as(value, conversion)
                pixels = conversion.fit(reading.pixels)
                kinds = [*reading.traits, "gray" if reading.depth == 1 else "color"]
                rows[key] = (conversion.encoding.encode(pixels), f"{pixels.shape[1]}x{pixels.shape[0]}", kinds)
            except ValueError as error:
                bad[key] = str(error)
    rows = {key: row for key, row in rows.items() if key not in bad}
    with open(images_file(folder, number), "wb") as file:
        for key, (data, size, kinds) in rows.items():
            file.write(data)
            sizes.setdefault(size, key)
            found.update(kinds)
    fsync(images_file(folder, number))
    report |= {"keys": [*rows], "bytes": [len(row[0]) for row in rows.values()], "labels": [labels.get(key) for key in rows]}
    report["crc32"] = [zlib.crc32(row[0]) for row in rows.values()]
    report |= {"sizes": sizes, "bad": bad, "found": found}
    replace_file(done, sealed(report))
    return report


def read_as(data: bytes, conversion: Conversion) -> Reading:
    """Reads the bytes of an image file by the rules."""
    return read_pixels(io.BytesIO(data), conversion.rules)


def array_reading(array: np.ndarray, rules: Rules) -> Reading:
    """Returns an array [h, w] or [h, w, 1 or 3] as an image that was read. Raises ValueError for another array."""
    if array.ndim not in (2, 3) or array.shape[2:] not in ((), (1,), (3,)) or not array.size:
        raise UserError(f"an array {array.dtype} {list(array.shape)}; expected [h, w] or [h, w, 1 or 3]")
    if array.dtype != np.uint8:
        if rules.scale is None or array.dtype.kind not in "uif":
            raise UserError(f"an array {array.dtype}; `pack --scale LOW:HIGH` says which values become 0 and 255")
        array = scaled_values(array, rules.scale)
    depth = 3 if array.shape[2:] == (3,) else 1
    image = Image.fromarray(array if depth == 3 else array.reshape(array.shape[:2]))
    return Reading(np.array(image.convert("L" if (rules.channels or depth) == 1 else "RGB")), depth, frozenset())


def unique_keys(parts: list[Part], reports: list[dict]) -> tuple[list[str], tuple[str, ...]]:
    """Returns a unique key for every row, and a note if keys were made longer: with the file's name where two files share one."""
    plain = [key for report in reports for key in report["keys"]]
    if len(set(plain)) == len(plain):
        return plain, ()
    stems = [part.name.rpartition("/")[2].partition(".")[0] for part in parts]
    if len(set(stems)) < len(stems):
        stems = [f"{number:06d}" for number in range(len(parts))]
    keys = [f"{stem}/{key}" for stem, report in zip(stems, reports, strict=True) for key in report["keys"]]
    return keys, (f"files share keys, so a key begins with the name of its file, as in {keys[0]}",)


def labels_and_classes(values: list, what: str) -> tuple[np.ndarray, list[str]]:
    """Returns labels int64 [n], -1 where there is none, and the names of classes: of texts, these in order; else none are known.

    what: names the labels in an error. Raises ValueError for numbers that are no labels, and for texts that are no classes.
    """
    numbers = {value for value in values if isinstance(value, int)}
    texts = {value for value in values if isinstance(value, str)}
    if texts and numbers - {-1}:
        raise UserError(
            f"{what}: some are numbers ({min(numbers - {-1})}), some are texts ({min(texts)!r}); all must be of one kind"
        )
    if len(texts) > max(1000, len(values) // 2):
        raise UserError(
            f"{what}: {len(texts):,} different texts for {len(values):,} images are no classes, as {min(texts)[:60]!r}"
        )
    if numbers and not (min(numbers) >= -1 and max(numbers) < 2**31):
        raise UserError(f"{what} go from {min(numbers)} to {max(numbers)}; expected 0, 1, ..., or -1 for none")
    classes = sorted(texts)
    number = {name: label for label, name in enumerate(classes)}
    return np.array([-1 if value is None else number.get(value, value) for value in values], dtype=np.int64), classes
