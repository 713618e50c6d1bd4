"""The densities from which latents are sampled after training, by name.

A density is fitted to the latents of all ranks, and its samples are functions of their seeds. Neither depends on the number of
ranks. Only `two_stage` gathers all latents on every rank.
"""

from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from eae_dist.errors import UserError
from eae_dist.latent.flow import Flow
from eae_dist.latent.gaussian import Gaussian, Isotropic, Seeds
from eae_dist.latent.mixture import Mixture
from eae_dist.latent.two_stage import TwoStage
from eae_dist.numerics.atomic_files import replace_file
from eae_dist.numerics.tensor_files import read_tensors, tensors_to_bytes


class Density(Protocol):
    """A density of latents. Every class of DENSITIES can be made without arguments. State and samples are on the CPU."""

    def fit(self, latents: torch.Tensor) -> None:
        """Fits the density to the latents [b, d] of all ranks, which hold contiguous runs of them in rank order.

        b may differ and be 0. Call it on every rank. Raises ValueError on every rank if the latents are not finite or too few.
        """

    def sample(self, seeds: Seeds) -> torch.Tensor:
        """Returns float64 [m, d] for m non-negative integers; row i depends on seeds[i] alone. ValueError for other seeds."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Returns the state from which `load_state_dict` restores the density."""

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restores a fitted density. Raises ValueError for the state of another density."""

    def report(self) -> dict:
        """Describes the fit for the metrics file, in numbers, lists and text."""


@runtime_checkable
class ReconstructingDensity(Density, Protocol):
    """A density that can be the second stage of an objective."""

    def reconstruct(self, latents: torch.Tensor) -> torch.Tensor:
        """Returns the reconstructions of latents, [m, d] -> [m, d]."""


DENSITIES: dict[str, type[Density]] = {
    "isotropic": Isotropic,
    "mvg": Gaussian,
    "gmm": Mixture,
    "two_stage": TwoStage,
    "flow": Flow,
}


def save_density(density: Density, path: Path, model_sha256: str) -> None:
    """Writes `path`, a safetensors file, atomically. model_sha256: sha256 of the weights that encoded the latents."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, tensors_to_bytes(density.state_dict(), {"model_sha256": model_sha256}))


def load_density(name: str, path: Path, model_sha256: str) -> Density:
    """Reads the density of that name. Raises ValueError if the file is damaged or belongs to another density or model."""
    density = DENSITIES[name]()
    try:
        state, about = read_tensors(path)
        if about.get("model_sha256") != model_sha256:
            raise UserError("it was fitted to the latents of other weights")
        density.load_state_dict(state)
    except ValueError as error:
        raise UserError(f"{path} is not a fitted density {name} of this model: {error}") from error
    return density
