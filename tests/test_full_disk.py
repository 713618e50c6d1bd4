"""A full disk is named with its path, and the same command goes on when there is room again."""

import errno
import os
from pathlib import Path

import pytest
from world_cases import run_of

from eae_dist import generate as generate_module
from eae_dist.config import load_config
from eae_dist.errors import UserFileError
from eae_dist.generate import generate, main
from eae_dist.training import run_folder
from eae_dist.training.loop import train
from eae_dist.training.run_folder import lock

pytestmark = pytest.mark.usefixtures("cpu")


def full(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_disk_at_the_lock_of_a_run_names_it(tmp_path, monkeypatch):
    class Full:
        seek = read = close = lambda *_: ""
        fileno = lambda self: os.open(tmp_path / "lock", os.O_CREAT | os.O_RDWR)  # noqa: E731
        truncate = full

    monkeypatch.setattr(run_folder, "open", lambda *_: Full(), raising=False)
    with pytest.raises(OSError, match=f"{tmp_path}/run/.lock could not be written: No space left on device"):
        lock(tmp_path / "run")


@pytest.mark.parametrize("method", ["add_scalar", "flush", "close", "__init__"])
def test_full_disk_in_a_tracker_names_its_folder(shards, tmp_path, monkeypatch, method):
    monkeypatch.setattr(f"torch.utils.tensorboard.SummaryWriter.{method}", full)
    with pytest.raises(OSError, match=f"{tmp_path}/run/trackers could not be written: No space left on device"):
        train(load_config(run_of(shards, tmp_path / "run", "train.trackers=[tensorboard]")))


@pytest.mark.parametrize("at", [0, 1, 7])
def test_generate_that_met_a_full_disk_goes_on_with_the_same_command(run, tmp_path, monkeypatch, at):
    command, out = ["--ckpt", str(run), "--count", "8", str(tmp_path / "out")], tmp_path / "out"
    generate(run, tmp_path / "whole", "isotropic", 8, [])
    written, original = [], generate_module.replace_file

    def until_full(path: Path, data):
        if path.suffix == ".png" and len(written) >= at:
            raise UserFileError(f"{path} could not be written: No space left on device")
        original(path, data)
        written.append(path)

    monkeypatch.setattr(generate_module, "replace_file", until_full)
    if at < 7:
        at += 1  # the file that says what is begun
    with pytest.raises(SystemExit, match=r"^error: .*out/00000\d\.png could not be written: No space left"):
        main(command)
    monkeypatch.undo()
    for other in (["--count", "9"], ["evaluate.seed=3"]):
        with pytest.raises(SystemExit, match="holds a part of other images, which .*; remove it or take another folder"):
            main([*command, *other])
    main(command)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()
    }
    with pytest.raises(SystemExit, match="is not empty, and images of two sets must not mix"):
        main(command)
