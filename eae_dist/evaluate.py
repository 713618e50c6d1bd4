"""Judges a checkpoint on a split it was not trained on:

    python -m eae_dist.evaluate --ckpt DIR [--nproc N] [--out DIR] [key=value ...]

Alone it uses all local GPUs, or N CPU ranks; under accelerate or torchrun it joins their ranks. The numbers do not
depend on how many ranks there are. Writes evaluation/metrics.json and PNG grids into the run folder, or into --out.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm import tqdm

from eae_dist.checkpoint import Checkpoint, load_objective, open_checkpoint, versions
from eae_dist.config import Config, changed_keys, override
from eae_dist.data.shards import ShardIndex
from eae_dist.data.stream import walk
from eae_dist.distributed import FirstRankFailed, first_rank_first, gather_rows, rank, world_size
from eae_dist.durable import replace_file
from eae_dist.losses.terms import squared_error
from eae_dist.model.autoencoder import Autoencoder, to_unit
from eae_dist.report.grids import draw_grids, grid_inputs, save_grids

log = logging.getLogger("eae_dist")


def evaluate(directory: Path, assignments: Sequence[str], out: Path | None = None) -> dict:
    """The metrics of a checkpoint, also written to disk by rank 0. Call on every rank.

    Raises ValueError or FileNotFoundError for a damaged or missing checkpoint, other settings than evaluate.* and data.root,
    and images of another shape than the model's.
    """
    checkpoint = open_checkpoint(directory)
    config = evaluation_config(checkpoint, assignments)
    index = ShardIndex.load(config.data.root)
    if index.image_shape != tuple(checkpoint.state["image_shape"]):
        raise ValueError(
            f"data.root={config.data.root} holds images of shape {index.image_shape} (c, h, w), the checkpoint was trained on "
            f"{tuple(checkpoint.state['image_shape'])}"
        )
    if index.split(config.evaluate.split).samples == 0:
        raise ValueError(f"evaluate.split={config.evaluate.split} of {config.data.root} holds no images")
    named = [text.split("=", 1)[1] for text in assignments if text.startswith(("model.encoder=", "model.decoder="))]
    device = PartialState().device
    autoencoder = load_objective(checkpoint, allow=named).autoencoder.to(device)

    errors = reconstruction_errors(autoencoder, config, device)
    channels, height, width = index.image_shape
    metrics = {
        "checkpoint": str(checkpoint.path),
        "step": checkpoint.state["step"],
        "objective": config.objective.name,
        "data": index.name,
        "index_sha256": index.sha256,
        "split": config.evaluate.split,
        "images": len(errors),
        "reconstruction": errors.mean().item(),
        "reconstruction_per_pixel": errors.mean().item() / (channels * height * width),
        "versions": versions(),
    }
    out = out or evaluation_folder(checkpoint)
    with first_rank_first() as mine:
        if mine:
            images = next(walk(config.data.root, config.evaluate.split, 64, rank=0, world=1))["image"]
            inputs = grid_inputs(to_unit(images, device), autoencoder.latent_dim, config.evaluate.seed)
            save_grids(draw_grids(autoencoder, inputs), out)
            replace_file(out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return metrics | {"out": str(out)}


@torch.no_grad()
def reconstruction_errors(autoencoder: Autoencoder, config: Config, device: torch.device) -> torch.Tensor:
    """Squared error of every image of the split in order, float64 [n] on every rank: the same bits on any number of ranks.

    A row's float32 result can depend on how many rows share its batch, so ranks take whole blocks of evaluate.batch and the
    last block is filled up; the filling is discarded.
    """
    split, block = config.evaluate.split, config.evaluate.batch
    errors = [torch.zeros(0, dtype=torch.float64, device=device)]
    batches = walk(config.data.root, split, block, count=config.evaluate.count)
    for batch in tqdm(batches, desc=f"reconstructing {split}", unit=" blocks", disable=rank() != 0):
        images = to_unit(batch["image"], device)
        filled = torch.cat([images, images[-1:].expand(block - len(images), -1, -1, -1)])
        error = squared_error(autoencoder.decode(autoencoder.encode(filled)), filled)
        errors.append(error[: len(images)].double())
    return gather_rows(torch.cat(errors)).cpu()


def evaluation_config(checkpoint: Checkpoint, assignments: Sequence[str]) -> Config:
    """The checkpoint's configuration with evaluate.* and data.root changed; anything else that would change is a ValueError."""
    config = override(checkpoint.config, assignments)
    judged = replace(checkpoint.config, evaluate=config.evaluate, data=replace(checkpoint.config.data, root=config.data.root))
    changed = changed_keys(judged, config, changeable=False) + changed_keys(judged, config, changeable=True)
    if changed:
        raise ValueError(
            f"evaluation changes only evaluate.* and data.root; the checkpoint {checkpoint.path} has:\n  " + "\n  ".join(changed)
        )
    return config


def evaluation_folder(checkpoint: Checkpoint) -> Path:
    """RUN/evaluation for a checkpoint in RUN/checkpoints, else a folder inside the checkpoint's parent."""
    folder = checkpoint.path.parent
    return (folder.parent if folder.name == "checkpoints" else folder) / "evaluation"


def start_ranks(arguments: argparse.Namespace) -> None:
    """Starts this command again on several local ranks, unless a launcher already made ranks or one is enough."""
    gpus = torch.cuda.device_count()
    count = arguments.nproc or gpus or 1
    if 0 < gpus < count:
        sys.exit(f"error: --nproc={count} wants a GPU each, there are {gpus}; lower --nproc")
    if "RANK" in os.environ or count == 1:
        return
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "-m", "eae_dist.evaluate"]
    command = ["--ckpt", str(arguments.ckpt), *(["--out", str(arguments.out)] if arguments.out else []), *arguments.settings]
    os.execv(sys.executable, [sys.executable, *launcher, *command])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m eae_dist.evaluate", description=__doc__.split("\n")[0])
    parser.add_argument("--ckpt", type=Path, required=True, help="a checkpoint folder, or a run folder (its latest checkpoint)")
    parser.add_argument("--nproc", type=int, help="local ranks; default: one per GPU, or one on a CPU")
    parser.add_argument("--out", type=Path, help="where to write; default: RUN/evaluation")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="evaluate.* and data.root")
    arguments = parser.parse_intermixed_args(argv)
    start_ranks(arguments)
    PartialState(cpu=not torch.cuda.is_available())
    if rank() == 0:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        metrics = evaluate(arguments.ckpt, arguments.settings, arguments.out)
    except FirstRankFailed:  # rank 0 says it
        sys.exit(1)
    except (ValueError, OSError) as error:
        where = f" [rank {rank()}]" if world_size() > 1 else ""
        sys.exit(f"error{where}: {error}")
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if int(os.environ.get("RANK", "0")) == 0:
        print(
            f"{metrics['checkpoint']} on {metrics['images']:,} {metrics['split']} images of {metrics['data']}: squared error "
            f"{metrics['reconstruction']:.3f} per image, {metrics['reconstruction_per_pixel']:.6f} per pixel and channel\n"
            f"pictures and metrics.json in {metrics['out']}"
        )


if __name__ == "__main__":
    main()
