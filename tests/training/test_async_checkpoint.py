"""Checkpoints that are written while training goes on: with writes that are held, killed or refused while steps are taken."""

import errno
import json
import logging
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import save_file
from world_cases import BATCH

from eae_dist.config import Config, load_config
from eae_dist.distributed import ending_ranks, rank, world_size
from eae_dist.training import checkpoint as checkpoints
from eae_dist.training import loop as training
from eae_dist.training import metrics_log
from eae_dist.training.async_checkpoint import AsyncCheckpoints
from eae_dist.training.checkpoint import open_checkpoint

STEPS, SAVES = 8, (3, 6, 8)  # length of the runs, and the steps of their checkpoints
RANKS = (1, 2)


def bits(value):
    """The value with its tensors as their bytes."""
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, list):
        return [bits(item) for item in value]
    return (value.dtype, value.shape, value.numpy().tobytes()) if isinstance(value, torch.Tensor) else value


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# One rank's saves by themselves.


@pytest.fixture
def model() -> tuple[torch.nn.Module, torch.optim.Adam]:
    model = torch.nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters())
    step_on(model, optimizer)
    return model, optimizer


def step_on(model: torch.nn.Module, optimizer: torch.optim.Adam) -> None:
    optimizer.zero_grad()
    model(torch.ones(2, 3, 4, 4)).square().sum().backward()
    optimizer.step()


def start(saves: AsyncCheckpoints, model: torch.nn.Module, optimizer: torch.optim.Adam, step: int, best: int = 0, **more) -> None:
    saves.start(model.state_dict(), optimizer.state_dict(), {"step": step, "best_step": best, "list": [step]}, **more)


def test_what_is_written_are_the_bits_of_its_step_though_the_next_changes_all_of_them(tmp_path, model, monkeypatch):
    """Every write begins only when the next save is waiting for it."""
    waits = [threading.Event() for _ in range(4)]
    waiting, awaited, wait, expected = iter(waits), iter(waits[1:]), AsyncCheckpoints.wait, {}
    monkeypatch.setattr(AsyncCheckpoints, "wait", lambda saves: (next(waiting).set(), wait(saves)))
    monkeypatch.setattr(checkpoints, "save_file", lambda *file: (next(awaited).wait(20), save_file(*file)))
    with AsyncCheckpoints(tmp_path, load_config(["train.keep=9"])) as saves:
        for step in (1, 2, 3):
            start(saves, *model, step)
            expected[step] = bits(model[0].state_dict()), bits(model[1].state_dict())
            step_on(*model)
        saves.wait()
    assert len({str(state) for state in expected.values()}) == 3
    for step, state in expected.items():
        found = open_checkpoint(tmp_path / "checkpoints" / f"step-{step:08d}")
        assert (bits(found.model_state()), bits(found.optimizer_state())) == state
        assert found.state["list"] == [step]


def test_state_that_is_a_copy_is_not_copied_again(tmp_path, model, monkeypatch):
    given, written = model[1].state_dict(), []
    monkeypatch.setattr(checkpoints, "save", lambda *arguments: written.append(arguments))
    with AsyncCheckpoints(tmp_path, Config()) as saves:
        for copied in (True, False):
            saves.start(model[0].state_dict(), given, {"step": 1, "best_step": 0}, copied=copied)
    assert [optimizer_state is given for _, _, _, optimizer_state, _ in written] == [True, False]
    (_, _, first, _, _), (_, _, second, _, _) = written
    memory = model[0].weight.data_ptr(), first["weight"].data_ptr(), second["weight"].data_ptr()
    assert memory[0] != memory[1] == memory[2]


def test_best_and_the_last_are_kept_in_the_order_of_the_saves(tmp_path, model):
    with AsyncCheckpoints(tmp_path, load_config(["train.keep=1"])) as saves:
        for step, best in ((1, 1), (2, 2), (3, 2), (4, 2)):
            start(saves, *model, step, best)
        assert saves.last().name == "step-00000004"
    assert set(os.listdir(tmp_path / "checkpoints")) == {"step-00000002", "step-00000004", "best", "latest"}
    assert os.readlink(tmp_path / "checkpoints" / "best") == "step-00000002"


def test_failure_is_raised_at_whatever_is_asked_next(tmp_path, model, monkeypatch):
    asked: list[Callable] = [AsyncCheckpoints.wait, AsyncCheckpoints.raise_failure, lambda saves: start(saves, *model, 3)]
    for ask in asked:
        saves = AsyncCheckpoints(tmp_path, Config())
        start(saves, *model, 1)
        saves.wait()
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, "save_file", full)
            start(saves, *model, 2)
            assert saves.last().name == "step-00000001"  # and it has ended
        with pytest.raises(
            OSError, match="step-00000002 could not be written: .*No space left.*; earlier checkpoints are intact"
        ):
            ask(saves)


def test_failure_is_said_behind_another_error_and_not_twice(tmp_path, model, monkeypatch, caplog):
    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(KeyError), AsyncCheckpoints(tmp_path, Config()) as saves:
        start(saves, *model, 1)
        raise KeyError
    assert caplog.text.count("step-00000001 could not be written") == 1
    caplog.clear()
    with pytest.raises(OSError), AsyncCheckpoints(tmp_path, Config()) as saves:
        start(saves, *model, 1)
        saves.wait()
    assert not caplog.text


# Whole runs. A work function prepares its process, and trains.


def trained(ranks: int, shards: Path, folder: Path, prepare: Callable):
    """How a run in folder/run ended."""
    words = [
        f"data.root={shards}",
        f"train.output={folder / 'run'}",
        f"train.global_batch={BATCH}",
        f"train.epochs={STEPS * BATCH / 150}",
        f"train.save_every={SAVES[0] * BATCH}",
        f"train.log_every={BATCH}",
        "train.validate_every=1000000",
        "train.sample_every=1000000",
        "train.trackers=[]",
        "train.device=cpu",
        "train.timeout=20",
        "train.learning_rate=1e-3",
        "model.width=4",
        "model.latent_dim=5",
    ]
    return run_ranks(ranks, folder / "logs", prepared, prepare, words)


def prepared(prepare: Callable, words: list[str]) -> None:
    with ending_ranks():
        config = load_config(words)
        prepare(Path(config.train.output))
        training.train(config)


def note(run: Path, what) -> None:
    with open(run.with_name("notes"), "a") as file:
        file.write(json.dumps(what) + "\n")


def notes(folder: Path) -> list:
    return [json.loads(line) for line in (folder / "notes").read_text().splitlines()]


def at_once(run: Path) -> None:
    """Every save ends before training goes on."""
    started = AsyncCheckpoints.start

    def start(saves: AsyncCheckpoints, *state, **more) -> None:
        started(saves, *state, **more)
        saves.last()

    AsyncCheckpoints.start = start


def held(run: Path, ahead: int = 1, then: Callable[[int], None] = lambda saved: None) -> None:
    """A checkpoint is half written until training is `ahead` steps further or waits for it; notes its step and training's.

    then: what is done with the saved step at that moment. When the last message is said, `latest` is noted.
    """
    condition, progress = threading.Condition(), {"step": 0, "waits": False}

    def advance(**now) -> None:
        with condition:
            progress.update(now)
            condition.notify_all()

    step, wait, save = training.training_step, AsyncCheckpoints.wait, checkpoints.save

    def counted(*arguments):
        result = step(*arguments)
        advance(step=progress["step"] + 1)
        return result

    def waited(saves: AsyncCheckpoints) -> None:
        advance(waits=True)
        wait(saves)
        advance(waits=False)

    def slow(run: Path, config: Config, model_state: dict, optimizer_state: dict, state: dict) -> None:
        def save_when_ahead(tensors: dict, path: Path) -> None:
            path.write_bytes(b"\0" * 100)
            with condition:
                assert condition.wait_for(lambda: progress["waits"] or progress["step"] >= state["step"] + ahead, 15)
                note(run, [state["step"], progress["step"]])
            then(state["step"])
            save_file(tensors, path)

        checkpoints.save_file = save_when_ahead
        save(run, config, model_state, optimizer_state, state)

    class Said(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "checkpoints/latest" in record.getMessage():
                note(run, os.readlink(run / "checkpoints" / "latest"))

    training.training_step, AsyncCheckpoints.wait, checkpoints.save = counted, waited, slow
    logging.getLogger("eae_dist").addHandler(Said())


@pytest.fixture(scope="module", params=RANKS)
def ranks(request) -> int:
    return request.param


@pytest.fixture(scope="module")
def undisturbed(ranks, shards, tmp_path_factory) -> Path:
    """A run that waits for every save."""
    folder = tmp_path_factory.mktemp("undisturbed")
    ended = trained(ranks, shards, folder, at_once)
    assert ended.codes == [0] * ranks, ended.said
    return folder / "run"


def states(run: Path, *steps: int) -> list:
    found = [open_checkpoint(run / "checkpoints" / f"step-{step:08d}") for step in steps]
    return [(bits(checkpoint.model_state()), bits(checkpoint.optimizer_state())) for checkpoint in found]


def logged(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_training_goes_on_while_checkpoints_are_written_and_its_end_waits(ranks, undisturbed, shards, tmp_path):
    ended = trained(ranks, shards, tmp_path, held)
    assert ended.codes == [0] * ranks and "finished" in ended.said[0], ended.said
    *written, latest = notes(tmp_path)
    assert [saved for saved, _ in written] == list(SAVES) and latest == "step-00000008"
    assert [reached > saved for saved, reached in written] == [True, True, False]
    assert states(tmp_path / "run", *SAVES) == states(undisturbed, *SAVES)


def stopped(run: Path) -> None:
    """A signal to the last rank in step 5."""
    held(run)
    step, taken = training.training_step, []

    def signalled(*arguments):
        taken.append(1)
        if len(taken) == 5 and rank() == world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments)

    training.training_step = signalled


def test_signal_is_answered_when_the_checkpoint_is_written(ranks, shards, tmp_path):
    ended = trained(ranks, shards, tmp_path, stopped)
    assert ended.codes == [0] * ranks and "stopped by a signal" in ended.said[0], ended.said
    assert notes(tmp_path)[1:] == [[6, 6], "step-00000006"]


def killed_while_writing(run: Path) -> None:
    """Rank 0, while it writes the second checkpoint and has logged a step beyond."""
    held(run, ahead=2, then=lambda saved: os.kill(os.getpid(), signal.SIGKILL) if saved == 6 else None)


def test_kill_while_a_checkpoint_is_written_leaves_the_one_before_from_which_the_run_goes_on(
    ranks, undisturbed, shards, tmp_path
):
    run = tmp_path / "run"
    ended = trained(ranks, shards, tmp_path, killed_while_writing)
    assert ended.codes[0] == -signal.SIGKILL and all(code > 0 for code in ended.codes[1:]), ended
    assert (run / "checkpoints" / ".step-00000006.partial" / "model.safetensors").stat().st_size == 100
    assert open_checkpoint(run).state["step"] == 3 and max(logged(run)) >= 7
    ended = trained(ranks, shards, tmp_path, at_once)
    assert ended.codes == [0] * ranks and f"steps 3 to {STEPS}" in ended.said[0], ended.said
    assert logged(run) == list(range(1, STEPS + 1))
    assert states(run, *SAVES) == states(undisturbed, *SAVES)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best", "latest", *(f"step-{step:08d}" for step in SAVES)}


def full_disk(run: Path, saved: int) -> None:
    at_once(run)
    checkpoints.save_file = lambda tensors, path: (full if f"{saved:08d}" in str(path) else save_file)(tensors, path)


def full_at_the_second(run: Path) -> None:
    full_disk(run, 6)


def full_at_the_last(run: Path) -> None:
    full_disk(run, 8)


@pytest.mark.parametrize(("prepare", "saved", "left"), [(full_at_the_second, 6, 3), (full_at_the_last, 8, 6)])
def test_checkpoint_that_cannot_be_written_ends_all_ranks_before_the_next_line_of_the_log(
    ranks, shards, tmp_path, prepare, saved, left
):
    ended = trained(ranks, shards, tmp_path, prepare)
    assert all(code == 1 for code in ended.codes), ended
    assert f"step-{saved:08d} could not be written: [Errno 28] No space left" in ended.said[0], ended.said
    assert "error" in ended.said[0] and not any("error" in said or "failed" in said for said in ended.said[1:]), ended.said
    assert not any("finished" in said for said in ended.said)
    assert logged(tmp_path / "run")[-1] == saved and open_checkpoint(tmp_path / "run").state["step"] == left


def metrics_on_a_full_disk(run: Path) -> None:
    """From the second line on."""
    write = metrics_log.MetricsLog.write

    def refused(log, record: dict) -> None:
        write(log, record)
        if rank() == 0:
            log.path = Path("/dev/full")

    metrics_log.MetricsLog.write = refused


def test_log_that_cannot_be_written_ends_all_ranks(ranks, shards, tmp_path):
    ended = trained(ranks, shards, tmp_path, metrics_on_a_full_disk)
    assert all(code == 1 for code in ended.codes), ended
    assert "/dev/full could not be written: No space left" in ended.said[0], ended.said
    assert not any("failed" in said for said in ended.said), ended.said
