"""Random numbers that are functions of keys: the same on any number of ranks, any device and any library version.

Training noise depends on (seed, step, row of the global batch), samples on (seed, image), and the order of the data on
(seed, pass, shard). There is no generator state, so nothing needs to be saved or shared.
"""

import numpy as np
import torch

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def keyed_hash(key: int | np.ndarray, values: np.ndarray) -> np.ndarray:
    """Returns the 64-bit hash of each value under a key, or under keys that broadcast with the values: uint64.

    The hash is the SplitMix64 finalizer (Steele et al. 2014).
    """
    with np.errstate(over="ignore"):
        x = (values.astype(np.uint64) + np.uint64(1)) * _GOLDEN + np.asarray(key, dtype=np.uint64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def derive_key(*parts: int) -> int:
    """Returns one 64-bit key for a tuple of non-negative integers such as (seed, pass, shard)."""
    key = 0
    for part in parts:
        key = int(keyed_hash(key, np.array([part], dtype=np.uint64))[0])
    return key


def uniform(keys: np.ndarray, count: int) -> torch.Tensor:
    """Returns uniform draws from (0, 1); row i depends only on keys[i]: integers [m] -> float64 [m, count]."""
    bits = keyed_hash(np.asarray(keys, dtype=np.uint64)[:, None], np.arange(count)[None])
    # 52 random bits plus one half: every value is exact and never 0 or 1.
    return torch.from_numpy(((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52)


def normal(keys: np.ndarray, count: int) -> torch.Tensor:
    """Returns draws from N(0, 1); row i depends only on keys[i]: integers [m] -> float64 [m, count]."""
    return torch.special.ndtri(uniform(keys, count))


def row_keys(key: int, rows: np.ndarray) -> np.ndarray:
    """Returns a key for each row number under one key, such as the key of a step: integers [m] -> uint64 [m]."""
    return keyed_hash(key, np.asarray(rows))
