"""Tars in WebDataset form that others made, by path or address, packed again: resized, shuffled, split and labelled."""

import glob
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import braceexpand
import numpy as np

from eae_dist.data.encoding import Encoding
from eae_dist.data.image_files import ENDINGS, how_read, what_was_done
from eae_dist.data.indexing import remote_shards
from eae_dist.data.pixels import Fit, Rules
from eae_dist.data.remote import Cache, RemoteFolder
from eae_dist.data.servers import is_address
from eae_dist.data.shard_index import split_in_name
from eae_dist.data.sources.parts import Conversion, Converted, Part, convert_parts, labels_and_classes
from eae_dist.data.sources.samples import Samples, Source, by_fractions, with_held_out_splits
from eae_dist.data.split_names import split_called
from eae_dist.data.tars import left_alone, members_of
from eae_dist.errors import MissingFile, UserError

IMAGES = {ending[1:] for ending in ENDINGS} | {"npy"}
NUMBER = re.compile(r"-?\d{1,18}")


def webdataset(
    tars: list[str],
    fit: Fit,
    rules: Rules,
    skip_bad: bool,
    workers: int,
    label_key: str | None,
    image_key: str | None,
    dots_in_keys: bool,
    split_fractions: tuple[float, float, float] | None,
    encoding: Encoding,
    cache: Cache,
    parts: Path,
) -> Source:
    """Tars in WebDataset form, by path or address, with braces or *: resized, shuffled and split into shards of ours."""
    places = [place for tar in tars for place in expanded(tar, cache)]
    files: list[Part] = [TarPart(folder, name, label_key or "cls", image_key, dots_in_keys) for folder, name in places]
    options = {"label_key": label_key, "image_key": image_key, "dots_in_keys": dots_in_keys}
    converted = convert_parts(files, Conversion(rules, fit, encoding), parts, options, skip_bad, workers)
    ignored = sum((Counter(report["ignored"]) for report in converted.reports), Counter())
    if label_key is not None and not any(label is not None for label in converted.labels):
        converted.finish()  # another label needs all of it again
        fields = next((report["fields"] for report in converted.reports if report["fields"]), None)
        raise UserError(
            f"no sample has the label {label_key}"
            + (f"; a .json holds {', '.join(fields[:10])}, as --label-key json:{fields[0]}" if fields else "")
        )
    labels, classes = labels_and_classes(converted.labels, f"the labels {label_key or 'cls'}")
    notes = converted.notes + ((left_alone(ignored, IMAGES),) if ignored else ())
    if label_key is not None and (without := int((labels == -1).sum())):
        notes += (f"{without:,} images have no label",)
    split_of = [split_called(re.split(r"[-_.]", split)[-1]) if (split := split_in_name(part.name)) else None for part in files]
    first = places[0][0]
    return source_of_parts(
        converted,
        labels,
        classes,
        split_of,
        split_fractions,
        rules=rules,
        fit=fit,
        name=(first.base if isinstance(first, RemoteFolder) else str(first.resolve())).rpartition("/")[2],
        origin=f"WebDataset shards {', '.join(tars[:3])}",
        notes=notes,
    )


def source_of_parts(
    converted: Converted,
    labels: np.ndarray,
    classes: list[str],
    split_of: list[str | None],
    fractions: tuple[float, float, float] | None,
    *,
    rules: Rules,
    fit: Fit,
    name: str,
    origin: str,
    notes: tuple[str, ...],
) -> Source:
    """Returns the source of converted parts. split_of: the split that each part's name says; fractions: draw splits instead.

    Raises ValueError if some names say a split and others do not.
    """
    samples = Samples(converted.images, labels, converted.keys)
    if fractions is not None:
        splits, how = by_fractions(samples, fractions)
    else:
        if None in split_of and set(split_of) != {None}:
            raise UserError("some files have a split in their names and others have not; rename them, or give --split-fractions")
        rows: dict[str, list[np.ndarray]] = {}
        for part, split in enumerate(split_of):
            rows.setdefault(split or "train", []).append(np.flatnonzero(converted.part == part))
        splits, how = with_held_out_splits({split: samples[np.concatenate(here)] for split, here in rows.items()})
    rules = Rules(converted.images.channels, rules.scale, rules.frames)
    done = what_was_done(converted.found, rules)
    return Source(
        name=name,
        splits=splits,
        classes=classes,
        origin=origin,
        license="not stated",
        preprocessing="; ".join([how_read(converted.images.channels, fit), *done, how]),
        notes=notes,
        finish=converted.finish,
    )


def expanded(pattern: str, cache: Cache) -> list[tuple[Path | RemoteFolder, str]]:
    """Returns folder and name of every tar that a path or an address with braces or * means. Raises OSError or ValueError."""
    if is_address(re.sub(r"[{},*]", "", pattern)):
        folder, names = remote_shards(pattern, cache, "")
        return [(folder, name) for name in names]
    try:
        paths = list(braceexpand.braceexpand(pattern))
    except ValueError as error:
        raise UserError(f"{pattern}: the braces do not match; write for example train-{{000000..000009}}.tar") from error
    found = [match for path in paths for match in (sorted(glob.glob(path)) if re.search(r"[*?[]", path) else [path])]
    for path in map(Path, found or [pattern]):
        if not path.is_file():
            raise MissingFile(f"{path} is not a file; give tar files, as shards/train-*.tar or train-{{000000..000009}}.tar")
    return [(Path(path).parent, Path(path).name) for path in found]


@dataclass(frozen=True)
class TarPart:
    """A tar file. label: "cls", "txt" or json:FIELD. image: the extension of images, None for any. last_dot: ends a key."""

    folder: Path | RemoteFolder
    tar: str
    label: str
    image: str | None
    last_dot: bool

    @property
    def name(self) -> str:
        """The file's name."""
        return self.tar

    def identity(self) -> dict:
        """The file's address, or its path, size and time."""
        if isinstance(self.folder, RemoteFolder):
            return {"address": self.folder.place(self.tar)}
        status = (self.folder / self.tar).stat()
        return {"path": str((self.folder / self.tar).resolve()), "bytes": status.st_size, "time": status.st_mtime_ns}

    def content(self, folder: Path, report: dict) -> Iterator[tuple[str, str, Any]]:
        """Yields images and labels, see `Part`."""
        if isinstance(self.folder, Path):
            yield from self._content(self.folder / self.tar, report)
            return
        path = folder / f"{hashlib.sha256(self.folder.place(self.tar).encode()).hexdigest()[:16]}.fetched"
        try:
            with open(path, "wb") as file:
                self.folder.copy(self.tar, file)
            yield from self._content(path, report)
        finally:
            path.unlink(missing_ok=True)

    def _content(self, path: Path, report: dict) -> Iterator[tuple[str, str, Any]]:
        images = {self.image.lower()} if self.image else IMAGES
        holder, _, field = self.label.partition(":")
        ignored, extension_of = Counter[str](), dict[str, str]()
        report |= {"fields": None}
        try:
            for key, extension, _, data in members_of(path, images | {holder}, ignored, self.last_dot):
                key = without_dots(key)
                if extension == holder:
                    try:
                        if field and report["fields"] is None:
                            report["fields"] = sorted(json.loads(data))
                        yield "label", key, label_in(data, field)
                    except ValueError as error:
                        yield "bad", key, f"its .{holder}: {error}"
                elif key in extension_of and extension != extension_of[key]:
                    yield "bad", key, f"several images (.{extension_of[key]}, .{extension}); --image-key EXTENSION chooses one"
                else:
                    extension_of[key] = extension
                    yield from self._image(key, extension, data)
        except ValueError as error:  # truncated: what stands before the damage is there
            yield "bad", "(end)", str(error).replace(str(path), self.tar)
        report["ignored"] = ignored

    def _image(self, key: str, extension: str, data: bytes) -> Iterator[tuple[str, str, Any]]:
        if extension.rpartition(".")[2] != "npy":
            yield "image", key, data
            return
        try:
            yield "image", key, np.load(io.BytesIO(data), allow_pickle=False)
        except Exception as error:  # numpy raises many types
            yield "bad", key, f"not a readable .npy file ({error})"


def without_dots(key: str) -> str:
    """Returns a key that ends at its first dot, as the keys of our shards do: dots in its base name become underscores."""
    folder, slash, base = key.rpartition("/")
    return folder + slash + base.replace(".", "_")


def label_in(data: bytes, field: str) -> int | str | None:
    """Returns the label in a text, or in a field (a.b: b within a) of a JSON text; None without it. Raises ValueError."""
    text: str | None = data.decode()
    if field:
        value = json.loads(data)
        for name in field.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if not isinstance(value, (int, str, type(None))):
            raise UserError(f"its {field} is {json.dumps(value)[:40]}, expected a number or a text")
        text = value if isinstance(value, str) else None if value is None else str(int(value))
    text = text and text.strip()
    return None if not text else int(text) if NUMBER.fullmatch(text) else text
