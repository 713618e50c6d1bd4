"""What happens to the other ranks, and to the run, when one is killed, is told to end, or meets what it cannot use."""

import json
import os
import pickle
import platform
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import TRAIN_SIZES, write_shards
from ranks import noted_keys, run_ranks, train_in_turn, try_in_turn
from saboteur import Touch
from safetensors.torch import load_file
from world_cases import BATCH

from eae_dist import evaluate
from eae_dist.numerics.atomic_files import sha256_of

RANKS = (1, 2, 3, 4)
ROWS = ("eae", "eae_linear", "ae")
STEPS, SAVED, BROKEN = 8, 3, 5  # length of a run, steps between checkpoints, the step in which it is broken


def arguments(shards: Path, run: Path, name: str, *more: str) -> list[str]:
    return [
        f"objective.name={name}",
        f"data.root={shards}",
        f"train.output={run}",
        f"train.global_batch={BATCH}",
        f"train.epochs={STEPS * BATCH / 150}",
        f"train.save_every={SAVED * BATCH}",
        "train.validate_every=1000000",
        "train.sample_every=1000000",
        "train.trackers=[]",
        "train.device=cpu",
        "train.timeout=10",
        "model.encoder=saboteur:KillingEncoder",
        "train.learning_rate=1e-3",
        "model.width=4",
        "model.latent_dim=5",
        *more,
    ]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{STEPS:08d}" / "model.safetensors")


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def samples_of(run: Path) -> list[str]:
    return noted_keys(run.with_name(f"{run.name}.keys"), STEPS)


def latest(run: Path) -> str:
    return os.readlink(run / "checkpoints" / "latest")


@pytest.fixture(scope="module", params=RANKS)
def ranks(request) -> int:
    return request.param


@pytest.fixture(scope="module")
def whole_runs(ranks, shards, tmp_path_factory) -> Path:
    """The folder of each row's run that nobody breaks, on so many ranks."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for name in ROWS:
        (folder / f"{name}.mark").touch()
    ended = run_ranks(ranks, folder / "logs", train_in_turn, *(arguments(shards, folder / name, name) for name in ROWS))
    assert ended.codes == [0] * ranks, ended.said
    return folder


def broken(ranks: int, shards: Path, folder: Path, how: str):
    """One start of the three runs, in the first of which that has not been broken yet one rank is."""
    runs = [arguments(shards, folder / name, name) for name in ROWS]
    environment = {"SABOTEUR_SIGNAL": how, "SABOTEUR_STEP": BROKEN}
    return run_ranks(ranks, folder / "logs", train_in_turn, *runs, environment=environment)


def require_same(run: Path, whole: Path) -> None:
    """The run has the bits and the order of samples of the undisturbed one, and each sample came once in the first pass."""
    found, expected = weights(run), weights(whole)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    keys, samples = samples_of(run), sum(TRAIN_SIZES)
    assert keys == samples_of(whole) and len(keys) == STEPS * BATCH
    assert len(set(keys[:samples])) == samples and len(set(keys[samples:])) == STEPS * BATCH - samples


@pytest.mark.slow
def test_killed_rank_ends_the_others_and_the_same_command_ends_with_the_same_bits(ranks, whole_runs, shards, tmp_path):
    for name in ROWS:
        ended = broken(ranks, shards, tmp_path, "SIGKILL")
        *others, killed = ended.codes
        assert killed == -signal.SIGKILL and all(code > 0 for code in others), (name, ended)
        for said in ended.said[:-1]:
            assert f"could not go on in step {BROKEN}" in said and f"rank {ranks - 1} ended or hangs" in said, said
            assert f"the last checkpoint is {tmp_path / name}/checkpoints/step-{SAVED:08d}" in said
        assert latest(tmp_path / name) == f"step-{SAVED:08d}"
    ended = broken(ranks, shards, tmp_path, "SIGKILL")
    assert ended.codes == [0] * ranks and f"steps {SAVED} to {STEPS}" in ended.said[0], ended.said
    for name in ROWS:
        require_same(tmp_path / name, whole_runs / name)


def test_signal_to_one_rank_lets_every_rank_save_and_end_well_and_the_run_goes_on(ranks, whole_runs, shards, tmp_path):
    ended = broken(ranks, shards, tmp_path, "SIGTERM")
    assert ended.codes == [0] * ranks and ended.said[0].count("stopped by a signal") == len(ROWS), ended.said
    stopped = {latest(tmp_path / name) for name in ROWS}
    assert stopped == {f"step-{BROKEN + 1:08d}"}
    ended = broken(ranks, shards, tmp_path, "SIGTERM")
    assert ended.codes == [0] * ranks, ended.said
    for name in ROWS:
        require_same(tmp_path / name, whole_runs / name)


def test_signal_in_a_validation_breaks_it_off_and_the_next_start_does_it_over(ranks, whole_runs, shards, tmp_path):
    run = tmp_path / "eae"
    command = arguments(shards, run, "eae", f"train.validate_every={4 * BATCH}", "evaluate.batch=4")
    sabotage = {"SABOTEUR_SIGNAL": "SIGTERM", "SABOTEUR_STEP": "validation"}
    ended = run_ranks(ranks, tmp_path / "logs", train_in_turn, command, environment=sabotage)
    assert ended.codes == [0] * ranks and "stopped by a signal" in ended.said[0], ended.said
    assert latest(run) == "step-00000004" and [line["step"] for line in records(run)] == [SAVED]
    ended = run_ranks(ranks, tmp_path / "logs", train_in_turn, command, environment=sabotage)
    assert ended.codes == [0] * ranks and "finished" in ended.said[0], ended.said
    assert [line["step"] for line in records(run) if "validation_loss" in line] == [4, STEPS]
    require_same(run, whole_runs / "eae")


@pytest.mark.parametrize("ranks", RANKS[1:], indirect=True)  # nobody waits for a single one
def test_rank_that_hangs_is_named_by_the_others_within_the_timeout(ranks, shards, tmp_path):
    words = arguments(shards, tmp_path / "run", "eae", "model.encoder=saboteur:HangingEncoder", "train.timeout=3")
    ended = run_ranks(ranks, tmp_path, train_in_turn, words, environment={"SABOTEUR_STEP": BROKEN}, hanging=[ranks - 1])
    for who, said in enumerate(ended.said[:-1]):
        assert ended.codes[who] > 0 and f"rank {ranks - 1} ended or hangs" in said, said
        report = (tmp_path / "run" / "crashes" / f"rank-{who}.txt").read_text()
        assert f"rank {ranks - 1} ended or hangs" in report and "Traceback" in report


def test_unforeseen_failure_is_reported_with_rank_host_step_and_last_checkpoint(ranks, shards, tmp_path):
    words = arguments(shards, tmp_path / "run", "ae", "model.encoder=saboteur:FailingEncoder")
    ended = run_ranks(ranks, tmp_path, train_in_turn, words, environment={"SABOTEUR_STEP": BROKEN})
    assert all(code > 0 for code in ended.codes)
    where = f"rank {ranks - 1} of {ranks} on {platform.node()} failed in step {BROKEN}: KeyError: 'unforeseen'"
    latest = (tmp_path / "run" / "checkpoints" / f"step-{SAVED:08d}").resolve()
    for text in (ended.said[-1], (tmp_path / "run" / "crashes" / f"rank-{ranks - 1}.txt").read_text()):
        assert where in text and f"the last checkpoint is {latest}; run the same command to continue" in text


@pytest.mark.parametrize("ranks", [1], indirect=True)  # of the runs that it is compared with
def test_runs_on_four_two_one_and_four_ranks_take_the_samples_in_the_order_of_one_run(whole_runs, shards, tmp_path):
    for name in ROWS:
        (tmp_path / f"{name}.mark").touch()
    for before, count, steps in ((0, 4, 3), (4, 2, 5), (2, 1, 6), (1, 4, STEPS)):
        length = f"train.epochs={steps * BATCH / 150}"
        words = [arguments(shards, tmp_path / name, name, length) for name in ROWS]
        ended = run_ranks(count, tmp_path / f"logs-{steps}", train_in_turn, *words)
        assert ended.codes == [0] * count, ended.said
        said = f"changed since the last checkpoint: ranks: {before} -> {count}"
        assert ended.said[0].count(said) == (len(ROWS) if before else 0), ended.said[0]
    for name in ROWS:
        assert samples_of(tmp_path / name) == samples_of(whole_runs / name)


def test_truncated_shard_ends_all_ranks_and_is_named(ranks, shards, tmp_path):
    root = shutil.copytree(shards, tmp_path / "shards")
    shard = max(root.glob("train-*.tar"), key=lambda path: path.stat().st_size)
    os.truncate(shard, shard.stat().st_size - 512)
    ended = run_ranks(ranks, tmp_path, train_in_turn, arguments(root, tmp_path / "run", "eae"))
    assert all(code > 0 for code in ended.codes), ended
    # Which rank comes to it first, and so says it, follows from the order of the data.
    assert any(f"{shard} is truncated" in text for text in ended.said), ended.said


def test_shard_that_only_the_first_rank_reads_ends_the_others_without_a_word(ranks, shards, tmp_path):
    root = shutil.copytree(shards, tmp_path / "shards")
    os.truncate(root / "validation-000000.tar", 512)  # its first images are for the grids
    ended = run_ranks(ranks, tmp_path, train_in_turn, arguments(root, tmp_path / "run", "eae"))
    assert all(code > 0 for code in ended.codes), ended
    assert "validation-000000.tar is truncated" in ended.said[0], ended.said
    assert not any("Traceback" in said or "error" in said for said in ended.said[1:]), ended.said


def test_nothing_runs_that_came_with_a_checkpoint_or_a_shard(ranks, shards, tmp_path):
    marker = tmp_path / "ran"
    # Every sample has two more members, whose loading would make a file, and so would the optimizer's.
    harmful = dict.fromkeys(("pyd", "pickle"), pickle.dumps(Touch(marker)))
    root = write_shards(tmp_path / "shards", {"train": TRAIN_SIZES, "validation": (40,)}, members=harmful)
    for name in ROWS:
        (tmp_path / f"{name}.mark").touch()
    runs = [arguments(root, tmp_path / name, name, f"train.epochs={SAVED * BATCH / 150}") for name in ROWS]
    ended = run_ranks(ranks, tmp_path / "logs", train_in_turn, *runs)
    assert ended.codes == [0] * ranks, ended.said

    for name in ROWS:
        checkpoint = (tmp_path / name / "checkpoints" / "latest").resolve()
        torch.save({"state": Touch(marker)}, checkpoint / "optimizer.pt")
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        manifest["optimizer.pt"] = sha256_of(checkpoint / "optimizer.pt")
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    for name, run in zip(ROWS, runs, strict=True):  # rank 0 alone reads the file, and says what it holds
        ended = run_ranks(ranks, tmp_path / f"logs-{name}", try_in_turn, [*run, "train.epochs=2"])
        assert "optimizer.pt holds something else than tensors" in ended.said[0], ended.said
        assert not any("no error" in said for said in ended.said), ended.said
    assert not marker.exists()
    pickle.loads(harmful["pyd"])  # it does work
    assert marker.exists()


def test_loss_that_is_not_a_number_ends_all_ranks_and_is_named(ranks, shards, tmp_path):
    runs = [arguments(shards, tmp_path / name, name, "model.encoder=saboteur:DivergingEncoder") for name in ROWS]
    ended = run_ranks(ranks, tmp_path / "logs", try_in_turn, *runs)
    for said in ended.said:
        where = f"reconstruction is nan at step 7 on rank {ranks - 1}; the last good checkpoint is {tmp_path}"
        assert said.count(where) == len(ROWS) and "no error" not in said, said


def judge(*words: str) -> None:
    evaluate.main(list(words))


@pytest.mark.slow
def test_killed_evaluation_goes_on_and_ends_with_the_same_numbers(ranks, whole_runs, tmp_path):
    def judged(out: Path):
        named = ("model.encoder=saboteur:KillingEncoder", "evaluate.features=saboteur:killing_features")
        settings = ("evaluate.batch=8", "evaluate.components=2", f"evaluate.cache={tmp_path}/cache")
        environment = {"SABOTEUR_MARK": tmp_path / "mark", "SABOTEUR_PROGRESS": out / ".progress.json"}
        words = ("--ckpt", str(whole_runs / "eae"), "--out", str(out), *named, *settings)
        return run_ranks(ranks, tmp_path / "logs", judge, *words, environment=environment)

    *others, killed = judged(tmp_path / "broken").codes
    assert killed == -signal.SIGKILL and all(code > 0 for code in others)
    again, whole = judged(tmp_path / "broken"), judged(tmp_path / "whole")
    assert again.codes == whole.codes == [0] * ranks, again.said
    assert "continuing an evaluation that was interrupted: reconstruction, isotropic" in again.said[0]
    assert "going on" not in whole.said[0]
    numbers, expected = (json.loads((tmp_path / out / "metrics.json").read_text()) for out in ("broken", "whole"))
    assert numbers == expected and len(numbers["sets"]) == 6


def test_run_with_an_entropy_of_groups_says_so_and_numbers_that_do_not_fit_are_refused(ranks, shards, tmp_path):
    runs = {"whole": "objective.group=null", "alone": "objective.group=1", "node": "objective.group=node"}
    words = []
    for name, group in runs.items():
        (tmp_path / f"{name}.mark").touch()
        words.append(
            arguments(shards, tmp_path / name, "eae", group, f"train.epochs={2 * BATCH / 150}", f"train.log_every={BATCH}")
        )
    ended = run_ranks(ranks, tmp_path, train_in_turn, *words, environment={"LOCAL_WORLD_SIZE": 1})
    assert ended.codes == [0] * ranks, ended.said
    assert ended.said[0].count(f"the mean over {ranks} groups of 1 ranks") == (2 if ranks > 1 else 0)
    whole, alone, node = ([line["entropy"] for line in records(tmp_path / name)] for name in runs)
    assert alone == node and (alone == whole) == (ranks == 1)  # fewer latents are compared: another estimate
    short = ("model.encoder=null", f"train.epochs={2 * BATCH / 150}")
    refused = {"three": ["objective.group=3"], "few": ["objective.group=1", "objective.k=20"]}
    words = [arguments(shards, tmp_path / name, "eae", *settings, *short) for name, settings in refused.items()]
    for said in run_ranks(ranks, tmp_path, try_in_turn, *words).said:
        assert (f"objective.group=3 cannot split {ranks} ranks into groups of 3" in said) == (ranks != 3)
        assert ("objective.k=20 needs groups (objective.group) of more than 20 distinct rows" in said) == (ranks > 1)


def train_on_uneven_nodes(words: list[str]) -> None:
    """Of four ranks the first two are on one machine, the others each on their own."""
    os.environ["LOCAL_WORLD_SIZE"] = "2" if int(os.environ["RANK"]) < 2 else "1"
    train_in_turn(words)


@pytest.mark.parametrize("ranks", [4], indirect=True)
def test_groups_of_nodes_with_different_numbers_of_ranks_are_refused(ranks, shards, tmp_path):
    ended = run_ranks(ranks, tmp_path, train_on_uneven_nodes, arguments(shards, tmp_path / "run", "eae", "objective.group=node"))
    assert all(code > 0 for code in ended.codes), ended
    assert all("ranks on every machine, but there are 2 on one and 1 on another" in said for said in ended.said), ended.said
