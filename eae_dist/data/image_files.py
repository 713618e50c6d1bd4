"""Image files in folders: listing them, reading them to uint8 pixels, and reporting unusable files."""

import hashlib
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, NoReturn, overload

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from eae_dist.data.indexing import image_channels
from eae_dist.data.order import blocks_of
from eae_dist.distributed import rank, world_size
from eae_dist.distributed.processes import available_cores, run_tasks
from eae_dist.errors import UserError, UserFileError
from eae_dist.numerics.atomic_files import sha256_of

ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # without EPS, for which Pillow runs a program


@dataclass(frozen=True)
class ImageFiles:
    """A sequence of images, uint8 [h, w] (gray) or [h, w, 3]; each file is read when its item is accessed.

    crop: the center crop x crop pixels are cut out first. size: then the central square is resized to size x size.
    channels: 1 gray, 3 RGB, None as in the file.
    """

    paths: list[str]
    crop: int | None = None
    size: int | None = None
    channels: int | None = None

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, i: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, i: np.ndarray) -> "ImageFiles": ...
    def __getitem__(self, i: "int | np.ndarray") -> "np.ndarray | ImageFiles":
        if isinstance(i, np.ndarray):
            return replace(self, paths=[self.paths[row] for row in i])
        return read_image(self.paths[i], self.crop, self.size, self.channels)


def read_image(path: str, crop: int | None, size: int | None, channels: int | None) -> np.ndarray:
    """Reads one image file as uint8 [h, w] or [h, w, 3], with the options of `ImageFiles`. Raises ValueError for a bad file."""
    if not os.path.isfile(path):  # reading a pipe would block
        raise UserError("not a regular file" if os.path.lexists(path) else "missing")
    return read_pixels(path, crop, size, channels)


def read_pixels(
    file: str | BinaryIO, crop: int | None, size: int | None, channels: int | None, most: int | None = None
) -> np.ndarray:
    """Does the same as `read_image` for a path or an open file.

    most: an image with more pixels raises ValueError before it is decoded.
    """
    try:
        with Image.open(file, formats=FORMATS) as opened:
            if most is not None and opened.width * opened.height > most:
                raise UserError(f"{opened.width}x{opened.height} are more than {most:,} pixels")
            depth = image_channels(opened)
            image: Image.Image = ImageOps.exif_transpose(opened)
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            image = image.convert("L" if (channels or depth) == 1 else "RGB")
            if crop is not None:
                if min(image.size) < crop:
                    raise UserError(f"{image.width}x{image.height} is smaller than --crop {crop}")
                image = center_crop(image, crop)
            if size is not None:
                image = center_crop(image, min(image.size)).resize((size, size), Image.Resampling.BILINEAR)
            return np.array(image)
    except Image.UnidentifiedImageError as error:
        raise UserError("not an image") from error
    except Exception as error:  # Pillow raises many types for a damaged file
        raise UserError(" ".join(str(error).split()) or type(error).__name__) from error


def walk_images(
    folder: Path, batch: int, *, count: int | None = None
) -> tuple[tuple[int, int], int, Iterator[tuple[int, torch.Tensor]]]:
    """Reads this rank's blocks of `batch` images among the first `count` (default: all) in a folder, ordered by name.

    Returns (height, width), the number of this rank's blocks, and an iterator over them: the number of the first image of a block
    and its images, uint8 [m, 3, h, w]. Pixels are read as by pytorch-fid: converted to RGB, without regard to transparency and
    EXIF. Subfolders are included; files with endings other than ENDINGS are not images. Raises ValueError at once for a folder
    without images and a damaged first image; for another damaged file, or one of another size, when it is read.
    """
    names = image_names(folder, count)

    def read(number: int) -> torch.Tensor:
        path = folder / names[number]
        try:
            with Image.open(path, formats=FORMATS) as image:
                image_channels(image)  # raises an error for more than 8 bits a channel
                pixels = np.array(image.convert("RGB"))
        except Exception as error:  # Pillow raises many types for a damaged file
            raise UserError(f"{path} is not a usable image: {error}") from error
        return torch.from_numpy(pixels).permute(2, 0, 1)

    shape = read(0).shape

    def stacked(first: int, block: Iterable[torch.Tensor]) -> tuple[int, torch.Tensor]:
        images = list(block)
        for number, image in enumerate(images, start=first):
            if image.shape != shape:
                one, other = (f"{name} is {s[2]}x{s[1]}" for name, s in ((names[0], shape), (names[number], image.shape)))
                raise UserError(f"{folder}: {one}, {other} (width x height); all must have one size")
        return first, torch.stack(images)

    start, stop = blocks_of(len(names), batch, rank(), world_size())

    def blocks() -> Iterator[tuple[int, torch.Tensor]]:
        with ThreadPoolExecutor(max(available_cores() // world_size(), 1)) as pool:
            ahead: deque = deque()
            for first in range(start * batch, min(stop * batch, len(names)), batch):
                ahead.append((first, pool.map(read, range(first, min(first + batch, len(names))))))
                if len(ahead) > 2:
                    yield stacked(*ahead.popleft())
            while ahead:
                yield stacked(*ahead.popleft())

    return (shape[1], shape[2]), stop - start, blocks()


def image_names(folder: Path, count: int | None = None) -> list[str]:
    """Returns the first `count` image files of a folder by name, relative to it. Raises ValueError if there are none."""
    names = [name for name in files_under(folder)[0] if name.lower().endswith(ENDINGS)][:count]
    if not names:
        raise UserError(f"{folder} holds no image files ({', '.join(ENDINGS)})")
    return names


def contents_sha256(folder: Path, count: int | None = None) -> str:
    """Returns a checksum of the first `count` image files of a folder: of their bytes, in the order of their names."""
    return hashlib.sha256("".join(sha256_of(folder / name) for name in image_names(folder, count)).encode()).hexdigest()


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Returns the center size x size pixels."""
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def how_read(files: ImageFiles) -> str:
    """Returns a description of what `read_image` does with each file, for the index."""
    steps = ["EXIF orientation applied", "transparency on white", "RGB" if files.channels == 3 else "gray (L)"]
    if files.crop:
        steps.append(f"center crop {files.crop}x{files.crop}")
    if files.size:
        steps += [] if files.crop else ["center crop to the shorter side"]
        steps.append(f"resized to {files.size}x{files.size} (Pillow bilinear, antialiased)")
    return ", ".join(steps)


def files_under(path: Path) -> tuple[list[str], int]:
    """Returns every file under a folder, relative and sorted, and the number of hidden files (.name), which are excluded."""
    if not path.is_dir():
        raise UserFileError(f"{path} is not a folder; give a folder of images")
    names, hidden, seen = [], 0, set()
    for folder, _, files in os.walk(path, onerror=_raise, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            raise UserError(f"{folder} is a link to {real}, which is in {path} already; remove the link")
        seen.add(real)
        for file in files:
            name = os.path.relpath(os.path.join(folder, file), path)
            if any(part.startswith(".") for part in Path(name).parts):
                hidden += 1
            else:
                names.append(name)
    return sorted(names), hidden


def _raise(error: OSError) -> NoReturn:
    raise error


def checked(files: ImageFiles, workers: int) -> tuple[list[tuple[int, ...]], dict[str, str]]:
    """Reads every file once. Returns the shapes of the good files in order, and path -> reason for the bad files."""
    chunk = 64
    chunks = (files[np.arange(start, min(start + chunk, len(files)))] for start in range(0, len(files), chunk))
    shapes: list[tuple[int, ...]] = []
    bad: dict[str, str] = {}
    with (
        closing(run_tasks(_shapes_or_reasons, chunks, min(workers, -(-len(files) // chunk) or 1))) as results,
        tqdm(total=len(files), desc="checking", unit=" images", disable=None) as progress,
    ):
        for result in results:
            shapes += [shape for _, shape in result if not isinstance(shape, str)]
            bad |= {path: reason for path, reason in result if isinstance(reason, str)}
            progress.update(len(result))
    return shapes, bad


def _shapes_or_reasons(files: ImageFiles) -> list[tuple[str, "tuple[int, ...] | str"]]:
    found: list[tuple[str, tuple[int, ...] | str]] = []
    for i, path in enumerate(files.paths):
        try:
            found.append((path, files[i].shape))
        except ValueError as error:
            found.append((path, str(error)))
    return found


def left_out(bad: dict[str, str], total: int, skip_bad: bool) -> tuple[str, ...]:
    """Returns a summary line and one line per bad file. Raises ValueError for bad files if skip_bad is False."""
    if not bad:
        return ()
    said, named = f"{len(bad):,} of {total:,} files are not usable images", [f"{path} ({bad[path]})" for path in sorted(bad)]
    if not skip_bad:
        several = "; ".join(named[:5]) + ("; ..." if len(named) > 5 else "")
        raise UserError(f"{said}: {several}; repair or remove them, or skip and list them with --skip-bad")
    return (f"left out: {said}:", *(f"  {name}" for name in named))


def keys_of(names: list[str]) -> list[str]:
    """Returns keys of files: the path without extension, with dots replaced because a key ends at its first dot.

    A key that is taken gets the suffix -2, -3, ...
    """
    taken: set[str] = set()
    keys = []
    for name in names:
        folder, base = os.path.split(os.path.splitext(name)[0])
        plain = os.path.join(folder, base.replace(".", "_")).encode(errors="replace").decode()
        key, number = plain, 1
        while key in taken:
            number += 1
            key = f"{plain}-{number}"
        taken.add(key)
        keys.append(key)
    return keys
