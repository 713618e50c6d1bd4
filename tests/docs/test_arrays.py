"""numpy arrays are taken where tensors are."""

import numpy as np
import pytest
import torch

from eae_dist import FeatureStats, Gaussian, Isotropic, LatentIndex, frechet_distance, knn_entropy

ROWS = np.random.default_rng(0).standard_normal((60, 4)).astype(np.float32)


def test_entropy_of_an_array_is_that_of_the_tensor():
    valid = np.arange(60) % 7 != 0
    assert knn_entropy(ROWS, k=2) == knn_entropy(torch.from_numpy(ROWS), k=2)
    assert knn_entropy(ROWS, valid=valid) == knn_entropy(torch.from_numpy(ROWS), valid=torch.from_numpy(valid))


def test_frechet_distance_of_arrays_is_that_of_the_tensors():
    arrays, tensors = FeatureStats(), FeatureStats()
    arrays.add(ROWS)
    tensors.add(torch.from_numpy(ROWS))
    assert torch.equal(arrays.mean, tensors.mean) and torch.equal(arrays.covariance, tensors.covariance)
    moments = (np.zeros(4), np.eye(4))
    assert frechet_distance(arrays, moments) == frechet_distance(tensors, (torch.zeros(4), torch.eye(4)))


@pytest.mark.parametrize("density", [Isotropic, Gaussian])
def test_density_of_an_array_is_that_of_the_tensor(density):
    of_array, of_tensor = density(), density()
    of_array.fit(ROWS)
    of_tensor.fit(torch.from_numpy(ROWS))
    assert of_array.report() == of_tensor.report()
    assert torch.equal(of_array.sample(range(3)), of_tensor.sample(range(3)))


def test_index_of_an_array_answers_as_that_of_the_tensor():
    distances, ids = LatentIndex.build(ROWS).search(ROWS[:5], k=3)
    expected = LatentIndex.build(torch.from_numpy(ROWS)).search(torch.from_numpy(ROWS[:5]), k=3)
    np.testing.assert_array_equal(distances, expected[0])
    np.testing.assert_array_equal(ids, expected[1])
