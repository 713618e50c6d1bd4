"""Checkpoints: whole or not at all, checked before use, and nothing in them is ever run."""

import errno
import itertools
import json
import logging
import math
import os
import pickletools
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from saboteur import Touch
from world_cases import configured

import eae_dist
from eae_dist.config import Config, read_config, save_config
from eae_dist.numerics.atomic_files import replace_file, sha256_of
from eae_dist.objectives import Objective, build_objective
from eae_dist.training import checkpoint as checkpoints
from eae_dist.training.checkpoint import FILES, Checkpoint, DamagedCheckpoint, newest_intact, open_checkpoint
from eae_dist.training.run_folder import lock, open_run_folder

SHAPE = (1, 16, 16)
IDENTITY = {"seed": 0, "global_batch": 26, "lanes": 26, "index_sha256": "0" * 64, "order_version": 1}
CONFIG = configured("unread", "eae_linear")  # the objective whose state also has a float64 matrix


def images(rows: int = 12) -> torch.Tensor:
    return torch.rand(rows, *SHAPE, generator=torch.Generator().manual_seed(1))


def started(seed: int = 0) -> tuple[Objective, torch.optim.Optimizer]:
    objective = build_objective(CONFIG.model, CONFIG.objective, SHAPE, seed)
    return objective, torch.optim.Adam(objective.parameters(), lr=1e-2)


def step_on(objective: Objective, optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.zero_grad()
    objective(images(), torch.ones(12, dtype=torch.bool), 12, np.arange(12), step)["loss"].backward()
    optimizer.step()


@pytest.fixture(scope="module")
def trained() -> tuple[Objective, torch.optim.Optimizer]:
    """Two steps in, so that optimizer moments and running statistics are not what they started from."""
    objective, optimizer = started()
    for step in range(2):
        step_on(objective, optimizer, step)
    return objective, optimizer


@pytest.fixture
def write(trained) -> Callable[..., Path]:
    """write(run, step): a checkpoint of the trained objective, as train() writes them."""
    objective, optimizer = trained

    def written(run: Path, step: int, config: Config = CONFIG) -> Path:
        state = {"step": step, "images": 26 * step, "image_shape": list(SHAPE), "stream": IDENTITY, "best_step": 0}
        return checkpoints.save(run, config, objective.state_dict(), optimizer.state_dict(), state)

    return written


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, tuple]:
    return {name: (t.dtype, t.shape, t.contiguous().flatten().view(torch.uint8).numpy().tobytes()) for name, t in tensors.items()}


def names_in(run: Path) -> set[str]:
    return set(os.listdir(run / "checkpoints"))


def test_weights_and_buffers_come_back_bit_for_bit(tmp_path, trained):
    objective, optimizer = trained
    state = dict(objective.state_dict())
    state["special"] = torch.tensor([math.nan, -math.inf, -0.0, 5e-324], dtype=torch.float64)
    state["half"] = torch.tensor([1.0, math.inf], dtype=torch.bfloat16)
    state["count"] = torch.tensor(2**40)
    state["transposed"] = torch.arange(6.0).reshape(2, 3).T
    checkpoints.save(tmp_path, CONFIG, state, optimizer.state_dict(), {"step": 2})
    assert bits(open_checkpoint(tmp_path).model_state()) == bits(state)


def test_optimizer_goes_on_bit_for_bit(tmp_path, write, trained):
    write(tmp_path, 2)
    found = open_checkpoint(tmp_path)
    again, optimizer = started(seed=9)
    again.load_state_dict(found.model_state())
    optimizer.load_state_dict(found.optimizer_state())
    straight, straight_optimizer = started()
    for step in range(3):
        step_on(straight, straight_optimizer, step)
    step_on(again, optimizer, 2)
    assert bits(again.state_dict()) == bits(straight.state_dict())


def test_configuration_and_state_come_back_equal_with_the_versions(tmp_path, trained):
    objective, optimizer = trained
    state = {"step": 3, "stream": IDENTITY, "best_validation_loss": math.inf, "rate": 0.1 + 0.2, "grad_scaler": None}
    path = checkpoints.save(tmp_path, CONFIG, objective.state_dict(), optimizer.state_dict(), state)
    found = open_checkpoint(path)
    assert path == tmp_path / "checkpoints" / "step-00000003" == found.path
    assert found.config == CONFIG
    assert {key: value for key, value in found.state.items() if key != "versions"} == state
    assert found.state["versions"]["torch"] == torch.__version__.split("+")[0]
    assert {file.name for file in path.iterdir()} == {*FILES, "manifest.json"}


def test_run_folder_opens_as_its_latest_checkpoint(tmp_path, write):
    first, second = write(tmp_path, 5), write(tmp_path, 10)
    assert open_checkpoint(tmp_path).path == second
    assert open_checkpoint(tmp_path / "checkpoints" / "latest").path == second
    assert open_checkpoint(first).path == first
    assert os.readlink(tmp_path / "checkpoints" / "latest") == "step-00000010"  # relative: a run folder can be moved
    checkpoints.mark_best(tmp_path, 5)
    assert open_checkpoint(tmp_path / "checkpoints" / "best").path == first


def test_saving_a_step_again_replaces_it(tmp_path, write):
    write(tmp_path, 5, replace(CONFIG, train=replace(CONFIG.train, seed=1)))
    write(tmp_path, 5)
    assert open_checkpoint(tmp_path).config == CONFIG
    assert names_in(tmp_path) == {"step-00000005", "latest"}


@pytest.mark.parametrize("content", ["", "checkpoints", "train-000000.tar"])
def test_folder_without_a_checkpoint_is_an_error_that_says_what_to_give(tmp_path, content):
    (tmp_path / content).mkdir(exist_ok=True)
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(
            FileNotFoundError, match=f"{path} holds no checkpoint; give a run folder or .* RUN/checkpoints/latest"
        ):
            open_checkpoint(path)


def flip(file: Path, place: float) -> None:
    data = bytearray(file.read_bytes())
    data[int(place * (len(data) - 1))] ^= 1
    file.write_bytes(data)


DAMAGE = {
    "first byte": lambda file: flip(file, 0),
    "a byte inside": lambda file: flip(file, 0.5),
    "last byte": lambda file: flip(file, 1),
    "cut by one": lambda file: os.truncate(file, file.stat().st_size - 1),
    "empty": lambda file: os.truncate(file, 0),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "deleted": lambda file: file.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_damage_to_any_file_is_found_before_use_and_named(tmp_path, write, name, damage):
    path = write(tmp_path, 5)
    DAMAGE[damage](path / name)
    with pytest.raises(DamagedCheckpoint, match=re.escape(str(path))) as found:
        open_checkpoint(tmp_path)
    # A changed checksum in the manifest is the same as a changed file.
    assert name in str(found.value) or (name, damage) == ("manifest.json", "a byte inside")
    with pytest.raises(DamagedCheckpoint):
        eae_dist.load(tmp_path)


def full(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def half_written(weights: dict, path: Path) -> None:
    path.write_bytes(b"\0" * 100)
    full()


@pytest.mark.parametrize(
    ("function", "failure"),
    [
        ("eae_dist.training.checkpoint.save_file", full),
        ("eae_dist.training.checkpoint.save_file", half_written),
        ("torch.save", full),
        ("torch.save", half_written),
        ("eae_dist.training.checkpoint.save_config", half_written),
        ("eae_dist.training.checkpoint.sha256_of", full),
        ("eae_dist.training.checkpoint.fsync", full),
        ("pathlib.Path.rename", full),
    ],
)
def test_failed_write_leaves_the_earlier_checkpoint_and_latest_and_no_part_of_the_new_one(
    tmp_path, write, monkeypatch, function, failure
):
    before = write(tmp_path, 5)
    with monkeypatch.context() as patch:
        patch.setattr(function, failure)
        with pytest.raises(
            OSError, match="step-00000010 could not be written: .*No space left.*; earlier checkpoints are intact"
        ):
            write(tmp_path, 10)
    assert names_in(tmp_path) == {"step-00000005", "latest"}
    assert open_checkpoint(tmp_path).path == before
    assert open_checkpoint(write(tmp_path, 10)).state["step"] == 10  # and the next attempt is none the worse


def test_interrupt_during_a_write_leaves_no_part_and_is_passed_on(tmp_path, write, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    write(tmp_path, 5)
    with monkeypatch.context() as patch:
        patch.setattr("torch.save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, 10)
    assert names_in(tmp_path) == {"step-00000005", "latest"}


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("there is no mount command")
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"may not mount a small file system: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_disk_that_fills_up_at_any_place_in_a_checkpoint_costs_that_checkpoint_only(small_disk, write):
    before, filler, page = write(small_disk, 5), small_disk / "filler", 4096
    refused = 0
    for room in range(0, 2**20, page):
        free = os.statvfs(small_disk).f_bavail * page
        filler.write_bytes(b"\0" * (free - room))
        try:
            written = write(small_disk, 10)
            break
        except OSError as error:
            assert "step-00000010 could not be written" in str(error)
            assert names_in(small_disk) == {"step-00000005", "latest"}
            assert open_checkpoint(small_disk).path == before
            refused += 1
        finally:
            filler.unlink()
    # As many pages as the checkpoint has, give or take what folders need.
    assert abs(refused - sum(-(-file.stat().st_size // page) for file in written.iterdir())) <= 2
    assert open_checkpoint(small_disk).path == written


@pytest.mark.parametrize(
    ("best", "keep", "left"),
    [(None, 3, {4, 5, 6}), (2, 2, {2, 5, 6}), (6, 2, {5, 6}), (2, 1, {2, 6}), (None, 9, {1, 2, 3, 4, 5, 6})],
)
def test_the_last_and_the_best_checkpoints_are_kept(tmp_path, write, best, keep, left):
    for step in range(1, 7):
        write(tmp_path, step)
        if step == best:
            checkpoints.mark_best(tmp_path, step)
    checkpoints.prune(tmp_path, keep)
    links = {"latest"} | ({"best"} if best else set())
    assert names_in(tmp_path) == {f"step-{step:08d}" for step in left} | links
    assert open_checkpoint(tmp_path).state["step"] == 6
    assert best is None or open_checkpoint(tmp_path / "checkpoints" / "best").state["step"] == best


def test_newest_intact_goes_back_over_damage_and_reports_each(tmp_path, write):
    paths = [write(tmp_path, step) for step in (5, 10, 15, 20)]
    DAMAGE["cut by one"](paths[2] / "optimizer.pt")
    DAMAGE["deleted"](paths[3] / "manifest.json")
    (tmp_path / "checkpoints" / "step-00000025").mkdir()
    found, damage = newest_intact(tmp_path)
    assert found.path == paths[1] and len(damage) == 3
    assert "step-00000025" in damage.pop(0)
    assert "step-00000020" in damage[0] and "manifest.json" in damage[0]
    assert "step-00000015" in damage[1] and "optimizer.pt" in damage[1]


def test_newest_intact_of_a_run_without_any_is_none(tmp_path, write):
    assert newest_intact(tmp_path) == (None, [])
    path = write(tmp_path, 5)
    DAMAGE["empty"](path / "state.json")
    found, damage = newest_intact(tmp_path)
    assert found is None and len(damage) == 1


def test_what_lies_after_the_resumed_step_is_set_aside_and_what_a_kill_left_removed(tmp_path, write):
    for step in (5, 10, 15):
        write(tmp_path, step)
    (tmp_path / "checkpoints" / ".step-00000020.partial").mkdir()
    checkpoints.set_aside_newer(tmp_path, tmp_path / "checkpoints" / "step-00000010")
    assert names_in(tmp_path) == {"step-00000005", "step-00000010", "step-00000015.damaged", "latest"}
    assert open_checkpoint(tmp_path).state["step"] == 10


def test_optimizer_file_holds_tensors_and_plain_values_only(tmp_path, write):
    file = write(tmp_path, 5) / "optimizer.pt"
    torch.load(file, weights_only=True)
    with zipfile.ZipFile(file) as archive:
        (pickled,) = [archive.read(name) for name in archive.namelist() if name.endswith("data.pkl")]
    named = {argument for opcode, argument, _ in pickletools.genops(pickled) if opcode.name in ("GLOBAL", "INST")}
    assert named == {"torch._utils _rebuild_tensor_v2", "torch FloatStorage", "collections OrderedDict"}
    assert not any(opcode.name == "STACK_GLOBAL" for opcode, _, _ in pickletools.genops(pickled))


@pytest.mark.parametrize("name", ["optimizer.pt", "model.safetensors"])
def test_code_pickled_into_a_checkpoint_with_right_checksums_is_not_run(tmp_path, write, name):
    path, marker = write(tmp_path, 5), tmp_path / "ran"
    torch.save({"state": Touch(marker)}, path / name)
    manifest = json.loads((path / "manifest.json").read_text()) | {name: sha256_of(path / name)}
    (path / "manifest.json").write_text(json.dumps(manifest))
    found = open_checkpoint(tmp_path)
    read = found.optimizer_state if name == "optimizer.pt" else found.model_state
    with pytest.raises(DamagedCheckpoint, match=f"{path}: {name} holds something else than tensors"):
        read()
    assert not marker.exists()
    with open(path / name, "rb") as file:  # the pickle does work
        torch.load(file, weights_only=False)
    assert marker.exists()


OWN_ENCODER = """
from pathlib import Path
from torch import nn
Path(__file__).with_name("imported").touch()

class Encoder(nn.Module):
    def __init__(self, *, image_shape, latent_dim, width, bias):
        super().__init__()
        self.head = nn.Linear(256, latent_dim, bias=bias)

    def forward(self, x):
        return self.head(x.flatten(1))

class Decoder(nn.Module):
    def __init__(self, *, image_shape, latent_dim, width):
        super().__init__()
        self.out = nn.Sequential(nn.Linear(latent_dim, 256), nn.Unflatten(1, image_shape), nn.Sigmoid())

    def forward(self, z):
        return self.out(z)
"""


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_network_code_that_a_checkpoint_names_is_imported_only_if_it_is_allowed(tmp_path, monkeypatch, part):
    module = f"network_of_a_stranger_{part}"
    (tmp_path / f"{module}.py").write_text(OWN_ENCODER)
    monkeypatch.syspath_prepend(tmp_path)
    name = f"{module}:{part.capitalize()}"
    config = replace(CONFIG, model=replace(CONFIG.model, **{part: name}))
    objective = build_objective(config.model, config.objective, SHAPE, 0)
    checkpoints.save(tmp_path, config, objective.state_dict(), {}, {"step": 1, "image_shape": list(SHAPE)})
    monkeypatch.delitem(__import__("sys").modules, module)
    (tmp_path / "imported").unlink()

    for allow in ((), ["another:Class"], [module]):
        with pytest.raises(ValueError, match=f"model.{part}={name}, code that is not part of eae_dist"):
            eae_dist.load(tmp_path, allow=allow)
    assert not (tmp_path / "imported").exists()
    model = eae_dist.load(tmp_path, allow=[name])
    assert (tmp_path / "imported").exists()
    assert bits(model.autoencoder.state_dict()) == bits(objective.autoencoder.state_dict())


def test_loaded_autoencoder_encodes_and_decodes_each_row_by_itself(tmp_path, write, trained):
    folder = write(tmp_path, 5)
    model = eae_dist.load(tmp_path)
    assert not any(module.training for module in model.modules())
    assert (model.image_shape, model.latent_dim) == (SHAPE, 5)
    x = images()
    with torch.no_grad():
        latents = model.encode(x)
        decoded = model.decode(latents)
    assert latents.shape == (12, 5) and decoded.shape == x.shape
    assert 0 <= decoded.min() and decoded.max() <= 1
    # In eval mode no row depends on its batch, up to the rounding of other kernels for a batch of one.
    with torch.no_grad():
        torch.testing.assert_close(model.encode(x[3:4]), latents[3:4], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(eae_dist.load(folder).encode(x), latents, rtol=0, atol=0)
    assert bits(model.autoencoder.state_dict()) == bits(trained[0].autoencoder.state_dict())


def opened(run: Path, config: Config = CONFIG, identity: dict = IDENTITY) -> Checkpoint | None:
    """As by a training that begins: the settings are written when nothing speaks against them."""
    found = open_run_folder(run, config, identity)
    save_config(config, run / "config.yaml")
    return found


def changed(section: str, **settings) -> Config:
    return replace(CONFIG, **{section: replace(getattr(CONFIG, section), **settings)})


def test_new_run_folder_is_made_with_its_configuration(tmp_path):
    run = tmp_path / "a" / "b"
    assert opened(run) is None
    assert read_config(run / "config.yaml") == CONFIG
    assert {file.name for file in run.iterdir()} == {"config.yaml"}
    assert opened(run) is None  # started, killed before the first checkpoint, started again


def test_run_folder_continues_from_its_latest_checkpoint(tmp_path, write):
    opened(tmp_path)
    write(tmp_path, 5)
    latest = write(tmp_path, 10)
    assert opened(tmp_path).path == latest


def test_settings_that_must_not_change_are_listed_and_nothing_is_touched(tmp_path, write):
    opened(tmp_path)
    write(tmp_path, 5)
    other = replace(changed("train", seed=1, learning_rate=0.5, epochs=1.0), model=replace(CONFIG.model, width=8))
    with pytest.raises(ValueError, match=f"train.output={tmp_path} holds a run with other settings") as refused:
        opened(tmp_path, other)
    lines = str(refused.value).splitlines()[1:]
    rate = CONFIG.train.learning_rate
    expected = ["model.width: 4 -> 8", "train.seed: 0 -> 1", f"train.learning_rate: {rate} -> 0.5"]
    assert [line.strip() for line in lines] == expected
    assert read_config(tmp_path / "config.yaml") == CONFIG
    assert opened(tmp_path).state["step"] == 5


def test_settings_that_may_change_do_and_are_said(tmp_path, write, caplog):
    opened(tmp_path)
    write(tmp_path, 5)
    longer = changed("train", epochs=99.0)
    with caplog.at_level(logging.INFO, logger="eae_dist"):
        assert opened(tmp_path, longer).state["step"] == 5
    assert f"train.epochs: {CONFIG.train.epochs} -> 99.0" in caplog.text


def test_settings_are_the_checkpoints_where_the_run_folders_own_are_lost(tmp_path, write):
    opened(tmp_path)
    write(tmp_path, 5)
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(ValueError, match="train.learning_rate: .* -> 0.5"):
        opened(tmp_path, changed("train", learning_rate=0.5))
    assert opened(tmp_path).state["step"] == 5


@pytest.mark.parametrize(("key", "value"), [("index_sha256", "f" * 64), ("order_version", 2), ("lanes", 13), ("seed", 1)])
def test_run_is_not_continued_on_other_data_or_in_another_order(tmp_path, write, key, value):
    opened(tmp_path)
    write(tmp_path, 5)
    with pytest.raises(ValueError, match=f"other data or in another order(.|\n)*{key}: {IDENTITY[key]} -> {value}"):
        opened(tmp_path, identity=IDENTITY | {key: value})
    assert opened(tmp_path).state["step"] == 5


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model.latent_dim": 64}, ["model.latent_dim: 5 -> 64"]),
        ({"model.width": 9}, ["model.width: 4 -> 9"]),
        ({"model.network": "rae32"}, ["model.network: small -> rae32"]),
        ({"train.seed": 7}, ["train.seed: 0 -> 7"]),
        ({"train.global_batch": 52}, [f"train.global_batch: {CONFIG.train.global_batch} -> 52"]),
        ({"model.latent_dim": 64, "train.seed": 7}, ["model.latent_dim: 5 -> 64", "train.seed: 0 -> 7"]),
    ],
)
def test_other_data_is_said_before_the_settings_that_follow_from_it(settings, said, tmp_path, write):
    opened(tmp_path)
    write(tmp_path, 5)
    other = replace(CONFIG, data=replace(CONFIG.data, root="photos"))
    for key, value in settings.items():
        section, name = key.split(".")
        other = replace(other, **{section: replace(getattr(other, section), **{name: value})})
    with pytest.raises(ValueError, match="holds a run with other settings") as refused:
        opened(tmp_path, other, IDENTITY | {"index_sha256": "f" * 64})
    assert [line.strip() for line in str(refused.value).splitlines()[1:]] == [
        "data: unread -> photos",
        *said,
    ]


def test_folders_of_checkpoints_whose_names_were_swapped_are_told_by_their_steps(tmp_path, write):
    opened(tmp_path)
    one, other = write(tmp_path, 5), write(tmp_path, 10)
    kept = write(tmp_path, 3)
    one.rename(tmp_path / "aside")
    other.rename(one)
    (tmp_path / "aside").rename(other)
    with pytest.raises(DamagedCheckpoint, match=f"{other} holds step 5: the folder was renamed; call it step-00000005 again"):
        open_checkpoint(other)
    assert opened(tmp_path).path == kept  # rather than steps 6 to 10 with the weights of step 5
    copy = Path(shutil.copytree(kept, tmp_path / "my best one"))
    assert open_checkpoint(copy).state["step"] == 3


@pytest.mark.parametrize("order", [order for order in itertools.permutations(range(4)) if order != (0, 1, 2, 3)])
def test_newest_checkpoint_that_has_its_own_name_is_the_one_that_a_run_goes_on_from(order, tmp_path, write):
    opened(tmp_path)
    paths = [write(tmp_path, step) for step in (2, 4, 6, 8)]
    for number, path in enumerate(paths):
        path.rename(tmp_path / f"aside-{number}")
    for number, path in zip(order, paths, strict=True):
        (tmp_path / f"aside-{number}").rename(path)
    if own := [path for place, path in enumerate(paths) if order[place] == place]:
        assert opened(tmp_path).path == own[-1]
    else:
        with pytest.raises(ValueError, match="no checkpoint of .* is intact; move the folder away"):
            opened(tmp_path)


@pytest.mark.parametrize("text", ["[]", "null", "", "3", '"x"', "{", '{"model.safetensors": 3}', "[" * 100_000, "\0"])
@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
def test_small_file_with_another_content_is_damage_and_the_checkpoint_before_is_used(tmp_path, write, name, text):
    opened(tmp_path)
    good, bad = write(tmp_path, 5), write(tmp_path, 10)
    (bad / name).write_text(text)
    with pytest.raises(DamagedCheckpoint, match=f"{bad}.*{name}"):
        open_checkpoint(tmp_path)
    assert opened(tmp_path).path == good


def test_cut_configuration_of_a_run_folder_does_not_let_other_settings_in(tmp_path, write):
    opened(tmp_path)
    write(tmp_path, 5)
    (tmp_path / "config.yaml").write_text("data:\n")
    with pytest.raises(ValueError, match="train.learning_rate: .* -> 0.5"):
        opened(tmp_path, changed("train", learning_rate=0.5))
    assert opened(tmp_path).state["step"] == 5


def test_run_goes_back_behind_damaged_checkpoints_and_says_so(tmp_path, write, caplog):
    opened(tmp_path)
    good, bad = write(tmp_path, 5), write(tmp_path, 10)
    DAMAGE["a byte inside"](bad / "model.safetensors")
    with caplog.at_level(logging.WARNING, logger="eae_dist"):
        assert opened(tmp_path).path == good
    assert "step-00000010" in caplog.text and "model.safetensors" in caplog.text
    assert names_in(tmp_path) == {"step-00000005", "step-00000010.damaged", "latest"} and open_checkpoint(tmp_path).path == good


def test_run_whose_every_checkpoint_is_damaged_is_not_started_anew(tmp_path, write):
    opened(tmp_path)
    path = write(tmp_path, 5)
    DAMAGE["empty"](path / "state.json")
    with pytest.raises(ValueError, match=f"no checkpoint of {tmp_path} is intact"):
        opened(tmp_path)
    assert path.is_dir()


@pytest.mark.parametrize("below", [".", "run"])
def test_run_folder_that_cannot_be_written_is_an_error_that_names_its_key(tmp_path, below):
    # A file where the folder should be: what stops every user, root too.
    (tmp_path / "file").touch()
    run = tmp_path / "file" / below
    with pytest.raises(OSError, match=f"^train.output={run} cannot be written"):
        lock(run)


def test_best_that_a_kill_kept_from_being_linked_is_linked_at_the_next_start(tmp_path, write, trained):
    write(tmp_path, 5)
    checkpoints.mark_best(tmp_path, 5)
    state = {"step": 10, "image_shape": list(SHAPE), "stream": IDENTITY, "best_step": 10}
    checkpoints.save(tmp_path, CONFIG, trained[0].state_dict(), trained[1].state_dict(), state)
    opened(tmp_path)
    assert os.readlink(tmp_path / "checkpoints" / "best") == "step-00000010"


def test_second_job_on_a_run_folder_is_refused_and_the_first_goes_on(tmp_path):
    held = lock(tmp_path / "run")
    script = f"from eae_dist.training.run_folder import lock; from pathlib import Path; lock(Path({str(tmp_path / 'run')!r}))"
    second = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert second.returncode != 0 and f"is in use by another job (process {os.getpid()} on " in second.stderr
    held.close()
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_settings_of_a_run_that_has_saved_nothing_yet_may_be_corrected(tmp_path):
    assert opened(tmp_path) is None
    assert opened(tmp_path, changed("train", seed=9)) is None
    assert read_config(tmp_path / "config.yaml").train.seed == 9


def test_best_does_not_dangle_after_going_back_behind_damage(tmp_path, write):
    write(tmp_path, 5)
    damaged = write(tmp_path, 10)
    checkpoints.mark_best(tmp_path, 10)
    (damaged / "state.json").unlink()
    assert opened(tmp_path).state["step"] == 5
    assert not (tmp_path / "checkpoints" / "best").is_symlink()


def test_users_copy_of_a_checkpoint_is_left_alone(tmp_path, write):
    kept = tmp_path / "checkpoints" / "step-00000005.bak"
    shutil.copytree(write(tmp_path, 5), kept)
    for step in (6, 7):
        write(tmp_path, step)
    checkpoints.prune(tmp_path, 1)
    assert opened(tmp_path).state["step"] == 7 and kept.is_dir()


def test_file_may_be_replaced_by_several_at_once(tmp_path):
    path, contents = tmp_path / "table.md", [f"{number}\n" * 1000 for number in range(8)]
    with ThreadPoolExecutor(len(contents)) as pool:
        for _ in range(20):
            list(pool.map(lambda content: replace_file(path, content), contents))  # raises what a thread raised
            assert path.read_text() in contents
    assert list(tmp_path.iterdir()) == [path]


# Killed between any two operations on files

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "shutil.rmtree"}


def killed_before(operation: int, work: Callable[[], object]) -> bool:
    """Does the work in a process that is killed before that operation on files; returns False if the work has no so many."""
    if (child := os.fork()) == 0:
        left = operation

        def count(event: str, arguments: tuple) -> None:
            nonlocal left
            if event in CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_CREAT):
                left -= 1
                if left < 0:
                    os._exit(9)

        sys.addaudithook(count)
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9), status
    return status == 9


def saved_again(run: Path, step: int, mark: str, keep: int = 3) -> None:
    """Saves as training does: the checkpoint, the link to the best, and what is no longer kept."""
    state = {"step": step, "images": 26 * step, "image_shape": list(SHAPE), "stream": IDENTITY, "best_step": step, "mark": mark}
    checkpoints.save(run, CONFIG, {"weight": torch.zeros(3)}, {}, state)
    checkpoints.mark_best(run, step)
    checkpoints.prune(run, keep)


slow = pytest.mark.slow


@pytest.mark.parametrize("before", [[], [5, 10], pytest.param([5], marks=slow), pytest.param([5, 10, 15], marks=slow)])
def test_kill_at_any_moment_of_a_save_leaves_the_checkpoint_before_or_the_new_one(tmp_path, monkeypatch, before):
    """Of a step that was saved before and of one that was not; the start after the kill continues, and a save works again."""
    monkeypatch.setattr(checkpoints, "versions", dict)  # takes most of the time of a save
    opened(tmp_path / "before")
    for step in before:
        saved_again(tmp_path / "before", step, "before")
    for operation in itertools.count():
        run = Path(shutil.copytree(tmp_path / "before", tmp_path / str(operation), symlinks=True))
        again = max(before, default=10)  # the newest step, as after a stop
        killed = killed_before(operation, lambda run=run, again=again: saved_again(run, again, "again", keep=1))
        expected = {"before", "again"} if before else {"again", None}
        if before:
            assert open_checkpoint(run).state["step"] == again, operation  # what evaluate would read
        if killed and operation % 3 == 0:  # the start that is to recover is killed as well
            killed_before(operation // 3 % 7, lambda run=run: opened(run))
        found = opened(run)
        assert (found and found.state["mark"]) in (expected if killed else {"again"}), operation
        assert found is None or (found.state["step"] == again and latest_name(run) == f"step-{again:08d}")
        assert found is None or not [name for name in names_in(run) if name.endswith((".partial", ".new", ".damaged"))]
        if operation % 4 == 0:
            saved_again(run, again, "third", keep=1)
            assert open_checkpoint(run).state["mark"] == "third"
            assert names_in(run) == {f"step-{again:08d}", "latest", "best"}
        if not killed:
            break
    assert operation > 10


def latest_name(run: Path) -> str:
    return os.readlink(run / "checkpoints" / "latest")


def test_replacement_that_is_damaged_gives_way_to_the_checkpoint_that_it_was_to_replace(tmp_path, write):
    opened(tmp_path)
    path = write(tmp_path, 5)
    replacement = Path(shutil.copytree(path, path.with_name("step-00000005.new")))
    DAMAGE["a byte inside"](replacement / "model.safetensors")
    assert opened(tmp_path).path == path
    assert names_in(tmp_path) == {"step-00000005", "step-00000005.new.damaged", "latest"}


def test_whole_replacement_is_read_beside_the_half_removed_checkpoint(tmp_path, write):
    path = write(tmp_path, 5)
    replacement = Path(shutil.copytree(path, path.with_name("step-00000005.new")))
    (path / "manifest.json").unlink()
    for given in (tmp_path, path, tmp_path / "checkpoints" / "latest"):
        assert open_checkpoint(given).path == replacement
    assert opened(tmp_path).path == path and names_in(tmp_path) == {"step-00000005", "latest"}
    assert open_checkpoint(path).state["step"] == 5
