"""Writes a source as shards: tar files in random order with their index, in a folder that appears only when it is complete."""

import fcntl
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm
from webdataset.writer import TarWriter

from eae_dist.data.encoding import EXTENSIONS, Encoding
from eae_dist.data.indexing import write_index
from eae_dist.data.order import permutation
from eae_dist.data.pixels import Rules
from eae_dist.data.scanning import ShardScan, index_shard
from eae_dist.data.sources import SPLITS, Samples, Source
from eae_dist.distributed.processes import run_tasks
from eae_dist.errors import UserError, UserFileError
from eae_dist.numerics.atomic_files import fsync
from eae_dist.numerics.keyed_random import derive_key

LOCK = ".lock"


def pack(source: Source, folder: Path, encoding: Encoding, shard_size: int, seed: int, workers: int) -> dict:
    """Writes a source as shards into `folder`, which must be empty or new. Returns the content of its index.json.

    The bytes do not depend on the number of worker processes.
    """
    plan = shard_plan(source, shard_size, seed)
    splits: dict[str, list[ShardScan]] = {split: [] for split in SPLITS}
    with staging(folder) as root:
        tasks = ((root / name, source.splits[split][rows], encoding) for split, name, rows in plan)
        with (
            closing(run_tasks(write_shard, tasks, min(workers, len(plan)))) as scans,
            tqdm(total=sum(map(len, source.splits.values())), desc="packing", unit=" images", disable=None) as progress,
        ):
            for (split, _, rows), scan in zip(plan, scans, strict=True):
                splits[split].append(scan)
                progress.update(len(rows))
        return write_index(
            root,
            splits,
            name=source.name,
            classes=source.classes,
            source=source.origin,
            license=source.license,
            preprocessing=source.preprocessing,
            seed=seed,
            rules=Rules(source.splits["train"].channels),
        )


def shard_plan(source: Source, shard_size: int, seed: int) -> list[tuple[str, str, np.ndarray]]:
    """Returns split, file name and rows of every shard: a random order, cut into parts whose sizes differ by at most one."""
    plan = []
    for number, split in enumerate(SPLITS):
        if not (samples := len(source.splits[split])):
            raise UserError(f"{source.name} has no usable image for {split}")
        order = permutation(samples, derive_key(seed, number))
        for shard, rows in enumerate(np.array_split(order, -(-samples // shard_size))):
            plan.append((split, f"{split}-{shard:06d}.tar", rows))
    return plan


def write_shard(task: tuple[Path, Samples, Encoding]) -> ShardScan:
    """Writes one tar file, scans it and returns the scan."""
    path, samples, encoding = task
    # No time stamps, so that the same images give the same bytes. PAX, because USTAR names are ASCII and at most 100 long.
    with open(path, "wb") as file, TarWriter(file, encoder=False, mtime=0, format="PAX_FORMAT") as tar:
        for i, key in enumerate(samples.keys):
            try:
                image = samples.images[i]
                data = image if isinstance(image, bytes) else encoding.encode(image)
            except ValueError as error:
                raise UserError(f"the file of sample {key!r} changed while it was packed ({error})") from error
            sample = {"__key__": key, EXTENSIONS[encoding.format]: data}
            if samples.labels[i] >= 0:
                sample["cls"] = str(samples.labels[i]).encode()
            tar.write(sample)
    fsync(path)
    scan = index_shard(path)
    assert scan.members["key"].tolist() == [key.encode() for key in samples.keys], (
        f"{path} does not contain the samples that were written"
    )
    return scan


def free_folder(folder: Path) -> Path:
    """Returns the absolute path of a folder that is empty or does not exist. Raises ValueError for any other."""
    folder = folder.resolve()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give another folder")
    if folder.exists() and any(folder.iterdir()):
        what = "holds a data set already" if (folder / "index.json").exists() else "is not empty"
        raise UserError(f"{folder} {what}; remove it or give another folder")
    return folder


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """Yields the locked folder FOLDER.incomplete. It is renamed to `folder` at the end, or removed after an error."""
    incomplete = folder.with_name(folder.name + ".incomplete")
    try:
        with _locked(incomplete):
            try:
                yield incomplete
                fsync(incomplete)
                os.rename(incomplete, folder)
            except BaseException:
                shutil.rmtree(incomplete, ignore_errors=True)
                raise
            (folder / LOCK).unlink()
            fsync(folder.parent)
    except OSError as error:
        raise UserFileError(f"cannot write {folder}: {error.strerror or error}") from error


@contextmanager
def _locked(incomplete: Path) -> Iterator[None]:
    """Creates the folder, or empties the one that an interrupted pack left, and locks it against other packs."""
    if incomplete.exists() and not (incomplete / LOCK).exists() and any(incomplete.iterdir()):
        raise UserError(f"{incomplete} is in the way and was not created by pack; remove it")
    incomplete.mkdir(parents=True, exist_ok=True)
    with open(incomplete / LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another pack may have finished and renamed the folder after the file was opened.
            ours = os.path.samestat(os.fstat(lock.fileno()), os.stat(incomplete / LOCK))
        except (BlockingIOError, FileNotFoundError):
            ours = False
        if not ours:
            raise UserError(f"another pack is writing {incomplete}; wait for it or give another folder")
        leftovers = [path for path in incomplete.iterdir() if path.name != LOCK]
        for path in leftovers:
            path.unlink()
        if leftovers:
            print(f"removed {len(leftovers)} files that an interrupted pack left in {incomplete}", file=sys.stderr)
        yield
