"""Image files in folders: listing them, reading them by the rules of `pixels.py`, and reporting unusable files."""

import os
import re
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, NoReturn, overload

import numpy as np
from tqdm import tqdm

from eae_dist.data.pixels import AS_THEY_ARE, TRAITS, WHOLE, Fit, Reading, Rules, read_pixels
from eae_dist.distributed.processes import run_tasks
from eae_dist.errors import UserError, UserFileError

ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
MOST_KINDS = 5  # of damage that one line of an error shows


@dataclass(frozen=True)
class ImageFiles:
    """A sequence of images, uint8 [h, w] (gray) or [h, w, 3]; each file is read by the rules and fitted when it is accessed."""

    paths: list[str]
    rules: Rules = AS_THEY_ARE
    fit: Fit = WHOLE

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, i: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, i: np.ndarray) -> "ImageFiles": ...
    def __getitem__(self, i: "int | np.ndarray") -> "np.ndarray | ImageFiles":
        if isinstance(i, np.ndarray):
            return replace(self, paths=[self.paths[row] for row in i])
        return self.fit(read_image(self.paths[i], self.rules).pixels)

    @property
    def channels(self) -> int | None:
        """The channels of all images, None if they are those of the files."""
        return self.rules.channels


def read_image(path: str, rules: Rules = AS_THEY_ARE) -> Reading:
    """Reads one image file by the rules. Raises ValueError for a bad file."""
    if not os.path.isfile(path):  # reading a pipe would block
        raise UserError("not a regular file" if os.path.lexists(path) else "missing")
    return read_pixels(path, rules)


def how_read(channels: int, fit: Fit) -> str:
    """Returns a description of what is done to image files, for the index."""
    color = "RGB" if channels == 3 else "gray (L)"
    return ", ".join(["EXIF orientation applied", "transparency on white", color, *([str(fit)] if str(fit) else [])])


def what_was_done(found: Counter, rules: Rules) -> tuple[str, ...]:
    """Returns sentences about the images that the rules changed, and about a mixture of gray and color.

    found: how many files have each of TRAITS, and how many are "gray" and "color". rules: those that were applied to all.
    """
    said = []
    for trait, how in TRAITS.items():
        if found[trait]:
            scale = " so that {:g} is 0 and {:g} is 255".format(*rules.scale) if trait == "deep" and rules.scale else ""
            said.append(f"{found[trait]:,} images {how}{scale}")
    if found["gray"] and found["color"]:
        read, other = ("RGB", "--channels 1 for gray") if rules.channels == 3 else ("gray", "--channels 3 for RGB")
        said.append(f"{found['gray']:,} gray and {found['color']:,} color images are mixed: all are read as {read} ({other})")
    return tuple(said)


class Listed(NamedTuple):
    """The files and folders under a folder, relative to it and sorted; hidden files (.name) are left out and counted."""

    names: list[str]
    hidden: int
    folders: list[str]


def files_under(path: Path) -> Listed:
    """Returns every file and folder under a folder."""
    if not path.is_dir():
        raise UserFileError(f"{path} is not a folder; give a folder of images")
    names, folders, hidden, seen = [], [], 0, set()
    for folder, _, files in os.walk(path, onerror=_raise, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            raise UserError(f"{folder} is a link to {real}, which is in {path} already; remove the link")
        seen.add(real)
        here = Path(os.path.relpath(folder, path))
        shown = not any(part.startswith(".") for part in here.parts)
        folders += [str(here)] if shown and here.parts else []
        for file in files:
            if shown and not file.startswith("."):
                names.append(str(here / file))
            else:
                hidden += 1
    return Listed(sorted(names), hidden, sorted(folders))


def _raise(error: OSError) -> NoReturn:
    raise error


class Checked(NamedTuple):
    """What `checked` found. shapes: of the good files in order. bad: path -> reason.

    found: how many files have each of TRAITS, are "gray" and are in "color".
    """

    shapes: list[tuple[int, ...]]
    bad: dict[str, str]
    found: Counter


def checked(files: ImageFiles, workers: int) -> Checked:
    """Reads every file once."""
    chunk = 64
    chunks = (files[np.arange(start, min(start + chunk, len(files)))] for start in range(0, len(files), chunk))
    total = Checked([], {}, Counter())
    with (
        closing(run_tasks(_checked_here, chunks, min(workers, -(-len(files) // chunk) or 1))) as results,
        tqdm(total=len(files), desc="checking", unit=" images", disable=None) as progress,
    ):
        for part in results:
            total.shapes.extend(part.shapes)
            total.bad.update(part.bad)
            total.found.update(part.found)
            progress.update(len(part.shapes) + len(part.bad))
    return total


def _checked_here(files: ImageFiles) -> Checked:
    here = Checked([], {}, Counter())
    for path in files.paths:
        try:
            reading = read_image(path, files.rules)
            here.shapes.append(files.fit(reading.pixels).shape)
            here.found.update([*reading.traits, "gray" if reading.depth == 1 else "color"])
        except ValueError as error:
            here.bad[path] = str(error)
    return here


def left_out(bad: dict[str, str], total: int, skip_bad: bool, what: str = "files") -> tuple[str, ...]:
    """Returns a summary line and one line per bad file. Raises ValueError for bad files if skip_bad is False."""
    if not bad:
        return ()
    said = f"{len(bad):,} of {total:,} {what} are not usable images"
    if not skip_bad:
        raise UserError(f"{said}: {kinds_of_damage(bad)}; repair or remove them, or skip and list them with --skip-bad")
    return (f"left out: {said}:", *(f"  {name} ({bad[name]})" for name in sorted(bad)))


def kinds_of_damage(bad: dict[str, str]) -> str:
    """Returns the reasons with the most files, each with its number and its first file; bad: file -> reason."""
    kinds: dict[str, list[str]] = {}
    for name in sorted(bad):
        kinds.setdefault(re.sub(r"[0-9]+", "0", bad[name]), []).append(name)
    ordered = sorted(kinds.values(), key=len, reverse=True)
    several = [
        f"{f'{len(names):,} like ' if len(names) > 1 else ''}{names[0]} ({bad[names[0]]})" for names in ordered[:MOST_KINDS]
    ]
    if more := ordered[MOST_KINDS:]:
        several.append(f"{sum(map(len, more)):,} more of {len(more)} other kinds")
    return "; ".join(several)


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
