"""How commands start: on the ranks that a launcher names, with what the run's configuration says and nothing else."""

import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from conftest import ROOT, rank_environment
from ranks import run_ranks
from world_cases import run_of

from eae_dist import encode, evaluate, generate, neighbors, serve, train
from eae_dist.config import load_config
from eae_dist.distributed import barrier, ending_ranks, rank, subgroup
from eae_dist.distributed import start as starting
from eae_dist.distributed.start import MPI_SIZES, RANK_VARIABLES, Place, Start, met, require_taken, start
from eae_dist.errors import UserError
from eae_dist.inference.judged_checkpoint import evaluation_config
from eae_dist.training.checkpoint import open_checkpoint
from eae_dist.training.loop import train as train_run
from eae_dist.training.setup import how_to_judge, start_accelerator

ALONE = Start("cpu", 600.0, tf32=False, deterministic=False)
PAIR = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29512"}
COMMANDS = {  # every command that starts ranks, with as few arguments as it takes
    train: [],
    evaluate: ["--ckpt", "nowhere"],
    encode: ["--ckpt", "nowhere", "--out", "nowhere"],
    neighbors: ["--latents", "nowhere"],
    generate: ["--ckpt", "nowhere", "nowhere"],
    serve: ["--ckpt", "nowhere"],
}


@pytest.fixture(autouse=True)
def untouched(monkeypatch):
    """A process that nothing has started yet, and whose variables are put back."""
    before = dict(os.environ)
    for name in (*RANK_VARIABLES, *MPI_SIZES):
        monkeypatch.delenv(name, raising=False)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    os.environ.clear()
    os.environ.update(before)
    AcceleratorState._reset_state(reset_partial_state=True)
    start(ALONE)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__.rpartition(".")[2])
@pytest.mark.parametrize(
    "left, said",
    [
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0, but no RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ({"PMI_SIZE": "4"}, "PMI_SIZE=4 in the environment"),
        ({"ACCELERATE_USE_FSDP": "true"}, "ACCELERATE_USE_FSDP=true in the environment"),
    ],
)
def test_what_a_launcher_left_behind_is_named_by_every_command(command, left, said, monkeypatch):
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=f"^error: .*{said}"):
        command.main(COMMANDS[command])


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__.rpartition(".")[2])
def test_every_command_takes_tf32_away_and_the_timeout_of_its_command_line(command, monkeypatch):
    seen = []
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # as torch has it at the start
    monkeypatch.setattr(starting.Place, "of", lambda env: seen.append(torch.backends.cudnn.allow_tf32) or None)
    monkeypatch.setattr(starting, "allow_tf32", lambda allowed: seen.append(allowed))
    with pytest.raises(SystemExit):  # there is no checkpoint
        command.main([*COMMANDS[command], "train.device=cpu", *(["data.root=nowhere"] if command is train else [])])
    assert seen == [True, False]
    assert how_to_judge(["train.timeout=7", "evaluate.batch=8"]) == Start("auto", 7.0, tf32=False, deterministic=False)


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"RANK": None}, "LOCAL_RANK=1, MASTER_ADDR=127.0.0.1, MASTER_PORT=29512, but no RANK"),
        ({"WORLD_SIZE": None, "MASTER_PORT": None}, "but no WORLD_SIZE, MASTER_PORT"),
        ({"RANK": "2"}, "RANK must lie in"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two, LOCAL_RANK=1.*whole numbers"),
    ],
)
def test_variables_of_ranks_that_do_not_fit_together_are_refused_with_their_values(changed, said):
    with pytest.raises(UserError, match=said):
        Place.of({name: value for name, value in (PAIR | changed).items() if value is not None})


def test_complete_variables_are_a_place_and_none_are_a_process_alone():
    assert Place.of(PAIR) == Place(1, 2, 1, "127.0.0.1", 29512)
    assert Place.of({"MASTER_ADDR": "somewhere", "MASTER_PORT": "1", "PMI_SIZE": "1"}) is None


def test_more_ranks_than_gpus_are_refused_by_the_rank_without_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    os.environ.update(PAIR)
    with pytest.raises(UserError, match="rank 1 has no GPU: it is LOCAL_RANK=1 on .* which has 1; start at most 1 ranks"):
        start(Start("auto", 600.0, tf32=False, deterministic=False))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_two_ranks_with_one_gpu_are_refused(monkeypatch):
    place = Place(0, 1, 0, "127.0.0.1", free_port())
    store = met(place, 5.0, "machine/gpu-1")
    with pytest.raises(UserError, match="1 of 1 ranks share a GPU"):
        met(place, 5.0, "machine/gpu-1")
    assert store.add("eae_dist/start/0/came", 0) == 2


def test_ranks_that_do_not_come_are_waited_for_with_a_word_and_until_the_timeout(monkeypatch, capfd):
    monkeypatch.setattr(starting, "TOLD_AFTER", 0.2)
    variables = r"WORLD_SIZE=2, RANK={}, MASTER_ADDR=127.0.0.1, MASTER_PORT=\d+ in the environment"
    with pytest.raises(UserError, match=rf"only 1 of 2 ranks came within 0.5 seconds \({variables.format(0)}\)"):
        met(Place(0, 2, 0, "127.0.0.1", free_port()), 0.5, None)
    with pytest.raises(UserError, match=rf"rank 1 found no rank 0 within 0.5 seconds \({variables.format(1)}\)"):
        met(Place(1, 2, 1, "127.0.0.1", free_port()), 0.5, None)
    said = capfd.readouterr().err.splitlines()
    assert said[0].startswith("waiting for 1 of 2 ranks (WORLD_SIZE=2, RANK=0, MASTER_ADDR=127.0.0.1")
    assert said[1].startswith("waiting for rank 0 of 2 ranks (WORLD_SIZE=2, RANK=1")


def test_port_that_is_in_use_is_named():
    with socket.socket() as busy:
        busy.bind(("", 0))
        busy.listen()
        with pytest.raises(UserError, match=rf"rank 0 cannot listen at MASTER_PORT={busy.getsockname()[1]} .*EADDRINUSE"):
            met(Place(0, 2, 0, "127.0.0.1", busy.getsockname()[1]), 5.0, None)


def timeouts(shards: Path, seconds: float) -> None:
    """Every group's timeout, as torch has it, after a start for training and one more."""

    def told() -> list[timedelta]:
        groups = [dist.distributed_c10d._get_default_group(), subgroup(1, seconds)]
        return [group._get_backend(torch.device("cpu")).options._timeout for group in groups]

    with ending_ranks():
        accelerator = start_accelerator(load_config(run_of(shards, shards.with_name("run"), f"train.timeout={seconds}")).train)
        assert told() == [timedelta(seconds=seconds)] * 2
        start(Start("cpu", 7.0, tf32=False, deterministic=False))
        assert told()[0] == timedelta(seconds=7) and accelerator.num_processes == 2
        barrier()  # rank 0 serves the store, in which the other rank makes its groups
        print(f"rank {rank()} ends well")


@pytest.mark.parametrize("seconds", [600.0, 599.0])  # the first is accelerate's own default
def test_timeout_of_every_group_is_that_of_the_configuration(shards, tmp_path, seconds):
    ended = run_ranks(2, tmp_path, timeouts, shards, seconds)
    assert ended.codes == [0, 0] and "rank 1 ends well" in ended.said[1], ended.said


def losses(shards: Path, run: Path) -> list[float]:
    train_run(load_config(run_of(shards, run, "train.clip_norm=0.01", "train.validate_every=1000000")))
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [line.partition('"loss": ')[2].partition(",")[0] for line in lines]


@pytest.fixture(scope="module")
def losses_without(shards, tmp_path_factory):
    found = losses(shards, tmp_path_factory.mktemp("without") / "run")
    AcceleratorState._reset_state(reset_partial_state=True)
    assert len(found) == 4
    return found


@pytest.mark.parametrize(
    "name, value, decides",
    [
        ("GRADIENT_ACCUMULATION_STEPS", "64", "train.accumulate"),
        ("GRADIENT_CLIPPING", "0.01", "train.clip_norm"),
        ("DYNAMO_BACKEND", "INDUCTOR", "train.compile"),
        ("DYNAMO_BACKEND", "EAGER", "train.compile"),
        ("MIXED_PRECISION", "bf16", "train.precision"),
        ("MIXED_PRECISION", "fp16", "train.precision"),
        ("MIXED_PRECISION", "fp8", "train.precision"),
        ("MIXED_PRECISION", "no", None),
        ("GRADIENT_ACCUMULATION_STEPS", "1", None),
        ("DYNAMO_MODE", "max-autotune", None),
        ("DYNAMO_USE_FULLGRAPH", "true", None),
        ("DOWNCAST_BF16", "true", None),
        ("USE_CPU", "true", None),
    ],
)
def test_settings_of_accelerate_do_not_reach_a_run_and_are_said(
    name, value, decides, losses_without, shards, tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("the run was compiled"))
    assert losses(shards, tmp_path / "run") == losses_without
    said = f"ACCELERATE_{name}={value} of accelerate's settings is not used: {decides} decides"
    assert (said in caplog.text) == (decides is not None)


def test_what_accelerate_takes_otherwise_is_named_and_refused(shards, tmp_path, monkeypatch):
    config = load_config(run_of(shards, tmp_path / "run")).train
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(UserError, match=r"took precision bf16 instead of no; .* ACCELERATE_MIXED_PRECISION=bf16"):
        require_taken({"precision": "no", "ranks": 2}, {"precision": "bf16", "ranks": 2})
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr("eae_dist.training.setup.start", lambda how: torch.device("cuda"))
    with pytest.raises(UserError, match="device cpu instead of cuda"):
        start_accelerator(config)


def test_deepspeed_without_a_launcher_is_refused_by_the_name_of_the_variable(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr("eae_dist.training.engines.find_spec", lambda name: name)
    with pytest.raises(SystemExit, match="^error: ACCELERATE_USE_DEEPSPEED=true asks for DeepSpeed, but no launcher"):
        train.main(run_of(shards, tmp_path / "run"))


def test_evaluation_may_start_otherwise_than_the_training_did(run):
    found = evaluation_config(open_checkpoint(run), ["train.timeout=5", "train.deterministic=true", "train.device=auto"]).train
    assert (found.timeout, found.deterministic, found.device) == (5.0, True, "auto")
    with pytest.raises(ValueError, match=r"train.device, train.timeout, train.deterministic; .*\n  train.seed: 0 -> 5"):
        evaluation_config(open_checkpoint(run), ["train.seed=5"])


def test_rank_of_a_launcher_that_waits_says_so_as_a_process_and_ends():
    """As a user meets it: RANK=0 of 2 in the environment, and nobody else."""
    port = str(free_port())
    variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "eae_dist.evaluate", "--ckpt", "nowhere", "train.timeout=6"]
    done = subprocess.run(command, env=rank_environment() | variables, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    waiting, error = done.stderr.splitlines()
    assert waiting.startswith("waiting for 1 of 2 ranks (WORLD_SIZE=2, RANK=0, MASTER_ADDR=127.0.0.1")
    assert error.startswith("error: only 1 of 2 ranks came within 6 seconds")
