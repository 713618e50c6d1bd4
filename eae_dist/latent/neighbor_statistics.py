"""Statistics of the distances to neighbors among latents: copies, labels, entropy. n, m: rows, d: dimensions."""

import math

import numpy as np
from scipy.special import digamma
from scipy.stats import ks_2samp, mannwhitneyu

from eae_dist.errors import UserError
from eae_dist.latent.index import LatentIndex
from eae_dist.losses.entropy import log_unit_ball_volume


def nearest_others(index: LatentIndex, rows: np.ndarray, first: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the squared distance and the id of each row's nearest other row, two [b].

    The rows must be rows first, first + 1, ... of the index. Call it on every rank. Raises ValueError for an index of a single
    row, and for inner products, of which that with the row itself need not be the largest.
    """
    if index.metric == "inner_product":
        raise UserError("index.metric=inner_product has no distances between rows; take index.metric=l2 or cosine")
    if index.n < 2:
        raise UserError(f"nearest other rows need an index of at least 2 rows, got {index.n}")
    squared, ids = index.search(rows, 2)
    own = ids[:, 0] == first + np.arange(len(rows))  # otherwise a duplicate of the row comes first
    return np.where(own, squared[:, 1], squared[:, 0]), np.where(own, ids[:, 1], ids[:, 0])


def scores(found: np.ndarray, metric: str) -> tuple[str, np.ndarray]:
    """Returns what people read of the values that `LatentIndex.search` found, and its name: distance, cosine or inner_product."""
    if metric == "l2":
        return "distance", np.sqrt(found)
    return metric, 1 - found.astype(np.float64) / 2 if metric == "cosine" else found


def compare_distances(sample: np.ndarray, query: np.ndarray) -> dict[str, float]:
    """Compares the distances to the training rows of samples [m] and of held-out images [n].

    Samples that are copies would be nearer (Meehan et al. 2020). sample_nearer: the share of pairs in which the sample is nearer,
    with ties as one half; it is one half without copying. z: the statistic of the Mann-Whitney test, positive if samples are
    nearer. ks, ks_p: the largest difference between the distribution functions, and the probability of at least this difference
    by chance.
    """
    m, n = len(sample), len(query)
    share = 1 - float(mannwhitneyu(sample, query).statistic) / (m * n)
    _, ties = np.unique(np.concatenate([sample, query]), return_counts=True)
    total = m + n
    spread = math.sqrt(m * n / 12 * (total + 1 - float((ties.astype(float) ** 3 - ties).sum()) / (total * max(total - 1, 1))))
    ks = ks_2samp(sample, query)
    return {
        "median_sample": float(np.median(sample)),
        "median_query": float(np.median(query)),
        "sample_nearer": share,
        "z": (share - 0.5) * m * n / spread if spread else 0.0,
        "ks": float(ks.statistic),
        "ks_p": float(ks.pvalue),
    }


def vote(labels: np.ndarray) -> np.ndarray:
    """Returns the most common label of each row's neighbors, nearest first, [m, k] -> [m].

    If several are equally common, it is the one of the nearest.
    """
    same = (labels[:, :, None] == labels[:, None, :]).sum(2)
    return np.take_along_axis(labels, same.argmax(1)[:, None], 1)[:, 0]


def entropy_of_distances(distance: np.ndarray, d: int) -> dict[str, float | int]:
    """Returns the Kozachenko-Leonenko entropy [nats] of n rows from the distance of each row to its nearest other row.

    Rows with an exact duplicate have no density and are left out of the mean; `without` is their number. `gaussian` is the
    entropy of N(0, I) itself.
    """
    n, apart = len(distance), distance[distance > 0]
    mean = float(np.log(apart).mean()) if len(apart) else -math.inf
    return {
        "nats": d * mean + log_unit_ball_volume(d) + float(digamma(n) - digamma(1)),
        "gaussian": d / 2 * math.log(2 * math.pi * math.e),
        "without": n - len(apart),
    }
