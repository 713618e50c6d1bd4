"""What people look at: samples, reconstructions beside their originals, and interpolations, as PNG grids."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torchvision.utils import make_grid, save_image

from eae_dist.model.autoencoder import Autoencoder

SAMPLES, PAIRS, BETWEEN = 100, 20, 8  # samples drawn; image pairs shown; pictures along an interpolation, both ends included


@dataclass(frozen=True)
class GridInputs:
    """What every grid of a run is made from, so that grids of different steps compare.

    latents: [SAMPLES, d] draws of N(0, I); images: float [2 PAIRS, c, h, w] in [0, 1], fewer where the split is smaller.
    """

    latents: torch.Tensor
    images: torch.Tensor


def grid_inputs(images: torch.Tensor, latent_dim: int, seed: int) -> GridInputs:
    """Fixed inputs from a seed and images [m, c, h, w] in [0, 1], of which the first 2 PAIRS are used."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(SAMPLES, latent_dim, generator=generator).to(images.device)
    return GridInputs(latents, images[: 2 * PAIRS])


@torch.no_grad()
def draw_grids(autoencoder: Autoencoder, inputs: GridInputs) -> dict[str, torch.Tensor]:
    """{"samples", "reconstructions", "interpolations"} -> a picture each, float [3, H, W]; the autoencoder is in eval mode.

    Reconstructions: an original, its reconstruction, the next original ... Interpolations: one pair a row, linear in z;
    none for a single image.
    """
    images = inputs.images
    latents = autoencoder.encode(images)
    pairs = torch.stack([images, autoencoder.decode(latents).to(images.dtype)], 1).flatten(0, 1)
    start, end = latents[0::2][: len(latents) // 2], latents[1::2]
    t = torch.linspace(0, 1, BETWEEN, device=latents.device, dtype=latents.dtype)[:, None]
    between = (start[:, None] * (1 - t) + end[:, None] * t).flatten(0, 1)
    grids = {
        "samples": make_grid(autoencoder.decode(inputs.latents.to(latents.dtype)), nrow=10, padding=1),
        "reconstructions": make_grid(pairs, nrow=10, padding=1),
    }
    if len(between):
        grids["interpolations"] = make_grid(autoencoder.decode(between), nrow=BETWEEN, padding=1)
    return grids


def save_grids(grids: dict[str, torch.Tensor], folder: Path, prefix: str = "") -> None:
    """Writes folder/{prefix}{name}.png, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in grids.items():
        aside = folder / f".{prefix}{name}.partial"
        save_image(picture, aside, format="png")
        os.replace(aside, folder / f"{prefix}{name}.png")
