"""What the engine does that trains: one process, or DDP over several; all else is the same under any other."""

from contextlib import AbstractContextManager
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from eae_dist.config import Config, TrainConfig
from eae_dist.distributed import world_size


def accelerator_options(config: TrainConfig, cpu: bool) -> dict:
    """How accelerate is to be started for the engine."""
    timeout = timedelta(seconds=config.timeout)
    # GlobalBatchNorm keeps its buffers equal by itself.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    handlers = [ddp, InitProcessGroupKwargs(timeout=timeout)]
    # Without cpu=True accelerate makes W separate runs of one rank, without a word.
    return {"cpu": cpu, "mixed_precision": config.precision, "kwargs_handlers": handlers}


def engine_of(accelerator: Accelerator) -> "PyTorch":
    return PyTorch(accelerator)


class PyTorch:
    """One process, or DDP."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator

    def prepare(self, objective: nn.Module, optimizer: torch.optim.Adam, config: Config, lanes: int):
        """The model and the optimizer that a step is taken with. Raises ValueError if ranks would train models of their own."""
        model, stepper = self.accelerator.prepare(objective, optimizer)
        if world_size() > 1 and not isinstance(model, DistributedDataParallel):
            raise ValueError(f"accelerate did not wrap the model for {world_size()} ranks; check the file given to --config_file")
        return model, stepper

    def autocast(self) -> AbstractContextManager:
        """The precision of a step, for a forward pass outside of one."""
        return self.accelerator.autocast()

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer, clip_norm: float | None) -> torch.Tensor:
        """One step along the gradient, scaled down to clip_norm where it is longer; its norm before that."""
        self.accelerator.unscale_gradients(optimizer)
        parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]  # a user's may be frozen
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        if clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
        optimizer.step()
        return norm

    def optimizer_state(self, objective: nn.Module, optimizer: torch.optim.Adam) -> dict:
        """The whole optimizer's state, as `load` takes it under any engine. Call on every rank."""
        return optimizer.state_dict()

    def load(self, objective: nn.Module, optimizer: torch.optim.Adam, weights: dict, state: dict) -> None:
        """Puts back weights and buffers, and the optimizer's state. Call on every rank, after `prepare`."""
        objective.load_state_dict(weights)
        optimizer.load_state_dict(state)
