"""A Gaussian mixture with full covariances, fitted by expectation maximization to the latents of all ranks.

    log p(x) = logsumexp_c [ log w_c - (d log 2 pi + log |C_c| + |y_c|^2) / 2 ],   y_c = L_c^-1 (x - mu_c),   C_c = L_c L_c^T
    r_c = p(c | x),   N_c = sum r_c,   new mu_c = mu_c + L_c s_c,   new C_c = L_c (sum r_c y_c y_c^T / N_c - s_c s_c^T) L_c^T

with s_c = sum r_c y_c / N_c. The M-step needs only sums over the whitened rows y of the E-step. So an iteration is one pass over
the latents, in tiles that stay in the cache, and nothing of size n x k is stored. From the same start, the result is that of
scikit-learn's GaussianMixture.
n: latents of all ranks, d: their dimensions, k: components.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from eae_dist.errors import UserError
from eae_dist.latent.gaussian import CHOICE, NOISE, Seeds, check_state, covariance_root, float64, rows_times, sample_keys
from eae_dist.latent.rows import BLOCK, ExactSum, Rows
from eae_dist.numerics.keyed_random import derive_key, normal, row_keys, uniform

TILE = 1024  # rows; larger tiles do not fit into the caches, smaller tiles need more calls
LLOYD_ITERATIONS = 20


@dataclass(frozen=True)
class Parameters:
    """Weights [k], means [k, d] and covariances [k, d, d], all float64."""

    weights: torch.Tensor
    means: torch.Tensor
    covariances: torch.Tensor

    def to(self, device: torch.device | str) -> "Parameters":
        """Returns the parameters on that device, in float64."""
        return Parameters(*(x.to(device, torch.float64) for x in (self.weights, self.means, self.covariances)))


class Mixture:
    """A mixture of `components` Gaussians: the most likely fit of several k-means++ starts.

    As in scikit-learn, `regularization` is added to the variances in each iteration. The iterations end when the mean
    log-likelihood changes by less than `tolerance` nats, or without convergence after `iterations`. The result does not depend on
    the number of ranks. If `start` is given, it is the only start.
    """

    def __init__(
        self,
        components: int = 10,
        *,
        starts: int = 3,
        regularization: float = 1e-6,
        tolerance: float = 1e-3,
        iterations: int = 2000,  # the value of the regularized autoencoders' authors; scikit-learn's default is 100
        seed: int = 0,
        start: Parameters | None = None,
    ):
        if components < 1 or starts < 1 or iterations < 1:
            raise UserError(
                f"a mixture needs at least one component, start and iteration, got {components=}, {starts=}, {iterations=}"
            )
        self.components, self.starts, self.iterations, self.seed, self.start = components, starts, iterations, seed, start
        self.regularization, self.tolerance = regularization, tolerance

    def fit(self, latents: torch.Tensor) -> None:
        """Fits the mixture; see `Density.fit`. Call it on every rank.

        Raises ValueError if there are fewer latents than parameters, or if a component collapses in every start.
        """
        rows = Rows(latents)
        k, d = self.components, rows.d
        wanted = k * (d + d * (d + 1) // 2 + 1)
        if rows.n < wanted:
            raise UserError(
                f"a mixture of {k} full covariances in {d} dimensions has {wanted} parameters and needs at least as many "
                f"latents, got {rows.n}; use fewer components, more latents, or mvg"
            )
        moments = Moments(rows)
        results = [
            self._expectation_maximization(moments, self._started(moments, number))
            for number in range(1 if self.start else self.starts)
        ]
        if not (whole := [result for result in results if not result.collapsed]):
            raise UserError(
                f"in every start (tried: {len(results)}) a component of {k} collapsed: it was left with {results[-1].fewest:.3g} "
                f"latents of {rows.n}, fewer than {d + 1} (dimensions + 1); use fewer components or more latents"
            )
        best = max(whole, key=lambda result: result.log_likelihood)
        self.iterations_used, self.converged = best.iterations, best.converged
        self.log_likelihood = moments.of(best.parameters).log_likelihood
        self.parameters = best.parameters.to("cpu")
        self.start_likelihoods = float64([math.nan if result.collapsed else result.log_likelihood for result in results])

    def _started(self, moments: "Moments", number: int) -> Parameters:
        if self.start is None:
            return start_by_k_means(moments, self.components, (self.seed, number), self.regularization)
        if self.start.means.shape != (self.components, moments.rows.d):
            shape = list(self.start.means.shape)
            raise ValueError(
                f"the start has means {shape}, expected [components, dimensions] = [{self.components}, {moments.rows.d}]"
            )
        return self.start.to(moments.rows.local.device)

    def _expectation_maximization(self, moments: "Moments", parameters: Parameters) -> "EMResult":
        previous, iteration, converged = -math.inf, 0, False
        while iteration < self.iterations and not converged:
            found = moments.of(parameters)
            fewest = float(found.counts.min())
            if fewest < moments.rows.d + 1:
                return EMResult(parameters, previous, iteration, converged=False, collapsed=True, fewest=fewest)
            parameters = found.maximized(self.regularization)
            converged = abs(found.log_likelihood - previous) < self.tolerance
            previous, iteration = found.log_likelihood, iteration + 1
        return EMResult(parameters, previous, iteration, converged, collapsed=False, fewest=fewest)

    def sample(self, seeds: Seeds) -> torch.Tensor:
        """Returns samples of the mixture, float64 [m, d]."""
        weights, means = self.parameters.weights, self.parameters.means
        z = normal(sample_keys(seeds, NOISE), means.shape[1])
        u = uniform(sample_keys(seeds, CHOICE), 1)[:, 0]
        component = torch.searchsorted(weights.cumsum(0), u).clamp_(max=len(weights) - 1)
        out = torch.empty_like(z)
        for c, root in enumerate(covariance_root(self.parameters.covariances)):
            chosen = component == c
            out[chosen] = means[c] + rows_times(z[chosen], root)
        return out

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Returns the state; see `Density.state_dict`."""
        return {
            "weights": self.parameters.weights,
            "means": self.parameters.means,
            "covariances": self.parameters.covariances,
            "log_likelihood": float64(self.log_likelihood),
            "start_log_likelihoods": self.start_likelihoods,
            "iterations": torch.tensor(self.iterations_used),
            "converged": torch.tensor(self.converged),
        }

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restores the state; see `Density.load_state_dict`."""
        own = ("log_likelihood", "start_log_likelihoods", "iterations", "converged")
        check_state(state, ("weights", "means", "covariances", *own))
        self.parameters = Parameters(state["weights"], state["means"], state["covariances"]).to("cpu")
        self.log_likelihood, self.start_likelihoods = float(state["log_likelihood"]), state["start_log_likelihoods"].double()
        self.iterations_used, self.converged = int(state["iterations"]), bool(state["converged"])

    def report(self) -> dict:
        """Describes the fit. All log-likelihoods are means over the fitted latents [nats].

        The log-likelihood of a start is the one before its last step; it is None if the start collapsed.
        """
        out = {
            "log_likelihood": self.log_likelihood,
            "converged": self.converged,
            "iterations": self.iterations_used,
            "weights": self.parameters.weights.tolist(),
            "start_log_likelihoods": [None if math.isnan(x) else x for x in self.start_likelihoods.tolist()],
        }
        if not self.converged:
            out["warning"] = f"the mixture did not converge in {self.iterations_used} iterations"
        return out


class EMResult(NamedTuple):
    """The result of expectation maximization from one start, and its mean log-likelihood [nats] before the last step.

    The start has collapsed if a component has too few latents, `fewest`, for a covariance of its own.
    """

    parameters: Parameters
    log_likelihood: float
    iterations: int
    converged: bool
    collapsed: bool
    fewest: float


@dataclass(frozen=True)
class Expectation:
    """The mean log-likelihood [nats] of all latents, and their moments, whitened and weighted for each component.

    counts N [k]; first = sum r y [k, d]; second = sum r y y^T [k, d, d]; factors L [k, d, d]; means [k, d].
    """

    log_likelihood: float
    counts: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor
    factors: torch.Tensor
    means: torch.Tensor

    def maximized(self, regularization: float) -> Parameters:
        """Returns the parameters after the M-step."""
        weights = self.counts / self.counts.sum()
        return Parameters(weights, *self._moved(self._covariances(self.counts[:, None, None]), regularization))

    def with_pooled_covariance(self, regularization: float) -> Parameters:
        """Returns the parameters as `maximized` does, and adds the components' mean covariance with the weight of d latents.

        A small component also gets a usable covariance in this way.
        """
        counts, d = self.counts[:, None, None], self.means.shape[1]
        own = self._covariances(counts.clamp(min=1))
        pooled = (own * counts).sum(0) / counts.sum()
        weights = (self.counts + 1) / (self.counts + 1).sum()
        return Parameters(weights, *self._moved((own * counts + pooled * d) / (counts + d), regularization))

    def _covariances(self, counts: torch.Tensor) -> torch.Tensor:
        shift = self.first[:, :, None] / counts
        return self.second / counts - shift * shift.mT

    def _moved(self, whitened: torch.Tensor, regularization: float) -> tuple[torch.Tensor, torch.Tensor]:
        shift = self.first / self.counts.clamp(min=1)[:, None]
        means = self.means + (self.factors @ shift[:, :, None])[:, :, 0]
        covariances = self.factors @ whitened @ self.factors.mT
        covariances = (covariances + covariances.mT) / 2
        covariances.diagonal(dim1=1, dim2=2).add_(regularization)
        return means, covariances


class Moments:
    """Computes the moments of the latents of all ranks under a mixture, in one pass."""

    def __init__(self, rows: Rows):
        self.rows, self.center, self.largest = rows, rows.mean(), rows.largest()

    def of(self, parameters: Parameters, hard: bool = False) -> Expectation:
        """Returns the E-step. hard: each latent belongs only to its most likely component. Call it on every rank."""
        k, d = parameters.means.shape
        factors, info = torch.linalg.cholesky_ex(parameters.covariances)
        failed = int(self.rows.over_ranks((info != 0).sum()).max())  # the same on all ranks, so that all of them raise
        if failed:
            raise UserError(
                f"the covariances of {failed} of {k} components are not positive definite in float64; the latents reach "
                f"{self.largest:.3g}; scale them, or raise regularization"
            )
        whitened = _Whitened(parameters, factors, self.center, hard)
        sums = ExactSum(self.rows, whitened.size, whitened.bound(self.largest))
        for block in self.rows.blocks():
            sums.add(whitened.sums(block))
        total = sums.result()
        products = total[1:].view(k, d + 1, d + 1)
        counts, first, second = products[:, d, d], products[:, d, :d], products[:, :d, :d]
        return Expectation(float(total[0]) / self.rows.n, counts, first, second, factors, parameters.means)


class _Whitened:
    """Computes the sums over a block of rows, in tiles of t rows. It keeps its buffers, because fresh memory is slow."""

    def __init__(self, parameters: Parameters, factors: torch.Tensor, center: torch.Tensor, hard: bool):
        self.k, self.d = k, d = parameters.means.shape
        self.means, self.center, self.hard = parameters.means, center, hard
        identity = torch.eye(d, dtype=factors.dtype, device=factors.device)
        self.whitening = torch.linalg.solve_triangular(factors, identity.expand_as(factors), upper=False).mT  # y = (x - mu) W
        self.matrix = self.whitening.permute(1, 0, 2).reshape(d, k * d)  # all components side by side, for one product
        self.offset = ((center - parameters.means)[:, None] @ self.whitening).reshape(k * d)
        log_determinant = self.whitening.diagonal(dim1=1, dim2=2).log().sum(1)
        self.constants = parameters.weights.log() + log_determinant - 0.5 * d * math.log(2 * math.pi)
        # Small products stay in a processor's caches; on a GPU they would be too small to fill it.
        self.tile = TILE if factors.device.type == "cpu" else BLOCK
        self.size = 1 + k * (d + 1) ** 2
        self._centered = factors.new_empty(self.tile, d)
        self._whitened = factors.new_empty(self.tile, k * d)
        self._weighted = factors.new_empty(k * self.tile * (d + 1))

    def bound(self, largest: float) -> float:
        """Returns a bound on what one row adds to any of the sums."""
        reach = math.sqrt(self.d) * largest + float(self.means.norm(dim=1).max())
        whitened = reach * float(torch.linalg.matrix_norm(self.whitening).max())
        constants = self.constants[self.constants.isfinite()]
        return 1 + whitened**2 + float(constants.abs().max()) + math.log(self.k)

    def sums(self, block: torch.Tensor) -> torch.Tensor:
        """Returns a block's log-likelihood and, for each component, sum r (y, 1)^T (y, 1); [m, d] -> packed [size]."""
        k, d = self.k, self.d
        out = block.new_zeros(self.size)
        products = out[1:].view(k, d + 1, d + 1)
        for rows in block.split(self.tile):
            t = len(rows)
            x = torch.sub(rows, self.center, out=self._centered[:t])
            whitened = torch.addmm(self.offset, x, self.matrix, out=self._whitened[:t]).view(t, k, d)
            squares = torch.linalg.vector_norm(whitened, dim=2).square_()
            joint = torch.add(self.constants, squares, alpha=-0.5)  # log p(x, c), [t, k]
            evidence = joint.logsumexp(1, keepdim=True)
            out[0] += evidence.sum()
            if self.hard:
                roots = torch.zeros_like(joint).scatter_(1, joint.argmax(1, keepdim=True), 1.0)
            else:
                roots = ((joint - evidence) * 0.5).exp_()  # of the responsibilities, one for each y of r y y^T
            weighted = self._weighted[: k * t * (d + 1)].view(k, t, d + 1)
            weighted[:, :, d] = roots.T
            torch.mul(whitened.transpose(0, 1), roots.T[:, :, None], out=weighted[:, :, :d])
            add_squares(products, weighted)
        return out


def add_squares(sums: torch.Tensor, y: torch.Tensor) -> None:
    """Adds y[c]^T y[c] to sums[c]; sums: [k, e, e], y: [k, t, e]."""
    if y.device.type == "cpu":
        for total, rows in zip(sums.numpy(), y.numpy(), strict=True):
            total += rows.T @ rows  # numpy sees that this is symmetric and does half the work
    else:
        sums.baddbmm_(y.mT, y)


def start_by_k_means(moments: Moments, k: int, key: tuple[int, int], regularization: float) -> Parameters:
    """Returns the mixture of the k-means clusters, from centers drawn by k-means++. Call it on every rank."""
    rows = moments.rows
    centers = k_means_centers(rows, k_means_seeds(rows, k, key), moments.largest)
    spheres = torch.eye(rows.d, dtype=torch.float64, device=centers.device).repeat(k, 1, 1)
    equal = torch.full((k,), 1 / k, dtype=torch.float64, device=centers.device)
    return moments.of(Parameters(equal, centers, spheres), hard=True).with_pooled_covariance(regularization)


def k_means_seeds(rows: Rows, k: int, key: tuple[int, int]) -> torch.Tensor:
    """Returns k latents [k, d], each drawn with probability proportional to the squared distance from those before it.

    This is k-means++ (Arthur & Vassilvitskii 2007), drawn as a race: the row with the smallest E_i / D_i^2 wins. E_i is an
    exponential variate keyed by the row's number, so no sums over preceding rows are needed.
    """
    device = rows.local.device
    squared = [torch.ones(len(block), dtype=torch.float64, device=device) for block in rows.blocks()]
    seeds = []
    for number in range(k):
        winner, time = torch.zeros(rows.d, dtype=torch.float64, device=device), math.inf
        for (first, block), weight in zip(rows.numbered_blocks(), squared, strict=True):
            keys = row_keys(derive_key(*key, number), np.arange(first, first + len(block)))
            times = -uniform(keys, 1)[:, 0].log().to(device) / weight
            best = int(times.argmin())
            if float(times[best]) < time:
                winner, time = block[best], float(times[best])
        everyone = rows.over_ranks(torch.cat([winner.new_tensor([time]), winner]))
        time, *_ = first_to_finish = everyone[everyone[:, 0].argmin()]
        if not time.isfinite():
            raise UserError(f"a mixture of {k} components needs {k} distinct latents, got {number} among {rows.n}")
        seeds.append(first_to_finish[1:].to(device))
        distances = ((block - seeds[-1]).square().sum(1) for block in rows.blocks())
        squared = [d if number == 0 else torch.minimum(s, d) for s, d in zip(squared, distances, strict=True)]
    return torch.stack(seeds)


def k_means_centers(rows: Rows, centers: torch.Tensor, largest: float) -> torch.Tensor:
    """Runs at most LLOYD_ITERATIONS of Lloyd's algorithm on centers, [k, d] -> [k, d]; a center without rows does not move."""
    k, d = centers.shape
    for _ in range(LLOYD_ITERATIONS):
        total = ExactSum(rows, k * (d + 1), max(largest, 1))
        for block in rows.blocks():
            nearest = torch.addmm(centers.square().sum(1), block, centers.T, alpha=-2).argmin(1)
            members = torch.nn.functional.one_hot(nearest, k).T.double()
            total.add(torch.cat([members.sum(1), (members @ block).flatten()]))
        counts, sums = total.result().split([k, k * d])
        moved = torch.where(counts[:, None] > 0, sums.view(k, d) / counts[:, None].clamp(min=1), centers)
        if torch.equal(moved, centers):
            break
        centers = moved
    return centers
