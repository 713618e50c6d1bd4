"""Encoders and decoders: image [b, c, h, w] in [0, 1] -> latent [b, d], and back through a sigmoid.

`rae32` and `rae64` are the networks of Ghosh et al. (ICLR 2020) for MNIST / CIFAR-10 and CelebA, layer for layer, with one
deviation: a layer directly before a batch norm has no bias, because the norm removes it and Adam would let it drift on
rounding noise. `small` is ours, for the embedded data. A network of yours is a class with the same arguments.
"""

import importlib
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

from eae_dist.model.norm import GlobalBatchNorm


@dataclass(frozen=True)
class Family:
    """Shape of a network pair. `encoder` and `decoder` list channels in units of `width`; encoder layers halve the image."""

    width: int
    kernel: int
    encoder: tuple[int, ...]
    decoder: tuple[int, ...]  # the first is the dense layer's, the others double the image
    last_stride: int  # of the layer that makes the image: 2 doubles it once more
    centered_input: bool  # the encoder sees 2x - 1
    penalized_dense: bool  # an L2 penalty on the decoder takes in its dense layer
    latent_dim: dict[int, int]  # by image channels

    @property
    def multiple(self) -> int:
        """Image sides must be a multiple of this."""
        return 2 ** len(self.encoder)

    @property
    def decoder_reduction(self) -> int:
        """How much smaller than the image the decoder starts."""
        return 2 ** (len(self.decoder) - 1) * self.last_stride


NETWORKS = {
    "small": Family(24, 4, (1, 2, 4), (4, 2, 1), 2, True, False, {1: 16, 3: 64}),
    "rae32": Family(128, 4, (1, 2, 4, 8), (8, 4, 2), 1, True, False, {1: 16, 3: 128}),
    "rae64": Family(128, 5, (1, 2, 4, 8), (8, 4, 2, 1), 1, False, True, {1: 64, 3: 64}),
}


class ConvEncoder(nn.Module):
    """Strided convolutions, each with batch norm and ReLU, then a dense layer a head: [b, c, h, w] -> [b, heads latent_dim]."""

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
        for before, after in zip(sizes, sizes[1:], strict=False):
            self.layers.extend(normalized(SameConv2d(before, after, family.kernel, 2, bias=norm is None), norm))
        features = sizes[-1] * (height // family.multiple) * (width_pixels // family.multiple)
        self.head = nn.Linear(features, heads * latent_dim, bias=bias)
        self.apply(initialize)
        for head in self.head.weight.split(latent_dim) if heads > 1 else ():
            nn.init.xavier_uniform_(head)  # each as the layer of its own that it is
        self.to(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = 2 * x - 1 if self.centered_input else x
        return self.head(self.layers(x).flatten(1))


class ConvDecoder(nn.Module):
    """One dense layer without norm or activation, then transposed convolutions and a sigmoid: [b, d] -> [b, c, h, w]."""

    def __init__(self, family: Family, image_shape: tuple[int, int, int], latent_dim: int, width: int, *, norm: dict | None):
        super().__init__()
        channels, height, width_pixels = image_shape
        sizes = [width * m for m in family.decoder]
        start = (height // family.decoder_reduction, width_pixels // family.decoder_reduction)
        self.dense = nn.Linear(latent_dim, sizes[0] * start[0] * start[1])
        self.dense.penalized = family.penalized_dense
        self.layers = Layers(nn.Unflatten(1, (sizes[0], *start)))
        for before, after in zip(sizes, sizes[1:], strict=False):
            self.layers.extend(normalized(SameConvTranspose2d(before, after, family.kernel, 2, bias=norm is None), norm))
        self.layers.append(SameConvTranspose2d(sizes[-1], channels, family.kernel, family.last_stride))
        self.apply(initialize)
        self.to(memory_format=torch.channels_last)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        logits = self.layers(self.dense(z))
        # At least in float32: bfloat16 has steps of 1/256 near white.
        return torch.sigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32)))


class Layers(nn.Sequential):
    """nn.Sequential in blocks, each from a batch norm to the layer before the next, that can do without their inner activations.

    Where `checkpointed`, backward computes norm and activation again (Chen et al. 2016); not the layer at the block's end, whose
    input is all that was missing. So one activation is kept of two, with the same bits.
    """

    checkpointed = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not (self.checkpointed and torch.is_grad_enabled()):
            return super().forward(x)
        for block in self.blocks():
            x = checkpointed(block, x) if block.has_inner_activations() else block(x)
        return x

    def blocks(self) -> list["Layers"]:
        starts = [0, *(place for place, layer in enumerate(self) if place and isinstance(layer, GlobalBatchNorm)), len(self)]
        return [self[start:stop] for start, stop in zip(starts, starts[1:], strict=False)]

    def has_inner_activations(self) -> bool:
        """Whether a block has some that backward wants: between its norm and a layer with weights at its end."""
        return len(self) > 1 and isinstance(self[0], GlobalBatchNorm) and any(True for _ in self[-1].parameters())


def checkpointed(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """block(x) of which only x is kept for backward, which computes it again. Ranks communicate in it once more."""
    passes = itertools.count()

    def run(x: torch.Tensor) -> torch.Tensor:
        with frozen_statistics(block) if next(passes) else nullcontext():
            return block(x)

    return checkpoint(run, x, use_reentrant=False)


def normalized(layer: nn.Module, norm: dict | None) -> list[nn.Module]:
    """A convolution, its batch norm unless norm is None, and ReLU."""
    norms = [] if norm is None else [GlobalBatchNorm(layer.out_channels, **norm)]
    return [layer, *norms, nn.ReLU(inplace=True)]


class SameConv2d(nn.Conv2d):
    """A convolution padded as Keras' "same": output sides are input sides / stride, an odd pixel goes to the bottom and right."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = self.kernel_size[0] - self.stride[0]
        before, after = total // 2, total - total // 2
        if before == after:
            return F.conv2d(x, self.weight, self.bias, self.stride, before)
        return F.conv2d(F.pad(x, (before, after, before, after)), self.weight, self.bias, self.stride)


class SameConvTranspose2d(nn.ConvTranspose2d):
    """The transpose of `SameConv2d`: output sides are input sides x stride."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (stride, _), cropped = self.stride, (self.kernel_size[0] - self.stride[0]) // 2
        out = F.conv_transpose2d(x, self.weight, self.bias, self.stride, cropped)
        return out[..., : x.shape[-2] * stride, : x.shape[-1] * stride]


def initialize(layer: nn.Module) -> None:
    """Keras' default, which the published networks were trained from: Glorot uniform weights, zero biases."""
    if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
        nn.init.xavier_uniform_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def kernels_of(decoder: nn.Module) -> list[torch.Tensor]:
    """The weights that an L2 penalty on a decoder means: of its convolutions and, but for rae32 and small, its dense layers."""
    layers = (layer for layer in decoder.modules() if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear))
    return [layer.weight for layer in layers if getattr(layer, "penalized", True)]


def normalize_spectrum(network: nn.Module) -> None:
    """Divides every kernel of convolutions and dense layers by its largest singular value, one power iteration a step.

    As the official RAE code flattens them: over all but the outputs, for a transposed convolution all but the inputs (torch's
    own choice there would be the outputs); in torch's layout the first dimension in each case.
    """
    for layer in list(network.modules()):
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            spectral_norm(layer, dim=0)


@contextmanager
def one_power_iteration(network: nn.Module) -> Iterator[None]:
    """The kernels of `normalize_spectrum` move on by one iteration and then stand still, however often the network is used."""
    layers = [layer for layer in network.modules() if is_parametrized(layer, "weight")]
    for layer in layers:
        with torch.no_grad():
            layer.weight  # noqa: B018  computing it is the iteration
        layer.parametrizations.eval()
    try:
        yield
    finally:
        for layer in layers:
            layer.parametrizations.train(layer.training)


@contextmanager
def frozen_statistics(network: nn.Module) -> Iterator[None]:
    """Running statistics and power iterations stand still: an earlier pass of the same images has moved them."""
    norms = [layer for layer in network.modules() if isinstance(layer, GlobalBatchNorm)]
    spectra = [layer.parametrizations for layer in network.modules() if is_parametrized(layer, "weight")]
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


def own_network(name: str, key: str, arguments: dict) -> nn.Module:
    """A user's network, `package.module:Class` called with keyword arguments. Raises ValueError that names the key."""
    cls = own_class(name, key)
    try:
        network = cls(**arguments)
    except TypeError as error:
        raise ValueError(f"{key}={name} cannot be called with {', '.join(arguments)} by keyword: {error}") from error
    refuse_local_norms(network, key)
    return network


def own_class(name: str, key: str) -> type[nn.Module]:
    """The nn.Module class that a user names as `package.module:Class`. Raises ValueError that names the configuration's key."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{key}={name} cannot be imported as package.module:Class ({error})") from error
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(f"{key}={name} is not a class derived from torch.nn.Module")
    return found


def refuse_local_norms(network: nn.Module, key: str) -> None:
    """Raises ValueError if a user's network normalizes with statistics of one rank's rows only."""
    for name, layer in network.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"{key}: layer {name!r} is {type(layer).__name__}, whose statistics would differ between ranks; "
                f"use eae_dist.model.norm.GlobalBatchNorm"
            )
