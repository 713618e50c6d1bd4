"""The densities that latents are drawn from after training, by name.

A density is fitted to the latents of all ranks, and its samples are functions of their seeds: neither depends on the number of
ranks. But for `two_stage` the latents stay where they are.
"""

from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from eae_dist.latent.gaussian import Gaussian, Isotropic, Seeds
from eae_dist.latent.mixture import Mixture
from eae_dist.latent.two_stage import TwoStage
from eae_dist.numerics.atomic_files import replace_file


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


def save_density(density: Density, path: Path, model_sha256: str) -> None:
    """Writes path, a safetensors file, whole or not at all; model_sha256: of the weights that made the latents."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in density.state_dict().items()}
    replace_file(path, save(state, metadata={"model_sha256": model_sha256}))


def load_density(name: str, path: Path, model_sha256: str) -> Density:
    """The density of that name from its file. Raises ValueError for a damaged file, another density's or another model's."""
    density = DENSITIES[name]()
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("model_sha256") != model_sha256:
                raise ValueError("it was fitted to the latents of other weights")
            density.load_state_dict({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118  not a dict
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a fitted density {name} of this model: {error}") from error
    return density
