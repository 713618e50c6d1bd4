"""Decoding of one encoded image to pixels. No other module calls an image decoder for training data.

pyspng decodes PNG on platforms with a wheel, in half the time of torchvision for a small image. For other images, the operators
of torchvision are called directly, because their Python wrapper warns at every call since 0.29. A torchvision without them is
replaced by torchcodec, which takes nearly twice as long for a small image (0.17), or else by Pillow.

These decoders know no orientation and no transparency: an image whose pixels depend on the rules of `pixels.py` is read there.
"""

import io
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from PIL import Image

from eae_dist.data.pixels import AS_THEY_ARE, Rules, depends_on_rules, read_pixels
from eae_dist.errors import UserError

try:
    import pyspng
except ImportError:  # no wheel for this platform
    pyspng = None

Decoder = Callable[[bytes, int], np.ndarray]
SHARD_FORMATS = ("PNG", "JPEG", "WEBP")  # what a shard may hold, by Pillow's names
MODES = {1: ("GRAY", "L"), 3: ("RGB", "RGB")}  # channels -> mode name in torchcodec; mode name in Pillow and pyspng


def decode_image(data: bytes, channels: int, rules: Rules = AS_THEY_ARE) -> np.ndarray:
    """Decodes a PNG, JPEG or WebP file -> uint8 [h, w, channels]; channels: 1 gray, 3 RGB, instead of those of the rules.

    Raises ValueError if it is damaged, or if the rules do not say how to read it.
    """
    if depends_on_rules(data, channels):
        pixels = read_pixels(io.BytesIO(data), replace(rules, channels=channels), formats=SHARD_FORMATS).pixels
        return pixels.reshape(*pixels.shape[:2], channels)
    if data[1:4] == b"PNG" and pyspng is not None:
        decode: Decoder = decode_with_pyspng
    else:
        decode = _decoder()
    try:
        return decode(data, channels)
    except (RuntimeError, OSError, SyntaxError) as error:
        raise UserError(f"not a readable image ({str(error).splitlines()[0]})") from error


def decode_with_pyspng(data: bytes, channels: int) -> np.ndarray:
    """Decodes a PNG with pyspng, or with Pillow if pyspng fails, -> uint8 [h, w, channels]."""
    try:
        pixels = pyspng.load(data, MODES[channels][1])
    except RuntimeError:  # damaged, or gray with transparency, which pyspng cannot convert to gray
        return decode_with_pillow(data, channels)
    return pixels if channels == 3 else pixels[..., None]


def decode_with_pillow(data: bytes, channels: int) -> np.ndarray:
    """Decodes an image with Pillow -> uint8 [h, w, channels]."""
    with Image.open(io.BytesIO(data)) as image:
        pixels = np.array(image.convert(MODES[channels][1]))
    return pixels.reshape(*pixels.shape[:2], channels)


@lru_cache(maxsize=1)
def _decoder() -> Decoder:
    for candidate in (_torchvision_decoder, _torchcodec_decoder):
        try:
            decode = candidate()
            decode(_PROBE, 1)
            return decode
        except (ImportError, OSError, AttributeError, RuntimeError):
            continue  # not installed, or built without its codecs
    return decode_with_pillow


def _torchvision_decoder() -> Decoder:
    import torchvision.io  # noqa: F401  registers torch.ops.image

    # The mode numbers of torchvision, GRAY = 1 and RGB = 3, equal the number of channels.
    decode = torch.ops.image.decode_image
    return lambda data, channels: _channels_last(decode(_as_tensor(data), channels, False))


def _torchcodec_decoder() -> Decoder:
    from torchcodec.decoders import decode_image

    return lambda data, channels: _channels_last(decode_image(_as_tensor(data), mode=MODES[channels][0]))


def _as_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)  # a copy, because torch warns about read-only memory


def _channels_last(image: torch.Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).numpy()


# A gray PNG of one pixel, to test at the first call whether a decoder works here.
_PROBE = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a49444154789c636000000002000148afa471"
    "0000000049454e44ae426082"
)
