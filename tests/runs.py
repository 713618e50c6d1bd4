"""Run folders with a checkpoint that nothing trained."""

from pathlib import Path

import numpy as np
import torch

from eae_dist.config import Config
from eae_dist.objectives import build_objective
from eae_dist.training import checkpoint as checkpoints

SHAPE = (1, 16, 16)


def save_run(run: Path, config: Config, shape=SHAPE) -> Path:
    """A checkpoint whose running statistics have seen some images; returns its run folder."""
    objective = build_objective(config.model, config.objective, shape, config.train.seed)
    seen = torch.rand(32, *shape, generator=torch.Generator().manual_seed(2))
    objective(seen, torch.ones(32, dtype=torch.bool), 32, np.arange(32), 0)
    checkpoints.save(run, config, objective.state_dict(), {}, {"step": 4, "images": 104, "image_shape": list(shape)})
    return run
