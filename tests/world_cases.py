"""What the cases of world.py and the tests that read their results have in common."""

from pathlib import Path

import torch

from eae_dist.config import Config, load_config
from eae_dist.objectives import resolve

BATCH = 26  # 3 and 4 ranks share it unevenly
STEPS = 20
OBJECTIVES = ("eae", "eae_linear", "eae_redrawn", "ae")


def configured(shards: Path, name: str, *settings: str) -> Config:
    """The resolved configuration of a row of OBJECTIVES on the tests' small images, with a tiny network."""
    objective, *rest = {"eae_redrawn": ("eae_linear", "objective.map=redrawn", "objective.map_dim=3")}.get(name, (name,))
    config = load_config(
        [
            f"objective.name={objective}",
            f"data.root={shards}",
            f"train.global_batch={BATCH}",
            "train.device=cpu",
            "train.trackers=[]",
            "model.width=4",
            "model.latent_dim=5",
            "evaluate.batch=16",  # three validation blocks: of four ranks one has none
            *rest,
            *settings,
        ]
    )
    return resolve(config, (1, 16, 16))


def entropy_inputs():
    """[40, 6] float64 with an exact duplicate, far from the rest so that no row has two nearest, and a pair below the floor."""
    z = torch.randn(40, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    z[31] = z[2] = z[2] + 20
    z[35] = z[8] + 1e-3
    valid = torch.ones(40, dtype=torch.bool)
    valid[[5, 17, 33]] = False
    return z, valid
