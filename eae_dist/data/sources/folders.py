"""Folders of images, with folders for splits and classes."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

import numpy as np

from eae_dist.data.image_files import ENDINGS, ImageFiles, checked, files_under, how_read, keys_of, left_out, what_was_done
from eae_dist.data.pixels import Fit, Rules
from eae_dist.data.sources.samples import Samples, Source, with_held_out_splits
from eae_dist.data.split_names import SPLITS, looks_like_split, split_called
from eae_dist.errors import UserError

WAYS = "--splits train=FOLDER,test=FOLDER names the splits, --classes makes every folder a class"


def imagefolder(
    path: Path, fit: Fit, rules: Rules, skip_bad: bool, workers: int, classes: bool, splits: dict[str, str] | None
) -> Source:
    """Any folder of images; its folders train/, validation/ and test/, or by other usual names, are splits, others classes."""
    names, hidden, folders = files_under(path)
    layout = Layout.given(path, splits, folders) if splits else Layout.found(path, names, folders, classes)
    place = {name: its for name in names if (its := layout.place(name))}  # (split, parts below its folder)
    strays = [name for name in names if name not in place]
    inside = list(place)
    shapes, bad, found = checked(ImageFiles([str(path / name) for name in inside], rules, fit), workers)
    if not splits:
        bad |= {str(path / name): f"outside of {layout.named('and')}" for name in strays}
    notes = layout.notes + left_out(bad, len(names) if not splits else len(inside), skip_bad)
    if splits and strays:
        notes += (f"{len(strays):,} files outside of {layout.named('and')} were not looked at",)
    if not shapes:
        raise UserError(f"{path} holds no usable image ({len(bad)} other and {hidden} hidden files)")
    names = [name for name in inside if str(path / name) not in bad]
    for name, shape in zip(names, shapes, strict=True):
        if shape[:2] != shapes[0][:2]:
            one, other = (f"{n} is {s[1]}x{s[0]}" for n, s in ((names[0], shapes[0]), (name, shape)))
            raise UserError(f"{one}, {other} (width x height); all must have one size: give --size N to resize them")
    channels = rules.channels or (3 if found["color"] else 1)
    rules = replace(rules, channels=channels)
    files = ImageFiles([str(path / name) for name in names], rules, fit)

    # train/cat/1.png has split train and class cat; train/1.png has no class. Without splits, cat/1.png has class cat.
    inner = [place[name][1] for name in names]
    class_of = [parts[0] if len(parts) > 1 else None for parts in inner]
    with_images = {name for name in class_of if name is not None}
    empty = layout.class_folders(folders) - with_images if with_images else set()
    all_classes = sorted(with_images | empty)
    number = {name: label for label, name in enumerate(all_classes)} | {None: -1}
    samples = Samples(files, np.array([number[name] for name in class_of], dtype=np.int64), keys_of(names))
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(place[name][0], []).append(row)
    parts, how = with_held_out_splits({split: samples[np.array(here)] for split, here in rows.items()})
    if empty:
        notes += (f"classes without an image, which keep their numbers: {listed(empty)}",)
    in_train = {class_of[row] for row in rows["train"]}
    if unseen := with_images - in_train:
        notes += (f"classes without an image in train: {listed(unseen)}",)
    if hidden:
        notes += (f"{hidden:,} hidden files were not looked at",)
    done = what_was_done(found, rules)
    return Source(
        name=path.resolve().name,
        splits=parts,
        classes=all_classes,
        origin=f"the image folder {path.resolve().name}",
        license="not stated",
        preprocessing="; ".join([how_read(channels, fit), *done, how]),
        notes=notes,
    )


@dataclass(frozen=True)
class Layout:
    """Which folders are splits: folder (relative, with / between its parts) -> split; ".": all images below it are train's."""

    folders: dict[str, str]
    notes: tuple[str, ...] = ()

    @classmethod
    def given(cls, path: Path, splits: dict[str, str], folders: Iterable[str]) -> "Layout":
        """Returns the layout that the user named, split -> folder. Raises ValueError for a folder that is not there."""
        known = set(folders)
        named = {PurePath(folder).as_posix(): split for split, folder in splits.items()}
        for folder in named:
            if folder not in known:
                raise UserError(f"--splits names {folder}, which is not a folder in {path}")
            if any(other != folder and PurePath(other).is_relative_to(folder) for other in named) or len(named) < len(splits):
                raise UserError(f"--splits names {folder} and folders in it; splits cannot hold each other")
        return cls(named)

    @classmethod
    def found(cls, path: Path, names: Iterable[str], folders: Iterable[str], classes: bool) -> "Layout":
        """Returns the layout by the usual names. Raises ValueError if it is not clear which folders are splits, with advice."""
        if classes:
            return cls({".": "train"})
        children: dict[str, list[str]] = {}
        for folder in sorted(folders):
            children.setdefault(str(PurePath(folder).parent), []).append(PurePath(folder).name)
        with_images = {str(parent) for name in names if name.lower().endswith(ENDINGS) for parent in PurePath(name).parents}
        # A folder around all splits is passed through, as photos/ in photos/train and photos/test.
        base, names_here = ".", children.get(".", [])
        while len(names_here) == 1 and not split_called(names_here[0]) and not _has_images(names, base):
            base = (PurePath(base) / names_here[0]).as_posix()
            names_here = children.get(base, [])
        if not any(split_called(name) for name in names_here):
            base, names_here = ".", children.get(".", [])
        called = {name: split for name in names_here if (split := split_called(name))}
        prefix = "" if base == "." else f"{base}/"
        if not called:
            if alike := [name for name in names_here if looks_like_split(name) and name in with_images]:
                raise UserError(f"{path}: the folders {listed(alike)} look like splits, and would become classes; {WAYS}")
            inner = [f"{name}/{child}" for name in names_here for child in children.get(name, []) if split_called(child)]
            if inner:
                raise UserError(f"{path}: the folders {listed(inner)} look like splits inside of classes; {WAYS}")
            return cls({".": "train"})
        if others := [name for name in names_here if name not in called and prefix + name in with_images]:
            raise UserError(
                f"{path}/{prefix}: some folders have names of splits ({listed(called)}), others do not ({listed(others)}); {WAYS}"
            )
        for split in SPLITS:
            if len(same := [f"{name}/" for name in called if called[name] == split]) > 1:
                raise UserError(f"{path} has both {' and '.join(same)}, which mean {split}; keep one, or name it: {WAYS}")
        if "train" not in called.values():
            raise UserError(f"{path} has {listed(called)} and no folder for train; {WAYS}")
        inner = [f"{prefix}{name}/{child}" for name in called for child in children.get(prefix + name, []) if split_called(child)]
        if inner:
            raise UserError(f"{path}: folders inside of a split have names of splits ({listed(inner)}); {WAYS}")
        said = ", ".join(f"{prefix}{name}/ is {split}" for name, split in called.items())
        plain = all(prefix + name == split for name, split in called.items())
        return cls(
            {prefix + name: split for name, split in called.items()}, () if plain else (f"splits by their folders: {said}",)
        )

    def place(self, name: str) -> tuple[str, tuple[str, ...]] | None:
        """Returns the split of a file and the parts of its path below the split's folder; None outside of all splits."""
        for folder, split in self.folders.items():
            if folder == "." or PurePath(name).is_relative_to(folder):
                return split, PurePath(name).relative_to(folder).parts
        return None

    def class_folders(self, folders: Iterable[str]) -> set[str]:
        """Returns the names of the folders of classes, empty ones included."""
        places = (self.place(f"{folder}/.") for folder in folders)
        return {place[1][0] for place in places if place is not None and len(place[1]) == 1}

    def named(self, word: str) -> str:
        """Returns the folders in a sentence."""
        *most, last = (f"{folder}/" for folder in self.folders)
        return f"{', '.join(most)} {word} {last}" if most else last


def _has_images(names: Iterable[str], folder: str) -> bool:
    return any(name.lower().endswith(ENDINGS) and str(PurePath(name).parent) == folder for name in names)


def listed(names: Iterable[str]) -> str:
    """Returns at most five names in order, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")
