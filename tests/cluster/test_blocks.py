"""Runs under train.blocks=8 have the same bits on 1, 2, 4 and 8 ranks, also if they are killed and continued on other numbers."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from conftest import torchrun
from ranks import run_ranks, train_in_turn
from run_folders import bits_of
from world_cases import BATCH, OBJECTIVES, run_of

from eae_dist.training import loop

BLOCKS, STEPS, SAVED = 8, 60, 5
EVERY = f"train.save_every={SAVED * BATCH}", f"train.validate_every={20 * BATCH}", f"train.blocks={BLOCKS}"


def settings(shards: Path, run: Path, name: str) -> list[str]:
    return run_of(shards, run, *EVERY, name=name, steps=STEPS)


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory):
    """The folder of the runs of all rows on so many ranks."""
    folder, trained = tmp_path_factory.mktemp("blocks"), {}

    def runs_on(ranks: int) -> Path:
        if ranks not in trained:
            trained[ranks] = folder / str(ranks)
            runs = [settings(shards, trained[ranks] / name, name.replace("_redrawn", "_linear")) for name in OBJECTIVES]
            runs = [[*run, *OBJECTIVES[name]] for run, name in zip(runs, OBJECTIVES, strict=True)]
            ended = run_ranks(ranks, trained[ranks] / "logs", train_in_turn, *runs, timeout=900)
            assert ended.codes == [0] * ranks, "\n".join(text[-3000:] for text in ended.said)
        return trained[ranks]

    return runs_on


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_sixty_steps_of_every_row_have_the_same_bits(undisturbed, name, ranks):
    one, several = (bits_of(undisturbed(count) / name) for count in (1, ranks))
    assert len(one["metrics"]) == STEPS and several == one


def killed(arguments: list[str], step: int) -> None:
    """Trains until this step of the run, at which every rank kills itself."""
    original = loop.training_step

    def counted(accelerator, model, optimizer, batch, row_ids, key, config):
        if key == loop.derive_key(config.seed, step):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(accelerator, model, optimizer, batch, row_ids, key, config)

    loop.training_step = counted
    train_in_turn(arguments)


@pytest.mark.parametrize("name", ["eae", "rae_gp"])
def test_run_killed_on_changing_numbers_of_ranks_ends_with_the_bits_of_one_that_is_not(undisturbed, shards, tmp_path, name):
    arguments = settings(shards, tmp_path / "run", name)
    for ranks, step in [(4, 17), (1, 33), (2, 48)]:
        ended = run_ranks(ranks, tmp_path / f"logs-{ranks}", killed, arguments, step)
        assert ended.codes == [-signal.SIGKILL] * ranks
    assert run_ranks(8, tmp_path / "logs-8", train_in_turn, arguments).codes == [0] * 8
    assert bits_of(tmp_path / "run") == bits_of(undisturbed(1) / name)


def test_first_epochs_of_make_train_have_the_same_bits_on_one_rank_and_on_four(tmp_path):
    pack = torchrun(1, "-m", "eae_dist.pack", "mnist5k", str(tmp_path / "shards"))
    assert pack.returncode == 0, pack.stderr[-3000:]

    def trained(ranks: int) -> CompletedProcess:
        arguments = f"data.root={tmp_path / 'shards'}", f"train.output={tmp_path / str(ranks)}", f"train.blocks={BLOCKS}"
        shorter = "train.epochs=8", "train.device=cpu", "train.trackers=[]"
        return torchrun(ranks, "-m", "eae_dist.train", *arguments, *shorter, timeout=1200)

    with ThreadPoolExecutor() as pool:  # at the same time, because one rank leaves cores idle
        for done in pool.map(trained, (1, 4)):
            assert done.returncode == 0 and "Grad strides" not in done.stderr, done.stderr[-3000:]
    one, four = (bits_of(tmp_path / str(ranks)) for ranks in (1, 4))
    assert one["metrics"][-1]["step"] == 219 and four == one
