"""The autoencoder: encoder, decoder and, for objectives that need it, a latent norm."""

from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from torch import nn

from eae_dist.config import ModelConfig
from eae_dist.data.order import filled
from eae_dist.distributed import by_block
from eae_dist.errors import UserError
from eae_dist.model.networks import NETWORKS, ConvDecoder, ConvEncoder, Family, normalize_spectrum
from eae_dist.model.norm import GlobalBatchNorm
from eae_dist.model.own_networks import own_network
from eae_dist.numerics.precision import full_precision

LATENT_EPS = 1e-5  # small, so that the variance of the latent is close to 1
LOG_SIGMA_LIMIT = 5  # as in the official RAE code: log sigma = 5 tanh(.)


class Autoencoder(nn.Module):
    """An encoder and a decoder: images [b, c, h, w] in [0, 1] <-> latents [b, d].

    latent_norm: the latent is batch-normed over the rows of all ranks, without scale or shift, to mean 0 and variance 1.
    variational: the encoder has a second head for the deviations of the posterior, and `encode` returns the means.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        image_shape: Sequence[int],
        latent_dim: int,
        *,
        latent_norm: GlobalBatchNorm | None = None,
        variational: bool = False,
    ):
        super().__init__()
        self.encoder, self.latent_norm, self.decoder = encoder, latent_norm, decoder  # in the order of the data flow
        channels, height, width = image_shape
        self.image_shape, self.latent_dim, self.variational = (channels, height, width), latent_dim, variational

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Returns latents (posterior means if variational), [b, c, h, w] -> [b, d]."""
        return self.latents(self.encoder_output(images))[0]

    def encoder_output(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the encoder output before the latent norm, [b, c, h, w] -> [b, heads d], in float32 or better.

        Raises ValueError if the encoder returns another shape.
        """
        h = self.encoder(images)
        if h.shape != (wanted := (len(images), self.latent_dim * (2 if self.variational else 1))):
            raise UserError(f"the encoder (model.encoder) returned {tuple(h.shape)} for {len(images)} images; expected {wanted}")
        return h.to(torch.promote_types(h.dtype, torch.float32))

    def latents(self, encoder_output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns latents [b, d] and, if variational, the logarithms of their deviations, [b, d] in [-5, 5]; else None."""
        # Statistics and entropy are in float32, whatever the precision of the convolutions.
        with full_precision(encoder_output.device):
            if self.variational:
                mean, raw = encoder_output.chunk(2, 1)
                return mean, by_block(lambda x: LOG_SIGMA_LIMIT * torch.tanh(x), raw)
            return (encoder_output if self.latent_norm is None else self.latent_norm(encoder_output)), None

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Returns images in [0, 1], [b, d] -> [b, c, h, w]."""
        return self.decoder(latents)


def resolve_model(config: ModelConfig, image_shape: Sequence[int], *, latent_norm: bool = False) -> ModelConfig:
    """Returns the configuration with the default width and latent size of the network filled in.

    Raises ValueError if the images do not fit the network, and for a setting of batch norms that the model does not have.
    """
    channels, height, width = image_shape
    family = _family(config.network)
    step = family.multiple
    if (height % step or width % step) and not (config.encoder and config.decoder):
        sizes = [step * m for m in sorted({max(1, height // step), height // step + 1})]
        raise UserError(
            f"model.network={config.network} takes images whose sides are multiples of {step}, got {height}x{width}; "
            f"pack them with --size {' or --size '.join(map(str, sizes))}, or set model.encoder "
            f"and model.decoder to your own networks"
        )
    if config.norm not in ("batch", "none"):
        raise UserError(f"model.norm={config.norm} is unknown; it is batch or none")
    own = config.encoder is not None and config.decoder is not None
    normed = config.norm == "batch" and not own
    unread = {"norm": own, "norm_eps": not normed, "norm_momentum": not (normed or latent_norm)}
    for setting in fields(ModelConfig):
        value = getattr(config, setting.name)
        if unread.get(setting.name) and value != setting.default:
            raise UserError(f"model.{setting.name}={value} has no effect on a model without built-in batch norms; leave it out")
    latent_dim = config.latent_dim or family.latent_dim.get(channels, family.latent_dim[3])
    return replace(config, width=config.width or family.width, latent_dim=latent_dim)


def build_autoencoder(
    config: ModelConfig,
    image_shape: Sequence[int],
    *,
    latent_norm: bool = False,
    variational: bool = False,
    spectral: bool = False,
) -> Autoencoder:
    """Builds an initialized autoencoder from a configuration that `resolve_model` has filled in.

    variational: the encoder has a second head. spectral: every kernel is divided by its largest singular value.
    """
    assert config.width is not None and config.latent_dim is not None  # resolve_model has filled them in
    channels, height, width = image_shape
    family, shape, heads = _family(config.network), (channels, height, width), 2 if variational else 1
    norm = {"eps": config.norm_eps, "momentum": config.norm_momentum} if config.norm == "batch" else None
    bias = not latent_norm  # the latent norm would remove the bias of the head
    if config.encoder is None:
        encoder: nn.Module = ConvEncoder(family, shape, config.latent_dim, config.width, heads=heads, bias=bias, norm=norm)
    else:
        sizes = {"image_shape": shape, "latent_dim": heads * config.latent_dim, "width": config.width, "bias": bias}
        encoder = own_network(config.encoder, "model.encoder", sizes)
    if config.decoder is None:
        decoder: nn.Module = ConvDecoder(family, shape, config.latent_dim, config.width, norm=norm)
    else:
        sizes = {"image_shape": shape, "latent_dim": config.latent_dim, "width": config.width}
        decoder = own_network(config.decoder, "model.decoder", sizes)
    if spectral:
        normalize_spectrum(encoder)
        normalize_spectrum(decoder)
    norm_layer = None
    if latent_norm:
        norm_layer = GlobalBatchNorm(config.latent_dim, affine=False, eps=LATENT_EPS, momentum=config.norm_momentum)
    return Autoencoder(encoder, decoder, shape, config.latent_dim, latent_norm=norm_layer, variational=variational)


def _family(name: str) -> Family:
    if name not in NETWORKS:
        raise UserError(f"model.network={name} is unknown; it is one of {', '.join(NETWORKS)}")
    return NETWORKS[name]


@torch.no_grad()
def encoded(autoencoder: Autoencoder, images: torch.Tensor, block: int, device: torch.device) -> torch.Tensor:
    """Encodes uint8 images [b, c, h, w], b <= block, padded to a full block -> latents [b, d]: the same bits for any b."""
    return autoencoder.encode(filled(to_unit(images, device), block))[: len(images)]


def to_unit(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Converts uint8 images of any memory format to contiguous floating point in [0, 1] on the device."""
    images = images.to(device, non_blocking=True)
    return images.to(torch.get_default_dtype(), memory_format=torch.contiguous_format).div_(255)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Converts floating point in [0, 1] to uint8, with rounding."""
    return images.clamp(0, 1).mul(255).round().to(torch.uint8)
