"""Optimizers, learning rates and averages of the weights on one rank; test_laws.py has them over ranks."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from run_folders import bits_of
from world_cases import BATCH, run_of

from eae_dist.config import TrainConfig, load_config
from eae_dist.distributed import StopRequest
from eae_dist.inference.judged_checkpoint import load_objective
from eae_dist.training import checkpoint as checkpoints
from eae_dist.training.loop import train
from eae_dist.training.optimization import WeightAverage, build_optimizer, learning_rate
from eae_dist.training.validation import validate

pytestmark = pytest.mark.usefixtures("cpu")
EVERY = f"train.validate_every={2 * BATCH}", f"train.save_every={BATCH}", "train.keep=20"


def rates(end: int, samples: int = 100, **settings) -> list[float | None]:
    """The learning rates of a run of batches of 10."""
    config = TrainConfig(global_batch=10, learning_rate=0.5, **settings)
    return [learning_rate(config, step, end, samples) for step in range(end)]


def test_rate_rises_in_a_line_to_that_of_the_schedule():
    plain = {"constant": [0.5] * 12, "plateau": [None] * 12, "exponential": [0.5] * 10 + [0.4] * 2}
    for schedule, expected in plain.items():
        assert rates(12, schedule=schedule, decay=0.8) == pytest.approx(expected)
        rising = [0.125, 0.25, 0.375, 0.5]
        found = rates(12, schedule=schedule, decay=0.8, warmup_epochs=0.4)
        assert found == pytest.approx([*rising, *expected[4:]])
    assert rates(12, schedule="constant", warmup_epochs=0.01) == pytest.approx(plain["constant"])  # less than a step


def test_cosine_goes_from_the_whole_rate_to_its_factor():
    found = rates(8, schedule="cosine", cosine_factor=0.2)
    assert found == pytest.approx([0.1 + 0.4 * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)])
    assert found[4] == pytest.approx(0.3)
    assert rates(10, schedule="cosine", cosine_factor=0.2, warmup_epochs=0.2)[2:] == pytest.approx(found)
    assert rates(10, schedule="cosine", warmup_epochs=0.2)[:3] == pytest.approx([0.25, 0.5, 0.5])
    assert rates(5, schedule="cosine", cosine_factor=1.0) == [0.5] * 5


def test_adamw_shrinks_weights_without_a_gradient_and_adam_does_not():
    for name, factor in {"adam": 1.0, "adamw": 1 - 0.5 * 0.1}.items():
        weight = torch.nn.Parameter(torch.tensor([2.0, -3.0]))
        weight.grad = torch.zeros(2)
        config = TrainConfig(optimizer=name, learning_rate=0.5, weight_decay=0.1)
        build_optimizer([weight], config).step()
        assert weight.tolist() == pytest.approx([2 * factor, -3 * factor])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_fused_optimizer_takes_the_same_steps_up_to_rounding(name, fused):
    weight, expected = (torch.nn.Parameter(torch.ones(7)) for _ in range(2))
    ours = build_optimizer([weight], TrainConfig(optimizer=name, fused=fused, learning_rate=0.1))
    theirs = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]([expected], lr=0.1)
    for step in range(5):
        for optimizer, of in ((ours, weight), (theirs, expected)):
            of.grad = torch.arange(7.0).sub(step).square()
            optimizer.step()
    assert bool(ours.param_groups[0]["fused"]) == fused
    torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-6)


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


COSINE = ("train.optimizer=adamw", "train.schedule=cosine", "train.cosine_factor=0.1", "train.warmup_epochs=0.5")
SETTINGS = {
    "cosine": COSINE,
    "plateau": ("train.schedule=plateau", "train.plateau_patience=1", "train.warmup_epochs=0.4", "train.learning_rate=1"),
    "fused": ("train.fused=true",),
    "average": ("train.ema=0.9", "train.fused=true", *COSINE),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_interrupted_run_ends_with_the_bits_and_rates_of_one_that_was_not(shards, tmp_path, settings):
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    for run in (whole, parted):
        train(load_config(run_of(shards, run, *EVERY, *settings, steps=9)))
    folder = parted / "checkpoints"
    for step in range(4, 10):  # as if it had been killed after step 3, between two validations
        shutil.rmtree(folder / f"step-{step:08d}")
    for link in ("latest", "best"):
        (folder / link).unlink()
    (folder / "latest").symlink_to("step-00000003")
    train(load_config(run_of(shards, parted, *EVERY, *settings, steps=9)))
    assert bits_of(whole) == bits_of(parted)
    assert [line["step"] for line in records(parted)] == list(range(1, 10))


def test_run_has_the_rates_of_its_schedule_and_the_plateau_waits_for_the_end_of_the_warmup(shards, tmp_path):
    found = {}
    for name in ("cosine", "plateau"):
        run = tmp_path / name
        more = ["objective.entropy_weight=-1", "train.learning_rate=1e-6", "model.norm_momentum=1e-9"]  # nothing improves
        train(load_config(run_of(shards, run, f"train.validate_every={BATCH}", *SETTINGS[name], *more, steps=9)))
        found[name] = [line["learning_rate"] for line in records(run)]
        config = load_config(["--config", str(run / "config.yaml")]).train
        expected = [learning_rate(config, step, 9, 150) for step in range(9)]
        assert found[name][: 3 if name == "plateau" else None] == pytest.approx(expected[: 3 if name == "plateau" else None])
    # The warm-up ends with step 3. The validations after steps 1 and 2 do not count; that of step 3 is the first.
    assert found["plateau"][2:] == pytest.approx([1e-6, 1e-6] + [1e-6 * 0.5**n for n in range(1, 6)])


def test_average_follows_the_weights_by_its_decay_and_faster_at_first():
    module = torch.nn.Linear(2, 1)
    average = WeightAverage(module, 0.5)
    expected = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    for step in range(1, 16):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(step)
        average.update(step)
        decay = min(0.5, step / (step + 9))
        expected = {name: decay * expected[name] + (1 - decay) * now.detach() for name, now in module.named_parameters()}
    torch.testing.assert_close(average.averages, expected)
    trained = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    with pytest.raises(KeyError), average.in_use():
        torch.testing.assert_close(dict(module.named_parameters()), expected, check_stride=False)
        raise KeyError
    assert all(torch.equal(parameter, trained[name]) for name, parameter in module.named_parameters())


def test_averages_are_judged_and_saved_and_change_no_step(shards, tmp_path):
    plain, averaged = tmp_path / "plain", tmp_path / "averaged"
    every = (*EVERY, f"train.sample_every={2 * BATCH}")
    for run, more in ((plain, []), (averaged, ["train.ema=0.8"])):
        train(load_config(run_of(shards, run, *every, *more, steps=6)))
    last = checkpoints.open_checkpoint(averaged)
    weights, averages = checkpoints.split_averages(last.model_state())
    expected = checkpoints.open_checkpoint(plain).model_state()
    assert weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in expected)
    objective = load_objective(last)
    assert averages.keys() == dict(objective.named_parameters()).keys()
    for name, parameter in objective.named_parameters():
        assert torch.equal(parameter, averages[name]) and not torch.equal(parameter, weights[name])
    assert all(torch.equal(buffer, weights[name]) for name, buffer in objective.state_dict().items() if name not in averages)

    # The validation of the log is that of the averages.
    with StopRequest(60) as stop:
        terms = validate(Accelerator(cpu=True), objective, last.config, stop)
    logged = records(averaged)[-1]
    assert logged["validation_loss"] == pytest.approx(terms["loss"], rel=1e-6)
    assert logged["validation_loss"] != records(plain)[-1]["validation_loss"] and logged["loss"] == records(plain)[-1]["loss"]
    name = "step-00000006-samples.png"
    assert (averaged / "samples" / name).read_bytes() != (plain / "samples" / name).read_bytes()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.warmup_epochs=40"], "train.warmup_epochs=40 must be less than train.epochs=40"),
        (["train.weight_decay=0.1"], "train.weight_decay=0.1 has no effect with train.optimizer=adam"),
        (["train.cosine_factor=1.5"], r"train.cosine_factor=1.5 must lie in \[0, 1\]"),
        (["train.ema=0"], r"train.ema=0.0 must lie in \(0, 1\]"),
        (["train.optimizer=sgd"], "train.optimizer=sgd is unknown; it is one of adam, adamw"),
    ],
)
def test_optimizer_that_cannot_be_meant_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        load_config(settings)
