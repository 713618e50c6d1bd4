"""The model as the service uses it: arrays in, arrays out, in the batcher's thread.

b: rows of a batch, which may come from several requests; c, h, w: the image's shape; d: latent dimensions.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState

from eae_dist.config import Config
from eae_dist.errors import UserError
from eae_dist.inference.encoded_dataset import EncodedDataset
from eae_dist.inference.judged_checkpoint import evaluation_config, named_networks
from eae_dist.inference.trained_model import TrainedModel, trained_model
from eae_dist.latent.densities import DENSITIES, Density, ReconstructingDensity
from eae_dist.latent.index import LatentIndex
from eae_dist.model.autoencoder import to_uint8, to_unit
from eae_dist.objectives import objective_class
from eae_dist.training.checkpoint import Checkpoint, open_checkpoint

log = logging.getLogger("eae_dist")


class ServedModel:
    """A trained model and its densities and, if latents are given, their index and the images that they were made from.

    `densities`: by name. `missing`: why another density is not available. `unreconstructed`: why the model cannot reconstruct,
    None if it can. Raises ValueError or OSError for a checkpoint that cannot be used, latents of another checkpoint, and weights
    that give values that are not finite.
    """

    def __init__(self, directory: Path, latents: Path | None, assignments: Sequence[str]):
        self.space: EncodedDataset | None = None
        self.index: LatentIndex | None = None
        self._reading = threading.Lock()
        if latents is None:
            self.checkpoint: Checkpoint = open_checkpoint(directory)
            self.config: Config = evaluation_config(self.checkpoint, assignments)
            self.device = PartialState().device
            self.model: TrainedModel = trained_model(self.checkpoint, self.device, named_networks(assignments))
        else:
            self.space = space = EncodedDataset(latents, directory, assignments)
            if space.settings.metric != "l2":
                raise UserError(f"index.metric={space.settings.metric}: the service shows distances; take index.metric=l2")
            self.checkpoint, self.config, self.device, self.model = space.checkpoint, space.config, space.device, space.model
            self.index = space.index()
            self._keys = np.asarray(space.folder.read(space.split, "keys"))
            self._by_key = np.argsort(self._keys, kind="stable")
            self._labels = np.asarray(space.folder.read(space.split, "labels"))
            self._latents = space.folder.read(space.split, "latents")
        self.image_shape, self.latent_dim = self.model.image_shape, self.model.latent_dim
        self.densities: dict[str, Density] = {}
        self.missing: dict[str, str] = {}
        for name in DENSITIES:
            try:
                self.densities[name] = self.model.density(name)
            except (OSError, ValueError) as error:
                how = f"`python -m eae_dist.evaluate --ckpt RUN evaluate.densities=[{name}]` and start the service again"
                self.missing[name] = f"the density {name} was not fitted to these weights; run {how}"
                if not isinstance(error, FileNotFoundError):
                    log.warning("%s", error)
        self._second_stage = objective_class(self.config.objective.name).second_stage
        self.unreconstructed = self.missing.get(self._second_stage) if self._second_stage else None
        self._dtype = next(self.model.parameters()).dtype
        self.computations: dict[str, Callable[..., tuple[np.ndarray, ...]]] = {
            "encode": self.encode,
            "decode": self.decode,
            "reconstruct": self.reconstruct,
            "sample": self.sample,
            "search": self.search,
        }
        # The first pass is the slowest, and shows whether the weights give finite values.
        pixels, finite = self.decode(np.zeros((1, self.latent_dim), np.float32))
        if not (finite.all() and np.isfinite(self.encode(pixels)[0]).all()):
            raise UserError(f"the model {self.checkpoint.path} makes values that are not finite; was it trained to the end?")

    @torch.no_grad()
    def encode(self, images: np.ndarray) -> tuple[np.ndarray]:
        """Encodes uint8 [b, c, h, w] -> latents float32 [b, d]."""
        return (self.model.encode(self._unit(images)).float().cpu().numpy(),)

    @torch.no_grad()
    def decode(self, latents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Decodes float32 [b, d] -> images uint8 [b, c, h, w], and True for images whose pixels are all finite, bool [b]."""
        images = self.model.decode(torch.from_numpy(latents).to(self.device, self._dtype))
        return to_uint8(images).cpu().numpy(), images.isfinite().flatten(1).all(1).cpu().numpy()

    @torch.no_grad()
    def reconstruct(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Reconstructs uint8 [b, c, h, w], and returns the squared error per pixel and channel, float64 [b]."""
        x = self._unit(images)
        latents = self.model.encode(x)
        if self._second_stage:
            density = self.densities[self._second_stage]
            assert isinstance(density, ReconstructingDensity)
            latents = density.reconstruct(latents).to(latents)
        y = self.model.decode(latents)
        return to_uint8(y).cpu().numpy(), (y.double() - x).square().flatten(1).mean(1).cpu().numpy()

    def sample(self, seeds: np.ndarray, density: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns the samples of seeds uint64 [b] from a density: images uint8 [b, c, h, w] and latents float32 [b, d]."""
        latents = self.densities[density].sample(seeds).float().numpy()
        return self.decode(latents)[0], latents

    def search(self, latents: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the distances float32 [b, k] of latents float32 [b, d] to the k nearest rows of the index, and their ids."""
        assert self.index is not None  # the application checks that there is one
        squared, rows = self.index.search(latents, k)
        return np.sqrt(squared), rows

    def row_of(self, key: str) -> int:
        """Returns the row of the image with that key. Raises KeyError if there is none."""
        wanted = np.char.encode(np.array([key]), "utf-8", "replace")[0]
        place = int(np.searchsorted(self._keys, wanted, sorter=self._by_key))
        if place == len(self._keys) or self.key_of(row := int(self._by_key[place])) != key:
            raise KeyError(key)
        return row

    def key_of(self, row: int) -> str:
        """Returns the key of a row."""
        return self._keys[row].decode()

    def label_of(self, row: int) -> str | None:
        """Returns the name of the row's class, its number if classes have no names, None without a label."""
        assert self.space is not None  # rows are those of its index
        return self.space.class_of(int(self._labels[row]))

    def latent_of(self, row: int) -> np.ndarray:
        """Returns the stored latent of a row, float32 [d]."""
        return np.array(self._latents[row])

    def image_of(self, row: int) -> np.ndarray:
        """Returns an image of the data set, uint8 [c, h, w].

        One thread reads at a time, because Python 3.11 breaks if two threads read .npy headers at once.
        """
        assert self.space is not None  # rows are those of its index
        with self._reading:
            return self.space.images(self.space.split, np.array([row]))[0]

    def _unit(self, images: np.ndarray) -> torch.Tensor:
        return to_unit(torch.from_numpy(images), self.device).to(self._dtype)
