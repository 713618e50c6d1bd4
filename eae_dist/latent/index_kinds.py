"""The kinds of a latent index: which one fits, and the FAISS index of each, with its quantizers.

    flat      exact: compares each query with every row
    ivf_flat  compares each query with the rows of the nearest cells of a k-means
    ivf_pq    as ivf_flat, on codes of d/2 bytes per row; compares the best candidates again with the rows, read from disk
    hnsw      follows the edges of a graph; slow to build, fastest for single queries

d: dimensions.
"""

import os
from typing import NamedTuple

import faiss
import numpy as np

from eae_dist.distributed import from_rank_zero, world_size
from eae_dist.latent import gpu_search
from eae_dist.latent.index_part import Part

KINDS = ("flat", "ivf_flat", "ivf_pq", "hnsw")
EFFORT = {"ivf_flat": "nprobe", "ivf_pq": "nprobe", "hnsw": "efSearch"}  # the FAISS parameter that trades time for recall
EXACT_UNTIL = 100_000  # rows; an exact search of 1,000 queries, d = 64, takes a fifth of a second on one core
GRAPH = 32  # edges per row in hnsw
TRAINING = 64  # rows per cell that k-means is trained on
FEWEST_FOR_CODES = 9_984  # rows, 39 for each of the 256 values of a byte; FAISS warns if there are fewer


class Choice(NamedTuple):
    """The kind of an index, and the reason for it."""

    kind: str
    reason: str


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


def memory_of_a_rank(given: int | None) -> int:
    """Returns the bytes that an index may use on each rank. It is rank 0's value, so that all ranks choose the same kind."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    return from_rank_zero(given or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2 // ranks)


def trained(kind: str, part: Part, generator: np.random.Generator) -> faiss.Index:
    """Returns an empty index whose quantizers are trained on some of the part's rows."""
    m, d = part.rows.shape
    if kind == "hnsw":
        return faiss.index_factory(d, f"HNSW{GRAPH},Flat", part.metric)
    cells = max(1, min(int(4 * m**0.5), m // 39))
    index = faiss.index_factory(d, f"IVF{cells},Flat" if kind == "ivf_flat" else _coded(part, cells), part.metric)
    sample = np.sort(generator.choice(m, min(m, max(TRAINING * cells, FEWEST_FOR_CODES)), replace=False))
    index.train(np.ascontiguousarray(part.rows[sample]))
    return index


def _coded(part: Part, cells: int) -> str:
    """Returns the FAISS factory string for codes of half a byte per dimension.

    A CPU is three times as fast with codes that fit into its registers. GPUs do not support these.
    """
    d = part.rows.shape[1]
    return f"IVF{cells},PQ{d}x4fs" if gpu_search.gpu() is None else gpu_search.coded(d, cells, part.longest)


def most_effort(index: faiss.Index, kind: str) -> int:
    """Returns the effort beyond which a search finds no more."""
    return index.ntotal if kind == "hnsw" else faiss.extract_index_ivf(index).nlist
