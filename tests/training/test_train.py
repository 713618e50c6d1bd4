"""Whole runs: through the launchers with processes that are killed, and in this process for what a user can get wrong."""

import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import ROOT, rank_environment
from safetensors.torch import load_file

from eae_dist.config import load_config, override, read_config
from eae_dist.data.stream import walk
from eae_dist.distributed.waits import Stopwatch
from eae_dist.losses.entropy import gaussian_reference
from eae_dist.train import main
from eae_dist.training.setup import check_neighbors, entropy_reference, open_stream
from eae_dist.training.step_times import StepTimes

BATCH = 26
STEPS = 14


def settings(shards: Path, run: Path, *more: str) -> list[str]:
    return [
        f"data.root={shards}",
        f"train.output={run}",
        f"train.global_batch={BATCH}",
        f"train.epochs={STEPS * BATCH / 150}",
        f"train.save_every={5 * BATCH}",
        f"train.log_every={2 * BATCH}",
        "train.device=cpu",
        "train.timeout=60",
        "train.learning_rate=1e-3",
        "model.width=4",
        "model.latent_dim=5",
        *more,
    ]


def launch(shards: Path, run: Path, mark: Path, *more: str, **sabotage: str) -> subprocess.CompletedProcess:
    """Two ranks under accelerate, as the README says it, with an encoder that can break the run in step 7."""
    accelerate = [str(Path(sys.executable).parent / "accelerate"), "launch", "--config_file", "launch/cpu.yaml"]
    command = [*accelerate, "-m", "eae_dist.train", *settings(shards, run, "model.encoder=saboteur:KillingEncoder", *more)]
    environment = rank_environment() | {"SABOTEUR_MARK": str(mark)} | sabotage
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / "latest" / "model.safetensors")


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def state_of(run: Path) -> dict:
    return json.loads((run / "checkpoints" / "latest" / "state.json").read_text())


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory):
    """The run that nobody breaks: its folder and what it printed."""
    run, mark = tmp_path_factory.mktemp("undisturbed") / "run", tmp_path_factory.mktemp("mark") / "mark"
    mark.touch()
    done = launch(shards, run, mark)
    assert done.returncode == 0, done.stderr[-4000:]
    return run, done


def test_run_prints_what_it_does_and_where_the_results_lie(undisturbed):
    run, done = undisturbed
    assert "eae on shards: 150 images 1x16x16" in done.stderr and "over 2 rank(s)" in done.stderr
    assert f"finished {run}" in done.stderr
    assert (run / "checkpoints" / "latest").resolve().name == f"step-{STEPS:08d}"


def test_every_logged_line_carries_the_promised_terms_and_the_clock_of_images(undisturbed):
    run, _ = undisturbed
    lines = records(run)
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps)) and steps[-1] == STEPS
    for line in lines:
        assert line["images"] == line["step"] * BATCH
        terms = {"loss", "reconstruction", "reconstruction_per_pixel", "entropy", "entropy_gaussian_reference", "floored_pairs"}
        assert terms | {"learning_rate", "gradient_norm", "images_per_second", "peak_memory_mib", "epoch"} <= line.keys()
        assert line["reconstruction"] == pytest.approx(256 * line["reconstruction_per_pixel"])
        speeds, readings, waits = (line[f"rank_{name}"] for name in ("images_per_second", "data_wait", "communication_wait"))
        assert len(speeds) == len(readings) == len(waits) == 2 and line["straggler_spread"] >= 0
        # A step of 13 rows a rank takes what its own work, reading and waiting take, the last two of which are not nothing.
        step_seconds = BATCH / line["images_per_second"]
        for speed, reading, wait in zip(speeds, readings, waits, strict=True):
            assert min(speed, reading, wait) > 0 and 13 / speed + reading + wait < 1.5 * step_seconds
    validated = {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}
    for line in (
        line for line in lines if line["step"] in validated
    ):  # the mean of logarithms is at most the logarithm of the mean
        assert line["validation_psnr"] >= -10 * math.log10(line["validation_reconstruction_per_pixel"])
        assert -1 < line["validation_ssim"] < 1
    best = (run / "checkpoints" / "best").resolve().name
    assert len(validated) > 1 and best == f"step-{min(validated, key=validated.get):08d}"
    rates = {line["epoch"] // 1: line["learning_rate"] for line in lines if line["epoch"] % 1 > 0.2}
    assert rates[1] == pytest.approx(rates[0] * 0.98)


def test_grids_come_every_epoch_and_at_the_end(undisturbed):
    run, _ = undisturbed
    names = sorted(path.name for path in (run / "samples").iterdir())
    grids = ("interpolations", "reconstructions", "samples")
    assert names == [f"step-{step:08d}-{grid}.png" for step in (6, 12, STEPS) for grid in grids]


@pytest.mark.slow
def test_run_with_a_killed_rank_and_a_terminated_launcher_ends_with_the_bits_of_one_without(undisturbed, shards, tmp_path):
    run, killed, terminated = (tmp_path / name for name in ("run", "killed", "terminated"))
    broken = launch(shards, run, killed, SABOTEUR_SIGNAL="SIGKILL", SABOTEUR_AWAITS=str(run / "checkpoints" / "best"))
    assert broken.returncode != 0 and killed.exists()
    assert (run / "checkpoints" / "latest").resolve().name == "step-00000006"  # the best after the first epoch

    # With loader workers: torchrun signals them too, and they must outlive the step in which the run saves.
    sabotage = {"SABOTEUR_SIGNAL": "SIGTERM", "SABOTEUR_TARGET": "launcher", "SABOTEUR_STEP": "2"}
    stopped = launch(shards, run, terminated, "data.workers=1", **sabotage)
    assert "steps 6 to 14" in stopped.stderr and f"saved in {run}/checkpoints/latest" in stopped.stderr, stopped.stderr[-4000:]
    step = int((run / "checkpoints" / "latest").resolve().name.removeprefix("step-"))
    assert 8 <= step < STEPS

    resumed = launch(shards, run, terminated)
    assert resumed.returncode == 0 and f"steps {step} to 14" in resumed.stderr, resumed.stderr[-4000:]
    expected, found = weights(undisturbed[0]), weights(run)
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    steps = [line["step"] for line in records(run)]
    assert steps == sorted(set(steps))


def test_plain_launch_without_gpu_runs_one_rank_says_how_to_get_two_and_ends_with_its_launcher(shards, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("torch sees a GPU here: a plain launch uses it")
    command = [str(Path(sys.executable).parent / "accelerate"), "launch", "-m", "eae_dist.train"]
    # Without a user's own default configuration of accelerate.
    sabotage = {"SABOTEUR_MARK": str(tmp_path / "mark"), "SABOTEUR_SIGNAL": "SIGTERM", "SABOTEUR_TARGET": "launcher"}
    environment = rank_environment() | sabotage | {"HF_HOME": str(tmp_path / "home")}
    run = tmp_path / "run"
    arguments = settings(shards, run, "train.device=auto", "model.encoder=saboteur:KillingEncoder")
    # accelerate passes no signal on to a single rank; what that rank prints ends with it.
    done = subprocess.run([*command, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == -signal.SIGTERM, done.stderr[-4000:]
    assert "over 1 rank(s)" in done.stderr and "torchrun --nproc-per-node 2" in done.stderr
    assert f"saved in {run}/checkpoints/latest" in done.stderr, done.stderr[-4000:]
    assert 7 <= int((run / "checkpoints" / "latest").resolve().name.removeprefix("step-")) < STEPS


# In this process, one rank.


def run_in_process(*arguments: str) -> None:
    environment = dict(os.environ)
    AcceleratorState._reset_state(reset_partial_state=True)  # its precision is that of the process
    try:
        main(list(arguments))
    finally:
        os.environ.clear()
        os.environ.update(environment)


@pytest.fixture(scope="module")
def finished(shards, tmp_path_factory):
    """A short finished run of one rank."""
    run = tmp_path_factory.mktemp("finished") / "run"
    run_in_process(*settings(shards, run))
    return run


def test_finished_run_says_so_and_ends_well(finished, shards, caplog):
    caplog.set_level("INFO", "eae_dist")
    before = weights(finished)
    before_settings = (finished / "config.yaml").read_bytes()
    run_in_process(*settings(shards, finished, "train.epochs=1"))
    # 364 images of 150: fewer epochs than it has would not go on, nor would the same.
    assert re.search(r"is finished: 364 images; raise train.epochs=\S+ above 2.43 to go on", caplog.text)
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(finished).items())
    assert (finished / "config.yaml").read_bytes() == before_settings


def test_longer_run_continues_and_says_what_changed(finished, shards, tmp_path, caplog):
    caplog.set_level("INFO", "eae_dist")
    run = shutil.copytree(finished, tmp_path / "run", symlinks=True)
    run_in_process(*settings(shards, run, f"train.epochs={(STEPS + 3) * BATCH / 150}", "data.workers=1"))
    assert "data.workers: 0 -> 1" in caplog.text and "steps 14 to 17" in caplog.text
    assert records(run)[-1]["step"] == STEPS + 3
    assert read_config(run / "config.yaml").data.workers == 1


def test_damaged_checkpoint_is_said_and_the_one_before_it_used(finished, shards, tmp_path, caplog):
    caplog.set_level("INFO", "eae_dist")
    run = shutil.copytree(finished, tmp_path / "run", symlinks=True)
    with open(run / "checkpoints" / "latest" / "model.safetensors", "r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"\x00\x01\x02")
    run_in_process(*settings(shards, run))
    assert "model.safetensors does not match its checksum; going back" in caplog.text
    assert "steps 12 to 14" in caplog.text
    assert all(torch.equal(tensor, weights(finished)[name]) for name, tensor in weights(run).items())


def test_plateau_schedule_lowers_the_learning_rate_when_validation_stands_still(shards, tmp_path):
    more = ("train.schedule=plateau", "train.plateau_patience=1", f"train.validate_every={BATCH}", "train.epochs=1.2")
    # A learning rate too small to move anything: every validation is as good as the first. The loss is negative.
    still = ("train.learning_rate=1e-6", "model.norm_momentum=1e-9", "objective.entropy_weight=-1")
    run_in_process(*settings(shards, tmp_path / "run", *more, *still))
    assert records(tmp_path / "run")[-1]["validation_loss"] < 0
    rates = {line["step"]: line["learning_rate"] for line in records(tmp_path / "run")}
    # The second validation, after step 2, is the first without improvement, and patience is 1.
    assert (rates[1], rates[2], rates[3]) == (1e-6, 1e-6, 0.5e-6)


def test_validation_that_a_stop_left_out_is_made_up_for_at_the_next_start(shards, tmp_path):
    more = ("train.schedule=plateau", "train.plateau_patience=1", f"train.validate_every={8 * BATCH}", "train.learning_rate=1")
    more = (*more, f"train.sample_every={8 * BATCH}")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run_in_process(*settings(shards, whole, *more))
    mark = {"SABOTEUR_MARK": str(tmp_path / "mark"), "SABOTEUR_SIGNAL": "SIGTERM"}
    arguments = settings(shards, stopped, *more, "model.encoder=saboteur:KillingEncoder")
    with pytest.MonkeyPatch.context() as environment:
        for name, value in mark.items():
            environment.setenv(name, value)
        run_in_process(*arguments)  # signalled in step 7: it stops after step 8, where a validation and grids are due
        assert records(stopped)[-1]["step"] < 8 and "unfinished" in state_of(stopped)
        assert not list((stopped / "samples").glob("step-00000008-*"))
        run_in_process(*arguments)
    assert [(line["step"], line.get("validation_loss"), line["learning_rate"]) for line in records(stopped)] == [
        (line["step"], line.get("validation_loss"), line["learning_rate"]) for line in records(whole)
    ]
    assert all(torch.equal(weights(whole)[name], tensor) for name, tensor in weights(stopped).items())
    assert state_of(stopped)["best_step"] == state_of(whole)["best_step"] and not state_of(stopped)["unfinished"]
    assert list((stopped / "samples").glob("step-00000008-*"))


def test_stop_waits_for_no_more_than_a_block_of_a_validation(shards, tmp_path, monkeypatch):
    blocks = []

    def walked(*arguments, **options):
        for batch in walk(*arguments, **options):
            if options.get("count"):  # the validation's, not the pictures'
                blocks.append(len(batch["number"]))
                if len(blocks) == 2:
                    os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr("eae_dist.training.validation.walk", walked)
    arguments = settings(shards, tmp_path / "run", f"train.validate_every={4 * BATCH}", "evaluate.batch=8")
    run_in_process(*arguments)
    assert blocks == [8, 8] and state_of(tmp_path / "run")["step"] == 4
    assert state_of(tmp_path / "run")["unfinished"]["due"] == ["log", "save", "validate"]
    run_in_process(*arguments)
    assert blocks[2:] == [8] * 5 * 4  # of steps 4, 8, 12 and 14
    assert [line["step"] for line in records(tmp_path / "run") if "validation_loss" in line] == [4, 8, 12, 14]


def test_schedule_best_and_random_layers_go_on_where_they_were(shards, tmp_path, monkeypatch):
    more = ("train.schedule=plateau", "train.plateau_patience=3", f"train.validate_every={2 * BATCH}")

    def trained(run: Path, *ends: int) -> Path:
        losses = iter([3.0, 1.0, 2.0, 2.0, 1.5, 1.2])
        monkeypatch.setattr("eae_dist.training.run.validate", lambda *_: {"loss": next(losses)})
        for end in ends:
            length = f"train.epochs={end * BATCH / 150}"
            run_in_process(*settings(shards, run, *more, length, "model.encoder=saboteur:DroppingEncoder"))
        return run

    whole, parted = trained(tmp_path / "whole", 12), trained(tmp_path / "parted", 6, 12)
    for run in (whole, parted):
        # The second validation is the best, and the third in a row without improvement halves the rate after step 10.
        rates = {line["step"]: line["learning_rate"] for line in records(run)}
        assert rates[8] == rates[10] == 1e-3 and rates[12] == 5e-4
        assert state_of(run)["best_step"] == 4
    assert all(torch.equal(weights(whole)[name], tensor) for name, tensor in weights(parted).items())


@pytest.mark.parametrize(("name", "map_dim", "d"), [("eae", "null", 5), ("eae_linear", "null", 5), ("eae_linear", "3", 3)])
def test_reference_is_of_as_many_draws_in_as_many_dimensions_as_the_entropy(shards, name, map_dim, d):
    words = [f"objective.name={name}", f"objective.map_dim={map_dim}", "objective.k=2", "train.seed=4"]
    found = entropy_reference(load_config(settings(shards, Path("run"), *words)), torch.device("cpu"))
    assert found == gaussian_reference(BATCH, d, k=2, average_k=False, eps2=1e-4, seed=4)


def test_clipping_bounds_the_gradient_and_logs_its_norm_before(shards, tmp_path):
    run_in_process(*settings(shards, tmp_path / "run", "train.clip_norm=1e-6", "train.epochs=0.4"))
    assert records(tmp_path / "run")[-1]["gradient_norm"] > 1e-3
    optimizer = torch.load(tmp_path / "run" / "checkpoints" / "latest" / "optimizer.pt", weights_only=True)
    mean = torch.cat([moments["exp_avg"].flatten() for moments in optimizer["state"].values()])
    assert 0 < mean.norm() <= 1e-6  # Adam's: a mean of gradients that are no longer than that


def test_accumulation_says_what_entropy_and_norms_see(shards, tmp_path, caplog):
    caplog.set_level("INFO", "eae_dist")
    run_in_process(*settings(shards, tmp_path / "run", "train.accumulate=2", "train.epochs=0.4"))
    assert "latent norm, entropy and MMD are those of all 26 images" in caplog.text
    assert "batch norms inside the networks see 13 to 13 at a time" in caplog.text


def test_bf16_trains_with_float32_entropy(shards, tmp_path):
    run_in_process(*settings(shards, tmp_path / "run", "train.precision=bf16", "train.epochs=0.4"))
    assert records(tmp_path / "run")[-1]["entropy"] == pytest.approx(6.5, abs=2)


def test_worse_validations_leave_the_best_checkpoint_where_it_is(shards, tmp_path, monkeypatch):
    run, losses = tmp_path / "run", [3.0, 1.0, 2.0, 1.5, 1.0, 4.0, 5.0]
    left = iter(losses)
    monkeypatch.setattr("eae_dist.training.run.validate", lambda *_: {"loss": next(left)})
    run_in_process(*settings(shards, run, f"train.validate_every={2 * BATCH}", "train.keep=1"))
    assert [line["validation_loss"] for line in records(run) if "validation_loss" in line] == losses
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-00000004", f"step-{STEPS:08d}", "best", "latest"}
    assert (run / "checkpoints" / "best").resolve().name == "step-00000004"


def test_validation_that_is_not_a_number_ends_the_run_and_leaves_the_checkpoint_before(shards, tmp_path, monkeypatch):
    run, losses = tmp_path / "run", iter([1.0, float("nan")])
    monkeypatch.setattr("eae_dist.training.run.validate", lambda *_: {"loss": next(losses)})
    with pytest.raises(SystemExit, match=r"validation_loss is nan at step 4; the last good checkpoint is .*step-00000002"):
        run_in_process(*settings(shards, run, f"train.validate_every={2 * BATCH}"))
    assert state_of(run)["step"] == 2 and records(run)[-1]["validation_loss"] == 1


def test_trace_is_written_of_as_many_steps_as_asked_for(shards, tmp_path):
    run_in_process(*settings(shards, tmp_path / "run", "train.profile=2", "train.epochs=1.2"))
    events = json.loads((tmp_path / "run" / "profile" / "rank-0.json").read_text())["traceEvents"]
    assert {event["name"] for event in events if event["name"].startswith("ProfilerStep")} == {"ProfilerStep#3", "ProfilerStep#4"}
    assert any("convolution" in event["name"] for event in events)


def test_time_of_a_step_is_divided_into_reading_waiting_and_own_work(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr("eae_dist.distributed.waits.time.perf_counter", lambda: float(next(clock)))
    waits = Stopwatch()
    times = StepTimes(26, waits, torch.nn.Identity())
    for _ in range(2):
        with times.step():  # 1 second until reading begins, 1 of reading, 1 until waiting, 1 of waiting, 1 until the end
            with times.reading():
                pass
            with waits.running():
                pass
    record = times.record()
    assert record["rank_data_wait"] == [1.0] and record["rank_communication_wait"] == [1.0]
    assert record["rank_images_per_second"] == [26 / 3] and record["straggler_spread"] == 0
    assert times.record()["rank_data_wait"] == [0.0]


def test_training_without_validation_split(shards, tmp_path):
    run_in_process(*settings(shards, tmp_path / "run", "data.validation=null", "train.epochs=0.4"))
    assert not any("validation_loss" in line for line in records(tmp_path / "run"))


@pytest.mark.parametrize("name", ["eae_linear", "ae"])
def test_every_objective_runs_from_the_command_line(shards, tmp_path, name):
    run_in_process(*settings(shards, tmp_path / "run", f"objective.name={name}", "train.epochs=0.4"))
    assert ("entropy" in records(tmp_path / "run")[-1]) == (name != "ae")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("train.sead=1", "unknown key train.sead; did you mean train.seed?"),
        ("train.seed=one", "train.seed=one: .*could not be converted"),
        ("data.root=/nowhere", "data.root=/nowhere does not exist; make shards with"),
        ("data.split=trian", "no split 'trian'; it has test, train, validation"),
        ("data.validation=valid", r"no split 'valid'; it has .*; change data.validation \(null: none\)"),
        ("train.global_batch=200", "batch of 200 needs at least as many samples, the split has 150"),
        ("objective.k=26", "objective.k=26 needs more than 26 rows"),
        ("objective.group=nodes", "objective.group=nodes is neither node nor a number of ranks"),
        ("objective.name=vea", "objective.name=vea is unknown; it is one of vae, cv_vae"),
        ("model.network=big", "model.network=big is unknown; it is one of small"),
        ("model.encoder=nowhere:Encoder", "model.encoder=nowhere:Encoder cannot be imported"),
        ("objective.map_dim=9 objective.name=eae_linear", "objective.map_dim=9 must be at most model.latent_dim=5"),
        ("train.precision=fp16", "train.precision=fp16 needs a GPU"),
        ("train.output=/proc/run", "train.output=/proc/run cannot be written"),
        ("data.lanes=7", "data.lanes=7 must divide train.global_batch=26"),
        ("objective.name=wae train.validation_images=1", "its 1 images .* fewer than the 2 that the loss"),
        (
            "objective.k=9 train.validation_images=9",
            "data.validation=validation: its 9 images .* fewer than the 10 that the loss",
        ),
    ],
)
def test_wrong_input_is_one_line_that_says_what_to_change(shards, tmp_path, capsys, wrong, message):
    with pytest.raises(SystemExit) as stop:
        run_in_process(*settings(shards, tmp_path / "run", *wrong.split()))
    assert re.search(message, str(stop.value)), stop.value
    assert str(stop.value).startswith("error: ")


def test_neighbor_that_a_batch_of_two_passes_does_not_have_is_refused_at_the_start(shards):
    config = load_config([f"data.root={shards}", "train.global_batch=100", "train.epochs=4", "data.validation=null"])
    stream = open_stream(config)
    steps = zip(range(6), stream, strict=False)
    fewest = min(int(batch["first"].sum()) for _, batch in steps)
    assert 50 < fewest < 100
    check_neighbors(stream, override(config, [f"objective.k={fewest - 1}"]))
    with pytest.raises(ValueError, match=rf"objective.k={fewest} needs .* where two passes .* meet, one has {fewest}; lower"):
        check_neighbors(stream, override(config, [f"objective.k={fewest}"]))


def test_restarts_in_a_store_that_is_kept_are_refused(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(SystemExit, match="set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun"):
        run_in_process(*settings(shards, tmp_path / "run"))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    run_in_process(*settings(shards, tmp_path / "run", "train.epochs=0.4"))


def test_changed_setting_on_the_same_run_folder_is_an_error_that_shows_the_difference(finished, shards):
    with pytest.raises(SystemExit, match=r"(?s)other settings.*objective.k: 1 -> 2.*train.learning_rate: 0.001 -> 0.1"):
        run_in_process(*settings(shards, finished, "objective.k=2", "train.learning_rate=0.1"))
