"""A normalizing flow over latents: a neural spline flow (Durkan et al. 2019) of the package zuko, an optional dependency.

    log p(x) = log N(f(x); 0, I) + log |det df/dx|,   x: latents standardized per dimension

It is the most flexible of the densities: it answers whether a better density than N(0, I) would give better images. The latents
stay on their ranks. A step takes groups of up to UNIT rows, each from one block of `Rows`. So the gradient of a group has the
same bits on any number of ranks, and `ExactSum` adds the groups without rounding. The result has the same bits on any number of
ranks too, on processors of one kind.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from eae_dist.errors import UserError
from eae_dist.latent.gaussian import NOISE, Seeds, check_state, float64, sample_keys
from eae_dist.latent.rows import BLOCK, ExactSum, Rows
from eae_dist.latent.two_stage import filled_tiles, keyed_order
from eae_dist.numerics.keyed_random import derive_key, keyed_hash, normal

WEIGHTS, HELD_OUT, ORDER = range(3)  # streams of keys under the seed
UNIT = 256  # rows whose gradient is computed at once
HELD_OUT_SHARE = 10  # every tenth latent, chosen by its key, is held out and decides when the training ends
OUTCOME = ("log_likelihood", "held_out_log_likelihood", "epochs_trained")


class Flow:
    """The flow as a density. It trains in float64 for float64 latents, otherwise in float32.

    transforms, width: spline transforms, and units of their two hidden layers. epochs: the largest number. patience: the training
    ends after so many epochs in which the likelihood of the held-out latents did not rise, and the best weights are kept.
    batch: latents per step, rounded up to a multiple of UNIT. A dimension in which all latents are equal is not part of the flow:
    samples have the same value there, and the likelihood is that of the other dimensions.
    """

    def __init__(
        self,
        *,
        transforms: int = 3,
        width: int = 64,
        epochs: int = 100,
        patience: int = 5,
        learning_rate: float = 2e-3,
        batch: int = 512,
        seed: int = 0,
    ):
        if min(transforms, width, epochs, patience, batch) < 1:
            raise UserError(
                f"flow needs transforms, a width, epochs, a patience and a batch of at least 1, got {transforms=}, {width=}, "
                f"{epochs=}, {patience=}, {batch=}"
            )
        self.transforms, self.width, self.epochs, self.patience = transforms, width, epochs, patience
        self.learning_rate, self.batch, self.seed = learning_rate, batch, seed

    def fit(self, latents: torch.Tensor | np.ndarray) -> None:
        """Trains the flow; see `Density.fit`. Raises ValueError also if the training diverges or zuko is missing."""
        latents = torch.as_tensor(latents)
        rows = Rows(latents)
        held_out = keyed_hash(derive_key(self.seed, HELD_OUT), np.arange(rows.n)) % np.uint64(HELD_OUT_SHARE) == 0
        if not 0 < held_out.sum() < rows.n:
            raise UserError(f"flow needs more latents, some to train on and some to hold out, got {rows.n}")
        dtype = torch.float64 if latents.dtype == torch.float64 else torch.float32
        center = rows.mean()
        scale = rows.covariance(center).diagonal().sqrt()
        self.center, self.scale = center.cpu(), scale.cpu()
        varies = scale > 0
        if not varies.any():
            raise UserError(f"flow needs latents that differ, but all {rows.n} are equal")
        x = ((rows.local.double() - center)[:, varies] / scale[varies]).to(dtype)
        network = spline_flow(x.shape[1], self.transforms, self.width, derive_key(self.seed, WEIGHTS)).to(x)
        self._train(network, rows, x, held_out)
        volume = float(scale[varies].log().sum())
        self.log_likelihood = _mean_log_likelihood(network, rows, x, np.arange(rows.n)) - volume
        self.held_out_log_likelihood = _mean_log_likelihood(network, rows, x, np.flatnonzero(held_out)) - volume
        self.network = network.cpu()

    def _train(self, network: nn.Module, rows: Rows, x: torch.Tensor, held_out: np.ndarray) -> None:
        """Trains the network and leaves it with the weights of the epoch that was best on the held-out latents."""
        parameters = list(network.parameters())
        optimizer = torch.optim.Adam(parameters, lr=self.learning_rate)
        at_once = -(-self.batch // UNIT)
        best, waited, kept = -math.inf, 0, [parameter.detach().clone() for parameter in parameters]
        for epoch in range(self.epochs):
            units = list(_units(np.flatnonzero(~held_out), derive_key(self.seed, ORDER, epoch)))
            order = keyed_order(derive_key(self.seed, ORDER, epoch, 1), np.arange(len(units)))
            for start in range(0, len(order), at_once):
                step = [units[number] for number in order[start : start + at_once]]
                gradient = _mean_gradient(network, parameters, rows, x, step)
                for parameter, part in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
                    parameter.grad = part.view_as(parameter).to(parameter)
                optimizer.step()
            found = _mean_log_likelihood(network, rows, x, np.flatnonzero(held_out))
            if found > best:
                best, waited, self.epochs_trained = found, 0, epoch + 1
                kept = [parameter.detach().clone() for parameter in parameters]
            else:
                waited += 1
            if waited == self.patience:
                break
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)

    @torch.no_grad()
    def sample(self, seeds: Seeds) -> torch.Tensor:
        """Returns samples of the flow, float64 [m, d]: draws of N(0, I) that pass the inverse transforms."""
        varies = self.scale > 0
        z = normal(sample_keys(seeds, NOISE), int(varies.sum())).to(next(self.network.parameters()))
        inverse = self.network().transform.inv
        drawn = torch.cat([inverse(tile)[:rows] for tile, rows in filled_tiles(z)] or [z])
        samples = self.center.repeat(len(drawn), 1)
        samples[:, varies] = drawn.double() * self.scale[varies] + self.center[varies]
        return samples

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Returns the state; see `Density.state_dict`."""
        own = {"center": self.center, "scale": self.scale, "sizes": torch.tensor([self.transforms, self.width])}
        network = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        return own | {name: float64(getattr(self, name)) for name in OUTCOME} | network

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restores the state; see `Density.load_state_dict`."""
        own = {name: tensor for name, tensor in state.items() if not name.startswith("network.")}
        check_state(own, ("center", "scale", "sizes", *OUTCOME))
        self.transforms, self.width = state["sizes"].tolist()
        self.center, self.scale = state["center"].double(), state["scale"].double()
        network = spline_flow(int((self.scale > 0).sum()), self.transforms, self.width, seed=0)
        check_state(state, (*own, *(f"network.{name}" for name in network.state_dict())))
        weights = {name: state[f"network.{name}"] for name in network.state_dict()}
        self.network = network.to(weights[next(name for name, _ in network.named_parameters())].dtype)
        self.network.load_state_dict(weights)
        for name in OUTCOME:
            setattr(self, name, float(state[name]))

    def report(self) -> dict:
        """Returns the mean log-likelihood of all and of the held-out latents [nats], and after how many epochs they are best."""
        return {name: getattr(self, name) for name in OUTCOME[:2]} | {"epochs_trained": int(self.epochs_trained)}


def spline_flow(d: int, transforms: int, width: int, seed: int) -> nn.Module:
    """Returns the flow of d dimensions; called, it gives a distribution. The weights depend on the seed alone."""
    try:
        from zuko.flows import NSF
    except ImportError as error:
        raise UserError("the density flow needs the package zuko: pip install 'eae-dist[flow]'") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        return NSF(d, transforms=transforms, hidden_features=(width, width))


def _units(chosen: np.ndarray, key: int) -> Iterator[np.ndarray]:
    """Yields the chosen row numbers in groups of up to UNIT, each from one block, in an order that depends on the key."""
    for block in np.split(chosen, np.searchsorted(chosen, np.arange(BLOCK, chosen[-1] + 1, BLOCK))):
        yield from np.array_split(keyed_order(key, block), -(-len(block) // UNIT)) if len(block) else ()


def _held_here(rows: Rows, x: torch.Tensor, units: Sequence[np.ndarray]) -> Iterator[torch.Tensor]:
    """Yields the latents of the groups whose block this rank holds."""
    for unit in units:
        if rows.first <= unit[0] < rows.first + len(x):
            yield x[torch.from_numpy(unit - rows.first).to(x.device)]


def _mean_gradient(
    network: Any, parameters: Sequence[nn.Parameter], rows: Rows, x: torch.Tensor, units: Sequence[np.ndarray]
) -> torch.Tensor:
    """Returns the gradient of the mean of -log p over the rows of the groups, float64 [number of all parameters]."""
    gradients = []
    for part in _held_here(rows, x, units):
        gradient = torch.autograd.grad(-network().log_prob(part).sum(), parameters)
        gradients.append(torch.cat([each.flatten() for each in gradient]).double())
    return _exact_sum(rows, gradients, sum(p.numel() for p in parameters)) / sum(map(len, units))


def _exact_sum(rows: Rows, summands: Sequence[torch.Tensor], size: int) -> torch.Tensor:
    """Returns the sum of float64 vectors [size] of all ranks; their order changes no bit. Raises ValueError unless finite."""
    here = max((float(each.abs().max()) for each in summands), default=0.0)
    largest = float(rows.over_ranks(torch.tensor([here], dtype=torch.float64)).max())
    if not math.isfinite(largest):
        raise UserError("flow diverged: its gradient is not finite; lower learning_rate")
    total = ExactSum(rows, size, largest)
    for each in summands:
        total.add(each)
    return total.result()


@torch.no_grad()
def _mean_log_likelihood(network: Any, rows: Rows, x: torch.Tensor, chosen: np.ndarray) -> float:
    """Returns the mean of log p over the chosen standardized rows, in nats."""
    parts = [network().log_prob(part).double().sum()[None] for part in _held_here(rows, x, list(_units(chosen, 0)))]
    return float(_exact_sum(rows, parts, 1)) / len(chosen)
