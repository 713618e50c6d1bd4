"""Messages of a run to the user: lines from rank 0, and a progress bar."""

import logging
import sys

import torch
from tqdm import tqdm

from eae_dist.config import Config
from eae_dist.data.stream import ShardStream
from eae_dist.distributed import rank, ranks_of_group, world_size
from eae_dist.objectives import Objective

log = logging.getLogger("eae_dist")


def say(text: str) -> None:
    """Logs one line on rank 0."""
    if rank() == 0:
        log.info(text)


def describe(config: Config, objective: Objective, stream: ShardStream, step: int, end: int) -> None:
    """Logs what will run and what the settings mean."""
    batch, parameters = config.train.global_batch, sum(p.numel() for p in objective.parameters())
    shape = "x".join(map(str, stream.index.image_shape))
    say(
        f"{config.objective.name} on {stream.index.name}: {stream.samples:,} images {shape}, {parameters:,} parameters, "
        f"latent {config.model.latent_dim}, batch {batch} over {world_size()} rank(s), steps {step} to {end}, "
        f"run folder {config.train.output}"
    )
    say(f"loss = {objective.formula()}")
    if (ranks := ranks_of_group(config.objective.group)) < world_size():
        groups = world_size() // ranks
        say(f"objective.group={config.objective.group}: the entropy is the mean over {groups} groups of {ranks} ranks")
    if (parts := config.train.accumulate) > 1:
        say(
            f"train.accumulate={parts}: latent norm, entropy and MMD are those of all {batch} images; batch norms inside "
            f"the networks see {batch // parts} to {-(-batch // parts)} at a time"
        )
    if config.train.ema is not None:
        say(f"train.ema={config.train.ema:g}: validation, samples and evaluation use moving averages of the weights")
    if world_size() == 1 and not torch.cuda.is_available():
        say("this run uses one CPU rank; for two ranks: torchrun --nproc-per-node 2 -m eae_dist.train")


def progress_bar(images: int, total: int) -> tqdm:
    """Returns a progress bar on rank 0 over `total` images, of which `images` are done."""
    return tqdm(
        total=total,
        initial=images,
        unit=" images",
        unit_scale=True,
        disable=rank() != 0,
        mininterval=0.5 if sys.stderr.isatty() else 30,
    )


def progress_terms(record: dict[str, float]) -> dict[str, str]:
    """Returns the terms of a record that the progress bar shows."""
    shown = ("loss", "reconstruction", "entropy", "validation_loss")
    return {name: f"{record[name]:.4g}" for name in shown if name in record}
