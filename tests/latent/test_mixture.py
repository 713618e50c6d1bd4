"""The Gaussian mixture against scikit-learn's and against known mixtures."""

import warnings

import pytest
import torch
from sklearn.mixture import GaussianMixture
from world_latent import latents

from eae_dist.latent.mixture import Mixture, Parameters, k_means_seeds
from eae_dist.latent.rows import Rows


def a_start(x: torch.Tensor, k: int) -> Parameters:
    d = x.shape[1]
    weights = torch.arange(1, k + 1, dtype=torch.float64) / (k * (k + 1) / 2)
    return Parameters(weights, x[:k].double(), 4 * torch.eye(d, dtype=torch.float64).repeat(k, 1, 1))


def parameters(mixture: Mixture) -> tuple[torch.Tensor, ...]:
    return mixture.parameters.weights, mixture.parameters.means, mixture.parameters.covariances


@pytest.mark.parametrize(("k", "iterations"), [(1, 1), (4, 1), (4, 12), (7, 200)])
def test_from_the_same_start_it_is_that_of_scikit_learn(k, iterations):
    x, start = latents(), a_start(latents(), k)
    ours = Mixture(k, start=start, iterations=iterations)
    ours.fit(x)
    theirs = GaussianMixture(
        k,
        max_iter=iterations,
        weights_init=start.weights.numpy(),
        means_init=start.means.numpy(),
        precisions_init=start.covariances.inverse().numpy(),
    )
    with warnings.catch_warnings(action="ignore"):  # that it did not converge
        theirs.fit(x.numpy())
    for mine, reference in zip(parameters(ours), (theirs.weights_, theirs.means_, theirs.covariances_), strict=True):
        torch.testing.assert_close(mine, torch.from_numpy(reference), rtol=1e-6, atol=1e-6)
    report = ours.report()
    assert report["log_likelihood"] == pytest.approx(theirs.score(x.numpy()), rel=1e-9)
    assert report["start_log_likelihoods"] == [pytest.approx(theirs.lower_bound_, rel=1e-9)]
    assert (report["iterations"], report["converged"]) == (theirs.n_iter_, theirs.converged_)
    assert ("warning" in report) == (not theirs.converged_)


def test_the_groups_that_the_latents_were_drawn_from_are_found():
    mixture = Mixture(4)
    mixture.fit(latents())
    deviations = mixture.parameters.covariances.diagonal(dim1=1, dim2=2).sqrt().mean(1).sort().values
    # 1,250 latents a group: a standard deviation is known to about 2 % / sqrt(5).
    torch.testing.assert_close(deviations, torch.tensor([0.5, 1.0, 1.5, 2.0], dtype=torch.float64), rtol=0.05, atol=0)
    report = mixture.report()
    assert report["converged"] and sum(report["weights"]) == pytest.approx(1)
    assert len(report["start_log_likelihoods"]) == 3
    assert report["log_likelihood"] >= max(report["start_log_likelihoods"])  # a step never lowers it


def test_samples_have_the_mixtures_moments():
    mixture = Mixture(4, starts=1)
    mixture.fit(latents())
    weights, means, covariances = parameters(mixture)
    mean = weights @ means
    centered = means - mean
    covariance = torch.einsum("c,cij->ij", weights, covariances + centered[:, :, None] * centered[:, None])
    n = 20_000
    samples = mixture.sample(range(n))
    deviation = covariance.diagonal().sqrt()
    assert ((samples.mean(0) - mean) / deviation).abs().max() < 4 / n**0.5  # four standard errors
    # No coordinate's kurtosis exceeds three: the standard error of a covariance is at most that of a Gaussian's.
    assert ((samples.T.cov() - covariance) / (deviation[:, None] * deviation)).abs().max() < 4 * (2 / n) ** 0.5


def test_seeds_of_k_means_are_distinct_latents_far_apart():
    x = latents()
    seeds = k_means_seeds(Rows(x), 4, (0, 0))
    assert all((x == seed).all(1).any() for seed in seeds)
    assert torch.cdist(seeds, seeds)[~torch.eye(4, dtype=torch.bool)].min() > 2
    assert not torch.equal(k_means_seeds(Rows(x), 4, (0, 1)), seeds)


def test_fewer_latents_than_parameters_are_refused_with_their_numbers():
    with pytest.raises(ValueError, match="10 full covariances in 5 dimensions has 210 parameters .* got 209"):
        Mixture(10).fit(latents()[:209])
    Mixture(10, starts=1, iterations=1).fit(latents()[:1000])


def test_fewer_distinct_latents_than_components_are_refused():
    with pytest.raises(ValueError, match="3 components needs 3 distinct latents, got 2 among 1000"):
        Mixture(3).fit(latents()[:2].repeat(500, 1))


def test_a_component_that_collapses_is_an_error_with_its_size():
    x = latents()
    start = a_start(x, 2)
    start.means[1] = 1000
    with pytest.raises(ValueError, match=r"tried: 1.* of 2 collapsed.* left with .* latents of 5000, fewer than 6"):
        Mixture(2, start=start).fit(x)


def test_a_covariance_that_float64_cannot_hold_is_an_error_with_the_latents_size():
    x = 1e9 * latents()
    x[:, 2] = x[:, 0]
    with pytest.raises(ValueError, match="of 2 components are not positive definite in float64; the latents reach .*e\\+10"):
        Mixture(2).fit(x)


def test_a_start_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"means \[2, 5\], expected \[components, dimensions\] = \[3, 5\]"):
        Mixture(3, start=a_start(latents(), 2)).fit(latents())


def test_a_constant_dimension_is_held_by_the_regularization():
    x = latents()
    x[:, 2] = 3
    mixture = Mixture(2, starts=1)
    mixture.fit(x)
    samples = mixture.sample(range(200))
    assert (samples[:, 2] - 3).abs().max() < 5e-3  # five deviations of sqrt(1e-6)
