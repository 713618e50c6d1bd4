"""Checkpoints on disk. A checkpoint is written atomically and verified before it is used.

    checkpoints/step-00000120/   model.safetensors   weights and buffers, and under train.ema the averages of the weights
                                 optimizer.pt        the optimizer's state, loadable with weights_only=True
                                 state.json          clock, data order, schedule, best loss, versions
                                 config.yaml         the resolved configuration
                                 manifest.json       the sha256 of each of these
    checkpoints/latest, best     links to the newest and to the one with the lowest validation loss

A checkpoint is written to a temporary folder, fsynced and renamed. Where the step was saved before, the new folder first gets the
name step-00000120.new, and replaces the old one when it is safely there. Unpickling never runs code from a checkpoint.
"""

import itertools
import json
import logging
import os
import pickle
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import eae_dist
from eae_dist.config import Config, read_config, save_config
from eae_dist.distributed import from_rank_zero, on_rank_zero, tensors_from_rank_zero
from eae_dist.errors import MissingFile, UserError, UserFileError
from eae_dist.numerics.atomic_files import fsync, sha256_of
from eae_dist.numerics.json_files import read_json

log = logging.getLogger("eae_dist")

AVERAGE = "average."  # before the names of the averages in model.safetensors
FILES = ("model.safetensors", "optimizer.pt", "state.json", "config.yaml")


class DamagedCheckpoint(UserError):
    """Files of a checkpoint are missing or differ from their checksums."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint folder. state: "step", "images" and the other entries that `save` received.

    of_rank_zero: all ranks opened it together. Then call its methods on every rank: rank 0 alone reads the files, and the others
    raise RankZeroFailed if it cannot.
    """

    path: Path
    config: Config
    state: dict
    model_sha256: str
    of_rank_zero: bool = False

    def model_state(self) -> dict[str, torch.Tensor]:
        """Returns weights, buffers and averages by name, for `split_averages`.

        Raises DamagedCheckpoint for a file without tensors.
        """
        return self._read_by_rank_zero(self._model_state) if self.of_rank_zero else self._model_state()

    def optimizer_state(self) -> dict:
        """Returns the state for load_state_dict of the optimizer. Raises DamagedCheckpoint for a file that would run code."""
        return self._read_by_rank_zero(self._optimizer_state) if self.of_rank_zero else self._optimizer_state()

    @staticmethod
    def _read_by_rank_zero(read: Callable[[], dict]) -> dict:
        found: dict = {}
        with on_rank_zero() as is_rank_zero:
            if is_rank_zero:
                found = read()
        return tensors_from_rank_zero(found)

    def _model_state(self) -> dict[str, torch.Tensor]:
        try:
            return load_file(self.path / "model.safetensors")
        except SafetensorError as error:
            raise DamagedCheckpoint(f"{self.path}: model.safetensors holds something else than tensors ({error})") from error

    def _optimizer_state(self) -> dict:
        try:
            return torch.load(self.path / "optimizer.pt", map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise DamagedCheckpoint(
                f"{self.path}: optimizer.pt holds something else than tensors and plain values, and may run code; "
                f"it is not loaded"
            ) from error


def with_averages(weights: dict[str, torch.Tensor], averages: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the state for model.safetensors: weights and buffers by name, and averages of weights (train.ema), if any."""
    return weights | {AVERAGE + name: average for name, average in averages.items()}


def split_averages(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Returns the two arguments of `with_averages`."""
    averages = {name.removeprefix(AVERAGE): tensor for name, tensor in state.items() if name.startswith(AVERAGE)}
    return {name: tensor for name, tensor in state.items() if not name.startswith(AVERAGE)}, averages


def save(run: Path, config: Config, model_state: dict, optimizer_state: dict, state: dict) -> Path:
    """Writes run/checkpoints/step-<step, eight digits> and links `latest` to it; returns its path. Call on one rank.

    Raises OSError, for example for a full disk; earlier checkpoints and `latest` then remain unchanged.
    """
    folder = run / "checkpoints"
    target = folder / f"step-{state['step']:08d}"
    aside = folder / f".{target.name}.partial"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in model_state.items()}, aside / FILES[0])
        torch.save(optimizer_state, aside / FILES[1])
        (aside / FILES[2]).write_text(json.dumps({**state, "versions": versions()}, indent=2))
        save_config(config, aside / FILES[3])
        manifest = {name: sha256_of(aside / name) for name in FILES}
        (aside / "manifest.json").write_text(json.dumps(manifest, indent=2))
        for path in [*aside.iterdir(), aside]:
            fsync(path)
        if target.exists():  # after a stop or a resume from an earlier step, the same step is saved again
            replacement = target.with_name(f"{target.name}.new")
            if replacement.exists():
                _put_in_place(replacement)
            aside.rename(replacement)
            _put_in_place(replacement)
        else:
            aside.rename(target)
    except BaseException as error:
        free = shutil.disk_usage(folder).free
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, OSError | RuntimeError | SafetensorError):
            # torch and safetensors do not name a full disk in their messages.
            raise UserFileError(
                f"checkpoint {target} could not be written: {error}; {free:,} bytes were left on the disk; "
                f"earlier checkpoints are intact"
            ) from error
        raise
    fsync(folder)
    _link(folder / "latest", target.name)
    return target


def latest(run: Path) -> Path | None:
    """Returns the checkpoint that was written last, or None."""
    link = run / "checkpoints" / "latest"
    return link.resolve() if link.exists() else None


def mark_best(run: Path, step: int) -> None:
    """Links `best` to the checkpoint of that step if it exists."""
    if (run / "checkpoints" / f"step-{step:08d}").is_dir():
        _link(run / "checkpoints" / "best", f"step-{step:08d}")


def prune(run: Path, keep: int) -> None:
    """Removes all checkpoints except the last `keep` and the best."""
    folder = run / "checkpoints"
    best = (folder / "best").resolve().name
    for path in _folders(run)[keep:]:
        if path.name != best:
            shutil.rmtree(path)


def open_checkpoint(directory: str | Path) -> Checkpoint:
    """Opens the checkpoint in a folder, or the latest checkpoint of a run folder, and verifies every checksum.

    Raises FileNotFoundError if there is none, and DamagedCheckpoint that names a damaged file.
    """
    path = Path(directory)
    if not (path / "manifest.json").is_file() and (path / "checkpoints").is_dir():
        latest = path / "checkpoints" / "latest"
        path = latest if latest.exists() or not (left := _folders(path)) else left[0]
    path = path.resolve()
    replacement = path.with_name(f"{path.name}.new")  # a kill can leave it beside the half-removed folder that it replaces
    path = replacement if replacement.is_dir() else path
    if not any((path / name).is_file() for name in ("manifest.json", *FILES[:3])):
        raise MissingFile(f"{directory} holds no checkpoint; give a run folder or a folder such as RUN/checkpoints/latest")
    return _verified(path)


def open_on_rank_zero(directory: str | Path) -> Checkpoint:
    """Returns `open_checkpoint(directory)` on every rank; rank 0 alone reads the files and verifies them. Call on every rank.

    On rank 0 it raises as `open_checkpoint` does, and on the other ranks RankZeroFailed.
    """
    checkpoint: Checkpoint | None = None
    with on_rank_zero() as is_rank_zero:
        if is_rank_zero:
            checkpoint = replace(open_checkpoint(directory), of_rank_zero=True)
    checkpoint = from_rank_zero(checkpoint)
    assert checkpoint is not None  # otherwise rank 0 has raised
    return checkpoint


def newest_intact(run: Path) -> tuple[Checkpoint | None, list[str]]:
    """Returns the newest intact checkpoint of a run, or None, and error messages for newer, damaged ones."""
    damage: list[str] = []
    for path in _folders(run):
        try:
            return _verified(path.resolve()), damage
        except DamagedCheckpoint as error:
            damage.append(str(error))
    return None, damage


def set_aside_newer(run: Path, path: Path) -> Path:
    """Renames checkpoints that are newer than the one to continue from, which are damaged, and removes what a kill left.

    Returns the path of that checkpoint, which is another one if a kill came before it got its name.
    """
    for partial in (run / "checkpoints").glob(".*.partial"):
        shutil.rmtree(partial)
    for newer in itertools.takewhile(lambda folder: folder.resolve() != path, _folders(run)):
        aside = newer.with_name(f"{newer.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        newer.rename(aside)
        log.warning("%s was renamed to %s", newer, aside.name)
    if path.suffix == ".new":
        path = _put_in_place(path)
    _link(run / "checkpoints" / "latest", path.name)
    best = run / "checkpoints" / "best"
    if best.is_symlink() and not best.exists():  # it was renamed; the next better validation links it again
        best.unlink()
    return path


def versions() -> dict[str, str]:
    """Returns the versions of packages on which a result can depend."""
    found = {"eae_dist": eae_dist.__version__, "python": platform.python_version()}
    for package in ("torch", "torchvision", "accelerate", "deepspeed", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _verified(path: Path) -> Checkpoint:
    """Opens a checkpoint folder and verifies every checksum. Raises DamagedCheckpoint, which names the file."""
    advice = "take an earlier checkpoint, or start the training again, which does"
    try:
        manifest = read_json(path / "manifest.json", dict.fromkeys(FILES, str), advice)
    except ValueError as error:
        raise DamagedCheckpoint(f"checkpoint {path} is damaged: {error}") from error
    for name in FILES:
        if not (path / name).is_file():
            raise DamagedCheckpoint(f"checkpoint {path} is damaged: {name} is missing")
        if sha256_of(path / name) != manifest.get(name):
            raise DamagedCheckpoint(f"checkpoint {path} is damaged: {name} does not match its checksum")
    try:
        state, config = read_json(path / "state.json", {"step": int}, advice), read_config(path / "config.yaml")
    except ValueError as error:
        raise DamagedCheckpoint(f"checkpoint {path} is damaged: {error}") from error
    if _step_of(path) not in (None, state["step"]):
        name = f"step-{state['step']:08d}"
        raise DamagedCheckpoint(f"checkpoint {path} holds step {state['step']}: the folder was renamed; call it {name} again")
    return Checkpoint(path, config, state, manifest["model.safetensors"])


def _folders(run: Path) -> list[Path]:
    """Returns the checkpoint folders of a run, newest first; of one step, the folder that is to replace the other is newer."""
    found = (path for path in (run / "checkpoints").glob("step-*") if path.is_dir())
    named = [path for path in found if _step_of(path) is not None]
    return sorted(named, key=lambda path: (_step_of(path), path.name), reverse=True)


def _step_of(path: Path) -> int | None:
    """Returns the step in the name of a checkpoint folder; None for another name, such as that of a copy by the user."""
    number = path.name.removeprefix("step-").removesuffix(".new")
    return int(number) if path.name.startswith("step-") and number.isdecimal() else None


def _put_in_place(replacement: Path) -> Path:
    """Replaces the checkpoint step-N by step-N.new, which is whole; one of the two is whole at every moment."""
    target = replacement.with_suffix("")
    fsync(target.parent)
    if target.exists():
        shutil.rmtree(target)
    replacement.rename(target)
    return target


def _link(link: Path, target: str) -> None:
    aside = link.with_name(f".{link.name}.new")
    aside.unlink(missing_ok=True)
    aside.symlink_to(target)
    os.replace(aside, link)
    fsync(link.parent)
