"""One Gaussian as a density of latents: N(0, I), which the entropic autoencoder's latents tend to, and the best fitting one.

And what the other densities need to draw from Gaussians row by row. d: latent dimensions, m: samples.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch

from eae_dist.latent.rows import Rows
from eae_dist.numerics.keyed_random import derive_key, normal, row_keys

NOISE, CHOICE = 0, 1  # streams of keys: the normals of a sample, its component of a mixture
Seeds = Sequence[int] | np.ndarray | torch.Tensor


class Isotropic:
    """N(0, I), whatever the latents are: fitting learns their dimensions and says how likely they are under it."""

    def fit(self, latents: torch.Tensor) -> None:
        rows = Rows(latents)
        mean = rows.mean()
        mean_square = float(rows.covariance(mean).trace() + mean.square().sum())
        self.dimensions, self.log_likelihood = rows.d, -0.5 * (rows.d * math.log(2 * math.pi) + mean_square)

    def sample(self, seeds: Seeds) -> torch.Tensor:
        return normal(sample_keys(seeds, NOISE), self.dimensions)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"dimensions": torch.tensor(self.dimensions), "log_likelihood": float64(self.log_likelihood)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        check_state(state, ("dimensions", "log_likelihood"))
        self.dimensions, self.log_likelihood = int(state["dimensions"]), float(state["log_likelihood"])

    def report(self) -> dict:
        return {"log_likelihood": self.log_likelihood}


class Gaussian:
    """The Gaussian of maximum likelihood: full covariance (divided by n), also of latents that fill no more than a subspace."""

    def fit(self, latents: torch.Tensor) -> None:
        rows = Rows(latents)
        self.mean = rows.mean()
        self.covariance = rows.covariance(self.mean).cpu()
        self.mean = self.mean.cpu()

    def sample(self, seeds: Seeds) -> torch.Tensor:
        z = normal(sample_keys(seeds, NOISE), len(self.mean))
        return self.mean + rows_times(z, covariance_root(self.covariance))

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"mean": self.mean, "covariance": self.covariance}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        check_state(state, ("mean", "covariance"))
        self.mean, self.covariance = state["mean"].double(), state["covariance"].double()

    def report(self) -> dict:
        """The mean log-likelihood of the fitted latents in nats, None where they span less than all dimensions: no density."""
        d = len(self.mean)
        values = torch.linalg.eigvalsh(self.covariance)
        rank = int((values > noise_floor(values)).sum())
        if rank < d:
            warning = f"the latents span only {rank} of {d} dimensions, and so do the samples"
            return {"log_likelihood": None, "dimensions_spanned": rank, "warning": warning}
        entropy = 0.5 * (d * math.log(2 * math.pi * math.e) + float(values.log().sum()))
        return {"log_likelihood": -entropy, "dimensions_spanned": rank}


def covariance_root(covariance: torch.Tensor) -> torch.Tensor:
    """The symmetric root A of a covariance A A, [..., d, d], which may be singular.

    Unlike a Cholesky factor it always exists, and unlike eigenvectors it is a continuous function of the covariance.
    """
    values, vectors = torch.linalg.eigh(covariance)
    values = torch.where(values > noise_floor(values), values, 0)
    return (vectors * values.sqrt()[..., None, :]) @ vectors.mT


def noise_floor(eigenvalues: torch.Tensor) -> torch.Tensor:
    """What an eigenvalue (ascending, [..., d]) must exceed to be more than rounding, [..., 1]."""
    return eigenvalues[..., -1:].clamp(min=0) * (eigenvalues.shape[-1] * torch.finfo(eigenvalues.dtype).eps)


def rows_times(z: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """z @ matrix, [m, d] x [d, e] -> [m, e], each row rounded alike whatever the others: products add in another order by m."""
    out = z.new_zeros(len(z), matrix.shape[1])
    for column, row in zip(z.T, matrix, strict=True):
        out += column[:, None] * row
    return out


def sample_keys(seeds: Seeds, stream: int) -> np.ndarray:
    """One key a sample from its seed, uint64 [m]; ValueError unless the seeds are a row of non-negative integers."""
    seeds = np.asarray(seeds.cpu() if isinstance(seeds, torch.Tensor) else seeds)
    if seeds.size == 0 and seeds.ndim == 1:
        seeds = seeds.astype(np.uint64)
    if seeds.ndim != 1 or seeds.dtype.kind not in "iu" or (seeds.dtype.kind == "i" and (seeds < 0).any()):
        raise ValueError(f"seeds must be one non-negative integer a sample, got {seeds.dtype} {list(seeds.shape)}")
    return row_keys(derive_key(stream), seeds)


def check_state(state: dict[str, torch.Tensor], names: Sequence[str]) -> None:
    if sorted(state) != sorted(names):
        raise ValueError(f"the state of this density has {', '.join(sorted(names))}; got {', '.join(sorted(state)) or 'nothing'}")


def float64(x: float | list[float]) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64)
