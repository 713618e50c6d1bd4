"""A latent index on disk: a folder that appears whole, with the checksum of every file.

index.json                the kind, the sizes and the parts, with their checksums
part-000000000000.npy     the rows of a part, float32; its name has the number of the first
part-000000000000.faiss   the FAISS index of these rows, of other kinds than flat

An index is loaded by any number of ranks; each opens some of the parts.
"""

import errno
import itertools
import secrets
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import faiss
import numpy as np

from eae_dist.distributed import from_rank_zero, gather_objects, on_every_rank, on_rank_zero, rank, world_size
from eae_dist.errors import MissingFile, UserError, UserFileError
from eae_dist.latent import gpu_search
from eae_dist.latent.index_part import METRICS, Part
from eae_dist.numerics.atomic_files import fsync, sha256_of
from eae_dist.numerics.json_files import read_json, sealed

VERSION = 1


class DamagedIndex(UserError):
    """Files of a saved index are missing or differ from their checksums."""


def save_parts(path: Path, described: dict, parts: Sequence[Part]) -> None:
    """Writes the folder `path` atomically and replaces an older one. described: what else `index.json` says.

    Call it on every rank with its parts. Raises OSError on every rank if it cannot be written.
    """
    # The names are unique to this save, because another process may save the same index.
    mark = from_rank_zero(secrets.token_hex(8))
    aside, old = (path.with_name(f".{path.name}.{mark}.{what}") for what in ("partial", "old"))
    try:
        with on_rank_zero() as is_rank_zero:
            if is_rank_zero:
                aside.mkdir(parents=True)
        saved = on_every_rank(lambda: [_save_part(part, aside) for part in parts])
        ordered = sorted(itertools.chain(*gather_objects(saved)), key=lambda part: part["start"])
        with on_rank_zero() as is_rank_zero:
            if is_rank_zero:
                (aside / "index.json").write_text(sealed({"version": VERSION} | described | {"parts": ordered}))
                fsync(aside / "index.json")
                fsync(aside)
                _exchange(aside, path, old)
    finally:
        if rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def load_parts(path: Path) -> tuple[dict, list[Part]]:
    """Returns the description of a saved index and the parts of this rank, and verifies their checksums. Call on every rank."""
    described = index_description(path)
    first, stop = (len(described["parts"]) * share // world_size() for share in (rank(), rank() + 1))
    parts = on_every_rank(lambda: opened_parts(path, described, first, stop))
    for part in parts:
        part.on_gpu = gpu_search.copied(part.rows, part.index, part.metric)
    return described, parts


def opened_parts(path: Path, described: dict, first: int = 0, stop: int | None = None) -> list[Part]:
    """Returns parts [first, stop) of a saved index, memory-mapped, and verifies their checksums. Raises DamagedIndex."""
    return [_opened(path, part, described) for part in described["parts"][first:stop]]


def index_description(path: Path) -> dict:
    """Reads the description that `save` wrote. Raises FileNotFoundError if there is none, DamagedIndex if it cannot be read."""
    if not (path / "index.json").is_file():
        raise MissingFile(f"{path} holds no index (index.json); LatentIndex.save writes one")
    try:
        form = {"version": int, "n": int, "d": int, "kind": str, "reason": str, "oversampling": int, "about": dict, "parts": list}
        described = {"metric": "l2"} | read_json(path / "index.json", form, "it can be made again")  # the first ones name none
        if described["version"] != VERSION:
            raise ValueError(f"version {described['version']}, this program reads version {VERSION}")
        if described["metric"] not in METRICS:
            raise ValueError(f"metric {described['metric']!r} is none of {', '.join(METRICS)}")
        names = ("n", "d", "metric", "kind", "reason", "effort", "oversampling", "about", "parts")
        return {name: described[name] for name in names}
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedIndex(f"{path}/index.json cannot be read as an index: {error}") from error


def _save_part(part: Part, folder: Path) -> dict:
    name = f"part-{part.start:012d}"
    try:
        np.save(folder / f"{name}.npy", part.rows)
        if part.index is not None:
            faiss.write_index(part.index, str(folder / f"{name}.faiss"))
    except (OSError, RuntimeError) as error:  # FAISS raises RuntimeError if the disk is full
        raise UserFileError(f"the index in {folder.parent} could not be written: {error}") from error
    files = sorted(path.name for path in folder.glob(f"{name}.*"))
    for file in files:
        fsync(folder / file)
    return {"start": part.start, "rows": len(part.rows), "files": {file: sha256_of(folder / file) for file in files}}


def _exchange(new: Path, path: Path, old: Path) -> None:
    """Renames the folder `new` to `path`, and the folder that was there to `old`; other processes may do so at the same time."""
    while True:
        with suppress(FileNotFoundError):
            path.rename(old)
        try:
            new.rename(path)
            return fsync(path.parent)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                with suppress(OSError):
                    old.rename(path)
                raise
            shutil.rmtree(old, ignore_errors=True)  # another process has put its own folder there


def _opened(folder: Path, part: dict, described: dict) -> Part:
    for name, sha256 in part["files"].items():
        if not (folder / Path(name).name).is_file():
            raise DamagedIndex(f"the index {folder} is damaged: {name} is missing")
        if sha256_of(folder / Path(name).name) != sha256:
            raise DamagedIndex(f"the index {folder} is damaged: {name} does not match its checksum")
    names = {Path(name).suffix: folder / Path(name).name for name in part["files"]}
    rows = np.load(names[".npy"], mmap_mode="r", allow_pickle=False)
    if rows.shape != (part["rows"], described["d"]) or rows.dtype != np.float32:
        raise DamagedIndex(f"the index {folder} is damaged: {names['.npy'].name} holds {rows.dtype} {rows.shape}")
    # FAISS has two ways to map files. The older one maps only the cells of an index, and would read a graph into memory.
    mapped = faiss.IO_FLAG_MMAP_IFC if described["kind"] == "hnsw" else faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY
    index = faiss.read_index(str(names[".faiss"]), mapped) if ".faiss" in names else None
    return Part(part["start"], rows, index, metric=METRICS[described["metric"]])
