"""Mean and covariance of features, summed exactly over batches and ranks, and the Fréchet distance between two of them.

    d^2 = |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))

This is the distance between Gaussians of these moments (Dowson & Landau 1982). With Inception features it is the FID (Heusel et
al. 2017).

Features are rounded to a grid of 2^-14. In units of the grid, they and their products are integers, and sums of integers below
2^53 are exact in float64. So the moments have the same bits for any order, any batches and any number of ranks.
f: features, m: rows of a batch, n: all rows.
"""

import numpy as np
import torch

from eae_dist.distributed import gather_objects, sum_over_ranks
from eae_dist.errors import UserError

GRID_BITS = 14  # rounding changes a distance by 1e-6 of its value at 500 rows; sums of 50,000 rows of |x| < 16 are exact
EXACT = 2.0**53  # float64 holds every integer up to here
BLOCK = 512  # rows per product; with few rows, reading the [f, f] sums costs more than the product

Moments = tuple[torch.Tensor, torch.Tensor]


class FeatureStats:
    """Count, mean and covariance (divided by n - 1) of feature rows, which may be added in any batches on any ranks.

    The sums are exact while the squares of each feature, in units of the grid, sum to less than 2^53: n times the mean square of
    a feature up to 3e7. Beyond that, the moments are merged in floating point (Chan et al. 1979), to about 1e-12, and their bits
    depend on the order.
    """

    def __init__(self) -> None:
        self.count, self._exact = 0, True
        # If exact: the sums of x and of x x^T in units of the grid. Otherwise: the mean, and the sum of squares around it.
        self._first, self._second = torch.zeros(0, dtype=torch.float64), torch.zeros(0, 0, dtype=torch.float64)
        self._waiting: list[torch.Tensor] = []

    @property
    def features(self) -> int:
        """f, or 0 before the first rows."""
        return self._waiting[0].shape[1] if self._waiting else len(self._first)

    @property
    def exact(self) -> bool:
        """True while the sums are exact: they are then the same for every order of the rows."""
        self._add_waiting()
        return self._exact

    def add(self, x: torch.Tensor | np.ndarray) -> None:
        """Adds floating point rows [m, f] from any device. Raises ValueError for another f and for NaN or infinity."""
        x = torch.as_tensor(x)
        if x.ndim != 2 or self.features not in (0, x.shape[1]):
            raise ValueError(f"features of shape {tuple(x.shape)} were added to those of shape [m, {self.features or 'f'}]")
        if not x.isfinite().all():
            raise UserError(f"{int((~x.isfinite()).any(1).sum())} of {len(x)} rows of features hold NaN or infinity")
        if len(x) == 0:
            return
        self.count += len(x)
        self._waiting.append(x.detach().to("cpu", torch.float64, copy=True))
        if sum(map(len, self._waiting)) >= BLOCK:
            self._add_waiting()

    def merge(self, other: "FeatureStats") -> None:
        """Adds all rows of `other`. `other` keeps its rows and only sums those that it has not summed yet."""
        self._add_waiting()
        other._add_waiting()
        if other.count:
            self._merge(other.count, other._exact, other._first, other._second)
            self.count += other.count

    def sum_over_ranks(self, device: torch.device | str = "cpu") -> "FeatureStats":
        """Returns the statistics of all ranks' rows, on every rank. Call it on every rank, also on ranks without rows.

        device: where the ranks' sums are exchanged; this is the GPU if the process group is NCCL's.
        """
        self._add_waiting()
        everyone = gather_objects((self.features, self._exact))
        features = max(f for f, _ in everyone)
        if any(f not in (0, features) for f, _ in everyone):
            raise ValueError(f"ranks have features of different lengths: {[f for f, _ in everyone]}")
        total = FeatureStats()
        if features == 0:
            return total
        mine = self if self.features else _zeros(features)

        def summed(x: torch.Tensor) -> torch.Tensor:
            return sum_over_ranks(x.to(device)).cpu()

        total.count = int(summed(torch.tensor(mine.count, dtype=torch.int64)))
        total._exact = all(exact for _, exact in everyone)
        if total._exact:
            total._first, total._second = summed(mine._first), summed(mine._second)
            total._exact = bool(total._second.diagonal().max() <= EXACT)
        if not total._exact:
            mean, squares = mine._moments()
            total._first = summed(mine.count * mean) / total.count
            away = mean - total._first
            total._second = summed(squares + mine.count * torch.outer(away, away))
        return total

    @property
    def mean(self) -> torch.Tensor:
        """The mean, float64 [f]."""
        self._need(1)
        return self._moments()[0]

    @property
    def covariance(self) -> torch.Tensor:
        """The covariance, float64 [f, f]: the sum of squares around the mean, divided by n - 1."""
        self._need(2)
        return self._moments()[1] / (self.count - 1)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Returns the sums for a file."""
        self._add_waiting()
        return {
            "count": torch.tensor(self.count),
            "exact": torch.tensor(self._exact),
            "grid_bits": torch.tensor(GRID_BITS),
            "first": self._first.clone(),
            "second": self._second.clone(),
        }

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restores the sums. Raises ValueError for those of another grid."""
        if int(state["grid_bits"]) != GRID_BITS:
            raise ValueError(f"these statistics lie on a grid of 2^-{int(state['grid_bits'])}, expected 2^-{GRID_BITS}")
        self.count, self._exact, self._waiting = int(state["count"]), bool(state["exact"]), []
        self._first, self._second = state["first"].clone(), state["second"].clone()

    def _need(self, rows: int) -> None:
        self._add_waiting()
        if self.count < rows:
            raise UserError(f"the moments of features need at least {rows} rows, got {self.count}")

    def _add_waiting(self) -> None:
        if not self._waiting:
            return
        x, self._waiting = torch.cat(self._waiting), []
        before = self.count - len(x)
        if before == 0:
            self._first, self._second = _zeros(x.shape[1])._first, _zeros(x.shape[1])._second
        if self._exact:
            grid = (x * 2.0**GRID_BITS).round_()
            # These bound all partial sums of products: |sum x_i x_j|^2 <= sum x_i^2 sum x_j^2, |sum x| <= sum x^2.
            if (self._second.diagonal() + grid.square().sum(0)).max() <= EXACT:
                self._first += grid.sum(0)
                self._second.addmm_(grid.T, grid)
                return
        mean = x.mean(0)
        self.count = before
        self._merge(len(x), False, mean, (x - mean).T @ (x - mean))
        self.count += len(x)

    def _merge(self, count: int, exact: bool, first: torch.Tensor, second: torch.Tensor) -> None:
        """Merges the sums of `count` other rows; self.count does not include them yet."""
        if self.features not in (0, len(first)):
            raise ValueError(f"statistics of {len(first)} features cannot be merged with those of {self.features}")
        if self.count == 0:
            self._exact, self._first, self._second = exact, first.clone(), second.clone()
            return
        if self._exact and exact and (self._second.diagonal() + second.diagonal()).max() <= EXACT:
            self._first += first
            self._second += second
            return
        mean, squares = self._moments()
        other_mean, other_squares = _from_sums(count, first, second) if exact else (first, second)
        total, away = self.count + count, other_mean - mean
        self._exact = False
        self._first = mean + away * (count / total)
        self._second = squares + other_squares + torch.outer(away, away) * (self.count * count / total)

    def _moments(self) -> Moments:
        """Returns the mean and the sum of squares around it."""
        return _from_sums(self.count, self._first, self._second) if self._exact else (self._first, self._second)


def _zeros(features: int) -> FeatureStats:
    stats = FeatureStats()
    stats._first = torch.zeros(features, dtype=torch.float64)
    stats._second = torch.zeros(features, features, dtype=torch.float64)
    return stats


def _from_sums(count: int, first: torch.Tensor, second: torch.Tensor) -> Moments:
    """Returns the mean [f] and the sum of squares around it [f, f], from the sums of x and x x^T in units of the grid."""
    if count == 0:
        return torch.zeros_like(first), torch.zeros_like(second)
    mean = first / count
    # Sums around the integer nearest to the mean are still exact, so that the last subtraction is of a small number.
    center = mean.round()
    around = second - (torch.outer(center, first) + torch.outer(first, center)) + torch.outer(count * center, center)
    rest = mean - center
    return mean * 2.0**-GRID_BITS, (around - count * torch.outer(rest, rest)) * 4.0**-GRID_BITS


def frechet_distance(a: FeatureStats | Moments, b: FeatureStats | Moments, root: str = "svd") -> float:
    """Returns the squared Fréchet distance of two statistics, or pairs (mean [f], covariance [f, f]), in float64.

    root: a row of ROOTS. The result is not clipped: rounding can make the distance of equal statistics slightly negative.
    """
    (mean_a, covariance_a), (mean_b, covariance_b) = (_mean_covariance(x) for x in (a, b))
    if mean_a.shape != mean_b.shape:
        raise ValueError(f"the Fréchet distance needs equal numbers of features, got {len(mean_a)} and {len(mean_b)}")
    if root not in ROOTS:
        raise ValueError(f"the root {root!r} is unknown; it is one of {', '.join(ROOTS)}")
    away = mean_a - mean_b
    traces = covariance_a.trace() + covariance_b.trace()
    return (away.dot(away) + traces).item() - 2 * ROOTS[root](covariance_a, covariance_b)


def _mean_covariance(x: FeatureStats | Moments) -> Moments:
    mean, covariance = (x.mean, x.covariance) if isinstance(x, FeatureStats) else x
    return torch.as_tensor(mean, dtype=torch.float64).cpu(), torch.as_tensor(covariance, dtype=torch.float64).cpu()


def svd_root_trace(a: torch.Tensor, b: torch.Tensor) -> float:
    """Returns tr (a b)^(1/2) of covariances [f, f]: the sum of the singular values of A^T B, where a = A A^T and b = B B^T.

    It is right to rounding for any rank, also with fewer samples than features.
    """
    return torch.linalg.svdvals(_factor(a).T @ _factor(b)).sum().item()


def _factor(covariance: torch.Tensor) -> torch.Tensor:
    """Returns A [f, rank] with A A^T = covariance: Cholesky's factor if the rank is full, otherwise without rounding directions.

    Features that do not vary are left out too, because LAPACK's eigenvalues can fail to converge with them.
    """
    if not (varying := covariance.diagonal() > 0).all():
        factor = _factor(covariance[varying][:, varying]) if varying.any() else covariance[:0, :0]
        return covariance.new_zeros(len(covariance), factor.shape[1]).masked_scatter_(varying[:, None], factor)
    rounding = len(covariance) * torch.finfo(covariance.dtype).eps
    lower, failed = torch.linalg.cholesky_ex(covariance)
    if not failed and lower.diagonal().min().square() > rounding * covariance.diagonal().max():
        return lower
    values, vectors = torch.linalg.eigh(covariance)
    keep = values > rounding * values.max()
    return vectors[:, keep] * values[keep].sqrt() if values.max() > 0 else vectors[:, :0]


def sqrtm_root_trace(a: torch.Tensor, b: torch.Tensor) -> float:
    """Returns tr (a b)^(1/2) as pytorch-fid computes it, for comparison with published numbers.

    With fewer samples than features it is too large, by 1e-3 at 100 samples of 2048 features, and the distance is too small.
    """
    from scipy.linalg import sqrtm

    x, y = a.numpy(), b.numpy()
    root = sqrtm(x.dot(y))
    if not np.isfinite(root).all():
        offset = 1e-6 * np.eye(len(x))
        root = sqrtm((x + offset).dot(y + offset))
    if np.iscomplexobj(root):
        if not np.allclose(np.diagonal(root).imag, 0, atol=1e-3):
            raise UserError(f"the matrix root has an imaginary part of {np.abs(root.imag).max()}; use root='svd'")
        root = root.real
    return float(np.trace(root))


ROOTS = {"svd": svd_root_trace, "sqrtm": sqrtm_root_trace}


def warnings_about(stats: FeatureStats, what: str) -> list[str]:
    """Returns warnings about distances from these statistics, for readers of the result; `what` names the set of images."""
    warnings = []
    if not stats.exact:
        warnings.append(f"the sums over {what} are too large to be exact: the distance depends on their order, by about 1e-12")
    spread = stats.covariance.diagonal().max().sqrt().item() if stats.count > 1 else 0.0
    if 0 < spread < 100 * 2.0**-GRID_BITS:
        warnings.append(
            f"features of {what} vary by {spread:.1e} at most, which rounding them to 2^-{GRID_BITS} = {2.0**-GRID_BITS:.1e} "
            f"blurs; scale the features up"
        )
    return warnings
