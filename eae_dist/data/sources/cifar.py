"""CIFAR-10, as its authors, torchvision, Kaggle or fast.ai lay it out."""

import csv
import hashlib
import io
import pickle
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from eae_dist.data.image_files import ENDINGS, ImageFiles, checked, how_read, left_out
from eae_dist.data.pixels import AS_THEY_ARE, Fit, Rules
from eae_dist.data.sources.downloads import downloaded
from eae_dist.data.sources.folders import imagefolder
from eae_dist.data.sources.samples import CACHE, Samples, Source, numbered, with_held_out_splits
from eae_dist.data.split_names import split_called
from eae_dist.errors import UserError

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
BATCHES = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}
FOLDERS = ("cifar-10-batches-py", "cifar-10-batches-bin", ".")
ARCHIVES = ("cifar-10-python.tar.gz", "cifar-10-binary.tar.gz", "cifar-10-python.tar", "cifar-10-binary.tar")
KAGGLE_LABELS = "trainLabels.csv"
RECORD = 1 + 3 * 32 * 32  # bytes of an image in the binary version: its label, then its colors
ALLOWED = {  # all that a batch needs; anything else in a pickle could run programs
    *((module, "_reconstruct") for module in ("numpy.core.multiarray", "numpy._core.multiarray")),
    *((module, "_frombuffer") for module in ("numpy.core.numeric", "numpy._core.numeric")),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


def cifar10(root: Path | None, skip_bad: bool, workers: int, fit: Fit) -> Source:
    """CIFAR-10, 60,000 color images of 32x32: torchvision's download, or in --root its archive, its batches or PNG files."""
    root = root or CACHE
    found = batches_in(root)
    if found is None and (pictures := picture_folder(root)) is not None:
        return from_pictures(pictures, skip_bad, workers, fit)
    if found is None and (listed := kaggle_folder(root)) is not None:
        return from_kaggle(listed, skip_bad, workers, fit)
    if found is None:
        from torchvision.datasets import CIFAR10

        put = (
            f"cifar-10-python.tar.gz, or the folder cifar-10-batches-py in it, or train/CLASS/*.png and test/, or Kaggle's "
            f"{KAGGLE_LABELS} and train/*.png, into {root}"
        )
        downloaded(CIFAR10, root, put, train=True)
        found = batches_in(root)
        assert found is not None  # torchvision has put them there
    place, names, read = found
    if missing := [name for names_of in BATCHES.values() for name in names_of if name not in names]:
        raise UserError(f"{place} lacks {', '.join(missing)}; fetch it again")
    splits, notes = {}, []
    for split, batches in BATCHES.items():
        parts = []
        for batch in batches:
            data = read(names[batch])
            notes += other_file(place, batch, names[batch], data)
            parts.append(batch_arrays(data, names[batch], f"{place}: {names[batch]}"))
        images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        splits[split] = numbered(split, images, labels)
    splits, how = with_held_out_splits(splits)
    return source(splits, f"none; {how}", tuple(notes)).fitted(fit)


def source(splits: dict[str, Samples], preprocessing: str, notes: tuple[str, ...]) -> Source:
    """Returns the source of these splits."""
    return Source(
        name="cifar10",
        splits=splits,
        classes=CLASSES,
        origin="CIFAR-10, https://www.cs.toronto.edu/~kriz/cifar.html",
        license="not stated; to be cited as: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
        preprocessing=preprocessing,
        notes=notes,
    )


def batches_in(root: Path) -> tuple[Path, dict[str, str], Callable[[str], bytes]] | None:
    """Returns where batches lie in a folder, the file of each batch, and how to read a file; None if there are none."""
    wanted = [name for names in BATCHES.values() for name in names]
    for folder in (root / name for name in FOLDERS):
        names = {name: name + end for name in wanted for end in (".bin", "") if (folder / (name + end)).is_file()}
        if names:
            return folder, names, lambda name, folder=folder: (folder / name).read_bytes()
    for archive in (root / name for name in ARCHIVES):
        if archive.is_file():
            try:
                with tarfile.open(archive) as tar:
                    files = ((Path(member.name).name, tar.extractfile(member)) for member in tar if member.isreg())
                    content = {name: file.read() for name, file in files if file is not None}
            except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
                raise UserError(f"{archive} is damaged or truncated ({error}); fetch it again") from error
            names = {name: name + end for name in wanted for end in (".bin", "") if name + end in content}
            return archive, names, content.__getitem__
    return None


def other_file(place: Path, batch: str, name: str, data: bytes) -> list[str]:
    """Returns a note if a batch in Python's format is not the official file."""
    from torchvision.datasets import CIFAR10

    official = dict(tuple(row) for row in (*CIFAR10.train_list, *CIFAR10.test_list)).get(batch)
    if official is None or name != batch or (md5 := hashlib.md5(data, usedforsecurity=False).hexdigest()) == official:
        return []
    return [f"{batch} in {place} is not the official file (md5 {md5}, not {official}); it was read all the same"]


def batch_arrays(data: bytes, name: str, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images uint8 [n, 32, 32, 3] and labels int64 [n] of a batch. Raises ValueError for another content.

    A batch in Python's format is a pickle, of which only arrays, numbers and texts are read.
    """
    if name.endswith(".bin"):
        if not data or len(data) % RECORD:
            raise UserError(f"{where} has {len(data)} bytes, not a multiple of {RECORD}; fetch it again")
        records = np.frombuffer(data, np.uint8).reshape(-1, RECORD)
        pixels, labels = records[:, 1:], records[:, 0]
    else:
        try:
            content = _Batch(io.BytesIO(data), encoding="latin1").load()
            pixels, labels = np.asarray(content["data"]), np.asarray(content["labels"])
        except Exception as error:  # a damaged pickle raises many types
            raise UserError(f"{where} is not a batch of CIFAR-10 ({error}); fetch it again") from error
    n = len(pixels)
    if pixels.dtype != np.uint8 or pixels.shape != (n, RECORD - 1) or labels.shape != (n,) or not n:
        raise UserError(f"{where} holds {pixels.dtype} {list(pixels.shape)} with {list(labels.shape)} labels; fetch it again")
    if labels.min() < 0 or labels.max() >= len(CLASSES):
        raise UserError(f"{where} has labels from {labels.min()} to {labels.max()}, expected 0 to 9; fetch it again")
    return pixels.reshape(n, 3, 32, 32).transpose(0, 2, 3, 1), labels.astype(np.int64)


class _Batch(pickle.Unpickler):
    """Reads arrays, numbers and texts, and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no batch needs")
        return super().find_class(module, name)


def picture_folder(root: Path) -> Path | None:
    """Returns the folder in `root`, or that itself, whose splits have folders with the names of the classes; None without one."""
    for folder in (root, *folders_in(root)):
        splits = [path for path in folders_in(folder) if split_called(path.name) == "train"]
        if any((split / name).is_dir() for split in splits for name in CLASSES):
            return folder
    return None


def folders_in(folder: Path) -> list[Path]:
    """Returns the folders in a folder in order, none if it does not exist."""
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def from_pictures(folder: Path, skip_bad: bool, workers: int, fit: Fit) -> Source:
    """Returns the source of folders of images, with the labels of the official order of classes."""
    found = imagefolder(folder, fit, AS_THEY_ARE, skip_bad, workers, False, None)
    if strange := sorted(set(found.classes) - set(CLASSES)):
        raise UserError(
            f"{folder} has the classes {', '.join(strange[:5])}, which CIFAR-10 has not; `pack imagefolder` takes any"
        )
    official = np.array([*(CLASSES.index(name) for name in found.classes), -1])  # the last is for label -1
    splits = {split: replace(samples, labels=official[samples.labels]) for split, samples in found.splits.items()}
    return source(splits, found.preprocessing, found.notes)


def kaggle_folder(root: Path) -> Path | None:
    """Returns the folder in `root`, or that itself, with Kaggle's list of labels; None without one."""
    return next((folder for folder in (root, *folders_in(root)) if (folder / KAGGLE_LABELS).is_file()), None)


def from_kaggle(folder: Path, skip_bad: bool, workers: int, fit: Fit) -> Source:
    """Returns the source of Kaggle's files: train/1.png, ... and their labels in trainLabels.csv, of which test is a part.

    Kaggle's test/ has no labels, and most images there are not those of CIFAR-10. Raises ValueError for a list or an
    image that cannot be used.
    """
    named = kaggle_labels(folder / KAGGLE_LABELS)
    place = folder / "train"
    if not place.is_dir():
        packed = folder / "train.7z"
        raise UserError(f"{place} is not there; " + (f"unpack {packed}" if packed.is_file() else "it has the images of the list"))
    paths = [place / f"{name}.png" for name in named]
    if missing := [path for path in paths if not path.is_file()]:
        what = f"{len(missing):,} of {len(paths):,} images of {KAGGLE_LABELS} are not there"
        raise UserError(f"{what}, the first of them {missing[0]}; unpack all of train")
    shapes, bad, _ = checked(ImageFiles([str(path) for path in paths], Rules(channels=3), fit), workers)
    lost = left_out(bad, len(paths), skip_bad)
    if len(set(shapes)) > 1:
        raise UserError(f"{place} has images of several sizes, expected 32x32; fetch them again")
    notes = [f"labels are those of {folder / KAGGLE_LABELS}", *lost]
    if others := sum(path.suffix.lower() in ENDINGS and path.stem not in named for path in place.iterdir()):
        notes.append(f"{others:,} images in {place} were left out, as {KAGGLE_LABELS} does not name them")
    if (folder / "test").is_dir():
        notes.append(f"{folder / 'test'} was left out: it has no labels, and images that are not those of CIFAR-10")
    named = {name: label for name, label in named.items() if str(place / f"{name}.png") not in bad}
    files = ImageFiles([str(place / f"{name}.png") for name in named], Rules(channels=3), fit)
    train = Samples(files, np.array(list(named.values())), [f"train/{name}" for name in named])
    splits, how = with_held_out_splits({"train": train})
    return source(splits, f"{how_read(3, fit)}; {how}", tuple(notes))


def kaggle_labels(path: Path) -> dict[str, int]:
    """Returns the label of each image, by its name without .png. Raises ValueError that names an unusable line."""
    named: dict[str, int] = {}
    for number, fields in enumerate(csv.reader(path.read_text(errors="replace").splitlines()), start=1):
        if fields in ([], ["id", "label"]):
            continue
        if len(fields) != 2 or fields[1] not in CLASSES or not fields[0].isalnum() or fields[0] in named:
            got = ",".join(fields)[:60]
            raise UserError(f"{path}, line {number}: got {got!r}, expected a new image and its class, as `1,frog`")
        named[fields[0]] = CLASSES.index(fields[1])
    if not named:
        raise UserError(f"{path} names no image; fetch it again")
    return named
