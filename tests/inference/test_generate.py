"""Images from a trained model: in Python and as files."""

import numpy as np
import pytest
import torch
from conftest import torchrun
from PIL import Image
from run_folders import save_run
from world_cases import configured

import eae_dist
from eae_dist.evaluate import evaluate
from eae_dist.generate import main
from eae_dist.inference.trained_model import sample_seeds
from eae_dist.objectives import build_objective
from eae_dist.training import checkpoint as checkpoints
from eae_dist.training.checkpoint import open_checkpoint

pytestmark = pytest.mark.usefixtures("cpu")


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_model_reconstructs_and_samples_what_evaluation_judged(run):
    evaluate(run, [])
    model, x = eae_dist.load(run), torch.rand(5, 1, 16, 16)
    torch.testing.assert_close(model.reconstruct(x), model.decode(model.encode(x)))
    density = model.density("gmm")
    drawn = model.sample(7, "gmm", seed=3)
    torch.testing.assert_close(drawn, model.decode(density.sample(sample_seeds(3, np.arange(7))).float()))
    assert drawn.shape == (7, 1, 16, 16) and not drawn.requires_grad
    torch.testing.assert_close(model.sample(3, "gmm", seed=3), drawn[:3])
    assert not torch.allclose(model.sample(7, "isotropic", seed=3), drawn)


@pytest.mark.parametrize(
    "images", [torch.rand(2, 3, 16, 16), torch.rand(2, 1, 16, 8), torch.rand(1, 16, 16), torch.ones(2, 1, 16, 16).byte()]
)
def test_images_of_another_shape_or_type_are_refused(run, images):
    for reading in (eae_dist.load(run).encode, eae_dist.load(run).reconstruct):
        with pytest.raises(ValueError, match=r"the model takes images \[b, 1, 16, 16\] of floating point, got torch.\w+ \("):
            reading(images)
    with pytest.raises(ValueError, match=r"takes latents \[b, 5\] of floating point, got torch.float32 \(2, 4\)"):
        eae_dist.load(run).decode(torch.zeros(2, 4))


def test_isotropic_draws_need_no_evaluation_and_others_say_how_to_get_one(run):
    model = eae_dist.load(run)
    assert model.sample(2).shape == (2, 1, 16, 16)
    with pytest.raises(FileNotFoundError, match=r"mvg was not fitted; run `python -m eae_dist.evaluate --ckpt .*step-00000004 "):
        model.sample(2, "mvg")
    with pytest.raises(ValueError, match="the density gnn is unknown; it is one of isotropic, mvg, gmm, two_stage, flow"):
        model.sample(2, "gnn")


def test_density_of_other_weights_is_refused(run):
    evaluate(run, [])
    config = open_checkpoint(run).config
    objective = build_objective(config.model, config.objective, (1, 16, 16), seed=9)
    checkpoints.save(run, config, objective.state_dict(), {}, {"step": 8, "image_shape": [1, 16, 16]})
    trained_on = eae_dist.load(run)
    judged = r"take the checkpoint that .*evaluation/metrics.json names, or run `.*step-00000008 "
    with pytest.raises(ValueError, match=f"it was fitted to the latents of other weights; .*{judged}"):
        trained_on.sample(2, "gmm")
    assert eae_dist.load(run / "checkpoints" / "step-00000004").sample(2, "gmm").shape == (2, 1, 16, 16)


def test_two_stage_model_reconstructs_through_its_second_stage(shards, tmp_path):
    run = save_run(tmp_path / "run", configured(shards, "two_stage_vae"))
    with pytest.raises(FileNotFoundError, match="the density two_stage was not fitted"):
        eae_dist.load(run).reconstruct(torch.rand(2, 1, 16, 16))


def test_images_are_those_of_their_numbers_on_any_number_of_ranks(run, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    main(["--ckpt", str(run), "--count", "40", str(one)])
    done = torchrun(2, "-m", "eae_dist.generate", "--ckpt", str(run), "--count", "40", str(two))
    assert done.returncode == 0 and "40 draws from isotropic" in done.stdout, done.stderr
    names = [f"{number:06d}.png" for number in range(40)]
    assert sorted(file.name for file in one.iterdir()) == sorted(file.name for file in two.iterdir()) == names
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)
    # As in Python: blocks of another size differ by rounding, a pixel by one step at most.
    drawn = (eae_dist.load(run).sample(40)[:, 0] * 255).round().numpy()
    assert max(np.abs(pixels(one / name) - drawn[i]).max() for i, name in enumerate(names)) <= 1


def test_other_seeds_and_densities_give_other_images(run, tmp_path):
    evaluate(run, [])
    for folder, options in {"a=0": [], "b": ["evaluate.seed=1"], "c": ["--density", "mvg"]}.items():
        main(["--ckpt", str(run), "--count", "2", *options, str(tmp_path / folder)])
    a, b, c = (pixels(tmp_path / folder / "000001.png") for folder in ("a=0", "b", "c"))
    assert (a != b).any() and (a != c).any() and (b != c).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--density", "gmm"], "error: .*the density gmm was not fitted"),
        (["--count", "0"], "error: --count=0 must be at least 1"),
        ([], "error: .*out is not empty, and images of two sets must not mix"),
        (["model.width=3"], "error: only evaluate"),
    ],
)
def test_wrong_input_is_one_line(run, tmp_path, options, message):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "000000.png").touch()
    with pytest.raises(SystemExit, match=message):
        main(["--ckpt", str(run), str(tmp_path / "out"), *options])


@pytest.mark.parametrize(("folders", "got"), [([], "none"), (["a", "b"], "a b"), (["evaluate.seed=1"], "none")])
def test_one_folder_is_wanted(tmp_path, capsys, folders, got):
    with pytest.raises(SystemExit, match="2"):
        main(["--ckpt", str(tmp_path), *folders])
    assert f"expected one output folder OUT, got {got}\n" in capsys.readouterr().err
