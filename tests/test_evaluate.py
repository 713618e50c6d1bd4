"""Judging a checkpoint, in this process; test_laws.py has it over ranks."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, image_of, rank_environment, write_shards
from PIL import Image
from run_folders import SHAPE, save_run
from world_cases import configured

import eae_dist
from eae_dist import evaluate as evaluate_module
from eae_dist.config import Config
from eae_dist.data.image_folders import walk_images
from eae_dist.data.shard_index import ShardIndex
from eae_dist.data.stream import walk
from eae_dist.distributed import failures
from eae_dist.distributed.start import first_host, srun_ranks, tasks_of_nodes
from eae_dist.errors import UserError
from eae_dist.evaluate import evaluate, evaluate_folders, main, said_once
from eae_dist.inference import image_comparison
from eae_dist.inference import trained_model as generation
from eae_dist.inference.trained_model import sample_seeds, spherical_middle
from eae_dist.latent.densities import DENSITIES
from eae_dist.latent.mixture import Mixture
from eae_dist.latent.two_stage import TwoStage
from eae_dist.metrics.extractor import Extractor
from eae_dist.metrics.features import FEATURES, build_features
from eae_dist.metrics.frechet import FeatureStats, frechet_distance
from eae_dist.metrics.image_sets import compare, describe
from eae_dist.metrics.similarity import ssim
from eae_dist.model.autoencoder import Autoencoder
from eae_dist.numerics.json_files import read_json
from eae_dist.report.summaries import summary_of_folders, summary_of_sets
from eae_dist.training import checkpoint as checkpoints
from eae_dist.training.checkpoint import DamagedCheckpoint, open_checkpoint

pytestmark = pytest.mark.usefixtures("cpu")
PICTURES = {"samples.png", "reconstructions.png", "interpolations.png"}


def drawn_images(count: int, shape=SHAPE) -> torch.Tensor:
    """The first test images as conftest.py drew them, float64 in [0, 1]: the third split starts at 20,000."""
    pixels = [torch.from_numpy(image_of(20_000 + number, shape)) for number in range(count)]
    return torch.stack(pixels).permute(0, 3, 1, 2).double() / 255


def direct_error(run: Path, count: int, shape=SHAPE) -> float:
    """The mean over images of the summed squared error, in float64."""
    model, x = eae_dist.load(run).double(), drawn_images(count, shape)
    with torch.no_grad():
        return (model.decode(model.encode(x)) - x).square().sum((1, 2, 3)).mean().item()


@pytest.mark.parametrize(("settings", "count"), [([], 33), (["evaluate.count=7"], 7), (["evaluate.count=99"], 33)])
def test_metrics_are_those_of_a_direct_computation(run, settings, count):
    metrics = evaluate(run, settings)
    assert metrics["images"] == count
    # A sum over 256 pixels in float32: 1e-5 is 100 roundings.
    assert metrics["reconstruction"] == pytest.approx(direct_error(run, count), rel=1e-5)
    assert metrics["reconstruction_per_pixel"] == pytest.approx(metrics["reconstruction"] / 256, rel=1e-12)
    model, x = eae_dist.load(run).double(), drawn_images(count, SHAPE)
    with torch.no_grad():
        reconstruction = model.decode(model.encode(x))
    ratios = -10 * (reconstruction - x).square().mean((1, 2, 3)).log10()
    assert metrics["psnr"] == pytest.approx(ratios.mean().item(), rel=1e-5)
    assert metrics["ssim"] == pytest.approx(ssim(reconstruction, x).mean().item(), rel=1e-4)
    assert direct_error(run, 7) != pytest.approx(direct_error(run, 33), rel=1e-4)


def test_metrics_of_color_images_are_those_of_a_direct_computation(tmp_path, monkeypatch):
    shape = (3, 16, 16)
    monkeypatch.setitem(FEATURES, "efflite0_64px", lambda: Seen([]))
    root = write_shards(tmp_path / "color", {"train": (30,), "validation": (1,), "test": (9,)}, shape)
    run = save_run(tmp_path / "run", configured(root, "ae", "evaluate.features=efflite0"), shape)
    metrics = evaluate(run, ["evaluate.densities=[isotropic]"])
    assert metrics["reconstruction"] == pytest.approx(direct_error(run, 9, shape), rel=1e-5)
    assert metrics["reconstruction_per_pixel"] == pytest.approx(metrics["reconstruction"] / (3 * 256), rel=1e-12)


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
    densities = ("isotropic", "mvg", "gmm")
    drawn = {f"samples-{name}.png" for name in densities}
    assert {file.name for file in folder.iterdir()} == PICTURES | drawn | {"metrics.json", "densities", ".lock"}
    assert {file.name for file in (folder / "densities").iterdir()} == {f"{name}.safetensors" for name in densities}
    assert read_json(folder / "metrics.json", {}, "", is_sealed=True) == metrics
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
        ("objective.entropy_weight=9", "objective.entropy_weight: 0.02 -> 9.0"),
        ("data.split=test", "data.split: train -> test"),
        ("model.encoder=json:JSONEncoder", "model.encoder: None -> json:JSONEncoder"),
    ],
)
def test_settings_of_the_training_are_refused(run, setting, line):
    with pytest.raises(ValueError, match=r"only evaluate\.\*, index\.\* and data\.root can be set") as refused:
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


def test_numbers_stand_below_their_names_whatever_their_length():
    names = ("fd_a_network_of_my_own", "kd_a_network_of_my_own", "precision")
    sets = {"isotropic": dict(zip(names, (12.5, 3.0, 0.5), strict=True)), "gmm": {names[0]: 7.0}}
    features = {"metric": names[0], "kernel_metric": names[1]}
    head, *lines = summary_of_sets({"features": features, "headline": names[0], "sets": sets, "warnings": []})
    ends = [head.index(name) + len(name) for name in names]
    assert [lines[0][:end].split()[-1] for end in ends] == ["12.5", "3", "0.5"]
    assert lines[1][: ends[0]].split() == ["gmm", "7"] and {len(line) for line in lines} == {len(head)}
    head, *_ = summary_of_sets({"features": features, "headline": names[1], "sets": sets, "warnings": []})
    assert head.split() == [names[1], names[0], "precision", "recall", "density", "coverage"]  # what to read first stands first


@pytest.mark.parametrize(
    ("damage", "settings", "words"),
    [
        (lambda run: None, ["train.seed=1"], "error: only evaluate"),
        (lambda run: None, ["evaluate.batches=1"], "error: .*unknown key evaluate.batches; did you mean evaluate.batch"),
        (lambda run: None, ["evaluate.split=tset"], "error: .*no split 'tset'; it has .*, validation; change evaluate.split"),
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


SETS = {"reconstruction", "isotropic", "mvg", "gmm", "interpolation_linear", "interpolation_spherical"}


def without_place(metrics: dict) -> dict:
    return {key: value for key, value in metrics.items() if key != "out"}


def test_distances_are_those_of_the_images_that_the_model_makes(run):
    metrics = evaluate(run, ["evaluate.frechet=sqrtm"])
    model, features = eae_dist.load(run), build_features("thumbnails")
    density = eae_dist.load(run).density("mvg")
    with torch.no_grad():
        drawn = model.decode(density.sample(sample_seeds(0, np.arange(33))).float())
        generated, real = FeatureStats(), FeatureStats()
        generated.add(features((drawn * 255).round().to(torch.uint8)))
        real.add(features((drawn_images(33) * 255).round().to(torch.uint8)))
    # 33 images in blocks of 16 or in one: float32 features differ by rounding, few pixels by one step of uint8.
    assert metrics["sets"]["mvg"]["fd_thumbnails64"] == pytest.approx(frechet_distance(real, generated, "sqrtm"), rel=1e-3)
    assert metrics["latents"]["images"] == 33 and metrics["latents"]["sliced_wasserstein"] > 0
    assert metrics["sets"].keys() == SETS and metrics["features"]["metric"] == "fd_thumbnails64"
    assert metrics["headline"] == "kd_thumbnails64"  # with fewer images than features a Fréchet distance is too large
    said = "33 images for 64 features give a covariance of rank 32 at most; read kd_thumbnails64"
    assert (
        sum(said in warning for warning in metrics["warnings"]) == sum("rank" in warning for warning in metrics["warnings"]) == 1
    )


def test_set_of_fewer_images_than_features_is_not_read_by_its_frechet_distance(run):
    """Also where the reference has enough: 150 training images, but 33 reconstructions."""
    metrics = evaluate(run, ["evaluate.reference=train", "evaluate.densities=[isotropic]"])
    assert metrics["reference_images"] == 150 and metrics["headline"] == "kd_thumbnails64"
    assert any("33 images for 64 features" in warning for warning in metrics["warnings"])
    enough = evaluate(run, ["evaluate.reference=train", "evaluate.split=train", "evaluate.densities=[isotropic]"])
    assert enough["headline"] == "fd_thumbnails64" and not any("64 features" in warning for warning in enough["warnings"])


def test_neighbor_images_bound_what_is_compared_row_by_row_and_no_moments(run):
    every, few = (evaluate(run, settings)["sets"] for settings in ([], ["evaluate.neighbor_images=20"]))
    for name, numbers in few.items():
        assert (every[name]["neighbor_images"], numbers["neighbor_images"], numbers["images"]) == (33, 20, 33)
        assert (
            numbers["fd_thumbnails64"] == every[name]["fd_thumbnails64"]
            and numbers["kd_thumbnails64"] != every[name]["kd_thumbnails64"]
        )


def test_interrupted_evaluation_goes_on_and_ends_with_the_same_numbers(run, tmp_path, monkeypatch):
    whole = evaluate(run, [], tmp_path / "whole")
    compared = []

    def break_off(*arguments):
        compared.append(arguments[-1])
        if len(compared) == 4:
            raise KeyboardInterrupt
        return compare(*arguments)

    monkeypatch.setattr(evaluate_module, "compare", break_off)
    with pytest.raises(KeyboardInterrupt):
        evaluate(run, [], tmp_path / "broken")
    monkeypatch.setattr(Mixture, "fit", None)  # not called again
    again = evaluate(run, [], tmp_path / "broken")
    assert len(compared) == 4 + 3  # six sets, three of them known, and the one that was broken off
    assert without_place(again) == without_place(whole)
    assert not (tmp_path / "broken" / ".progress.json").exists()


def test_progress_of_other_settings_is_not_used(run, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate_module, "save_grids", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        evaluate(run, [], tmp_path / "out")
    monkeypatch.undo()
    other = evaluate(run, ["evaluate.seed=1"], tmp_path / "out")
    assert other["sets"]["isotropic"] != evaluate(run, [], tmp_path / "plain")["sets"]["isotropic"]


PROGRESS = {"empty": "", "null": "null", "list": "[]", "cut": '{"key": {"che', "no sets": '{"key": {}}', "number": "1"}


@pytest.mark.parametrize("text", PROGRESS.values(), ids=PROGRESS)
def test_progress_and_numbers_that_cannot_be_read_are_made_again(run, tmp_path, caplog, text):
    whole = evaluate(run, ["evaluate.densities=[mvg]"], tmp_path / "out")
    for name in (".progress.json", "metrics.json"):
        (tmp_path / "out" / name).write_text(text)
    again = evaluate(run, ["evaluate.densities=[mvg]"], tmp_path / "out")
    assert again == whole and f"{tmp_path}/out/.progress.json cannot be read" in caplog.text
    assert read_json(tmp_path / "out" / "metrics.json", {"sets": dict}, "", is_sealed=True)["sets"] == whole["sets"]


def test_second_evaluation_into_a_folder_is_refused_while_the_first_runs(run, tmp_path):
    script = (
        f"from eae_dist.training.run_folder import lock; from pathlib import Path; _held = lock(Path({str(tmp_path / 'out')!r}))"
    )
    script += "; print('held', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=rank_environment()
    ) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(OSError, match=f"--out={tmp_path}/out is in use by another job .process {other.pid} on "):
            evaluate(run, [], tmp_path / "out")
        other.stdin.write(b"\n")
    assert evaluate(run, ["evaluate.densities=[mvg]"], tmp_path / "out")["images"] == 33


def test_warnings_that_differ_in_their_set_alone_are_one():
    doubts = {f"the set {name}": [f"features of the set {name} are odd"] for name in ("mvg", "gmm")} | {
        "the set x": ["the set x!"]
    }
    assert said_once(doubts) == ["features of the set mvg, the set gmm are odd", "the set x!"]
    assert said_once({"mvg": ["mvg: rank 3"], "gmm": ["gmm: rank 3", "gmm: other"]}) == ["mvg, gmm: rank 3", "gmm: other"]


def test_densities_never_lie_beside_the_numbers_of_another_evaluation(run, tmp_path, monkeypatch):
    evaluate(run, [], tmp_path)
    numbers = (tmp_path / "metrics.json").read_bytes()
    monkeypatch.setattr(evaluate_module, "compare", refuse)
    for settings, left in (([], True), (["evaluate.components=3"], False)):
        with pytest.raises(ValueError, match="no latents"):
            evaluate(run, settings, tmp_path)
        assert (tmp_path / "metrics.json").is_file() is left and (not left or (tmp_path / "metrics.json").read_bytes() == numbers)


def test_fit_to_latents_that_fill_no_more_than_a_subspace_is_a_warning(tmp_path):
    root = write_shards(tmp_path / "shards", {"train": (4,), "validation": (1,), "test": (9,)})
    run = save_run(tmp_path / "run", configured(root, "ae"))
    warnings = evaluate(run, ["evaluate.densities=[mvg]"])["warnings"]
    assert "mvg: the latents span only 3 of 5 dimensions, and so do the samples" in warnings


def test_density_that_cannot_be_fitted_is_left_out_unless_it_was_asked_for(run):
    metrics = evaluate(run, ["evaluate.components=50"])
    assert metrics["sets"].keys() == SETS - {"gmm"}
    assert "150" in metrics["densities"]["gmm"]["failed"] and any(text.startswith("gmm: ") for text in metrics["warnings"])
    with pytest.raises(ValueError, match="evaluate.densities: gmm cannot be fitted: "):
        evaluate(run, ["evaluate.components=50", "evaluate.densities=[gmm]"])


def test_two_stage_vae_is_never_judged_without_its_second_stage(shards, tmp_path, monkeypatch):
    monkeypatch.setitem(DENSITIES, "two_stage", lambda **options: TwoStage(width=4, **options))
    run = save_run(tmp_path / "run", configured(shards, "two_stage_vae"))
    metrics = evaluate(run, ["evaluate.densities=[mvg]", "evaluate.second_stage_epochs=1"])
    assert {"two_stage", "mvg"} <= metrics["sets"].keys()
    monkeypatch.setattr(TwoStage, "fit", refuse)
    for settings in (["evaluate.seed=1"], ["evaluate.seed=1", "evaluate.densities=[mvg]"]):
        with pytest.raises(ValueError, match="two_stage cannot be fitted: no latents"):
            evaluate(run, settings)


def refuse(*_):
    raise UserError("no latents")


def test_density_that_fails_leaves_no_older_one_behind(run):
    evaluate(run, [])
    assert (gmm := run / "evaluation" / "densities" / "gmm.safetensors").is_file()
    evaluate(run, ["evaluate.components=50"])
    assert not gmm.exists()


def test_unknown_density_is_refused_before_anything_is_computed(run, monkeypatch):
    monkeypatch.setattr(evaluate_module, "reference_images", None)
    with pytest.raises(ValueError, match="evaluate.densities: mgv is unknown; it is one of isotropic"):
        evaluate(run, ["evaluate.densities=[gmm,mgv]"])


def test_two_stage_vae_is_judged_through_its_second_stage(shards, tmp_path, monkeypatch):
    monkeypatch.setitem(DENSITIES, "two_stage", lambda **options: TwoStage(width=16, **options))
    run = save_run(tmp_path / "run", configured(shards, "two_stage_vae"))
    plain = save_run(tmp_path / "plain", configured(shards, "two_stage_vae"))
    short = "evaluate.second_stage_epochs=2"
    through, direct = evaluate(run, [short]), evaluate(plain, [short, "evaluate.densities=[two_stage,isotropic]"])
    assert through["sets"].keys() == SETS - {"isotropic", "mvg", "gmm"} | {"two_stage"}
    assert through["sets"]["reconstruction"] == direct["sets"]["reconstruction"]
    density = eae_dist.load(run).density("two_stage")
    latents = torch.randn(20, 5)
    assert not torch.allclose(density.reconstruct(latents), latents, atol=0.1)  # two epochs: far from the identity
    model, images = eae_dist.load(run), next(walk(shards, "test", 33, rank=0, world=1))["image"] / 255
    with torch.no_grad():
        expected = (model.decode(density.reconstruct(model.encode(images))) - images).square().sum((1, 2, 3)).mean()
        assert torch.equal(model.reconstruct(images), model.decode(density.reconstruct(model.encode(images))))
    assert through["reconstruction"] == pytest.approx(expected.item(), rel=1e-4)


def test_statistics_of_the_reference_are_taken_once(run, tmp_path, monkeypatch):
    cache = f"evaluate.cache={tmp_path}/cache"
    first = evaluate(run, [cache])
    monkeypatch.setattr(evaluate_module, "describe", counted := Counted(evaluate_module.describe))
    assert without_place(evaluate(run, [cache])) == without_place(first)
    assert counted.calls == len(SETS)
    evaluate(run, [cache, "evaluate.reference=validation"])
    assert counted.calls == 2 * len(SETS) + 1
    (kept, _) = sorted((tmp_path / "cache").iterdir())
    os.replace(_, kept)
    with pytest.raises(ValueError, match="was made from .* expected .* remove it"):
        [evaluate(run, [cache, f"evaluate.reference={split}"]) for split in ("test", "validation")]


class Counted:
    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *arguments):
        self.calls += 1
        return self.function(*arguments)


def test_function_that_only_the_checkpoint_names_is_not_run(shards, tmp_path):
    run = save_run(tmp_path / "run", configured(shards, "ae", "evaluate.features=own_features:means"))
    with pytest.raises(ValueError, match="own_features:means is named only by the checkpoint; give it on the command line"):
        evaluate(run, [])


def test_pixels_that_are_not_finite_are_an_error_and_not_black(run, monkeypatch):
    decode = Autoencoder.decode
    monkeypatch.setattr(Autoencoder, "decode", lambda self, z: torch.where(z[:, :1, None, None] > 0, decode(self, z), torch.nan))
    with pytest.raises(
        ValueError, match=r"reconstruction: the decoder made pixels that are not finite numbers, in \d+ of the images 0 to"
    ):
        evaluate(run, [])


def test_images_whose_features_are_not_finite_are_an_error_that_counts_them(run, monkeypatch):
    # A decoder of black images, and features that black images have none of.
    monkeypatch.setattr(generation, "to_uint8", lambda images: torch.zeros(images.shape, dtype=torch.uint8))
    extractor = build_features("thumbnails")
    forward = extractor.forward
    extractor.forward = lambda x: torch.where((x > 0).flatten(1).any(1, keepdim=True), forward(x), torch.nan)
    monkeypatch.setattr(evaluate_module, "open_features", lambda *_: extractor)
    with pytest.raises(ValueError, match="features of 33 images of the set reconstruction are not finite numbers"):
        evaluate(run, [])


# Two folders of images


@pytest.fixture
def folders(tmp_path, monkeypatch) -> tuple[Path, Path]:
    """33 and 20 gray images of 16x16, the second lot partly those of the first; in sub-folders and beside other files."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # of the cache
    for name, numbers in {"real": range(33), "generated": range(20, 40)}.items():
        (tmp_path / name / "inner").mkdir(parents=True)
        for number in numbers:
            place = tmp_path / name / ("inner" if number % 2 else ".")
            Image.fromarray(image_of(number)[..., 0]).save(place / f"{number:03d}.png")
        (tmp_path / name / "list.txt").write_text("not an image")
    return tmp_path / "real", tmp_path / "generated"


def folder_stats(numbers) -> FeatureStats:
    stats = FeatureStats()
    images = np.stack([image_of(number) for number in numbers])
    stats.add(build_features("thumbnails")(torch.from_numpy(images).permute(0, 3, 1, 2)))
    return stats


def test_folders_are_judged_by_all_their_images(folders, tmp_path, capsys):
    out = tmp_path / "out"
    main(["--images", *map(str, folders), "--out", str(out), "evaluate.features=thumbnails", "evaluate.batch=8"])
    metrics = json.loads((out / "metrics.json").read_text())
    numbers = metrics["sets"]["generated"]
    assert (numbers["images"], metrics["reference_images"]) == (20, 33)
    # Blocks of 8 or all at once: float32 features differ by rounding.
    expected = frechet_distance(folder_stats(range(33)), folder_stats(range(20, 40)))
    assert numbers["fd_thumbnails64"] == pytest.approx(expected, rel=1e-4) and expected > 0.5
    assert f"20 images of {folders[1]} against 33 of {folders[0]}, by the features thumbnails64, v/64" in capsys.readouterr().out
    first = evaluate_folders(*folders, ["evaluate.features=thumbnails", "evaluate.count=7"])
    assert (first["sets"]["generated"]["images"], first["reference_images"]) == (7, 7)


def test_folder_that_went_through_the_network_before_is_not_taken_again_unless_its_images_changed(folders, monkeypatch):
    settings, taken = ["evaluate.features=thumbnails"], []

    def noted(*arguments, stop: int):
        taken.append(arguments[-1])
        if len(taken) == stop:
            raise KeyboardInterrupt
        return describe(*arguments)

    monkeypatch.setattr(image_comparison, "describe", partial(noted, stop=2))
    with pytest.raises(KeyboardInterrupt):
        evaluate_folders(*folders, settings)
    whole = evaluate_folders(*folders, settings)
    assert evaluate_folders(*folders, settings)["sets"] == whole["sets"]
    os.replace(folders[0] / "000.png", folders[0] / "002.png")
    changed = evaluate_folders(*folders, settings)
    assert changed["sets"] != whole["sets"] and changed["reference_images"] == 32
    assert taken == [f"the images of {folder}" for folder in (folders[0], folders[1], folders[1], folders[0])]


def test_files_are_read_as_pytorch_fid_reads_them_by_name(tmp_path, monkeypatch):
    kept: list = []
    (folder := tmp_path / "images").mkdir()
    hidden = Image.new("RGBA", (4, 6), (200, 0, 0, 0))
    turned = Image.Exif()
    turned[0x0112] = 6  # shown turned by a quarter
    hidden.save(folder / "a.png")
    Image.new("RGB", (4, 6), (200, 0, 0)).save(folder / "b.png", exif=turned)
    monkeypatch.setitem(FEATURES, "efflite0_64px", lambda: Seen(kept))
    warnings = evaluate_folders(folder, folder, ["evaluate.read=pytorch-fid"])["warnings"]
    said = "2 of 2 images of {} have an EXIF orientation or transparency; evaluate.read=pytorch-fid ignored both"
    assert said.format(folder) in warnings
    assert kept and all(
        images.shape[2:] == (6, 4) and (images[:, 0] == 200).all() and (images[:, 1:] == 0).all() for images in kept
    )


ROTATED = {  # as stored
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.T,
    6: lambda x: np.rot90(x),
    7: lambda x: x[::-1, ::-1].T,
    8: lambda x: np.rot90(x, -1),
}


@pytest.mark.parametrize("orientation", ROTATED)
def test_images_saved_with_an_orientation_or_alpha_are_the_same_images(orientation, folders, tmp_path):
    """300 digits beside the same digits lying on their side were 321 apart."""
    other, turned = tmp_path / "turned", Image.Exif()
    turned[0x0112] = orientation
    for path in folders[0].rglob("*.png"):
        stored = np.ascontiguousarray(ROTATED[orientation](np.array(Image.open(path))))
        there = other / path.relative_to(folders[0])
        there.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(stored).convert("RGBA").save(there, exif=turned)
    metrics = evaluate_folders(folders[0], other, ["evaluate.features=thumbnails"])
    assert metrics["sets"]["generated"]["fd_thumbnails64"] == pytest.approx(0, abs=1e-5)
    warned = [warning for warning in metrics["warnings"] if "EXIF orientation" in warning]
    assert warned == (
        []
        if orientation == 1
        else [
            f"33 of 33 images of {other} have an EXIF orientation or transparency; evaluate.read=pack applied the "
            f"orientation and composed transparency on white"
        ]
    )
    again = evaluate_folders(folders[0], other, ["evaluate.features=thumbnails"])  # from the cache
    assert again["warnings"] == metrics["warnings"] and again["sets"] == metrics["sets"]
    parity = evaluate_folders(folders[0], other, ["evaluate.features=thumbnails", "evaluate.read=pytorch-fid"])
    assert (parity["sets"]["generated"]["fd_thumbnails64"] > 0.1) == (orientation != 1)


def test_count_of_images_of_the_rule_is_of_all_ranks_and_images(tmp_path):
    (folder := tmp_path / "images").mkdir()
    for number in range(20):
        alpha = np.full((16, 16, 1), 255 if number % 4 else 7, np.uint8)
        Image.fromarray(np.dstack([image_of(number), image_of(number), image_of(number), alpha])).save(
            folder / f"{number:02}.png"
        )
    images = walk_images(folder, 8)
    assert len(list(images.images)) == 3 and images.of_the_rule == {0, 4, 8, 12, 16}


def test_folders_of_different_sizes_are_named_and_can_be_resized(folders, tmp_path, capsys):
    small = tmp_path / "small"
    small.mkdir()
    for number in range(20, 40):
        Image.fromarray(image_of(number)[2:14, 2:14, 0]).save(small / f"{number}.png")
    main(["--images", str(folders[0]), str(small), "evaluate.features=thumbnails"])
    said = capsys.readouterr().out
    assert f"20 images of {small} (12x12) against 33 of {folders[0]} (16x16), by the features thumbnails64, v/64" in said
    assert f"warning: the images differ in size (those of {folders[0]} 16x16, those of {small} 12x12; width x height)" in said
    main(["--images", str(folders[0]), str(small), "evaluate.features=thumbnails", "evaluate.resize=12"])
    assert "(12x12)" not in (said := capsys.readouterr().out) and "differ in size" not in said


@pytest.mark.parametrize("mode", ["L", "RGB"])  # gray is read as three equal channels
@pytest.mark.parametrize("size", [1, 7, 9, 16, 33])
def test_mixed_sizes_are_resized_as_pack_does(size, mode, tmp_path):
    (folder := tmp_path / "images").mkdir()
    draw, expected = np.random.default_rng(0), []
    for number, (height, width) in enumerate([(20, 30), (16, 16), (9, 12), (40, 13)]):
        image = Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)
        image.save(folder / f"{number}.png")
        side = min(height, width)
        left, top = (width - side) // 2, (height - side) // 2
        expected.append(
            np.array(image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BILINEAR))
        )
    images = torch.cat([images for _, images in walk_images(folder, 3, resize=size).images])
    expected = [image if image.ndim == 3 else np.stack(3 * [image], axis=2) for image in expected]
    np.testing.assert_array_equal(images.permute(0, 2, 3, 1), np.stack(expected))


def zipped(folder: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*"), reverse=True):
            archive.write(file, file.relative_to(folder.parent))
        archive.writestr("__MACOSX/real/._000.png", b"what a Mac leaves")
    return path


def test_a_zip_file_is_the_folder_in_it(folders, tmp_path):
    settings = ["evaluate.features=thumbnails", "evaluate.batch=8"]
    whole = evaluate_folders(*folders, settings)
    archives = [zipped(folder, tmp_path / f"{folder.name}.zip") for folder in folders]
    assert evaluate_folders(*archives, settings)["sets"] == whole["sets"]
    for one, other in zip(walk_images(folders[0], 8).images, walk_images(archives[0], 8).images, strict=True):
        assert one[0] == other[0] and torch.equal(one[1], other[1])


def zip_of(path: Path, **files: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name.replace("_", "."), data)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), "is not a folder, .* or is damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:-30]), "is not a folder, .* or is damaged"),
        (lambda path: path.write_text("text"), "is not a folder, .* or is damaged"),
        (lambda path: path.write_bytes(b""), "is not a folder, .* or is damaged"),
        (lambda path: path.write_text("<!DOCTYPE html><html>"), "is not a folder, .* or is damaged"),
        (lambda path: path.unlink(), "is not a folder|does not exist|is not there"),
        (lambda path: flip(path, path.read_bytes().index(b"IDAT") + 20), "is not a usable image|cannot be read"),
        (lambda path: zip_of(path, a_txt=b"a"), "holds no image files"),
        (lambda path: zip_of(path), "holds no image files"),
        (lambda path: zip_of(path, a_png=b"no image"), "is not a usable image|not an image|cannot be read"),
        (lambda path: zip_of(path, a_zip=path.read_bytes()), "holds no image files"),
    ],
)
def test_wrong_zip_files_are_one_line(spoil, message, folders, tmp_path):
    spoil(zipped(folders[0], tmp_path / "a.zip"))
    with pytest.raises(SystemExit, match=f"error: .*a.zip.* ?({message})") as ended:
        main(["--images", str(folders[0]), str(tmp_path / "a.zip"), "evaluate.features=thumbnails"])
    assert "\n" not in str(ended.value)


# Files of statistics


def saved_stats(folder: Path, path: Path, capsys) -> Path:
    main(["--save-stats", str(folder), str(path), "evaluate.features=thumbnails", "evaluate.batch=8"])
    assert f"of {folder}, v/64, in {path}" in capsys.readouterr().out
    return path


def test_statistics_are_those_of_the_images_on_either_side(folders, tmp_path, capsys):
    settings = ["evaluate.features=thumbnails", "evaluate.batch=8"]
    whole = evaluate_folders(*folders, settings)["sets"]["generated"]["fd_thumbnails64"]
    files = [saved_stats(folder, tmp_path / f"{folder.name}.npz", capsys) for folder in folders]
    expected = folder_stats(range(33))
    with np.load(files[0]) as file:
        np.testing.assert_allclose(file["mu"], expected.mean, atol=1e-4)
        np.testing.assert_allclose(file["sigma"], expected.covariance, atol=1e-4)
        assert file["mu"].dtype == file["sigma"].dtype == np.float64 and int(file["count"]) == 33
    for real, generated in ((files[0], folders[1]), (folders[0], files[1]), (files[0], files[1])):
        metrics = evaluate_folders(real, generated, settings if folders[0] == real or folders[1] == generated else [])
        assert metrics["sets"]["generated"]["fd_thumbnails64"] == pytest.approx(whole, rel=1e-9)
        assert (metrics["sets"]["generated"]["images"], metrics["reference_images"]) == (20, 33)
        assert metrics["headline"] == "fd_thumbnails64" and metrics["sets"]["generated"].keys() == {"fd_thumbnails64", "images"}
        assert any("only the Fréchet distance can be told from statistics" in warning for warning in metrics["warnings"])
        assert any("20 images for 64 features" in warning for warning in metrics["warnings"])


def test_statistics_as_pytorch_fid_and_adm_write_them_are_read(folders, tmp_path, capsys):
    stats = folder_stats(range(33))
    moments = {"mu": stats.mean.numpy(), "sigma": stats.covariance.numpy()}
    np.savez(tmp_path / "fid.npz", **moments)
    np.savez(tmp_path / "adm.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8), mu_s=np.zeros(9), **moments)
    expected = frechet_distance(stats, folder_stats(range(20, 40)))
    for name in ("fid.npz", "adm.npz"):
        main(["--images", str(tmp_path / name), str(folders[1]), "evaluate.features=thumbnails", "--out", str(tmp_path / "out")])
        said = f"20 images of {folders[1]} against statistics of {tmp_path / name}, by the features thumbnails64, v/64"
        assert said in capsys.readouterr().out
        metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
        assert metrics["sets"]["generated"]["fd_thumbnails64"] == pytest.approx(expected, rel=1e-4)
        assert metrics["reference_images"] is None
    both = evaluate_folders(tmp_path / "fid.npz", tmp_path / "adm.npz", [])
    assert both["sets"]["generated"]["frechet_distance"] == pytest.approx(0, abs=1e-9)
    assert "adm.npz against statistics of" in summary_of_folders(both)
    assert ", by features that neither file names:\n" in summary_of_folders(both)
    with pytest.raises(ValueError, match="fid.npz does not say which features it is of; set evaluate.features"):
        evaluate_folders(tmp_path / "fid.npz", folders[1], [])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros(3)}, "has no mu and sigma; it has images"),
        ({"mu": np.zeros(64)}, "has no mu and sigma; it has mu"),
        ({"mu": np.zeros(64), "sigma": np.zeros((64, 63))}, r"mu is \[64\] and sigma \[64, 63\]; expected \[f\] and \[f, f\]"),
        ({"mu": np.zeros(64), "sigma": np.full((64, 64), np.nan)}, "holds NaN or infinity"),
        ({"mu": np.zeros(64), "sigma": np.triu(np.ones((64, 64)))}, "sigma is not symmetric"),
        ({"mu": np.zeros(9), "sigma": np.eye(9)}, "is of 9 features, fd_thumbnails64 has 64; set evaluate.features"),
        ({"mu": np.array([{}]), "sigma": np.eye(1)}, "cannot be read as statistics"),
        (
            {"mu": np.zeros(64), "sigma": np.eye(64), "features": json.dumps({"metric": "fd_other"})},
            "was made with the metric 'fd_other', not 'fd_thumbnails64'",
        ),
    ],
)
def test_wrong_statistics_are_one_line(arrays, message, folders, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(SystemExit, match=f"error: .*a.npz.*{message}"):
        main(["--images", str(tmp_path / "a.npz"), str(folders[0]), "evaluate.features=thumbnails"])


def test_wrong_arguments_for_statistics_are_one_line(folders, tmp_path, capsys):
    with pytest.raises(SystemExit, match="must end in .npz"):
        main(["--save-stats", str(folders[0]), str(tmp_path / "a.txt"), "evaluate.features=thumbnails"])
    np.savez(tmp_path / "a.npz", mu=np.zeros(4), sigma=np.eye(4))
    with pytest.raises(SystemExit, match="is a file of statistics already"):
        main(["--save-stats", str(tmp_path / "a.npz"), str(tmp_path / "b.npz"), "evaluate.features=thumbnails"])
    np.savez(tmp_path / "c.npz", mu=np.zeros(5), sigma=np.eye(5))
    with pytest.raises(SystemExit, match=r"are of different features \(4 and 5\)"):
        main(["--images", str(tmp_path / "a.npz"), str(tmp_path / "c.npz")])
    with pytest.raises(SystemExit, match="nothing.npz"):
        main(["--images", str(tmp_path / "nothing.npz"), str(folders[0])])


@pytest.mark.parametrize("setting", ["evaluate.read=pytorch-fid", "evaluate.resize=8"])
def test_settings_for_files_are_refused_for_a_checkpoint(setting, run):
    with pytest.raises(ValueError, match="is for files of images"):
        evaluate(run, [setting])


def test_folders_are_seen_in_color_by_networks_for_color(folders, monkeypatch):
    seen = []
    monkeypatch.setitem(FEATURES, "efflite0_64px", lambda: Seen(seen))
    evaluate_folders(*folders, [])
    assert {images.shape[1:] for images in seen} == {(3, 16, 16)} and sum(map(len, seen)) >= 53
    assert all((images[:, :1] == images).all() for images in seen)  # gray: three equal channels


class Seen(Extractor):
    """Features of nothing, which keeps what it saw."""

    def __init__(self, seen: list):
        numbers = torch.arange(1.0, 9.0)
        super().__init__(lambda x: x.float().mean((1, 2, 3))[:, None] * numbers, lambda x: seen.append(x) or x, **NAMELESS)


NAMELESS = {"metric": "fd", "dimensions": 8, "sha256": None, "preprocessing": "none"}


def test_tasks_of_an_srun_step_judge_two_folders_together_as_one_process_does(folders, tmp_path):
    command = ["--images", *map(str, folders), "evaluate.batch=8"]
    main([*command, "--out", str(tmp_path / "one")])
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_STEP_TASKS_PER_NODE": "2"}
    step |= {"SLURM_NODEID": "0", "MASTER_PORT": str(port), "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "CUDA_VISIBLE_DEVICES": ""}
    tasks = [
        subprocess.Popen(
            [sys.executable, "-m", "eae_dist.evaluate", *command, "--out", str(tmp_path / "two")],
            env=rank_environment() | step | {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)},
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        for task in range(2)
    ]
    try:
        said = [task.communicate(timeout=120)[0] for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    assert [task.returncode for task in tasks] == [0, 0]
    assert "20 images of" in said[0] and said[1] == ""
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert one["sets"] == two["sets"]


def test_tasks_of_srun_are_named_as_torchrun_names_ranks(monkeypatch):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    env = {"SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_JOB_ID": "1000", "SLURM_STEP_ID": "1"}
    env |= {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "4,2"}
    ranks = srun_ranks(env)
    port = int(ranks.pop("MASTER_PORT"))
    where = {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert ranks == {"RANK": "5", "WORLD_SIZE": "6", **where, "MASTER_ADDR": "gpu07"}
    next_job = srun_ranks(env | {"SLURM_JOB_ID": "1001", "SLURM_STEP_ID": "0"})
    assert 15_000 <= port < 30_000 and port != int(next_job["MASTER_PORT"])
    assert srun_ranks(env | {"MASTER_PORT": "9", "MASTER_ADDR": "there"}) == ranks | {"MASTER_PORT": "9", "MASTER_ADDR": "there"}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # a GPU of its own for each task
    assert srun_ranks(env)["LOCAL_RANK"] == "0"
    assert srun_ranks(env | {"RANK": "0"}) == srun_ranks(env | {"SLURM_STEP_NUM_TASKS": "1"}) == srun_ranks({}) == {}
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert srun_ranks(env) == {}


def test_ranks_with_different_arguments_are_refused(monkeypatch):
    monkeypatch.setattr(failures, "gather_objects", lambda value: [value, value, ["--ckpt", "b"]])
    failures.require_equal(["--ckpt", "b"], "arguments")
    with pytest.raises(ValueError, match=r"^rank 2 has other arguments than rank 0.*'b'.*'a'.*SLURM_STEP_NUM_TASKS=1"):
        failures.require_equal(["--ckpt", "a"], "arguments")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("cpu1", "cpu1"), ("cpu1,cpu2", "cpu1"), ("gpu[07-10,12],cpu1", "gpu07"), ("r[1-2]n[3,5].site", "r1n3.site")],
)
def test_first_host_of_a_list_of_slurm(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize(("counts", "tasks"), [("4", [4]), ("4(x2),3", [4, 4, 3]), ("1,12(x3)", [1, 12, 12, 12])])
def test_tasks_of_nodes_of_slurm(counts, tasks):
    assert tasks_of_nodes(counts) == tasks


def test_wrong_second_folder_is_said_before_the_first_is_judged(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(image_comparison, "describe", lambda *_: pytest.fail("the first folder went through the network"))
    (empty := tmp_path / "empty").mkdir()
    for generated, message in ((tmp_path / "nowhere", "is not a folder"), (empty, "holds no image files")):
        with pytest.raises(SystemExit, match=message):
            main(["--images", str(folders[0]), str(generated), "evaluate.features=thumbnails"])


def test_wrong_folders_are_one_line(folders, tmp_path):
    (tmp_path / "empty").mkdir()
    (odd := tmp_path / "odd").mkdir()
    Image.new("L", (16, 16)).save(odd / "a.png")
    Image.new("L", (16, 8)).save(odd / "b.png")
    (broken := tmp_path / "broken").mkdir()
    (broken / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for generated, message in {
        tmp_path / "nowhere": "nowhere is not a folder",
        tmp_path / "empty": r"empty holds no image files \(.bmp",
        odd: r"odd: a.png is 16x16, b.png is 16x8 \(width x height\); all must have one size: evaluate.resize=N",
        broken: "a.png is not a usable image: ",
    }.items():
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            main(["--images", str(folders[0]), str(generated), "evaluate.features=thumbnails"])
    with pytest.raises(SystemExit, match="data.root=x: only evaluate"):
        main(["--images", *map(str, folders), "data.root=x"])


def test_middle_of_an_arc_lies_on_the_sphere_and_of_opposite_points_is_their_mean():
    a, b = torch.randn(10, 7, dtype=torch.float64), torch.randn(10, 7, dtype=torch.float64)
    a, b = 3 * a / a.norm(dim=1, keepdim=True), 3 * b / b.norm(dim=1, keepdim=True)
    middle = spherical_middle(a, b)
    torch.testing.assert_close(middle.norm(dim=1), torch.full((10,), 3.0, dtype=torch.float64))
    torch.testing.assert_close((middle - a).norm(dim=1), (middle - b).norm(dim=1))
    torch.testing.assert_close(spherical_middle(a, -a), torch.zeros_like(a))
    torch.testing.assert_close(spherical_middle(a, a), a)
