"""Setup of a run: accelerate, the data, and early checks for errors that would end the run later."""

import logging
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from eae_dist.config import HOW_TO_START, Config, TrainConfig, load_config
from eae_dist.data.remote import Cache
from eae_dist.data.shard_index import ShardIndex
from eae_dist.data.stream import ShardStream
from eae_dist.distributed import ranks_of_group, row_counts, world_size
from eae_dist.distributed.start import Start, require_taken, start
from eae_dist.errors import UserError
from eae_dist.losses.entropy import gaussian_reference
from eae_dist.model.cut_networks import TRIED, run_by_block, try_by_block
from eae_dist.objectives import Objective, objective_class
from eae_dist.training.console import say
from eae_dist.training.engines import accelerator_options, engine_of, uses_deepspeed

log = logging.getLogger("eae_dist")

UNUSED_SETTINGS = {  # variables that accelerate's configuration sets, and what decides instead
    "ACCELERATE_MIXED_PRECISION": "train.precision",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "train.accumulate",
    "ACCELERATE_GRADIENT_CLIPPING": "train.clip_norm",
    "ACCELERATE_DYNAMO_BACKEND": "train.compile",
}


def how_to_start(config: TrainConfig, *, judging: bool = False) -> Start:
    """Returns how a process starts; what judges a model never rounds to TF32."""
    # Blocks need deterministic kernels. Those of CPUs always are, and torch's switch would cost time there.
    deterministic = config.deterministic or (config.blocks > 0 and config.device != "cpu" and torch.cuda.is_available())
    return Start(config.device, config.timeout, tf32=config.tf32 and not judging, deterministic=deterministic)


def how_to_judge(assignments: Sequence[str]) -> Start:
    """Returns how a command starts that opens a checkpoint afterwards: by train.device and the like among its `key=value`.

    What a checkpoint says of these is how it was trained, on other machines perhaps. Raises UserError for a wrong value.
    """
    keys = {f"train.{name}" for name in HOW_TO_START}
    return how_to_start(load_config([text for text in assignments if text.partition("=")[0] in keys]).train, judging=True)


def start_accelerator(config: TrainConfig) -> Accelerator:
    """Starts this rank with accelerate: device, precision, trackers.

    Raises UserError for settings that cannot work here, and if accelerate took others than the run's configuration.
    """
    device = start(how_to_start(config))
    cpu = device.type == "cpu"
    if cpu and config.precision == "fp16":
        raise UserError("train.precision=fp16 needs a GPU; take train.precision=bf16 or fp32")
    available = {str(tracker) for tracker in get_available_trackers()}
    if missing := sorted(set(config.trackers) - available):
        raise UserError(
            f"train.trackers={missing} are unknown to accelerate or not installed; available: {', '.join(sorted(available))}"
        )
    if cpu and config.blocks:
        torch.set_num_threads(1)  # kernels share work between threads, and so the order of their sums depends on the number
    # torch 2.14 renames DDP's broadcast_buffers; accelerate still passes the old name.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    options = accelerator_options(config, cpu)
    accelerator = Accelerator(log_with=config.trackers or None, project_dir=Path(config.output) / "trackers", **options)
    asked = {
        "device": device.type,
        "ranks": int(os.environ.get("WORLD_SIZE", "1")),
        "mixed_precision": options["mixed_precision"],
        "gradient_accumulation_steps": 1,
        "dynamo_backend": "NO",
        "engine": "DeepSpeed" if uses_deepspeed(os.environ) else "PyTorch",
    }
    taken = {
        "device": accelerator.device.type,
        "ranks": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "gradient_accumulation_steps": accelerator.gradient_accumulation_steps,
        "dynamo_backend": accelerator.state.dynamo_plugin.backend.value,
        "engine": engine_of(accelerator).name.partition(" ")[0],
    }
    require_taken(asked, taken)
    if accelerator.is_main_process:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        log.setLevel(logging.INFO)
    for name, setting in UNUSED_SETTINGS.items():
        if (value := os.environ.get(name, "")).lower() not in ("", "no", "1"):
            say(f"{name}={value} of accelerate's settings is not used: {setting} decides")
    return accelerator


def open_stream(config: Config) -> ShardStream:
    """Opens the training data. Raises ValueError or FileNotFoundError, also for a missing or too small validation split."""
    stream = ShardStream(
        config.data.root,
        config.data.split,
        config.train.global_batch,
        lanes=config.data.lanes,
        seed=config.train.seed,
        workers=config.data.workers,
        prefetch=config.data.prefetch,
        cache=Cache.of(config.data),
    )
    if config.data.validation is not None:
        validation = stream.index.split(config.data.validation, "data.validation (null: none)")
        images = min(validation.samples, config.train.validation_images)
        smallest = {"entropy": config.objective.k + 1, "mmd": 2}
        wanted = max(smallest.get(name, 1) for name in ("", *objective_class(config.objective.name).penalties))
        if images < wanted:
            raise UserError(
                f"data.validation={config.data.validation}: its {images} images (at most train.validation_images) are fewer than "
                f"the {wanted} that the loss needs; set data.validation=null, or pack more"
            )
    return stream


def set_blocks(objective: Objective, config: Config, stream: ShardStream) -> None:
    """Makes training work on the blocks of train.blocks: block i has the lanes [i L/V, (i + 1) L/V). 0: does nothing.

    Raises UserError if the blocks cannot be shared out, or if a network cannot run block by block.
    """
    blocks, order, world = config.train.blocks, stream.order, world_size()
    if not blocks:
        return
    if blocks % world:
        raise UserError(
            f"train.blocks={blocks} cannot be shared by {world} ranks: the number of ranks must divide it; change the ranks or "
            f"set train.blocks=0"
        )
    if blocks > order.lanes:
        raise UserError(
            f"train.blocks={blocks} must be at most {order.lanes}, the number of lanes (data.lanes, by default "
            f"train.global_batch={order.global_batch}); lower train.blocks"
        )
    objective.block_edges = np.arange(blocks + 1) * order.lanes // blocks * (order.global_batch // order.lanes)
    if (fewest := int(np.diff(objective.block_edges).min())) < config.train.accumulate:
        raise UserError(
            f"train.accumulate={config.train.accumulate} needs as many images in every block, but one of train.blocks={blocks} "
            f"has {fewest}; lower train.accumulate or train.blocks"
        )
    for key, network in (("model.encoder", objective.autoencoder.encoder), ("model.decoder", objective.autoencoder.decoder)):
        run_by_block(network, key)
    autoencoder, draws = objective.autoencoder, torch.Generator().manual_seed(0)
    device = next(objective.parameters()).device
    if config.model.encoder is not None:
        images = torch.rand(TRIED, *autoencoder.image_shape, generator=draws)
        try_by_block(autoencoder.encoder, "model.encoder", images.to(device))
    if config.model.decoder is not None:
        latents = torch.randn(TRIED, autoencoder.latent_dim, generator=draws)
        try_by_block(autoencoder.decoder, "model.decoder", latents.to(device))


def check_micro_batches(stream: ShardStream, accumulate: int, device: torch.device) -> None:
    """Raises ValueError if a rank has fewer rows than micro-batches."""
    if (fewest := min(row_counts(stream.rows, device))) < accumulate:
        raise UserError(
            f"train.accumulate={accumulate} needs as many images on every rank, but one rank has {fewest}; "
            f"lower train.accumulate or raise train.global_batch"
        )


def check_neighbors(stream: ShardStream, config: Config) -> None:
    """Raises ValueError if a batch in which two passes meet has too few different images for objective.k."""
    k, batch, passes = config.objective.k, config.train.global_batch, math.ceil(config.train.epochs)
    if 2 * k < batch:  # at most half of the images of a batch occur twice
        return
    meeting = {number * stream.samples // batch for number in range(1, passes) if number * stream.samples % batch}
    fewest = min((int(stream.order.first(step).sum()) for step in meeting), default=batch)
    if k >= fewest:
        raise UserError(
            f"objective.k={k} needs more than {k} different images in every batch; where two passes over "
            f"the {stream.samples:,} images meet, one has {fewest}; lower objective.k or train.global_batch"
        )


def last_step(config: Config, index: ShardIndex) -> int:
    """Returns the last step of a run."""
    return math.ceil(config.train.epochs * index.split(config.data.split).samples / config.train.global_batch)


def entropy_reference(config: Config, device: torch.device) -> float:
    """Returns the entropy of a Gaussian batch in nats, for comparison with the entropy of a training batch."""
    objective = config.objective
    rows = config.train.global_batch * ranks_of_group(objective.group) // world_size()
    dimensions = objective.map_dim or config.model.latent_dim
    assert dimensions is not None  # objectives.resolve has filled it in
    return gaussian_reference(
        rows,
        dimensions,
        k=objective.k,
        average_k=objective.average_k,
        eps2=objective.eps2,
        seed=config.train.seed,
        device=device,
        blocks=config.train.blocks,
    )
