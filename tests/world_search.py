"""The cases of tests/world.py about search among latents; every case is called on every rank."""

import sys
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from eae_dist.distributed import barrier, gather_objects, rank, world_size
from eae_dist.encode import encode
from eae_dist.inference.encoded_dataset import EncodedDataset
from eae_dist.latent.embeddings import Embeddings
from eae_dist.latent.index import METRICS, LatentIndex
from eae_dist.latent.merged_index import merge
from eae_dist.neighbors import neighbors

ROWS, QUERIES, D = 900, 50, 6
# Of 1,000 rows or queries, where each rank's begin: unequal runs, and a rank without any.
BOUNDS = {1: [0, 1000], 2: [0, 371, 1000], 3: [0, 400, 400, 1000], 4: [0, 0, 123, 700, 1000]}
FOLDER = Path(sys.argv[3]) if len(sys.argv) > 3 else None


def latents() -> np.ndarray:
    """float32 [900, 6] in clusters, with copies in several places: a row 20 times, and pairs that are nearly equal."""
    generator = np.random.default_rng(5)
    rows = 4 * generator.normal(size=(12, D))[generator.integers(12, size=ROWS)] + generator.normal(size=(ROWS, D))
    rows[[3, *range(100, 110), 370, 371, *range(500, 507)]] = rows[3] + 30
    rows[700:720] = rows[20:40] + 1e-4 * generator.normal(size=(20, D))
    return rows.astype(np.float32)


def queries() -> np.ndarray:
    """float32 [50, 6], some of them rows, of which one has 19 copies."""
    rows, generator = latents(), np.random.default_rng(6)
    return np.concatenate([rows[[3, 20, 700]], 4 * generator.normal(size=(QUERIES - 3, D))]).astype(np.float32)


def here(x: np.ndarray) -> np.ndarray:
    bounds = [bound * len(x) // 1000 for bound in BOUNDS[world_size()]]
    return x[bounds[rank()] : bounds[rank() + 1]]


def found(index: LatentIndex, k: int) -> list[torch.Tensor]:
    """Squared distances and ids of all ranks' queries."""
    every = gather_objects(index.search(here(queries()), k))
    return [torch.from_numpy(np.concatenate(parts)) for parts in zip(*every, strict=True)]


def exact_search() -> dict:
    """By an index of all ranks, and by the same that was saved and opened again."""
    index = LatentIndex.build(here(latents()), "flat")
    index.save(FOLDER / f"index-{world_size()}")
    saved_by_two = LatentIndex.load(FOLDER / "index-2") if world_size() != 1 else index
    return {
        "built": {k: found(index, k) for k in (1, 7, ROWS)},
        "saved": found(LatentIndex.load(FOLDER / f"index-{world_size()}"), 7),
        "saved by two": found(saved_by_two, 7),
    }


def approximate_search() -> dict:
    """What is asked of an index of cells, and what it finds."""
    index = LatentIndex.build(here(latents()), "ivf_flat")
    share = index.tune(here(queries()), recall=0.9, k=5)
    return {"share": share, "found": found(index, 5), "everything": found(index, ROWS)}


def search_by_metric() -> dict:
    """What indexes of the other metrics find: exact ones, one that was saved and opened again, and one of cells that sees all."""
    results = {}
    for metric in ("cosine", "inner_product"):
        index = LatentIndex.build(here(latents()), "flat", metric=metric)
        index.save(path := FOLDER / f"{metric}-{world_size()}")
        cells = LatentIndex.build(here(latents()), "ivf_flat", metric=metric)
        cells.tune(here(queries()), recall=1.0, k=5)
        built = {k: found(index, k) for k in (1, 7, ROWS)}
        results[metric] = {"built": built, "saved": found(LatentIndex.load(path), 7), "cells": found(cells, 5)}
    return results


def embeddings() -> dict:
    """What each rank reads from files of vectors, what a search finds, and what FAISS finds in one file of the index."""
    folder = FOLDER / f"embeddings-{world_size()}"
    if rank() == 0:
        write_embeddings(folder)
    barrier()
    read = {}
    for name in ("parts", "double.npy", "rows.parquet"):
        space = Embeddings(folder / name, folder / f"{name}-index", ["index.kind=flat"])
        first, rows = space.rows_of_this_rank()
        every = gather_objects((first, rows))
        joined = torch.from_numpy(np.concatenate([part for _, part in every]))
        read[name] = {"first": [start for start, _ in every], "rows": joined, "found": found(space.index(), 7)}
    merged = {}
    for metric in METRICS:
        for kind in ("flat", "ivf_flat"):
            space = Embeddings(folder / "parts", folder / f"{kind}-{metric}", [f"index.kind={kind}", f"index.metric={metric}"])
            ours = found(space.index(), 7)
            merge(space.index_path, file := folder / f"{kind}-{metric}.faiss")
            alone = faiss.read_index(str(file))
            if kind == "ivf_flat":  # so that it sees all
                faiss.ParameterSpace().set_index_parameter(alone, "nprobe", 10_000)
            merged[f"{kind} {metric}"] = {"ours": ours, "alone": [torch.from_numpy(x) for x in alone.search(queries(), 7)]}
    return {"read": read, "merged": merged}


def write_embeddings(folder: Path) -> None:
    """Writes the latents as a folder of three .npy files, as one of float64, and as parquet in groups of 128 rows."""
    (folder / "parts").mkdir(parents=True)
    for number, part in enumerate(np.split(latents(), [10, 555])):
        np.save(folder / "parts" / f"{number}.npy", part)
    np.save(folder / "double.npy", latents().astype(np.float64))
    table = pa.table({"name": [f"row {row}" for row in range(ROWS)], "vector": list(latents())})
    pq.write_table(table, folder / "rows.parquet", row_group_size=128)


def search_errors() -> dict[str, list[str]]:
    """What each rank raises where one of them alone is wrong."""
    index, messages = LatentIndex.build(here(latents()), "flat"), {}
    last = rank() == world_size() - 1
    wrong = {
        "queries": lambda: index.search(here(queries()) * (np.nan if last else 1), 3),
        "dimensions": lambda: index.search(queries()[:, : 4 if last else D], 3),
        "k": lambda: index.search(queries(), ROWS + 1 if last else 3),
        "rows": lambda: LatentIndex.build(latents() * (np.inf if last else 1), "flat"),
        "zero rows": lambda: LatentIndex.build(latents() * (0 if last else 1), "flat", metric="cosine"),
        "unwritable": lambda: index.save("/proc/nowhere/index"),
    }
    for name, work in wrong.items():
        try:
            work()
        except (ValueError, OSError, RuntimeError) as error:
            messages[name] = str(error)
    return {name: [of_rank.get(name, "") for of_rank in gather_objects(messages)] for name in wrong}


def encoded_latents() -> dict:
    """The checksums of a data set's latents, and what their neighborhoods say."""
    out = FOLDER / f"latents-{world_size()}"
    folder = encode(FOLDER / "continued-eae-2", out, ["evaluate.batch=8"])
    numbers = neighbors(EncodedDataset(out, None, ["index.k=3", "evaluate.batch=8"]), out / "neighbors")
    names = ("memorization", "duplicates", "label_accuracy", "entropy")
    return {"parts": folder.parts, "about": folder.about, "numbers": {name: numbers[name] for name in names}}


CASES = {
    case.__name__: case
    for case in (exact_search, approximate_search, search_by_metric, embeddings, search_errors, encoded_latents)
}
