"""The densities that latents are drawn from after training, by name.

A density is fitted to latents that stay where they are, on all ranks, and its samples are functions of their seeds: neither
depends on the number of ranks.
"""

from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from eae_dist.durable import replace_file
from eae_dist.latent.gaussian import Gaussian, Isotropic, Seeds
from eae_dist.latent.mixture import Mixture
from eae_dist.latent.two_stage import TwoStage


class Density(Protocol):
    """Every class of DENSITIES works without arguments. State and samples lie on the CPU."""

    def fit(self, latents: torch.Tensor) -> None:
        """Fits to the latents [b, d] of all ranks, which hold contiguous runs of them in rank order; b may differ and be 0.

        Call on every rank. Raises ValueError on every rank for latents that are not finite, or too few.
        """

    def sample(self, seeds: Seeds) -> torch.Tensor:
        """Non-negative integers [m] -> float64 [m, d], row i from seeds[i] alone. ValueError for other seeds."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What `load_state_dict` makes the same density of."""

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Raises ValueError for a state of another density."""

    def report(self) -> dict:
        """How the fit went, for the metrics file: numbers, lists and text."""


DENSITIES: dict[str, type[Density]] = {"isotropic": Isotropic, "mvg": Gaussian, "gmm": Mixture, "two_stage": TwoStage}


def save_density(density: Density, path: Path) -> None:
    """Writes path, a safetensors file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, save({name: tensor.contiguous() for name, tensor in density.state_dict().items()}))


def load_density(name: str, path: Path) -> Density:
    """The density of that name from its file. Raises ValueError for a damaged file or another density's."""
    density = DENSITIES[name]()
    try:
        density.load_state_dict(load_file(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a fitted density {name} ({error}); run eae_dist.evaluate again") from error
    return density
