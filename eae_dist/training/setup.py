"""Setup of a run: accelerate, the data, and early checks for errors that would end the run later."""

import logging
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from eae_dist.config import Config, TrainConfig
from eae_dist.data.remote import Cache
from eae_dist.data.shard_index import ShardIndex
from eae_dist.data.stream import ShardStream
from eae_dist.distributed import ranks_of_group, row_counts, world_size
from eae_dist.distributed.launch import keep_freed_memory
from eae_dist.losses.entropy import gaussian_reference
from eae_dist.numerics.precision import allow_tf32
from eae_dist.objectives import objective_class
from eae_dist.training.engines import accelerator_options

log = logging.getLogger("eae_dist")


def start_accelerator(config: TrainConfig) -> Accelerator:
    """Starts accelerate on this rank: device, precision, trackers. Raises ValueError if it does not see all launched ranks."""
    cpu = config.device == "cpu" or not torch.cuda.is_available()
    if cpu and config.precision == "fp16":
        raise ValueError("train.precision=fp16 needs a GPU; take train.precision=bf16 or fp32")
    check_restarts(os.environ)
    allow_tf32(config.tf32)
    if cpu:
        keep_freed_memory()
    available = {str(tracker) for tracker in get_available_trackers()}
    if missing := sorted(set(config.trackers) - available):
        raise ValueError(
            f"train.trackers={missing} are unknown to accelerate or not installed; available: {', '.join(sorted(available))}"
        )
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs it for deterministic results
        torch.use_deterministic_algorithms(True)
    # torch 2.14 renames DDP's broadcast_buffers; accelerate still passes the old name.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    accelerator = Accelerator(
        log_with=config.trackers or None,
        project_dir=Path(config.output) / "trackers",
        **accelerator_options(config, cpu),
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if not accelerator.num_processes == world_size() == launched:
        raise ValueError(
            f"the launcher started {launched} ranks, accelerate sees {accelerator.num_processes}; "
            f"launch with --config_file launch/cpu.yaml on CPUs, or without --cpu"
        )
    if accelerator.is_main_process:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        log.setLevel(logging.INFO)
    return accelerator


def check_restarts(env: Mapping[str, str]) -> None:
    """Raises ValueError if torchrun would restart ranks with a store that still has the addresses of the previous ranks.

    A rank that reads an old address before its peer has written the new one would wait for a process that has ended.
    """
    if int(env.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0 and env.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ValueError(
            "torchrun --max-restarts keeps its store after a restart, so ranks can find old addresses of each other "
            "there; set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun, or leave --max-restarts out"
        )


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
            raise ValueError(
                f"data.validation={config.data.validation}: its {images} images (at most train.validation_images) are fewer than "
                f"the {wanted} that the loss needs; set data.validation=null, or pack more"
            )
    return stream


def check_micro_batches(stream: ShardStream, accumulate: int, device: torch.device) -> None:
    """Raises ValueError if a rank has fewer rows than micro-batches."""
    if (fewest := min(row_counts(stream.rows, device))) < accumulate:
        raise ValueError(
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
        raise ValueError(
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
    )
