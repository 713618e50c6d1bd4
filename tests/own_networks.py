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


class ListEncoder(nn.Module):
    """Layers in lists, which have no forward pass, and one that takes two inputs and an option."""

    def __init__(self, image_shape, latent_dim, width, bias):
        super().__init__()
        channels, height, sides = image_shape
        self.convolutions = nn.ModuleList([nn.Conv2d(channels, 7, 3, 2, 1), nn.Conv2d(7, 9, 3, 2, 1)])
        self.norms = nn.ModuleList([GlobalBatchNorm(7), GlobalBatchNorm(9)])
        self.mixed = Mixed()
        self.head = nn.Linear(9 * height * sides // 16, latent_dim, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            before = convolution(x)
            x = self.mixed(before, norm(before), factor=0.3)
        return self.head(x.flatten(1))


class Mixed(nn.Module):
    """A sum of two activations with a weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor, y: torch.Tensor, factor: float) -> torch.Tensor:
        return factor * nn.functional.mish(x) + self.weight * nn.functional.silu(y)


class NormedTogether(nn.Module):
    """A parameter beside a batch norm in one module."""

    def __init__(self, image_shape, latent_dim, width, bias):
        super().__init__()
        self.norm, self.scale = GlobalBatchNorm(1), nn.Parameter(torch.ones(()))
        self.dense = nn.Linear(image_shape[1] * image_shape[2], latent_dim, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense(self.scale * self.norm(x).flatten(1))


class Inside(nn.Module):
    """An activation that a module with a batch norm computes itself."""

    def __init__(self, image_shape, latent_dim, width, bias):
        super().__init__()
        self.dense, self.norm = nn.Sequential(nn.Flatten(), nn.Linear(image_shape[1] * image_shape[2], 33)), GlobalBatchNorm(33)
        self.head = nn.Linear(33, latent_dim, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.sigmoid(self.norm(self.dense(x))))


class Reaching(Inside):
    """A module with a batch norm that uses a weight of another module itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.norm(self.dense(x)), self.head.weight)


class Placed(Inside):
    """A part that gets a tensor that is the same for all images."""

    def __init__(self, image_shape, latent_dim, width, bias):
        super().__init__(image_shape, latent_dim, width, bias)
        self.mixed = Mixed()
        self.register_buffer("places", torch.linspace(0, 1, 33)[None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.mixed(self.norm(self.dense(x)), self.places, factor=0.5))


class Counting(nn.Module):
    """Statistics of the images of a block."""

    def __init__(self, image_shape, latent_dim, width, bias):
        super().__init__()
        self.norm = nn.InstanceNorm2d(image_shape[0], track_running_stats=True)
        self.head = nn.Linear(image_shape[0] * image_shape[1] * image_shape[2], latent_dim, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(x).flatten(1))
