"""What the package does on a GPU, as a markdown table; each number also as a share of the most that the card can do.

    python -m benchmarks.gpu [--out FILE]        the table on the screen, and on a GPU in docs/results/gpu.md or FILE

Without a GPU it measures small cases on the CPU, so that it is known to work. It reads no data and nothing from the network. Rows
that cannot be measured stay in the table with the reason. No row starts after LIMIT seconds.

A number is the median of calls after warm-up calls, by CUDA events on a GPU. Operations are those of convolutions and matrix
products, a multiplication and an addition each. n: latents, d: dimensions.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

# torch comes first: importing FAISS' wheel makes its own CUDA libraries visible to all that is loaded later.
import torch

# isort: split
import faiss
import numpy as np
from accelerate.state import AcceleratorState
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.entropy import cdist_entropy, step
from eae_dist.config import Config, load_config
from eae_dist.distributed import ending_ranks, rank, world_size
from eae_dist.latent import gpu_search
from eae_dist.latent.index import LatentIndex
from eae_dist.losses.entropy import knn_entropy
from eae_dist.metrics.extractor import Extractor
from eae_dist.metrics.features import build_features
from eae_dist.metrics.inception import inception, inception_layout
from eae_dist.numerics.precision import allow_tf32
from eae_dist.objectives import build_objective, resolve
from eae_dist.training import compilation
from eae_dist.training.compilation import set_execution
from eae_dist.training.engines import engine_of
from eae_dist.training.loop import training_step
from eae_dist.training.setup import start_accelerator

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "results" / "gpu.md"
LIMIT, COMPILING, LAUNCHING = 510, 60, 90  # seconds: of all rows, and what a row that compiles or starts ranks is given
# Data set: its configuration and the shape of its images. Fashion-MNIST has network and shape of mnist5k.
DATA = {
    "mnist5k, fashion_mnist": ("mnist5k", (1, 32, 32)),
    "mnist": ("mnist", (1, 32, 32)),
    "cifar10": ("cifar10", (3, 32, 32)),
    "celeba": ("celeba", (3, 64, 64)),
}
ARITHMETIC = {"fp32": (), "tf32": ("train.tf32=true",), "bf16": ("train.precision=bf16",)}
EACH_RANK, ENGINES = 128, {"DDP": None, "ZeRO-1": "deepspeed_zero1.json", "ZeRO-2": "deepspeed_zero2.json"}
KINDS, K, RECALL = ("flat", "ivf_flat", "ivf_pq"), 10, 0.95
# The most that a card can do by its data sheet, dense, in 10^12 operations a second: float32, TF32, bfloat16; None: not at all.
# The name is what torch calls the card.
PEAKS = {
    r"\bH100 80GB HBM3$|\bH200$": (66.9, 494.7, 989.4),
    r"\bH100 PCIe$": (51.2, 378.0, 756.0),
    r"\bA100\b": (19.5, 156.0, 312.0),
    r"\bA40$": (37.4, 74.8, 149.7),
    r"\bA10$": (31.2, 62.5, 125.0),
    r"\bL40S$": (91.6, 183.0, 362.0),
    r"\bL4$": (30.3, 60.0, 121.0),
    r"RTX 4090$": (82.6, 82.6, 165.2),
    r"RTX 3090$": (35.6, 35.6, 71.0),
    r"V100-SXM2": (15.7, None, None),
    r"Tesla T4$": (8.1, None, None),
}


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    Settings of all networks beside those of the data set, a larger batch or None, numbers of latents and their dimensions,
    latents and queries of a search with their dimensions, images for features, seconds per row.
    """

    settings: tuple[str, ...]
    large_batch: int | None
    latents: tuple[int, ...]
    dimensions: tuple[int, ...]
    search: tuple[int, int, int]
    images: int
    seconds: float


FULL = Scale((), 1_024, (1_024, 4_096, 16_384, 65_536, 262_144), (16, 128), (200_000, 10_000, 128), 256, 1.0)
REDUCED = Scale(("model.width=8", "train.global_batch=16"), None, (1_024, 4_096), (16,), (12_000, 500, 16), 2, 0.1)


class LeftOut(Exception):
    """The reason for which a row is not measured."""


@dataclass(frozen=True)
class Measured:
    """Columns of a row. operations: in a second on a card; arithmetic: of ARITHMETIC, in which they are done."""

    text: str
    beside: str = ""
    operations: float | None = None
    arithmetic: str = "fp32"


Task = tuple[str, float, Callable[[], Measured]]  # what is measured, the seconds that it may need, and the work


@dataclass(frozen=True)
class Bench:
    """Where and how much is measured."""

    device: torch.device
    scale: Scale
    end: float  # by time.monotonic

    @property
    def left(self) -> float:
        """Seconds in which rows may start."""
        return self.end - time.monotonic()

    def seconds(self, work: Callable[[], object]) -> float:
        """Returns the median seconds of a call of `work`, which is called for about `scale.seconds` altogether."""
        return median_seconds(work, self.device, self.scale.seconds)


def median_seconds(work: Callable[[], object], device: torch.device, budget: float) -> float:
    """Returns the median seconds of 3 to 100 calls of `work`, or of one that takes long, after calls that warm up.

    budget: seconds for all calls; a call takes long if it alone takes five times as much.
    """
    work()  # loads kernels and chooses algorithms
    if (first := _seconds_of_one(work, device)) > 5 * budget:
        return first
    rounds = min(max(int(budget / max(first, 1e-6)), 3), 100)
    return statistics.median(_seconds_of_one(work, device) for _ in range(rounds))


def _seconds_of_one(work: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    work()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def peaks(card: str) -> dict[str, float] | None:
    """Returns what the card can do at most in each arithmetic, in operations a second; None for a card that PEAKS lacks."""
    for pattern, figures in PEAKS.items():
        if re.search(pattern, card):
            return {name: tera * 1e12 for name, tera in zip(ARITHMETIC, figures, strict=True) if tera is not None}
    return None


def counted(work: Callable[[], object]) -> int:
    """Returns the operations of a call."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


# Networks.


def training(config: Config, shape: tuple[int, int, int]) -> tuple[Callable[[], object], torch.device]:
    """Returns a function that takes a training step on random images, and the device. Call it on every rank."""
    AcceleratorState._reset_state(reset_partial_state=world_size() == 1)  # it would hold all runs to the first one's precision
    config = resolve(config, shape)
    accelerator = start_accelerator(config.train)
    objective = build_objective(config.model, config.objective, shape, config.train.seed)
    set_execution(objective, config.train, accelerator.device)
    optimizer = torch.optim.Adam(objective.parameters(), lr=config.train.learning_rate)
    model, optimizer = engine_of(accelerator).prepare(objective, optimizer, config, config.train.global_batch)
    rows = config.train.global_batch // world_size()
    images = torch.randint(256, (rows, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(rank()))
    batch = {"image": images, "first": torch.ones(rows, dtype=torch.bool), "distinct": True}
    row_ids = np.arange(rank() * rows, (rank() + 1) * rows)
    return partial(training_step, accelerator, model, optimizer, batch, row_ids, 0, config.train), accelerator.device


def configured(name: str, *settings: str) -> Config:
    """Returns the configuration of a data set with these settings."""
    return load_config(["--config", str(ROOT / "configs" / f"{name}.yaml"), "train.trackers=[]", *settings])


@cache
def operations_of_step(name: str, shape: tuple[int, int, int], *settings: str) -> int:
    """Returns the operations of a training step."""
    return counted(training(configured(name, *settings), shape)[0])


def network(bench: Bench, name: str, shape: tuple[int, int, int], arithmetic: str, compiled: bool, *settings: str) -> Measured:
    """Measures training steps from uint8 images in the CPU's memory."""
    if arithmetic == "tf32" and bench.device.type == "cpu":
        raise LeftOut("a CPU has no TF32")
    settings = (*bench.scale.settings, *settings)
    execution = (f"train.compile={str(compiled).lower()}", *ARITHMETIC[arithmetic])
    config = configured(name, *settings, *execution)
    torch.compiler.reset()
    start = time.perf_counter()
    work, _ = training(config, shape)
    work()
    first = time.perf_counter() - start
    seconds, batch = bench.seconds(work), config.train.global_batch
    said = f"{seconds * 1e3:.2f} ms a step" + (f"; compiled in {first:.0f} s" if compiled else "")
    return Measured(f"{batch / seconds:,.0f} images/s", said, operations_of_step(name, shape, *settings) / seconds, arithmetic)


def networks(bench: Bench) -> Iterator[Task]:
    """Yields a row for every data set's network and arithmetic."""
    for data, (name, shape) in DATA.items():
        batch = configured(name, *bench.scale.settings).train.global_batch
        for arithmetic in ARITHMETIC:
            yield f"training, {data}, batch {batch}, {arithmetic}", 0, partial(network, bench, name, shape, arithmetic, False)
        if large := bench.scale.large_batch:
            what = f"training, {data}, batch {large:,}, bf16"
            yield what, 0, partial(network, bench, name, shape, "bf16", False, f"train.global_batch={large}")


def compiled_networks(bench: Bench) -> Iterator[Task]:
    """Yields the same rows with compiled networks."""
    for arithmetic in reversed(ARITHMETIC):  # from the one that gains most, since time may be over
        for data, (name, shape) in DATA.items():
            batch = configured(name, *bench.scale.settings).train.global_batch
            yield (
                f"training, {data}, batch {batch}, {arithmetic}, compiled",
                COMPILING,
                partial(compiled_network, bench, name, shape, arithmetic),
            )


def compiled_network(bench: Bench, name: str, shape: tuple[int, int, int], arithmetic: str) -> Measured:
    """Measures training steps of compiled networks. On a CPU all is compiled but the kernels, which would take minutes."""
    with ExitStack() as stack:
        if bench.device.type == "cpu":
            without_kernels = partial(compilation.compile_networks, backend="aot_eager")
            stack.enter_context(mock.patch.object(compilation, "compile_networks", without_kernels))
            stack.enter_context(mock.patch.object(compilation, "check_compiler", lambda device: None))
        try:
            return network(bench, name, shape, arithmetic, True)
        except ValueError as error:  # there is no compiler
            raise LeftOut(str(error)) from error


# Ranks.


def ranks(bench: Bench) -> Iterator[Task]:
    """Yields rows on DDP and ZeRO over all GPUs, or two CPU ranks, and on one process for comparison."""
    count = torch.cuda.device_count() if bench.device.type == "cuda" else 2
    each = EACH_RANK if bench.scale is FULL else 8
    one: dict[str, float] = {}
    what = f"training, cifar10, {each} images a rank, bf16"
    yield f"{what}, one process", LAUNCHING, partial(on_ranks, bench, 1, each, None, None, one)
    for engine, settings in ENGINES.items():
        yield f"{what}, {engine}, {count} rank(s)", LAUNCHING, partial(on_ranks, bench, count, each, engine, settings, one)


def on_ranks(bench: Bench, count: int, each: int, engine: str | None, zero: str | None, one: dict[str, float]) -> Measured:
    """Measures training steps in processes of their own. one: takes and gives the images a second of one process."""
    if zero and (missing := [name for name in ("deepspeed", "transformers") if find_spec(name) is None]):
        raise LeftOut(f"not installed: {', '.join(missing)}")
    settings = (*bench.scale.settings, "train.precision=bf16", f"train.global_batch={count * each}")
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    if zero:
        environment |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(ROOT / "launch" / zero)}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if engine else []
    command = [sys.executable, *launcher, "-m", "benchmarks.gpu", "--step", str(bench.scale.seconds), *settings]
    try:
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=2 * LAUNCHING)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"the ranks took more than {2 * LAUNCHING} s") from error
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"seconds"')]
    if done.returncode or not lines:
        raise RuntimeError(f"the ranks ended with {done.returncode}: {done.stderr[-3000:]}")
    speed = count * each / json.loads(lines[-1])["seconds"]
    own = operations_of_step(*DATA["cifar10"], *settings[:-1], f"train.global_batch={each}") * speed / (count * each)
    one.setdefault("images", speed)
    beside = f"{speed / count / one['images']:.0%} of one process for each rank" if engine else ""
    return Measured(f"{speed:,.0f} images/s", beside, own, "bf16")


def step_on_this_rank(seconds: float, settings: Sequence[str]) -> None:
    """Measures training steps on the ranks of a launcher; rank 0 prints the median seconds as JSON."""
    with ending_ranks():
        name, shape = DATA["cifar10"]
        work, device = training(configured(name, *settings), shape)
        for _ in range(3):
            work()
        # The same number of steps on every rank.
        taken = [_seconds_of_one(work, device) for _ in range(max(5, int(20 * seconds)))]
        if rank() == 0:
            print(json.dumps({"seconds": statistics.median(taken)}), flush=True)


# Entropy.


def entropies(bench: Bench) -> Iterator[Task]:
    """Yields rows on the entropy with its gradient."""
    for d in bench.scale.dimensions:
        for n in bench.scale.latents:
            yield f"entropy and gradient, n = {n:,}, d = {d}", 0, partial(entropy, bench, n, d)


@torch.no_grad()
def product(latents: torch.Tensor, tile: torch.Tensor) -> None:
    """Computes all products of two latents, block by block."""
    for queries in latents.split(len(tile)):
        for keys in latents.split(len(tile)):
            torch.mm(queries, keys.T, out=tile[: len(queries), : len(keys)])


def entropy(bench: Bench, n: int, d: int) -> Measured:
    """Measures the entropy beside cdist + topk and the bare product."""
    allow_tf32(False)
    latents = torch.randn(n, d, generator=torch.Generator().manual_seed(0)).to(bench.device).requires_grad_()
    ours = bench.seconds(partial(step, knn_entropy, latents))
    side = min(n, 8_192 if bench.device.type == "cuda" else 512)
    bare = bench.seconds(partial(product, latents, torch.empty(side, side, device=bench.device)))
    try:
        theirs = bench.seconds(partial(step, cdist_entropy, latents))
        plain = f"cdist + topk {theirs * 1e3:,.2f} ms, {theirs / ours:.1f}x"
    except torch.OutOfMemoryError:
        plain = "cdist + topk does not fit into the card's memory"
    except RuntimeError as error:  # torch indexes some kernels with 32 bits
        plain = f"cdist + topk fails: {str(error).splitlines()[0]}"
    beside = f"{plain}; bare product {bare * 1e3:,.2f} ms, {ours / bare:.2f}x"
    return Measured(f"{ours * 1e3:,.2f} ms", beside, 2 * n * n * d / ours)


# Search.


def searches(bench: Bench) -> Iterator[Task]:
    """Yields rows on FAISS on the GPU and on the CPU; graphs, which FAISS has for CPUs alone, are not among them."""
    n, queries, d = bench.scale.search
    latents = None

    def searched(kind: str) -> Measured:
        nonlocal latents
        latents = clustered(n + queries, d) if latents is None else latents
        return search(bench, kind, latents[:n], latents[n:])

    for kind in KINDS:
        yield f"search of {queries:,} queries in {n:,} x {d}, {kind}", 30, partial(searched, kind)


def clustered(count: int, d: int) -> np.ndarray:
    """Returns float32 [count, d] around 200 centers, of about unit variance."""
    generator = np.random.default_rng(0)
    centers = generator.standard_normal((200, d), dtype=np.float32)
    return 0.9 * centers[generator.integers(200, size=count)] + 0.4 * generator.standard_normal((count, d), dtype=np.float32)


def search(bench: Bench, kind: str, latents: np.ndarray, queries: np.ndarray) -> Measured:
    """Measures a search on the GPU, where there is one, and by what the CPU has of the kind."""

    def speed() -> tuple[float, str]:
        index = LatentIndex.build(latents, kind)
        if gpu_search.gpu() is not None and index._parts[0].on_gpu is None:
            raise RuntimeError("the latents are not on the GPU; the log says why")
        recall = index.tune(queries[:500], RECALL, K)
        seconds = median_seconds(lambda: index.search(queries, K), torch.device("cpu"), bench.scale.seconds)
        return len(queries) / seconds, "" if kind == "flat" else f", recall {recall:.3f}"

    with mock.patch.object(gpu_search, "gpu", lambda: None):
        on_cpu, recall = speed()
    said = f"{on_cpu:,.0f} queries/s{recall}"
    if gpu_search.gpu() is None:
        reason = "FAISS sees no GPU" if bench.device.type == "cuda" else "there is no GPU"
        return Measured("", f"on the CPU {said}; left out on a GPU: {reason}")
    on_gpu, recall = speed()
    operations = on_gpu * 2 * latents.size if kind == "flat" else None
    beside = f"on the CPU, {os.cpu_count()} processors, {said}: {on_gpu / on_cpu:.1f}x{recall}"
    return Measured(f"{on_gpu:,.0f} queries/s", beside, operations)


# Features.


def features(bench: Bench) -> Iterator[Task]:
    """Yields rows on the features of images of 32 x 32."""
    yield f"features of FID (Inception), {bench.scale.images} images at once", 0, partial(inception_features, bench)
    yield f"features efflite0_64px, {bench.scale.images} images at once", 0, partial(lite0_features, bench)


def inception_features(bench: Bench) -> Measured:
    """Measures Inception with random weights, on which the speed does not depend."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(inception_layout().state_dict(), weights := Path(folder) / "weights.pth")
        return extracted(bench, inception(weights))


def lite0_features(bench: Bench) -> Measured:
    """Measures the package's default features."""
    try:
        return extracted(bench, build_features("efflite0_64px"))
    except ValueError as error:
        raise LeftOut(str(error)) from error


def extracted(bench: Bench, extractor: Extractor) -> Measured:
    """Measures an extractor."""
    extractor.to(bench.device)
    images = torch.randint(256, (bench.scale.images, 3, 32, 32), dtype=torch.uint8).to(bench.device)
    seconds = bench.seconds(lambda: extractor(images))
    return Measured(f"{len(images) / seconds:,.0f} images/s", "", counted(lambda: extractor(images)) / seconds)


SECTIONS = (networks, entropies, searches, features, ranks, compiled_networks)


class Table:
    """Rows as they come, on the screen, and the whole page."""

    def __init__(self, device: torch.device):
        self.card = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
        self.peaks, self.failed = peaks(self.card), 0
        share = ["of the card's peak"] if self.peaks else []
        self.lines = [
            f"| {' | '.join(['what', 'measured', *share, 'beside'])} |",
            f"| --- | ---: |{' ---: |' * len(share)} --- |",
        ]

    def about(self) -> str:
        """Returns where the table was measured, as text."""
        count = torch.cuda.device_count()
        said = f"Measured on {self.card}" + (f", one of {count}," if count > 1 else "")
        said += f" with torch {torch.__version__}, {os.cpu_count()} processors."
        if not self.peaks:
            said += f" There is no column with shares of a peak: `PEAKS` in benchmarks/gpu.py has no figures for {self.card}."
        return said

    def add(self, what: str, measured: Measured) -> None:
        """Adds a row and prints it."""
        share = ""
        if self.peaks and measured.operations and measured.arithmetic in self.peaks:
            share = f"{measured.operations / self.peaks[measured.arithmetic]:.1%}"
        columns = [what, measured.text, *([share] if self.peaks else []), measured.beside]
        self.lines.append(f"| {' | '.join(columns)} |")
        print(self.lines[-1], flush=True)

    def page(self) -> str:
        """Returns the page."""
        return "\n".join(["# On a GPU", "", "    make bench-gpu", "", self.about(), "", EXPLANATION, "", *self.lines, ""])


EXPLANATION = """\
Medians by CUDA events after calls that warm up. A training step starts from uint8 images in the CPU's memory; operations are
those of convolutions and matrix products, and the peak is the data sheet's for the arithmetic of the row, without sparsity; for
entropy, search and features it is float32's."""


def row(bench: Bench, table: Table, what: str, needs: float, work: Callable[[], Measured]) -> Measured:
    """Returns the columns of a row: those of `work`, or why there are none."""
    if bench.left < needs:
        return Measured("", f"left out: the {LIMIT // 60} minutes for all rows are over")
    try:
        return work()
    except LeftOut as reason:
        return Measured("", f"left out: {reason}")
    except torch.OutOfMemoryError:
        return Measured("", "left out: it does not fit into the card's memory")
    except Exception as error:  # the other rows are still worth having; the command fails in the end
        table.failed += 1
        print(f"failed: {what}\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        return Measured("", f"failed: {type(error).__name__}; the traceback is in the command's output")
    finally:
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where to write the page; default: docs/results/gpu.md on a GPU, else nowhere")
    parser.add_argument("--step", type=float, help=argparse.SUPPRESS)  # of a rank that this command starts
    parser.add_argument("settings", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args(argv)
    if arguments.step is not None:
        return step_on_this_rank(arguments.step, arguments.settings)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    bench = Bench(device, FULL if on_gpu else REDUCED, time.monotonic() + LIMIT)
    if not on_gpu:
        torch.set_num_threads(1)
        faiss.omp_set_num_threads(1)
    table, out = Table(device), arguments.out or (PAGE if on_gpu else None)
    print(f"{table.about()}\n\n" + "\n".join(table.lines), flush=True)
    try:
        for section in SECTIONS:
            for what, needs, work in section(bench):
                table.add(what, row(bench, table, what, needs, work))
    finally:
        if out is not None:
            out.write_text(table.page())
            print(f"\nwritten: {out}")
    if not on_gpu:
        print("\nThere is no GPU: these are small cases on the CPU, which show that the command works and nothing more.")
    if table.failed:
        sys.exit(f"error: {table.failed} row(s) failed")


if __name__ == "__main__":
    main()
