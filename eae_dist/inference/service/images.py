"""Images in messages: base64 of a PNG file. c, h, w: the model's image shape."""

import base64
import binascii
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from eae_dist.data.pixels import Rules, read_pixels
from eae_dist.errors import UserError

LEVEL = 1  # of compression; a small image is a twentieth larger than at level 6


def images_from_text(texts: Sequence[str], shape: tuple[int, int, int]) -> np.ndarray:
    """Decodes base64 image files of the model's size -> uint8 [b, c, h, w]; colors become gray if c = 1.

    A file with other dimensions is not decoded. Raises ValueError that says which image is bad, and why.
    """
    channels, height, width = shape
    images = np.empty((len(texts), channels, height, width), np.uint8)
    for number, text in enumerate(texts):
        try:
            data = base64.b64decode(text, validate=True)
            pixels = read_pixels(io.BytesIO(data), Rules(channels), most=height * width).pixels
            if pixels.shape[:2] != (height, width):
                raise UserError(f"{pixels.shape[1]}x{pixels.shape[0]}")
        except (binascii.Error, ValueError) as error:  # the first is also a ValueError
            what = "not base64" if isinstance(error, binascii.Error) or not text.isascii() else str(error)
            raise UserError(
                f"image {number} is not usable: {what}; expected a file of {width}x{height} pixels (width x height), in base64"
            ) from error
        images[number] = pixels.reshape(height, width, channels).transpose(2, 0, 1)
    return images


def png_of(image: np.ndarray) -> bytes:
    """Encodes uint8 [c, h, w] as the bytes of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(file, "png", compress_level=LEVEL)
    return file.getvalue()


def texts_of(images: np.ndarray) -> list[str]:
    """Encodes uint8 [b, c, h, w] as base64 PNG files."""
    return [base64.b64encode(png_of(image)).decode() for image in images]
