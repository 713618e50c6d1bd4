"""Images from latents: a trained model with its densities, and the latent from which image i of a set is decoded.

Image i of a set of samples depends on (seed, i) alone, and not on the number of ranks or the number of samples.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from eae_dist.data.order import blocks_of, filled, permutation
from eae_dist.distributed import rank, world_size
from eae_dist.errors import MissingFile, UserError
from eae_dist.inference.judged_checkpoint import evaluation_folder, load_objective
from eae_dist.latent.densities import DENSITIES, Density, ReconstructingDensity, load_density
from eae_dist.latent.gaussian import Isotropic
from eae_dist.model.autoencoder import Autoencoder, to_uint8
from eae_dist.numerics.keyed_random import derive_key, keyed_hash
from eae_dist.objectives import objective_class
from eae_dist.training.checkpoint import Checkpoint, open_checkpoint

LatentsOf = Callable[[np.ndarray], torch.Tensor]


class TrainedModel(nn.Module):
    """A trained autoencoder in eval mode, and the densities that `eae_dist.evaluate` fitted to its latents.

    `.image_shape` is (c, h, w), `.latent_dim` is d. Images are floating point in [0, 1]. Images and latents of another shape than
    the model's raise ValueError.
    """

    def __init__(self, autoencoder: Autoencoder, checkpoint: Checkpoint):
        super().__init__()
        self.autoencoder, self._checkpoint = autoencoder, checkpoint
        self._second_stage = objective_class(checkpoint.config.objective.name).second_stage
        self.image_shape, self.latent_dim = autoencoder.image_shape, autoencoder.latent_dim
        self.eval()

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Encodes [b, c, h, w] -> [b, d]; variational models return the means."""
        check_rows("images", images, self.image_shape)
        return self.autoencoder.encode(images)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decodes [b, d] -> [b, c, h, w]."""
        check_rows("latents", latents, (self.latent_dim,))
        return self.autoencoder.decode(latents)

    def reconstruct(self, images: torch.Tensor) -> torch.Tensor:
        """Reconstructs [b, c, h, w]; `two_stage_vae` uses its second stage, which must have been fitted."""
        latents = self.encode(images)
        if self._second_stage:
            density = self.density(self._second_stage)
            assert isinstance(density, ReconstructingDensity)
            latents = density.reconstruct(latents).to(latents)
        return self.decode(latents)

    @torch.no_grad()
    def sample(self, count: int, density: str = "isotropic", seed: int = 0) -> torch.Tensor:
        """Returns decoded samples of a density, [count, c, h, w]; with evaluate.seed those of `evaluate`, up to rounding."""
        like = next(self.autoencoder.decoder.parameters())
        return self.decode(self.density(density).sample(sample_seeds(seed, np.arange(count))).to(like))

    def density(self, name: str) -> Density:
        """Returns the fitted density of that name.

        Raises ValueError if it is unknown or was fitted to other weights, FileNotFoundError if it was not fitted.
        """
        if name not in DENSITIES:
            raise UserError(f"the density {name} is unknown; it is one of {', '.join(DENSITIES)}")
        if name == "isotropic":  # N(0, I) does not depend on the latents
            return Isotropic(self.latent_dim)
        folder = evaluation_folder(self._checkpoint)
        path = folder / "densities" / f"{name}.safetensors"
        advice = f"run `python -m eae_dist.evaluate --ckpt {self._checkpoint.path} evaluate.densities=[{name}]`"
        if not path.is_file():
            raise MissingFile(f"{path} does not exist: the density {name} was not fitted; {advice}")
        try:
            return load_density(name, path, self._checkpoint.model_sha256)
        except UserError as error:
            raise UserError(f"{error}; take the checkpoint that {folder}/metrics.json names, or {advice}") from error


def check_rows(what: str, rows: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless the rows are floating point of shape [b, *shape]."""
    if rows.shape[1:] != shape or not rows.is_floating_point():
        wanted = ", ".join(map(str, ("b", *shape)))
        raise ValueError(f"the model takes {what} [{wanted}] of floating point, got {rows.dtype} {tuple(rows.shape)}")


def load(directory: str | Path, *, device: str | torch.device = "cpu", allow: Collection[str] = ()) -> TrainedModel:
    """Loads the trained model of a checkpoint folder, or of the latest checkpoint of a run folder.

    allow: network classes outside eae_dist that the checkpoint may name.
    """
    return trained_model(open_checkpoint(directory), device, allow)


def trained_model(checkpoint: Checkpoint, device: str | torch.device, allow: Collection[str]) -> TrainedModel:
    """Loads the trained model of an open checkpoint; see `load`."""
    return TrainedModel(load_objective(checkpoint, allow).autoencoder.to(device), checkpoint)


def sample_seeds(seed: int, numbers: np.ndarray) -> np.ndarray:
    """Returns the seed of each image of a set of samples, from the set's seed and the image's number."""
    return keyed_hash(derive_key(seed, 0), np.asarray(numbers))


def interpolations(latents: torch.Tensor, seed: int) -> dict[str, LatentsOf]:
    """Returns the midpoints between each latent of [n, d] and another one that the seed chooses, linear and on the sphere."""
    shuffled = permutation(len(latents), derive_key(seed, 1))
    partner = np.empty(len(latents), dtype=np.int64)
    partner[shuffled] = np.roll(shuffled, 1)  # along one cycle, so that no latent is its own partner
    return {
        "interpolation_linear": lambda numbers: (latents[numbers] + latents[partner[numbers]]) / 2,
        "interpolation_spherical": lambda numbers: spherical_middle(latents[numbers], latents[partner[numbers]]),
    }


def spherical_middle(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Returns the points halfway along the great arcs, [m, d] x 2 -> [m, d] (Shoemake 1985).

    If the arc is degenerate, the point is the linear midpoint.
    """
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=1).clamp(-1, 1)
    half = torch.acos(cosine) / 2
    weight = torch.sin(half) / torch.sin(2 * half)
    weight = torch.where(weight.isfinite() & (cosine > -0.9999), weight, 0.5)[:, None]
    return weight * (a + b)


@torch.no_grad()
def decoded(
    autoencoder: Autoencoder, latents_of: LatentsOf, count: int, block: int, device: torch.device, name: str
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields this rank's blocks of a set's images: the number of the first image, and uint8 [m, c, h, w].

    Raises ValueError for pixels that are not finite, on the rank that finds them, after its last block: to look at each block,
    the host would wait for a GPU once more.
    """
    start, stop = blocks_of(count, block, rank(), world_size())
    broken = torch.zeros((), dtype=torch.int64, device=device)
    for place in with_progress(range(start, stop), name, stop - start):
        numbers = np.arange(place * block, min((place + 1) * block, count))
        z = filled(latents_of(numbers).to(device, torch.get_default_dtype(), non_blocking=True), block)
        images = autoencoder.decode(z)[: len(numbers)]
        broken += (~images.isfinite()).flatten(1).any(1).sum()
        yield int(numbers[0]), to_uint8(images)
    if found := int(broken):  # as uint8 they are black
        raise UserError(
            f"{name}: the decoder made pixels that are not finite numbers, in {found} of the images {start * block} to "
            f"{min(stop * block, count) - 1}"
        )


def with_progress(blocks: Iterable, description: str, total: int) -> Iterable:
    """Returns the same blocks, `total` of them on this rank, with a progress bar on rank 0."""
    return tqdm(blocks, desc=description, total=total, unit=" blocks", disable=rank() != 0, leave=False)
