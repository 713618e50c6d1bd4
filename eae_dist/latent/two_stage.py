"""The second stage of the two-stage VAE: a small VAE of the latents, whose own latent u is sampled from N(0, I).

Source: Dai & Wipf 2019, with the networks and settings of the regularized autoencoders' authors (Ghosh et al. 2020):

    u = mu(x) + sigma(x) e,  log sigma = 5 tanh(.);   loss = mean over rows of  |x - x'|^2 / d  +  w KL(N(mu, sigma^2) || N(0, I))

x: latents standardized per dimension, KL summed over the d dimensions of u [nats], w = kl_weight.

Every rank trains the same network on all latents, which are gathered. A batch of 64 rows is too little work to share: the
exchange of a step's gradient would take longer than its computation. An epoch of more latents than fit in memory would take days
on any number of ranks. So the result is bit-identical on any number of ranks, on processors of one kind.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from eae_dist.distributed import gather_rows, rank, sum_over_ranks
from eae_dist.errors import UserError
from eae_dist.latent.gaussian import NOISE, Seeds, check_state, float64, sample_keys
from eae_dist.latent.rows import Rows
from eae_dist.losses.terms import gaussian_divergence
from eae_dist.numerics.keyed_random import derive_key, keyed_hash, normal, row_keys, uniform

WEIGHTS, SPLIT, ORDER, TRAINING, VALIDATION = range(5)  # streams of keys under the seed
TILE = 1024  # rows per call of the trained network; fewer are filled up, so that a row's rounding does not depend on the others
VALIDATION_SHARE = 0.1
PATIENCE, FACTOR, IMPROVEMENT = 3, 0.5, 1e-4  # the learning rate is halved at the third epoch without this improvement


class SecondStage(nn.Module):
    """Encoder d -> (mu, log sigma) and decoder d -> d, with two hidden layers each and Glorot's initial weights."""

    def __init__(self, d: int, width: int, seed: int = 0):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(d, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.mean, self.log_scale = nn.Linear(width, d), nn.Linear(width, d)
        self.decoder = nn.Sequential(nn.Linear(d, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, d))
        with torch.no_grad():
            for number, parameter in enumerate(self.parameters()):
                parameter.zero_()
                if parameter.ndim == 2:
                    rows = row_keys(derive_key(seed, WEIGHTS, number), np.arange(len(parameter)))
                    spread = 2 * uniform(rows, parameter.shape[1]) - 1
                    parameter.copy_(spread * math.sqrt(6 / sum(parameter.shape)))

    def forward(self, x: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the mean squared error [b] and the KL [b] of each row; x and noise: [b, d]."""
        hidden = self.encoder(x)
        mean, log_scale = self.mean(hidden), 5 * torch.tanh(self.log_scale(hidden))
        error = (self.decoder(mean + log_scale.exp() * noise) - x).square().mean(1)
        return error, gaussian_divergence(mean, log_scale)

    def reconstruction(self, x: torch.Tensor) -> torch.Tensor:
        """Reconstructs x through the mean of u, [b, d] -> [b, d]."""
        return self.decoder(self.mean(self.encoder(x)))


class TwoStage:
    """The second stage as a density. It trains in float64 for float64 latents, otherwise in float32. `batch` counts latents."""

    def __init__(
        self,
        *,
        kl_weight: float = 1.5e-3,
        width: int = 1024,
        epochs: int = 100,
        learning_rate: float = 1e-4,
        batch: int = 64,
        seed: int = 0,
    ):
        if min(width, epochs, batch) < 1:
            raise UserError(f"two_stage needs a width, epochs and a batch of at least 1, got {width=}, {epochs=}, {batch=}")
        self.kl_weight, self.width, self.epochs = kl_weight, width, epochs
        self.learning_rate, self.batch, self.seed = learning_rate, batch, seed

    def fit(self, latents: torch.Tensor) -> None:
        """Trains the second stage; see `Density.fit`. Raises ValueError also if the training diverges."""
        rows = Rows(latents)
        if rows.n < 2:
            raise UserError(f"two_stage needs at least 2 latents, one to train on and one to validate with, got {rows.n}")
        dtype = torch.float64 if latents.dtype == torch.float64 else torch.float32
        center = rows.mean()
        scale = rows.covariance(center).diagonal().sqrt()
        scale = torch.where(scale > 0, scale, 1)  # a constant dimension is restored by the center
        standardized = ((gather_rows(latents.detach()).double() - center) / scale).to(dtype)
        self.center, self.scale = center.cpu(), scale.cpu()
        network = SecondStage(rows.d, self.width, self.seed).to(standardized)
        self.validation_loss, self.final_learning_rate = self._train(network, standardized)
        with torch.no_grad():  # all take rank 0's weights, because processors of other kinds may round otherwise
            for parameter in network.parameters():
                parameter.copy_(sum_over_ranks(parameter if rank() == 0 else torch.zeros_like(parameter)))
        self.network = network.cpu()

    def _train(self, network: SecondStage, x: torch.Tensor) -> tuple[float, float]:
        """Trains the network and returns the last validation loss and learning rate."""
        held_out = max(1, round(VALIDATION_SHARE * len(x)))
        shuffled = keyed_order(derive_key(self.seed, SPLIT), np.arange(len(x)))
        training, validation = shuffled[held_out:], shuffled[:held_out]
        optimizer = torch.optim.Adam(network.parameters(), lr=self.learning_rate, eps=1e-7)
        best, waited, step = math.inf, 0, 0
        for epoch in range(self.epochs):
            order = keyed_order(derive_key(self.seed, ORDER, epoch), training)
            for batch in np.split(order, range(self.batch, len(order), self.batch)):
                loss = self._losses(network, x, batch, derive_key(self.seed, TRAINING, step)).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
            with torch.no_grad():
                parts = np.split(validation, range(TILE, len(validation), TILE))
                key = derive_key(self.seed, VALIDATION)  # the same noise in every epoch, so that epochs can be compared
                found = float(torch.cat([self._losses(network, x, part, key) for part in parts]).mean())
            if not math.isfinite(found):
                raise UserError(f"two_stage diverged: validation loss {found} after epoch {epoch + 1}; lower learning_rate")
            best, waited = (found, 0) if found < best - IMPROVEMENT else (best, waited + 1)
            if waited == PATIENCE:
                waited = 0
                for group in optimizer.param_groups:
                    group["lr"] *= FACTOR
        return found, optimizer.param_groups[0]["lr"]

    def _losses(self, network: SecondStage, x: torch.Tensor, chosen: np.ndarray, key: int) -> torch.Tensor:
        """Returns the losses of the chosen rows, [b]; the noise depends only on the key and the row's number."""
        noise = normal(row_keys(key, chosen), x.shape[1], x.device).to(x)
        error, divergence = network(x[torch.from_numpy(chosen).to(x.device, non_blocking=True)], noise)
        return error + self.kl_weight * divergence

    def sample(self, seeds: Seeds) -> torch.Tensor:
        """Returns samples of the second stage, float64 [m, d]."""
        u = normal(sample_keys(seeds, NOISE), len(self.center))
        return self._through(self.network.decoder, u) * self.scale + self.center

    def reconstruct(self, latents: torch.Tensor) -> torch.Tensor:
        """Passes latents through the second stage by the mean of u, [m, d] -> [m, d], on the CPU.

        The model's reconstructions are decoded from the result.
        """
        x = (latents.detach().cpu().double() - self.center) / self.scale
        return (self._through(self.network.reconstruction, x) * self.scale + self.center).to(latents.dtype)

    @torch.no_grad()
    def _through(self, function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.cat([function(tile)[:rows] for tile, rows in filled_tiles(x.to(self.network.mean.weight))] or [x]).double()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Returns the state; see `Density.state_dict`."""
        own = {"center": self.center, "scale": self.scale}
        outcome = {"validation_loss": self.validation_loss, "final_learning_rate": self.final_learning_rate}
        network = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        return own | {name: float64(value) for name, value in outcome.items()} | network

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restores the state; see `Density.load_state_dict`."""
        names = [f"network.{name}" for name in SecondStage(1, 1).state_dict()]
        check_state(state, ("center", "scale", "validation_loss", "final_learning_rate", *names))
        weight = state["network.mean.weight"]
        self.network = SecondStage(*weight.shape).to(weight.dtype)
        self.network.load_state_dict({name: state[f"network.{name}"] for name in self.network.state_dict()})
        self.center, self.scale = state["center"].double(), state["scale"].double()
        self.validation_loss, self.final_learning_rate = float(state["validation_loss"]), float(state["final_learning_rate"])

    def report(self) -> dict:
        """Returns the final loss on the validation tenth, and the learning rate after the reductions at plateaus."""
        return {"validation_loss": self.validation_loss, "final_learning_rate": self.final_learning_rate}


def keyed_order(key: int, rows: np.ndarray) -> np.ndarray:
    """Returns the rows in a random order that depends on the key."""
    return rows[np.argsort(keyed_hash(key, rows), kind="stable")]


def filled_tiles(x: torch.Tensor) -> Iterator[tuple[torch.Tensor, int]]:
    """Yields tiles of TILE rows, the last one filled with zeros, and the number of rows in each that are not filling."""
    for tile in x.split(TILE) if len(x) else ():
        yield F.pad(tile, (0, 0, 0, TILE - len(tile))), len(tile)
