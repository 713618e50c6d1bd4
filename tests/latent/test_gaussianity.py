"""How far latents are from N(0, I)."""

import math

import pytest
import torch
from world_metrics import normal

from eae_dist.latent.gaussianity import entropy, gaussianity, sliced_wasserstein
from eae_dist.losses.entropy import knn_entropy


def test_draws_of_a_gaussian_measure_as_the_draws_they_are_compared_with():
    found = gaussianity(normal(2000, 8, 5))
    assert found["images"] == 2000
    assert found["sliced_wasserstein"] == pytest.approx(found["sliced_wasserstein_of_draws"], abs=0.01)  # both about 0.03
    assert found["entropy"] == pytest.approx(found["entropy_of_draws"], abs=0.15)
    assert found["entropy_of_draws"] == pytest.approx(8 / 2 * math.log(2 * math.pi * math.e), abs=0.5)


def test_sliced_wasserstein_of_a_moved_or_stretched_gaussian_is_its_closed_form():
    # Along a direction u the mean moves by m.u: the mean square over directions is |m|^2 / d. A scale s is off by |s - 1|.
    x = normal(20_000, 4)
    assert sliced_wasserstein(x[:4000] + torch.tensor([3.0, 0, 0, 0]), directions=4000) == pytest.approx(3 / 2, rel=0.02)
    assert sliced_wasserstein(1.5 * x) == pytest.approx(0.5, rel=0.03)


def test_clusters_with_the_moments_of_a_gaussian_have_less_entropy_and_lie_farther():
    signs = normal(1000, 6, 1).sign() + 0.1 * normal(1000, 6, 2)
    found = gaussianity(signs / signs.std(0))
    assert found["entropy"] < found["entropy_of_draws"] - 3
    assert found["sliced_wasserstein"] > 2 * found["sliced_wasserstein_of_draws"]


def test_entropy_is_that_of_training_and_does_not_depend_on_the_precision_given():
    x = normal(50, 3)
    assert entropy(x) == pytest.approx(knn_entropy(x).item(), rel=1e-12)
    assert gaussianity(x.float())["entropy"] == pytest.approx(entropy(x), rel=1e-5)


@pytest.mark.parametrize("latents", [torch.zeros(1, 3), torch.zeros(5)])
def test_too_few_rows_are_refused(latents):
    with pytest.raises(ValueError, match="at least 2 rows"):
        gaussianity(latents)
