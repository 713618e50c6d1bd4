"""Run folders: one with a checkpoint that nothing trained, and what two runs with the same bits have in common."""

import json
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


MEASURED = ("images_per_second", "peak_memory_mib", "straggler_spread")  # and whatever has one number per rank


def bits_of(run: Path) -> dict:
    """The sha256 of the files of a run's last checkpoint that hold weights and optimizer state, and its metrics but for times."""
    manifest = json.loads((run / "checkpoints" / "latest" / "manifest.json").read_text())
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = [{k: v for k, v in record.items() if k not in MEASURED and not isinstance(v, list)} for record in records]
    return {name: manifest[name] for name in ("model.safetensors", "optimizer.pt")} | {"metrics": metrics}
