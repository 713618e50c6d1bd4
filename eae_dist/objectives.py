"""The losses: one small class per row of the table in the paper, and two rivals beyond it. `OBJECTIVES` maps names to classes.

An objective wraps the autoencoder, so that DDP sees one module whose forward returns the named terms. A term is this rank's
*share*: the mean of the shares over ranks is the term of the global batch (`losses/terms.py`).

    loss = w SSE + sum over the penalties of weight times term

SSE: squared error per image, x in [0, 1]. The scales are those of the official code of Ghosh et al. (ICLR 2020), so its
weights can be used unchanged: w = 1/(P C) for the deterministic rows, 1/C for `vae`, `cv_vae` and `two_stage_vae`.
b: this rank's rows, n: all rows of the batch, d: latent dimensions, P: pixels, C: channels.
"""

from dataclasses import fields, replace
from typing import ClassVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from eae_dist.config import Config, ModelConfig, ObjectiveConfig
from eae_dist.distributed import active_blocks, by_block, in_blocks, local_blocks, rank, world_size
from eae_dist.errors import UserError
from eae_dist.losses.entropy import entropy_terms
from eae_dist.losses.sliced import epps_pulley, random_directions, sliced_wasserstein
from eae_dist.losses.terms import gaussian_divergence, kernel_discrepancy, mean_share, squared_error, sum_of_squares
from eae_dist.metrics.similarity import psnr, ssim
from eae_dist.model.autoencoder import LATENT_EPS, Autoencoder, build_autoencoder, resolve_model
from eae_dist.model.networks import kernels_of
from eae_dist.model.norm import GlobalBatchNorm
from eae_dist.numerics.keyed_random import derive_key, normal, row_keys
from eae_dist.numerics.precision import full_precision

Latents = tuple[torch.Tensor, torch.Tensor | None]  # means and the logarithms of deviations, [b, d] each
Terms = dict[str, torch.Tensor]  # shares of the terms, or values per row, by name
POSTERIOR, PRIOR, INPUT, MAP, DIRECTIONS = range(5)  # purposes of the random numbers of a batch
REDUCTIONS = {  # how each penalty is reduced, in words
    "latent_l2": "mean over images and dimensions",
    "decoder_l2": "sum over the decoder's kernels",
    "gradient_penalty": "mean over images and dimensions",
    "kl": "nats, sum over dimensions, mean over images",
    "mmd": "squared MMD of the batch",
    "entropy": "nats, of the batch; the setting is per dimension",
    "epps_pulley": "of the batch, mean over random directions",
    "sliced_wasserstein": "squared distance of the batch, mean over random directions",
}


class Objective(nn.Module):
    """Squared error plus the penalties of one row of the table.

    penalties: term -> the setting with its weight. settings: other keys of `objective.*` that the row reads.
    latent_norm, variational, spectral: options of its autoencoder (`build_autoencoder`).
    twice_differentiated: whether the decoder is differentiated twice. first_stage: the row with which it shares its weights.
    second_stage: the density that replaces N(0, I); reconstructions pass through it as well.
    """

    penalties: ClassVar[dict[str, str]] = {}
    settings: tuple[str, ...] = ()
    latent_norm = variational = spectral = twice_differentiated = False
    mean_over_pixels = True  # whether w is 1/(P C) or 1/C
    first_stage: str | None = None
    second_stage: str | None = None

    def __init__(self, autoencoder: Autoencoder, config: ObjectiveConfig, seed: int):
        super().__init__()
        self.autoencoder, self.config, self.seed = autoencoder, config, seed
        # Process group (distributed.subgroup) over which training computes the entropy; None: all ranks.
        self.group: dist.ProcessGroup | None = None
        self.row_counts: list[int] | None = None  # rows of each rank in every batch of training; None: asked in every batch
        self.block_edges: np.ndarray | None = None  # first row of each block of a training batch, then n; None: no blocks
        channels, height, width = autoencoder.image_shape
        self.pixels = channels * height * width
        self.reconstruction_weight = config.reconstruction_weight or 1 / (self.pixels if self.mean_over_pixels else channels)

    def forward(
        self, images: torch.Tensor, is_first_copy: torch.Tensor | None, global_batch: int, row_ids: np.ndarray, key: int
    ) -> dict[str, torch.Tensor]:
        """Returns shares of the loss and its terms: images [b, c, h, w] in [0, 1] -> scalars by name.

        is_first_copy: bool [b], False for a second copy of a sample, which counts in every mean but is not a neighbor. None on
        every rank: there is no second copy in the global batch.
        global_batch: n. row_ids: int64 [b], numbers of these rows in the global batch. row_ids and key fix all noise.
        "loss" is minimized, "reconstruction" is the squared error per image, and "reconstruction_per_pixel" is the squared
        error per pixel and channel.
        """
        with in_blocks(None if self.block_edges is None else local_blocks(self.block_edges, row_ids)):
            return self.terms(self.per_row(images, row_ids, key), is_first_copy, global_batch, row_ids, key)

    def per_row(self, images: torch.Tensor, row_ids: np.ndarray, key: int) -> dict[str, torch.Tensor]:
        """Returns the values per row: "error" [b], "latent" [b, d] and penalties that are means over rows, [b]."""
        return self.decoded(self.latents(self.encoder_output(images, row_ids, key)), images, row_ids, key)

    # `per_row` is split into these three methods, because accumulation.py calls them one by one.

    def encoder_output(self, images: torch.Tensor, row_ids: np.ndarray, key: int) -> torch.Tensor:
        """Returns the encoder output, [b, d] or for a variational model [b, 2d]; `latents` converts it to latents."""
        return self.autoencoder.encoder_output(images)

    def latents(self, encoder_output: torch.Tensor) -> Latents:
        """Returns latents, and for a posterior the logarithms of its deviations, from the encoder output of a whole batch."""
        return self.autoencoder.latents(encoder_output)

    def decoded(self, latents: Latents, images: torch.Tensor, row_ids: np.ndarray, key: int) -> dict[str, torch.Tensor]:
        """Returns the values of `per_row` from the latents of any part of the batch."""
        mean, _ = latents
        return self.compared(self.autoencoder.decode(mean), images) | {"latent": mean}

    def compared(self, reconstruction: torch.Tensor, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns the squared error of each image, and in validation its PSNR and SSIM, [b] each."""
        error = squared_error(reconstruction, images)
        if self.training:
            return {"error": error}
        return {"error": error, "psnr": psnr(error, self.pixels), "ssim": ssim(reconstruction, images)}

    def terms(
        self,
        per_row: dict[str, torch.Tensor],
        is_first_copy: torch.Tensor | None,
        global_batch: int,
        row_ids: np.ndarray,
        key: int,
    ) -> dict[str, torch.Tensor]:
        """Returns the terms from the values of `per_row`, in float32 or better; validation calls it once for a whole split."""
        with full_precision(per_row["latent"].device):
            terms = self.terms_of_rows(per_row, global_batch)
            for name in self.penalties:
                if name not in per_row:
                    terms |= getattr(self, name)(per_row["latent"], is_first_copy, global_batch, row_ids, key)
        loss = self.weighted(terms)
        per_pixel = terms["reconstruction"] / self.pixels
        logged = {name: term.detach() for name, term in terms.items() if name != "reconstruction"}
        return {"loss": loss, "reconstruction": terms["reconstruction"], "reconstruction_per_pixel": per_pixel, **logged}

    def terms_of_rows(self, per_row: dict[str, torch.Tensor], global_batch: int) -> dict[str, torch.Tensor]:
        """Returns the terms that are means over rows; the terms of the parts of a batch add up to those of the batch."""
        names = (*self.penalties, "psnr", "ssim")
        means = {name: mean_share(per_row[name], global_batch) for name in names if name in per_row}
        return {"reconstruction": mean_share(per_row["error"], global_batch), **means}

    def weighted(self, terms: dict[str, torch.Tensor]) -> torch.Tensor:
        """Returns the weighted sum of these terms, their part of the loss."""
        loss = terms["reconstruction"] * self.reconstruction_weight
        for name, weight in self.weights().items():
            if name in terms:
                loss = loss + terms[name] * weight
        return loss

    def weights(self) -> dict[str, float]:
        """Returns the factor of each penalty in the loss."""
        return {name: getattr(self.config, key) for name, key in self.penalties.items()}

    def formula(self) -> str:
        """Returns the loss in words, with the values of its weights."""
        parts = [
            f"{self.reconstruction_weight:.4g} reconstruction (squared error, sum over pixels and channels, mean over images)"
        ]
        for name, weight in self.weights().items():
            setting = self.penalties[name]
            parts.append(f"{weight:.4g} {name} ({REDUCTIONS[name]}; objective.{setting}={getattr(self.config, setting):g})")
        return " + ".join(parts)

    # Penalties on the whole batch: (latents [b, d], is_first_copy, global_batch, row_ids, key) -> shares by name.

    def latent_l2(
        self, latents: torch.Tensor, is_first_copy: torch.Tensor | None, global_batch: int, row_ids: np.ndarray, key: int
    ) -> Terms:
        """Returns the mean square of the entries of the latents."""
        return {"latent_l2": mean_share(by_block(mean_square, latents), global_batch)}

    def decoder_l2(
        self, latents: torch.Tensor, is_first_copy: torch.Tensor | None, global_batch: int, row_ids: np.ndarray, key: int
    ) -> Terms:
        """Returns the sum of squares of the kernels of the decoder."""
        kernels, blocks = kernels_of(self.autoencoder.decoder), active_blocks()
        if blocks is not None:  # the first block of the batch has the gradient
            kernels = [blocks.weights(kernel)[0] if rank() == 0 else kernel.detach() for kernel in kernels]
        return {"decoder_l2": sum_of_squares(kernels)}  # the whole term on every rank

    def mmd(
        self, latents: torch.Tensor, is_first_copy: torch.Tensor | None, global_batch: int, row_ids: np.ndarray, key: int
    ) -> Terms:
        """Returns the squared MMD between the latents and draws of N(0, I)."""
        counts = self.row_counts if self.training else None
        return {"mmd": kernel_discrepancy(latents, noise(latents, row_ids, key, PRIOR), counts)}

    def entropy(
        self, latents: torch.Tensor, is_first_copy: torch.Tensor | None, global_batch: int, row_ids: np.ndarray, key: int
    ) -> Terms:
        """Returns the entropy and the number of floored pairs: pairs of neighbors closer than sqrt(eps2)."""
        config, group = self.config, self.group if self.training else None  # validation must not depend on the number of ranks
        counts = self.row_counts if self.training else None
        if counts is not None and group is not None:
            first = rank() - rank(group)  # a group has consecutive ranks
            counts = counts[first : first + world_size(group)]
        try:
            entropy, floored = entropy_terms(
                latents,
                k=config.k,
                average_k=config.average_k,
                eps2=config.eps2,
                valid=is_first_copy,
                counts=counts,
                group=group,
            )
        except UserError as error:
            compared = "a global batch" if group is None else "groups (objective.group)"
            raise UserError(
                f"objective.k={config.k} needs {compared} of more than {config.k} distinct rows; lower objective.k or raise "
                f"train.global_batch ({error})"
            ) from error
        return {"entropy": entropy, "floored_pairs": floored if active_blocks() else mean_share(floored, 1)}


class AE(Objective):
    """The plain autoencoder: squared error only."""


class AEL2(Objective):
    """The plain autoencoder with an L2 penalty on the kernels of the decoder."""

    penalties: ClassVar = {"decoder_l2": "decoder_weight"}


class RAE(Objective):
    """Regularized autoencoder: adds beta mean_j z_j^2 to the loss (Ghosh et al. 2020)."""

    penalties: ClassVar = {"latent_l2": "latent_weight"}


class RAEL2(RAE):
    """Regularized autoencoder with an L2 penalty on the kernels of the decoder."""

    penalties: ClassVar = RAE.penalties | {"decoder_l2": "decoder_weight"}


class RAEGP(RAE):
    """Regularized autoencoder with a penalty on the squared gradient of ||D(z)||^2, summed over the batch, with respect to z.

    The batch norms of the decoder couple the batch, so the gradient of each latent has contributions of all images on all ranks.
    """

    penalties: ClassVar = RAE.penalties | {"gradient_penalty": "gradient_weight"}
    twice_differentiated = True

    def decoded(self, latents: Latents, images: torch.Tensor, row_ids: np.ndarray, key: int) -> Terms:
        """Returns the values per row, with the gradient penalty."""
        mean, _ = latents
        learning = torch.is_grad_enabled()  # False in validation, where the batch norms do not couple rows
        with torch.enable_grad():
            at = mean if learning else mean.requires_grad_()
            decoded = self.autoencoder.decode(at)
            (gradient,) = torch.autograd.grad(decoded.square().sum(), at, create_graph=learning)
        penalty = by_block(mean_square, gradient)
        per_row = self.compared(decoded, images) | {"latent": mean, "gradient_penalty": penalty}
        return per_row if learning else {name: rows.detach() for name, rows in per_row.items()}


class RAESN(RAE):
    """Regularized autoencoder with every kernel of encoder and decoder divided by its largest singular value."""

    spectral = True


class VAE(Objective):
    """Variational autoencoder: SSE/C + w KL, with one draw of the posterior per row."""

    penalties: ClassVar = {"kl": "kl_weight"}
    mean_over_pixels = False
    variational = True

    def decoded(self, latents: Latents, images: torch.Tensor, row_ids: np.ndarray, key: int) -> Terms:
        """Returns the values per row; images are decoded from a draw of the posterior."""
        mean, log_sigma = latents
        assert log_sigma is not None  # the objective is variational, or has a fixed deviation
        drawn = mean + by_block(torch.exp, log_sigma) * noise(mean, row_ids, key, POSTERIOR)
        compared = self.compared(self.autoencoder.decode(drawn), images)
        return compared | {"latent": mean, "kl": gaussian_divergence(mean, log_sigma)}


class ConstantVarianceVAE(VAE):
    """A VAE with a fixed standard deviation of the posterior, `objective.sigma`."""

    settings = ("sigma",)
    variational = False

    def latents(self, encoder_output: torch.Tensor) -> Latents:
        """Returns posterior means and the logarithm of the fixed deviation, [b, d] each."""
        mean, _ = self.autoencoder.latents(encoder_output)
        return mean, torch.full_like(mean, self.config.sigma).log()


class TwoStageVAE(VAE):
    """The first stage of the two-stage VAE (Dai & Wipf 2019), a `vae`; the second stage is fitted to its latents later."""

    first_stage, second_stage = "vae", "two_stage"


class WAE(Objective):
    """Wasserstein autoencoder: adds w MMD^2 between latents and prior over the global batch (Tolstikhin et al. 2018)."""

    penalties: ClassVar = {"mmd": "mmd_weight"}
    settings = ("input_noise",)

    def encoder_output(self, images: torch.Tensor, row_ids: np.ndarray, key: int) -> torch.Tensor:
        """Returns the encoder output for images, to which training adds clipped Gaussian noise."""
        sigma = self.config.input_noise
        if sigma and self.training:
            images = images + (sigma * noise(images.flatten(1), row_ids, key, INPUT)).clamp(-sigma, sigma).view_as(images)
        return super().encoder_output(images, row_ids, key)


class EAE(Objective):
    """Entropic autoencoder: SSE/(P C) - w H/d, where H is the k-NN entropy of the batch-normed latents of all ranks.

    Source: Ghose et al. 2020. Both terms are per dimension, so the same weight w fits different image and latent sizes.
    """

    penalties: ClassVar = {"entropy": "entropy_weight"}
    settings: tuple[str, ...] = ("k", "average_k", "eps2", "group")
    latent_norm = True

    def weights(self) -> dict[str, float]:
        """Returns the factor of the entropy, which is negative."""
        return {"entropy": -self.config.entropy_weight / self.autoencoder.latent_dim}


class EAELinear(EAE):
    """Entropic autoencoder with a linear map: H is the entropy of z after an orthonormal matrix and a batch norm.

    This is our interpretation of one line of Table 1 in the paper. The matrix is not learned: a learned matrix would whiten its
    output and leave the encoder unregularized. It is drawn from the seed and saved with the model, or redrawn for every batch.
    """

    settings = (*EAE.settings, "map", "map_dim")
    map: torch.Tensor

    def __init__(self, autoencoder: Autoencoder, config: ObjectiveConfig, seed: int):
        super().__init__(autoencoder, config, seed)
        self.map_dim = config.map_dim or autoencoder.latent_dim
        if self.map_dim > autoencoder.latent_dim:
            raise UserError(f"objective.map_dim={self.map_dim} must be at most model.latent_dim={autoencoder.latent_dim}")
        if config.map == "fixed":
            self.register_buffer("map", orthonormal(autoencoder.latent_dim, self.map_dim, seed))
        self.map_norm = GlobalBatchNorm(self.map_dim, affine=False, eps=LATENT_EPS, track=False)

    def weights(self) -> dict[str, float]:
        """Returns the factor of the entropy, which is negative."""
        return {"entropy": -self.config.entropy_weight / self.map_dim}

    def entropy(
        self, latents: torch.Tensor, is_first_copy: torch.Tensor | None, global_batch: int, row_ids: np.ndarray, key: int
    ) -> Terms:
        """Returns the entropy of the mapped, batch-normed latents and the number of floored pairs."""
        matrix = self.map if self.config.map == "fixed" else orthonormal(latents.shape[1], self.map_dim, key)
        matrix = matrix.to(latents, non_blocking=True)
        mapped = by_block(lambda rows: rows @ matrix, latents)
        return super().entropy(self.map_norm(mapped), is_first_copy, global_batch, row_ids, key)


# Beyond the paper.


class SIGReg(Objective):
    """Sketched isotropic Gaussian regularization: adds w times the Epps-Pulley statistic (Balestriero & LeCun 2025)."""

    penalties: ClassVar = {"epps_pulley": "sigreg_weight"}
    settings = ("directions",)

    def epps_pulley(
        self, latents: torch.Tensor, is_first_copy: torch.Tensor | None, global_batch: int, row_ids: np.ndarray, key: int
    ) -> Terms:
        """Returns the statistic of the latents on directions that are drawn for each batch."""
        directions = random_directions(derive_key(key, DIRECTIONS), self.config.directions, latents)
        return {"epps_pulley": epps_pulley(latents, directions, global_batch)}


class SWAE(Objective):
    """Sliced Wasserstein autoencoder: adds w times the squared distance between latents and N(0, I) (Kolouri et al. 2019)."""

    penalties: ClassVar = {"sliced_wasserstein": "wasserstein_weight"}
    settings = ("directions",)

    def sliced_wasserstein(
        self, latents: torch.Tensor, is_first_copy: torch.Tensor | None, global_batch: int, row_ids: np.ndarray, key: int
    ) -> Terms:
        """Returns the squared distance of the latents on directions that are drawn for each batch."""
        directions = random_directions(derive_key(key, DIRECTIONS), self.config.directions, latents)
        counts = self.row_counts if self.training else None
        return {"sliced_wasserstein": sliced_wasserstein(latents, directions, counts)}


OBJECTIVES: dict[str, type[Objective]] = {
    "vae": VAE,
    "cv_vae": ConstantVarianceVAE,
    "wae": WAE,
    "two_stage_vae": TwoStageVAE,
    "rae": RAE,
    "rae_l2": RAEL2,
    "rae_gp": RAEGP,
    "rae_sn": RAESN,
    "ae": AE,
    "ae_l2": AEL2,
    "eae": EAE,
    "eae_linear": EAELinear,
    "sigreg": SIGReg,
    "swae": SWAE,
}


def objective_class(name: str) -> type[Objective]:
    """Returns the class of that name. Raises ValueError for an unknown name, with the list of known names."""
    if name not in OBJECTIVES:
        raise UserError(f"objective.name={name} is unknown; it is one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]


def mean_square(x: torch.Tensor) -> torch.Tensor:
    """Returns the mean square of the entries of each row, [b, d] -> [b]."""
    return x.square().mean(1)


def noise(like: torch.Tensor, row_ids: np.ndarray, key: int, purpose: int) -> torch.Tensor:
    """Returns draws of N(0, 1), [b, m] as `like`, that depend only on the key of the batch, the purpose and the row number."""
    return normal(row_keys(derive_key(key, purpose), row_ids), like.shape[1], like.device).to(like)


def orthonormal(d: int, m: int, key: int) -> torch.Tensor:
    """Returns a uniformly random matrix with m orthonormal columns, float64 [d, m], that depends only on the key."""
    q, r = torch.linalg.qr(normal(row_keys(derive_key(key, MAP), np.arange(d)), m))
    return q * r.diagonal().sign()  # removes the sign ambiguity of QR (Mezzadri 2007)


def resolve(config: Config, image_shape: tuple[int, int, int], lanes: int | None = None) -> Config:
    """Returns the configuration with every default that depends on the data filled in.

    lanes: number of lanes of the data stream (see data.lanes); default: that of a local data set.
    Raises ValueError for an unknown objective or network, and for a setting that the objective does not read.
    """
    objective = objective_class(config.objective.name)
    read = {"name", "reconstruction_weight", *objective.penalties.values(), *objective.settings}
    for setting in fields(ObjectiveConfig):
        value = getattr(config.objective, setting.name)
        if setting.name not in read and value != setting.default:
            raise UserError(
                f"objective.{setting.name}={value} has no effect with objective.name={config.objective.name}, which reads "
                f"{', '.join(sorted(read))}; leave it out"
            )
    lanes = lanes or config.data.lanes or config.train.global_batch
    model = resolve_model(config.model, image_shape, latent_norm=objective.latent_norm)
    return replace(config, data=replace(config.data, lanes=lanes), model=model)


def build_objective(model: ModelConfig, objective: ObjectiveConfig, image_shape: tuple[int, int, int], seed: int) -> Objective:
    """Builds the objective from a configuration that `resolve` has filled in; initial weights depend only on the seed."""
    cls = objective_class(objective.name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {"latent_norm": cls.latent_norm, "variational": cls.variational, "spectral": cls.spectral}
        autoencoder = build_autoencoder(model, image_shape, **parts)
    return cls(autoencoder, objective, seed)
