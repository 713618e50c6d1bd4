"""Nearest neighbors among latents, with FAISS. An index is spread over all ranks and their GPUs, and is searched as one.

Each rank indexes its own rows. Queries go to all ranks, and each rank answers with candidates and their distances by direct
difference, or with their inner products in float64 (`index_part.py`). For the kind flat, the result of a search depends only on
the queries and the rows, bit for bit, and not on which rank holds a row. For the other kinds (`index_kinds.py`) it also depends
on which rows each rank holds.
n: rows of all ranks, d: dimensions, m: queries.
"""

import logging
from pathlib import Path
from typing import TypeVar

import faiss
import numpy as np
import torch

from eae_dist.distributed import exchange_rows, gather_objects, gather_padded, message_device, rank, row_counts, world_size
from eae_dist.errors import UserError
from eae_dist.latent import gpu_search
from eae_dist.latent.index_files import DamagedIndex, index_description, load_parts, save_parts
from eae_dist.latent.index_kinds import EFFORT, FEWEST_FOR_CODES, KINDS, Choice, choose, memory_of_a_rank, most_effort, trained
from eae_dist.latent.index_part import METRICS, Part, distance_type, merged, nearest

__all__ = ["KINDS", "LONGEST", "METRICS", "DamagedIndex", "LatentIndex", "choose", "index_description", "unusable_rows"]

log = logging.getLogger("eae_dist")

Array = TypeVar("Array", np.ndarray, torch.Tensor)
BY_PRODUCTS = 1_000  # queries times dimensions from which FAISS compares in matrix products
BLOCK = 65_536  # rows added, or queries of all ranks searched, at once
LONGEST = 2.0**62  # the norm from which squared distances may not be finite in float32


class LatentIndex:
    """An index of the latents of all ranks. Make one with `build` or `load`.

    `n`: rows; `d`: dimensions; `metric`: one of METRICS; `kind`, and `reason`: why it was chosen; `effort`: nprobe or efSearch,
    None for flat; `about`: the values that `build` was given.
    """

    def __init__(self, parts: list[Part], n: int, d: int, metric: str, choice: Choice, oversampling: int, about: dict):
        self._parts, self.n, self.d, self.metric, self.about = parts, n, d, metric, about
        self.kind, self.reason = choice
        self.effort: int | None = None
        self.oversampling = oversampling
        # FAISS 1.15 compares up to 128,000 / d queries one by one. From 16 queries on, products take a quarter of that time.
        faiss.cvar.distance_compute_blas_threshold = min(faiss.cvar.distance_compute_blas_threshold, BY_PRODUCTS)

    @classmethod
    def build(
        cls,
        latents: np.ndarray | torch.Tensor,
        kind: str = "auto",
        *,
        metric: str = "l2",
        recall: float = 0.95,
        memory: int | None = None,
        seed: int = 0,
        about: dict | None = None,
    ) -> "LatentIndex":
        """Builds an index of this rank's rows [b, d] together with those of the other ranks.

        The ids number all rows in rank order.
        metric: l2, cosine or inner_product; what `search` returns depends on it. A cosine index holds a copy of the rows, divided
        by their norms.
        kind: one of KINDS, or auto. auto chooses by the rows, the dimensions, `memory` (bytes that a rank may use; default: half
        of the machine's memory, shared by its ranks) and `recall` (the share of the neighbors that a search must find). seed:
        chooses the rows that the quantizers are trained on. about: plain values that are stored with the index. Call it on every
        rank; b may differ and be 0.
        Raises ValueError on every rank for a wrong shape, values that are not finite, rows with a norm of LONGEST or more, zero
        rows under cosine, no rows, an unknown metric or kind, or too few rows.
        """
        if metric not in METRICS:
            raise UserError(f"metric={metric} is unknown; it is one of {', '.join(METRICS)}")
        rows, problem = _float_rows(latents, "latents", metric)
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
        choice = Choice(kind, "it was asked for") if kind != "auto" else choose(max(counts), d, recall, memory_of_a_rank(memory))
        if choice.kind not in KINDS:
            raise UserError(f"kind={kind} is unknown; it is auto or one of {', '.join(KINDS)}")
        fewest = min(count for count in counts if count)
        if choice.kind == "ivf_pq" and fewest < FEWEST_FOR_CODES:
            raise UserError(f"kind=ivf_pq needs {FEWEST_FOR_CODES:,} latents on a rank, got {fewest:,}; take flat")
        part = Part(sum(counts[: rank()]), rows, metric=METRICS[metric])
        if len(rows) and choice.kind != "flat":
            part.index = trained(choice.kind, part, np.random.default_rng(seed))
            for start in range(0, len(rows), BLOCK):
                part.index.add(np.ascontiguousarray(rows[start : start + BLOCK]))
        effort = {"ivf_flat": 8, "ivf_pq": 8, "hnsw": 32}.get(choice.kind)
        part.on_gpu = gpu_search.copied(rows, part.index, part.metric) if len(rows) else None
        index = cls([part] if len(rows) else [], sum(counts), d, metric, choice, 4, about or {})
        index._set_effort(effort)
        return index

    def search(self, queries: Array, k: int) -> tuple[Array, Array]:
        """Returns the k nearest rows of each of this rank's queries [m, d]: squared distances float32 and ids int64, two [m, k].

        Under cosine these are the squared distances of rows and queries that are divided by their norms, 2 - 2 cos. Under
        inner_product they are the products, float64, and the nearest row is that of the largest. The nearest row comes first;
        equally near rows are ordered by id. The results are arrays or tensors, as the queries are.
        Call it on every rank; m may differ and be 0. Raises ValueError on every rank for a wrong shape, for queries that are not
        finite or have a norm of LONGEST or more, for zero queries under cosine, and unless 1 <= k <= n.
        """
        found, ids = self._nearest(queries, k)
        if METRICS[self.metric] == faiss.METRIC_INNER_PRODUCT:
            found = -found
        if isinstance(queries, torch.Tensor):
            return torch.from_numpy(found).to(queries.device), torch.from_numpy(ids).to(queries.device)
        return found, ids

    def _nearest(self, queries: Array, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns what `search` does, with distances that increase: negative inner products."""
        asked, problem = _float_rows(queries, "queries", self.metric, self.d)
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or not 1 <= k <= self.n:
            problem = problem or f"k={k} must be a whole number from 1 to the {self.n:,} rows of the index"
        every = gather_objects((len(asked), k, problem))
        for _, theirs, wrong in every:
            if wrong or theirs != k:
                raise UserError(wrong or f"ranks search for different numbers of neighbors, {[e[1] for e in every]}")
        longest = max(count for count, _, _ in every)
        found = [(np.empty((0, k), distance_type(METRICS[self.metric])), np.empty((0, k), np.int64))]
        at_once = max(BLOCK // world_size(), 1)  # of a rank: each searches for the queries of all
        for start in range(0, longest, at_once):
            found.append(self._search_everywhere(asked[start : start + at_once], int(k)))
        squared, ids = (np.concatenate(blocks) for blocks in zip(*found, strict=True))
        return squared, ids

    def tune(self, queries: Array, recall: float = 0.95, k: int = 10) -> float:
        """Sets the lowest effort that finds the share `recall` of the k nearest rows, and returns the share that it finds.

        queries: [m, d] of this rank, which must not be rows of the index. The share is measured against an exact search. Call it
        on every rank. Raises ValueError as `search` does, and if no rank has queries.
        """
        k = min(k, self.n)
        parts = [Part(part.start, part.rows, metric=part.metric) for part in self._parts]
        exact = LatentIndex(parts, self.n, self.d, self.metric, Choice("flat", ""), 1, {})
        furthest = exact._nearest(queries, k)[0][:, -1:]
        if not (counts := sum(gather_objects(len(furthest)))):
            raise UserError("tuning an index needs queries, got none on any rank")

        def found(effort: int) -> float:
            self._set_effort(effort)
            return sum(gather_objects(float((self._nearest(queries, k)[0] <= furthest).sum()))) / (counts * k)

        if self.kind == "flat":
            return found(1)
        indexes = [part.index for part in self._parts if part.index is not None]
        most = max(gather_objects(max((most_effort(index, self.kind) for index in indexes), default=1)))
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
        described = {"n": self.n, "d": self.d, "metric": self.metric, "kind": self.kind, "reason": self.reason}
        described |= {"effort": self.effort, "oversampling": self.oversampling, "about": self.about}
        save_parts(Path(path), described, self._parts)

    @classmethod
    def load(cls, path: str | Path) -> "LatentIndex":
        """Opens a saved index and verifies its checksums. Call it on every rank.

        Files are memory-mapped, except for the codes of a CPU index. Raises FileNotFoundError if there is no index. Raises
        DamagedIndex, which names the file, on the rank of a damaged file, and OSError on the other ranks.
        """
        described, parts = load_parts(Path(path))
        choice, sizes = Choice(described["kind"], described["reason"]), (described["n"], described["d"], described["metric"])
        index = cls(parts, *sizes, choice, described["oversampling"], described["about"])
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
        found = [nearest(part, everyone, min(k, len(part.rows)), self._candidates) for part in self._parts]
        metric = METRICS[self.metric]
        squared, ids = merged(found, k, len(everyone), metric)
        if world_size() == 1:
            return squared, ids
        # Every rank's answers to this rank's queries, [W, queries, k].
        answers = [exchange_rows(torch.from_numpy(answer).to(device), counts).cpu().numpy() for answer in (squared, ids)]
        return merged(list(zip(*answers, strict=True)), k, counts[rank()], metric)

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
            return faiss.knn(queries, part.rows, count, metric=part.metric)[1]
        return part.index.search(queries, count)[1]


def unusable_rows(rows: np.ndarray, metric: str) -> tuple[np.ndarray, str]:
    """Returns the numbers of the rows float32 [b, d] that cannot be compared, and what they are."""
    blocks = (rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK))
    squared = np.concatenate([np.zeros(0, np.float32), *(np.einsum("nd,nd->n", block, block) for block in blocks)])
    if len(broken := np.flatnonzero(~(squared < LONGEST**2))):
        return broken, f"not finite or have a norm of {LONGEST:.2g} or more"
    if metric != "cosine":
        return broken, ""
    small = np.flatnonzero(squared == 0)  # rows whose squares are too small for float32 among them
    return small[~rows[small].any(1)], "zero and have no direction, which metric=cosine compares"


def _float_rows(x: np.ndarray | torch.Tensor, what: str, metric: str, d: int | None = None) -> tuple[np.ndarray, str | None]:
    """Returns x as float32 [rows, d], under cosine divided by the norms, and what is wrong with it, or None.

    An error that one rank sees has to be told to all ranks, so it is returned and not raised.
    """
    rows = x.detach().cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)
    if rows.ndim != 2 or rows.shape[1] == 0 or (d is not None and rows.shape[1] != d) or rows.dtype.kind not in "fiu":
        return np.empty((0, d or 0), np.float32), f"expected {what} [rows, {d or 'dimensions'}], got {rows.dtype} {rows.shape}"
    if rows.dtype != np.float32 or not rows.flags.c_contiguous:  # otherwise a memory-mapped array stays on disk
        rows = np.ascontiguousarray(rows, dtype=np.float32)
    numbers, why = unusable_rows(rows, metric)
    if len(numbers):
        return rows, f"{len(numbers)} of {len(rows):,} {what} are {why}"
    return _divided_by_norms(rows) if metric == "cosine" else rows, None


def _divided_by_norms(rows: np.ndarray) -> np.ndarray:
    """Returns rows of norm 1, float32 [b, d]. The norm of a row is computed in float64, by itself."""
    divided = np.empty(rows.shape, np.float32)
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK].astype(np.float64)
        divided[start : start + BLOCK] = block / np.sqrt(np.square(block).sum(1, keepdims=True))
    return divided
