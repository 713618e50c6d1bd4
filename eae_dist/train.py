"""Trains one objective on one data set, on any number of ranks:

    accelerate launch -m eae_dist.train [--config FILE.yaml ...] [key=value ...]

The same command on the same run folder continues where its last checkpoint stands. B: images a step, over all ranks.
"""

import logging
import math
import os
import resource
import sys
import time
import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from torch.optim.lr_scheduler import ReduceLROnPlateau
from tqdm import tqdm

from eae_dist import checkpoint as checkpoints
from eae_dist.accumulation import accumulate
from eae_dist.background import BackgroundSaves
from eae_dist.config import Config, TrainConfig, flatten, load_config, save_config
from eae_dist.data.remote import Cache
from eae_dist.data.shards import ShardIndex
from eae_dist.data.stream import ShardStream, walk
from eae_dist.distributed import (
    FirstRankFailed,
    StopRequest,
    barrier,
    ending_ranks,
    first_rank_first,
    gather_rows,
    measured_waits,
    rank,
    ranks_of_group,
    require_equal,
    row_counts,
    subgroup,
    sum_over_ranks,
    world_size,
)
from eae_dist.draws import derive_key
from eae_dist.engines import accelerator_options, engine_of
from eae_dist.execution import set_execution
from eae_dist.local_ranks import keep_freed_memory, srun_ranks
from eae_dist.losses.entropy import gaussian_reference
from eae_dist.model.autoencoder import to_unit
from eae_dist.model.norm import finite_norms
from eae_dist.objectives import Objective, build_objective, objective_class, resolve
from eae_dist.precision import allow_tf32
from eae_dist.report import metrics_log
from eae_dist.report.crash import reported_crashes
from eae_dist.report.grids import draw_grids, grid_inputs, save_grids
from eae_dist.report.metrics_log import FINITE_NORMS
from eae_dist.report.step_times import StepTimes, traced

log = logging.getLogger("eae_dist")

SAID = (metrics_log.TrainingDiverged, FirstRankFailed, ValueError, OSError)  # errors whose own words are enough


def train(config: Config) -> None:
    """Trains to config.train.epochs, continuing the run folder's latest checkpoint if there is one. Call on every rank.

    Raises ValueError or OSError for what a user can set right, metrics_log.TrainingDiverged for a loss that is not finite.
    """
    # The ranks, the data, the run folder.
    accelerator = start_accelerator(config.train)
    require_equal(flatten(config), "settings")
    stream = open_stream(config)
    config = resolve(config, stream.index.image_shape, stream.lanes)
    run = Path(config.train.output)
    _lock = checkpoints.lock(run)  # held until this function returns
    resumed = checkpoints.open_run_folder(run, config, stream.identity())

    # The model with its loss, the optimizer, the schedule; a step of no consequence first (see rehearse).
    objective = build_objective(config.model, config.objective, stream.index.image_shape, config.train.seed)
    objective.group = subgroup(ranks_of_group(config.objective.group))
    set_execution(objective, config.train, accelerator.device)
    optimizer = torch.optim.Adam(objective.parameters(), lr=config.train.learning_rate)
    engine = engine_of(accelerator)
    ran_on = {"engine": engine.name, "ranks": world_size(), "device": accelerator.device.type}
    model, stepper = engine.prepare(objective, optimizer, config, stream.lanes)
    plateau = ReduceLROnPlateau(
        optimizer,
        factor=config.train.plateau_factor,
        patience=config.train.plateau_patience - 1,  # of PyTorch: how many it lets pass before the one at which it acts
        threshold_mode="abs",  # relative to a negative loss, standing still would count as better
    )
    check_micro_batches(stream, config.train.accumulate, accelerator.device)
    if "entropy" in objective.penalties:
        check_neighbors(stream, config)
    if config.train.accumulate == 1 and engine.rehearsed:
        rehearse(accelerator, model, stream)

    # The clock, where the last checkpoint left it.
    step, best, best_step = 0, math.inf, 0
    if resumed is not None:
        step, best, best_step = (resumed.state[name] for name in ("step", "best_validation_loss", "best_step"))
        engine.load(objective, optimizer, resumed.model_state(), resumed.optimizer_state())
        plateau.load_state_dict(resumed.state["plateau"])
        if accelerator.scaler is not None and resumed.state["grad_scaler"]:
            accelerator.scaler.load_state_dict(resumed.state["grad_scaler"])
        for what, before in resumed.state.get("ran_on", {}).items():
            if before != ran_on[what]:
                say(f"changed since the last checkpoint: {what}: {before} -> {ran_on[what]}")
    stream.start_step = step
    batch_images = config.train.global_batch
    epoch_images = stream.samples
    end = last_step(config, stream.index)
    unfinished = resumed.state.get("unfinished") if resumed is not None else None
    if step >= end and not unfinished:
        trained = step * batch_images / epoch_images
        return say(
            f"{run} is finished: {step * batch_images:,} images; "
            f"raise train.epochs={config.train.epochs:g} above {trained:.2f} to go on"
        )
    with first_rank_first() as mine:
        if mine:
            save_config(config, run / "config.yaml")
    every = {
        "log": config.train.log_every or 10 * batch_images,
        "validate": config.train.validate_every or epoch_images,
        "sample": config.train.sample_every or epoch_images,
        "save": config.train.save_every or epoch_images,
    }
    metrics = metrics_log.MetricsLog(run, accelerator, step, flatten(config))
    reference = None
    if "entropy" in objective.penalties:
        reference = entropy_reference(config, accelerator.device)
    inputs = None
    with first_rank_first() as mine:
        if mine:
            data, cache = config.data, Cache.of(config.data)
            images = next(walk(data.root, data.validation or data.split, 64, rank=0, world=1, cache=cache))["image"]
            inputs = grid_inputs(to_unit(images, accelerator.device), config.model.latent_dim, config.train.seed)
    describe(config, objective, stream, step, end)

    progress = tqdm(
        total=end * batch_images,
        initial=step * batch_images,
        unit=" images",
        unit_scale=True,
        disable=not accelerator.is_main_process,
        mininterval=0.5 if sys.stderr.isatty() else 30,
    )

    saves = BackgroundSaves(run, config)

    def save(unfinished: dict | None = None) -> None:
        state = {
            "step": step,
            "images": step * batch_images,
            "image_shape": list(stream.index.image_shape),
            "stream": stream.identity(),
            "best_validation_loss": best,
            "best_step": best_step,
            "plateau": plateau.state_dict(),
            "grad_scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
            "unfinished": unfinished,
            "ran_on": ran_on,
        }
        with first_rank_first():  # before an engine gathers a second copy
            saves.wait()
        optimizer_state = engine.optimizer_state(objective, optimizer)
        if rank() == 0:
            saves.start(objective.state_dict(), optimizer_state, state, copied=engine.gathered)

    def finish(record: dict[str, float], due: Collection[str]) -> bool:
        """What is due after a step: validation, pictures, the line of the log, a checkpoint. False if a stop breaks it off."""
        nonlocal best, best_step
        improved = False
        if "validate" in due and config.data.validation:
            if (terms := validate(accelerator, objective, config, stop)) is None:
                return False
            validation = {f"validation_{name}": value for name, value in terms.items()}
            metrics_log.require_finite(validation, step, saves.last)
            record = record | validation
            improved = record["validation_loss"] < best
            if improved:
                best, best_step = record["validation_loss"], step
            if config.train.schedule == "plateau":
                plateau.step(record["validation_loss"])
        with first_rank_first() as mine:  # a disk may be full, also because a checkpoint is being written
            saves.raise_failure()
            if mine and "sample" in due:
                save_grids(draw_grids(objective.autoencoder.eval(), inputs), run / "samples", f"step-{step:08d}-")
                objective.train()
            metrics.write(record)
        progress.set_postfix(progress_terms(record), refresh=False)
        if improved or "save" in due:
            save()
        return True

    window: list[torch.Tensor] = []  # the terms of every step since the last line of the log
    with (
        saves,
        reported_crashes(run, lambda: step, saves.last, config.train.timeout, *SAID),
        progress,
        StopRequest(config.train.timeout) as stop,
        closing(iter(stream)) as batches,
        measured_waits() as waits,
        traced(config.train.profile, run / "profile") as profiler,
    ):
        stopping = unfinished is not None and not finish(**unfinished)
        if stopping:
            save(unfinished)
        times = StepTimes(stream.rows, waits, model)
        started = time.perf_counter()
        while step < end and not stopping:
            # One step on B images.
            stop.start_asking()
            if config.train.schedule == "exponential":
                epochs_done = step * batch_images // epoch_images
                set_learning_rate(optimizer, config.train.learning_rate * config.train.decay**epochs_done)
            torch.manual_seed(derive_key(config.train.seed, step, rank()))  # of random layers in a network of the user's own
            key = derive_key(config.train.seed, step)
            with times.step():
                with times.reading():
                    batch = next(batches)
                names, terms = training_step(accelerator, model, stepper, batch, stream.numbers, key, config.train)
                stopping = stop.asked()
            window.append(terms)
            step += 1
            progress.update(batch_images)
            if profiler is not None:
                profiler.step()
            due = {what for what, images in every.items() if step == end or crossed(step, batch_images, images)}
            if stopping:
                due.add("save")
            if not due:
                continue

            # The log: means over the steps and ranks since the last line. A loss that is not finite stops here.
            record = {"step": step, "images": step * batch_images, "epoch": step * batch_images / epoch_images}
            record |= metrics_log.averaged(window, names, step, saves.last, ignore_gradient=accelerator.scaler is not None)
            record["learning_rate"] = optimizer.param_groups[0]["lr"]
            record["images_per_second"] = len(window) * batch_images / (time.perf_counter() - started)
            record["peak_memory_mib"] = peak_memory_mib(accelerator.device)
            record |= times.record()
            if reference is not None:
                record["entropy_gaussian_reference"] = reference
            window.clear()
            # Whoever stops this may not wait for a validation or pictures: the next start does what is left.
            if (stopping and due & {"validate", "sample"}) or not finish(record, due):
                save({"record": record, "due": sorted(due | {"save"})})  # or a later start would do it again
                stopping = True
            started = time.perf_counter()
        with first_rank_first():  # here a second signal does not end the process yet
            saves.wait()

    # The end, or a stop that was asked for.
    for tracker in accelerator.trackers:
        tracker.finish()
    if stopping:
        say(
            f"stopped by a signal, or with its launcher, at step {step} of {end}; "
            f"saved in {run}/checkpoints/latest, the same command goes on"
        )
    else:
        say(f"finished {run}: samples in {run}/samples, numbers in {run}/metrics.jsonl, weights in {run}/checkpoints/latest")


def last_step(config: Config, index: ShardIndex) -> int:
    """The step with which a run ends."""
    return math.ceil(config.train.epochs * index.split(config.data.split).samples / config.train.global_batch)


def start_accelerator(config: TrainConfig) -> Accelerator:
    """accelerate's view of this rank: device, precision, trackers. Raises ValueError where it misses the launcher's ranks."""
    cpu = config.device == "cpu" or not torch.cuda.is_available()
    if cpu and config.precision == "fp16":
        raise ValueError("train.precision=fp16 needs a GPU; take train.precision=bf16 or no")
    check_restarts(os.environ)
    allow_tf32(config.tf32)
    if cpu:
        keep_freed_memory()
    available = {str(tracker) for tracker in get_available_trackers()}
    if missing := sorted(set(config.trackers) - available):
        raise ValueError(
            f"train.trackers={missing} are unknown to accelerate or not installed; here are: {', '.join(sorted(available))}"
        )
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS refuses
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
    """Raises ValueError where torchrun would start ranks again in a store that still has the addresses of those before.

    A rank that reads one of these before its peer has written the new one waits for a process that is gone.
    """
    if int(env.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0 and env.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ValueError(
            "torchrun --max-restarts keeps its store from one start to the next, in which ranks can find each other's old "
            "addresses; set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun, or leave --max-restarts out"
        )


def open_stream(config: Config) -> ShardStream:
    """The training data; raises ValueError or FileNotFoundError, also for a validation split that is not there or too small."""
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
        smallest = {"entropy": config.objective.k + 1, "discrepancy": 2}
        wanted = max(smallest.get(name, 1) for name in ("", *objective_class(config.objective.name).penalties))
        if images < wanted:
            raise ValueError(
                f"data.validation={config.data.validation}: its {images} images (at most train.validation_images) are fewer than "
                f"the {wanted} that the loss needs; set data.validation=null, or pack more"
            )
    return stream


def check_micro_batches(stream: ShardStream, accumulate: int, device: torch.device) -> None:
    """Raises ValueError if a rank has too few rows to share out."""
    if (fewest := min(row_counts(stream.rows, device))) < accumulate:
        raise ValueError(
            f"train.accumulate={accumulate} needs as many images per rank, the smallest has {fewest}; "
            f"lower train.accumulate or raise train.global_batch"
        )


def check_neighbors(stream: ShardStream, config: Config) -> None:
    """Raises ValueError if a batch of the run, one in which two passes meet, has too few different images for the entropy's k."""
    k, batch, passes = config.objective.k, config.train.global_batch, math.ceil(config.train.epochs)
    if 2 * k < batch:  # at most half of a batch are in it twice
        return
    meeting = {number * stream.samples // batch for number in range(1, passes) if number * stream.samples % batch}
    fewest = min((int(stream.order.first(step).sum()) for step in meeting), default=batch)
    if k >= fewest:
        raise ValueError(
            f"objective.k={k} needs more than {k} different images in every batch; where two passes over "
            f"the {stream.samples:,} images meet, one has {fewest}; lower objective.k or train.global_batch"
        )


def training_step(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: dict,
    numbers: np.ndarray,
    key: int,
    config: TrainConfig,
) -> tuple[list[str], torch.Tensor]:
    """One optimizer step; the terms' names and this rank's shares of them, float64 [terms], gradient norm last.

    Before it stands what `finite_norms` says, from which `averaged` names the ranks where a loss that is not finite began.

    numbers: which rows of the global batch this rank holds, int64 [b]; key: of all draws of this step.
    """
    optimizer.zero_grad()
    rows, device = config.global_batch, accelerator.device
    if config.accumulate > 1:
        objective = accelerator.unwrap_model(model)
        terms = accumulate(accelerator, objective, batch, rows, numbers, key, config.accumulate)
    else:
        terms = model(to_unit(batch["image"], device), batch["first"].to(device), rows, numbers, key)
        accelerator.backward(terms["loss"])
    norm = engine_of(accelerator).step(model, optimizer, config.clip_norm)
    shares = [torch.as_tensor(term, device=device).double() for term in (*terms.values(), finite_norms(model), norm)]
    return [*terms, FINITE_NORMS, "gradient_norm"], torch.stack(shares).detach()


def rehearse(accelerator: Accelerator, model: torch.nn.Module, stream: ShardStream) -> None:
    """One backward pass that is thrown away, on a new and on a continued run alike.

    DDP rebuilds its buckets after its first backward pass, and sums of three ranks or more then round differently: without
    this, the first step after a resume would not have the bits of the same step in an uninterrupted run.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    images = torch.zeros(stream.rows, *stream.index.image_shape, device=accelerator.device)
    first = torch.ones(stream.rows, dtype=torch.bool, device=accelerator.device)
    for _ in range(2):  # the buckets are rebuilt at the start of the second
        accelerator.backward(model(images, first, stream.order.global_batch, stream.numbers, 0)["loss"])
    model.zero_grad()
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])


@torch.no_grad()
def validate(accelerator: Accelerator, objective: Objective, config: Config, stop: StopRequest) -> dict[str, float] | None:
    """The objective's terms over the validation split (at most train.validation_images), the same on any number of ranks.

    Noise is that of the images' numbers, the same each time, so that checkpoints compare. None where a stop was asked for.
    """
    objective.eval()
    key = derive_key(config.train.seed)
    numbers, blocks = [np.zeros(0, dtype=np.int64)], []
    data, count = config.data, config.train.validation_images
    for batch in walk(data.root, data.validation, config.evaluate.batch, count=count, cache=Cache.of(data)):
        with engine_of(accelerator).autocast():
            blocks.append(objective.per_row(to_unit(batch["image"], accelerator.device), batch["number"], key))
        numbers.append(batch["number"])
        if stop.signalled:
            break
    stop.start_asking()
    if stop.asked():
        objective.train()
        return None
    numbers = np.concatenate(numbers)
    if not blocks:  # more ranks than blocks: no rows, but the same terms
        image = torch.zeros(1, *objective.autoencoder.image_shape, device=accelerator.device)
        blocks.append({name: rows[:0] for name, rows in objective.per_row(image, np.zeros(1), key).items()})
    per_row = {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}
    rows = int(sum_over_ranks(torch.tensor(len(numbers), device=accelerator.device)))
    first = torch.ones(len(numbers), dtype=torch.bool, device=accelerator.device)
    terms = objective.terms(per_row, first, rows, numbers, key)
    objective.train()
    means = gather_rows(torch.stack([term.double() for term in terms.values()])[None]).mean(0)
    return dict(zip(terms, means.tolist(), strict=True))


def entropy_reference(config: Config, device: torch.device) -> float:
    objective, seed = config.objective, config.train.seed
    rows = config.train.global_batch * ranks_of_group(objective.group) // world_size()
    options = {"k": objective.k, "average_k": objective.average_k, "eps2": objective.eps2, "seed": seed, "device": device}
    return gaussian_reference(rows, objective.map_dim or config.model.latent_dim, **options)


def describe(config: Config, objective: Objective, stream: ShardStream, step: int, end: int) -> None:
    """Says what is about to run and what the settings mean."""
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
        say(f"objective.group={config.objective.group}: the entropy is the mean of those of {groups} groups of {ranks} ranks")
    if (parts := config.train.accumulate) > 1:
        say(
            f"train.accumulate={parts}: latent norm, entropy and discrepancy are those of all {batch} images; batch norms inside "
            f"the networks see {batch // parts} to {-(-batch // parts)} at a time"
        )
    if world_size() == 1 and not torch.cuda.is_available():
        say("one CPU rank; for two: accelerate launch --config_file launch/cpu.yaml -m eae_dist.train")


def progress_terms(record: dict[str, float]) -> dict[str, str]:
    shown = ("loss", "reconstruction", "entropy", "validation_loss")
    return {name: f"{record[name]:.4g}" for name in shown if name in record}


def crossed(step: int, batch_images: int, every: int) -> bool:
    """Whether the clock of images passed a multiple of `every` in this step."""
    return step * batch_images // every > (step - 1) * batch_images // every


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def peak_memory_mib(device: torch.device) -> float:
    """The most memory this rank has held: allocated on its GPU, or resident in the process, MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def say(text: str) -> None:
    """One line for the user, from rank 0."""
    if rank() == 0:
        log.info(text)


def main(argv: Sequence[str] | None = None) -> None:
    os.environ |= srun_ranks(os.environ)
    with ending_ranks(metrics_log.TrainingDiverged):
        train(load_config(sys.argv[1:] if argv is None else argv))
        barrier()


if __name__ == "__main__":
    main()
