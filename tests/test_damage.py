"""Random damages to the folders of this project: each ends in a right result, a resume, or one line that names the file.

Nothing ends in a traceback, and no number is wrong. `damage.py` makes them from a seed.
"""

import hashlib
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from conftest import write_shards
from damage import Damage, damage
from run_folders import save_run
from test_table import Here
from world_cases import configured

import eae_dist
from eae_dist import table as table_module
from eae_dist.data.stream import ShardStream, walk
from eae_dist.encode import encode
from eae_dist.inference.encoded_dataset import EncodedDataset
from eae_dist.latent.densities import DENSITIES, save_density
from eae_dist.training import checkpoint as checkpoints
from eae_dist.training.metrics_log import lines_up_to
from eae_dist.training.run_folder import open_run_folder

IDENTITY = {"seed": 0, "global_batch": 26, "lanes": 26, "index_sha256": "0" * 64, "order_version": 1}
SAMPLE, REST = range(24), range(24, 200)
ERRORS = (ValueError, OSError)  # what the commands print as one line


def digest(*values) -> str:
    """The sha256 of tensors, arrays and plain values."""
    found = hashlib.sha256()
    for value in values:
        if isinstance(value, torch.Tensor | np.ndarray):
            found.update(np.ascontiguousarray(value).tobytes())
        else:
            found.update(json.dumps(value, sort_keys=True, default=str).encode())
    return found.hexdigest()


def digest_of_state(state: dict[str, torch.Tensor]) -> str:
    return digest(*(item for name in sorted(state) for item in (name, state[name])))


class World:
    """A run, shards, latents and a table, each in a folder of its own, and what is right about them."""

    def __init__(self, root: Path):
        self.root = root
        self.shards = write_shards(root / "shards", {"train": (9, 4), "validation": (6,), "test": (7,)})
        self.config = configured(self.shards, "eae", f"train.output={root / 'run'}")
        self.run = root / "run"
        self.states = {}
        for step in (4, 8, 12):
            objective = eae_dist.objectives.build_objective(self.config.model, self.config.objective, (1, 16, 16), step)
            state = {"step": step, "images": 26 * step, "image_shape": [1, 16, 16], "stream": IDENTITY, "best_step": 8}
            checkpoints.save(self.run, self.config, objective.state_dict(), {"rate": torch.tensor(step)}, state)
            self.states[step] = digest_of_state(objective.state_dict())
        checkpoints.mark_best(self.run, 8)
        eae_dist.config.save_config(self.config, self.run / "config.yaml")
        density = DENSITIES["mvg"]()
        density.fit(torch.randn(50, 5, generator=torch.Generator().manual_seed(0)))
        weights = checkpoints.open_checkpoint(self.run).model_sha256
        save_density(density, self.run / "evaluation" / "densities" / "mvg.safetensors", weights)
        self.lines = [json.dumps({"step": step, "images": 26 * step, "loss": 1 / step}) for step in range(1, 13)]
        (self.run / "metrics.jsonl").write_text("".join(f"{line}\n" for line in self.lines))

        self.model = save_run(root / "model", self.config)
        encode(self.model, root / "latents", [])
        self.configs = root / "configs" / "tiny.yaml"
        (root / "configs" / "tiny").mkdir(parents=True)
        self.configs.write_text(
            f"data: {{root: {self.shards}}}\nmodel: {{width: 4, latent_dim: 5}}\n"
            f"train: {{global_batch: 8, epochs: 1, trackers: [], device: cpu}}\nevaluate: {{features: thumbnails}}\n"
        )
        for row in ("rae", "eae"):
            (root / "configs" / "tiny" / f"{row}.yaml").write_text(f"objective: {{name: {row}}}\n")
        self.tabulate(root / "table")
        self.samples = eae_dist.load(self.run).sample(3, "mvg")
        actions = {"run": self.resume, "load": self.load, "shards": self.read, "latents": self.search, "table": self.tabulate}
        self.expected = {name: action(root / name.replace("load", "run")) for name, action in actions.items()}
        self.actions = actions

    def resume(self, run: Path) -> str:
        """What a training that begins takes from its folder: a checkpoint as it was saved, and the lines of the log."""
        found = open_run_folder(run, self.config, IDENTITY)
        if found is None:
            assert not list(run.glob("checkpoints/step-*")), "a run with checkpoints was started anew"
            return "resumed"
        step = found.state["step"]
        assert digest_of_state(found.model_state()) == self.states[step] and int(found.optimizer_state()["rate"]) == step
        assert found.config == self.config and found.path.name == f"step-{step:08d}"
        lines_up_to(run / "metrics.jsonl", step)
        return "resumed"

    def load(self, run: Path) -> str:
        """What generate and serve take from it."""
        model = eae_dist.load(run)
        if digest_of_state(checkpoints.open_checkpoint(run).model_state()) != self.states[12]:
            raise ValueError(f"{run}/checkpoints/latest is gone")  # an older one, which the caller sees by its step
        return digest(model.sample(3, "mvg"))

    def read(self, root: Path) -> str:
        """Every image of every split, and two batches of training."""
        found = [item for split in ("train", "validation", "test") for batch in walk(root, split, 4) for item in of(batch)]
        stream = iter(ShardStream(root, "train", 6))
        found += [item for _ in range(2) for item in of(next(stream))]
        stream.close()
        return digest(*found)

    def search(self, root: Path) -> str:
        """Every array, and the neighbors of some latents."""
        space = EncodedDataset(root, self.model, [])
        folder = space.folder
        found = [np.asarray(folder.read(split, what)) for split in folder.parts for what in ("latents", "labels", "keys")]
        distances, rows = space.index().search(found[0][:3], 2)
        return digest(sorted(folder.parts), *found, distances, rows)

    def tabulate(self, out: Path) -> str:
        """The text of the table."""
        text, failures = table_module.table(self.configs, [], 1, Here(), out, [])
        if failures:
            raise ValueError("; ".join(failures))
        return text


def of(batch: dict) -> list:
    return [batch["image"], batch["label"], batch["key"]]


@pytest.fixture(scope="module")
def world_of_folders(tmp_path_factory):
    """A World, in which a table has no pictures and asks for no network of features, and everything takes milliseconds."""
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table_module, "save_figure", lambda *_: None)
        patch.setattr(table_module, "check_judging", lambda *_: None)
        patch.setattr(checkpoints, "versions", dict)
        yield World(tmp_path_factory.mktemp("world"))
    AcceleratorState._reset_state(reset_partial_state=True)


def ended(world: World, name: str, folder: Path, done: Damage, caplog) -> str:
    """Returns how the action ended: "right", or "refused" by one line that names the file. Anything else fails the test."""
    caplog.clear()
    try:
        found = world.actions[name](folder)
    except ERRORS as error:
        lines = [*(record.getMessage() for record in caplog.records), str(error)]
        first = str(error).splitlines()[0]
        assert first and type(error).__module__ != "json.decoder", (done, error)
        names = {part for path in done.paths for part in (Path(path).name, Path(path).parent.name) if part}
        assert any(part in line for part in names for line in lines) or str(folder) in str(error), (done, lines)
        return "refused"
    assert found == world.expected[name], (name, done)
    return "right"


def damaged_and_used(world: World, seed: int, tmp_path: Path, caplog) -> list[str]:
    name = ("run", "shards", "latents", "table")[seed % 4]
    folder = Path(shutil.copytree(world.root / name, tmp_path / name, symlinks=True))
    done = damage(folder, seed)
    endings = [ended(world, name, folder, done, caplog)]
    if name == "run":
        fresh = Path(shutil.copytree(world.root / name, tmp_path / "fresh" / name, symlinks=True))
        damage(fresh, seed)
        endings.append(ended(world, "load", fresh, done, caplog))
    return endings


@pytest.mark.parametrize("seed", SAMPLE)
def test_random_damage_ends_in_a_right_result_or_in_a_line_that_names_the_file(world_of_folders, seed, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="eae_dist"):
        damaged_and_used(world_of_folders, seed, tmp_path, caplog)


@pytest.mark.slow
@pytest.mark.parametrize("seed", REST)
def test_more_random_damages_end_well_too(world_of_folders, seed, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="eae_dist"):
        damaged_and_used(world_of_folders, seed, tmp_path, caplog)


def test_same_seed_does_the_same_damage(world_of_folders, tmp_path):
    one, two = (Path(shutil.copytree(world_of_folders.root / "run", tmp_path / name, symlinks=True)) for name in "ab")
    for seed in range(5):
        assert damage(one, seed) == damage(two, seed)
    files = [{str(p.relative_to(f)): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in (one, two)]
    assert files[0] == files[1]
