"""Images to be judged: all those of a folder or a zip file, read in blocks that do not depend on the number of ranks."""

import hashlib
import io
import zipfile
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from eae_dist.data.image_files import ENDINGS, files_under
from eae_dist.data.order import blocks_of
from eae_dist.data.pixels import FORMATS, ORIENTATION, TURNS, Fit, Rules, any_transparent, is_deep, read_pixels
from eae_dist.distributed import rank, world_size
from eae_dist.distributed.processes import available_cores
from eae_dist.errors import UserError


class ImageWalk(NamedTuple):
    """This rank's blocks of images. size: (height, width) of all. blocks: how many blocks.

    images: yields the number of the first image of a block and its images, uint8 [m, 3, h, w]. of_the_rule: the numbers of the
    images read so far whose pixels depend on the rule by which they are read.
    """

    size: tuple[int, int]
    blocks: int
    images: Iterator[tuple[int, torch.Tensor]]
    of_the_rule: set[int]


def walk_images(
    folder: Path, batch: int, *, count: int | None = None, rule: str = "pack", resize: int | None = None
) -> ImageWalk:
    """Reads this rank's blocks of `batch` images among the first `count` (default: all) in a folder or zip file, by name.

    rule: a row of READ. resize: the central square of every image is resized to resize x resize. Subfolders are included; files
    with endings other than ENDINGS are not images. Raises ValueError at once for a folder without images and a damaged first
    image; for another damaged file, or one of another size, when it is read.
    """
    opened, of_the_rule = ImageFolder.open(folder, count), set[int]()
    names = opened.names
    fit = Fit(size=resize)

    def read(number: int) -> torch.Tensor:
        try:
            pixels, depends = READ[rule](opened.content(names[number]))
        except Exception as error:  # Pillow raises many types for a damaged file
            raise UserError(f"{folder / names[number]} is not a usable image: {error}") from error
        if depends:
            of_the_rule.add(number)
        return torch.from_numpy(fit(pixels)).permute(2, 0, 1)

    shape = read(0).shape

    def stacked(first: int, block: Iterable[torch.Tensor]) -> tuple[int, torch.Tensor]:
        images = list(block)
        for number, image in enumerate(images, start=first):
            if image.shape != shape:
                one, other = (f"{name} is {s[2]}x{s[1]}" for name, s in ((names[0], shape), (names[number], image.shape)))
                raise UserError(
                    f"{folder}: {one}, {other} (width x height); all must have one size: evaluate.resize=N resizes them"
                )
        return first, torch.stack(images)

    start, stop = blocks_of(len(names), batch, rank(), world_size())

    def blocks() -> Iterator[tuple[int, torch.Tensor]]:
        of_the_rule.clear()  # the first image is another rank's unless it is read again
        with ThreadPoolExecutor(max(available_cores() // world_size(), 1)) as pool:
            ahead: deque = deque()
            for first in range(start * batch, min(stop * batch, len(names)), batch):
                ahead.append((first, pool.map(read, range(first, min(first + batch, len(names))))))
                if len(ahead) > 2:
                    yield stacked(*ahead.popleft())
            while ahead:
                yield stacked(*ahead.popleft())

    return ImageWalk((shape[1], shape[2]), stop - start, blocks(), of_the_rule)


def by_the_rules_of_pack(data: bytes) -> tuple[np.ndarray, bool]:
    """Returns the pixels [h, w, 3] as `pack` reads them, and whether an orientation or transparency changed them."""
    reading = read_pixels(io.BytesIO(data), Rules(channels=3))
    return reading.pixels, bool(reading.traits & {"turned", "transparent"})


def as_pytorch_fid_reads(data: bytes) -> tuple[np.ndarray, bool]:
    """Returns the pixels [h, w, 3] without regard to orientation and transparency, and whether there is any.

    Of several frames it takes the first. Raises ValueError for more than 8 bits a channel, which would be cut off.
    """
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        if is_deep(image):
            raise UserError(f"more than 8 bits a channel (mode {image.mode})")
        image.load()
        depends = image.getexif().get(ORIENTATION) in TURNS
        if image.has_transparency_data:
            depends |= any_transparent(image.convert("RGBA"))
        return np.array(image.convert("RGB")), depends


READ = {"pack": by_the_rules_of_pack, "pytorch-fid": as_pytorch_fid_reads}


class ImageFolder(NamedTuple):
    """A folder or a zip file with images. names: those of the images, relative and sorted."""

    path: Path
    names: list[str]
    archive: zipfile.ZipFile | None

    @classmethod
    def open(cls, path: Path, count: int | None = None) -> "ImageFolder":
        """Lists the first `count` images by name. Raises ValueError or OSError without any, and for a damaged zip file."""
        archive = None
        if path.is_file():
            try:
                archive = zipfile.ZipFile(path)
            except zipfile.BadZipFile as error:
                raise UserError(f"{path} is not a folder, a zip file or an .npz file, or is damaged ({error})") from error
            hidden = ("__MACOSX", ".")
            found = sorted(name for name in archive.namelist() if not any(part.startswith(hidden) for part in Path(name).parts))
        else:
            found = files_under(path).names
        names = [name for name in found if name.lower().endswith(ENDINGS)][:count]
        if not names:
            raise UserError(f"{path} holds no image files ({', '.join(ENDINGS)})")
        return cls(path, names, archive)

    def content(self, name: str) -> bytes:
        """Returns the bytes of an image file."""
        return (self.path / name).read_bytes() if self.archive is None else self.archive.read(name)


def contents_sha256(path: Path, count: int | None = None) -> str:
    """Returns a checksum of the first `count` images of a folder or zip file: of their bytes, in the order of their names."""
    folder = ImageFolder.open(path, count)
    try:
        digests = [hashlib.sha256(folder.content(name)).hexdigest() for name in folder.names]
    except (zipfile.BadZipFile, RuntimeError) as error:  # RuntimeError: it wants a password
        raise UserError(f"{path} cannot be read ({error})") from error
    return hashlib.sha256("".join(digests).encode()).hexdigest()
