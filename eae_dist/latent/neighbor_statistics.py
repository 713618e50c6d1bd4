"""What distances to neighbors say of sets of latents: copies, labels, entropy. n, m: rows, d: dimensions."""

import math

import numpy as np
from scipy.special import digamma
from scipy.stats import ks_2samp, mannwhitneyu

from eae_dist.latent.index import LatentIndex
from eae_dist.losses.entropy import log_unit_ball_volume


def nearest_others(index: LatentIndex, rows: np.ndarray, first: int) -> tuple[np.ndarray, np.ndarray]:
    """Squared distance and id of each row's nearest other row, two [b]; these are rows first, first + 1, ... of the index.

    Call on every rank. Raises ValueError for an index of a single row.
    """
    if index.n < 2:
        raise ValueError(f"a row has a nearest other row from 2 rows on, the index has {index.n}")
    squared, ids = index.search(rows, 2)
    own = ids[:, 0] == first + np.arange(len(rows))  # else it has twins before it
    return np.where(own, squared[:, 1], squared[:, 0]), np.where(own, ids[:, 1], ids[:, 0])


def compare_distances(sample: np.ndarray, query: np.ndarray) -> dict[str, float]:
    """Whether samples [m] lie nearer to the training rows than held-out images [n] do: copies would (Meehan et al. 2020).

    sample_nearer: the share of pairs in which the sample is the nearer one, ties as halves; one half without copying. z: that of
    the Mann-Whitney test, positive where samples are nearer. ks, ks_p: largest difference of the distribution functions, and how
    likely as large a one would be by chance.
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
    """The commonest label of each row's neighbors, nearest first, [m, k] -> [m]; of equally common ones the nearer."""
    same = (labels[:, :, None] == labels[:, None, :]).sum(2)
    return np.take_along_axis(labels, same.argmax(1)[:, None], 1)[:, 0]


def entropy_of_distances(distance: np.ndarray, d: int) -> dict[str, float | int]:
    """The Kozachenko-Leonenko entropy of n rows from the distance of each to its nearest other, in nats.

    Rows with an exact twin have no density, and are left out of the mean: `without`. gaussian: that of N(0, I) itself.
    """
    n, apart = len(distance), distance[distance > 0]
    mean = float(np.log(apart).mean()) if len(apart) else -math.inf
    return {
        "nats": d * mean + log_unit_ball_volume(d) + float(digamma(n) - digamma(1)),
        "gaussian": d / 2 * math.log(2 * math.pi * math.e),
        "without": n - len(apart),
    }
