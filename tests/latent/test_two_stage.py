"""The second-stage VAE: what it learns, and that its training is a function of its arguments."""

import pytest
import torch

from eae_dist.latent.two_stage import SecondStage, TwoStage, keyed_order
from eae_dist.numerics.keyed_random import normal


def two_groups(n: int = 600) -> torch.Tensor:
    """[n, 2] float32, at (-3, 10) and (3, 10), a deviation of 0.3; the second dimension far from 0."""
    z = 0.3 * normal(range(n), 2).float()
    return z + torch.where(torch.arange(n)[:, None] % 2 == 0, torch.tensor([3.0, 10.0]), torch.tensor([-3.0, 10.0]))


@pytest.fixture(scope="module")
def density():
    density = TwoStage(width=64, epochs=40, learning_rate=3e-3, kl_weight=0.03)
    density.fit(two_groups())
    return density


def test_samples_come_from_both_groups(density):
    samples = density.sample(range(1000))
    right = samples[:, 0] > 0
    assert 0.3 < right.double().mean() < 0.7
    assert samples[:, 0].abs().median() == pytest.approx(3, abs=0.6)
    assert samples[:, 1].mean() == pytest.approx(10, abs=0.2)
    assert (samples[:, 0].abs() < 1.5).double().mean() < 0.3  # a decoder without noise draws a thin bridge between them


def test_reconstructions_are_close_to_their_latents_and_of_their_type(density):
    x = two_groups()
    found = density.reconstruct(x)
    assert found.dtype == x.dtype and found.shape == x.shape
    assert (found - x).square().mean() < 0.02 * x.var(0).mean()
    torch.testing.assert_close(density.reconstruct(x[5:9]), found[5:9])
    assert density.reconstruct(x[:0]).shape == (0, 2)


def test_report_shows_the_loss_and_the_learning_rate_that_plateaus_left(density):
    report = density.report()
    assert 0 < report["validation_loss"] < 0.2
    halvings = torch.log2(torch.tensor(3e-3 / report["final_learning_rate"]))
    assert halvings == halvings.round() >= 0


@pytest.mark.parametrize(("epochs", "halvings"), [(3, 0), (4, 1), (6, 1), (7, 2)])
def test_learning_rate_is_halved_at_every_third_epoch_without_improvement(epochs, halvings):
    density = TwoStage(width=4, epochs=epochs, learning_rate=1e-12)  # too small to improve on the first epoch
    density.fit(two_groups(100))
    assert density.final_learning_rate == 1e-12 / 2**halvings


def test_defaults_are_the_official_settings():
    official = {"kl_weight": 1.5e-3, "width": 1024, "epochs": 100, "learning_rate": 1e-4, "batch": 64}
    assert vars(TwoStage()) == official | {"seed": 0}


def test_the_divergence_is_that_of_the_two_gaussians():
    network, x = SecondStage(3, 8).double(), normal(range(20), 3)
    hidden = network.encoder(x)
    posterior = torch.distributions.Normal(network.mean(hidden), (5 * network.log_scale(hidden).tanh()).exp())
    prior = torch.distributions.Normal(torch.zeros(3).double(), torch.ones(3).double())
    error, divergence = network(x, torch.zeros_like(x))
    torch.testing.assert_close(divergence, torch.distributions.kl_divergence(posterior, prior).sum(1))
    torch.testing.assert_close(error, (network.reconstruction(x) - x).square().mean(1))


def test_weights_are_glorots_and_depend_on_the_seed_alone():
    one, again, other = (SecondStage(4, 32, seed) for seed in (1, 1, 2))
    for (name, a), b, c in zip(one.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        if a.ndim == 2:
            limit = (6 / sum(a.shape)) ** 0.5
            assert 0.9 * limit < a.abs().max() < limit and not torch.equal(a, c), name
        else:
            assert not a.any()


def test_a_constant_dimension_comes_back():
    x = two_groups(100)
    x[:, 1] = 5
    density = TwoStage(width=8, epochs=1)
    density.fit(x)
    assert torch.isfinite(density.sample(range(10))).all()


def test_a_learning_rate_that_diverges_is_named():
    with pytest.raises(ValueError, match="two_stage diverged: validation loss .* lower learning_rate"):
        TwoStage(width=8, epochs=30, learning_rate=1e30).fit(two_groups(100))


@pytest.mark.parametrize("arguments", [{"width": 0}, {"epochs": 0}, {"batch": 0}])
def test_empty_settings_are_refused(arguments):
    with pytest.raises(ValueError, match="at least 1"):
        TwoStage(**arguments)


def test_one_latent_is_too_few():
    with pytest.raises(ValueError, match="at least 2 latents, .* got 1"):
        TwoStage().fit(torch.zeros(1, 3))


def test_an_order_is_a_permutation_that_its_key_decides():
    rows = torch.arange(100, 200).numpy()
    assert sorted(keyed_order(1, rows)) == list(rows)
    assert list(keyed_order(1, rows)) == list(keyed_order(1, rows)) != list(keyed_order(2, rows))
