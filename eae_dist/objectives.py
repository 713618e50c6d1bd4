"""The losses, one small class a row of the paper's table; `OBJECTIVES` is the choice by name.

An objective wraps the autoencoder, so that DDP sees one module whose forward returns the named terms. A term is this rank's
*share*: the mean of the shares over ranks is the term of the global batch (law of the losses: `losses/terms.py`).
b: this rank's rows, n: all rows of the batch, d: latent dimensions, P C: pixels times channels.
"""

from dataclasses import replace

import torch
from torch import nn

from eae_dist.config import Config, ModelConfig, ObjectiveConfig
from eae_dist.draws import derive_key
from eae_dist.losses.entropy import entropy_terms
from eae_dist.losses.terms import mean_share, squared_error
from eae_dist.model.autoencoder import LATENT_EPS, Autoencoder, build_autoencoder, resolve_model
from eae_dist.model.norm import GlobalBatchNorm


class Objective(nn.Module):
    """A loss over an autoencoder. `latent_norm` says whether the latent passes a batch norm without scale or shift."""

    latent_norm = False

    def __init__(self, autoencoder: Autoencoder, config: ObjectiveConfig, seed: int):
        super().__init__()
        self.autoencoder, self.config, self.seed = autoencoder, config, seed

    def forward(self, images: torch.Tensor, first: torch.Tensor, rows: int, step: int) -> dict[str, torch.Tensor]:
        """Shares of the loss and its terms: images [b, c, h, w] in [0, 1], first bool [b], rows = n -> scalars by name.

        "loss" is what is minimized; "reconstruction" is squared error per image, "reconstruction_per_pixel" the same per
        pixel and channel. `first` is False for a second copy of a sample, which counts in every mean but is no neighbor.
        """
        latents = self.autoencoder.encode(images)
        errors = squared_error(self.autoencoder.decode(latents), images)
        return self.terms(errors, latents, first, rows, step)

    def terms(
        self, errors: torch.Tensor, latents: torch.Tensor, first: torch.Tensor, rows: int, step: int
    ) -> dict[str, torch.Tensor]:
        """The terms from squared errors per image [b] and latents [b, d]; validation calls it once for a whole split."""
        channels, height, width = self.autoencoder.image_shape
        reconstruction = mean_share(errors, rows)
        per_pixel = reconstruction / (channels * height * width)
        regularization = self.regularization(latents, first, step)
        loss = per_pixel + regularization.pop("penalty") if regularization else per_pixel
        return {"loss": loss, "reconstruction": reconstruction, "reconstruction_per_pixel": per_pixel, **regularization}

    def regularization(self, latents: torch.Tensor, first: torch.Tensor, step: int) -> dict[str, torch.Tensor]:
        """{"penalty": what is added to the loss, other terms for the log}, or nothing."""
        return {}


class AE(Objective):
    """The plain autoencoder: squared error alone."""


class EAE(Objective):
    """Entropic autoencoder: SSE/(P C) - w H/d, H the k-NN entropy of the batch-normed latents of all ranks (Ghose et al. 2020).

    Both terms are per dimension, so that a weight w carries over image and latent sizes.
    """

    latent_norm = True

    def regularization(self, latents, first, step):
        config = self.config
        features = self.features(latents, step)
        entropy, floored = entropy_terms(features, k=config.k, average_k=config.average_k, eps2=config.eps2, valid=first)
        return {
            "penalty": entropy * (-config.entropy_weight / features.shape[1]),
            "entropy": entropy.detach(),
            "floored_pairs": mean_share(floored, 1),
        }

    def features(self, latents: torch.Tensor, step: int) -> torch.Tensor:
        """What the entropy is taken of, [b, d] -> [b, m]."""
        return latents


class EAELinear(EAE):
    """Entropic autoencoder regularized on a linear map: H is that of the batch-normed image of z under an orthonormal matrix.

    Our reading of one line of the paper's Table 1. The matrix is not learned: a learned one would whiten its image by itself
    and leave the encoder unregularized. It is drawn from the seed and saved with the model, or redrawn from (seed, step).
    """

    def __init__(self, autoencoder: Autoencoder, config: ObjectiveConfig, seed: int):
        super().__init__(autoencoder, config, seed)
        self.map_dim = config.map_dim or autoencoder.latent_dim
        if self.map_dim > autoencoder.latent_dim:
            raise ValueError(f"objective.map_dim={self.map_dim} must be at most model.latent_dim={autoencoder.latent_dim}")
        if config.map == "fixed":
            self.register_buffer("map", orthonormal(autoencoder.latent_dim, self.map_dim, (seed, 0)))
        self.map_norm = GlobalBatchNorm(self.map_dim, affine=False, eps=LATENT_EPS, track=False)

    def features(self, latents, step):
        matrix = self.map if self.config.map == "fixed" else orthonormal(latents.shape[1], self.map_dim, (self.seed, step + 1))
        with torch.autocast(latents.device.type, enabled=False):
            return self.map_norm(latents @ matrix.to(latents))


OBJECTIVES: dict[str, type[Objective]] = {"eae": EAE, "eae_linear": EAELinear, "ae": AE}


def objective_class(name: str) -> type[Objective]:
    """The row of OBJECTIVES; an unknown name is a ValueError that lists the known."""
    if name not in OBJECTIVES:
        raise ValueError(f"objective.name={name} is unknown; it is one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]


def orthonormal(d: int, m: int, key: tuple[int, int]) -> torch.Tensor:
    """A uniformly random matrix of m orthonormal columns, float64 [d, m], that depends on the key alone."""
    generator = torch.Generator().manual_seed(derive_key(*key))
    q, r = torch.linalg.qr(torch.randn(d, m, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()  # Mezzadri 2007: makes the QR's choice of signs immaterial


def resolve(config: Config, image_shape: tuple[int, int, int]) -> Config:
    """The configuration with every default that depends on the data filled in; ValueError for an unknown objective or network."""
    objective_class(config.objective.name)
    lanes = config.data.lanes or config.train.global_batch
    return replace(config, data=replace(config.data, lanes=lanes), model=resolve_model(config.model, image_shape))


def build_objective(model: ModelConfig, objective: ObjectiveConfig, image_shape: tuple[int, int, int], seed: int) -> Objective:
    """The objective with initial weights that depend on the seed alone; the configuration is one that `resolve` has filled in."""
    cls = objective_class(objective.name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        autoencoder = build_autoencoder(model, image_shape, latent_norm=cls.latent_norm)
    return cls(autoencoder, objective, seed)
