"""The normalizing flow as a density; what every density promises is in test_densities.py."""

import math
import sys

import numpy as np
import pytest
import torch

from eae_dist.latent import flow
from eae_dist.latent.flow import Flow
from eae_dist.latent.gaussian import Gaussian
from eae_dist.latent.rows import BLOCK


def banana(n: int, seed: int) -> torch.Tensor:
    """[n, 2]: a parabola with noise, whose two entries are uncorrelated."""
    z = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.stack([z[:, 0], z[:, 0] ** 2 + 0.1 * z[:, 1]], 1).float()


# Of the true density: the entropies of z_0 and of 0.1 z_1.
TRUE = -(math.log(2 * math.pi * math.e) + math.log(0.1))


@pytest.fixture(scope="module")
def fitted() -> Flow:
    density = Flow(epochs=30)
    density.fit(banana(3000, seed=0))
    return density


def test_flow_learns_a_shape_that_a_gaussian_cannot(fitted):
    gaussian = Gaussian()
    gaussian.fit(banana(3000, seed=0))
    report = fitted.report()
    # 300 held-out rows; one nat is far more than their standard error of 0.06.
    assert gaussian.report()["log_likelihood"] < TRUE - 1 < report["held_out_log_likelihood"] < TRUE + 0.2
    assert 1 <= report["epochs_trained"] <= 30
    drawn = fitted.sample(range(2000))
    assert (drawn[:, 1] - drawn[:, 0] ** 2).abs().median() < 0.3  # 0.07 for the true density; 0.9 for the Gaussian
    assert fitted.report()["log_likelihood"] == pytest.approx(report["held_out_log_likelihood"], abs=0.3)


def test_log_likelihood_is_that_of_the_latents_themselves(fitted):
    x = banana(3000, seed=0).double()
    with torch.no_grad():
        standardized = ((x - fitted.center) / fitted.scale).float()
        expected = fitted.network().log_prob(standardized).double().mean() - fitted.scale.log().sum()
    assert fitted.report()["log_likelihood"] == pytest.approx(float(expected), abs=1e-4)


def test_dimension_in_which_all_latents_are_equal_keeps_its_value():
    x = torch.cat([banana(600, seed=0), torch.full((600, 1), 3.0)], 1)[:, [0, 2, 1]]
    density, without = (Flow(transforms=1, width=4, epochs=2) for _ in range(2))
    density.fit(x)
    without.fit(x[:, [0, 2]])
    restored = Flow()
    restored.load_state_dict(density.state_dict())
    for fitted_to_all in (density, restored):
        drawn = fitted_to_all.sample(range(20))
        assert bool((drawn[:, 1] == 3).all()) and torch.equal(drawn[:, [0, 2]], without.sample(range(20)))
        assert fitted_to_all.report() == without.report()
    with pytest.raises(ValueError, match="flow needs latents that differ, but all 600 are equal"):
        Flow().fit(torch.ones(600, 2))


def test_weights_of_the_best_epoch_are_kept_and_the_training_ends_after_the_patience(monkeypatch):
    likelihoods = iter([1.0, 3.0, 2.0, 2.5, 2.9])
    weights = []

    def told(network, rows, x, chosen):
        weights.append([parameter.detach().clone() for parameter in network.parameters()])
        return next(likelihoods, 0.0)

    monkeypatch.setattr(flow, "_mean_log_likelihood", told)
    density = Flow(width=4, transforms=1, patience=3, epochs=50)
    density.fit(banana(600, seed=1))
    assert density.report()["epochs_trained"] == 2 and len(weights) == 5 + 2  # then the two numbers of the report
    for kept, best, last in zip(density.network.parameters(), weights[1], weights[4], strict=True):
        assert torch.equal(kept, best)
        assert not torch.equal(best, last)


def test_an_epoch_takes_every_row_once_in_groups_of_one_block():
    chosen = np.flatnonzero(np.arange(3 * BLOCK + 77) % 7 != 3)
    units = list(flow._units(chosen, key=5))
    assert np.array_equal(np.sort(np.concatenate(units)), chosen)
    assert all(len(unit) <= flow.UNIT and len(set(unit // BLOCK)) == 1 for unit in units)
    other = list(flow._units(chosen, key=6))
    assert not np.array_equal(np.concatenate(units), np.concatenate(other))


def test_too_few_latents_wrong_settings_and_divergence_are_told():
    with pytest.raises(ValueError, match="flow needs more latents, some to train on and some to hold out, got 1"):
        Flow().fit(banana(1, seed=0))
    with pytest.raises(ValueError, match="batch of at least 1, got .*batch=0"):
        Flow(batch=0)
    with pytest.raises(ValueError, match="flow diverged: its gradient is not finite; lower learning_rate"):
        Flow(width=4, learning_rate=1e30, epochs=20).fit(banana(600, seed=0))


def test_missing_package_is_told_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "zuko.flows", None)
    with pytest.raises(ValueError, match=r"needs the package zuko: pip install 'eae-dist\[flow\]'"):
        Flow().fit(banana(100, seed=0))
