"""The paper's figure: reconstructions, random samples and interpolations side by side, a row per model, ground truth on top."""

from collections.abc import Collection
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from eae_dist.data.remote import Cache
from eae_dist.data.stream import walk
from eae_dist.durable import replace_file
from eae_dist.generation import TrainedModel, load
from eae_dist.model.autoencoder import to_uint8, to_unit
from eae_dist.objectives import OBJECTIVES
from eae_dist.report.grids import grid, png_bytes
from eae_dist.report.table import BLOCKS, MODELS

COLUMNS = 6  # pictures of each kind
GAP, LETTERS, NAMES = 12, 13, 130  # pixels between the kinds, of a letter's height, left of the pictures
KINDS = ("reconstructions", "random samples", "interpolations")


def save_figure(
    models: dict[str, Path],
    data: str,
    split: str,
    seed: int,
    path: Path,
    allow: Collection[str] = (),
    cache: Cache | None = None,
) -> None:
    """Writes a PNG with a row of pictures for each model, given as name in OBJECTIVES -> checkpoint.

    allow: as of eae_dist.load. cache: through which remote data is read.

    The reconstructions are of the split's first images, an interpolation goes from the first of them to the second, linear in
    the latent. A model's samples are draws of N(0, I), or of its mixture where it was not trained for N(0, I).
    """
    images = next(walk(data, split, COLUMNS, rank=0, world=1, cache=cache))["image"]
    rows: list[tuple[str, list[torch.Tensor]]] = [("ground truth", [images])]
    for name, checkpoint in models.items():
        model = load(checkpoint, allow=allow)
        density = density_of_samples(name)
        rows.append((MODELS[name] + (" + GMM" if density == "gmm" else ""), pictures(model, images, density, seed)))
    replace_file(path, png_bytes(figure(rows)))


def density_of_samples(name: str) -> str:
    """What the samples of a row of OBJECTIVES are drawn from."""
    return OBJECTIVES[name].second_stage or ("isotropic" if name in BLOCKS["isotropic"] else "gmm")


@torch.no_grad()
def pictures(model: TrainedModel, images: torch.Tensor, density: str, seed: int) -> list[torch.Tensor]:
    """The three kinds, uint8 [COLUMNS, c, h, w] each; none of a kind that a fit or a second image is missing for."""
    x = to_unit(images, torch.device("cpu"))
    latents = model.encode(x)
    t = torch.linspace(0, 1, COLUMNS)[:, None]
    between = model.decode(latents[:1] * (1 - t) + latents[1:2] * t) if len(latents) > 1 else x[:0]
    try:
        drawn = model.sample(COLUMNS, density, seed)
    except FileNotFoundError:  # the mixture could not be fitted, which the table says
        drawn = x[:0]
    return [to_uint8(part) for part in (model.reconstruct(x), drawn, between)]


def figure(rows: list[tuple[str, list[torch.Tensor]]]) -> Image.Image:
    """The rows under the heads of their kinds, small pictures doubled in size."""
    height, width = rows[0][1][0].shape[2:]
    scale = max(1, 64 // height)
    step = scale * width * COLUMNS + GAP
    canvas = Image.new("RGB", (NAMES + len(KINDS) * step, 2 * LETTERS + len(rows) * (scale * height + 2)), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(LETTERS)
    for place, kind in enumerate(KINDS):
        draw.text((NAMES + place * step, LETTERS // 4), kind, "black", font)
    for line, (name, parts) in enumerate(rows):
        top = 2 * LETTERS + line * (scale * height + 2)
        draw.text((4, top + (scale * height - LETTERS) // 2), name, "black", font)
        for place, part in enumerate(parts):
            if len(part):
                strip = grid(part, COLUMNS, gap=0).permute(1, 2, 0).numpy()
                tile = Image.fromarray(strip).resize((scale * strip.shape[1], scale * strip.shape[0]), Image.Resampling.NEAREST)
                canvas.paste(tile, (NAMES + place * step, top))
    return canvas
