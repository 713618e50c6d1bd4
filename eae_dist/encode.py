"""Writes the latents of a whole data set, every split, sample by sample in the order of its shards:

    python -m eae_dist.encode --ckpt DIR [--data SHARDS] --out DIR [--nproc N] [key=value ...]

The output is float32 parts for memory mapping, with keys and labels (see `eae_dist/latent/store.py`). All local GPUs, or N CPU
ranks, share the parts; under accelerate, torchrun or srun their ranks do. An encode that was killed continues with the missing
parts. The bits do not depend on the number of ranks.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from tqdm import tqdm

from eae_dist.data.order import blocks_of
from eae_dist.data.remote import Cache
from eae_dist.data.stream import walk
from eae_dist.distributed import gather_objects, on_every_rank, on_rank_zero, rank, world_size
from eae_dist.distributed.launch import run_on_ranks
from eae_dist.errors import UserError
from eae_dist.inference.judged_checkpoint import evaluation_config, load_objective, named_networks, open_data
from eae_dist.latent.store import PART, PART_ROWS, VERSION, LatentFolder, description, finished_part, write_part
from eae_dist.model.autoencoder import encoded
from eae_dist.numerics.atomic_files import replace_file
from eae_dist.numerics.json_files import read_json, sealed
from eae_dist.training.checkpoint import open_on_rank_zero
from eae_dist.training.setup import how_to_judge

IDENTITY = ("model_sha256", "index_sha256", "batch")  # what the bits of a latent depend on, on one kind of processor


def encode(directory: Path, out: Path, assignments: Sequence[str]) -> LatentFolder:
    """Returns the latents of every split of data.root, and writes them to `out`. Call it on every rank.

    Raises ValueError or OSError for a damaged checkpoint, data of another shape than the model's, a folder that holds something
    else, and latents that are not finite.
    """
    # The description of the latents, and their parts.
    checkpoint = open_on_rank_zero(directory)
    config = evaluation_config(checkpoint, assignments)
    index = open_data(checkpoint, config)
    device = PartialState().device
    autoencoder = load_objective(checkpoint, named_networks(assignments)).autoencoder.to(device)
    block = config.evaluate.batch
    about = {
        "checkpoint": str(checkpoint.path.resolve()),
        "model_sha256": checkpoint.model_sha256,
        "step": checkpoint.state["step"],
        "data": index.name,
        "data_root": str(config.data.root),
        "index_sha256": index.sha256,
        "image_shape": list(index.image_shape),
        "d": autoencoder.latent_dim,
        "batch": block,
    }
    samples = {split: index.split(split).samples for split in sorted(index.info["splits"])}
    numbers = {split: min(-(-count // PART_ROWS), -(-count // block)) for split, count in samples.items()}
    parts = [(split, part, of) for split, of in numbers.items() for part in range(of)]
    start_folder(out, about)
    if (out / "manifest.json").is_file():
        return LatentFolder.open(out)

    # The missing parts, each rank one at a time, so that none waits for another longer than a part takes. A batch always has the
    # same rows, and the last batch is filled up.
    mine = parts[rank() :: world_size()]
    absent = gather_objects([(split, part) for split, part, _ in mine if finished_part(out, name_of(split, part)) is None])
    absent_anywhere = {found for of_rank in absent for found in of_rank}
    missing = [one for one in parts if one[:2] in absent_anywhere]
    mine = missing[rank() :: world_size()]
    blocks = sum(stop - start for split, part, of in mine for start, stop in [blocks_of(samples[split], block, part, of)])
    with tqdm(desc="encoding", total=blocks, unit=" blocks", disable=rank() != 0, leave=False) as progress:

        def encode_part(split: str, part: int, of: int) -> None:
            latents, labels, keys = [], [], []
            for batch in walk(config.data.root, split, block, rank=part, world=of, cache=Cache.of(config.data)):
                latents.append(encoded(autoencoder, batch["image"], block, device))
                labels.append(batch["label"].numpy())
                keys += batch["key"]
                progress.update()
            rows, name = torch.cat(latents).cpu().numpy(), name_of(split, part)
            if broken := int((~np.isfinite(rows)).any(1).sum()):
                raise UserError(
                    f"{broken} of {len(rows):,} latents of {name} are not finite; was the encoder trained to the end?"
                )
            write_part(out, name, rows, np.concatenate(labels), keys)

        def encode_parts(some: list[tuple[str, int, int]]) -> None:
            for split, part, of in some:
                encode_part(split, part, of)

        for number in range(-(-len(missing) // world_size())):
            on_every_rank(partial(encode_parts, mine[number : number + 1]))

    # All parts are there.
    with on_rank_zero() as is_rank_zero:
        if is_rank_zero:
            splits: dict[str, list] = {split: [] for split in samples}
            for split, part, _ in parts:
                splits[split].append(read_json(description(out, name_of(split, part)), PART, "run the same command again"))
            if (found := {split: sum(part["rows"] for part in splits[split]) for split in splits}) != samples:
                raise UserError(f"{out} holds {found} latents, the data set has {samples}; encode into an empty folder")
            replace_file(out / "manifest.json", sealed({"version": VERSION, "about": about, "splits": splits}))
            for split, part, _ in parts:
                description(out, name_of(split, part)).unlink()
            (out / ".encoding.json").unlink()
    return LatentFolder.open(out)


def name_of(split: str, part: int) -> str:
    """Returns the name of a part of a split."""
    return f"{split}-{part:06d}"


def start_folder(out: Path, about: dict) -> None:
    """Makes the folder, or continues one with the same latents. Call it on every rank. Raises ValueError or OSError."""
    with on_rank_zero() as is_rank_zero:
        if is_rank_zero:
            out.mkdir(parents=True, exist_ok=True)
            begun = out / ".encoding.json"
            if (out / "manifest.json").is_file():
                begun, found = out / "manifest.json", LatentFolder.open(out).about
            elif begun.is_file():
                found = read_json(begun, dict.fromkeys(IDENTITY, object), "take another folder for the latents")
            elif any(out.iterdir()):
                raise UserError(f"--out={out} is not empty and holds no latents; take another folder")
            else:
                found = about
            if changed := [f"{key}: {found.get(key)} -> {about[key]}" for key in IDENTITY if found.get(key) != about[key]]:
                what = "; take another folder, or the inputs of these latents:\n  "
                raise UserError(f"{begun} describes other latents{what}" + "\n  ".join(changed))
            if begun.name == ".encoding.json":
                replace_file(begun, sealed(about))


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m eae_dist.encode", description=__doc__.split(":\n")[0])
    parser.add_argument("--ckpt", type=Path, required=True, help="a checkpoint folder, or a run folder (its latest checkpoint)")
    parser.add_argument("--data", help="folder or address of shards; default: what the checkpoint was trained on")
    parser.add_argument("--out", type=Path, required=True, help="folder for the latents")
    parser.add_argument("--nproc", type=int, help="local ranks; default: one per GPU, or one on a CPU")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="evaluate.batch, and how remote data is read (data.*)")
    arguments = parser.parse_intermixed_args(argv)
    settings = [*([f"data.root={arguments.data}"] if arguments.data else []), *arguments.settings]

    def work() -> str:
        folder = encode(arguments.ckpt, arguments.out, settings)
        counts = ", ".join(f"{folder.rows(split):,} {split}" for split in folder.parts)
        return f"latents of {folder.d} dimensions in {arguments.out}: {counts}"

    data = ["--data", arguments.data] if arguments.data else []
    command = ["--ckpt", str(arguments.ckpt), *data, "--out", str(arguments.out), *arguments.settings]
    said = run_on_ranks("eae_dist.encode", arguments.nproc, command, partial(how_to_judge, arguments.settings), work)
    if said is not None:
        print(said)


if __name__ == "__main__":
    main()
