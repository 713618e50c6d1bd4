"""Expectation maximization of a Gaussian mixture: time an iteration against scikit-learn's from the same start, and on two ranks.

    [torchrun ...] -m benchmarks.mixture        seconds an iteration on these ranks, as one line from rank 0

n latents in d dimensions, k components with full covariances, float64, one thread each.
"""

import subprocess
import sys
import warnings
from collections.abc import Iterator
from functools import cache

import numpy as np
import torch
import torch.distributed as dist
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from threadpoolctl import threadpool_limits

from benchmarks.table import Row, at_least, take_turns
from eae_dist.data.order import lane_range
from eae_dist.distributed import rank, world_size
from eae_dist.latent.mixture import Mixture, Parameters

N, D, K = 50_000, 64, 10
FEW, MANY = 1, 5  # iterations; their difference leaves out what is done once
ROUNDS = 5
FASTER = 1.4


def rows() -> Iterator[Row]:
    latents = drawn_latents()
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        turns = {
            (fit, iterations): lambda fit=fit, iterations=iterations: fit(latents, iterations)
            for fit in (ours, theirs)
            for iterations in (FEW, MANY)
        }
        seconds = take_turns(turns, ROUNDS)
    cpu, wall = ([iteration(seconds, fit, clock) for fit in (ours, theirs)] for clock in ("cpu", "wall"))
    yield Row(
        f"mixture, n = {N:,}, d = {D}, k = {K}, an iteration: scikit-learn",
        *(f"{value:.3f} s" for value in cpu),
        **at_least(FASTER, cpu[1] / cpu[0]),
        beside=f"wall {wall[1] / wall[0]:.2f}x",
    )

    one, two = (launch(ranks) for ranks in (1, 2))
    yield Row(
        f"mixture, n = {N:,}, d = {D}, k = {K}, an iteration: two ranks, one rank",
        f"{two:.3f} s",
        f"{one:.3f} s",
        f"{two / one:.2f}x",
        "less than 1x",
        two < one,
        "wall",
    )


@cache
def drawn_latents() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(K, D, generator=generator, dtype=torch.float64)
    groups = torch.randint(K, (N,), generator=generator)
    return centers[groups] + torch.randn(N, D, generator=generator, dtype=torch.float64)


def launch(ranks: int) -> float:
    """Seconds an iteration on so many ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", "benchmarks.mixture"]
    return float(subprocess.run([sys.executable, *launcher], capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mine = drawn_latents()[slice(*lane_range(N, rank(), world_size()))]
    turns = {iterations: lambda iterations=iterations: ours(mine, iterations) for iterations in (FEW, MANY)}
    seconds = take_turns(turns, ROUNDS)
    if rank() == 0:
        print((seconds[MANY].wall - seconds[FEW].wall) / (MANY - FEW))
    dist.destroy_process_group()


def iteration(seconds: dict, fit, clock: str) -> float:
    return (getattr(seconds[fit, MANY], clock) - getattr(seconds[fit, FEW], clock)) / (MANY - FEW)


def ours(latents: torch.Tensor, iterations: int) -> None:
    start = Parameters(torch.full((K,), 1 / K), drawn_latents()[:K], torch.eye(D).repeat(K, 1, 1))
    Mixture(K, start=start, tolerance=0, iterations=iterations).fit(latents)


def theirs(latents: torch.Tensor, iterations: int) -> None:
    start = {
        "weights_init": np.full(K, 1 / K),
        "means_init": latents[:K].numpy(),
        "precisions_init": np.stack([np.eye(D)] * K),
    }
    GaussianMixture(K, tol=0, max_iter=iterations, **start).fit(latents.numpy())


if __name__ == "__main__":
    main()
