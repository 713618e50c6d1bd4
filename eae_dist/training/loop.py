"""The training loop: it creates or continues a run, takes steps, and does validation, logging and saving when they are due.

B: images per step, over all ranks.
"""

import time
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from eae_dist.config import Config, TrainConfig, flatten, save_config
from eae_dist.data.stream import ShardStream
from eae_dist.distributed import OtherRankFailed, StopRequest, measured_waits, on_rank_zero, rank, require_equal
from eae_dist.errors import USER_ERRORS, UserError
from eae_dist.model.autoencoder import to_unit
from eae_dist.model.norm import finite_norms
from eae_dist.numerics.keyed_random import derive_key
from eae_dist.objectives import resolve
from eae_dist.training.accumulation import accumulate
from eae_dist.training.console import describe, progress_bar, progress_terms, say
from eae_dist.training.crash_report import reported_crashes
from eae_dist.training.engines import engine_of
from eae_dist.training.metrics_log import FINITE_NORMS, TrainingDiverged
from eae_dist.training.run import Run
from eae_dist.training.run_folder import lock, open_run_folder
from eae_dist.training.setup import check_micro_batches, check_neighbors, last_step, open_stream, start_accelerator
from eae_dist.training.step_times import StepTimes, traced

EXPECTED_ERRORS = (TrainingDiverged, OtherRankFailed, *USER_ERRORS)  # errors whose message is enough, without a report


def train(config: Config) -> None:
    """Trains to config.train.epochs, from the latest checkpoint of the run folder if there is one. Call on every rank.

    Raises UserError or UserFileError for what the user can correct, and TrainingDiverged for a loss that is not finite.
    """
    # The ranks, the data, the run folder.
    accelerator = start_accelerator(config.train)
    require_equal(flatten(config), "settings")
    stream = open_stream(config)
    config = resolve(config, stream.index.image_shape, stream.lanes)
    folder = Path(config.train.output)
    _lock = lock(folder)  # held until this function returns
    checkpoint = open_run_folder(folder, config, stream.identity())

    # The model with its loss, the optimizer, the buckets of DDP, and the state of the last checkpoint.
    run = Run(config, accelerator, stream)
    check_micro_batches(stream, config.train.accumulate, accelerator.device)
    if "entropy" in run.objective.penalties:
        check_neighbors(stream, config)
    if config.train.accumulate == 1 and run.engine.needs_ddp_warmup and not config.train.blocks:
        warm_up_ddp_buckets(accelerator, run.model, stream)
    if checkpoint is not None:
        run.resume(checkpoint)
    state, end = run.state, last_step(config, stream.index)
    if state.step >= end and not state.unfinished:
        return say(
            f"{folder} is finished: {run.images:,} images; raise train.epochs={config.train.epochs:g} above "
            f"{run.images / stream.samples:.2f} to go on"
        )
    with on_rank_zero() as is_rank_zero:
        if is_rank_zero:
            save_config(config, folder / "config.yaml")
    run.open_log()
    describe(config, run.objective, stream, state.step, end)

    with (
        run.saves,
        reported_crashes(folder, lambda: state.step, run.saves.last, config.train.timeout, *EXPECTED_ERRORS),
        progress_bar(run.images, end * config.train.global_batch) as progress,
        StopRequest(config.train.timeout) as stop,
        closing(iter(stream)) as batches,
        measured_waits() as waits,
        traced(config.train.profile, folder / "profile") as profiler,
    ):
        # Work that the last start left unfinished.
        unfinished, state.unfinished = state.unfinished, None
        stopping = unfinished is not None and not run.after_step(**unfinished, stop=stop)
        if stopping:
            run.save(unfinished)

        window: list[torch.Tensor] = []  # terms of every step since the last line of the log
        times, started = StepTimes(stream.rows, waits, None if config.train.blocks else run.model), time.perf_counter()
        while state.step < end and not stopping:
            # One step on B images.
            stop.start_asking()
            run.schedule_learning_rate(end)
            torch.manual_seed(derive_key(config.train.seed, state.step, rank()))  # for random layers in a network of the user
            key = derive_key(config.train.seed, state.step)
            with times.step():
                with times.reading():
                    batch = next(batches)
                names, terms = training_step(
                    accelerator, run.model, run.prepared_optimizer, batch, stream.row_ids, key, config.train
                )
                if run.average is not None:
                    run.average.update(state.step + 1)
                stopping = stop.asked()
            window.append(terms)
            state.step += 1
            progress.update(config.train.global_batch)
            if profiler is not None:
                profiler.step()
            due = run.due(end) | ({"save"} if stopping else set())
            if not due:
                continue

            # The log: means over the steps and ranks since the last line. A loss that is not finite stops here.
            record = run.record(names, window, time.perf_counter() - started) | times.record() | run.reference
            window.clear()
            # A preempted job has little time: leave validation and samples to the next start.
            if (stopping and due & {"validate", "sample"}) or not run.after_step(record, due, stop):
                run.save(unfinished={"record": record, "due": sorted(due | {"save"})})
                stopping = True
            progress.set_postfix(progress_terms(run.last_record), refresh=False)
            started = time.perf_counter()
        with on_rank_zero():  # StopRequest is still active, so a second signal does not end the process
            run.saves.wait()

    # The run has ended or was stopped.
    with on_rank_zero():
        run.metrics.finish()
    if stopping:
        say(
            f"stopped by a signal, or with its launcher, at step {state.step} of {end}; "
            f"saved in {folder}/checkpoints/latest; run the same command to continue"
        )
    else:
        say(
            f"finished {folder}: samples in {folder}/samples, numbers in {folder}/metrics.jsonl, "
            f"weights in {folder}/checkpoints/latest"
        )


def training_step(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: dict,
    row_ids: np.ndarray,
    key: int,
    config: TrainConfig,
) -> tuple[list[str], torch.Tensor]:
    """Takes one optimizer step; returns the names of the terms and this rank's shares of them, float64 [terms].

    The last entry is the gradient norm. The entry before it is `finite_norms`, from which `averaged` finds the ranks on which a
    non-finite loss started. A share is the value of one rank; the mean over ranks is the term of the global batch.
    row_ids: numbers of this rank's rows in the global batch, int64 [b]. key: key of all random draws of this step.
    Raises UserError if a network draws random numbers under train.blocks.
    """
    optimizer.zero_grad()
    device = accelerator.device
    generator = random_state(device) if config.blocks else None
    if config.accumulate > 1:
        objective = accelerator.unwrap_model(model)
        terms = accumulate(accelerator, objective, batch, config.global_batch, row_ids, key, config.accumulate)
    else:
        first = None if batch["distinct"] else batch["first"].to(device)
        terms = model(to_unit(batch["image"], device), first, config.global_batch, row_ids, key)
        accelerator.backward(terms["loss"])
    if generator is not None and not torch.equal(random_state(device), generator):
        raise UserError(
            f"train.blocks={config.blocks}: a network (model.encoder, model.decoder) draws random numbers, as dropout does, and "
            f"these differ between numbers of ranks; leave that layer out or set train.blocks=0"
        )
    norm = engine_of(accelerator).step(model, optimizer, config.clip_norm)
    finite = finite_norms(model)
    finite = torch.zeros_like(norm) if finite is None else finite
    shares = [term.double() for term in (*terms.values(), finite, norm)]
    return [*terms, FINITE_NORMS, "gradient_norm"], torch.stack(shares).detach()


def random_state(device: torch.device) -> torch.Tensor:
    """Returns the state of the generator from which random layers on the device draw."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def warm_up_ddp_buckets(accelerator: Accelerator, model: torch.nn.Module, stream: ShardStream) -> None:
    """Runs two backward passes and discards the gradients, in a new and in a continued run.

    DDP rebuilds its buckets after its first backward pass, and sums over three or more ranks then round differently. Without
    the warm-up, the first step after a resume would differ in its bits from the same step in an uninterrupted run.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    images = torch.zeros(stream.rows, *stream.index.image_shape, device=accelerator.device)
    for _ in range(2):  # DDP rebuilds the buckets at the start of the second pass
        accelerator.backward(model(images, None, stream.order.global_batch, stream.row_ids, 0)["loss"])
    model.zero_grad()
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
