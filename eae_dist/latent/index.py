"""Nearest neighbors among latents, with FAISS. An index is spread over all ranks and their GPUs, and is searched as one.

    flat      exact: compares each query with every row
    ivf_flat  compares each query with the rows of the nearest cells of a k-means
    ivf_pq    as ivf_flat, on codes of d/2 bytes per row; compares the best candidates again with the rows, read from disk
    hnsw      follows the edges of a graph; slow to build, fastest for single queries

Each rank indexes its own rows. Queries go to all ranks, and each rank answers with candidates. FAISS searches in the product form
of the distance, which loses precision for close pairs, so the distances of the candidates are computed again by direct
difference. For flat, the result of a search depends only on the queries and the rows, bit for bit, and not on which rank holds a
row. For the other kinds it also depends on which rows each rank holds.
n: rows of all ranks, d: dimensions, m: queries.
"""

import errno
import itertools
import logging
import os
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeVar

import faiss
import numpy as np
import torch

from eae_dist.distributed import (
    exchange_rows,
    from_rank_zero,
    gather_objects,
    gather_padded,
    message_device,
    on_every_rank,
    on_rank_zero,
    rank,
    row_counts,
    world_size,
)
from eae_dist.errors import MissingFile, UserError, UserFileError
from eae_dist.latent import gpu_search
from eae_dist.numerics.atomic_files import fsync, sha256_of
from eae_dist.numerics.json_files import read_json, sealed

log = logging.getLogger("eae_dist")

Array = TypeVar("Array", np.ndarray, torch.Tensor)
KINDS = ("flat", "ivf_flat", "ivf_pq", "hnsw")
EFFORT = {"ivf_flat": "nprobe", "ivf_pq": "nprobe", "hnsw": "efSearch"}  # the FAISS parameter that trades time for recall
EXACT_UNTIL = 100_000  # rows; an exact search of 1,000 queries, d = 64, takes a fifth of a second on one core
SPARE = 8  # candidates beyond k; with them the first search usually satisfies `_rounding`
GRAPH = 32  # edges per row in hnsw
TRAINING = 64  # rows per cell that k-means is trained on
FEWEST_FOR_CODES = 9_984  # rows, 39 for each of the 256 values of a byte; FAISS warns if there are fewer
BY_PRODUCTS = 1_000  # queries times dimensions from which FAISS compares in matrix products
BLOCK = 65_536  # rows added, or queries of all ranks searched, at once
CANDIDATES = 2**23  # candidates compared at once; they take about half a gigabyte
LONGEST = 2.0**62  # the norm from which squared distances may not be finite in float32
VERSION = 1


class DamagedIndex(UserError):
    """Files of a saved index are missing or differ from their checksums."""


@dataclass
class Part:
    """Rows [start, start + len(rows)) of the whole index, float32, and the FAISS indexes that search them.

    Without `index`, queries are compared with the rows one by one. `on_gpu`: a copy that is searched instead where it can be.
    """

    start: int
    rows: np.ndarray
    index: faiss.Index | None = None
    on_gpu: faiss.Index | None = None

    @cached_property
    def longest(self) -> float:
        """The largest norm of a row."""
        return float(np.sqrt(np.einsum("nd,nd->n", self.rows, self.rows).max()))


class Choice(NamedTuple):
    """The kind of an index, and the reason for it."""

    kind: str
    reason: str


class LatentIndex:
    """An index of the latents of all ranks. Make one with `build` or `load`.

    `n`: rows; `d`: dimensions; `kind`, and `reason`: why it was chosen; `effort`: nprobe or efSearch, None for flat; `about`: the
    values that `build` was given.
    """

    def __init__(self, parts: list[Part], n: int, d: int, choice: Choice, effort: int | None, oversampling: int, about: dict):
        self._parts, self.n, self.d, self.about = parts, n, d, about
        self.kind, self.reason = choice
        self.effort, self.oversampling = effort, oversampling
        # FAISS 1.15 compares up to 128,000 / d queries one by one. From 16 queries on, products take a quarter of that time.
        faiss.cvar.distance_compute_blas_threshold = min(faiss.cvar.distance_compute_blas_threshold, BY_PRODUCTS)

    @classmethod
    def build(
        cls,
        latents: np.ndarray | torch.Tensor,
        kind: str = "auto",
        *,
        recall: float = 0.95,
        memory: int | None = None,
        seed: int = 0,
        about: dict | None = None,
    ) -> "LatentIndex":
        """Builds an index of this rank's rows [b, d] together with those of the other ranks.

        The ids number all rows in rank order.
        kind: one of KINDS, or auto. auto chooses by the rows, the dimensions, `memory` (bytes that a rank may use; default: half
        of the machine's memory, shared by its ranks) and `recall` (the share of the neighbors that a search must find). seed:
        chooses the rows that the quantizers are trained on. about: plain values that are stored with the index. Call it on every
        rank; b may differ and be 0.
        Raises ValueError on every rank for a wrong shape, values that are not finite, rows with a norm of LONGEST or more, no
        rows, an unknown kind, or too few rows.
        """
        rows, problem = _float_rows(latents, "latents")
        every = gather_objects((len(rows), rows.shape[1] if rows.ndim == 2 else 0, problem))
        for who, (_, _, wrong) in enumerate(every):
            if wrong:
                raise UserError(f"{wrong} (rank {who})" if len(every) > 1 else wrong)
        counts, widths = [count for count, _, _ in every], {width for _, width, _ in every}
        if len(widths) > 1 or sum(counts) == 0:
            raise ValueError(
                f"an index needs latents [b, d] of the same d on every rank, got {counts} rows, d of {sorted(widths)}"
            )
        if not 0 < recall <= 1:
            raise UserError(f"recall={recall} must lie in (0, 1]")
        d = widths.pop()
        choice = Choice(kind, "it was asked for") if kind != "auto" else choose(max(counts), d, recall, _memory(memory))
        if choice.kind not in KINDS:
            raise UserError(f"kind={kind} is unknown; it is auto or one of {', '.join(KINDS)}")
        fewest = min(count for count in counts if count)
        if choice.kind == "ivf_pq" and fewest < FEWEST_FOR_CODES:
            raise UserError(f"kind=ivf_pq needs {FEWEST_FOR_CODES:,} latents on a rank, got {fewest:,}; take flat")
        part = Part(sum(counts[: rank()]), rows)
        if len(rows) and choice.kind != "flat":
            part.index = _trained(choice.kind, part, np.random.default_rng(seed))
            for start in range(0, len(rows), BLOCK):
                part.index.add(np.ascontiguousarray(rows[start : start + BLOCK]))
        effort = {"ivf_flat": 8, "ivf_pq": 8, "hnsw": 32}.get(choice.kind)
        part.on_gpu = gpu_search.copied(rows, part.index) if len(rows) else None
        index = cls([part] if len(rows) else [], sum(counts), d, choice, None, 4, about or {})
        index._set_effort(effort)
        return index

    def search(self, queries: Array, k: int) -> tuple[Array, Array]:
        """Returns the k nearest rows of each of this rank's queries [m, d]: squared distances float32 and ids int64, two [m, k].

        The nearest row comes first; equally near rows are ordered by id. The results are arrays or tensors, as the queries are.
        Call it on every rank; m may differ and be 0. Raises ValueError on every rank for a wrong shape, for queries that are not
        finite or have a norm of LONGEST or more, and unless 1 <= k <= n.
        """
        asked, problem = _float_rows(queries, "queries", self.d)
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or not 1 <= k <= self.n:
            problem = problem or f"k={k} must be a whole number from 1 to the {self.n:,} rows of the index"
        every = gather_objects((len(asked), k, problem))
        for _, theirs, wrong in every:
            if wrong or theirs != k:
                raise UserError(wrong or f"ranks search for different numbers of neighbors, {[e[1] for e in every]}")
        longest = max(count for count, _, _ in every)
        found = [(np.empty((0, k), np.float32), np.empty((0, k), np.int64))]
        at_once = max(BLOCK // world_size(), 1)  # of a rank: each searches for the queries of all
        for start in range(0, longest, at_once):
            found.append(self._search_everywhere(asked[start : start + at_once], int(k)))
        squared, ids = (np.concatenate(blocks) for blocks in zip(*found, strict=True))
        if isinstance(queries, torch.Tensor):
            return torch.from_numpy(squared).to(queries.device), torch.from_numpy(ids).to(queries.device)
        return squared, ids

    def tune(self, queries: Array, recall: float = 0.95, k: int = 10) -> float:
        """Sets the lowest effort that finds the share `recall` of the k nearest rows, and returns the share that it finds.

        queries: [m, d] of this rank, which must not be rows of the index. The share is measured against an exact search. Call it
        on every rank. Raises ValueError as `search` does, and if no rank has queries.
        """
        k = min(k, self.n)
        exact = LatentIndex([Part(p.start, p.rows) for p in self._parts], self.n, self.d, Choice("flat", ""), None, 1, {})
        furthest = exact.search(queries, k)[0][:, -1:]
        if not (counts := sum(gather_objects(len(furthest)))):
            raise UserError("tuning an index needs queries, got none on any rank")

        def found(effort: int) -> float:
            self._set_effort(effort)
            return sum(gather_objects(float((self.search(queries, k)[0] <= furthest).sum()))) / (counts * k)

        if self.kind == "flat":
            return found(1)
        indexes = [part.index for part in self._parts if part.index is not None]
        most = max(gather_objects(max((_most_effort(index, self.kind) for index in indexes), default=1)))
        while True:
            high = 1
            while (share := found(high)) < recall and high < most:
                high = min(2 * high, most)
            if share >= recall or self.kind != "ivf_pq" or self.oversampling >= 64:
                break
            self.oversampling *= 4  # the codes are too coarse for this number of candidates
        low = high // 2  # an effort that is too low, or 0
        while high - low > max(1, low // 8) and share >= recall:
            middle = (low + high) // 2
            low, high = (low, middle) if found(middle) >= recall else (middle, high)
        share = found(high)
        if high > gpu_search.MOST and any(part.on_gpu is not None for part in self._parts):
            log.info("the CPU searches the latents: nprobe=%d, of which a GPU takes %d at most", high, gpu_search.MOST)
        if share < recall:
            log.warning("recall=%s is not reached: %s finds %.4f at most; kind=flat is exact", recall, self.kind, share)
        return share

    def save(self, path: str | Path) -> None:
        """Writes the folder `path` atomically and replaces an older one; `load` opens it on any number of ranks.

        Call it on every rank. Raises OSError on every rank if it cannot be written.
        """
        path = Path(path)
        # The names are unique to this save, because another process may save the same index.
        mark = from_rank_zero(secrets.token_hex(8))
        aside, old = (path.with_name(f".{path.name}.{mark}.{what}") for what in ("partial", "old"))
        try:
            with on_rank_zero() as is_rank_zero:
                if is_rank_zero:
                    aside.mkdir(parents=True)
            saved = on_every_rank(lambda: [self._save_part(part, aside) for part in self._parts])
            ordered = sorted(itertools.chain(*gather_objects(saved)), key=lambda part: part["start"])
            with on_rank_zero() as is_rank_zero:
                if is_rank_zero:
                    described = {"version": VERSION, "n": self.n, "d": self.d, "kind": self.kind, "reason": self.reason}
                    described |= {"effort": self.effort, "oversampling": self.oversampling, "about": self.about}
                    (aside / "index.json").write_text(sealed(described | {"parts": ordered}))
                    fsync(aside / "index.json")
                    fsync(aside)
                    _exchange(aside, path, old)
        finally:
            if rank() == 0:
                shutil.rmtree(aside, ignore_errors=True)
                shutil.rmtree(old, ignore_errors=True)

    @classmethod
    def load(cls, path: str | Path) -> "LatentIndex":
        """Opens a saved index and verifies its checksums. Call it on every rank.

        Files are memory-mapped, except for the codes of a CPU index. Raises FileNotFoundError if there is no index. Raises
        DamagedIndex, which names the file, on the rank of a damaged file, and OSError on the other ranks.
        """
        path = Path(path)
        described = index_description(path)
        of_parts, d = described["parts"], described["d"]
        first, stop = (len(of_parts) * share // world_size() for share in (rank(), rank() + 1))
        loaded = on_every_rank(lambda: [_load_part(path, part, d, described["kind"]) for part in of_parts[first:stop]])
        choice = Choice(described["kind"], described["reason"])
        index = cls(loaded, described["n"], d, choice, None, described["oversampling"], described["about"])
        index._set_effort(described["effort"])
        return index

    def _set_effort(self, effort: int | None) -> None:
        self.effort = effort if self.kind in EFFORT else None
        if self.effort is not None:
            for part in self._parts:
                for index in (part.index, part.on_gpu):
                    if index is not None:
                        space = faiss.GpuParameterSpace() if index is part.on_gpu else faiss.ParameterSpace()
                        space.set_index_parameter(index, EFFORT[self.kind], self.effort)

    def _search_everywhere(self, asked: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Searches the parts of all ranks for this rank's queries; all ranks answer the queries of all ranks together."""
        device = message_device()
        counts = row_counts(len(asked), device)
        everyone = gather_padded(torch.tensor(asked, device=device), counts).cpu().numpy()
        found = [_nearest(part, everyone, min(k, len(part.rows)), self._candidates) for part in self._parts]
        squared, ids = _merged(found, k, len(everyone))
        if world_size() == 1:
            return squared, ids
        # Every rank's answers to this rank's queries, [W, queries, k].
        answers = [exchange_rows(torch.from_numpy(answer).to(device), counts).cpu().numpy() for answer in (squared, ids)]
        return _merged(list(zip(*answers, strict=True)), k, counts[rank()])

    def _candidates(self, part: Part, queries: np.ndarray, count: int) -> np.ndarray:
        """Returns ids within the part of about `count` rows near each query, [m, up to count]; -1 if fewer were found."""
        count = min(count * (self.oversampling if self.kind == "ivf_pq" else 1), len(part.rows))
        if part.on_gpu is not None and max(count, self.effort or 0) <= gpu_search.MOST:
            try:
                return part.on_gpu.search(queries, count)[1]
            except RuntimeError as error:  # usually no memory is left
                log.warning("from here on the CPU searches the latents: FAISS failed on the GPU (%s)", error)
                part.on_gpu = None
        if part.index is None:
            return faiss.knn(queries, part.rows, count)[1]
        return part.index.search(queries, count)[1]

    def _save_part(self, part: Part, folder: Path) -> dict:
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


def index_description(path: Path) -> dict:
    """Reads the description that `save` wrote. Raises FileNotFoundError if there is none, DamagedIndex if it cannot be read."""
    if not (path / "index.json").is_file():
        raise MissingFile(f"{path} holds no index (index.json); LatentIndex.save writes one")
    try:
        form = {"version": int, "n": int, "d": int, "kind": str, "reason": str, "oversampling": int, "about": dict, "parts": list}
        described = read_json(path / "index.json", form, "it can be made again")
        if described["version"] != VERSION:
            raise ValueError(f"version {described['version']}, this program reads version {VERSION}")
        names = ("n", "d", "kind", "reason", "effort", "oversampling", "about", "parts")
        return {name: described[name] for name in names}
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedIndex(f"{path}/index.json cannot be read as an index: {error}") from error


def choose(rows: int, d: int, recall: float, memory: int) -> Choice:
    """Chooses the kind for this many rows per rank, and gives the reason.

    hnsw is never chosen, because it takes by far the longest to build.
    """
    size = f"{rows:,} rows of {d} dimensions a rank"
    if recall == 1:
        return Choice("flat", "a recall of 1 needs an exact search")
    if rows <= EXACT_UNTIL:
        return Choice("flat", f"{size} are few enough to compare with every one, up to {EXACT_UNTIL:,}")
    if (taken := rows * (4 * d + 8)) <= memory:
        return Choice("ivf_flat", f"{size} take {taken:,} bytes, which fit into {memory:,}")
    return Choice("ivf_pq", f"{size} would take {taken:,} bytes, more than {memory:,}; their codes take {rows * (d // 2 + 8):,}")


def _memory(given: int | None) -> int:
    """Returns the bytes that an index may use on each rank. It is rank 0's value, so that all ranks choose the same kind."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    return from_rank_zero(given or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2 // ranks)


def _trained(kind: str, part: Part, generator: np.random.Generator) -> faiss.Index:
    """Returns an empty index whose quantizers are trained on some of the part's rows."""
    m, d = part.rows.shape
    if kind == "hnsw":
        return faiss.index_factory(d, f"HNSW{GRAPH},Flat")
    cells = max(1, min(int(4 * m**0.5), m // 39))
    index = faiss.index_factory(d, f"IVF{cells},Flat" if kind == "ivf_flat" else _coded(part, cells))
    sample = np.sort(generator.choice(m, min(m, max(TRAINING * cells, FEWEST_FOR_CODES)), replace=False))
    index.train(np.ascontiguousarray(part.rows[sample]))
    return index


def _coded(part: Part, cells: int) -> str:
    """Returns the FAISS factory string for codes of half a byte per dimension.

    A CPU is three times as fast with codes that fit into its registers. GPUs do not support these.
    """
    d = part.rows.shape[1]
    return f"IVF{cells},PQ{d}x4fs" if gpu_search.gpu() is None else gpu_search.coded(d, cells, part.longest)


def _most_effort(index: faiss.Index, kind: str) -> int:
    return index.ntotal if kind == "hnsw" else faiss.extract_index_ivf(index).nlist


def _nearest(part: Part, queries: np.ndarray, k: int, candidates: Callable) -> tuple[np.ndarray, np.ndarray]:
    """Returns the k nearest rows of a part, two [m, k]. It takes more candidates until no nearest row can be missing."""
    squared, ids = np.full((len(queries), k), np.inf, np.float32), np.full((len(queries), k), -1, np.int64)
    open_, wanted = np.arange(len(queries)), min(k + SPARE, len(part.rows))
    while len(open_):
        cut, at_once = [], max(CANDIDATES // wanted, 1)
        for some in (open_[start : start + at_once] for start in range(0, len(open_), at_once)):
            asked = np.ascontiguousarray(queries[some])
            found = candidates(part, asked, wanted)
            if (few := (found < 0).sum(1) > found.shape[1] - k).any():  # the searched cells hold fewer than k rows
                found[few] = faiss.knn(asked[few], part.rows, found.shape[1])[1]
            distances, found = _by_distance(_squared_distances(asked, part.rows, found), found)
            squared[some], ids[some] = distances[:, :k], found[:, :k]
            # If the last candidate is as near as the k-th, up to rounding, other rows may be as near as well.
            near = distances[:, -1] - distances[:, k - 1] <= _rounding(part, asked)
            cut.append(some[near & (found.shape[1] < len(part.rows))])
        open_, wanted = np.concatenate(cut), min(4 * wanted, len(part.rows))
    ids[ids >= 0] += part.start
    return squared, ids


def _rounding(part: Part, queries: np.ndarray) -> np.ndarray | float:
    """Returns the effect of rounding on an exact search, [m].

    A row that the search left out can seem farther than its last candidate by up to this much and still be nearer.
    """
    if part.index is not None:
        return 0.0
    # |q|^2 + |x|^2 - 2 q.x has an error of at most E = (d + 2) 2^-24 (|q| + |x|)^2. So has the sum of squared differences.
    error = (queries.shape[1] + 2) * 2**-24 * (np.linalg.norm(queries, axis=1) + part.longest) ** 2
    return 4 * error


def _squared_distances(queries: np.ndarray, rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Returns the distances of queries to rows by direct difference; infinity for id -1: [m, d], [r, d], [m, c] -> [m, c]."""
    out, ids = np.empty(ids.shape, np.float32), np.ascontiguousarray(ids)
    faiss.fvec_L2sqr_by_idx(
        faiss.swig_ptr(out),
        faiss.swig_ptr(queries),
        faiss.swig_ptr(rows),
        faiss.swig_ptr(ids),
        rows.shape[1],
        len(ids),
        ids.shape[1],
    )
    out[ids < 0] = np.inf
    return out


def _by_distance(squared: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorts each row by distance, and equal distances by id."""
    order = np.lexsort((ids, squared), axis=1)
    return np.take_along_axis(squared, order, 1), np.take_along_axis(ids, order, 1)


def _merged(found: list[tuple[np.ndarray, np.ndarray]], k: int, queries: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the k nearest rows of several answers, filled up with infinity and -1 if there are fewer."""
    nothing = np.full((queries, k), np.inf, np.float32), np.full((queries, k), -1, np.int64)
    squared, ids = _by_distance(*(np.concatenate(parts, 1) for parts in zip(*found, nothing, strict=True)))
    return np.ascontiguousarray(squared[:, :k]), np.ascontiguousarray(ids[:, :k])


def _float_rows(x: np.ndarray | torch.Tensor, what: str, d: int | None = None) -> tuple[np.ndarray, str | None]:
    """Returns x as float32 [rows, d], and what is wrong with it, or None.

    An error that one rank sees has to be told to all ranks, so it is returned and not raised.
    """
    rows = x.detach().cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)
    if rows.ndim != 2 or rows.shape[1] == 0 or (d is not None and rows.shape[1] != d) or rows.dtype.kind not in "fiu":
        return np.empty((0, d or 0), np.float32), f"expected {what} [rows, {d or 'dimensions'}], got {rows.dtype} {rows.shape}"
    if rows.dtype != np.float32 or not rows.flags.c_contiguous:  # otherwise a memory-mapped array stays on disk
        rows = np.ascontiguousarray(rows, dtype=np.float32)
    blocks = (rows[i : i + BLOCK] for i in range(0, len(rows), BLOCK))
    broken = sum(int((~(np.einsum("nd,nd->n", block, block) < LONGEST**2)).sum()) for block in blocks)
    return rows, f"{broken} of {len(rows):,} {what} are not finite or have a norm of {LONGEST:.2g} or more" if broken else None


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


def _load_part(folder: Path, part: dict, d: int, kind: str) -> Part:
    for name, sha256 in part["files"].items():
        if not (folder / Path(name).name).is_file():
            raise DamagedIndex(f"the index {folder} is damaged: {name} is missing")
        if sha256_of(folder / Path(name).name) != sha256:
            raise DamagedIndex(f"the index {folder} is damaged: {name} does not match its checksum")
    names = {Path(name).suffix: folder / Path(name).name for name in part["files"]}
    rows = np.load(names[".npy"], mmap_mode="r", allow_pickle=False)
    if rows.shape != (part["rows"], d) or rows.dtype != np.float32:
        raise DamagedIndex(f"the index {folder} is damaged: {names['.npy'].name} holds {rows.dtype} {rows.shape}")
    # FAISS has two ways to map files. The older one maps only the cells of an index, and would read a graph into memory.
    mapped = faiss.IO_FLAG_MMAP_IFC if kind == "hnsw" else faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY
    index = faiss.read_index(str(names[".faiss"]), mapped) if ".faiss" in names else None
    return Part(part["start"], rows, index, gpu_search.copied(rows, index))
