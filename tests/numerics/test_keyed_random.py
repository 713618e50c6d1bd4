"""Random numbers from keys; data/test_stream.py pins the hash."""

import numpy as np
import torch

from eae_dist.numerics.keyed_random import derive_key, keyed_hash, normal, row_keys, uniform


def test_each_row_depends_on_its_key_alone():
    keys = row_keys(derive_key(3, 7), np.arange(50))
    assert torch.equal(normal(keys, 9)[17:23], normal(keys[17:23], 9))
    assert torch.equal(normal(keys, 9)[:, :4], normal(keys, 4))


def test_draws_are_the_first_52_bits_of_the_hash():
    keys = row_keys(5, np.arange(40))
    bits = keyed_hash(keys[:, None], np.arange(7)[None]) >> np.uint64(12)
    assert keys.max() >= 2**63 and bits.max() > 2**51  # as signed numbers these keys are negative
    assert np.array_equal(uniform(keys, 7).numpy() * 2.0**52, bits + 0.5)


def test_draws_have_the_moments_of_their_distribution_and_no_correlation():
    n, d = 20_000, 8
    z = normal(row_keys(derive_key(0, 1), np.arange(n)), d)
    # Four standard errors of a mean, a variance and a covariance of n draws.
    assert z.mean(0).abs().max() < 4 / n**0.5
    assert (z.T.cov() - torch.eye(d)).abs().max() < 4 * (2 / n) ** 0.5
    assert (z.pow(4).mean() - 3).abs() < 4 * (96 / (n * d)) ** 0.5
    u = uniform(np.arange(n), 1)
    assert 0 < u.min() and u.max() < 1 and (u.mean() - 0.5).abs() < 4 * (1 / 12 / n) ** 0.5


def test_neighboring_seeds_and_rows_are_unrelated():
    a, b = (normal(row_keys(derive_key(seed, 1), np.arange(10_000)), 1)[:, 0] for seed in (0, 1))
    assert abs(float((a * b).mean())) < 4e-2 and abs(float((a[1:] * a[:-1]).mean())) < 4e-2
