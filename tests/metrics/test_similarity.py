"""PSNR and SSIM beside those of scikit-image."""

import numpy as np
import pytest
import torch
from conftest import image_of

from eae_dist.metrics.similarity import psnr, ssim


def pairs(shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.stack([torch.from_numpy(image_of(number, shape)).permute(2, 0, 1) for number in range(3)]) / 255
    noise = 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + noise * torch.tensor([0.2, 1.0, 3.0]).view(3, 1, 1, 1)).clamp(0, 1), images


@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 40, 28), (3, 64, 64)])
def test_both_are_those_of_scikit_image(shape):
    metrics = pytest.importorskip("skimage.metrics")
    reconstruction, images = pairs(shape)
    found = ssim(reconstruction, images)
    errors = psnr((reconstruction - images).square().flatten(1).sum(1), images[0].numel())
    for number, (x, y) in enumerate(zip(images.double().numpy(), reconstruction.double().numpy(), strict=True)):
        gaussian = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
        assert found[number] == pytest.approx(metrics.structural_similarity(x, y, channel_axis=0, **gaussian), abs=1e-4)
        assert errors[number] == pytest.approx(metrics.peak_signal_noise_ratio(x, y, data_range=1.0), abs=1e-3)


def test_an_image_is_most_similar_to_itself_and_its_psnr_stays_finite():
    reconstruction, images = pairs((3, 32, 32))
    assert ssim(images, images).tolist() == pytest.approx([1, 1, 1], abs=1e-6)
    assert psnr(torch.tensor([0.0, 3072.0]), 3072).tolist() == [100.0, 0.0]
    found = ssim(reconstruction, images)
    assert found[0] > found[1] > found[2] > 0
    assert ssim(1 - images, images).max() < 0.1


def test_autocast_does_not_reach_the_similarity():
    reconstruction, images = pairs((1, 32, 32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = ssim(reconstruction, images)
    assert torch.equal(inside, ssim(reconstruction, images))


@pytest.mark.parametrize("side", [1, 2, 8])
def test_windows_fit_into_small_images(side):
    images = torch.rand(2, 1, side, side, generator=torch.Generator().manual_seed(1))
    assert ssim(images, images).tolist() == pytest.approx([1, 1], abs=1e-5)
    assert bool((ssim(images.flip(2) * np.float32(0.5), images) < 0.99).all())
