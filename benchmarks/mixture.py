"""Expectation maximization of a Gaussian mixture: time per iteration against scikit-learn from the same start, and on two ranks.

    [torchrun ...] -m benchmarks.mixture N      prints seconds per iteration and peak memory [MiB] of these ranks, from rank 0

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
from eae_dist.distributed import rank, world_size
from eae_dist.latent.mixture import Mixture, Parameters
from eae_dist.training.run import peak_memory_mib

N, D, K = 50_000, 64, 10
MANY_LATENTS = 1_000_000
FEW, MANY = 1, 5  # iterations; their difference leaves out the work that is done once
ROUNDS = 5
FASTER = 1.4


def rows() -> Iterator[Row]:
    """Yields the rows of the table."""
    latents = drawn_latents(N)
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

    (one, _), (two, _) = (launch(ranks, N) for ranks in (1, 2))
    yield Row(
        f"mixture, n = {N:,}, d = {D}, k = {K}, an iteration: two ranks, one rank",
        f"{two:.3f} s",
        f"{one:.3f} s",
        f"{two / one:.2f}x",
        "less than 1x",
        two < one,
        "wall",
    )
    seconds, memory = launch(2, MANY_LATENTS)
    yield Row(
        f"mixture, n = {MANY_LATENTS:,}, d = {D}, k = {K}, an iteration on two ranks",
        f"{seconds:.2f} s",
        "",
        "",
        beside=f"wall; at most {memory:,.0f} MiB a rank, {MANY_LATENTS // 2 * D * 8 / 2**20:,.0f} MiB of them its latents",
    )


@cache
def drawn_centers() -> torch.Tensor:
    """Returns the centers of the mixture, float64 [K, D]."""
    return torch.randn(K, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def drawn_latents(n: int, seed: int = 1) -> torch.Tensor:
    """Returns samples of the mixture, float64 [n, D]."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randint(K, (n,), generator=generator)
    return torch.randn(n, D, generator=generator, dtype=torch.float64).add_(drawn_centers()[groups])


def launch(ranks: int, n: int) -> tuple[float, float]:
    """Returns seconds per iteration on this many ranks, and the most memory of one of them [MiB]."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", "benchmarks.mixture", str(n)]
    done = subprocess.run([sys.executable, *launcher], capture_output=True, text=True, check=True)
    seconds, memory = done.stdout.splitlines()[-1].split()
    return float(seconds), float(memory)


def main() -> None:
    """Measures on the ranks of a launcher."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mine = drawn_latents(int(sys.argv[1]) // world_size(), seed=rank())
    turns = {iterations: lambda iterations=iterations: ours(mine, iterations) for iterations in (FEW, MANY)}
    seconds = take_turns(turns, ROUNDS)
    if rank() == 0:
        print((seconds[MANY].wall - seconds[FEW].wall) / (MANY - FEW), peak_memory_mib(torch.device("cpu")))
    dist.destroy_process_group()


def iteration(seconds: dict, fit, clock: str) -> float:
    """Returns the seconds of one iteration."""
    return (getattr(seconds[fit, MANY], clock) - getattr(seconds[fit, FEW], clock)) / (MANY - FEW)


def ours(latents: torch.Tensor, iterations: int) -> None:
    """Fits our mixture."""
    start = Parameters(torch.full((K,), 1 / K), drawn_centers() + 0.1, torch.eye(D).repeat(K, 1, 1))
    Mixture(K, start=start, tolerance=0, iterations=iterations).fit(latents)


def theirs(latents: torch.Tensor, iterations: int) -> None:
    """Fits scikit-learn's mixture."""
    start = {
        "weights_init": np.full(K, 1 / K),
        "means_init": (drawn_centers() + 0.1).numpy(),
        "precisions_init": np.stack([np.eye(D)] * K),
    }
    GaussianMixture(K, tol=0, max_iter=iterations, **start).fit(latents.numpy())


if __name__ == "__main__":
    main()
