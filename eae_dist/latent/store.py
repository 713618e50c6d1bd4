"""The latents of a data set on disk, as `python -m eae_dist.encode` writes them:

    manifest.json                the checkpoint and data set of the latents, and the sha256 of every file
    train-000000.latents.npy     float32 [rows, d]: a run of a split's samples, in the order of the shards
    train-000000.labels.npy      int64 [rows], -1 for a sample without a label
    train-000000.keys.npy        bytes [rows]

A part is written atomically, and the manifest after all parts. Until then, `.encoding.json` says which latents are being made,
and a small file beside each finished part has its checksums.
"""

import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from eae_dist.errors import MissingFile, UserError
from eae_dist.numerics.atomic_files import replace_file, sha256_of
from eae_dist.numerics.json_files import check_form, read_json, sealed

VERSION = 1
PART_ROWS = 16_384  # approximate size of a part; a killed encode loses at most one part per rank, and ranks share out parts
FILES = ("latents", "labels", "keys")
ABOUT = {"checkpoint": str, "model_sha256": str, "step": int, "data": str, "data_root": str, "index_sha256": str}
ABOUT |= {"image_shape": list, "batch": int, "d": int}
PART = {"name": str, "rows": int, "sha256": dict}

log = logging.getLogger("eae_dist")


class DamagedLatents(UserError):
    """Files of encoded latents are missing or differ from their checksums."""


@dataclass(frozen=True)
class LatentFolder:
    """A complete folder of latents. `about`: checkpoint, model_sha256, step, data, index_sha256, image_shape, batch, d."""

    root: Path
    about: dict
    parts: dict[str, list[dict]]  # for each split: {"name", "rows", "sha256": {file: ...}}

    @classmethod
    def open(cls, root: str | Path) -> "LatentFolder":
        """Opens a folder of latents.

        Raises FileNotFoundError if there are no latents, or not yet all of them, and DamagedLatents for a bad manifest.
        """
        root = Path(root)
        if not (root / "manifest.json").is_file():
            how = "python -m eae_dist.encode --ckpt RUN --data SHARDS --out"
            unfinished = (
                ": encoding is unfinished; run the same command to continue" if (root / ".encoding.json").is_file() else ""
            )
            raise MissingFile(f"{root} holds no latents (manifest.json){unfinished or f'; make them with `{how} {root}`'}")
        try:
            form = {"version": int, "about": dict, "splits": dict}
            manifest = read_json(root / "manifest.json", form, "encode again into another folder")
            if manifest["version"] != VERSION:
                raise ValueError(f"version {manifest['version']}, this program reads version {VERSION}")
            check_form(manifest["about"], ABOUT)
            for part in (part for parts in manifest["splits"].values() for part in parts):
                check_form(part, PART)
                check_form(part["sha256"], dict.fromkeys(FILES, str))
        except (ValueError, TypeError, AttributeError) as error:
            raise DamagedLatents(f"{root}/manifest.json cannot be read as a manifest of latents: {error}") from error
        return cls(root, manifest["about"], manifest["splits"])

    @property
    def d(self) -> int:
        """The number of latent dimensions."""
        return self.about["d"]

    def rows(self, split: str) -> int:
        """Returns the number of latents of a split. Raises ValueError, which lists the splits, for an unknown split."""
        if split not in self.parts:
            raise UserError(
                f"{self.root} holds no latents of a split {split!r}; it has {', '.join(sorted(self.parts))}; "
                f"name one of these in index.split or index.query_split"
            )
        return sum(part["rows"] for part in self.parts[split])

    def read(self, split: str, what: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Returns rows [start, stop) of a split's latents, labels or keys; they are memory-mapped if one part holds them all.

        The checksums of the parts are verified. Raises DamagedLatents, which names the file.
        """
        stop, found, first = self.rows(split) if stop is None else stop, [], 0
        for part in self.parts[split]:
            after = first + part["rows"]
            if first < stop and start < after:
                found.append(self._map(part, what)[max(start - first, 0) : stop - first])
            first = after
        empty = {"latents": np.empty((0, self.d), np.float32), "labels": np.empty(0, np.int64), "keys": np.empty(0, "S1")}
        return found[0] if len(found) == 1 else np.concatenate([empty[what], *found])

    def _map(self, part: dict, what: str) -> np.ndarray:
        path = self.root / file_name(part["name"], what)
        if not path.is_file():
            raise DamagedLatents(f"{path} is missing; encode again into another folder")
        if _checksum(path) != part["sha256"][what]:
            raise DamagedLatents(f"{path} does not match its checksum; encode again into another folder")
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if array.shape != ((part["rows"], self.d) if what == "latents" else (part["rows"],)):
            raise DamagedLatents(f"{path} has the shape {array.shape}, but the manifest says {part['rows']} rows; encode again")
        return array


@cache
def _checksum(path: Path) -> str:
    """Returns the sha256 of a part's file. It is computed once per process, because several readers use the same file."""
    return sha256_of(path)


def file_name(part: str, what: str) -> str:
    """Returns the name of a part's file of latents, labels or keys."""
    return f"{part}.{what}.npy"


def write_part(root: Path, name: str, latents: np.ndarray, labels: np.ndarray, keys: Sequence[str]) -> None:
    """Writes a part atomically: a part without its description does not count."""
    encoded = np.char.encode(list(keys), "utf-8")
    arrays: list[np.ndarray] = [latents.astype(np.float32, copy=False), labels.astype(np.int64, copy=False), encoded]
    sha256 = {}
    for what, array in zip(FILES, arrays, strict=True):
        file = io.BytesIO()
        np.save(file, array, allow_pickle=False)
        replace_file(path := root / file_name(name, what), file.getvalue())
        sha256[what] = sha256_of(path)
    replace_file(description(root, name), sealed({"name": name, "rows": len(latents), "sha256": sha256}))


def finished_part(root: Path, name: str) -> dict | None:
    """Returns the description of a part, or None if the part is missing or damaged."""
    path = description(root, name)
    if not path.is_file():
        return None
    try:
        part = read_json(path, PART, "the part is encoded again", is_sealed=True)
    except ValueError as error:
        log.warning("%s", error)
        return None
    files = {what: root / file_name(name, what) for what in FILES}
    whole = all(file.is_file() and sha256_of(file) == part["sha256"][what] for what, file in files.items())
    return part if whole else None


def description(root: Path, name: str) -> Path:
    """Returns the path of a part's description."""
    return root / f".{name}.json"
