"""Samples and sources: images with labels and keys, split into train, validation and test."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import ArrayLike

from eae_dist.data.image_files import ImageFiles
from eae_dist.data.pixels import Fit
from eae_dist.data.sources.parts import EncodedImages
from eae_dist.data.split_names import SPLITS
from eae_dist.errors import UserError

SPLIT_SEED = 0  # seed of held-out samples; it does not depend on the seed of the order in the shards
CACHE = Path.home() / ".cache" / "eae_dist"


@dataclass(frozen=True)
class FittedImages:
    """Images in an array, uint8 [n, h, w] or [n, h, w, c]; each is fitted when it is accessed."""

    array: np.ndarray
    fit: Fit

    @overload
    def __getitem__(self, i: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, i: np.ndarray) -> "FittedImages": ...
    def __getitem__(self, i: "int | np.ndarray") -> "np.ndarray | FittedImages":
        return FittedImages(self.array[i], self.fit) if isinstance(i, np.ndarray) else self.fit(self.array[i])

    @property
    def channels(self) -> int:
        """Channels of the images: 1 gray, 3 RGB."""
        return (*self.array.shape, 1)[3]


@dataclass(frozen=True)
class Samples:
    """n samples: images, labels int64 [n], -1 for no label, and n keys.

    images: uint8 [n, h, w] or [n, h, w, c], or a sequence that reads or fits each image, or gives the bytes of its file.
    """

    images: "np.ndarray | ImageFiles | FittedImages | EncodedImages"
    labels: np.ndarray
    keys: list[str]

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def channels(self) -> int | None:
        """Channels of the images: 1 gray, 3 RGB, None as in the files."""
        return (*self.images.shape, 1)[3] if isinstance(self.images, np.ndarray) else self.images.channels

    def __getitem__(self, rows: np.ndarray) -> "Samples":
        return Samples(self.images[rows], self.labels[rows], [self.keys[row] for row in rows])


@dataclass(frozen=True)
class Source:
    """A data set. `splits` has train, validation and test; pack prints the sentences in `notes` and calls `finish` at its end."""

    name: str
    splits: dict[str, Samples]
    classes: list[str]
    origin: str
    license: str
    preprocessing: str
    notes: tuple[str, ...] = ()
    finish: Callable[[], None] = lambda: None

    def fitted(self, fit: Fit) -> "Source":
        """Returns the same source with its arrays cropped, padded and resized. Raises ValueError if an image does not fit."""
        if not str(fit):
            return self
        splits = {}
        for split, one in self.splits.items():
            assert isinstance(one.images, np.ndarray)  # sources of files fit each image themselves
            splits[split] = replace(one, images=(images := FittedImages(one.images, fit)))
            if len(one):
                images[0]
        return replace(self, splits=splits, preprocessing=f"{self.preprocessing}; {fit}")


def numbered(name: str, images: np.ndarray, labels: ArrayLike) -> Samples:
    """Returns samples whose keys contain the row in the original array: train-000042."""
    return Samples(images, np.asarray(labels, dtype=np.int64), [f"{name}-{row:06d}" for row in range(len(images))])


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


def by_fractions(samples: Samples, fractions: tuple[float, float, float]) -> tuple[dict[str, Samples], str]:
    """Returns splits with these fractions of the samples, and a sentence about them. Raises ValueError for too few samples."""
    splits, said, total = {"train": samples}, [], len(samples)
    for split, fraction in (("test", fractions[2]), ("validation", fractions[1])):
        splits["train"], splits[split], how = held_out(splits["train"], max(1, round(total * fraction)))
        said.append(f"{split} is {fraction:g} of all images, {how}")
    return {split: splits[split] for split in SPLITS}, "; ".join(said)
