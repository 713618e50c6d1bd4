"""Networks such as a user may write, with activations whose kernels round the last few numbers of a tensor otherwise."""

import torch
from torch import nn

from eae_dist.model.norm import GlobalBatchNorm


class Encoder(nn.Module):
    """Two convolutions and a dense layer."""

    def __init__(self, image_shape, latent_dim, width, bias):
        super().__init__()
        channels, height, sides = image_shape
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 7, 3, 2, 1),
            GlobalBatchNorm(7),
            nn.SiLU(),
            nn.Conv2d(7, 9, 3, 2, 1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(9 * height * sides // 16, latent_dim, bias=bias),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Decoder(nn.Module):
    """Two dense layers."""

    def __init__(self, image_shape, latent_dim, width):
        super().__init__()
        pixels = image_shape[0] * image_shape[1] * image_shape[2]
        self.inner = nn.Sequential(nn.Linear(latent_dim, 33), nn.Softplus())
        self.norm = GlobalBatchNorm(33)
        self.outer = nn.Sequential(nn.SiLU(), nn.Linear(33, pixels), nn.Sigmoid(), nn.Unflatten(1, image_shape))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.outer(self.norm(self.inner(z)))


class NormedTogether(nn.Module):
    """A parameter beside a batch norm in one module."""

    def __init__(self, image_shape, latent_dim, width, bias):
        super().__init__()
        self.norm, self.scale = GlobalBatchNorm(1), nn.Parameter(torch.ones(()))
        self.dense = nn.Linear(image_shape[1] * image_shape[2], latent_dim, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense(self.scale * self.norm(x).flatten(1))
