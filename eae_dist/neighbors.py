"""Nearest neighbors in the latent space that `python -m eae_dist.encode` wrote:

    python -m eae_dist.neighbors --latents DIR [--ckpt DIR] [--out DIR] [--nproc N] [key=value ...]
    python -m eae_dist.neighbors --latents DIR --query FILE.png [--query ...] [--json] [key=value ...]

The first form analyzes all latents: whether generated images are nearer to training images than test images are (memorization),
which images have an exact or near duplicate, how well neighbors predict a label, and the entropy of the latents. It writes
neighbors.json, duplicates.csv and pictures into DIR/neighbors or --out. The second form finds the neighbors of some images. Both
keep the index that they make beside the latents. Without a launcher they use all local GPUs, or N CPU ranks; under a launcher
they use its ranks.
"""

import argparse
import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch

from eae_dist.data.image_files import read_image
from eae_dist.data.pixels import Rules
from eae_dist.distributed import gather_rows, message_device, on_rank_zero, rank, row_counts, sum_over_ranks
from eae_dist.distributed.launch import run_on_ranks
from eae_dist.errors import UserError
from eae_dist.inference.encoded_dataset import EncodedDataset
from eae_dist.inference.trained_model import decoded, sample_seeds
from eae_dist.latent.neighbor_statistics import compare_distances, entropy_of_distances, nearest_others, vote
from eae_dist.numerics.atomic_files import replace_file
from eae_dist.report.neighbor_page import distances_figure, neighbors_picture
from eae_dist.training.setup import how_to_judge

SHOWN = 10  # queries in a picture
LISTED = 1_000  # pairs in duplicates.csv


def neighbors(space: EncodedDataset, out: Path) -> dict:
    """Returns the numbers for all latents; rank 0 also writes them to `out` with pictures. Call it on every rank."""
    settings, folder = space.settings, space.folder
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

    squared, ids, squared_drawn, ids_drawn, nearest, twin = (
        gather_rows(torch.from_numpy(rows).to(message_device())).cpu().numpy()
        for rows in (squared, ids, squared_drawn, ids_drawn, nearest, twin)
    )
    distances, distances_drawn = np.sqrt(squared), np.sqrt(squared_drawn)
    apart = np.sqrt(nearest.astype(np.float64))
    threshold = settings.duplicate_ratio * float(np.median(apart))
    pairs_apart, pairs = near_pairs(apart, twin, threshold)
    shown, shown_drawn = closest(squared), closest(squared_drawn)
    images_drawn = from_their_ranks(drawn, shown_drawn)
    found = {
        "latents": str(folder.root),
        **{name: folder.about[name] for name in ("checkpoint", "model_sha256", "step", "data", "index_sha256")},
        "settings": asdict(settings),
        "index": {"kind": index.kind, "reason": index.reason, "effort": index.effort, "rows": index.n, "d": index.d},
        "memorization": compare_distances(distances_drawn[:, 0], distances[:, 0])
        | {"samples": len(ids_drawn), "queries": len(ids)},
        "duplicates": {
            "exact": int((apart == 0).sum()),
            "near": int(((apart < threshold) | (apart == 0)).sum()),
            "threshold": threshold,
            "pairs": len(pairs),
        },
        "label_accuracy": counted[0] / counted[1] if counted[1] else None,
        "entropy": entropy_of_distances(apart, index.d),
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


def pairs_table(space: EncodedDataset, apart: np.ndarray, pairs: np.ndarray) -> str:
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
    squared, ids = index.search(space.encode(images), min(space.settings.k, index.n))
    labels = space.folder.read(space.split, "labels")
    found = []
    for file, distances, near in zip(files, np.sqrt(squared), ids, strict=True):
        names = [space.class_of(label) for label in labels[near].tolist()]
        rows = zip(space.keys(near), near.tolist(), names, distances.tolist(), strict=True)
        found.append({"query": str(file), "neighbors": [{"key": k, "row": r, "class": c, "distance": d} for k, r, c, d in rows]})
    with on_rank_zero() as is_rank_zero:
        if is_rank_zero and out is not None:
            out.mkdir(parents=True, exist_ok=True)
            save_picture(space, out / "query.png", images.numpy(), ids, np.sqrt(squared))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m eae_dist.neighbors", description=__doc__.split(":\n")[0])
    parser.add_argument("--latents", type=Path, required=True, help="a folder that `python -m eae_dist.encode` wrote")
    parser.add_argument("--ckpt", type=Path, help="the model; default: the checkpoint that they were encoded from")
    parser.add_argument(
        "--query", type=Path, action="append", default=[], metavar="FILE", help="an image whose neighbors are looked for"
    )
    parser.add_argument("--out", type=Path, help="where to write; default: DIR/neighbors")
    parser.add_argument("--json", action="store_true", help="print numbers as JSON rather than as text")
    parser.add_argument("--nproc", type=int, help="local ranks; default: one per GPU, or one on a CPU")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="index.*, and how the data is read (data.*)")
    arguments = parser.parse_intermixed_args(argv)
    out = arguments.out or arguments.latents / "neighbors"

    def work() -> str:
        space = EncodedDataset(arguments.latents, arguments.ckpt, arguments.settings)
        if arguments.query:
            answers = query(space, arguments.query, out)
            return json.dumps(answers, indent=2) if arguments.json else summary_of_queries(answers, out)
        found = neighbors(space, out)
        return json.dumps(found, indent=2) if arguments.json else summary(found)

    command = ["--latents", str(arguments.latents), *(["--ckpt", str(arguments.ckpt)] if arguments.ckpt else [])]
    command += [*(["--out", str(arguments.out)] if arguments.out else []), *(["--json"] if arguments.json else [])]
    command += [*(word for file in arguments.query for word in ("--query", str(file))), *arguments.settings]
    said = run_on_ranks("eae_dist.neighbors", arguments.nproc, command, partial(how_to_judge, arguments.settings), work)
    if said is not None:
        print(said)


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
        f"entropy of the {split} latents: {found['entropy']['nats']:.3f} nats; N(0, I) has {found['entropy']['gaussian']:.3f}",
    ]
    return "\n".join([*lines, f"pictures, duplicates.csv and neighbors.json in {found['out']}"])


def summary_of_queries(found: list[dict], out: Path) -> str:
    """Returns the neighbors of each query as text for a person."""
    lines = []
    for one in found:
        lines.append(f"{one['query']}:")
        for near in one["neighbors"]:
            lines.append(
                f"  {near['distance']:8.4f}  {near['key']}" + (f"  {near['class']}" if near["class"] is not None else "")
            )
    return "\n".join([*lines, f"picture in {out}/query.png"])


if __name__ == "__main__":
    main()
