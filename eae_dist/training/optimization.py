"""The optimizer, the learning rate of a step, and the moving average of the weights."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from eae_dist.config import TrainConfig


def build_optimizer(parameters: Iterable[nn.Parameter], train: TrainConfig) -> torch.optim.Optimizer:
    """Returns the optimizer of train.optimizer over all parameters."""
    fused = train.fused or None  # None: torch chooses between its other implementations
    if train.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=train.learning_rate, weight_decay=train.weight_decay, fused=fused)
    return torch.optim.Adam(parameters, lr=train.learning_rate, fused=fused)


def warmup_steps(train: TrainConfig, samples: int) -> int:
    """Returns the number of steps in which the learning rate rises; samples: number of images in an epoch."""
    return math.ceil(train.warmup_epochs * samples / train.global_batch)


def learning_rate(train: TrainConfig, step: int, end: int, samples: int) -> float | None:
    """Returns the learning rate for the step after `step` steps of `end`; None if the plateau schedule decides.

    It depends on these numbers alone, so a resumed run has the same rates. samples: number of images in an epoch.
    """
    warmup = warmup_steps(train, samples)
    rate = train.learning_rate * min((step + 1) / warmup, 1) if warmup else train.learning_rate
    if train.schedule == "exponential":
        return rate * train.decay ** (step * train.global_batch // samples)
    if train.schedule == "cosine":
        done = max(step - warmup, 0) / max(end - warmup, 1)
        return rate * (train.cosine_factor + (1 - train.cosine_factor) * (1 + math.cos(math.pi * done)) / 2)
    if train.schedule == "plateau" and step >= warmup:
        return None
    return rate


class WeightAverage:
    """Exponential moving averages of the weights, the same on every rank; buffers are not averaged.

    averages: by the names of the parameters. The objective must already lie on its device.
    """

    def __init__(self, objective: nn.Module, decay: float):
        self.decay, self.parameters = decay, dict(objective.named_parameters())
        self.averages = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def update(self, step: int) -> None:
        """Moves the averages towards the weights after step number `step`, from 1 on.

        In the first steps the averages follow faster, because the initial weights would stay in them for long.
        """
        decay = min(self.decay, step / (step + 9))
        get_ema_multi_avg_fn(decay)(list(self.averages.values()), list(self.parameters.values()), None)

    def load(self, averages: dict[str, torch.Tensor]) -> None:
        """Takes over the averages of a checkpoint."""
        for name, average in self.averages.items():
            average.copy_(averages[name])

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """A context in which the parameters of the objective hold the averages. Nothing may train in it."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        # By copies: DDP and DeepSpeed rely on where a parameter lies in memory.
        for name, parameter in self.parameters.items():
            weights = parameter.clone()
            parameter.copy_(self.averages[name])
            self.averages[name].copy_(weights)
