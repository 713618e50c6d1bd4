"""Search among latents: the cost of LatentIndex over FAISS, of two ranks, the gain from codes; and the encoding of a data set.

The latents are clustered, in 64 dimensions: 200 Gaussians whose centers are three standard deviations apart. Encoding is compared
with a loop over batches in memory, by wall time, because a thread reads beside the forward passes.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

# torch comes first: importing FAISS' wheel makes its own CUDA libraries visible to all that is loaded later.
import torch

# isort: split
import faiss
import numpy as np

from benchmarks.images import write_shards
from benchmarks.table import Row, Seconds, at_least, at_most, take_turns
from eae_dist.config import load_config
from eae_dist.distributed import barrier, rank
from eae_dist.encode import encode
from eae_dist.inference.trained_model import load
from eae_dist.latent.index import LatentIndex
from eae_dist.objectives import build_objective, resolve
from eae_dist.training import checkpoint as checkpoints

ROWS, QUERIES, D, K = 1_000_000, 10_000, 64, 10
SHARDED_ROWS, SHARDED_QUERIES = 200_000, 4_000
OVER_FAISS, OVER_ONE, FASTER, RECALL, OF_LOOP = 1.05, 1.1, 10, 0.95, 0.95
SHAPE, IMAGES, BLOCK = (3, 32, 32), 8_192, 256


def rows() -> Iterator[Row]:
    """Yields the rows of the table."""
    faiss.omp_set_num_threads(1)
    yield ranks_row()
    latents, queries = clustered(ROWS, 0), clustered(QUERIES, 1)
    ours, bare = LatentIndex.build(latents, "flat"), faiss.IndexFlatL2(D)
    bare.add(latents)
    turns = {"ours": lambda: ours.search(queries, K), "theirs": lambda: bare.search(queries, K)}
    flat = take_turns(turns, 3)
    what = f"of {QUERIES:,} queries in {ROWS:,} x {D}"
    ratio = flat["ours"].cpu / flat["theirs"].cpu
    yield Row(f"exact search {what}: bare FAISS", *seconds(flat), **at_most(OVER_FAISS, ratio))

    codes = LatentIndex.build(latents, "ivf_pq")
    codes.tune(clustered(1_000, 2), RECALL, K)
    found, exact = codes.search(queries, K)[0], ours.search(queries, K)[0]
    recall = float((found <= exact[:, -1:]).mean())
    fast = take_turns({"ours": lambda: codes.search(queries, K)}, 3)["ours"]
    yield Row(
        f"search by codes (ivf_pq) {what}: exact search",
        f"{fast.cpu:.2f} s",
        f"{flat['theirs'].cpu:.2f} s",
        **at_least(FASTER, flat["theirs"].cpu / fast.cpu),
        beside=f"recall@{K} {recall:.3f}, wanted {RECALL}; nprobe {codes.effort}",
    )
    yield encoding_row()


def clustered(count: int, seed: int) -> np.ndarray:
    """Returns latents, float32 [count, 64]; the centers are the same for all seeds."""
    centers = np.random.default_rng(99).normal(size=(200, D)).astype(np.float32) * 3 / 2**0.5
    generator = np.random.default_rng(seed)
    return centers[generator.integers(200, size=count)] + generator.standard_normal((count, D), dtype=np.float32)


def ranks_row() -> Row:
    """Returns the row on two ranks of one thread against one index with two threads; wall time, medians of five."""
    one, two = (searched_by(ranks) for ranks in (1, 2))
    return Row(
        f"exact search of {SHARDED_QUERIES:,} queries in {SHARDED_ROWS:,} x {D}: two ranks, one index of two threads",
        f"{two:.2f} s",
        f"{one:.2f} s",
        **at_most(OVER_ONE, two / one),
        beside="wall",
    )


def searched_by(ranks: int) -> float:
    """Returns the seconds of a search on this many ranks, which share two threads."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": str(2 // ranks), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    command = [sys.executable, *launcher, "-m", "benchmarks.search"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"benchmarks.search failed on {ranks} ranks: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def search_on_ranks() -> None:
    """Measures a search on the ranks of a launcher, and prints the seconds."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        torch.distributed.init_process_group("gloo")
    here = slice(rank() * SHARDED_ROWS // ranks, (rank() + 1) * SHARDED_ROWS // ranks)
    asked = slice(rank() * SHARDED_QUERIES // ranks, (rank() + 1) * SHARDED_QUERIES // ranks)
    index, queries = LatentIndex.build(clustered(SHARDED_ROWS, 0)[here], "flat"), clustered(SHARDED_QUERIES, 1)[asked]

    def search() -> None:
        barrier()
        index.search(queries, K)
        barrier()

    search()
    taken = take_turns({"search": search}, 5)["search"].wall
    if rank() == 0:
        print(json.dumps(taken))
    if ranks > 1:
        torch.distributed.destroy_process_group()


def encoding_row() -> Row:
    """Returns the row on encoding."""
    with tempfile.TemporaryDirectory() as folder:
        root = write_shards(Path(folder) / "shards", SHAPE, "png", shards=4, samples=IMAGES // 4)
        settings = ("model.network=rae32", f"data.root={root}", "train.device=cpu", f"evaluate.batch={BLOCK}")
        config = resolve(load_config(settings), SHAPE)
        objective = build_objective(config.model, config.objective, SHAPE, 0)
        run = Path(folder) / "run"
        checkpoints.save(run, config, objective.state_dict(), {}, {"step": 0, "images": 0, "image_shape": list(SHAPE)})
        model, images = load(run), torch.rand(BLOCK, *SHAPE)
        taken: dict[str, list[float]] = {"ours": [], "theirs": []}
        for number in range(3):
            start = time.perf_counter()
            encode(run, Path(folder) / f"latents-{number}", [])
            taken["ours"].append(time.perf_counter() - start)
            start = time.perf_counter()
            with torch.no_grad():
                for _ in range(IMAGES // BLOCK):
                    model.encode(images)
            taken["theirs"].append(time.perf_counter() - start)
    ours, theirs = (sorted(taken[name])[1] for name in ("ours", "theirs"))
    return Row(
        f"encoding {IMAGES:,} images, rae32: bare forward loop",
        f"{IMAGES / ours:,.0f} images/s",
        f"{IMAGES / theirs:,.0f} images/s",
        f"{theirs / ours:.2f}x",
        f"at least {OF_LOOP:g}x",
        theirs / ours >= OF_LOOP,
        "wall",
    )


def seconds(turns: dict[str, Seconds]) -> tuple[str, str]:
    """Returns the CPU times as text."""
    return f"{turns['ours'].cpu:.2f} s", f"{turns['theirs'].cpu:.2f} s"


if __name__ == "__main__":
    search_on_ranks()
