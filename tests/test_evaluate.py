"""Judging a checkpoint, in this process; test_laws.py has it over ranks."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from conftest import image_of, write_shards
from PIL import Image
from world_cases import configured

import eae_dist
from eae_dist import checkpoint as checkpoints
from eae_dist.checkpoint import DamagedCheckpoint, open_checkpoint
from eae_dist.config import Config
from eae_dist.data.shards import ShardIndex
from eae_dist.evaluate import evaluate, main
from eae_dist.objectives import build_objective

SHAPE = (1, 16, 16)
PICTURES = {"samples.png", "reconstructions.png", "interpolations.png"}


@pytest.fixture(autouse=True)
def cpu():
    """accelerate keeps the device in a global, which other tests may have set."""
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def save_run(run: Path, config: Config) -> Path:
    """A checkpoint whose running statistics have seen some images; returns its run folder."""
    objective = build_objective(config.model, config.objective, SHAPE, config.train.seed)
    seen = torch.rand(32, *SHAPE, generator=torch.Generator().manual_seed(2))
    objective(seen, torch.ones(32, dtype=torch.bool), 32, np.arange(32), 0)
    checkpoints.save(run, config, objective.state_dict(), {}, {"step": 4, "images": 104, "image_shape": list(SHAPE)})
    return run


@pytest.fixture
def run(shards, tmp_path) -> Path:
    return save_run(tmp_path / "run", configured(shards, "eae"))


def drawn_images(count: int) -> torch.Tensor:
    """The first test images as conftest.py drew them, float64 in [0, 1]: the third split starts at 20,000."""
    pixels = [torch.from_numpy(image_of(20_000 + number)) for number in range(count)]
    return torch.stack(pixels).permute(0, 3, 1, 2).double() / 255


def direct_error(run: Path, count: int) -> float:
    """The mean over images of the summed squared error, in float64."""
    model, x = eae_dist.load(run).double(), drawn_images(count)
    with torch.no_grad():
        return (model.decode(model.encode(x)) - x).square().sum((1, 2, 3)).mean().item()


@pytest.mark.parametrize(("settings", "count"), [([], 33), (["evaluate.count=7"], 7), (["evaluate.count=99"], 33)])
def test_metrics_are_those_of_a_direct_computation(run, settings, count):
    metrics = evaluate(run, settings)
    assert metrics["images"] == count
    # A sum over 256 pixels in float32: 1e-5 is 100 roundings.
    assert metrics["reconstruction"] == pytest.approx(direct_error(run, count), rel=1e-5)
    assert metrics["reconstruction_per_pixel"] == pytest.approx(metrics["reconstruction"] / 256, rel=1e-12)
    assert direct_error(run, 7) != pytest.approx(direct_error(run, 33), rel=1e-4)


def test_batch_size_changes_no_more_than_rounding(run):
    numbers = [evaluate(run, [f"evaluate.batch={batch}"])["reconstruction"] for batch in (1, 7, 33, 64)]
    assert numbers == pytest.approx([numbers[0]] * 4, rel=1e-6)


def test_metrics_say_what_was_judged_on_what(run, shards):
    metrics = evaluate(run / "checkpoints" / "latest", ["evaluate.split=validation"])
    index = ShardIndex.load(shards)
    expected = {
        "checkpoint": str(run / "checkpoints" / "step-00000004"),
        "step": 4,
        "objective": "eae",
        "data": index.name,
        "index_sha256": index.sha256,
        "split": "validation",
        "images": 40,
    }
    assert expected.items() <= metrics.items() and metrics["versions"]["torch"]


def test_metrics_and_pictures_are_written_into_the_run_folder(run):
    metrics = evaluate(run, [])
    folder = run / "evaluation"
    assert metrics.pop("out") == str(folder)
    assert {file.name for file in folder.iterdir()} == PICTURES | {"metrics.json"}
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    # Tiles of 16 pixels, a line of 1 between them and around: 100 samples by ten, 33 images beside their reconstructions
    # by ten, 16 pairs by eight steps.
    sizes = {name: Image.open(folder / name).size for name in PICTURES}
    assert sizes == {
        "samples.png": (10 * 17 + 1, 10 * 17 + 1),
        "reconstructions.png": (10 * 17 + 1, 7 * 17 + 1),
        "interpolations.png": (8 * 17 + 1, 16 * 17 + 1),
    }
    assert {file.name for file in run.iterdir()} == {"checkpoints", "evaluation"}


def test_out_names_another_folder_and_a_checkpoint_alone_has_one_beside_it(run, tmp_path):
    evaluate(run, [], tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b" / "metrics.json").is_file() and not (run / "evaluation").exists()
    alone = tmp_path / "alone" / "model"
    shutil.copytree(run / "checkpoints" / "step-00000004", alone)
    assert evaluate(alone, [])["out"] == str(tmp_path / "alone" / "evaluation")


def test_seed_decides_the_samples_and_no_number(run, tmp_path):
    def judged(name: str, seed: int) -> tuple[float, dict[str, bytes]]:
        metrics = evaluate(run, [f"evaluate.seed={seed}"], tmp_path / name)
        return metrics["reconstruction"], {picture: (tmp_path / name / picture).read_bytes() for picture in PICTURES}

    (number, pictures), again, other = judged("a", 1), judged("b", 1), judged("c", 2)
    assert again == (number, pictures)
    assert other[0] == number and {name for name in PICTURES if other[1][name] != pictures[name]} == {"samples.png"}


def test_data_may_lie_elsewhere_but_must_have_the_models_shape(run, shards, tmp_path):
    color = write_shards(tmp_path / "color", {"test": (3,)}, shape=(3, 16, 16))
    with pytest.raises(ValueError, match=re.escape(f"data.root={color} holds images of shape (3, 16, 16)")) as refused:
        evaluate(run, [f"data.root={color}"])
    assert "(1, 16, 16)" in str(refused.value) and not (run / "evaluation").exists()
    shutil.copytree(shards, tmp_path / "moved")
    assert evaluate(run, [f"data.root={tmp_path / 'moved'}"])["images"] == 33


@pytest.mark.parametrize("name", [*checkpoints.FILES, "manifest.json"])
def test_damaged_checkpoint_is_refused_by_name(run, name):
    file = run / "checkpoints" / "step-00000004" / name
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DamagedCheckpoint, match=f"step-00000004 is damaged.*{name}"):
        evaluate(run, [])
    assert not (run / "evaluation").exists()


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("train.seed=1", "train.seed: 0 -> 1"),
        ("train.keep=9", f"train.keep: {Config().train.keep} -> 9"),  # may change when a run is continued, not here
        ("model.latent_dim=6", "model.latent_dim: 5 -> 6"),
        ("objective.entropy_weight=9", f"objective.entropy_weight: {Config().objective.entropy_weight} -> 9.0"),
        ("data.split=test", "data.split: train -> test"),
        ("model.encoder=json:JSONEncoder", "model.encoder: None -> json:JSONEncoder"),
    ],
)
def test_settings_of_the_training_are_refused(run, setting, line):
    with pytest.raises(ValueError, match=r"evaluation changes only evaluate\.\* and data\.root") as refused:
        evaluate(run, ["evaluate.batch=8", setting])
    assert [text.strip() for text in str(refused.value).splitlines()[1:]] == [line]


def test_setting_that_the_checkpoint_has_already_is_no_change(run):
    assert evaluate(run, ["model.latent_dim=5"])["images"] == 33


def test_network_of_ones_own_is_allowed_by_naming_it_again(shards, tmp_path):
    name = "saboteur:DivergingEncoder"
    config = configured(shards, "eae")
    run = save_run(tmp_path / "run", replace(config, model=replace(config.model, encoder=name)))
    with pytest.raises(ValueError, match=f"model.encoder={name}, code that is not part of eae_dist"):
        evaluate(run, [])
    assert evaluate(run, [f"model.encoder={name}"])["images"] == 33


def test_command_prints_the_numbers_that_it_writes(run, tmp_path, capsys):
    main(["--ckpt", str(run), "--out", str(tmp_path / "out"), "evaluate.count=9"])
    printed = capsys.readouterr().out
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["images"] == 9
    for shown in ("9 test images", f"{metrics['reconstruction']:.3f} per image", metrics["checkpoint"], str(tmp_path / "out")):
        assert shown in printed


@pytest.mark.parametrize(
    ("damage", "settings", "words"),
    [
        (lambda run: None, ["train.seed=1"], "error: evaluation changes only"),
        (lambda run: None, ["evaluate.batches=1"], "error: .*unknown key evaluate.batches; did you mean evaluate.batch"),
        (lambda run: None, ["evaluate.split=tset"], "error: .*no split 'tset'; it has test, train, validation"),
        (lambda run: None, ["data.root=absent"], "error: data.root=absent does not exist"),
        (lambda run: (run / "checkpoints" / "latest" / "state.json").unlink(), [], "error: .*state.json is missing"),
        (lambda run: shutil.rmtree(run), [], "error: .*holds no checkpoint; give a run folder"),
    ],
)
def test_command_ends_with_one_line_for_what_a_user_can_set_right(run, damage, settings, words):
    damage(run)
    with pytest.raises(SystemExit, match=words) as stop:
        main(["--ckpt", str(run), *settings])
    assert isinstance(stop.value.code, str)  # printed to stderr, exit status 1


def test_command_without_a_checkpoint_says_which_option_is_missing(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2 and "--ckpt" in capsys.readouterr().err


def test_evaluation_leaves_the_checkpoint_as_it_was(run):
    files = sorted((run / "checkpoints" / "step-00000004").iterdir())
    before = [file.read_bytes() for file in files]
    evaluate(run, [])
    assert [file.read_bytes() for file in files] == before and open_checkpoint(run).state["step"] == 4


def test_split_without_images_is_an_error(tmp_path):
    root = write_shards(tmp_path / "shards", {"test": (2,), "none": (0,)})
    run = save_run(tmp_path / "run", configured(root, "eae"))
    with pytest.raises(ValueError, match=r"evaluate.split=none .* holds no images"):
        evaluate(run, ["evaluate.split=none"])


def test_settings_may_stand_before_and_after_options(run, tmp_path):
    main(["--ckpt", str(run), "evaluate.count=3", "--out", str(tmp_path / "out"), "evaluate.seed=1"])
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["images"] == 3
