"""The file formats in which `pack` writes images."""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from eae_dist.errors import UserError

EXTENSIONS = {"png": "png", "jpeg": "jpg", "webp": "webp", "raw": "npy"}  # format -> extension in a shard
JPEG_QUALITY = 95


@dataclass(frozen=True)
class Encoding:
    """The file format of an image: png, webp (lossless), raw, or jpeg with a quality of 1 to 100."""

    format: str
    quality: int | None = None

    def __post_init__(self) -> None:
        if self.quality is not None and self.format != "jpeg":
            raise UserError(f"--quality is for --format jpeg, not for {self.format}, which is lossless")

    def encode(self, image: np.ndarray) -> bytes:
        """Returns the bytes of the image file for uint8 [h, w], [h, w, 1] or [h, w, 3]; raw is an .npy of [h, w, c]."""
        data = io.BytesIO()
        if self.format == "raw":
            np.save(data, np.ascontiguousarray(image).reshape(*image.shape[:2], -1), allow_pickle=False)
            return data.getvalue()
        options: dict[str, dict[str, Any]] = {"jpeg": {"quality": self.quality or JPEG_QUALITY}, "webp": {"lossless": True}}
        gray = image.shape[2:] == (1,)
        Image.fromarray(image[:, :, 0] if gray else image).save(data, format=self.format, **options.get(self.format, {}))
        return data.getvalue()
