"""Images beside their nearest neighbors, and the distances to them, as PNG files."""

import io

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from eae_dist.report.grids import png_bytes

GAP, LETTERS, SMALLEST = 4, 14, 48  # pixels: between pictures, height of a line of text, smallest side of a picture


def neighbors_picture(queries: np.ndarray, neighbors: np.ndarray, distances: np.ndarray) -> bytes:
    """Returns a PNG file with a row for each query, uint8 [m, c, h, w].

    A row shows the query and then its neighbors [m, k, c, h, w], each above its distance [m, k].
    """
    m, k, _, height, width = neighbors.shape
    times = max(1, -(-SMALLEST // width))
    across, down = width * times + GAP, height * times + LETTERS + GAP
    picture = Image.new("RGB", (GAP + (k + 1) * across + 2 * GAP, GAP + m * down), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(11)
    for row in range(m):
        for column in range(k + 1):
            pixels = queries[row] if column == 0 else neighbors[row, column - 1]
            image = Image.fromarray(np.broadcast_to(pixels, (3, height, width)).transpose(1, 2, 0).copy())
            left, top = GAP + column * across + (2 * GAP if column else 0), GAP + row * down
            picture.paste(image.resize((width * times, height * times), Image.Resampling.NEAREST), (left, top))
            if column:
                pen.text((left, top + height * times), f"{distances[row, column - 1]:.3g}", fill="black", font=font)
    return png_bytes(picture)


def distances_figure(queries: np.ndarray, samples: np.ndarray, split: str, density: str) -> bytes:
    """Returns a PNG file with two histograms on one axis: distances [n] and [m] to the nearest training image."""
    from matplotlib.figure import Figure  # the import takes a second, and most commands draw no figure

    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.subplots()
    edges = np.histogram_bin_edges(np.concatenate([queries, samples]), bins=60).tolist()
    for distances, name in ((queries, f"{split} images"), (samples, f"samples from {density}")):
        axes.hist(distances, edges, density=True, alpha=0.55, label=name)
    axes.set_xlabel("distance to the nearest training image, in the latent space")
    axes.set_yticks([])
    axes.legend(frameon=False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return file.getvalue()
