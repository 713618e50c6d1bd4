"""One encoded image to pixels: the only place that knows an image decoder.

torchvision's operators, below their Python wrapper, which since 0.29 warns at every call and costs a fifth of a small PNG's
decode; where a torchvision lacks them torchcodec, which takes nearly twice as long for a small PNG (0.17), else Pillow.
"""

import io
from functools import lru_cache

import numpy as np
import torch
from PIL import Image

MODES = {1: ("GRAY", "L"), 3: ("RGB", "RGB")}  # channels -> the mode's name in torchcodec, in Pillow


def decode_image(data: torch.Tensor, channels: int) -> torch.Tensor:
    """PNG, JPEG or WebP file, uint8 [bytes] -> uint8 [channels, h, w]; channels 1 (gray) or 3 (RGB). ValueError if broken."""
    # Only Pillow decodes WebP to gray.
    decode = decode_with_pillow if channels == 1 and data[8:12].numpy().tobytes() == b"WEBP" else _decoder()
    try:
        return decode(data, channels)
    except (RuntimeError, OSError, SyntaxError) as error:
        raise ValueError(f"not a readable image ({str(error).splitlines()[0]})") from error


def decode_with_pillow(data: torch.Tensor, channels: int) -> torch.Tensor:
    with Image.open(io.BytesIO(data.numpy())) as image:
        pixels = np.array(image.convert(MODES[channels][1]))
    return torch.from_numpy(pixels).reshape(*pixels.shape[:2], channels).permute(2, 0, 1)


@lru_cache(maxsize=1)
def _decoder():
    for candidate in (_torchvision_decoder, _torchcodec_decoder):
        try:
            decode = candidate()
            decode(torch.frombuffer(bytearray(_PROBE), dtype=torch.uint8), 1)
            return decode
        except (ImportError, OSError, AttributeError, RuntimeError):
            continue  # not installed, or built without its codecs
    return decode_with_pillow


def _torchvision_decoder():
    import torchvision.io  # noqa: F401  registers torch.ops.image

    decode = torch.ops.image.decode_image
    # torchvision numbers its modes GRAY = 1 and RGB = 3: the channels themselves.
    return lambda data, channels: decode(data, channels, False)


def _torchcodec_decoder():
    from torchcodec.decoders import decode_image

    return lambda data, channels: decode_image(data, mode=MODES[channels][0])


# A gray PNG of one pixel, to learn at the first call whether a decoder works here.
_PROBE = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a49444154789c636000000002000148afa471"
    "0000000049454e44ae426082"
)
