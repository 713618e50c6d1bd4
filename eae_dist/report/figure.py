"""The paper's figure, like beside like: of every model reconstructions, draws of N(0, I), draws of its mixture, and
interpolations, with the ground truth on top."""

from collections.abc import Collection
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
GAP, LETTERS, NAMES = 12, 13, 130  # pixels between the kinds, of a letter's height, left of the pictures
FRAME = 2  # pixels around what the paper prints
KINDS = {  # the heads, and what a column of draws is drawn from
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

    cache: through which remote data is read.

    The reconstructions are of the split's first images, an interpolation goes from the first of them to the second, linear in
    the latent. A model with a second stage draws that for N(0, I), and nothing else. A frame marks the draws whose distance the
    paper's table prints.
    """
    images = next(walk(data, split, COLUMNS, rank=0, world=1, cache=cache))["image"]
    rows: list[tuple[str, list[torch.Tensor]]] = [("ground truth", [images])]
    rows += [(MODELS[name], pictures(model, name, images, seed)) for name, model in models.items()]
    printed = {MODELS[row]: {kind for kind, density in KINDS.items() if row in BLOCKS.get(density, ())} for row in models}
    replace_file(path, png_bytes(figure(rows, printed)))


@torch.no_grad()
def pictures(model: "TrainedModel", name: str, images: torch.Tensor, seed: int) -> list[torch.Tensor]:
    """The kinds in their order for a row of OBJECTIVES, uint8 [COLUMNS, c, h, w] each; none of a kind that there is not."""
    x = to_unit(images, torch.device("cpu"))
    latents = model.encode(x)
    t = torch.linspace(0, 1, COLUMNS)[:, None]
    between = model.decode(latents[:1] * (1 - t) + latents[1:2] * t) if len(latents) > 1 else x[:0]

    def drawn(density: str | None) -> torch.Tensor:
        try:
            return model.sample(COLUMNS, density, seed) if density else x[:0]
        except FileNotFoundError:  # it was not judged, or could not be fitted, which the table says
            return x[:0]

    draws = [drawn(set_of_cell(name, density)) for density in KINDS.values() if density]
    return [to_uint8(part) for part in (model.reconstruct(x), *draws, between)]


def figure(rows: list[tuple[str, list[torch.Tensor]]], framed: dict[str, Collection[str]]) -> Image.Image:
    """The rows under the heads of their kinds, small pictures doubled in size; framed: kinds with a frame, by row."""
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
