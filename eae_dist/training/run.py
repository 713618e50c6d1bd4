"""A run: its model, optimizer, schedule and state; the actions after a step; and saving."""

import resource
import sys
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.optim.lr_scheduler import ReduceLROnPlateau

from eae_dist.config import Config, flatten
from eae_dist.data.remote import Cache
from eae_dist.data.stream import ShardStream, walk
from eae_dist.distributed import StopRequest, on_rank_zero, rank, ranks_of_group, row_counts, subgroup, world_size
from eae_dist.model.autoencoder import to_unit
from eae_dist.objectives import build_objective
from eae_dist.report.grids import GridInputs, draw_grids, grid_inputs, save_grids
from eae_dist.training import metrics_log
from eae_dist.training.async_checkpoint import AsyncCheckpoints
from eae_dist.training.checkpoint import Checkpoint, split_averages, with_averages
from eae_dist.training.compilation import set_execution
from eae_dist.training.console import say
from eae_dist.training.engines import engine_of
from eae_dist.training.optimization import WeightAverage, build_optimizer, learning_rate, warmup_steps
from eae_dist.training.setup import entropy_reference, set_blocks
from eae_dist.training.state import TrainingState
from eae_dist.training.validation import validate


class Run:
    """The objects and the state of one training run. Call every method on every rank.

    objective: the model with its loss. model: the objective wrapped by DDP or DeepSpeed. prepared_optimizer: the optimizer that
    takes the steps.
    """

    def __init__(self, config: Config, accelerator: Accelerator, stream: ShardStream):
        """Creates a new run from a configuration that `objectives.resolve` has filled in."""
        self.config, self.accelerator, self.stream = config, accelerator, stream
        self.folder, self.state = Path(config.train.output), TrainingState()
        self.objective = build_objective(config.model, config.objective, stream.index.image_shape, config.train.seed)
        self.objective.to(accelerator.device)
        self.objective.group = subgroup(ranks_of_group(config.objective.group), config.train.timeout)
        self.objective.row_counts = row_counts(stream.rows, accelerator.device)
        set_blocks(self.objective, config, stream)
        set_execution(self.objective, config.train, accelerator.device)
        self.optimizer = build_optimizer(self.objective.parameters(), config.train)
        self.engine = engine_of(accelerator)
        self.model, self.prepared_optimizer = self.engine.prepare(self.objective, self.optimizer, config, stream.lanes)
        self.average = None if config.train.ema is None else WeightAverage(self.objective, config.train.ema)
        self.plateau = ReduceLROnPlateau(
            self.optimizer,
            factor=config.train.plateau_factor,
            patience=config.train.plateau_patience - 1,  # PyTorch acts after this many validations plus one
            threshold_mode="abs",  # with a relative threshold, an equal negative loss would count as better
        )
        self.saves = AsyncCheckpoints(self.folder, config)
        self.every = {  # number of images between two actions of a kind
            "log": config.train.log_every or 10 * config.train.global_batch,
            "validate": config.train.validate_every or stream.samples,
            "sample": config.train.sample_every or stream.samples,
            "save": config.train.save_every or stream.samples,
        }
        self.reference: dict[str, float] = {}  # logged for comparison with the entropy
        self.last_record: dict = {}

    @property
    def images(self) -> int:
        """Number of images seen; all intervals are measured in images."""
        return self.state.step * self.config.train.global_batch

    @property
    def ran_on(self) -> dict:
        """Engine, number of ranks and device type."""
        return {"engine": self.engine.name, "ranks": world_size(), "device": self.accelerator.device.type}

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continues from a checkpoint and logs changes of engine, ranks and device."""
        self.state = TrainingState.from_dict(checkpoint.state)
        weights, averages = split_averages(checkpoint.model_state())
        self.engine.load(self.objective, self.optimizer, weights, checkpoint.optimizer_state())
        if self.average is not None:
            self.average.load(averages)
        assert self.state.plateau is not None  # every checkpoint has it
        self.plateau.load_state_dict(self.state.plateau)
        if self.accelerator.scaler is not None and self.state.grad_scaler:
            self.accelerator.scaler.load_state_dict(self.state.grad_scaler)
        for what, before in checkpoint.state.get("ran_on", {}).items():
            if before != self.ran_on[what]:
                say(f"changed since the last checkpoint: {what}: {before} -> {self.ran_on[what]}")
        self.stream.start_step = self.state.step

    def open_log(self) -> None:
        """Opens metrics.jsonl and the trackers, and fixes the inputs of all sample grids."""
        config, device = self.config, self.accelerator.device
        with on_rank_zero():  # the disk may be full
            self.metrics = metrics_log.MetricsLog(self.folder, self.accelerator, self.state.step, flatten(config))
        if "entropy" in self.objective.penalties:
            self.reference = {"entropy_gaussian_reference": entropy_reference(config, device)}
        self.grid_inputs: GridInputs | None = None
        with on_rank_zero() as is_rank_zero:
            if is_rank_zero:
                data, split = config.data, config.data.validation or config.data.split
                images = next(walk(data.root, split, 64, rank=0, world=1, cache=Cache.of(data)))["image"]
                self.grid_inputs = grid_inputs(to_unit(images, device), self.objective.autoencoder.latent_dim, config.train.seed)

    def schedule_learning_rate(self, end: int) -> None:
        """Sets the learning rate of the next step of `end`; the plateau schedule changes it after validation."""
        rate = learning_rate(self.config.train, self.state.step, end, self.stream.samples)
        if rate is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = rate

    def judged_weights(self) -> AbstractContextManager[None]:
        """Returns a context in which the objective has the weights that are judged: under train.ema their averages."""
        return nullcontext() if self.average is None else self.average.in_use()

    def due(self, end: int) -> set[str]:
        """Returns the actions due after the last step: log, validate, sample, save; all of them at the end of the run."""
        before, now = self.images - self.config.train.global_batch, self.images
        return {what for what, images in self.every.items() if self.state.step == end or now // images > before // images}

    def record(self, names: list[str], window: list[torch.Tensor], seconds: float) -> metrics_log.Record:
        """Returns the record of the log for the steps of the window, which took `seconds`. Raises TrainingDiverged."""
        step, ignore_gradient = self.state.step, self.accelerator.scaler is not None
        return {
            "step": step,
            "images": self.images,
            "epoch": self.images / self.stream.samples,
            **metrics_log.averaged(window, names, step, self.saves.last, ignore_gradient=ignore_gradient),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "images_per_second": len(window) * self.config.train.global_batch / seconds,
            "peak_memory_mib": peak_memory_mib(self.accelerator.device),
        }

    def after_step(self, record: metrics_log.Record, due: Collection[str], stop: StopRequest) -> bool:
        """Does the due actions: validation, samples, log record, checkpoint. Returns False if a stop ends the validation."""
        state, improved = self.state, False
        if "validate" in due and self.config.data.validation:
            with self.judged_weights():
                terms = validate(self.accelerator, self.objective, self.config, stop)
            if terms is None:
                return False
            validation = {f"validation_{name}": value for name, value in terms.items()}
            metrics_log.require_finite(validation, state.step, self.saves.last)
            record = {**record, **validation}
            improved = validation["validation_loss"] < state.best_validation_loss
            if improved:
                state.best_validation_loss, state.best_step = validation["validation_loss"], state.step
            warmup = warmup_steps(self.config.train, self.stream.samples)
            if self.config.train.schedule == "plateau" and state.step >= warmup:
                self.plateau.step(validation["validation_loss"])
        with on_rank_zero() as is_rank_zero:  # the disk may be full, also because of a checkpoint that is being written
            self.saves.raise_failure()
            if is_rank_zero and "sample" in due:
                assert self.grid_inputs is not None  # rank 0 has them
                with self.judged_weights():
                    grids = draw_grids(self.objective.autoencoder.eval(), self.grid_inputs)
                saved = save_grids(grids, self.folder / "samples", f"step-{state.step:08d}-")
                self.metrics.show(grids, saved, state.step)
                self.objective.train()
            self.metrics.write(record)
        self.last_record = record
        if improved or "save" in due:
            self.save()
        return True

    def save(self, unfinished: dict | None = None) -> None:
        """Starts to write a checkpoint. unfinished: arguments of `after_step` with which the next start continues."""
        state, scaler = self.state, self.accelerator.scaler
        state.plateau, state.grad_scaler = self.plateau.state_dict(), None if scaler is None else scaler.state_dict()
        with on_rank_zero():  # wait before the engine gathers a second copy
            self.saves.wait()
        optimizer_state = self.engine.optimizer_state(self.objective, self.optimizer)
        if rank() == 0:
            about = {
                **state.to_dict(),
                "unfinished": unfinished,
                "images": self.images,
                "image_shape": list(self.stream.index.image_shape),
                "stream": self.stream.identity(),
                "ran_on": self.ran_on,
            }
            copied = self.engine.optimizer_state_is_copy
            averages = {} if self.average is None else self.average.averages
            model_state = with_averages(self.objective.state_dict(), averages)
            self.saves.start(model_state, optimizer_state, about, copied=copied)


def peak_memory_mib(device: torch.device) -> float:
    """Returns the peak memory of this rank in MiB: allocated on its GPU, or resident in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
