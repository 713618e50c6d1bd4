"""How an image file becomes pixels: one function, whichever way the image comes.

    read_pixels         reads a file by the rules; packing, indexing, training, evaluation and the service use it
    depends_on_rules    tells from a few bytes whether another decoder could give other pixels than the rules
    Fit                 crop, pad and size, which are applied to the pixels afterwards

The rules: the EXIF orientation is applied, transparency is composed on white, palettes and CMYK become RGB. More than 8 bits a
channel, and files of several frames, are refused unless the user says how they are read. h, w: height and width.
"""

import io
import re
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageFile

from eae_dist.errors import UserError

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # without EPS, for which Pillow runs a program
ORIENTATION = 0x0112  # the EXIF tag
TURNS = {  # its value -> what turns the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TRAITS = {  # what the rules did to a file -> how it is said
    "turned": "turned by their EXIF orientation",
    "transparent": "transparent, composed on white",
    "palette": "with a palette, looked up",
    "cmyk": "in CMYK, converted to RGB",
    "deep": "of more than 8 bits a channel, scaled",
    "frames": "of several frames, the first taken",
}
SUSPECT_CHUNKS = {b"tRNS", b"eXIf", b"acTL"}  # of a PNG: transparency, EXIF, frames
TEXT_CHUNKS = {b"tEXt", b"zTXt", b"iTXt"}


@dataclass(frozen=True)
class Rules:
    """What the user chose where an image can be read in more than one way.

    channels: 1 gray, 3 RGB, None as in the file. scale: the values in a file of more than 8 bits a channel that become 0 and
    255; None refuses such files. frames: "first" takes the first of several frames; None refuses such files.
    """

    channels: int | None = None
    scale: tuple[float, float] | None = None
    frames: str | None = None

    def record(self) -> dict:
        """Returns the choices that an index stores under "image", beside the shape."""
        return {name: value for name, value in (("scale", self.scale), ("frames", self.frames)) if value is not None}

    @classmethod
    def of(cls, image: dict) -> "Rules":
        """Returns the rules that the "image" entry of an index stores. Raises ValueError, KeyError or TypeError for another."""
        low_high = image.get("scale")
        scale = None if low_high is None else (float(low_high[0]), float(low_high[1]))
        return cls(int(image["shape"][0]), scale, image.get("frames"))


AS_THEY_ARE = Rules()


@dataclass(frozen=True)
class Reading:
    """An image that was read. pixels: uint8 [h, w] (gray) or [h, w, 3]. traits: what the rules did, keys of TRAITS.

    depth: 1 if the file is gray, 3 if it has colors, whatever the rules made of it.
    """

    pixels: np.ndarray
    depth: int
    traits: frozenset[str]


def read_pixels(
    file: str | BinaryIO, rules: Rules = AS_THEY_ARE, *, most: int | None = None, formats: tuple[str, ...] = FORMATS
) -> Reading:
    """Reads the image at a path or in an open file by the rules. Raises ValueError for a file that is not a usable image.

    most: an image with more pixels raises ValueError before it is decoded. formats: the names by which Pillow knows formats.
    """
    try:
        with Image.open(file, formats=formats) as image:
            if most is not None and image.width * image.height > most:
                raise UserError(f"{image.width}x{image.height} are more than {most:,} pixels")
            return _read(image, rules)
    except Image.UnidentifiedImageError as error:
        raise UserError("not an image") from error
    except Exception as error:  # Pillow raises many types for a damaged file
        raise UserError(" ".join(str(error).split()) or type(error).__name__) from error


def _read(opened: ImageFile.ImageFile, rules: Rules) -> Reading:
    image: Image.Image = opened
    traits, webp = set(), image.format == "WEBP"
    if (frames := frames_of(image)) > 1:
        traits.add("frames")
        if rules.frames != "first":
            raise UserError(f"an image of {frames} frames; `pack --frames first` takes the first of each")
    depth = 1 if image.mode in ("1", "L", "LA", "La") or image.mode[0] in "IF" else 3
    if deep := is_deep(opened):
        traits.add("deep")
        if rules.scale is None:
            kind = f"more than 8 bits a channel (mode {image.mode})"
            raise UserError(f"{kind}; `pack --scale LOW:HIGH` says which values become 0 and 255")
    traits |= {trait for trait, modes in (("palette", ("P", "PA")), ("cmyk", ("CMYK",))) if image.mode in modes}
    file = whole_file(opened) if deep and image.format == "PNG" else b""
    image.load()  # reads all of the file: an orientation can stand behind the pixels
    if (turn := TURNS.get(image.getexif().get(ORIENTATION, 1))) is not None:
        traits.add("turned")
    if rules.scale is not None and deep:
        image = scaled(image, file, rules.scale)
        depth = 1 if image.mode in ("L", "LA") else 3
    if turn is not None:
        image = image.transpose(turn)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        traits |= {"transparent"} if any_transparent(image) else set()
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if webp and is_gray(np.asarray(image.convert("RGB"))):  # WebP has no gray images
        depth = 1
    return Reading(np.array(image.convert("L" if (rules.channels or depth) == 1 else "RGB")), depth, frozenset(traits))


def frames_of(image: Image.Image) -> int:
    """Returns the number of frames. A photo of format MPO counts as one: behind it are only a preview or a map of depths."""
    return 1 if image.format == "MPO" else getattr(image, "n_frames", 1)


def is_deep(image: ImageFile.ImageFile) -> bool:
    """True for more than 8 bits a channel, also where Pillow would cut them off."""
    # A 16-bit color image has mode RGB; only the raw mode of the decoder (RGB;16B) shows the bits. BGR;16 is 16 bits a pixel.
    deep_ppm = any(
        codec in ("ppm", "ppm_plain") and isinstance(args, tuple) and args[1] > 255 for codec, _, _, args in image.tile
    )
    return image.mode[0] in "IF" or deep_ppm or re.search(r";16[BLNS]", str(image.tile)) is not None


def any_transparent(image: Image.Image) -> bool:
    """True if a pixel of an image of mode RGBA is not opaque."""
    return int(np.asarray(image.getchannel("A")).min()) < 255


def is_gray(pixels: np.ndarray) -> bool:
    """True if the channels of an image, uint8 [h, w, 3], are equal apart from the rounding of a lossy format."""
    return int(np.ptp(pixels, axis=2).max()) <= 2


def whole_file(image: ImageFile.ImageFile) -> bytes:
    """Returns the bytes of the file of an image that is not loaded."""
    file = image.fp
    assert file is not None  # Pillow closes it when the image is loaded
    at = file.tell()
    file.seek(0)
    data = file.read()
    file.seek(at)
    return data


def scaled(image: Image.Image, png: bytes, scale: tuple[float, float]) -> Image.Image:
    """Returns a loaded image of more than 8 bits a channel as one of 8 bits (mode L, LA, RGB or RGBA).

    png: the file, if it is a PNG. Raises ValueError for values outside the scale, and for colors in another format than PNG.
    """
    if image.mode[0] in "IF":
        if image.has_transparency_data:
            raise UserError("a transparent color in a gray image of more than 8 bits a channel cannot be read")
        return Image.fromarray(scaled_values(np.asarray(image), scale))
    if not png:
        raise UserError(f"more than 8 bits a channel (mode {image.mode}) can be read in gray images and in PNG files only")
    # Pillow keeps the upper 8 bits of colors, torchvision all 16.
    try:
        import torchvision.io  # noqa: F401  registers torch.ops.image

        decode = torch.ops.image.decode_image
    except (ImportError, AttributeError) as error:
        raise UserError("more than 8 bits a channel in color need a torchvision that decodes PNG files") from error
    data = torch.frombuffer(bytearray(png), dtype=torch.uint8)
    values = decode(data, 0, False).permute(1, 2, 0).to(torch.int64).numpy()  # 0: with the channels and bits of the file
    with_alpha = values.shape[2] in (2, 4)
    colors = scaled_values(values[..., :-1] if with_alpha else values, scale)
    if with_alpha:
        colors = np.dstack([colors, scaled_values(values[..., -1], (0, 65535))])
    return Image.fromarray(colors[..., 0] if colors.shape[2] == 1 else colors)


def scaled_values(values: np.ndarray, scale: tuple[float, float]) -> np.ndarray:
    """Returns numbers as uint8, from the scale's LOW as 0 to its HIGH as 255. Raises ValueError for numbers outside of it."""
    low, high = scale
    values = values.astype(np.float64)
    if not (values.min() >= low and values.max() <= high):  # also for NaN
        raise UserError(f"values from {values.min():g} to {values.max():g}, outside of --scale {low:g}:{high:g}")
    return np.rint((values - low) * (255 / (high - low))).astype(np.uint8)


# Telling apart what fast decoders may read


def depends_on_rules(data: bytes, channels: int) -> bool:
    """True if the pixels of a PNG, JPEG or WebP file depend on the rules; it is then read by `read_pixels`, else by any decoder.

    channels: 1 gray, 3 RGB. A file that looks damaged is False: any decoder says so.
    """
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        suspect, formats = _suspect_png(data), ("PNG",)
    elif data[8:12] == b"WEBP":
        suspect, formats = _suspect_webp(data, channels), ("WEBP",)
    else:
        suspect, formats = _suspect_jpeg(data, channels), ("JPEG",)
    if not suspect:
        return False
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            converted = image.mode in ("CMYK", "P", "PA") or (channels == 1 and image.mode not in ("1", "L"))
            if converted or is_deep(image) or image.has_transparency_data or frames_of(image) > 1:
                return True
            if image.format == "PNG":
                image.load()  # an orientation can stand behind the pixels
            return image.getexif().get(ORIENTATION) in TURNS
    except Exception:  # damaged: Pillow raises many types, and `read_pixels` says it in one way
        return True


def _suspect_png(data: bytes) -> bool:
    if len(data) < 33:
        return False
    if data[24] > 8 or data[25] > 3:  # bits; colors of kinds 4 and 6 are with transparency
        return True
    at, end = 33, len(data) - 8  # behind the header
    while at <= end:
        kind = data[at + 4 : at + 8]
        if kind == b"IEND":
            return False
        if kind in SUSPECT_CHUNKS:
            return True
        if kind in TEXT_CHUNKS and data.startswith((b"Raw profile type", b"XML:com.adobe.xmp"), at + 8):
            return True  # an orientation by ImageMagick, or in XMP
        at += int.from_bytes(data[at : at + 4], "big") + 12
    return False


def _suspect_jpeg(data: bytes, channels: int) -> bool:
    at = 2
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xE1:  # EXIF or XMP
            return True
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # the frame's header
            return data[at + 4] > 8 or data[at + 9] not in (1, 3) or data[at + 9] > channels
        at += 1 if marker == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return False


def _suspect_webp(data: bytes, channels: int) -> bool:
    if channels == 1:  # no other decoder reads it to gray
        return True
    if data[12:16] == b"VP8L":
        return bool(int.from_bytes(data[21:25], "little") >> 28 & 1)  # the bit that says: with alpha
    return data[12:16] == b"VP8X" and bool(
        int.from_bytes(data[20:21], "little") & 0x1E
    )  # with alpha, EXIF, XMP or several frames


# What comes after the rules


@dataclass(frozen=True)
class Fit:
    """Steps from pixels of any size to those of one size: crop, then pad, then size; None leaves a step out.

    crop: the center crop x crop pixels are cut out. pad: black is added on all sides up to pad x pad pixels. size: the central
    square is resized to size x size (Pillow's bilinear with antialiasing).
    """

    crop: int | None = None
    pad: int | None = None
    size: int | None = None

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Fits uint8 [h, w] or [h, w, c]. Raises ValueError for an image that is smaller than the crop or larger than the pad."""
        height, width = pixels.shape[:2]
        if self.crop is not None:
            if min(height, width) < self.crop:
                raise UserError(f"{width}x{height} is smaller than --crop {self.crop}")
            pixels = center_crop(pixels, self.crop)
        if self.pad is not None:
            height, width = pixels.shape[:2]
            if max(height, width) > self.pad:
                raise UserError(f"{width}x{height} is larger than --pad {self.pad}")
            top, left = (self.pad - height) // 2, (self.pad - width) // 2
            sides = ((top, self.pad - height - top), (left, self.pad - width - left), (0, 0))
            pixels = np.pad(pixels, sides[: pixels.ndim])
        if self.size is not None:
            square = center_crop(pixels, min(pixels.shape[:2]))
            image = Image.fromarray(square[..., 0] if square.shape[2:] == (1,) else square)
            resized = np.array(image.resize((self.size, self.size), Image.Resampling.BILINEAR))
            pixels = resized.reshape(self.size, self.size, *pixels.shape[2:])
        return pixels

    def __str__(self) -> str:
        """Returns the steps in words, for the index; empty without a step."""
        steps = []
        if self.crop:
            steps.append(f"center crop {self.crop}x{self.crop}")
        if self.pad:
            steps.append(f"padded with black to {self.pad}x{self.pad}")
        if self.size:
            steps += [] if self.crop or self.pad else ["center crop to the shorter side"]
            steps.append(f"resized to {self.size}x{self.size} (Pillow bilinear, antialiased)")
        return ", ".join(steps)


WHOLE = Fit()


def center_crop(pixels: np.ndarray, size: int) -> np.ndarray:
    """Returns the center size x size pixels of [h, w] or [h, w, c]."""
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]
