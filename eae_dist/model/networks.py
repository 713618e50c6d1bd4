"""Encoders, image [b, c, h, w] in [0, 1] -> latent [b, d], and decoders, which end in a sigmoid.

`rae32` and `rae64` are the networks of Ghosh et al. (ICLR 2020) for MNIST / CIFAR-10 and CelebA, layer for layer, with one
deviation: a layer directly before a batch norm has no bias, because the norm removes it and Adam would let it drift with
rounding noise. `small` is our own network for the embedded data.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import is_parametrized
from torch.utils.checkpoint import checkpoint

from eae_dist.distributed import active_blocks, by_block, in_blocks
from eae_dist.model.norm import GlobalBatchNorm


@dataclass(frozen=True)
class Family:
    """Sizes of an encoder and its decoder. Both list their channels in units of `width`; every encoder layer halves the image."""

    width: int
    kernel: int
    encoder: tuple[int, ...]
    decoder: tuple[int, ...]  # the first belongs to the dense layer; the other layers double the image
    last_stride: int  # of the output layer: 2 doubles the image once more
    centered_input: bool  # the encoder input is 2x - 1
    penalized_dense: bool  # an L2 penalty on the decoder includes its dense layer
    latent_dim: dict[int, int]  # by image channels

    @property
    def multiple(self) -> int:
        """Image sides must be multiples of this number."""
        return 2 ** len(self.encoder)

    @property
    def decoder_reduction(self) -> int:
        """Ratio of the image side to the side of the first feature map in the decoder."""
        return 2 ** (len(self.decoder) - 1) * self.last_stride


NETWORKS = {
    "small": Family(24, 4, (1, 2, 4), (4, 2, 1), 2, True, False, {1: 16, 3: 64}),
    "rae32": Family(128, 4, (1, 2, 4, 8), (8, 4, 2), 1, True, False, {1: 16, 3: 128}),
    "rae64": Family(128, 5, (1, 2, 4, 8), (8, 4, 2, 1), 1, False, True, {1: 64, 3: 64}),
}


class ConvEncoder(nn.Module):
    """Strided convolutions, each with batch norm and ReLU, then one dense layer per head.

    [b, c, h, w] -> [b, heads latent_dim].
    """

    def __init__(
        self,
        family: Family,
        image_shape: tuple[int, int, int],
        latent_dim: int,
        width: int,
        *,
        heads: int = 1,
        bias: bool,
        norm: dict | None,
    ):
        super().__init__()
        channels, height, width_pixels = image_shape
        self.centered_input = family.centered_input
        sizes = [channels, *(width * m for m in family.encoder)]
        self.layers = Layers()
        for before, after in itertools.pairwise(sizes):
            self.layers.extend(normalized(SameConv2d(before, after, family.kernel, 2, bias=norm is None), norm))
        features = sizes[-1] * (height // family.multiple) * (width_pixels // family.multiple)
        self.head = nn.Linear(features, heads * latent_dim, bias=bias)
        self.apply(initialize)
        for head in self.head.weight.split(latent_dim) if heads > 1 else ():
            nn.init.xavier_uniform_(head)  # each head is initialized as a separate layer
        self.to(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns all heads, [b, c, h, w] -> [b, heads latent_dim]."""
        x = 2 * x - 1 if self.centered_input else x
        return self.head(self.layers(x).flatten(1))


class ConvDecoder(nn.Module):
    """One dense layer without norm or activation, then transposed convolutions and a sigmoid: [b, d] -> [b, c, h, w]."""

    def __init__(self, family: Family, image_shape: tuple[int, int, int], latent_dim: int, width: int, *, norm: dict | None):
        super().__init__()
        channels, height, width_pixels = image_shape
        sizes = [width * m for m in family.decoder]
        start = (height // family.decoder_reduction, width_pixels // family.decoder_reduction)
        self.dense = Dense(latent_dim, sizes[0] * start[0] * start[1])
        self.dense.penalized = family.penalized_dense
        self.layers = Layers(nn.Unflatten(1, (sizes[0], *start)))
        for before, after in itertools.pairwise(sizes):
            self.layers.extend(normalized(SameConvTranspose2d(before, after, family.kernel, 2, bias=norm is None), norm))
        self.layers.append(SameConvTranspose2d(sizes[-1], channels, family.kernel, family.last_stride))
        self.apply(initialize)
        self.to(memory_format=torch.channels_last)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Returns images in [0, 1], [b, d] -> [b, c, h, w]."""
        logits = self.layers(self.dense(z))
        # The sigmoid is at least in float32: bfloat16 has steps of 1/256 near white.
        return by_block(torch.sigmoid, logits.to(torch.promote_types(logits.dtype, torch.float32)))


class Dense(nn.Linear):
    """A dense layer. penalized: whether an L2 penalty on the decoder includes it."""

    penalized = True


class Layers(nn.Sequential):
    """An nn.Sequential whose blocks can recompute their inner activations in the backward pass.

    A block starts at a batch norm and ends before the next one. If `checkpointed`, the backward pass recomputes norm and
    activation (Chen et al. 2016), but not the layer at the end of the block, because only the input of that layer is missing.
    So one of two activations is kept, and the results have the same bits.
    """

    checkpointed = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the output of the last layer; checkpointed blocks do not keep their inner activations."""
        if not (self.checkpointed and torch.is_grad_enabled()):
            return super().forward(x)
        for block in self.blocks():
            x = checkpointed(block, x) if block.has_inner_activations() else block(x)
        return x

    def blocks(self) -> list["Layers"]:
        """Returns the layers split into blocks; each block after the first starts at a batch norm."""
        layers = list(self)
        starts = [0, *(place for place, layer in enumerate(layers) if place and isinstance(layer, GlobalBatchNorm)), len(layers)]
        return [Layers(*layers[start:stop]) for start, stop in itertools.pairwise(starts)]

    def has_inner_activations(self) -> bool:
        """True if backward needs an activation inside this block, between its norm and a last layer with weights."""
        return len(self) > 1 and isinstance(self[0], GlobalBatchNorm) and any(True for _ in self[-1].parameters())


def checkpointed(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Returns block(x) and keeps only x; backward computes block(x) again, including the communication between ranks."""
    passes, blocks = itertools.count(), active_blocks()

    def run(x: torch.Tensor) -> torch.Tensor:
        with in_blocks(blocks), frozen_statistics(block) if next(passes) else nullcontext():
            return block(x)

    return checkpoint(run, x, use_reentrant=False)


def normalized(layer: nn.Conv2d | nn.ConvTranspose2d, norm: dict | None) -> list[nn.Module]:
    """Returns a convolution, its batch norm unless norm is None, and a ReLU."""
    norms = [] if norm is None else [GlobalBatchNorm(layer.out_channels, **norm)]
    return [layer, *norms, nn.ReLU(inplace=True)]


class SameConv2d(nn.Conv2d):
    """A convolution with the "same" padding of Keras: output sides are input sides / stride.

    An odd pixel of padding goes to the bottom and the right.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the convolution, [b, c, h, w] -> [b, c', h / stride, w / stride]."""
        total = self.kernel_size[0] - self.stride[0]
        before, after = total // 2, total - total // 2
        if before == after:
            return F.conv2d(x, self.weight, self.bias, self.stride, before)
        return F.conv2d(F.pad(x, (before, after, before, after)), self.weight, self.bias, self.stride)


class SameConvTranspose2d(nn.ConvTranspose2d):
    """The transpose of `SameConv2d`: output sides are input sides x stride."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]  # the stride alone gives the output size
        """Returns the transposed convolution, [b, c, h, w] -> [b, c', h stride, w stride]."""
        (stride, _), cropped = self.stride, (self.kernel_size[0] - self.stride[0]) // 2
        out = F.conv_transpose2d(x, self.weight, self.bias, self.stride, cropped)
        return out[..., : x.shape[-2] * stride, : x.shape[-1] * stride]


def initialize(layer: nn.Module) -> None:
    """Initializes a layer with the default of Keras, as for the published networks: Glorot uniform weights, zero biases."""
    if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
        nn.init.xavier_uniform_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def kernels_of(decoder: nn.Module) -> list[torch.Tensor]:
    """Returns the weights in an L2 penalty on a decoder: its convolutions and, except for rae32 and small, its dense layers."""
    layers = (layer for layer in decoder.modules() if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear))
    return [layer.weight for layer in layers if getattr(layer, "penalized", True)]


def normalize_spectrum(network: nn.Module) -> None:
    """Divides every kernel of convolutions and dense layers by its largest singular value, with one power iteration per step.

    Kernels are flattened as in the official RAE code: all dimensions except the outputs, or for a transposed convolution except
    the inputs (the default of torch there is the outputs). In the layout of torch, the kept dimension is always the first.
    """
    for layer in list(network.modules()):
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            spectral_norm(layer, dim=0)


@contextmanager
def one_power_iteration(network: nn.Module) -> Iterator[None]:
    """Makes one power iteration for the kernels of `normalize_spectrum`, and no more however often the network is used."""
    layers = [layer for layer in network.modules() if is_parametrized(layer, "weight")]
    iterating = [layer.get_submodule("parametrizations").training for layer in layers]
    for layer in layers:
        with torch.no_grad():
            layer.weight  # noqa: B018  reading it makes the iteration
        layer.get_submodule("parametrizations").eval()
    try:
        yield
    finally:
        for layer, was in zip(layers, iterating, strict=True):
            layer.get_submodule("parametrizations").train(was)


@contextmanager
def frozen_statistics(network: nn.Module) -> Iterator[None]:
    """Stops updates of running statistics and power iterations, because an earlier pass of the same images made them."""
    norms = [layer for layer in network.modules() if isinstance(layer, GlobalBatchNorm)]
    spectra = [layer.get_submodule("parametrizations") for layer in network.modules() if is_parametrized(layer, "weight")]
    momenta, iterating = [norm.momentum for norm in norms], [spectrum.training for spectrum in spectra]
    for norm in norms:
        norm.momentum = 0.0
    for spectrum in spectra:
        spectrum.eval()
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for spectrum, was in zip(spectra, iterating, strict=True):
            spectrum.train(was)
