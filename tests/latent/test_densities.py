"""What every density promises, and the Gaussians."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from world_latent import SMALL, latents

from eae_dist.latent.densities import DENSITIES
from eae_dist.latent.rows import BLOCK, ExactSum, Rows

SEVERAL = (2, 3, 4)


@pytest.fixture(scope="module")
def densities():
    """Each density, fitted to the latents of world_latent.py; in few steps where the default would take many."""
    fitted = {name: SMALL.get(name, cls)() for name, cls in DENSITIES.items()}
    for density in fitted.values():
        density.fit(latents())
    return fitted


@pytest.mark.parametrize("name", DENSITIES)
def test_each_sample_depends_on_its_seed_alone(densities, name):
    samples = densities[name].sample(np.arange(300))
    assert samples.shape == (300, 5) and samples.dtype == torch.float64
    assert torch.equal(densities[name].sample(torch.arange(17, 120)), samples[17:120])
    assert torch.equal(densities[name].sample([299, 3])[[1, 0]], samples[[3, 299]])
    assert len(samples.unique(dim=0)) == 300
    assert densities[name].sample([]).shape == (0, 5)


@pytest.mark.parametrize("name", DENSITIES)
def test_a_density_of_a_saved_state_draws_the_same_bits_and_reports_the_same(densities, name):
    other = DENSITIES[name]()
    other.load_state_dict(load(save(densities[name].state_dict())))
    assert torch.equal(other.sample(range(50)), densities[name].sample(range(50)))
    assert other.report() == densities[name].report()


@pytest.mark.parametrize("name", DENSITIES)
def test_a_state_of_another_density_is_refused(densities, name):
    with pytest.raises(ValueError, match="expected a density state with .*; got other"):
        DENSITIES[name]().load_state_dict({"other": torch.zeros(1)})


@pytest.mark.parametrize("name", DENSITIES)
@pytest.mark.parametrize("seeds", [[-1], [0.5], [[1, 2]]])
def test_seeds_that_are_no_row_of_integers_are_refused(densities, name, seeds):
    with pytest.raises(ValueError, match="one non-negative integer per sample"):
        densities[name].sample(seeds)


@pytest.mark.parametrize("name", DENSITIES)
def test_latents_that_cannot_be_fitted_are_refused(name):
    x = latents()
    x[3, 1], x[4, 0] = torch.inf, torch.nan
    with pytest.raises(ValueError, match="2 of 5000 latents are not finite"):
        DENSITIES[name]().fit(x)
    with pytest.raises(ValueError, match=r"latents \[rows, dimensions\], got shape \(5000,\)"):
        DENSITIES[name]().fit(x[:, 0])
    with pytest.raises(ValueError, match="at least one latent"):
        DENSITIES[name]().fit(x[:0])


@pytest.mark.parametrize("ranks", SEVERAL)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", DENSITIES)
def test_a_fit_is_the_same_to_the_last_bit_on_any_number_of_ranks(world, ranks, dtype, name):
    one, several = (world(w)[f"densities_in_{dtype}"][name] for w in (1, ranks))
    assert one["state"].keys() == several["state"].keys()
    for key, tensor in one["state"].items():
        assert torch.equal(several["state"][key], tensor), key
    assert torch.equal(several["samples"], one["samples"])


@pytest.mark.parametrize("ranks", (1, *SEVERAL))
def test_latents_of_one_rank_that_are_not_finite_are_an_error_on_all(world, ranks):
    found = world(ranks)["density_errors"]
    assert "1 of 5000 latents are not finite" in found["not finite"]
    assert "none on any rank" in found["none"]


@pytest.mark.parametrize("ranks", (1, *SEVERAL))
def test_every_block_lies_whole_on_one_rank(world, ranks):
    expected = [[first, min(BLOCK, 5000 - first), 1] for first in range(0, 5000, BLOCK)]
    assert world(ranks)["whole_blocks"] == expected


def test_an_exact_sum_does_not_depend_on_the_order_and_is_right_under_a_loose_bound():
    generator = torch.Generator().manual_seed(0)
    rows = Rows(torch.zeros(1000 * BLOCK, 1))
    values = torch.randn(1000, 7, generator=generator, dtype=torch.float64) * 10.0 ** torch.arange(-9, 5, 2)
    sums = []
    for order in (torch.arange(1000), torch.randperm(1000, generator=generator)):
        total = ExactSum(rows, 7, bound=1e9)
        for value in values[order]:
            total.add(value)
        sums.append(total.result())
    assert torch.equal(*sums)
    # fsum rounds once, the three parts are added with two roundings.
    expected = torch.tensor([math.fsum(column) for column in values.T.tolist()], dtype=torch.float64)
    torch.testing.assert_close(sums[0], expected, rtol=5e-16, atol=1e-20)


def test_isotropic_is_the_standard_normal_whatever_the_latents(densities):
    n = 20_000
    z = densities["isotropic"].sample(range(n))
    assert z.mean(0).abs().max() < 4 / n**0.5  # four standard errors, as below
    assert (z.T.cov() - torch.eye(5)).abs().max() < 4 * (2 / n) ** 0.5
    normal = torch.distributions.Normal(0, torch.ones((), dtype=torch.float64))
    expected = float(normal.log_prob(latents()).sum(1).mean())
    assert densities["isotropic"].report()["log_likelihood"] == pytest.approx(expected, rel=1e-12)


def test_mvg_is_the_gaussian_of_maximum_likelihood(densities):
    x, density = latents(), densities["mvg"]
    covariance = x.T.cov(correction=0)
    torch.testing.assert_close(density.mean, x.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(density.covariance, covariance, rtol=1e-12, atol=1e-12)
    expected = float(torch.distributions.MultivariateNormal(x.mean(0), covariance).log_prob(x).mean())
    assert density.report() == {"log_likelihood": pytest.approx(expected, rel=1e-12), "dimensions_spanned": 5}
    n = 20_000
    root = torch.linalg.cholesky(covariance)
    z = torch.linalg.solve_triangular(root, (density.sample(range(n)) - x.mean(0)).T, upper=False).T
    assert z.mean(0).abs().max() < 4 / n**0.5
    assert (z.T.cov() - torch.eye(5)).abs().max() < 4 * (2 / n) ** 0.5


def test_mvg_of_latents_in_a_subspace_stays_in_it():
    x = latents()
    x[:, 3] = 2 * x[:, 0] - x[:, 1]
    x[:, 4] = 7
    density = DENSITIES["mvg"]()
    density.fit(x)
    samples = density.sample(range(100))
    report = density.report()
    assert report["log_likelihood"] is None and report["dimensions_spanned"] == 3 and "only 3 of 5" in report["warning"]
    # Roots of eigenvalues: what is rounding (1e-15) in a covariance can be 1e-7 in a sample.
    torch.testing.assert_close(samples[:, 3], 2 * samples[:, 0] - samples[:, 1], rtol=0, atol=1e-6)
    torch.testing.assert_close(samples[:, 4], torch.full((100,), 7.0, dtype=torch.float64), rtol=0, atol=1e-6)
