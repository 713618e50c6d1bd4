"""The paper's figure, with the ground truth on top.

Each model has a row of reconstructions, samples of N(0, I), samples of its mixture, and interpolations.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageDraw, ImageFont

from eae_dist.data.remote import Cache
from eae_dist.data.stream import walk
from eae_dist.model.autoencoder import to_uint8, to_unit
from eae_dist.numerics.atomic_files import replace_file
from eae_dist.report.grids import grid, png_bytes
from eae_dist.report.table import BLOCKS, MODELS, set_of_cell

if TYPE_CHECKING:
    from eae_dist.inference.trained_model import TrainedModel

COLUMNS = 6  # pictures of each kind
GAP, LETTERS, NAMES = 12, 13, 130  # pixels: between the kinds, height of a letter, left of the pictures
FRAME = 2  # pixels around the samples that the paper's table prints
KINDS = {  # the headings, and the density of a column of samples
    "reconstructions": None,
    "draws of N(0, I)": "isotropic",
    "draws of a mixture": "gmm",
    "interpolations": None,
}


def save_figure(
    models: dict[str, "TrainedModel"],
    data: str,
    split: str,
    seed: int,
    path: Path,
    cache: Cache | None = None,
) -> None:
    """Writes a PNG with a row of pictures for each trained model, by its name in OBJECTIVES.

    cache: for reading remote data.

    The reconstructions show the split's first images. An interpolation goes from the first image to the second, linear in the
    latent. For N(0, I), a model with a second stage shows samples of that stage; it has no other samples. A frame marks the
    samples whose distance the paper's table prints.
    """
    images = next(walk(data, split, COLUMNS, rank=0, world=1, cache=cache))["image"]
    rows: list[tuple[str, list[torch.Tensor]]] = [("ground truth", [images])]
    rows += [(MODELS[name], pictures(model, name, images, seed)) for name, model in models.items()]
    printed = {MODELS[row]: {kind for kind, density in KINDS.items() if density and row in BLOCKS[density]} for row in models}
    replace_file(path, png_bytes(figure(rows, printed)))


@torch.no_grad()
def pictures(model: "TrainedModel", name: str, images: torch.Tensor, seed: int) -> list[torch.Tensor]:
    """Returns the pictures of each kind for a row of OBJECTIVES, uint8 [COLUMNS, c, h, w] each; empty for a missing kind."""
    x = to_unit(images, torch.device("cpu"))
    latents = model.encode(x)
    t = torch.linspace(0, 1, COLUMNS)[:, None]
    between = model.decode(latents[:1] * (1 - t) + latents[1:2] * t) if len(latents) > 1 else x[:0]

    def drawn(density: str | None) -> torch.Tensor:
        try:
            return model.sample(COLUMNS, density, seed) if density else x[:0]
        except FileNotFoundError:  # the model was not judged, or the table says that the density could not be fitted
            return x[:0]

    draws = [drawn(set_of_cell(name, density)) for density in KINDS.values() if density]
    return [to_uint8(part) for part in (model.reconstruct(x), *draws, between)]


def figure(rows: list[tuple[str, list[torch.Tensor]]], framed: Mapping[str, Collection[str]]) -> Image.Image:
    """Draws the rows under the headings of their kinds, small images enlarged; framed: the kinds with a frame, by row."""
    height, width = rows[0][1][0].shape[2:]
    scale = max(1, 64 // height)
    step, down = scale * width * COLUMNS + GAP, scale * height + 2 * FRAME
    canvas = Image.new("RGB", (NAMES + len(KINDS) * step, 2 * LETTERS + len(rows) * down), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(LETTERS)
    for place, kind in enumerate(KINDS):
        draw.text((NAMES + place * step, LETTERS // 4), kind, "black", font)
    for line, (name, parts) in enumerate(rows):
        top = 2 * LETTERS + line * down
        draw.text((4, top + (scale * height - LETTERS) // 2), name, "black", font)
        for place, (kind, part) in enumerate(zip(KINDS, parts, strict=False)):
            if len(part):
                strip = grid(part, COLUMNS, gap=0).permute(1, 2, 0).numpy()
                tile = Image.fromarray(strip).resize((scale * strip.shape[1], scale * strip.shape[0]), Image.Resampling.NEAREST)
                left = NAMES + place * step
                if kind in framed.get(name, ()):
                    box = (left - FRAME, top - FRAME, left + tile.width + FRAME - 1, top + tile.height + FRAME - 1)
                    draw.rectangle(box, "orange")
                canvas.paste(tile, (left, top))
    return canvas
