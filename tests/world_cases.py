"""What the cases of world.py and the tests that read their results have in common."""

from pathlib import Path

import thumbnails  # noqa: F401  makes these features known
import torch

from eae_dist.config import Config, load_config
from eae_dist.objectives import resolve

BATCH = 26  # 3 and 4 ranks share it unevenly
STEPS = 20
# Weights at which every penalty moves the tiny network. Rounding must stay rounding over 20 steps: in one process initial weights
# that differ by 2e-16 end 3e-12 apart under these, but 3e-8 under an entropy weight of 0.006.
OBJECTIVES = {
    "eae": ("objective.entropy_weight=0.02",),
    "eae_linear": ("objective.entropy_weight=0.02",),
    "eae_redrawn": ("objective.entropy_weight=0.02", "objective.map=redrawn", "objective.map_dim=3"),
    "ae": (),
    "ae_l2": ("objective.decoder_weight=1e-2",),
    "rae": ("objective.latent_weight=0.1",),
    "rae_l2": ("objective.latent_weight=0.1", "objective.decoder_weight=1e-2"),
    "rae_gp": ("objective.latent_weight=0.1", "objective.gradient_weight=1e-4"),
    "rae_sn": ("objective.latent_weight=0.1",),
    "vae": ("objective.kl_weight=0.3",),
    "cv_vae": ("objective.kl_weight=0.3", "objective.sigma=0.5"),
    "two_stage_vae": ("objective.kl_weight=0.3",),
    "wae": ("objective.mmd_weight=0.5", "objective.input_noise=0.05"),
    "sigreg": ("objective.sigreg_weight=0.5", "objective.directions=7"),
    "swae": ("objective.wasserstein_weight=0.5", "objective.directions=7"),
}
ENTROPIC = ("eae", "eae_linear", "eae_redrawn")
OF_THREE = (*ENTROPIC, "ae", "sigreg", "swae")  # rows that are trained on three ranks too
FLOAT32 = (*ENTROPIC, "ae", "rae_gp", "sigreg", "swae")
CONTINUED = ("eae", "eae_linear", "ae")  # rows that another number of ranks goes on with
# Rows that are accumulated without norms in the networks.
ACCUMULATED = ("eae", "eae_linear", "wae", "vae", "rae_gp", "sigreg", "swae")
# Rows whose activations are computed twice, and in how many parts a batch goes through the networks.
COMPUTED_TWICE = (*((name, 1) for name in OBJECTIVES), *((name, 2) for name in ("eae", "rae_gp", "rae_sn", "vae")))
# Ranks -> rows that are interrupted and go on there.
INTERRUPTED = {1: tuple(OBJECTIVES), 2: tuple(OBJECTIVES), 3: OF_THREE, 4: tuple(OBJECTIVES)}

BLOCKS = 4  # train.blocks of the runs in blocks
# Runs in blocks: every row, and some with settings that change what is added, or how. Of 13 lanes no two blocks have as many.
IN_BLOCKS = {name: (name,) for name in OBJECTIVES} | {
    "accumulated": ("rae_gp", "train.accumulate=2"),
    "accumulated eae": ("eae", "train.accumulate=3"),
    "uneven": ("eae", "data.lanes=13", "objective.k=3", "objective.average_k=true", "train.clip_norm=0.05"),
    "checkpointed": ("rae_sn", "train.checkpoint_activations=true"),
    "contiguous": ("rae_gp", "train.channels_last=false"),
    "without norms": ("wae", "model.norm=none"),
    "averaged": ("eae", "train.ema=0.9", "train.optimizer=adamw", "train.schedule=cosine", "train.warmup_epochs=0.4"),
    "fused": ("ae", "train.fused=true"),
    "one channel": ("rae_gp", "model.width=1"),
    "fewer directions than blocks": ("swae", "objective.directions=3"),
    "own in a list": ("eae", "model.encoder=own_networks:ListEncoder"),
    "own": ("eae", "model.encoder=own_networks:Encoder", "model.decoder=own_networks:Decoder"),
}


def configured(shards: Path, name: str, *settings: str) -> Config:
    """The resolved configuration of a row of OBJECTIVES on the tests' small images, with a tiny network."""
    config = load_config(
        [
            f"objective.name={name.replace('_redrawn', '_linear')}",
            f"data.root={shards}",
            f"train.global_batch={BATCH}",
            "train.device=cpu",
            "train.trackers=[]",
            "train.learning_rate=1e-3",
            "model.width=4",
            "model.latent_dim=5",
            "evaluate.features=thumbnails",
            "evaluate.components=2",
            f"evaluate.cache={shards}-cache",
            "evaluate.batch=16",  # three validation blocks: of four ranks one has none
            *OBJECTIVES[name],
            *settings,
        ]
    )
    return resolve(config, (1, 16, 16))


def run_of(shards: Path, run: Path, *more: str, name: str = "eae", steps: int = 4) -> list[str]:
    """The command line of a short run of a row of OBJECTIVES, logged after every step; of what is given twice the last counts."""
    return [
        f"objective.name={name}",
        f"data.root={shards}",
        f"train.output={run}",
        f"train.global_batch={BATCH}",
        f"train.epochs={steps * BATCH / 150}",
        f"train.log_every={BATCH}",
        "train.sample_every=1000000",
        "train.trackers=[]",
        "train.device=cpu",
        "train.learning_rate=1e-3",
        "model.width=4",
        "model.latent_dim=5",
        *OBJECTIVES[name],
        *more,
    ]


def entropy_inputs():
    """[40, 6] float64 with an exact duplicate, far from the rest so that no row has two nearest, and a pair below the floor."""
    z = torch.randn(40, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    z[31] = z[2] = z[2] + 20
    z[35] = z[8] + 1e-3
    valid = torch.ones(40, dtype=torch.bool)
    valid[[5, 17, 33]] = False
    return z, valid
