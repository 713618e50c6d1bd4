"""What is computed in float32 whatever the networks run in, and the scale of fp16's loss."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from test_compilation import CPU, SHAPE, images, weights
from world_cases import BATCH, OBJECTIVES, configured, run_of

from eae_dist import objectives
from eae_dist.config import load_config
from eae_dist.losses import entropy, terms
from eae_dist.numerics.precision import allow_tf32, full_precision
from eae_dist.objectives import build_objective
from eae_dist.training import checkpoint as checkpoints
from eae_dist.training import loop as trainer

START, FIRST_SCALE = trainer.start_accelerator, 2.0**24


@pytest.fixture(autouse=True)
def own_precision():
    """Whatever a test sets, the next one does not find."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    allow_tf32(False)


def tf32_allowed() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def products_are_exact() -> bool:
    products = torch.backends.cuda.matmul
    return products.fp32_precision == "ieee" if hasattr(products, "fp32_precision") else not products.allow_tf32


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_what_the_setting_says_but_for_the_search_and_the_losses(shards, tmp_path, monkeypatch, allowed):
    seen = []

    def noted(function):
        def wrapper(*arguments, **options):
            seen.append((function.__name__, products_are_exact()))
            return function(*arguments, **options)

        return wrapper

    monkeypatch.setattr(entropy, "nearest_neighbors", noted(entropy.nearest_neighbors))
    monkeypatch.setattr(objectives, "mean_share", noted(terms.mean_share))
    trainer.train(load_config(run_of(shards, tmp_path / "run", f"train.tf32={allowed}", steps=1)))
    assert tf32_allowed() == (allowed, allowed)
    assert set(seen) == {("nearest_neighbors", True), ("mean_share", True)}


def test_full_precision_puts_back_what_was_set_after_an_error_too():
    allow_tf32(True)
    with pytest.raises(KeyError), full_precision(CPU):
        assert products_are_exact()
        raise KeyError
    assert tf32_allowed() == (True, True)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_are_computed_in_float32_under_autocast(name):
    config = configured(Path(), name)
    objective = build_objective(config.model, config.objective, SHAPE, 0)
    x, numbers = images(26), np.arange(26)
    per_row = objective.per_row(x, numbers, 3)
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(objective.terms(per_row, torch.ones(26, dtype=torch.bool), 26, numbers, 3))
    assert all(term.dtype in (torch.float32, torch.int64) for term in found[1].values())
    assert all(torch.equal(found[0][term], found[1][term]) for term in found[0])


# Loss scaling, as accelerate does it on a GPU.


def scaled(config) -> object:
    """An accelerator that takes fp16 on a CPU, from a scale that overflows."""
    accelerator = START(replace(config, precision="fp32"))
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=FIRST_SCALE, growth_interval=3)
    accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    return accelerator


@pytest.mark.parametrize("accumulate", [1, 2])
def test_loss_scaling_leaves_out_steps_that_overflow_and_goes_on_with_the_same_bits(shards, tmp_path, monkeypatch, accumulate):
    monkeypatch.setattr(trainer, "start_accelerator", scaled)
    more = ("train.precision=fp16", f"train.accumulate={accumulate}", "data.validation=null", f"train.save_every={BATCH}")
    runs = {"whole": (10,), "parts": (6, 10)}
    for run, ends in runs.items():
        for steps in ends:
            AcceleratorState._reset_state(reset_partial_state=True)
            trainer.train(load_config(run_of(shards, tmp_path / run, *more, "train.keep=20", steps=steps)))
    whole, parts = (weights(tmp_path / run) for run in runs)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)

    # A step after which the scale is smaller has left the weights where they were.
    saved = [checkpoints.open_checkpoint(path) for path in sorted((tmp_path / "whole" / "checkpoints").glob("step-*"))]
    scales = [checkpoint.state["grad_scaler"]["scale"] for checkpoint in saved]
    assert scales[0] < FIRST_SCALE and any(now > before for before, now in itertools.pairwise(scales))
    steps = [next(iter(checkpoint.optimizer_state()["state"].values()), {"step": 0})["step"] for checkpoint in saved]
    for before, now, was, scale in zip(steps, steps[1:], scales, scales[1:], strict=False):
        assert int(now) == int(before) + (scale >= was)
    norms = [json.loads(line)["gradient_norm"] for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert all(norm < 10 for norm in norms)  # of the gradient itself, not of the scaled one
