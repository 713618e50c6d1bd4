"""What the user reads last, when a launcher has added its own traceback to the error of a rank."""

import subprocess
import sys

import pytest
from conftest import ROOT, rank_environment

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
