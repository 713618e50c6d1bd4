"""The k-NN entropy, forward and backward: time and memory against cdist + topk + autograd, time against a bare product.

n rows in d dimensions, k = 1, CPU time. The bare product is the n x n matrix of inner products in float32, tile by tile into
one buffer that is kept: what any search in matrix-product form has to do at least, and without anything done with it.
"""

import subprocess
import sys
from collections.abc import Iterator

import torch

from benchmarks.table import Row, at_least, at_most, take_turns
from eae_dist.losses.entropy import knn_entropy, log_unit_ball_volume
from eae_dist.train import peak_memory_mib

N = 16_384
FASTER = 10  # than cdist + topk
OVER_PRODUCT = {16: 2.0, 64: None, 128: 1.3}  # d -> the most times the bare product
MEMORY_MIB = 64


def rows() -> Iterator[Row]:
    for d, over_product in OVER_PRODUCT.items():
        latents = torch.randn(N, d, generator=torch.Generator().manual_seed(0)).requires_grad_()
        tile = torch.empty(512, 4096)
        ours, theirs = step(knn_entropy, latents[:1024]), step(cdist_entropy, latents[:1024])
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=0)  # warms up, and shows that both do the same
        product(latents, tile)
        short = take_turns({"ours": lambda: step(knn_entropy, latents), "product": lambda: product(latents, tile)}, 7)
        long = take_turns({"ours": lambda: step(knn_entropy, latents), "cdist": lambda: step(cdist_entropy, latents)}, 3)
        what = f"entropy, n = {N:,}, d = {d}"
        yield Row(
            f"{what}: cdist + topk",
            f"{long['ours'].cpu:.2f} s",
            f"{long['cdist'].cpu:.2f} s",
            **at_least(FASTER, long["cdist"].cpu / long["ours"].cpu),
            beside=f"wall {long['cdist'].wall / long['ours'].wall:.1f}x",
        )
        ratio = short["ours"].cpu / short["product"].cpu
        yield Row(
            f"{what}: bare product",
            f"{short['ours'].cpu:.2f} s",
            f"{short['product'].cpu:.2f} s",
            **(at_most(over_product, ratio) if over_product else {"ratio": f"{ratio:.2f}x"}),
            beside=f"wall {short['ours'].wall / short['product'].wall:.2f}x",
        )
        peak, peak_of_cdist = (added_memory_mib(name, d) for name in ("knn_entropy", "cdist_entropy"))
        yield Row(
            f"{what}: peak memory, cdist + topk",
            f"{peak:.0f} MiB",
            f"{peak_of_cdist:.0f} MiB",
            f"{peak / peak_of_cdist:.3f}x",
            f"ours under {MEMORY_MIB} MiB",
            peak < MEMORY_MIB,
        )


def step(entropy, latents: torch.Tensor) -> torch.Tensor:
    """The gradient."""
    (gradient,) = torch.autograd.grad(entropy(latents), latents)
    return gradient


def cdist_entropy(latents: torch.Tensor) -> torch.Tensor:
    """The estimate as one would write it down; of 1 the nearest is the row itself."""
    n, d = latents.shape
    distance = torch.cdist(latents, latents).topk(2, largest=False).values[:, 1]
    psi = torch.tensor([n, 1.0]).digamma()
    return d * distance.log().mean() + log_unit_ball_volume(d) + psi[0] - psi[1]


@torch.no_grad()
def product(latents: torch.Tensor, tile: torch.Tensor) -> None:
    height, width = tile.shape
    for queries in latents.split(height):
        for keys in latents.split(width):
            torch.mm(queries, keys.T, out=tile)


def added_memory_mib(name: str, d: int) -> float:
    """What forward and backward add to the peak of a process that holds the latents, MiB: measured in a process of its own."""
    program = f"from benchmarks import entropy; entropy.print_added_memory(entropy.{name}, {d})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return float(done.stdout)


def print_added_memory(entropy, d: int) -> None:
    torch.set_num_threads(1)
    step(entropy, torch.randn(256, d).requires_grad_())  # loads what is loaded at the first call
    latents = torch.randn(N, d).requires_grad_()
    before = peak_memory_mib(torch.device("cpu"))
    step(entropy, latents)
    print(peak_memory_mib(torch.device("cpu")) - before)
