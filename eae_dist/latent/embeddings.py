"""Embeddings of any model in files of vectors, and their index. There is no decoder, and there are no images or labels."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np

from eae_dist.config import HOW_TO_START, IndexConfig, load_config
from eae_dist.distributed import on_every_rank, rank, world_size
from eae_dist.errors import UserError
from eae_dist.latent.index import LatentIndex
from eae_dist.latent.kept_index import TUNING, kept_index
from eae_dist.latent.vector_files import NpyFile, VectorFiles

NEED_A_MODEL = ("split", "query_split", "density", "samples")  # settings of the index that are about images


class Embeddings:
    """The rows of files of vectors. Call every method on every rank.

    kept: the folder of the index. Raises ValueError or OSError as `VectorFiles.open` does, and for other settings than index.*
    and how to start.
    """

    def __init__(
        self,
        source: Path,
        kept: Path,
        assignments: Sequence[str] = (),
        vector_column: str | None = None,
        id_column: str | None = None,
    ):
        self.settings: IndexConfig = _settings(assignments)
        self.source, self.index_path, self.columns = source, kept, (vector_column, id_column)
        self.files = on_every_rank(lambda: VectorFiles.open([source], vector_column, id_column))
        if any(self.columns) and isinstance(self.files.files[0], NpyFile):
            raise UserError(f"{source}: .npy files have no columns; leave out --vector-column and --id-column")

    def rows_of_this_rank(self, files: VectorFiles | None = None) -> tuple[int, np.ndarray]:
        """Returns the number of this rank's first row, and this rank's run of the rows; by default of those that are searched."""
        files = files or self.files
        start, stop = (files.n * share // world_size() for share in (rank(), rank() + 1))
        return start, on_every_rank(lambda: files.read(start, stop, self.settings.metric))

    def index(self) -> LatentIndex:
        """Returns the index of all rows: the one that is kept if nobody has written the files since, otherwise a new one.

        Raises DamagedIndex if the index cannot be read.
        """

        def tune(index: LatentIndex) -> float:
            rows = self.rows_of_this_rank()[1]
            some = rows[:: max(len(rows) * world_size() // TUNING, 1)]
            # The nearest row is the query itself, so ten other rows are to be found among eleven.
            return (11 * index.tune(some, (1 + 10 * self.settings.recall) / 11, k=11) - 1) / 10

        about = {"files": self.files.state(), "vector_column": self.columns[0]}
        return kept_index(self.index_path, about, self.settings, lambda: self.rows_of_this_rank()[1], tune)

    def keys(self, numbers: np.ndarray) -> list[str]:
        """Returns the keys of rows: their ids if a column has them, otherwise their numbers."""
        return self.files.keys(numbers)

    def queries(self, paths: Sequence[Path]) -> VectorFiles:
        """Opens other rows, to be searched for. Raises ValueError, as for the rows, and for another number of dimensions."""

        def opened() -> VectorFiles:
            found = VectorFiles.open(paths, *self.columns)
            if found.d != self.files.d:
                raise UserError(f"{paths[0]} has {found.d} dimensions; expected {self.files.d} as in {self.source}")
            return found

        return on_every_rank(opened)


def _settings(assignments: Sequence[str]) -> IndexConfig:
    known = [f"index.{field.name}" for field in fields(IndexConfig) if field.name not in NEED_A_MODEL]
    known += [f"train.{name}" for name in HOW_TO_START]
    for text in assignments:
        if (key := text.partition("=")[0]) not in known:
            raise UserError(f"{key} needs a model and its images; for embeddings {', '.join(known)} can be set: remove {text}")
    return load_config(assignments).index
