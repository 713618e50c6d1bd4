"""The cases of metrics/ that need several ranks: CASES, run on every rank by world.py; the tests read what rank 0 returned."""

import torch

from eae_dist.distributed import gather_rows, rank, world_size
from eae_dist.metrics.frechet import FeatureStats, frechet_distance
from eae_dist.metrics.kid import kernel_distance
from eae_dist.metrics.prdc import precision_recall_density_coverage


def normal(n: int, f: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(n, f, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def feature_sets() -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [700, 9] and [650, 9] of different distributions, with duplicates within each and across them."""
    real, generated = normal(700, 9, 1), 0.8 * normal(650, 9, 2) + 0.3
    real[5] = real[6] = real[400]
    generated[10] = generated[11] = real[6]
    generated[600] = real[20]
    return real.float(), generated.float()


def uneven(x: torch.Tensor) -> torch.Tensor:
    """This rank's rows of x: none on rank 1 of several, all that is left on the last."""
    parts = {1: [0, 100], 2: [0, 100, 100], 3: [0, 30, 30, 100], 4: [0, 17, 17, 60, 100]}[world_size()]
    first, stop = (part * len(x) // 100 for part in parts[rank() : rank() + 2])
    return x[first:stop]


def stats_of(x: torch.Tensor, batch: int = 37) -> FeatureStats:
    stats = FeatureStats()
    for rows in x.split(batch):
        stats.add(rows)
    return stats


def exact_moments():
    real, generated = (stats_of(uneven(x)).sum_over_ranks() for x in feature_sets())
    return real.state_dict() | {
        "mean": real.mean,
        "covariance": real.covariance,
        "distance": frechet_distance(real, generated),
    }


def inexact_moments():
    """Features too large for the grid on every rank, and features whose sums are too large only together."""
    out = {}
    for name, x in {
        "each": 1e6 + feature_sets()[0].double(),
        "together": 1e3 + feature_sets()[0].double()[:36],
    }.items():
        total = stats_of(uneven(x), batch=5).sum_over_ranks()
        out[name] = {"exact": total.exact, "count": total.count, "mean": total.mean, "covariance": total.covariance}
    return out


def no_rows_anywhere():
    return {"count": FeatureStats().sum_over_ranks().count}


def distances_of_gathered_rows():
    real, generated = (gather_rows(uneven(x)) for x in feature_sets())
    return {
        "kernel": list(kernel_distance(real, generated, subsets=7, subset_size=100, seed=3)),
        "manifold": list(precision_recall_density_coverage(real, generated)),
    }


CASES = {case.__name__: case for case in (exact_moments, inexact_moments, no_rows_anywhere, distances_of_gathered_rows)}
