"""What the user reads last, when a launcher has added its own traceback to the error of a rank."""

import subprocess
import sys

import pytest
from conftest import ROOT, rank_environment

from eae_dist.training.launcher_defaults import note_on_defaults

LAUNCHERS = {
    "accelerate": ("accelerate.commands.launch", "--cpu", "--num_processes=1"),
    "accelerate, 2 ranks": ("accelerate.commands.launch", "--config_file", "launch/cpu.yaml"),
    "torchrun": ("torch.distributed.run", "--standalone", "--nproc-per-node=2"),
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_error_of_a_rank_is_the_last_that_is_said(tmp_path, launcher):
    command = [sys.executable, "-m", *LAUNCHERS[launcher], "-m", "eae_dist.train", f"data.root={tmp_path}/absent"]
    command += ["train.device=cpu", f"train.output={tmp_path}/run"]
    ended = subprocess.run(command, env=rank_environment(), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode != 0
    *_, last = ended.stderr.splitlines()
    assert last.startswith("error") and f"data.root={tmp_path}/absent does not exist" in last, ended.stderr


def test_error_without_a_launcher_is_said_once(tmp_path):
    command = [sys.executable, "-m", "eae_dist.train", f"data.root={tmp_path}/absent", "train.device=cpu"]
    ended = subprocess.run(command, env=rank_environment(), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 1 and ended.stderr.count("does not exist") == 1 and ended.stderr.count("\n") == 1


LAUNCHED = {"ACCELERATE_DYNAMO_BACKEND": "NO"}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("gpu_ids: 0,1\nnum_processes: 4\n", "num_processes: 4, gpu_ids: 0,1; remove the file"),
        ("distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 2}\n", "distributed_type: DEEPSPEED, deepspeed_config: "),
        ("mixed_precision: fp16\ndynamo_config: {dynamo_backend: INDUCTOR}\n", None),
        ("num_machines: 2\n", "num_machines: 2"),
        ("use_cpu: true\n", "use_cpu: True"),
        ("{", "cannot be read"),
        ("mixed_precision: 'no'\nnum_machines: 1\ndistributed_type: MULTI_GPU\nuse_cpu: false\nmachine_rank: 0\n", None),
        ("mixed_precision: no\nfsdp_config: {}\n", None),
        ("", None),
        ("- 1\n", None),
    ],
)
def test_default_configuration_of_accelerate_that_changes_a_run_is_named(tmp_path, text, told):
    (file := tmp_path / "default_config.yaml").write_text(text)
    note = note_on_defaults(LAUNCHED, "accelerate launch -m eae_dist.train", file)
    assert note is None if told is None else str(file) in note and told in note and "\n" not in note
    assert note_on_defaults({}, "torchrun -m eae_dist.train", file) is None
    assert note_on_defaults(LAUNCHED, "accelerate launch --config_file launch/cpu.yaml -m eae_dist.train", file) is None
    assert note_on_defaults(LAUNCHED, "accelerate launch -m eae_dist.train", tmp_path / "absent") is None


def test_stray_default_configuration_is_said_at_the_start(tmp_path):
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate" / "default_config.yaml").write_text("distributed_type: 'NO'\nuse_cpu: true\nnum_processes: 1\n")
    command = [sys.executable, "-m", "accelerate.commands.launch", "-m", "eae_dist.train", f"data.root={tmp_path}/absent"]
    env = rank_environment() | {"HF_HOME": str(tmp_path)}
    ended = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    named = f"accelerate launch takes settings from {tmp_path}/accelerate/default_config.yaml: num_processes: 1, use_cpu: True; "
    assert ended.stderr.count(named) == 1, ended.stderr
    assert "does not exist" in ended.stderr.splitlines()[-1]
