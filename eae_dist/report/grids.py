"""PNG grids for people to look at: samples, reconstructions beside their originals, and interpolations."""

import io
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from eae_dist.model.autoencoder import Autoencoder, to_uint8
from eae_dist.numerics.atomic_files import replace_file

SAMPLES, PAIRS, BETWEEN = 100, 20, 8  # samples; image pairs; pictures per interpolation, both ends included
ACROSS = 10  # pictures per row, except for interpolations


@dataclass(frozen=True)
class GridInputs:
    """The inputs of every grid of a run, so that grids of different steps can be compared.

    latents: [SAMPLES, d] samples of N(0, I); images: float [2 PAIRS, c, h, w] in [0, 1], fewer if the split is smaller.
    """

    latents: torch.Tensor
    images: torch.Tensor


def grid_inputs(images: torch.Tensor, latent_dim: int, seed: int) -> GridInputs:
    """Returns fixed inputs from a seed and the first 2 PAIRS of images [m, c, h, w] in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(SAMPLES, latent_dim, generator=generator).to(images.device)
    return GridInputs(latents, images[: 2 * PAIRS])


@torch.no_grad()
def draw_grids(autoencoder: Autoencoder, inputs: GridInputs) -> dict[str, torch.Tensor]:
    """Returns a picture, float [3, H, W], each of "samples", "reconstructions" and "interpolations".

    The autoencoder is in eval mode. Reconstructions: an original, its reconstruction, the next original, and so on.
    Interpolations: one pair per row, linear in z; a single image has none.
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
    """Returns images [n, c, h, w] as one picture [3, H, W], `across` (or n, if fewer) per row, black gaps between and around.

    torchvision.utils.make_grid is not used, because its import doubles the time that a command takes to start.
    """
    count, _, height, width = images.shape
    across = min(across, count)
    step_y, step_x = height + gap, width + gap
    picture = images.new_zeros(3, gap + -(-count // across) * step_y, gap + across * step_x)
    for number, image in enumerate(images):
        y, x = gap + number // across * step_y, gap + number % across * step_x
        picture[:, y : y + height, x : x + width] = image
    return picture


def save_grids(grids: dict[str, torch.Tensor], folder: Path, prefix: str = "") -> dict[str, Path]:
    """Writes each grid to folder/{prefix}{name}.png, atomically, and returns the files by the names of the grids."""
    folder.mkdir(parents=True, exist_ok=True)
    saved = {name: folder / f"{prefix}{name}.png" for name in grids}
    for name, picture in grids.items():
        image = Image.fromarray(to_uint8(picture).permute(1, 2, 0).cpu().numpy())
        replace_file(saved[name], png_bytes(image))
    return saved


def png_bytes(picture: Image.Image) -> bytes:
    """Returns the bytes of a PNG file."""
    file = io.BytesIO()
    picture.save(file, "png")
    return file.getvalue()
