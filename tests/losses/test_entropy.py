"""The entropy estimate on one process; test_laws.py has it over ranks."""

import math

import pytest
import torch

from eae_dist.losses import entropy
from eae_dist.losses.entropy import (
    CPU_TILE,
    entropy_terms,
    gaussian_reference,
    knn_entropy,
    log_unit_ball_volume,
    nearest_neighbors,
)


def normal(n: int, d: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_unit_ball_volumes_are_those_of_the_interval_disc_and_ball():
    volumes = [math.exp(log_unit_ball_volume(d)) for d in (1, 2, 3)]
    assert volumes == pytest.approx([2, math.pi, 4 / 3 * math.pi])


@pytest.mark.parametrize("k", [1, 3])
def test_scaling_adds_d_log_c_and_moving_adds_nothing(k):
    z = normal(300, 5)
    base = knn_entropy(z, k=k, eps2=0.0)
    assert float(knn_entropy(3 * z + 7, k=k, eps2=0.0) - base) == pytest.approx(5 * math.log(3), rel=1e-10)


def test_estimate_converges_to_the_entropy_of_a_uniform_density_in_one_dimension():
    # H of U[0, 2] is log 2; the standard deviation of one estimate from 20,000 draws is about 0.01.
    z = 2 * torch.rand(20_000, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert float(knn_entropy(z, eps2=0.0)) == pytest.approx(math.log(2), abs=0.03)


@pytest.mark.parametrize(("d", "bias", "spread"), [(16, 0.43, 0.09), (64, 8.9, 0.23)])
def test_bias_for_a_gaussian_is_the_known_one(d, bias, spread):
    # Measured once over 60 sets of 1,000 draws of N(0, I): mean bias and standard deviation of one estimate.
    truth = 0.5 * d * math.log(2 * math.pi * math.e)
    assert float(knn_entropy(normal(1000, d))) - truth == pytest.approx(bias, abs=4 * spread)


@pytest.mark.parametrize("n", [2, 16, 17, CPU_TILE, CPU_TILE + 1, 5 * CPU_TILE + 3])
@pytest.mark.parametrize("queries", [(0.0, 1.0), (0.0, 0.3), (0.4, 0.8), (0.7, 1.0)])  # the part of the rows that asks
@pytest.mark.parametrize("k", [1, 4])
def test_neighbors_are_those_of_a_full_sort_whatever_the_tiles(n, queries, k):
    if k >= n:
        pytest.skip(f"{n} rows have no {k} neighbors")
    z = normal(n, 7, seed=n)
    start, stop = (round(n * part) for part in queries)
    distances = torch.cdist(z[start:stop], z, compute_mode="donot_use_mm_for_euclid_dist")
    distances.diagonal(start).fill_(torch.inf)
    expected = distances.topk(k, largest=False).indices
    assert torch.equal(nearest_neighbors(z, k, start, stop - start), expected)


@pytest.mark.parametrize(("n", "d", "k"), [(300, 1024, 64), (700, 200, 9)])  # the first: of one row, more than a tile holds
def test_candidates_are_looked_at_again_in_as_many_parts_as_fit(n, d, k):
    z = normal(n, d)
    distances = torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
    assert torch.equal(nearest_neighbors(z, k, 0, n), distances.topk(k, largest=False).indices)


def test_rows_far_from_the_origin_have_the_neighbors_that_they_have():
    z = normal(1000, 16, dtype=torch.float32) + 1e3
    # The products of such rows are 1e6 times their distances: without their mean taken away half of the neighbors are others.
    assert float(knn_entropy(z)) == pytest.approx(float(knn_entropy(z.double())), rel=1e-5)


def test_close_pairs_keep_their_distance_in_float32():
    z = normal(256, 64, dtype=torch.float32)
    z[1::2] = z[::2] + 1e-2 * torch.nn.functional.normalize(normal(128, 64, seed=1), dim=1).float()
    # The product form of the distance is off by a quarter here; differences of float32 rows are right to 1e-5.
    exact = knn_entropy(z.double(), eps2=0.0)
    assert float(knn_entropy(z, eps2=0.0)) == pytest.approx(float(exact), rel=1e-5)


def test_duplicates_give_a_finite_entropy_no_gradient_and_are_counted():
    z = normal(64, 8)
    z[10] = z[20] = z[20] + 30  # far from the rest: each is the other's neighbor and nobody else's
    z.requires_grad_()
    terms = entropy_terms(z)
    terms.entropy.backward()
    assert terms.entropy.isfinite() and int(terms.floored) == 2
    assert z.grad[[10, 20]].abs().max() == 0
    assert z.grad.abs().max() > 0


def test_gradient_is_bounded_by_the_floor():
    z = normal(64, 8)
    z[10] = z[20] + 1e-9
    z.requires_grad_()
    knn_entropy(z, eps2=1e-4).backward()
    # Both roles of a pair: at most 2 d / (2 n sqrt(eps2)) each way, and row 20 can be the neighbor of others too.
    assert z.grad[10].norm() <= 2 * 8 / (64 * 2 * 1e-2)


def test_masked_rows_are_as_if_absent():
    z = normal(50, 4)
    valid = torch.ones(50, dtype=torch.bool)
    valid[::7] = False
    full, part = z.clone().requires_grad_(), z[valid].clone().requires_grad_()
    a, b = knn_entropy(full, valid=valid, k=2), knn_entropy(part, k=2)
    (a + b).backward()
    assert a.item() == b.item()
    assert torch.equal(full.grad[valid], part.grad) and full.grad[~valid].abs().max() == 0


def test_gradient_is_that_of_finite_differences():
    z = normal(20, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: knn_entropy(x, k=3, average_k=True), z)


def test_mean_over_k_lies_between_the_first_and_the_kth_log_distance():
    z = normal(400, 6)
    log_distances = []
    for k in (1, 5):
        psi = torch.digamma(torch.tensor([400.0, k], dtype=torch.float64))
        log_distances.append(float(knn_entropy(z, k=k) - psi[0] + psi[1]))
    psi = torch.digamma(torch.tensor([400.0, *range(1, 6)], dtype=torch.float64))
    mean = float(knn_entropy(z, k=5, average_k=True) - psi[0] + psi[1:].mean())
    assert log_distances[0] < mean < log_distances[1]


@pytest.mark.parametrize(("rows", "k"), [(5, 5), (1, 1)])
def test_more_neighbors_than_other_rows_is_an_error_with_the_numbers(rows, k):
    with pytest.raises(ValueError, match=rf"^k={k} needs more than {k} distinct rows, got {rows}$"):
        knn_entropy(normal(rows, 2), k=k)


def test_neighbor_before_the_first_is_an_error():
    with pytest.raises(ValueError, match="^k=0 must be at least 1$"):
        knn_entropy(normal(5, 2), k=0)


def test_latents_of_another_rank_are_an_error():
    with pytest.raises(ValueError, match="rows, dimensions"):
        knn_entropy(torch.zeros(4, 2, 3))


def test_reference_of_gaussian_draws_lies_at_the_known_bias():
    truth = 0.5 * 16 * math.log(2 * math.pi * math.e)
    reference = gaussian_reference(1000, 16, k=1, average_k=False, eps2=1e-4, seed=0)
    assert reference - truth == pytest.approx(0.43, abs=0.2)  # mean of four estimates, each with deviation 0.09


def test_reference_is_computed_on_the_device_that_it_is_given(monkeypatch):
    # Over several GPUs, collectives of CPU tensors fail.
    seen = []

    def fake(latents, **options):
        seen.append(latents.device.type)
        return torch.zeros(())

    monkeypatch.setattr("eae_dist.losses.entropy.knn_entropy", fake)
    gaussian_reference(8, 2, k=1, average_k=False, eps2=1e-4, seed=0, device="meta")
    assert set(seen) == {"meta"}


def test_maximizing_the_entropy_under_a_batch_norm_spreads_a_degenerate_batch():
    # Points on a curve in the plane: normed, they have mean 0 and variance 1, and far less entropy than a Gaussian.
    t = normal(256, 1, seed=5)
    h = torch.cat([t, t**2], 1).requires_grad_()
    norm = torch.nn.BatchNorm1d(2, affine=False).double()
    optimizer = torch.optim.Adam([h], lr=0.02)
    before = float(knn_entropy(norm(h.detach())))
    for _ in range(200):
        optimizer.zero_grad()
        (-knn_entropy(norm(h))).backward()
        optimizer.step()
    reference = gaussian_reference(256, 2, k=1, average_k=False, eps2=1e-4, seed=0)
    assert before < reference - 0.5 < float(knn_entropy(norm(h.detach())))


@pytest.mark.parametrize("at_once", [1, 100, 10**6])
def test_rows_of_one_rank_get_their_pulls_as_neighbors_however_many_pairs_are_computed_at_once(monkeypatch, at_once):
    keys, k, offset, b, scale, eps2 = normal(40, 6), 3, 13, 9, 0.7, 1e-4
    ids = nearest_neighbors(keys, k, 0, len(keys))
    expected = torch.zeros(b, 6, dtype=torch.float64)
    for asking in range(len(keys)):
        for asked in ids[asking].tolist():
            if offset <= asked < offset + b:
                difference = keys[asking] - keys[asked]
                expected[asked - offset] -= scale * difference / (difference.square().sum() + eps2)
    monkeypatch.setattr(entropy, "PAIRS", at_once)
    found = torch.zeros_like(expected)
    entropy._add_pulls_on(found, keys, ids, offset, eps2, scale)
    assert expected.abs().max() > 0.1 and (found - expected).abs().max() < 1e-14
