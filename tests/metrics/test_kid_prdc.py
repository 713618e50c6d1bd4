"""Kernel distance, precision and recall, density and coverage, memorization; over ranks by the cases of world_metrics.py."""

import itertools
import math

import pytest
import torch
from world_metrics import feature_sets, normal

from eae_dist.metrics import kid
from eae_dist.metrics.kid import kernel_distance, squared_mmd
from eae_dist.metrics.prdc import precision_recall_density_coverage
from eae_dist.numerics.keyed_random import derive_key


def kernel(x, y) -> float:
    return (x.dot(y).item() / len(x) + 1) ** 3


def test_squared_mmd_is_the_sum_over_pairs():
    x, y = normal(7, 3), normal(5, 3, seed=1) + 1
    xx = sum(kernel(a, b) for a, b in itertools.permutations(x, 2)) / (7 * 6)
    yy = sum(kernel(a, b) for a, b in itertools.permutations(y, 2)) / (5 * 4)
    xy = sum(kernel(a, b) for a in x for b in y) / 35
    assert squared_mmd(x, y).item() == pytest.approx(xx + yy - 2 * xy, rel=1e-12)


def test_squared_mmd_is_unbiased():
    # Over all pairs of subsets of 2 rows, its mean is the estimate from all rows.
    x, y = normal(5, 2), normal(5, 2, seed=1)
    parts = [
        squared_mmd(x[list(a)], y[list(b)])
        for a in itertools.combinations(range(5), 2)
        for b in itertools.combinations(range(5), 2)
    ]
    assert torch.stack(parts).mean().item() == pytest.approx(squared_mmd(x, y).item(), rel=1e-12)


def test_kernel_distance_of_equal_distributions_is_near_zero_and_of_others_is_not():
    got = kernel_distance(normal(2000, 8), normal(2000, 8, 1), subsets=20, subset_size=300)
    assert abs(got.mean) < 4 * got.std / math.sqrt(20)
    shifted = kernel_distance(normal(2000, 8), normal(2000, 8, 1) + 0.5, subsets=20, subset_size=300)
    assert shifted.mean > 10 * got.std


def test_subsets_follow_from_the_seed_and_whole_sets_need_one():
    x, y = normal(300, 4), normal(200, 4, 1)
    options = {"subsets": 5, "subset_size": 50}
    assert kernel_distance(x, y, **options) == kernel_distance(x, y, **options)
    assert kernel_distance(x, y, **options).mean != kernel_distance(x, y, **options, seed=1).mean
    whole = kernel_distance(x[:200], y)
    assert (whole.subsets, whole.subset_size, whole.std) == (1, 200, 0)
    assert whole.mean == pytest.approx(squared_mmd(x[:200], y).item(), rel=1e-12)
    assert kernel_distance(x, y).subset_size == 200


@pytest.mark.parametrize("size", [4, 15])
def test_kernel_distance_is_the_mean_over_its_subsets(size, monkeypatch):
    """Of small subsets, each by itself, and of large ones, from tiles of the kernels of all pairs."""
    monkeypatch.setattr(kid, "TILE", 7)
    x, y = normal(30, 4), normal(20, 4, 1)
    rows = [[kid._subset(derive_key(3, i, side), len(z), size) for side, z in enumerate((x, y))] for i in range(8)]
    expected = torch.stack([squared_mmd(x[a], y[b]) for a, b in rows])
    got = kernel_distance(x, y, subsets=8, subset_size=size, seed=3)
    assert got.mean == pytest.approx(expected.mean().item(), rel=1e-12)
    assert got.std == pytest.approx(expected.std(correction=0).item(), rel=1e-9)


def brute_force(real, generated, k, k_density):
    """The definitions, pair by pair, on values that float64 holds exactly."""
    distance = lambda a, b: (a - b).square().sum(-1)  # noqa: E731
    radii = lambda x, k: torch.stack([distance(x, row).sort().values[k] for row in x])  # noqa: E731  (0 is the row itself)
    hits = torch.stack([distance(real, g) for g in generated])  # [m, n]
    dense = hits <= radii(real, k_density)
    return (
        (hits <= radii(real, k)).any(1).double().mean().item(),
        (hits <= radii(generated, k)[:, None]).any(0).double().mean().item(),
        dense.sum().item() / (k_density * len(generated)),
        dense.any(0).double().mean().item(),
    )


@pytest.mark.parametrize(("k", "k_density"), [(3, 5), (1, 1), (4, 2)])
@pytest.mark.parametrize("kind", ["continuous", "ties"])
def test_scores_are_those_of_the_definitions(k, k_density, kind):
    real, generated = (normal(n, 4, n) * 3 + shift for n, shift in ((60, 0), (45, 1)))
    if kind == "ties":  # small integers: many duplicates and equal distances
        real, generated = real.round(), generated.round()
    got = precision_recall_density_coverage(real.float(), generated.float(), k=k, k_density=k_density)
    assert tuple(got) == brute_force(real.float().double(), generated.float().double(), k, k_density)


def test_a_set_covers_itself_and_nothing_far_away():
    x = normal(200, 8).float()
    same = precision_recall_density_coverage(x, x)
    assert same.precision == same.recall == same.coverage == 1
    assert same.density == pytest.approx((5 + 1) / 5)  # each row lies in its own ball, and a ball holds 5 others
    assert tuple(precision_recall_density_coverage(x, x + 1e3)) == (0, 0, 0, 0)


def test_a_collapsed_generator_is_precise_and_covers_little():
    real = normal(300, 4)
    scores = precision_recall_density_coverage(real, real[:1] + 1e-3 * normal(300, 4, 1))
    assert scores.precision == 1 and scores.recall < 0.02 and scores.coverage < 0.1


def test_scores_do_not_change_with_scale_shift_or_tiles(monkeypatch):
    real, generated = feature_sets()
    base = precision_recall_density_coverage(real, generated)
    # Powers of two and a shift within the mantissa: the same rounded features.
    assert precision_recall_density_coverage(1024 * real, 1024 * generated) == base
    assert precision_recall_density_coverage(2.0**-30 * real, 2.0**-30 * generated) == base
    monkeypatch.setattr("eae_dist.metrics.prdc.TILE", 3000)
    assert precision_recall_density_coverage(real, generated) == base


def test_sets_that_are_too_small_are_refused():
    x = normal(5, 3)
    with pytest.raises(ValueError, match="k=3 and k_density=5 need more .* got 5 and 5"):
        precision_recall_density_coverage(x, x)
    with pytest.raises(ValueError, match="at least 2 rows"):
        kernel_distance(x[:1], x)
    with pytest.raises(ValueError, match="finite features"):
        precision_recall_density_coverage(normal(9, 3), normal(9, 3) / 0)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_distances_do_not_depend_on_the_number_of_ranks(ranks, world):
    got = world(ranks)["distances_of_gathered_rows"]
    real, generated = feature_sets()
    assert got["kernel"] == pytest.approx(list(kernel_distance(real, generated, subsets=7, subset_size=100, seed=3)), rel=1e-12)
    assert got["manifold"] == list(precision_recall_density_coverage(real, generated))
