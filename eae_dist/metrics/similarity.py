"""How similar a reconstruction is to its image: PSNR and SSIM. Images are [b, c, h, w] in [0, 1]."""

import torch
import torch.nn.functional as F

from eae_dist.numerics.precision import full_precision

WINDOW, DEVIATION = 11, 1.5  # pixels: the Gaussian window of Wang et al. 2004
K1, K2 = 0.01, 0.03
LARGEST_PSNR = 100.0  # of images that are equal: the mean over images stays finite


def psnr(error: torch.Tensor, numbers: int) -> torch.Tensor:
    """Returns the peak signal-to-noise ratio in dB, at most 100: squared error of each image [b] -> [b].

    numbers: pixels times channels of an image.
    """
    return (-10 * torch.log10(error / numbers)).clamp(max=LARGEST_PSNR)


def ssim(reconstruction: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Returns the structural similarity of each image, [b, c, h, w] x 2 -> [b] in [-1, 1] (Wang et al. 2004).

    It is the mean over channels and over the windows that lie inside the image. In images with a side of less than 11 pixels, the
    windows have the largest odd side that fits.
    """
    channels, height, width = images.shape[1:]
    side = min(WINDOW, height - 1 + height % 2, width - 1 + width % 2)
    place = torch.arange(side, device=images.device, dtype=images.dtype) - side // 2
    weights = (-place.square() / (2 * DEVIATION**2)).exp()
    weights = (weights / weights.sum()).expand(channels, 1, 1, side)

    def mean(x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.conv2d(x, weights, groups=channels), weights.mT, groups=channels)

    x, y = images, reconstruction.to(images.dtype)
    with full_precision(images.device):  # the variances are small differences
        mean_x, mean_y = mean(x), mean(y)
        variance_x, variance_y = mean(x * x) - mean_x * mean_x, mean(y * y) - mean_y * mean_y
        covariance = mean(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + K1**2) / (mean_x * mean_x + mean_y * mean_y + K1**2)
    structure = (2 * covariance + K2**2) / (variance_x + variance_y + K2**2)
    return (luminance * structure).flatten(1).mean(1)
