"""Moments of features and the Fréchet distance; over ranks by the cases of world_metrics.py."""

import math

import pytest
import torch
from world_metrics import feature_sets, normal, stats_of

from eae_dist.metrics.frechet import GRID_BITS, ROOTS, FeatureStats, frechet_distance, warnings_about


def relu_like(n: int, f: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    """Correlated, skewed, non-negative float32 features."""
    return (scale * (normal(n, f, seed) @ (normal(f, f, 9) / math.sqrt(f)) + 0.3)).relu().float()


def same_bits(a: FeatureStats, b: FeatureStats) -> bool:
    return a.count == b.count and torch.equal(a.mean, b.mean) and torch.equal(a.covariance, b.covariance)


@pytest.mark.parametrize("root", list(ROOTS))
def test_distance_between_gaussians_is_the_closed_form(root):
    # Commuting covariances Q diag(v) Q^T: sum (sqrt v - sqrt w)^2 + |m|^2.
    q = torch.linalg.qr(normal(8, 8)).Q
    v, w = torch.arange(1.0, 9, dtype=torch.float64), torch.linspace(0.01, 3, 8, dtype=torch.float64)
    mean = torch.arange(8, dtype=torch.float64) / 8
    expected = (v.sqrt() - w.sqrt()).square().sum() + mean.square().sum()
    got = frechet_distance((mean, q * v @ q.T), (0 * mean, q * w @ q.T), root=root)
    assert got == pytest.approx(expected.item(), rel=1e-12)


def test_distance_in_one_dimension_is_that_of_means_and_standard_deviations():
    x, y = normal(500, 1), 3 * normal(400, 1, seed=1) + 7
    expected = (x.mean() - y.mean()) ** 2 + (x.std() - y.std()) ** 2
    assert frechet_distance(stats_of(x), stats_of(y)) == pytest.approx(expected.item(), rel=1e-6)  # of the grid


def test_distance_scales_with_the_square_and_ignores_rotation_and_order():
    a, b = ((x.mean(0), x.T.cov()) for x in (normal(60, 5), 2 * normal(70, 5, seed=1) + 1))
    q = torch.linalg.qr(normal(5, 5, seed=2)).Q
    base = frechet_distance(a, b)
    assert frechet_distance(b, a) == pytest.approx(base, rel=1e-12)
    assert frechet_distance(*((3 * m, 9 * c) for m, c in (a, b))) == pytest.approx(9 * base, rel=1e-12)
    assert frechet_distance(*((m @ q, q.T @ c @ q) for m, c in (a, b))) == pytest.approx(base, rel=1e-12)


def test_roots_agree_where_there_are_more_samples_than_features():
    a, b = stats_of(relu_like(500, 24, 1)), stats_of(relu_like(400, 24, 2, scale=1.2))
    assert frechet_distance(a, b, "svd") == pytest.approx(frechet_distance(a, b, "sqrtm"), rel=1e-10)


@pytest.mark.parametrize(("n", "m"), [(10, 12), (20, 200), (200, 300)])
def test_distance_equals_that_from_the_rows_also_with_fewer_rows_than_features(n, m):
    # tr (C1 C2)^(1/2) is the sum of the singular values of X1 X2^T, centered, which needs no covariance.
    x, y = (relu_like(rows, 64, seed).double() for seed, rows in enumerate((n, m)))
    x, y = ((z * 2**GRID_BITS).round() * 2.0**-GRID_BITS for z in (x, y))
    centered = [(z - z.mean(0)) / math.sqrt(len(z) - 1) for z in (x, y)]
    root = torch.linalg.svdvals(centered[0] @ centered[1].T).sum()
    traces = sum(z.square().sum() for z in centered)
    expected = (x.mean(0) - y.mean(0)).square().sum() + traces - 2 * root
    # Rounding of the traces, from which nearly all cancels.
    assert frechet_distance(stats_of(x), stats_of(y)) == pytest.approx(expected.item(), abs=1e-12 * traces.item())


@pytest.mark.parametrize("n", [2, 10, 500])
def test_distance_of_a_set_to_itself_is_zero(n):
    stats = stats_of(relu_like(n, 64, 3))
    assert abs(frechet_distance(stats, stats)) < 1e-12 * stats.covariance.trace().item()


def test_features_that_do_not_vary_change_nothing():
    # Of the covariance of `padded` LAPACK's eigenvalues did not converge, nor did that of few images by EfficientNet.
    generator = torch.Generator().manual_seed(3)
    n, f, varying = 43, 1280, 160
    place = torch.randperm(f, generator=generator)[:varying]

    def drawn(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    mean, noise, spread = drawn(varying), torch.randn(n, varying, generator=generator, dtype=torch.float64), drawn(varying) ** 3
    bare = [mean + 1e-2 * noise * spread, drawn(n, varying)]
    padded = [torch.zeros(n, f, dtype=torch.float64).index_copy_(1, place, rows.relu()) for rows in bare]
    distance = frechet_distance(*map(stats_of, padded))
    assert distance == pytest.approx(frechet_distance(*(stats_of(rows.relu()) for rows in bare)), rel=1e-12)
    assert frechet_distance(*map(stats_of, (padded[0], padded[0]))) == pytest.approx(0, abs=1e-12)


def test_sets_without_spread_have_the_distance_of_their_means():
    a, b = (stats_of(torch.full((5, 3), value)) for value in (1.0, 3.0))
    assert frechet_distance(a, b) == pytest.approx(12)
    assert frechet_distance(a, a) == 0


def test_covariance_is_that_of_numpy_to_the_grid():
    x = relu_like(300, 16, 4)
    rounded = (x.double() * 2**GRID_BITS).round() * 2.0**-GRID_BITS
    stats = stats_of(x)
    assert torch.allclose(stats.mean, rounded.mean(0), rtol=1e-15)
    assert torch.allclose(stats.covariance, rounded.T.cov(), rtol=1e-13, atol=1e-15)
    assert (stats.covariance - x.double().T.cov()).abs().max() < 1e-5


def test_moments_have_the_same_bits_for_any_order_batches_and_shards():
    x = relu_like(1500, 32, 5)
    whole = stats_of(x, batch=1500)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    assert whole.exact and same_bits(stats_of(x[order], batch=7), whole)
    merged = FeatureStats()
    for shard in x[order].split([0, 1, 900, 14, 585]):
        merged.merge(stats_of(shard, batch=100))
    assert merged.exact and same_bits(merged, whole)


def test_merged_statistics_stay_as_they_were():
    a, b = stats_of(relu_like(50, 4, 1)), stats_of(relu_like(30, 4, 2))
    before = b.covariance
    total = FeatureStats()
    total.merge(b)
    total.merge(a)
    assert torch.equal(b.covariance, before) and b.count == 30 and total.count == 80


@pytest.mark.parametrize("batch", [1, 100, 700])
@pytest.mark.parametrize("shift", [1e3, 1e6])
def test_sums_too_large_for_the_grid_are_merged_in_floating_point(batch, shift):
    x = normal(700, 6) + shift
    stats = stats_of(x, batch)
    assert not stats.exact
    # Rows that were summed on the grid before it overflowed are off by up to 2^-15 each: 1e-5 in their covariance.
    assert torch.allclose(stats.mean, x.mean(0), rtol=1e-9)
    assert torch.allclose(stats.covariance, x.T.cov(), atol=1e-5)


def test_exact_and_inexact_statistics_merge():
    small, large = normal(40, 6), normal(700, 6, 1) + 1e5
    expected = torch.cat([small, large])
    for first, second in ((small, large), (large, small)):
        stats = stats_of(first)
        stats.merge(stats_of(second))
        assert not stats.exact and stats.count == 740
        assert torch.allclose(stats.mean, expected.mean(0), rtol=1e-9)
        assert torch.allclose(stats.covariance, expected.T.cov(), rtol=1e-9)


def test_two_exact_halves_whose_sum_is_too_large_merge_in_floating_point():
    x = normal(40, 3) + 1e3
    a, b = stats_of(x[:20]), stats_of(x[20:])
    assert a.exact and b.exact
    a.merge(b)
    assert not a.exact
    assert torch.allclose(a.covariance, x.T.cov(), atol=1e-4)  # of the grid: 2^-15 times a few


def test_rows_that_straddle_the_limit_are_counted_once():
    stats = FeatureStats()
    for rows in (normal(300, 3), normal(300, 3, 1) + 1e6, normal(300, 3, 2)):
        stats.add(rows)
    expected = torch.cat([normal(300, 3), normal(300, 3, 1) + 1e6, normal(300, 3, 2)])
    assert stats.count == 900 and torch.allclose(stats.covariance, expected.T.cov(), rtol=1e-9)


def test_state_dict_continues_with_the_same_bits():
    x = relu_like(400, 8, 6)
    first = stats_of(x[:150])
    second = FeatureStats()
    second.load_state_dict(first.state_dict())
    assert all(isinstance(value, torch.Tensor) for value in first.state_dict().values())
    second.add(x[150:])
    assert same_bits(second, stats_of(x))
    empty = FeatureStats()
    empty.load_state_dict(FeatureStats().state_dict())
    empty.add(x)
    assert same_bits(empty, stats_of(x))


def test_added_rows_may_be_overwritten_afterwards():
    x = normal(20, 3)
    stats, buffer = FeatureStats(), x.clone()
    stats.add(buffer)
    buffer.zero_()
    assert same_bits(stats, stats_of(x))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.full((3, 4), torch.nan), "3 of 3 rows of features hold NaN"),
        (torch.zeros(3, 5), r"\(3, 5\) were added to those of shape \[m, 4\]"),
        (torch.zeros(3), r"shape \(3,\)"),
    ],
)
def test_rows_that_are_not_features_are_refused(rows, message):
    stats = FeatureStats()
    stats.add(torch.ones(2, 4))
    with pytest.raises(ValueError, match=message):
        stats.add(rows)


def test_moments_of_too_few_rows_are_an_error():
    stats = stats_of(torch.ones(1, 4))
    assert stats.mean.tolist() == [1, 1, 1, 1]
    with pytest.raises(ValueError, match="at least 2 rows, got 1"):
        stats.covariance  # noqa: B018
    with pytest.raises(ValueError, match="equal numbers of features, got 4 and 5"):
        frechet_distance(stats_of(normal(9, 4)), stats_of(normal(9, 5)))
    with pytest.raises(ValueError, match="is one of svd, sqrtm"):
        frechet_distance(stats_of(normal(9, 4)), stats_of(normal(9, 4)), root="newton")


def test_doubtful_statistics_are_named():
    assert warnings_about(stats_of(normal(50, 4)), "generated images") == []
    assert "too large to be exact" in warnings_about(stats_of(1e8 + normal(50, 4)), "x")[0]
    assert "blurs" in warnings_about(stats_of(1e-4 * normal(50, 4)), "x")[0]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_moments_have_the_same_bits_on_any_number_of_ranks(ranks, world):
    got = world(ranks)["exact_moments"]
    real, generated = (stats_of(x, batch=1000) for x in feature_sets())
    assert bool(got["exact"])
    assert all(torch.equal(got[key], value) for key, value in real.state_dict().items())
    assert torch.equal(got["mean"], real.mean) and torch.equal(got["covariance"], real.covariance)
    assert got["distance"] == pytest.approx(frechet_distance(real, generated), rel=1e-12)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_inexact_moments_agree_on_any_number_of_ranks(ranks, world):
    got = world(ranks)["inexact_moments"]
    for name, x, tolerance in (
        ("each", 1e6 + feature_sets()[0].double(), 1e-9),
        ("together", 1e3 + feature_sets()[0].double()[:36], 1e-4),  # of the grid
    ):
        assert not got[name]["exact"] and got[name]["count"] == len(x)
        assert torch.allclose(got[name]["mean"], x.mean(0), rtol=1e-7)
        assert torch.allclose(got[name]["covariance"], x.T.cov(), atol=tolerance)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_statistics_of_ranks_without_any_rows_are_empty(ranks, world):
    assert world(ranks)["no_rows_anywhere"]["count"] == 0
