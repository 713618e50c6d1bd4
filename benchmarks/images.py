"""Images that compress as photographs of their size do (a color 32x32 PNG: about 2 KiB), and shards of them."""

from pathlib import Path

import numpy as np
from PIL import Image
from webdataset import TarWriter

from eae_dist.data.encoding import EXTENSIONS, Encoding
from eae_dist.data.indexing import build_index


def picture(number: int, shape: tuple[int, int, int]) -> np.ndarray:
    """Returns a smooth image with slight noise, uint8 [h, w, c] for shape (c, h, w); it depends on the number alone."""
    channels, height, width = shape
    rng = np.random.default_rng(number)
    coarse = rng.uniform(0, 255, (4, 4, channels)).astype(np.float32)
    size, smoothly = (width, height), Image.Resampling.BICUBIC
    smooth = np.stack([Image.fromarray(coarse[..., c]).resize(size, smoothly) for c in range(channels)], -1)
    return (smooth + rng.normal(0, 4, smooth.shape)).clip(0, 255).astype(np.uint8)


def write_shards(root: Path, shape: tuple[int, int, int], encoding: str, shards: int, samples: int) -> Path:
    """Writes shards with `samples` samples each, labels modulo 10, split train, and their index."""
    root.mkdir(parents=True)
    encode, extension = Encoding(encoding).encode, EXTENSIONS[encoding]
    for shard in range(shards):
        with TarWriter(str(root / f"train-{shard:06d}.tar"), encoder=False, mtime=0) as tar:
            for number in range(shard * samples, (shard + 1) * samples):
                image = encode(picture(number, shape))
                tar.write({"__key__": f"{number:06d}", extension: image, "cls": b"%d" % (number % 10)})
    build_index(root)
    return root
