"""Kills at random under torchrun, which starts the ranks again, each with real processes."""

import random
from pathlib import Path

import torch
from conftest import torchrun
from safetensors.torch import load_file
from world_cases import BATCH

STEPS, SAVED, KILLS = 60, 4, 10


def trained(ranks: int, shards: Path, folder: Path, plan: list[tuple[int, int]]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The weights at the end, and the kills, of a run under torchrun with a restart for each line of the plan."""
    (kills := folder / "kills").mkdir(parents=True)
    (folder / "plan").write_text("".join(f"{who} {when}\n" for who, when in plan))
    settings = [
        f"data.root={shards}",
        f"train.output={folder / 'run'}",
        f"train.global_batch={BATCH}",
        f"train.epochs={STEPS * BATCH / 150}",
        f"train.save_every={SAVED * BATCH}",
        "train.device=cpu",
        "train.trackers=[]",
        "train.timeout=60",
        "train.learning_rate=1e-3",
        "model.width=4",
        "model.latent_dim=5",
    ]
    script = str(Path(__file__).with_name("killed_again_and_again.py"))
    done = torchrun(ranks, f"--max-restarts={len(plan)}", script, str(kills), str(folder / "plan"), *settings, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    weights = load_file(folder / "run" / "checkpoints" / f"step-{STEPS:08d}" / "model.safetensors")
    return weights, sorted(path.name for path in kills.iterdir())


def test_run_that_is_killed_ten_times_at_random_ends_with_the_bits_of_one_that_is_not(shards, tmp_path):
    ranks, chance = 3, random.Random(3)
    # A start that is killed within its first steps has saved nothing new: it is the next that goes on from there.
    plan = [(chance.randrange(ranks), chance.randrange(2 * SAVED)) for _ in range(KILLS)]
    expected, none = trained(ranks, shards, tmp_path / "undisturbed", [])
    found, kills = trained(ranks, shards, tmp_path / "killed", plan)
    assert len(kills) == KILLS and not none
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
