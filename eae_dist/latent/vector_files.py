"""Rows of numbers that others wrote: .npy files and parquet files with a column of vectors.

A source is a file, or a folder whose files of one of these kinds are taken in the order of their names. Its rows are numbered
through all files. n: rows, d: dimensions.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from eae_dist.errors import MissingFile, UserError
from eae_dist.latent.index import unusable_rows

FLOATS = ("float16", "float32", "float64")


@dataclass(frozen=True)
class NpyFile:
    """A .npy file [n, d] of float16, float32 or float64, which is memory-mapped."""

    path: Path

    @cached_property
    def rows(self) -> np.ndarray:
        """All rows, on the disk. Raises ValueError, which names the file."""
        try:
            rows = np.lib.format.open_memmap(self.path, mode="r")  # it reads no pickled objects
        except (ValueError, EOFError) as error:
            raise UserError(f"{self.path} is not a usable .npy file ({error}); save it with numpy.save as float32") from error
        if rows.ndim != 2 or rows.shape[1] == 0 or rows.dtype.name not in FLOATS:
            raise UserError(f"{self.path} holds {rows.dtype} {rows.shape}; expected [rows, dimensions] of {', '.join(FLOATS)}")
        return rows

    @property
    def n(self) -> int:
        """The number of rows."""
        return len(self.rows)

    @property
    def d(self) -> int:
        """The number of dimensions."""
        return self.rows.shape[1]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns rows [start, stop) as they are."""
        return self.rows[start:stop]


@dataclass(frozen=True)
class ParquetFile:
    """A parquet file with a column of vectors. Without its name it is the only column of lists of float numbers."""

    path: Path
    column: str | None
    id_column: str | None

    @cached_property
    def file(self) -> Any:
        """The opened file. Raises ValueError, which names it."""
        try:
            import pyarrow.parquet as pq
        except ImportError as error:
            raise UserError("parquet files need pyarrow; install it with: pip install 'eae-dist[parquet]'") from error
        with self._read():
            return pq.ParquetFile(self.path)

    @contextmanager
    def _read(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError) as error:
            raise UserError(f"{self.path} is damaged or not a parquet file ({error})") from error

    @cached_property
    def vectors(self) -> str:
        """The name of the column of vectors. Raises ValueError, which lists the columns."""
        schema = self.file.schema_arrow
        columns = f"{self.path} has the columns {', '.join(f'{field.name} ({field.type})' for field in schema)}"
        for option, name in (("--vector-column", self.column), ("--id-column", self.id_column)):
            if name is not None and name not in schema.names:
                raise UserError(f"{option} {name}: {columns}")
        holds = [field.name for field in schema if _holds_vectors(field.type)]
        if self.column is not None and self.column not in holds:
            raise UserError(f"--vector-column {self.column}: {columns}; expected lists of {', '.join(FLOATS)}")
        if self.column is None and len(holds) != 1:
            floats = f"lists of {', '.join(FLOATS)}"
            what = f"several hold {floats}; name one with --vector-column" if holds else f"none holds {floats}"
            raise UserError(f"{columns}; {what}")
        return self.column or holds[0]

    @property
    def n(self) -> int:
        """The number of rows."""
        return self.file.metadata.num_rows

    @cached_property
    def d(self) -> int:
        """The number of dimensions: the length of the first vector."""
        file, columns = self.file, [self.vectors]
        with self._read():
            first = next(file.iter_batches(batch_size=1, columns=columns)).column(0)
        if not (length := len(first[0].as_py() or ())):
            raise UserError(f"{self.path}: row 0 of the column {self.vectors} has no numbers; expected at least 1")
        return length

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns rows [start, stop). Raises ValueError, which names the row, for a vector of another length."""
        import pyarrow.compute as pc

        blocks, first = [], start
        for chunk in self.values(self.vectors, start, stop).chunks:
            lists = getattr(chunk, "storage", chunk)  # of a tensor of a fixed shape
            lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
            if len(other := np.flatnonzero(lengths != self.d)):
                what = f"row {first + other[0]} of the column {self.vectors} has {lengths[other[0]]} numbers"
                raise UserError(f"{self.path}: {what}; expected {self.d} as in row 0")
            blocks.append(lists.flatten().to_numpy(zero_copy_only=False).reshape(-1, self.d))
            first += len(chunk)
        return np.concatenate(blocks)

    def values(self, name: str, start: int, stop: int) -> Any:
        """Returns rows [start, stop) of a column as an array of pyarrow, from the row groups that hold them."""
        sizes = [self.file.metadata.row_group(group).num_rows for group in range(self.file.num_row_groups)]
        starts = np.cumsum([0, *sizes])
        groups = [group for group, size in enumerate(sizes) if starts[group] < stop and start < starts[group] + size]
        with self._read():
            table = self.file.read_row_groups(groups, columns=[name])
        first = starts[groups[0]] if groups else 0
        return table.column(name).slice(start - first, stop - start)


def _holds_vectors(kind: Any) -> bool:
    import pyarrow.types as types

    kind = getattr(kind, "storage_type", kind)
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return is_list and types.is_floating(kind.value_type)


@dataclass(frozen=True)
class VectorFiles:
    """The rows of some files. Open them with `open`."""

    files: Sequence[NpyFile | ParquetFile]
    d: int

    @classmethod
    def open(cls, paths: Sequence[Path], column: str | None = None, id_column: str | None = None) -> "VectorFiles":
        """Opens files and folders. column: that of the vectors; id_column: that of the keys, otherwise the numbers of the rows.

        .npy files have no columns. Raises ValueError or OSError, which names the file, for other files than described, for files
        of different d, and for no rows.
        """
        found = [path for given in paths for path in _files_of(given)]
        files: list[NpyFile | ParquetFile] = [
            NpyFile(path) if path.suffix == ".npy" else ParquetFile(path, column, id_column) for path in found
        ]
        filled = [file for file in files if file.n]
        if not filled:
            raise UserError(f"{', '.join(map(str, paths))}: the files hold no rows")
        for file in filled:
            if file.d != filled[0].d:
                raise UserError(f"{file.path} has {file.d} dimensions; expected {filled[0].d} as in {filled[0].path}")
        return cls(filled, filled[0].d)

    @cached_property
    def n(self) -> int:
        """The number of rows of all files."""
        return sum(file.n for file in self.files)

    def read(self, start: int, stop: int, metric: str) -> np.ndarray:
        """Returns rows [start, stop) as float32 [rows, d]; they are memory-mapped if one .npy file of float32 holds them all.

        Raises ValueError, which names file and row, for a row that an index of this metric refuses.
        """
        found, first = [np.empty((0, self.d), np.float32)], 0
        for file in self.files:
            begin, end = max(start - first, 0), min(stop - first, file.n)
            if begin < end:
                with np.errstate(over="ignore"):  # a number too large for float32 is refused as infinite
                    rows = file.read(begin, end).astype(np.float32, order="C", copy=False)
                numbers, why = unusable_rows(rows, metric)
                if len(numbers):
                    which = f"row {begin + numbers[0]}" + (f" and {len(numbers) - 1:,} more" if len(numbers) > 1 else "")
                    raise UserError(f"{file.path} has rows that are {why}: {which}; remove them")
                found.append(rows)
            first += file.n
        return found[1] if len(found) == 2 else np.concatenate(found)

    def keys(self, numbers: np.ndarray) -> list[str]:
        """Returns the keys of rows: their ids, or the numbers themselves."""
        if not self._ids:
            return [str(number) for number in numbers]
        starts = np.cumsum([0, *(len(ids) for ids in self._ids)])
        files = np.searchsorted(starts, numbers, side="right") - 1
        return [str(self._ids[file][int(number - starts[file])].as_py()) for file, number in zip(files, numbers, strict=True)]

    @cached_property
    def _ids(self) -> list[Any]:
        """The columns of ids; empty without such a column."""
        return [file.values(file.id_column, 0, file.n) for file in self.files if isinstance(file, ParquetFile) and file.id_column]

    def state(self) -> list:
        """Returns the name, size and time of change of every file; equal for files that nobody has written since."""
        stats = [(file.path, file.path.stat()) for file in self.files]
        return [[str(path.resolve()), stat.st_size, stat.st_mtime_ns] for path, stat in stats]


def _files_of(path: Path) -> list[Path]:
    if not path.exists():
        raise MissingFile(f"{path} does not exist")
    inside = sorted(path.iterdir()) if path.is_dir() else [path]
    found = [file for file in inside if file.suffix in (".npy", ".parquet") and file.is_file()]
    if not found and path.is_dir():
        raise UserError(f"{path} holds no .npy or .parquet file, and no latents of `python -m eae_dist.encode` (manifest.json)")
    if not found:
        raise UserError(f"{path} is another file; expected a .npy or .parquet file, or a folder of them")
    if len(kinds := {file.suffix for file in found}) > 1:
        raise UserError(f"{path} holds {' and '.join(sorted(kinds))} files; expected one kind, in a folder of its own")
    return found
