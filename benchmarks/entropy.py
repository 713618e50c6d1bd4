"""The k-NN entropy, forward and backward: time and memory against cdist + topk + autograd, and time against a bare product.

n rows in d dimensions, k = 1, CPU time. The bare product is the n x n matrix of inner products in float32, computed tile by tile
into one buffer. Every search in matrix-product form has to do at least this. Then the terms of the rivals, those of `sigreg` and
`swae` on 256 random directions that are drawn in every call.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.table import Row, Seconds, at_least, at_most, take_turns
from eae_dist.losses.entropy import knn_entropy, log_unit_ball_volume
from eae_dist.losses.sliced import epps_pulley, random_directions, sliced_wasserstein
from eae_dist.losses.terms import kernel_discrepancy
from eae_dist.numerics.keyed_random import normal, row_keys

N = 16_384
FASTER = 10  # than cdist + topk
OVER_PRODUCT = {16: 2.0, 64: None, 128: 1.3}  # d -> the most times the bare product
MEMORY_MIB = 64
TILE = (512, 4096)
BATCHES, DIRECTIONS = {128: 51, 1024: 21, N: 5}, 256  # rows -> rounds of the rows on the rivals


def rows() -> Iterator[Row]:
    """Yields the rows of the table."""
    for d, over_product in OVER_PRODUCT.items():
        yield from rows_of(d, over_product)
    for n, rounds in BATCHES.items():
        yield from rows_of_rivals(n, rounds)


def rows_of(d: int, over_product: float | None) -> Iterator[Row]:
    """Yields the rows of the table for d dimensions."""
    latents = torch.randn(N, d, generator=torch.Generator().manual_seed(0)).requires_grad_()
    tile = torch.empty(TILE)
    few = latents[: TILE[1]]
    warm, expected = step(knn_entropy, few), step(cdist_entropy, few)
    torch.testing.assert_close(warm, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    product(few, tile)

    ours, theirs = partial(step, knn_entropy, latents), partial(step, cdist_entropy, latents)
    long = take_turns({"ours": ours, "theirs": theirs}, 3)
    short = take_turns({"ours": ours, "theirs": partial(product, latents, tile)}, 9)
    what = f"entropy, n = {N:,}, d = {d}"
    ratio = long["theirs"].cpu / long["ours"].cpu
    yield Row(f"{what}: cdist + topk", *seconds(long), **at_least(FASTER, ratio), beside=wall(long["theirs"], long["ours"]))
    ratio = short["ours"].cpu / short["theirs"].cpu
    columns = {"ratio": f"{ratio:.2f}x"} if over_product is None else at_most(over_product, ratio)
    yield Row(f"{what}: bare product", *seconds(short), **columns, beside=wall(short["ours"], short["theirs"]))

    peak, peak_of_cdist = (added_memory_mib(name, d) for name in ("knn_entropy", "cdist_entropy"))
    memory = (f"{peak:.0f} MiB", f"{peak_of_cdist:,.0f} MiB", f"{peak / peak_of_cdist:.3f}x")
    yield Row(f"{what}: peak memory of cdist + topk", *memory, f"ours under {MEMORY_MIB} MiB", peak < MEMORY_MIB)


def rows_of_rivals(n: int, rounds: int) -> Iterator[Row]:
    """Yields the rows of the table on the terms that pull latents to N(0, I) in other ways."""
    latents = torch.randn(n, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    rivals = {
        "Epps-Pulley statistic (`sigreg`)": lambda z: epps_pulley(z, random_directions(0, DIRECTIONS, z), n),
        "sliced Wasserstein (`swae`)": lambda z: sliced_wasserstein(z, random_directions(0, DIRECTIONS, z)),
        "MMD (`wae`)": lambda z: kernel_discrepancy(z, normal(row_keys(0, np.arange(n)), 64).to(z)),
    }
    if n == N:
        del rivals["MMD (`wae`)"]  # it keeps n x n kernels for its gradient, more than 10 GiB
    work = {name: partial(step, term, latents) for name, term in {"ours": knn_entropy, **rivals}.items()}
    turns = take_turns(work, rounds)
    for name in rivals:
        columns = (f"{1e3 * turns[which].cpu:.1f} ms" for which in ("ours", name))
        ratio = f"{turns[name].cpu / turns['ours'].cpu:.1f}x"
        yield Row(f"entropy, n = {n:,}, d = 64: {name}", *columns, ratio, beside=wall(turns[name], turns["ours"]))


def seconds(turns: dict[str, Seconds]) -> tuple[str, str]:
    """Returns the CPU times as text."""
    return f"{turns['ours'].cpu:.2f} s", f"{turns['theirs'].cpu:.2f} s"


def wall(above: Seconds, below: Seconds) -> str:
    """Returns the ratio of the wall times as text."""
    return f"wall {above.wall / below.wall:.2f}x"


def step(entropy, latents: torch.Tensor) -> torch.Tensor:
    """Returns the gradient of the entropy."""
    (gradient,) = torch.autograd.grad(entropy(latents), latents)
    return gradient


def cdist_entropy(latents: torch.Tensor) -> torch.Tensor:
    """Estimates the entropy in the simplest way. The second smallest distance is used, as the smallest is to the row itself."""
    n, d = latents.shape
    distance = torch.cdist(latents, latents).topk(2, largest=False).values[:, 1]
    psi = torch.tensor([n, 1.0]).digamma()
    return d * distance.log().mean() + log_unit_ball_volume(d) + psi[0] - psi[1]


@torch.no_grad()
def product(latents: torch.Tensor, tile: torch.Tensor) -> None:
    """Computes the bare product."""
    height, width = tile.shape
    for queries in latents.split(height):
        for keys in latents.split(width):
            torch.mm(queries, keys.T, out=tile)


def added_memory_mib(name: str, d: int) -> float:
    """Returns what forward and backward add to the peak of a process that holds the latents [MiB].

    It measures in a separate process.
    """
    program = f"from benchmarks import entropy; entropy.print_added_memory(entropy.{name}, {d})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return float(done.stdout)


def print_added_memory(entropy, d: int) -> None:
    """Measures in this process and prints the result."""
    torch.set_num_threads(1)
    step(entropy, torch.randn(256, d).requires_grad_())  # loads what the first call loads
    latents = torch.randn(N, d).requires_grad_()
    before = peak_memory_mib()
    step(entropy, latents)
    print(peak_memory_mib() - before)


def peak_memory_mib() -> float:
    """Returns the peak memory of this process [MiB], on Linux.

    getrusage would return the parent's peak if that was higher.
    """
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**10
