"""The state of a run in a checkpoint, apart from weights and optimizer state."""

import math
from dataclasses import asdict, dataclass, fields


@dataclass
class TrainingState:
    """The progress of a run.

    step: number of steps taken. best_step: the step with the lowest validation loss, 0 before the first validation.
    plateau, grad_scaler: state of the plateau schedule and of the loss scaling of fp16. unfinished: the arguments of
    `Run.after_step` for a step after which a signal stopped the run; the next start does this work first.
    """

    step: int = 0
    best_validation_loss: float = math.inf
    best_step: int = 0
    plateau: dict | None = None
    grad_scaler: dict | None = None
    unfinished: dict | None = None

    def to_dict(self) -> dict:
        """Returns the state for state.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, state: dict) -> "TrainingState":
        """Reads the state from a checkpoint's state.json and ignores its other entries."""
        return cls(**{entry.name: state[entry.name] for entry in fields(cls) if entry.name in state})
