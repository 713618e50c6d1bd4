"""Where a run stands: what a checkpoint holds beside weights and the optimizer's state."""

import math
from dataclasses import asdict, dataclass, fields


@dataclass
class TrainingState:
    """step: steps that were taken. best_step: the step with the lowest validation loss, 0 before the first validation.

    plateau, grad_scaler: states of the plateau schedule and of fp16's loss scaling. unfinished: the record and the actions
    (`after_step`) of a step after which a signal stopped the run; the next start finishes them first.
    """

    step: int = 0
    best_validation_loss: float = math.inf
    best_step: int = 0
    plateau: dict | None = None
    grad_scaler: dict | None = None
    unfinished: dict | None = None

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, state: dict) -> "TrainingState":
        """The state in a checkpoint's state.json, which holds more beside it."""
        return cls(**{entry.name: state[entry.name] for entry in fields(cls) if entry.name in state})
