"""The sliced terms on one process; test_laws.py has them over ranks."""

import math

import pytest
import torch

from eae_dist.losses.sliced import epps_pulley, random_directions, sliced_wasserstein


def normal(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def directions(m: int, d: int, key: int = 3) -> torch.Tensor:
    return random_directions(key, m, normal(1, d))


def test_directions_are_uniform_unit_vectors_that_follow_from_the_key_alone():
    many = directions(20_000, 3)
    torch.testing.assert_close(many.norm(dim=1), torch.ones(20_000, dtype=torch.float64))
    # Five standard deviations of a mean of 20,000: 0.58 and sqrt(4/45) = 0.3 for one entry and one square.
    assert many.mean(0).abs().max() < 0.021
    assert (many.T @ many / 20_000 - torch.eye(3) / 3).abs().max() < 0.011
    assert torch.equal(directions(5, 3), many[:5]) and not torch.equal(directions(5, 3, key=4), many[:5])


def test_statistic_is_the_integral_by_seventeen_knots():
    z, d = normal(40, 4) * 1.5 + 0.3, directions(6, 4)
    t = torch.linspace(-5, 5, 17, dtype=torch.float64)
    characteristic = torch.exp(1j * (z @ d.T)[..., None] * t).mean(0)
    error = (characteristic - torch.exp(-t.square() / 2)).abs().square() * torch.exp(-t.square() / 2)
    assert float(epps_pulley(z, d, 40)) == pytest.approx(torch.trapezoid(error, t).mean().item(), rel=1e-12)


def test_statistic_of_a_point_and_of_normal_draws_is_the_known_one():
    # Integrals of Gaussians: |1 - g|^2 g, and the variance of the characteristic function of n draws, (1 - g^2) g / n. Beyond 5
    # lies 1e-6 of the weight.
    point = math.sqrt(2 * math.pi) * (1 - 2 / math.sqrt(2) + 1 / math.sqrt(3))
    assert float(epps_pulley(torch.zeros(9, 2, dtype=torch.float64), directions(4, 2), 9)) == pytest.approx(point, rel=1e-5)
    expected = math.sqrt(2 * math.pi) * (1 - 1 / math.sqrt(3)) / 50
    found = torch.stack([epps_pulley(normal(50, 64, seed), directions(64, 64), 50) for seed in range(200)])
    assert found.mean().item() == pytest.approx(expected, abs=5 * found.std().item() / math.sqrt(200))


def test_distance_of_stretched_and_moved_quantiles_is_the_known_one():
    places = torch.arange(1, 102, dtype=torch.float64)
    quantiles = torch.special.ndtri((places - 3 / 8) / (101 + 1 / 4))
    one = torch.ones(1, 1, dtype=torch.float64)
    assert float(sliced_wasserstein(quantiles.flip(0)[:, None], one)) == 0  # in any order
    moved = sliced_wasserstein(3 * quantiles[:, None] + 2, one)
    assert float(moved) == pytest.approx(4 * quantiles.square().mean().item() + 4, rel=1e-12)


def test_gradient_of_the_distance_is_the_mean_over_draws_of_that_of_the_paper():
    z, d, generator = normal(20, 3), directions(5, 3), torch.Generator().manual_seed(1)
    z.requires_grad_()
    (found,) = torch.autograd.grad(sliced_wasserstein(z, d), z)
    projections = (z @ d.T).sort(0)
    draws = torch.randn(20_000, 20, 3, generator=generator, dtype=torch.float64)
    drawn = (draws @ d.T).sort(1).values
    pulls = 2 * (projections.values - drawn.mean(0)) / (20 * 5)  # of each projection, in sorted order
    expected = torch.zeros(20, 5, dtype=torch.float64).scatter(0, projections.indices, pulls) @ d
    # Order statistics by Blom are off by 0.004 at most at n = 20, the mean of 20,000 draws by 0.004; a pull is 2/100 of it.
    assert (found - expected).abs().max() < 5 * 0.006 * 2 / 100 < found.abs().max() / 10


@pytest.mark.parametrize("term", [lambda z, d: epps_pulley(z, d, 9), sliced_wasserstein])
def test_gradient_is_that_of_finite_differences(term):
    assert torch.autograd.gradcheck(term, ((normal(9, 3) * 1.2 + 0.4).requires_grad_(), directions(5, 3)))


@pytest.mark.parametrize("term", [lambda z, d: epps_pulley(z, d, 2000), sliced_wasserstein])
def test_terms_tell_a_circle_and_a_collapsed_dimension_from_normal_draws(term):
    z, d = normal(2000, 2), directions(64, 2)
    circle = math.sqrt(2) * z / z.norm(dim=1, keepdim=True)  # of the same mean and covariance
    collapsed = z * torch.tensor([1.0, 0.0])
    assert term(z, d) < term(circle, d) / 5 and term(z, d) < term(collapsed, d) / 20
