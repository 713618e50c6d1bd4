"""What people look at: samples, reconstructions beside their originals, and interpolations, as PNG grids."""

import io
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from eae_dist.model.autoencoder import Autoencoder, to_uint8
from eae_dist.numerics.atomic_files import replace_file

SAMPLES, PAIRS, BETWEEN = 100, 20, 8  # samples drawn; image pairs shown; pictures along an interpolation, both ends included
ACROSS = 10  # pictures a row, but for interpolations


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
        "samples": grid(autoencoder.decode(inputs.latents.to(latents.dtype)), ACROSS),
        "reconstructions": grid(pairs, ACROSS),
    }
    if len(between):
        grids["interpolations"] = grid(autoencoder.decode(between), BETWEEN)
    return grids


def grid(images: torch.Tensor, across: int, gap: int = 1) -> torch.Tensor:
    """Images [n, c, h, w] as one picture [3, H, W], `across` (n, if fewer) a row, with black gaps, also around it.

    In place of torchvision.utils.make_grid, whose import doubles the time that a command takes to start.
    """
    count, _, height, width = images.shape
    across = min(across, count)
    step_y, step_x = height + gap, width + gap
    picture = images.new_zeros(3, gap + -(-count // across) * step_y, gap + across * step_x)
    for number, image in enumerate(images):
        y, x = gap + number // across * step_y, gap + number % across * step_x
        picture[:, y : y + height, x : x + width] = image
    return picture


def save_grids(grids: dict[str, torch.Tensor], folder: Path, prefix: str = "") -> None:
    """Writes folder/{prefix}{name}.png, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in grids.items():
        image = Image.fromarray(to_uint8(picture).permute(1, 2, 0).cpu().numpy())
        replace_file(folder / f"{prefix}{name}.png", png_bytes(image))


def png_bytes(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "png")
    return file.getvalue()
