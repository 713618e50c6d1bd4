"""Nearest neighbors in the latent space that `python -m eae_dist.encode` wrote:

    python -m eae_dist.neighbors --latents DIR [--ckpt DIR] [--out DIR] [--nproc N] [key=value ...]
    python -m eae_dist.neighbors --latents DIR --query FILE.png [--query ...] [--json] [key=value ...]
    python -m eae_dist.neighbors --latents EMBEDDINGS [--query FILE.npy] [--vector-column NAME] [--id-column NAME] [key=value ...]

The first form analyzes all latents: whether generated images are nearer to training images than test images are (memorization),
which images have an exact or near duplicate, how well neighbors predict a label, and the entropy of the latents. It writes
neighbors.json, duplicates.csv and pictures into DIR/neighbors or --out. The second form finds the neighbors of some images. The
third form searches embeddings of any model: a .npy file [rows, dimensions], parquet files with a column of vectors, or a folder
of such files. It lists near-duplicates, or writes the neighbors of other rows to query.csv; there is no model to sample from.
--merge FILE.faiss writes the index as one file that FAISS reads. All keep the index that they make beside the latents, or in
--out. Without a launcher they use all local GPUs, or N CPU ranks; under a launcher they use its ranks.
"""

import argparse
import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from eae_dist.config import IndexConfig
from eae_dist.data.image_files import read_image
from eae_dist.data.pixels import Rules
from eae_dist.distributed import from_rank_zero, gather_rows, message_device, on_rank_zero, rank, row_counts, sum_over_ranks
from eae_dist.distributed.launch import run_on_ranks
from eae_dist.errors import MissingFile, UserError
from eae_dist.inference.encoded_dataset import EncodedDataset
from eae_dist.inference.trained_model import decoded, sample_seeds
from eae_dist.latent.embeddings import NEED_A_MODEL, Embeddings
from eae_dist.latent.index import LatentIndex
from eae_dist.latent.merged_index import merge
from eae_dist.latent.neighbor_statistics import compare_distances, entropy_of_distances, nearest_others, scores, vote
from eae_dist.numerics.atomic_files import replace_file
from eae_dist.report.neighbor_page import distances_figure, neighbors_picture
from eae_dist.training.setup import how_to_judge

SHOWN = 10  # queries in a picture
LISTED = 1_000  # pairs in duplicates.csv


def neighbors(space: EncodedDataset, out: Path) -> dict:
    """Returns the numbers for all latents; rank 0 also writes them to `out` with pictures. Call it on every rank."""
    settings, folder = space.settings, space.folder
    if settings.metric == "inner_product":
        raise UserError("index.metric=inner_product has no distances to compare; take index.metric=l2 or cosine, or give --query")
    index = space.index()
    k = min(settings.k, index.n)
    if folder.rows(settings.query_split) == 0:
        raise UserError(f"index.query_split={settings.query_split} holds no images; take another split")

    # Test images: their neighbors, and the labels that these predict.
    start, queries = space.rows_of_this_rank(settings.query_split)
    squared, ids = index.search(queries, k)
    train_labels = np.asarray(folder.read(space.split, "labels"))
    labels = np.asarray(folder.read(settings.query_split, "labels"))[start : start + len(queries)]
    labeled = labels >= 0
    right = vote(train_labels[ids])[labeled] == labels[labeled]
    counted = sum_over_ranks(torch.tensor([int(right.sum()), int(labeled.sum())], device=space.device)).tolist()

    # Generated images: sampled, decoded and encoded again.
    density, count = space.model.density(settings.density), min(settings.samples, folder.rows(settings.query_split))
    like = next(space.model.autoencoder.decoder.parameters())

    def draw(numbers: np.ndarray) -> torch.Tensor:
        return density.sample(sample_seeds(settings.seed, numbers)).to(like)

    block = space.config.evaluate.batch
    blocks = [images.cpu() for _, images in decoded(space.model.autoencoder, draw, count, block, space.device, "samples")]
    drawn = torch.cat([torch.zeros(0, *space.model.image_shape, dtype=torch.uint8), *blocks])
    squared_drawn, ids_drawn = index.search(space.encode(drawn), k)

    # The nearest other row of every row of the split.
    first, rows = space.rows_of_this_rank(space.split)
    nearest, twin = nearest_others(index, rows, first)

    squared, ids, squared_drawn, ids_drawn, nearest, twin = of_all_ranks(squared, ids, squared_drawn, ids_drawn, nearest, twin)
    distances, distances_drawn = np.sqrt(squared), np.sqrt(squared_drawn)
    apart = np.sqrt(nearest.astype(np.float64))
    duplicates, pairs_apart, pairs = near_duplicates(apart, twin, settings)
    shown, shown_drawn = closest(squared), closest(squared_drawn)
    images_drawn = from_their_ranks(drawn, shown_drawn)
    found = {
        "latents": str(folder.root),
        **{name: folder.about[name] for name in ("checkpoint", "model_sha256", "step", "data", "index_sha256")},
        "settings": asdict(settings),
        "index": about(index),
        "memorization": compare_distances(distances_drawn[:, 0], distances[:, 0])
        | {"samples": len(ids_drawn), "queries": len(ids)},
        "duplicates": duplicates,
        "label_accuracy": counted[0] / counted[1] if counted[1] else None,
        "entropy": entropy_of_distances(apart, index.d) if index.metric == "l2" else None,
    }
    with on_rank_zero() as is_rank_zero:
        if is_rank_zero:
            out.mkdir(parents=True, exist_ok=True)
            images = space.images(settings.query_split, shown)
            save_picture(space, out / "queries.png", images, ids[shown], distances[shown])
            save_picture(space, out / "samples.png", images_drawn, ids_drawn[shown_drawn], distances_drawn[shown_drawn])
            if len(pairs):
                images = space.images(space.split, pairs[:SHOWN, 0])
                save_picture(space, out / "duplicates.png", images, pairs[:SHOWN, 1:], pairs_apart[:SHOWN, None])
            histograms = distances_figure(distances[:, 0], distances_drawn[:, 0], settings.query_split, settings.density)
            replace_file(out / "distances.png", histograms)
            replace_file(out / "duplicates.csv", pairs_table(space, pairs_apart, pairs))
            replace_file(out / "neighbors.json", json.dumps(found, indent=2) + "\n")
    return found | {"out": str(out)}


def neighbors_of_embeddings(space: Embeddings, out: Path) -> dict:
    """Returns the numbers for all embeddings; rank 0 also writes them to `out`. Call it on every rank.

    Inner products have no distances, so there are no duplicates by them.
    """
    if space.files.n < 2 and space.settings.metric != "inner_product":
        raise UserError(f"{space.source} holds 1 row; near-duplicates need 2 at least, so give --query")
    index, duplicates, table = space.index(), None, None
    if index.metric != "inner_product":
        first, rows = space.rows_of_this_rank()
        nearest, twin = of_all_ranks(*nearest_others(index, rows, first))
        duplicates, pairs_apart, pairs = near_duplicates(np.sqrt(nearest.astype(np.float64)), twin, space.settings)
        table = pairs_apart, pairs
    found = {
        "latents": str(space.source),
        "settings": {name: value for name, value in asdict(space.settings).items() if name not in NEED_A_MODEL},
        "index": about(index),
        "duplicates": duplicates,
    }
    with on_rank_zero() as is_rank_zero:
        if is_rank_zero:
            out.mkdir(parents=True, exist_ok=True)
            if table is not None:
                replace_file(out / "duplicates.csv", pairs_table(space, *table))
            replace_file(out / "neighbors.json", json.dumps(found, indent=2) + "\n")
    return found | {"out": str(out)}


def about(index: LatentIndex) -> dict:
    """Returns what there is to say of an index."""
    return {"kind": index.kind, "reason": index.reason, "effort": index.effort, "rows": index.n, "d": index.d}


def of_all_ranks(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    """Returns the rows of all ranks of each array. Call it on every rank."""
    return tuple(gather_rows(torch.from_numpy(rows).to(message_device())).cpu().numpy() for rows in arrays)


def near_duplicates(apart: np.ndarray, twin: np.ndarray, settings: IndexConfig) -> tuple[dict, np.ndarray, np.ndarray]:
    """Returns the numbers of rows with a twin, and the pairs of `near_pairs`.

    apart, twin: the distance and the number of the nearest other row of every row.
    """
    threshold = settings.duplicate_ratio * float(np.median(apart))
    pairs_apart, pairs = near_pairs(apart, twin, threshold)
    counts = {"exact": int((apart == 0).sum()), "near": int(((apart < threshold) | (apart == 0)).sum())}
    return counts | {"threshold": threshold, "pairs": len(pairs)}, pairs_apart, pairs


def closest(squared: np.ndarray) -> np.ndarray:
    """Returns the numbers of the images that are nearest to a row: squared distances [m, k] -> [up to SHOWN]."""
    return np.argsort(squared[:, 0], kind="stable")[:SHOWN]


def from_their_ranks(images: torch.Tensor, numbers: np.ndarray) -> np.ndarray:
    """Returns the images with these numbers from all ranks, numbered in rank order. Call it on every rank.

    images: the images of this rank.
    """
    start = sum(row_counts(len(images), message_device())[: rank()])
    found = images.new_zeros(len(numbers), *images.shape[1:])
    here = np.flatnonzero((start <= numbers) & (numbers < start + len(images)))
    found[here] = images[numbers[here] - start]  # every image is on one rank, and zero on the others
    return sum_over_ranks(found.to(message_device())).cpu().numpy()


def near_pairs(distance: np.ndarray, twin: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the pairs of rows that are equal or nearer than the threshold: distances [p] and rows [p, 2].

    One row of a pair is the nearest other row of the other.
    """
    near = np.flatnonzero((distance < threshold) | (distance == 0))
    pairs, at = np.unique(np.sort(np.stack([near, twin[near]], 1), axis=1), axis=0, return_index=True)
    order = np.argsort(distance[near[at]], kind="stable")
    return distance[near[at]][order], pairs[order]


def pairs_table(space: EncodedDataset | Embeddings, apart: np.ndarray, pairs: np.ndarray) -> str:
    """Returns the nearest pairs by their keys, as CSV."""
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(("distance", "key", "other key"))
    keys = space.keys(pairs[:LISTED].ravel())
    table.writerows(zip([f"{d:.6g}" for d in apart[:LISTED]], keys[::2], keys[1::2], strict=True))
    return text.getvalue()


def save_picture(space: EncodedDataset, path: Path, images: np.ndarray, ids: np.ndarray, distances: np.ndarray) -> None:
    """Draws images, uint8 [m, c, h, w], beside the rows of ids [m, k] at distances [m, k]."""
    near = space.images(space.split, ids.ravel()).reshape(*ids.shape, *images.shape[1:])
    replace_file(path, neighbors_picture(images, near, distances))


def query(space: EncodedDataset, files: Sequence[Path], out: Path | None) -> list[dict]:
    """Returns the neighbors of image files, and writes a picture of them to `out`. Call it on every rank."""
    channels, height, width = space.model.image_shape
    read = []
    for file in files:
        try:
            pixels = read_image(str(file), Rules(channels)).pixels
        except ValueError as error:
            raise UserError(f"{file} is not a usable image: {error}") from error
        if pixels.shape[:2] != (height, width):
            raise UserError(f"{file} is {pixels.shape[1]}x{pixels.shape[0]}, the model takes {width}x{height} (width x height)")
        read.append(pixels.reshape(height, width, channels).transpose(2, 0, 1))
    images = torch.from_numpy(np.stack(read))
    index = space.index()
    values, ids = index.search(space.encode(images), min(space.settings.k, index.n))
    score, values = scores(values, index.metric)
    labels = space.folder.read(space.split, "labels")
    found = []
    for file, of_file, near in zip(files, values, ids, strict=True):
        names = [space.class_of(label) for label in labels[near].tolist()]
        rows = zip(space.keys(near), near.tolist(), names, of_file.tolist(), strict=True)
        found.append({"query": str(file), "neighbors": [{"key": k, "row": r, "class": c, score: s} for k, r, c, s in rows]})
    with on_rank_zero() as is_rank_zero:
        if is_rank_zero and out is not None:
            out.mkdir(parents=True, exist_ok=True)
            save_picture(space, out / "query.png", images.numpy(), ids, values)
    return found


def query_embeddings(space: Embeddings, files: Sequence[Path], out: Path) -> Iterator[dict]:
    """Returns the neighbors of the rows of other files, and writes them to `out`/query.csv. Call it on every rank."""
    queries = space.queries(files)
    index = space.index()
    values, ids = of_all_ranks(*index.search(space.rows_of_this_rank(queries)[1], min(space.settings.k, index.n)))
    score, values = scores(values, index.metric)

    def answers() -> Iterator[dict]:
        for query, near, of_query in zip(queries.keys(np.arange(queries.n)), ids, values, strict=True):
            rows = zip(space.keys(near), near.tolist(), of_query.tolist(), strict=True)
            yield {"query": query, "neighbors": [{"key": key, "row": row, score: value} for key, row, value in rows]}

    with on_rank_zero() as is_rank_zero:
        if is_rank_zero:
            text = io.StringIO()
            table = csv.writer(text)
            table.writerow(("query", "key", "row", score))
            table.writerows((one["query"], *near.values()) for one in answers() for near in one["neighbors"])
            out.mkdir(parents=True, exist_ok=True)
            replace_file(out / "query.csv", text.getvalue())
    return answers()


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m eae_dist.neighbors", description=__doc__.split(":\n")[0])
    parser.add_argument(
        "--latents", type=Path, required=True, help="a folder that `python -m eae_dist.encode` wrote, or embeddings of any model"
    )
    parser.add_argument("--ckpt", type=Path, help="the model; default: the checkpoint that they were encoded from")
    parser.add_argument(
        "--query",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="an image whose neighbors are looked for, or a file of rows for embeddings",
    )
    parser.add_argument("--vector-column", metavar="NAME", help="the column of vectors in parquet files, if there are several")
    parser.add_argument("--id-column", metavar="NAME", help="the column of the rows' keys in parquet files; default: row numbers")
    parser.add_argument("--merge", type=Path, metavar="FILE.faiss", help="write the index as one file that FAISS reads")
    parser.add_argument("--out", type=Path, help="where to write; default: DIR/neighbors, or FILE-neighbors")
    parser.add_argument("--json", action="store_true", help="print numbers as JSON rather than as text")
    parser.add_argument("--nproc", type=int, help="local ranks; default: one per GPU, or one on a CPU")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="index.*, and how the data is read (data.*)")
    arguments = parser.parse_intermixed_args(argv)
    latents, files = arguments.latents, arguments.query
    out = arguments.out or (latents.with_name(f"{latents.stem}-neighbors") if latents.is_file() else latents / "neighbors")

    def work() -> str:
        if arguments.merge is not None and arguments.merge.suffix != ".faiss":  # it could replace the embeddings themselves
            raise UserError(f"--merge {arguments.merge} needs a name that ends with .faiss")
        space = opened(arguments, out)
        if arguments.merge is not None:
            space.index()  # makes it, if it is not kept
            merge(space.index_path, arguments.merge)
        merged = [f"the index as one FAISS file in {arguments.merge}"] if arguments.merge else []
        if isinstance(space, EncodedDataset):
            found = query(space, files, out) if files else neighbors(space, out)
            told = summary_of_queries(found, out / "query.png") if isinstance(found, list) else summary(found)
        elif files:
            answers = query_embeddings(space, files, out)
            found = list(answers if arguments.json else islice(answers, SHOWN))
            told = summary_of_queries(found, out / "query.csv")
        else:
            found = neighbors_of_embeddings(space, out)
            told = summary_of_embeddings(found)
        return json.dumps(found, indent=2) if arguments.json else "\n".join([told, *merged])

    command = ["--latents", str(latents), *(["--json"] if arguments.json else [])]
    for option in ("ckpt", "out", "vector-column", "id-column", "merge"):
        if (value := getattr(arguments, option.replace("-", "_"))) is not None:
            command += [f"--{option}", str(value)]
    command += [*(word for file in files for word in ("--query", str(file))), *arguments.settings]
    said = run_on_ranks("eae_dist.neighbors", arguments.nproc, command, partial(how_to_judge, arguments.settings), work)
    if said is not None:
        print(said)


def opened(arguments: argparse.Namespace, out: Path) -> EncodedDataset | Embeddings:
    """Opens what --latents names: what `encode` wrote if it has a manifest, otherwise embeddings. Call it on every rank."""
    latents, columns = arguments.latents, (arguments.vector_column, arguments.id_column)
    marks = (latents / name for name in ("manifest.json", ".encoding.json"))
    if from_rank_zero(not latents.exists()):
        raise MissingFile(
            f"--latents {latents} does not exist; give embeddings, or a folder that `python -m eae_dist.encode` wrote"
        )
    if from_rank_zero(any(mark.is_file() for mark in marks)):
        if any(columns):
            raise UserError("--vector-column and --id-column are for parquet files, which --latents does not name")
        return EncodedDataset(latents, arguments.ckpt, arguments.settings)
    if arguments.ckpt is not None:
        raise UserError(f"--ckpt is the model of latents that `encode` wrote, and {latents} are not such latents; leave it out")
    return Embeddings(latents, out / "index", arguments.settings, *columns)


def summary(found: dict) -> str:
    """Returns the numbers as text for a person."""
    settings, index, copies, twins = (found[name] for name in ("settings", "index", "memorization", "duplicates"))
    split, queries, accuracy = settings["split"], settings["query_split"], found["label_accuracy"]
    told = f"labels of {queries} images told by {settings['k']} neighbors"
    lines = [
        f"{index['rows']:,} {split} latents, index {index['kind']}: {index['reason']}",
        f"distance to the nearest {split} image, median: {copies['median_query']:.4g} of {queries} images, "
        f"{copies['median_sample']:.4g} of samples from {settings['density']}",
        f"a sample is nearer than a {queries} image in {copies['sample_nearer']:.1%} of pairs (one half: no copying), "
        f"z = {copies['z']:.1f}; Kolmogorov-Smirnov {copies['ks']:.3f}, p = {copies['ks_p']:.2g}",
        f"{told}: there are none" if accuracy is None else f"{told}: {accuracy:.2%} right",
        f"{split} images with a twin: {twins['exact']:,} exact, {twins['near']:,} nearer than {twins['threshold']:.3g}",
    ]
    if found["entropy"] is not None:
        entropy, gaussian = found["entropy"]["nats"], found["entropy"]["gaussian"]
        lines.append(f"entropy of the {split} latents: {entropy:.3f} nats; N(0, I) has {gaussian:.3f}")
    return "\n".join([*lines, f"pictures, duplicates.csv and neighbors.json in {found['out']}"])


def summary_of_embeddings(found: dict) -> str:
    """Returns the numbers as text for a person."""
    index, twins = found["index"], found["duplicates"]
    lines = [f"{index['rows']:,} embeddings of {index['d']} dimensions, index {index['kind']}: {index['reason']}"]
    if twins is None:
        lines.append("inner products have no distances, so near-duplicates are left out; take index.metric=l2 or cosine")
    else:
        lines.append(f"rows with a twin: {twins['exact']:,} exact, {twins['near']:,} nearer than {twins['threshold']:.3g}")
    lines.append("samples, the check for memorization and pictures need a model and its images, and are left out")
    return "\n".join([*lines, f"{'neighbors.json' if twins is None else 'duplicates.csv and neighbors.json'} in {found['out']}"])


def summary_of_queries(found: list[dict], written: Path) -> str:
    """Returns the neighbors of each query as text for a person."""
    lines = []
    for one in found:
        lines.append(f"{one['query']}:")
        for near in one["neighbors"]:
            score = next(near[name] for name in ("distance", "cosine", "inner_product") if name in near)
            lines.append(f"  {score:8.4f}  {near['key']}" + (f"  {near['class']}" if near.get("class") is not None else ""))
    return "\n".join([*lines, f"{'picture' if written.suffix == '.png' else 'all'} in {written}"])


if __name__ == "__main__":
    main()
