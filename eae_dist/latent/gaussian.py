"""Single Gaussians as densities of latents: N(0, I) and the fitted Gaussian.

The latents of the entropic autoencoder tend to N(0, I). The module also has the functions with which all densities sample
Gaussians row by row. d: latent dimensions, m: samples.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch

from eae_dist.latent.rows import Rows
from eae_dist.numerics.keyed_random import derive_key, normal, row_keys

NOISE, CHOICE = 0, 1  # streams of random keys: for the normal variates of a sample, for its mixture component
Seeds = Sequence[int] | np.ndarray | torch.Tensor


class Isotropic:
    """N(0, I), for any latents. The fit only stores their number of dimensions and their mean log-likelihood under N(0, I).

    With `dimensions` it can be sampled without a fit.
    """

    def __init__(self, dimensions: int = 0):
        self.dimensions, self.log_likelihood = dimensions, math.nan

    def fit(self, latents: torch.Tensor | np.ndarray) -> None:
        """Stores d and the mean log-likelihood [nats]; see `Density.fit`."""
        rows = Rows(torch.as_tensor(latents))
        mean = rows.mean()
        mean_square = float(rows.covariance(mean).trace() + mean.square().sum())
        self.dimensions, self.log_likelihood = rows.d, -0.5 * (rows.d * math.log(2 * math.pi) + mean_square)

    def sample(self, seeds: Seeds) -> torch.Tensor:
        """Returns samples of N(0, I), float64 [m, d]."""
        return normal(sample_keys(seeds, NOISE), self.dimensions)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Returns the state; see `Density.state_dict`."""
        return {"dimensions": torch.tensor(self.dimensions), "log_likelihood": float64(self.log_likelihood)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restores the state; see `Density.load_state_dict`."""
        check_state(state, ("dimensions", "log_likelihood"))
        self.dimensions, self.log_likelihood = int(state["dimensions"]), float(state["log_likelihood"])

    def report(self) -> dict:
        """Returns the mean log-likelihood of the latents [nats]."""
        return {"log_likelihood": self.log_likelihood}


class Gaussian:
    """The maximum likelihood Gaussian with a full covariance (divided by n). The latents may fill only a subspace."""

    def fit(self, latents: torch.Tensor | np.ndarray) -> None:
        """Computes the mean and covariance of all latents; see `Density.fit`."""
        rows = Rows(torch.as_tensor(latents))
        self.mean = rows.mean()
        self.covariance = rows.covariance(self.mean).cpu()
        self.mean = self.mean.cpu()

    def sample(self, seeds: Seeds) -> torch.Tensor:
        """Returns samples of the Gaussian, float64 [m, d]."""
        z = normal(sample_keys(seeds, NOISE), len(self.mean))
        return self.mean + rows_times(z, covariance_root(self.covariance))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Returns the state; see `Density.state_dict`."""
        return {"mean": self.mean, "covariance": self.covariance}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restores the state; see `Density.load_state_dict`."""
        check_state(state, ("mean", "covariance"))
        self.mean, self.covariance = state["mean"].double(), state["covariance"].double()

    def report(self) -> dict:
        """Returns the mean log-likelihood of the fitted latents [nats].

        It is None if the latents span fewer than d dimensions, because the Gaussian then has no density.
        """
        d = len(self.mean)
        values = torch.linalg.eigvalsh(self.covariance)
        rank = int((values > noise_floor(values)).sum())
        if rank < d:
            warning = f"the latents span only {rank} of {d} dimensions, and so do the samples"
            return {"log_likelihood": None, "dimensions_spanned": rank, "warning": warning}
        entropy = 0.5 * (d * math.log(2 * math.pi * math.e) + float(values.log().sum()))
        return {"log_likelihood": -entropy, "dimensions_spanned": rank}


def covariance_root(covariance: torch.Tensor) -> torch.Tensor:
    """Returns the symmetric root A of a covariance A A, [..., d, d]. The covariance may be singular.

    Unlike a Cholesky factor, the root always exists. Unlike eigenvectors, it is a continuous function of the covariance.
    """
    values, vectors = torch.linalg.eigh(covariance)
    values = torch.where(values > noise_floor(values), values, 0)
    return (vectors * values.sqrt()[..., None, :]) @ vectors.mT


def noise_floor(eigenvalues: torch.Tensor) -> torch.Tensor:
    """Returns the value [..., 1] that an eigenvalue must exceed to be more than rounding; eigenvalues: [..., d], ascending."""
    return eigenvalues[..., -1:].clamp(min=0) * (eigenvalues.shape[-1] * torch.finfo(eigenvalues.dtype).eps)


def rows_times(z: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Returns z @ matrix, [m, d] x [d, e] -> [m, e]; the rounding of a row does not depend on the other rows.

    A matrix product does not have this property, because its order of addition depends on m.
    """
    out = z.new_zeros(len(z), matrix.shape[1])
    for column, row in zip(z.T, matrix, strict=True):
        out += column[:, None] * row
    return out


def sample_keys(seeds: Seeds, stream: int) -> np.ndarray:
    """Returns one random key per sample, uint64 [m]. Raises ValueError unless the seeds are a row of non-negative integers."""
    seeds = np.asarray(seeds.cpu() if isinstance(seeds, torch.Tensor) else seeds)
    if seeds.size == 0 and seeds.ndim == 1:
        seeds = seeds.astype(np.uint64)
    if seeds.ndim != 1 or seeds.dtype.kind not in "iu" or (seeds.dtype.kind == "i" and (seeds < 0).any()):
        raise ValueError(f"seeds must be one non-negative integer per sample, got {seeds.dtype} {list(seeds.shape)}")
    return row_keys(derive_key(stream), seeds)


def check_state(state: dict[str, torch.Tensor], names: Sequence[str]) -> None:
    """Raises ValueError unless the state has exactly these names."""
    if sorted(state) != sorted(names):
        raise ValueError(f"expected a density state with {', '.join(sorted(names))}; got {', '.join(sorted(state)) or 'nothing'}")


def float64(x: float | list[float]) -> torch.Tensor:
    """Returns x as a float64 tensor."""
    return torch.tensor(x, dtype=torch.float64)
