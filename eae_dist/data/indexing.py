"""Writing the index of a folder of tar shards; `shard_index.py` describes the format and reads it, `scanning.py` scans a shard.

write_index             writes the tables of all shards and splits, then `index.json`
build_index             scans existing shards in a folder and writes their index
build_remote_index      does so for shards at an address
"""

import fnmatch
import hashlib
import io
import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import braceexpand
import numpy as np
from tqdm import tqdm

from eae_dist.data.image_files import what_was_done
from eae_dist.data.pixels import AS_THEY_ARE, TRAITS, Rules
from eae_dist.data.remote import Cache, RemoteFolder
from eae_dist.data.scanning import ENCODINGS, ONE_HEADER, ShardScan, bytes_dtype, different_sizes, index_shard, size_text
from eae_dist.data.servers import STORES, checked_address
from eae_dist.data.shard_index import INDEX_VERSION, SHARD_DTYPE, ShardIndex, member_table, plain_name, split_in_name
from eae_dist.data.split_names import SPLITS, looks_like_split, split_called
from eae_dist.data.tars import left_alone, refuse_compressed
from eae_dist.distributed.processes import run_tasks
from eae_dist.errors import UserError, UserFileError
from eae_dist.numerics.atomic_files import replace_file

TAR_NAME = re.compile(r"[^.].*\.(tar|tgz|tar\.(gz|bz2|xz|zst))")
SORTED_BY_CLASS = 0.1  # a class correlation above this is worth a warning
DECODED = 100  # images of each shard that indexing decodes as training does, unless it is told to decode all


def write_index(
    root: Path,
    splits: dict[str, list[ShardScan]],
    *,
    name: str,
    classes: list[str],
    source: str,
    license: str,
    preprocessing: str,
    seed: int | None,
    rules: Rules = AS_THEY_ARE,
    base: str | None = None,
) -> dict:
    """Writes the tables of all shards and then `root/index.json`; returns the content of index.json.

    seed: seed of the order of the samples, None if unknown. rules: how training will read the images; without channels it reads
    them in color if any has color.
    base: the address of the shards, None if they are in the folder of the index.
    Raises ValueError for incompatible shards, before any file is written.
    """
    image = _image_of_all([scan for scans in splits.values() for scan in scans], rules)
    for split, scans in splits.items():
        _refuse_repeated_keys(split, scans)

    info: dict[str, Any] = {
        "version": INDEX_VERSION,
        "name": name,
        "image": image,
        "classes": classes,
        "source": source,
        "license": license,
        "preprocessing": preprocessing,
        "seed": seed,
        **({} if base is None else {"base": base}),
        **({"changed_by_reading": changed} if (changed := changed_by_reading(splits)) else {}),
        "splits": {},
    }
    for split, scans in splits.items():
        table = np.zeros(len(scans), dtype=[("name", bytes_dtype([scan.name for scan in scans])), *SHARD_DTYPE])
        for row, scan in enumerate(scans):
            digest = _write_table(root / member_table(scan.name), scan.members)
            table[row] = (scan.name.encode(), len(scan.members), scan.bytes, scan.sha256, digest)
        info["splits"][split] = {
            "samples": int(table["samples"].sum()),
            "shards": len(table),
            "bytes": int(table["bytes"].sum()),
            "table_sha256": _write_table(root / f"{split}.shards.npy", table),
            "class_correlation": class_correlation([scan.members["label"] for scan in scans]),
        }
    replace_file(root / "index.json", json.dumps(info, indent=2) + "\n")
    return info


def changed_by_reading(splits: dict[str, list[ShardScan]]) -> dict[str, int]:
    """Returns how many images the rules of `pixels.py` change when they are read, by what is done to them (TRAITS)."""
    found = sum((scan.found for scans in splits.values() for scan in scans), Counter[str]())
    return {trait: found[trait] for trait in TRAITS if found[trait]}


def build_index(
    root: Path, split: str | None = None, workers: int = 1, rules: Rules = AS_THEY_ARE, decode: int = DECODED
) -> tuple[dict, list[str]]:
    """Indexes the tar shards in `root`; returns the content of index.json, and notes for the user.

    rules: how training will read the images. decode: the number of images of each shard that are decoded as training does; all
    are read by the rules.
    A shard belongs to the split in its name (train-000000.tar: train); with `split`, all shards belong to that split. The name,
    classes, source, license and preprocessing of an earlier index are kept. Raises ValueError or OSError with advice.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserFileError(f"{root} is not a folder; give the folder that holds the tar shards")
    paths = sorted(path for path in root.iterdir() if TAR_NAME.fullmatch(path.name))
    if not paths:
        raise UserError(f"{root} holds no .tar file; give the folder that holds the tar shards")
    for path in paths:
        refuse_compressed(path)
    split_of = _splits_of([path.name for path in paths], root, split)
    scan_of = partial(index_shard, rules=rules, decode=decode)
    return _index_all(root, scan_of, paths, split_of, workers, rules, decode, name=root.resolve().name)


def build_remote_index(
    pattern: str,
    out: Path,
    cache: Cache,
    split: str | None = None,
    workers: int = 1,
    rules: Rules = AS_THEY_ARE,
    decode: int = DECODED,
) -> tuple[dict, list[str]]:
    """Writes the index of the shards at an address into `out`, as `build_index` does for a folder; the shards stay there.

    pattern: FOLDER/train-{000000..000009}.tar; for S3 also FOLDER/*.tar, or FOLDER for all shards. Each shard is fetched once
    into the cache folder and removed after its scan.
    """
    folder, names = remote_shards(pattern, cache, "--index ")
    split_of = _splits_of(names, folder.base, split)
    out.mkdir(parents=True, exist_ok=True)
    cache.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="indexing-", dir=cache.folder) as aside:
        tasks = [(folder, name, Path(aside)) for name in names]
        scan_of, base = partial(_index_remote_shard, rules=rules, decode=decode), folder.base
        return _index_all(out, scan_of, tasks, split_of, workers, rules, decode, name=base.rpartition("/")[2], base=base)


def remote_shards(pattern: str, cache: Cache, what: str) -> tuple[RemoteFolder, list[str]]:
    """Returns the folder of an address with a pattern, and the sorted names of the matching shards.

    what: the start of an error, the option that the address came with.
    """
    checked_address(re.sub(r"[{},*]", "", pattern), what)
    if pattern.endswith("/") or not pattern.endswith((".tar", "}")):
        pattern = pattern.rstrip("/") + "/*.tar"
    base, _, last = pattern.rpartition("/")
    folder = RemoteFolder(checked_address(base, what), cache)
    try:
        names = list(braceexpand.braceexpand(last))
    except ValueError as error:
        raise UserError(f"{what}{pattern}: the braces do not match; write for example train-{{000000..000009}}.tar") from error
    if any("*" in name for name in names):
        if folder.scheme not in STORES:
            raise UserError(
                f"{what}{pattern}: a web server has no list of its files; name them: {base}/train-{{000000..000009}}.tar"
            )
        found = folder.names()
        names = [name for wanted in names for name in fnmatch.filter(found, wanted)]
    if not names:
        raise UserError(f"{what}{pattern}: there is no such file; give the folder that holds the tar shards")
    return folder, sorted(set(names))


def _index_remote_shard(task: tuple[RemoteFolder, str, Path], rules: Rules, decode: int) -> ShardScan:
    folder, name, aside = task
    path = aside / name
    try:
        with open(path, "wb") as file:
            folder.copy(name, file)
        return index_shard(path, rules, decode)
    except ValueError as error:
        raise UserError(str(error).replace(str(path), folder.place(name))) from error
    finally:
        path.unlink(missing_ok=True)


def _splits_of(names: list[str], root: Path | str, split: str | None) -> dict[str, str]:
    """Returns the split of each shard."""
    if split is not None and not re.fullmatch(r"\w[\w.-]*", split):
        raise UserError(f"--split {split!r} must be a plain name such as train")
    found = {plain_name(root, name): split or split_in_name(name) for name in names}
    split_of = {name: its for name, its in found.items() if its is not None}
    if unknown := [name for name in found if name not in split_of]:
        several = any(looks_like_split(name) for name in names) and len(names) > 1
        change = (
            "rename the files; --split would put all of them into one split"
            if several
            else "name it with --split NAME, or rename it"
        )
        raise UserError(f"{root}/{unknown[0]} has no split in its name (as train-000000.tar has); {change}")
    return split_of


def _index_all(
    root: Path,
    scan_of: Callable,
    tasks: list,
    split_of: dict[str, str],
    workers: int,
    rules: Rules,
    decode: int,
    *,
    name: str,
    base: str | None = None,
) -> tuple[dict, list[str]]:
    """Scans every shard and writes the index into `root`; returns the content of index.json, and notes for the user."""
    splits: dict[str, list[ShardScan]] = {}
    with closing(run_tasks(scan_of, tasks, min(workers, len(tasks)))) as scans:
        for scan in tqdm(scans, total=len(tasks), desc="indexing", unit=" shards", disable=None):
            splits.setdefault(split_of[scan.name], []).append(scan)

    every = [scan for scans in splits.values() for scan in scans]
    ignored = sum((scan.ignored for scan in every), Counter[str]())
    found = sum((scan.found for scan in every), Counter[str]())
    notes, images = [], found["gray"] + found["color"]
    if not images:
        wanted = " ".join(f".{extension}" for extension in ENCODINGS)
        raise UserError(
            f"the shards in {base or root} hold no image ({wanted}); {left_alone(ignored, ENCODINGS) or 'they are empty'}"
        )
    if ignored:
        notes.append(left_alone(ignored, ENCODINGS))
    if any(len(scan.members) > decode for scan in every):
        notes.append(f"the first {decode} images of each shard were decoded as training does; --decode decodes all")
    names = {"name": name, "classes": [], "source": "", "license": "", "preprocessing": "as found in shards"}
    if kept := _names_in_index(root, names):
        notes.append(f"kept from the previous index.json: {', '.join(kept)}")
    info = write_index(root, splits, **(names | kept), seed=None, rules=rules, base=base)
    notes += what_was_done(found, Rules.of(info["image"]))
    if ignored[".json"] and all((scan.members["label"] == -1).all() for scan in every):
        notes.append("no image has a label (.cls); `pack webdataset --label-key json:FIELD` reads labels from .json")
    if len(splits) == 1 and split_called(next(iter(splits))) in (None, "train"):
        notes.append(
            f"all images are in the split {next(iter(splits))}; evaluation wants others: `pack webdataset --split-fractions "
            f"0.8,0.1,0.1` makes {', '.join(SPLITS)}"
        )
    for name, totals in info["splits"].items():
        if (rho := totals["class_correlation"] or 0) > SORTED_BY_CLASS:
            notes.append(
                f"the shards of split {name} are sorted by class (class correlation {rho:.2f}; 0: shuffled, 1: one class a "
                f"shard), which makes batch means drift; `pack webdataset` packs the images again in random order"
            )
    return info, notes


def class_correlation(labels: list[np.ndarray]) -> float | None:
    """Returns how similar the classes within a shard are, compared with the whole split; labels: int64 [n_s] of every shard.

    It is the intraclass correlation of the class indicators (one-way random effects, analysis-of-variance estimate, summed over
    classes). With S shards of n_s samples, n_sc of them of class c, and N = sum n_s, N_c = sum_s n_sc:

        between = (sum n_sc^2 / n_s  -  sum N_c^2 / N) / (S - 1)
        within = (N  -  sum n_sc^2 / n_s) / (N - S)
        n_0 = (N - sum n_s^2 / N) / (S - 1)
        rho = (between - within) / (between + (n_0 - 1) within)

    It is about 0 for shuffled shards, 1 if every shard has one class, and None for fewer than two shards or classes.
    """
    labels = [shard for shard in labels if len(shard)]
    sizes = np.array([len(shard) for shard in labels], dtype=np.float64)
    shards, total = len(sizes), sizes.sum()
    of_class: Counter = Counter()
    alike = 0.0  # sum n_sc^2 / n_s
    for shard in labels:
        classes, counts = np.unique(shard, return_counts=True)
        of_class.update(dict(zip(classes.tolist(), counts.tolist(), strict=True)))
        alike += (counts.astype(np.float64) ** 2).sum() / len(shard)
    if shards < 2 or len(of_class) < 2 or total == shards:
        return None
    between = (alike - sum(count**2 for count in of_class.values()) / total) / (shards - 1)
    within = (total - alike) / (total - shards)
    n_0 = (total - (sizes**2).sum() / total) / (shards - 1)
    return float((between - within) / (between + (n_0 - 1) * within))


def _image_of_all(scans: list[ShardScan], rules: Rules) -> dict:
    """Returns the "image" entry of index.json. Raises ValueError if the shards differ in it."""
    shapes = [(scan, scan.shape) for scan in scans if scan.shape is not None]
    if not shapes:
        raise UserError("there is no image in any shard")
    first, shape = shapes[0]
    for scan, here in shapes:
        if here != shape:
            one, other = (f"{s.first!r} of {s.name} is {size_text(size)}" for s, size in ((first, shape), (scan, here)))
            raise different_sizes(one, other)
        if ("raw" in scan.encodings) != ("raw" in first.encodings):
            raise UserError(f"{first.name} and {scan.name}: raw (.npy) and encoded images cannot be mixed")
        if scan.npy_header != first.npy_header:
            raise UserError(f"{first.name} and {scan.name} have different npy headers; {ONE_HEADER}")
    encodings = frozenset[str]().union(*(scan.encodings for scan, _ in shapes))
    found = frozenset[int]().union(*(scan.channels for scan, _ in shapes))
    if first.npy_header is not None and rules.channels not in (None, max(found)):
        raise UserError(f"raw images (.npy) of {max(found)} channels are read as they are, not with --channels {rules.channels}")
    return {
        "shape": [rules.channels or max(found), *shape],
        "encoding": next(iter(encodings)) if len(encodings) == 1 else "mixed",
        "npy_header": None if first.npy_header is None else first.npy_header.hex(),
        **rules.record(),
    }


def _refuse_repeated_keys(split: str, scans: list[ShardScan]) -> None:
    keys = np.sort(np.concatenate([scan.members["key"] for scan in scans]))
    if len(repeated := keys[1:][keys[1:] == keys[:-1]]):
        holders = [scan.name for scan in scans if (scan.members["key"] == repeated[0]).any()]
        key = repeated[0].decode()
        raise UserError(f"split {split} has the key {key!r} twice ({', '.join(holders)}); keys must be unique")


def _names_in_index(root: Path, names: Iterable[str]) -> dict:
    """Returns the entries `names` of an existing index, so that a new index keeps them."""
    try:
        known = ShardIndex.load(root).info
    except (FileNotFoundError, ValueError):
        return {}
    return {name: known[name] for name in names if name in known}


def _write_table(path: Path, table: np.ndarray) -> str:
    """Writes a table as .npy and returns the file's sha256."""
    data = io.BytesIO()
    np.save(data, table, allow_pickle=False)
    replace_file(path, data.getvalue())
    return hashlib.sha256(data.getvalue()).hexdigest()
