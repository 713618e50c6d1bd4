"""Damages one file of a folder, or two, as a seed says: what disks, interrupted copies and hands do to files.

python tests/damage.py FOLDER SEED
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

OTHERS = (None, [], {}, True, 3, -1, 1.5, "x", "", [None], {"a": None})  # values of other types in JSON


@dataclass(frozen=True)
class Damage:
    """What was done, and the paths in the folder to which it was done."""

    what: str
    paths: tuple[str, ...]


def flip(path: Path, rng: np.random.Generator) -> None:
    """Changes one bit of one byte."""
    content = bytearray(path.read_bytes() or b"\0")
    content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)


def cut(path: Path, rng: np.random.Generator) -> None:
    """Keeps a beginning."""
    os.truncate(path, int(rng.integers(path.stat().st_size + 1)))


def empty(path: Path, rng: np.random.Generator) -> None:
    """Keeps the name alone."""
    os.truncate(path, 0)


def remove(path: Path, rng: np.random.Generator) -> None:
    """Removes the file, or the whole folder that it lies in."""
    path.unlink()


def duplicate(path: Path, rng: np.random.Generator) -> None:
    """Appends the content to itself, or leaves a copy beside it, as of a download that was done twice."""
    if rng.integers(2):
        path.write_bytes(2 * path.read_bytes())
    else:
        shutil.copy(path, path.with_name(f"{path.stem} (1){path.suffix}"))


def retype(path: Path, rng: np.random.Generator) -> None:
    """Puts a value of another type in the place of one in a JSON file, or of all of it; other files get JSON."""
    other = OTHERS[rng.integers(len(OTHERS))]
    try:
        holder = values = json.loads(path.read_text())
    except ValueError:
        path.write_text(json.dumps(other))
        return
    while isinstance(holder, dict | list) and len(holder):
        key = list(holder)[rng.integers(len(holder))] if isinstance(holder, dict) else int(rng.integers(len(holder)))
        if not isinstance(holder[key], dict | list) or not len(holder[key]) or rng.integers(3) == 0:
            holder[key] = other
            break
        holder = holder[key]
    path.write_text(json.dumps(values if rng.integers(5) else other))


def swap(one: Path, other: Path) -> None:
    """Exchanges the names of two files or folders."""
    aside = one.with_name(f"{one.name}.aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


KINDS: dict[str, Callable[[Path, np.random.Generator], None]] = {
    "flip": flip,
    "cut": cut,
    "empty": empty,
    "remove": remove,
    "duplicate": duplicate,
    "retype": retype,
}


def damage(folder: Path, seed: int) -> Damage:
    """Does one random damage to the files in a folder. The same seed does the same to equal folders."""
    rng = np.random.default_rng(seed)
    every = sorted(path for path in folder.rglob("*") if not path.is_symlink() and path.name != ".lock")
    what = [*KINDS, "swap", "remove folder"][rng.integers(len(KINDS) + 2)]
    folders, files = [path for path in every if path.is_dir()], [path for path in every if path.is_file()]
    if what == "remove folder" and folders:
        shutil.rmtree(path := folders[rng.integers(len(folders))])
        return Damage(what, (str(path.relative_to(folder)),))
    one = every[rng.integers(len(every))] if what == "swap" else files[rng.integers(len(files))]
    if what in ("swap", "remove folder"):
        alike = [path for path in every if path != one and path.is_dir() == one.is_dir() and path.parent == one.parent]
        alike = alike or [path for path in files if path != one and path.is_dir() == one.is_dir()]
        if alike:
            swap(one, other := alike[rng.integers(len(alike))])
            return Damage("swap", (str(one.relative_to(folder)), str(other.relative_to(folder))))
        one, what = files[rng.integers(len(files))], "flip"
    if what in ("retype",) and rng.integers(4):  # most files are not JSON
        one = next((path for path in rng.permutation(files) if path.suffix == ".json"), one)
    KINDS[what](one, rng)
    return Damage(what, (str(one.relative_to(folder)),))


if __name__ == "__main__":
    print(damage(Path(sys.argv[1]), int(sys.argv[2])))
