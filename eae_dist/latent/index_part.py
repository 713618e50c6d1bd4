"""The rows of a latent index that lie together on one rank, and the exact distances of its candidates.

FAISS searches in the product form of the distance, which loses precision for close pairs, so the distances of the candidates are
computed again by direct difference. Inner products are computed again in float64; their negatives stand for distances, so that
the nearest row has the least one for every metric. m: queries, d: dimensions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import faiss
import numpy as np

# What the settings call a metric, and what FAISS calls it. The cosine is the squared distance of rows of norm 1: 2 - 2 cos.
METRICS = {"l2": faiss.METRIC_L2, "cosine": faiss.METRIC_L2, "inner_product": faiss.METRIC_INNER_PRODUCT}
SPARE = 8  # candidates beyond k; with them the first search usually satisfies `_rounding`
CANDIDATES = 2**23  # candidates compared at once; they take about half a gigabyte
PRODUCTS = 2**22  # numbers multiplied at once in float64


@dataclass
class Part:
    """Rows [start, start + len(rows)) of the whole index, float32, and the FAISS indexes that search them.

    Without `index`, queries are compared with the rows one by one. `on_gpu`: a copy that is searched instead where it can be.
    `metric`: that of FAISS, METRIC_L2 or METRIC_INNER_PRODUCT.
    """

    start: int
    rows: np.ndarray
    index: faiss.Index | None = None
    on_gpu: faiss.Index | None = None
    metric: int = faiss.METRIC_L2

    @cached_property
    def longest(self) -> float:
        """The largest norm of a row."""
        return float(np.sqrt(np.einsum("nd,nd->n", self.rows, self.rows).max()))


def nearest(part: Part, queries: np.ndarray, k: int, candidates: Callable) -> tuple[np.ndarray, np.ndarray]:
    """Returns the k nearest rows of a part, two [m, k]. It takes more candidates until no nearest row can be missing."""
    squared, ids = np.full((len(queries), k), np.inf, distance_type(part.metric)), np.full((len(queries), k), -1, np.int64)
    open_, wanted = np.arange(len(queries)), min(k + SPARE, len(part.rows))
    while len(open_):
        cut, at_once = [], max(CANDIDATES // wanted, 1)
        for some in (open_[start : start + at_once] for start in range(0, len(open_), at_once)):
            asked = np.ascontiguousarray(queries[some])
            found = candidates(part, asked, wanted)
            if (few := (found < 0).sum(1) > found.shape[1] - k).any():  # the searched cells hold fewer than k rows
                found[few] = faiss.knn(asked[few], part.rows, found.shape[1], metric=part.metric)[1]
            distances, found = _by_distance(_distances(part, asked, found), found)
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
    unit, norms = (queries.shape[1] + 2) * 2**-24, np.linalg.norm(queries, axis=1)
    if part.metric == faiss.METRIC_INNER_PRODUCT:
        return 4 * unit * norms * part.longest  # q.x has an error of at most (d + 2) 2^-24 |q| |x|
    # |q|^2 + |x|^2 - 2 q.x has an error of at most E = (d + 2) 2^-24 (|q| + |x|)^2. So has the sum of squared differences.
    return 4 * unit * (norms + part.longest) ** 2


def distance_type(metric: int) -> type[np.floating]:
    """Returns the type in which the distances of a metric are computed again."""
    return np.float64 if metric == faiss.METRIC_INNER_PRODUCT else np.float32


def _distances(part: Part, queries: np.ndarray, ids: np.ndarray) -> np.ndarray:
    of_metric = _negative_products if part.metric == faiss.METRIC_INNER_PRODUCT else _squared_distances
    return of_metric(queries, part.rows, ids)


def _negative_products(queries: np.ndarray, rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Returns negative inner products of queries and rows in float64; infinity for id -1: [m, d], [r, d], [m, c] -> [m, c]."""
    out, at_once = np.empty(ids.shape), max(PRODUCTS // max(ids.shape[1] * rows.shape[1], 1), 1)
    for start in range(0, len(ids), at_once):
        some = slice(start, start + at_once)
        # A sum over the last axis does not depend on how many queries and candidates there are.
        out[some] = -(rows[ids[some]].astype(np.float64) * queries[some, None]).sum(2)
    out[ids < 0] = np.inf
    return out


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


def merged(found: list[tuple[np.ndarray, np.ndarray]], k: int, queries: int, metric: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the k nearest rows of several answers, filled up with infinity and -1 if there are fewer."""
    nothing = np.full((queries, k), np.inf, distance_type(metric)), np.full((queries, k), -1, np.int64)
    squared, ids = _by_distance(*(np.concatenate(parts, 1) for parts in zip(*found, nothing, strict=True)))
    return np.ascontiguousarray(squared[:, :k]), np.ascontiguousarray(ids[:, :k])
