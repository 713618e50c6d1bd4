"""Random numbers that are functions of keys: the same on any number of ranks, any device and any library version.

Training noise depends on (seed, step, row of the global batch), samples on (seed, image), and the order of the data on
(seed, pass, shard). There is no generator state, so nothing needs to be saved or shared.
"""

import numpy as np
import torch

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROUNDS, _LAST_SHIFT = ((30, np.uint64(0xBF58476D1CE4E5B9)), (27, np.uint64(0x94D049BB133111EB))), 31


def keyed_hash(key: int | np.ndarray, values: np.ndarray) -> np.ndarray:
    """Returns the 64-bit hash of each value under a key, or under keys that broadcast with the values: uint64.

    The hash is the SplitMix64 finalizer (Steele et al. 2014).
    """
    with np.errstate(over="ignore"):
        x = (values.astype(np.uint64) + np.uint64(1)) * _GOLDEN + np.asarray(key, dtype=np.uint64)
        for shift, factor in _ROUNDS:
            x = (x ^ (x >> np.uint64(shift))) * factor
        return x ^ (x >> np.uint64(_LAST_SHIFT))


def derive_key(*parts: int) -> int:
    """Returns one 64-bit key for a tuple of non-negative integers such as (seed, pass, shard)."""
    key = 0
    for part in parts:
        key = int(keyed_hash(key, np.array([part], dtype=np.uint64))[0])
    return key


def uniform(keys: np.ndarray, count: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Returns uniform draws from (0, 1), drawn on the device; row i depends only on keys[i]: integers [m] -> float64 [m, count].

    The host does not wait for a GPU, which gets the keys alone.
    """
    signed = torch.from_numpy(np.asarray(keys, dtype=np.uint64).view(np.int64)).to(device, non_blocking=True)
    # `keyed_hash` of 0, 1, ... under each key. Signed products and sums have the same bits; torch has no unsigned ones.
    x = torch.arange(1, count + 1, device=device).mul_(_signed(_GOLDEN)) + signed[:, None]
    for shift, factor in _ROUNDS:
        x = (x ^ _shifted(x, shift)).mul_(_signed(factor))
    bits = x ^ _shifted(x, _LAST_SHIFT)
    # 52 random bits plus one half: every value is exact and never 0 or 1.
    return _shifted(bits, 12).double().add_(0.5).mul_(2.0**-52)


def _signed(value: np.uint64) -> int:
    return int(value.astype(np.int64))


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Shifts int64 to the right and fills up with zeros, as for unsigned numbers."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def normal(keys: np.ndarray, count: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Returns draws from N(0, 1), drawn on the device; row i depends only on keys[i]: integers [m] -> float64 [m, count].

    On two kinds of device the last bit of a draw can differ.
    """
    return torch.special.ndtri(uniform(keys, count, device))


def row_keys(key: int, rows: np.ndarray) -> np.ndarray:
    """Returns a key for each row number under one key, such as the key of a step: integers [m] -> uint64 [m]."""
    return keyed_hash(key, np.asarray(rows))
