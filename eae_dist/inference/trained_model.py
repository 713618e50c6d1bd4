"""Images from latents: a trained model with its densities, and which latent image i of a set is decoded from.

Image i of a set of draws follows from (seed, i) alone, so it does not depend on the number of ranks or on how many are drawn.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from eae_dist.data.order import blocks_of, filled, permutation
from eae_dist.distributed import rank, world_size
from eae_dist.latent.densities import DENSITIES, Density, load_density
from eae_dist.model.autoencoder import Autoencoder, to_uint8
from eae_dist.numerics.keyed_random import derive_key, keyed_hash
from eae_dist.objectives import objective_class
from eae_dist.training.checkpoint import Checkpoint, evaluation_folder, load_objective, open_checkpoint

LatentsOf = Callable[[np.ndarray], torch.Tensor]


class TrainedModel(nn.Module):
    """A trained autoencoder in eval mode, and the densities that `eae_dist.evaluate` fitted to its latents.

    `.image_shape` is (c, h, w), `.latent_dim` d. Images are floating point in [0, 1]; those and latents of another shape than the
    model's are a ValueError.
    """

    def __init__(self, autoencoder: Autoencoder, checkpoint: Checkpoint):
        super().__init__()
        self.autoencoder, self._checkpoint = autoencoder, checkpoint
        self._second_stage = objective_class(checkpoint.config.objective.name).second_stage
        self.image_shape, self.latent_dim = autoencoder.image_shape, autoencoder.latent_dim
        self.eval()

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """[b, c, h, w] -> [b, d]; of variational models the means."""
        check_rows("images", images, self.image_shape)
        return self.autoencoder.encode(images)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """[b, d] -> [b, c, h, w]."""
        check_rows("latents", latents, (self.latent_dim,))
        return self.autoencoder.decode(latents)

    def reconstruct(self, images: torch.Tensor) -> torch.Tensor:
        """[b, c, h, w] -> [b, c, h, w]; of `two_stage_vae` through its second stage, which must have been fitted."""
        latents = self.encode(images)
        if self._second_stage:
            latents = self.density(self._second_stage).reconstruct(latents).to(latents)
        return self.decode(latents)

    @torch.no_grad()
    def sample(self, count: int, density: str = "isotropic", seed: int = 0) -> torch.Tensor:
        """Decoded draws of a density, [count, c, h, w]: for evaluate.seed those that evaluate judged, to rounding."""
        like = next(self.autoencoder.decoder.parameters())
        return self.decode(self.density(density).sample(sample_seeds(seed, np.arange(count))).to(like))

    def density(self, name: str) -> Density:
        """The fitted density of that name. ValueError for an unknown one and one that was fitted to other weights,
        FileNotFoundError for one that was not fitted."""
        if name not in DENSITIES:
            raise ValueError(f"the density {name} is unknown; it is one of {', '.join(DENSITIES)}")
        if name == "isotropic":  # N(0, I) whatever the latents are
            density = DENSITIES[name]()
            density.fit(torch.zeros(1, self.latent_dim))
            return density
        folder = evaluation_folder(self._checkpoint)
        path = folder / "densities" / f"{name}.safetensors"
        advice = f"run `python -m eae_dist.evaluate --ckpt {self._checkpoint.path} evaluate.densities=[{name}]`"
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: the density {name} was not fitted; {advice}")
        try:
            return load_density(name, path, self._checkpoint.model_sha256)
        except ValueError as error:
            raise ValueError(f"{error}; take the checkpoint that {folder}/metrics.json names, or {advice}") from error


def check_rows(what: str, rows: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless the rows [b, *shape] are floating point."""
    if rows.shape[1:] != shape or not rows.is_floating_point():
        wanted = ", ".join(map(str, ("b", *shape)))
        raise ValueError(f"the model takes {what} [{wanted}] of floating point, got {rows.dtype} {tuple(rows.shape)}")


def load(directory: str | Path, *, device: str | torch.device = "cpu", allow: Collection[str] = ()) -> TrainedModel:
    """The trained model of a checkpoint folder or of a run folder (its latest).

    allow: network classes outside eae_dist that the checkpoint may name.
    """
    return trained_model(open_checkpoint(directory), device, allow)


def trained_model(checkpoint: Checkpoint, device: str | torch.device, allow: Collection[str]) -> TrainedModel:
    """As `load`, of a checkpoint that is open."""
    return TrainedModel(load_objective(checkpoint, allow).autoencoder.to(device), checkpoint)


def sample_seeds(seed: int, numbers: np.ndarray) -> np.ndarray:
    """The seed of each image of a set of draws, from the set's seed and the image's number."""
    return keyed_hash(derive_key(seed, 0), np.asarray(numbers))


def interpolations(latents: torch.Tensor, seed: int) -> dict[str, LatentsOf]:
    """Mid-points between each latent of [n, d] and one other that the seed chooses, linear and on the sphere."""
    shuffled = permutation(len(latents), derive_key(seed, 1))
    partner = np.empty(len(latents), dtype=np.int64)
    partner[shuffled] = np.roll(shuffled, 1)  # along one cycle: nobody's partner is itself
    return {
        "interpolation_linear": lambda numbers: (latents[numbers] + latents[partner[numbers]]) / 2,
        "interpolation_spherical": lambda numbers: spherical_middle(latents[numbers], latents[partner[numbers]]),
    }


def spherical_middle(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The points halfway along the great arcs, [m, d] x 2 -> [m, d] (Shoemake 1985); linear where the arc is degenerate."""
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=1).clamp(-1, 1)
    half = torch.acos(cosine) / 2
    weight = torch.sin(half) / torch.sin(2 * half)
    weight = torch.where(weight.isfinite() & (cosine > -0.9999), weight, 0.5)[:, None]
    return weight * (a + b)


@torch.no_grad()
def decoded(
    autoencoder: Autoencoder, latents_of: LatentsOf, count: int, block: int, device: torch.device, name: str
) -> Iterator[tuple[int, torch.Tensor]]:
    """This rank's blocks of the set's images: the number of the first, and uint8 [m, c, h, w].

    Raises ValueError, on the rank that meets them, for pixels that are not finite.
    """
    start, stop = blocks_of(count, block, rank(), world_size())
    for place in with_progress(range(start, stop), name, stop - start):
        numbers = np.arange(place * block, min((place + 1) * block, count))
        z = filled(latents_of(numbers).to(device, torch.get_default_dtype()), block)
        images = autoencoder.decode(z)[: len(numbers)]
        if broken := int((~images.isfinite()).flatten(1).any(1).sum()):  # as uint8 they would be black
            raise ValueError(f"{name}: the decoder made pixels that are not finite numbers, in {broken} of {len(images)} images")
        yield int(numbers[0]), to_uint8(images)


def with_progress(blocks: Iterable, description: str, total: int) -> Iterable:
    """The same blocks, `total` of them on this rank, with a progress bar on rank 0."""
    return tqdm(blocks, desc=description, total=total, unit=" blocks", disable=rank() != 0, leave=False)
