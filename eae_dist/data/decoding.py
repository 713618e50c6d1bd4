"""One encoded image to pixels: the only place that knows an image decoder.

PNG is decoded by pyspng where that has wheels, in half of torchvision's time for a small image. Everything else by torchvision's
operators, below their Python wrapper, which since 0.29 warns at every call; where a torchvision lacks them by torchcodec, which
takes nearly twice as long for a small image (0.17), else by Pillow.
"""

import io
from functools import lru_cache

import numpy as np
import torch
from PIL import Image

try:
    import pyspng
except ImportError:  # no wheel for this platform
    pyspng = None

MODES = {1: ("GRAY", "L"), 3: ("RGB", "RGB")}  # channels -> the mode's name in torchcodec, in Pillow and pyspng


def decode_image(data: bytes, channels: int) -> np.ndarray:
    """PNG, JPEG or WebP file -> uint8 [h, w, channels]; channels 1 (gray) or 3 (RGB). ValueError if broken."""
    if data[1:4] == b"PNG" and pyspng is not None:
        decode = decode_with_pyspng
    elif data[8:12] == b"WEBP" and channels == 1:
        decode = decode_with_pillow  # the only one that decodes WebP to gray
    else:
        decode = _decoder()
    try:
        return decode(data, channels)
    except (RuntimeError, OSError, SyntaxError) as error:
        raise ValueError(f"not a readable image ({str(error).splitlines()[0]})") from error


def decode_with_pyspng(data: bytes, channels: int) -> np.ndarray:
    try:
        pixels = pyspng.load(data, MODES[channels][1])
    except RuntimeError:  # broken, or gray with transparency, which it does not make gray
        return decode_with_pillow(data, channels)
    return pixels if channels == 3 else pixels[..., None]


def decode_with_pillow(data: bytes, channels: int) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        pixels = np.array(image.convert(MODES[channels][1]))
    return pixels.reshape(*pixels.shape[:2], channels)


@lru_cache(maxsize=1)
def _decoder():
    for candidate in (_torchvision_decoder, _torchcodec_decoder):
        try:
            decode = candidate()
            decode(_PROBE, 1)
            return decode
        except (ImportError, OSError, AttributeError, RuntimeError):
            continue  # not installed, or built without its codecs
    return decode_with_pillow


def _torchvision_decoder():
    import torchvision.io  # noqa: F401  registers torch.ops.image

    # torchvision numbers its modes GRAY = 1 and RGB = 3: the channels themselves.
    decode = torch.ops.image.decode_image
    return lambda data, channels: _channels_last(decode(_as_tensor(data), channels, False))


def _torchcodec_decoder():
    from torchcodec.decoders import decode_image

    return lambda data, channels: _channels_last(decode_image(_as_tensor(data), mode=MODES[channels][0]))


def _as_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)  # a copy: tensors of read-only memory are warned of


def _channels_last(image: torch.Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).numpy()


# A gray PNG of one pixel, to learn at the first call whether a decoder works here.
_PROBE = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a49444154789c636000000002000148afa471"
    "0000000049454e44ae426082"
)
