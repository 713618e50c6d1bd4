"""A trained model with the latents of a data set, their index, and the images that they were encoded from."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState

from eae_dist.config import Config, IndexConfig
from eae_dist.data.remote import Cache
from eae_dist.data.stream import read_samples
from eae_dist.distributed import rank, world_size
from eae_dist.errors import MissingFile, UserError
from eae_dist.inference.judged_checkpoint import evaluation_config, named_networks, open_data
from eae_dist.inference.trained_model import TrainedModel, trained_model
from eae_dist.latent.index import LatentIndex
from eae_dist.latent.kept_index import TUNING, kept_index
from eae_dist.latent.store import LatentFolder
from eae_dist.model.autoencoder import encoded
from eae_dist.training.checkpoint import Checkpoint, open_on_rank_zero


class EncodedDataset:
    """Encoded latents with their model and their images. Call every method on every rank.

    Raises ValueError or OSError if they do not belong together.
    """

    def __init__(self, latents: Path, checkpoint: Path | None, assignments: Sequence[str]):
        self.folder = LatentFolder.open(latents)
        about = self.folder.about
        try:
            self.checkpoint: Checkpoint = open_on_rank_zero(checkpoint or about["checkpoint"])
        except FileNotFoundError as error:
            raise MissingFile(f"{error}; {latents} was encoded from this checkpoint: give --ckpt if it moved") from error
        if self.checkpoint.model_sha256 != about["model_sha256"]:
            raise UserError(
                f"{latents} holds the latents of other weights than {self.checkpoint.path} "
                f"(sha256 {about['model_sha256'][:12]} and {self.checkpoint.model_sha256[:12]}); give theirs, or encode again"
            )
        self.config: Config = evaluation_config(self.checkpoint, [f"data.root={about['data_root']}", *assignments])
        self.settings: IndexConfig = self.config.index
        self.cache = Cache.of(self.config.data)
        index = open_data(self.checkpoint, self.config)
        if index.sha256 != about["index_sha256"]:
            raise UserError(f"data.root={self.config.data.root} is not the data set of {latents}; set data.root to that one")
        self.classes = index.classes
        self.device = PartialState().device
        self.model: TrainedModel = trained_model(self.checkpoint, self.device, named_networks(assignments))
        self.split = self.settings.split

    def rows_of_this_rank(self, split: str) -> tuple[int, np.ndarray]:
        """Returns the number of this rank's first latent of a split, and this rank's run of the latents."""
        rows = self.folder.rows(split)
        start, stop = (rows * share // world_size() for share in (rank(), rank() + 1))
        return start, self.folder.read(split, "latents", start, stop)

    def index(self) -> LatentIndex:
        """Returns the index of index.split: the one beside the latents if it was made with these settings, otherwise a new one.

        Raises DamagedIndex if the index cannot be read.
        """
        about = {name: self.folder.about[name] for name in ("model_sha256", "index_sha256")} | {"split": self.split}

        def tune(index: LatentIndex) -> float:
            queries = self.rows_of_this_rank(self.settings.query_split)[1][: -(-TUNING // world_size())]
            return index.tune(queries, self.settings.recall)

        return kept_index(self.index_path, about, self.settings, lambda: self.rows_of_this_rank(self.split)[1], tune)

    @property
    def index_path(self) -> Path:
        """The folder in which the index of index.split is kept."""
        return self.folder.root / f"index-{self.split}"

    def images(self, split: str, numbers: np.ndarray) -> np.ndarray:
        """Returns samples of a split, uint8 [m, c, h, w]."""
        return read_samples(self.config.data.root, split, numbers, self.cache).numpy()

    def encode(self, images: torch.Tensor) -> np.ndarray:
        """Encodes uint8 [m, c, h, w] -> [m, d], in blocks of the same size as for the latents of the folder; m may be 0."""
        block = self.folder.about["batch"]
        blocks = [encoded(self.model.autoencoder, part, block, self.device) for part in images.split(block) if len(part)]
        return torch.cat([torch.zeros(0, self.folder.d, device=self.device), *blocks]).cpu().numpy()

    def class_of(self, label: int) -> str | None:
        """Returns the name of a class, its number if classes have no names, None for -1."""
        return None if label < 0 else self.classes[label] if label < len(self.classes) else str(label)

    def keys(self, numbers: np.ndarray) -> list[str]:
        """Returns the keys of rows of index.split."""
        keys = self.folder.read(self.split, "keys")
        return [keys[number].decode() for number in numbers]
