"""Parquet files with a column of images, as the Hugging Face hub serves data sets."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from eae_dist.data.encoding import Encoding
from eae_dist.data.image_files import files_under
from eae_dist.data.pixels import Fit, Rules
from eae_dist.data.sources.parts import Conversion, Part, convert_parts, labels_and_classes
from eae_dist.data.sources.samples import Source
from eae_dist.data.sources.webdataset import source_of_parts
from eae_dist.data.split_names import split_called
from eae_dist.errors import UserError

ROWS = 64  # rows that are in memory at once


def parquet(
    path: Path,
    fit: Fit,
    rules: Rules,
    skip_bad: bool,
    workers: int,
    image_column: str | None,
    label_column: str | None,
    split_fractions: tuple[float, float, float] | None,
    encoding: Encoding,
    parts: Path,
) -> Source:
    """A folder of parquet files with a column of images, as the Hugging Face hub serves them; splits are in the files' names."""
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError("parquet files need pyarrow; install it with: pip install -e '.[parquet]'") from error
    names = [name for name in files_under(path).names if name.endswith(".parquet")]
    if not names:
        raise UserError(f"{path} holds no .parquet file")
    try:
        schema = pq.read_schema(path / names[0])
    except (ValueError, OSError) as error:
        raise UserError(f"{path / names[0]} is damaged or not a parquet file ({error}); fetch it again") from error
    image = image_column or image_column_of(schema, path / names[0])
    label = label_column or ("label" if "label" in schema.names else None)
    for option, column in (("--image-column", image), ("--label-column", label)):
        if column is not None and column not in schema.names:
            raise UserError(f"{option} {column}: {path / names[0]} has the columns {', '.join(schema.names)}")
    files: list[Part] = [ParquetPart(path, name, image, label) for name in names]
    options = {"image_column": image, "label_column": label}
    converted = convert_parts(files, Conversion(rules, fit, encoding), parts, options, skip_bad, workers)
    labels, classes = labels_and_classes(converted.labels, f"the labels in column {label}")
    classes = classes or class_names(schema, label)
    left = [column for column in schema.names if column not in (image, label)]
    notes = (
        f"images are in the column {image}, labels in {label or 'none'}" + (f"; left out: {', '.join(left)}" if left else ""),
    )
    return source_of_parts(
        converted,
        labels,
        classes,
        [split_of_file(name) for name in names],
        split_fractions,
        rules=rules,
        fit=fit,
        name=path.resolve().name,
        origin=f"the parquet files in {path.resolve().name}",
        notes=notes + converted.notes,
    )


def split_of_file(name: str) -> str | None:
    """Returns the split in the name of a file or of its folder: data/train-00000-of-00001.parquet, train/0000.parquet."""
    stem = PurePath(name).stem.partition("-")[0]
    return next((split for word in (stem, *reversed(PurePath(name).parts[:-1])) if (split := split_called(word))), None)


def image_column_of(schema: Any, file: Path) -> str:
    """Returns the only column that can hold images: bytes, or a record of bytes and path. Raises ValueError."""
    import pyarrow.types as types

    def holds_images(kind: Any) -> bool:
        if types.is_struct(kind):
            return any(kind.field(number).name == "bytes" for number in range(kind.num_fields))
        return types.is_binary(kind) or types.is_large_binary(kind)

    found = [field.name for field in schema if holds_images(field.type)]
    if len(found) != 1:
        what = (
            f"the columns {', '.join(found)} can all hold images" if found else f"none of {', '.join(schema.names)} holds images"
        )
        raise UserError(f"{file}: {what}; name it with --image-column")
    return found[0]


def class_names(schema: Any, label: str | None) -> list[str]:
    """Returns the names of classes that the hub's data sets keep beside the columns; empty if there are none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[label]["names"]]
    except (KeyError, TypeError, ValueError):
        return []


@dataclass(frozen=True)
class ParquetPart:
    """A parquet file, by its name below a folder."""

    folder: Path
    name: str
    image: str
    label: str | None

    def identity(self) -> dict:
        """The file's path, size and time."""
        status = (self.folder / self.name).stat()
        return {"path": str((self.folder / self.name).resolve()), "bytes": status.st_size, "time": status.st_mtime_ns}

    def content(self, folder: Path, report: dict) -> Iterator[tuple[str, str, Any]]:
        """Yields images and labels, see `Part`."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        stem, row = PurePath(self.name).stem.replace(".", "_"), 0
        try:
            columns = [self.image] + ([self.label] if self.label else [])
            with pq.ParquetFile(self.folder / self.name) as file:
                for batch in file.iter_batches(batch_size=ROWS, columns=columns):
                    images = batch.column(self.image).to_pylist()
                    labels = batch.column(self.label).to_pylist() if self.label else [None] * len(images)
                    for image, label in zip(images, labels, strict=True):
                        key, row = f"{stem}/{row:06d}", row + 1
                        data = image.get("bytes") if isinstance(image, dict) else image
                        if not isinstance(data, bytes):
                            where = isinstance(image, dict) and image.get("path")
                            yield "bad", key, f"a path without the image's bytes ({where})" if where else "no image"
                        elif not isinstance(label, (int, str, type(None))):
                            yield "bad", key, f"its label is {str(label)[:40]!r}, expected a number or a text"
                        else:
                            yield "image", key, data
                            yield "label", key, label
        except (pa.ArrowException, OSError) as error:
            yield "bad", f"{stem}/{row:06d}", f"damaged from here on ({' '.join(str(error).split())[:120]})"
