"""Arrays of images in an .npz file."""

import re
import zipfile
from pathlib import Path

import numpy as np

from eae_dist.data.pixels import scaled_values
from eae_dist.data.sources.samples import Samples, Source, numbered, with_held_out_splits
from eae_dist.data.split_names import WORDS, words_of
from eae_dist.errors import MissingFile, UserError

IMAGES = ("images", "image", "imgs", "img", "x", "data", "pixels", "inputs", "arr_0")
LABELS = ("labels", "label", "y", "targets", "target", "arr_1")
WANTED = "`images` or `train_images` (x_train, train_data, arr_0, ...)"
ROWS = 1000  # images that are scaled at once


def npz(path: Path, scale: tuple[float, float] | None, layout: str | None) -> Source:
    """An .npz file: images [n, h, w] or [n, h, w, c], labels [n]; or train_images, ..., x_test, y_test, or arr_0, arr_1."""
    arrays, left = npz_arrays(path)
    splits: dict[str, Samples] = {}
    said = []
    for split in dict.fromkeys(split for split, _ in arrays):
        if (split, "images") not in arrays:
            left |= {arrays[split, "labels"][0]: f"no images of {split} beside it"}
            continue
        name, images = arrays[split, "images"]
        label_name, labels = arrays.get((split, "labels"), (None, None))
        where = f"{path}: "
        images, labels = (
            checked_images(images, where + name, scale, layout),
            checked_labels(labels, len(images), f"{where}{label_name}"),
        )
        splits[split] = numbered(split if has_split(name) else "image", images, labels)
        said.append(f"{name} as the images of {split}, " + (f"{label_name} as their labels" if label_name else "without labels"))
    if "train" not in splits:
        known = ", ".join([*(name for name, _ in arrays.values()), *left]) or "no arrays"
        raise UserError(f"{path} has no array {WANTED}; it has {known}")
    shapes = {split: samples.images.shape[1:] for split, samples in splits.items() if isinstance(samples.images, np.ndarray)}
    if len(set(shapes.values())) > 1:
        raise UserError(f"{path}: the splits' images differ in shape: {shapes}")
    splits, how = with_held_out_splits(splits)
    notes = [f"read {'; '.join(said)}"]
    if left:
        notes.append(f"left out: {', '.join(f'{name} ({why})' for name, why in left.items())}")
    scaled = "none" if scale is None else "scaled so that {:g} is 0 and {:g} is 255".format(*scale)
    return Source(
        name=path.stem,
        splits=splits,
        classes=[],
        origin=f"the file {path.name}",
        license="not stated",
        preprocessing=f"{scaled}; {how}",
        notes=tuple(notes),
    )


def role_of(name: str) -> tuple[str, str] | None:
    """Returns what an array is by its name, (split, "images" or "labels"), or None: train_images, x_train, ytest, val, arr_0."""
    if name in ("arr_0", "arr_1"):
        return "train", "images" if name == "arr_0" else "labels"
    words = [part for word in words_of(name) for part in re.sub(r"^([xy])(?=train|val|valid|test)", r"\1 ", word).split()]
    splits, rest = [WORDS[word] for word in words if word in WORDS], [word for word in words if word not in (*WORDS, "set")]
    if len(splits) > 1 or len(rest) > 1 or not (splits or rest):
        return None
    kind = "images" if not rest or rest[0] in IMAGES else "labels" if rest[0] in LABELS else None
    return None if kind is None else (splits[0] if splits else "train", kind)


def has_split(name: str) -> bool:
    """True if a split is in the name of an array."""
    return any(word in WORDS or word[1:] in WORDS for word in words_of(name))


def npz_arrays(path: Path) -> tuple[dict[tuple[str, str], tuple[str, np.ndarray]], dict[str, str]]:
    """Reads the arrays whose names say what they are, without unpickling.

    Returns (split, "images" or "labels") -> (name, array), and the names of the other arrays with the reason.
    Raises ValueError for a file that is not an .npz, an array that cannot be read, and two arrays for the same.
    """
    if not path.is_file():
        raise MissingFile(f"{path} is not a file; give an .npz file")
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is not an .npz file (np.savez writes one) or is truncated")
    arrays: dict[tuple[str, str], tuple[str, np.ndarray]] = {}
    left: dict[str, str] = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            for name in file.files:
                if (role := role_of(name)) is None:
                    left[name] = "its name says neither images nor labels"
                    continue
                if role in arrays:
                    raise UserError(f"{arrays[role][0]} and {name} are both {role[1]} of {role[0]}; keep one")
                arrays[role] = (name, file[name])
    except Exception as error:  # zipfile, zlib and numpy raise different types
        raise UserError(f"{path} cannot be read: {error}") from error
    return arrays, left


def checked_images(images: np.ndarray, where: str, scale: tuple[float, float] | None, layout: str | None) -> np.ndarray:
    """Returns images in the form of `Samples`. Raises ValueError that names an unusable array and the option that it needs."""
    found = f"{where} is {images.dtype} {list(images.shape)}"
    if layout == "nchw":
        if images.ndim != 4:
            raise UserError(f"{found}; --layout nchw wants [n, c, h, w]")
        images = images.transpose(0, 2, 3, 1)
    if images.ndim not in (3, 4) or images.shape[3:] not in ((), (1,), (3,)) or not images.size:
        first = images.ndim == 4 and layout is None and images.shape[1] in (1, 3)
        hint = "; --layout nchw reads [n, c, h, w]" if first else ""
        raise UserError(f"{found}; expected uint8 [n, h, w], [n, h, w, 1] or [n, h, w, 3], values 0 to 255{hint}")
    if scale is None:
        if images.dtype != np.uint8:
            hint = "--scale LOW:HIGH says which values become 0 and 255, as --scale 0:1"
            raise UserError(f"{found}; expected uint8, values 0 to 255; {hint}")
        return images
    if images.dtype.kind not in "uif":
        raise UserError(f"{found}; expected numbers")
    try:
        return np.concatenate([scaled_values(images[row : row + ROWS], scale) for row in range(0, len(images), ROWS)])
    except ValueError as error:
        raise UserError(f"{where} has {error}") from error


def checked_labels(labels: np.ndarray | None, n: int, where: str) -> np.ndarray:
    """Returns labels int64 [n], -1 where there are none. Raises ValueError that names an unusable array."""
    if labels is None:
        return np.full(n, -1)
    if labels.shape not in ((n,), (n, 1)) or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"{where} is {labels.dtype} {list(labels.shape)}; expected integers [{n}], one for each image")
    if labels.min() < -1 or labels.max() >= 2**31:
        raise UserError(f"{where} has values from {labels.min()} to {labels.max()}; expected 0, 1, ..., or -1 for none")
    return labels.reshape(n)
