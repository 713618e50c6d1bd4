"""Blocks on one rank: the same gradients as without them, and what is refused. That ranks share them is in test_laws.py."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from world_cases import BATCH, OBJECTIVES, configured

from eae_dist.data.stream import ShardStream
from eae_dist.distributed import in_blocks, joined, local_blocks, one_per_block, split_rows, sum_of_blocks
from eae_dist.distributed.collectives import add_pairwise
from eae_dist.losses.entropy import gaussian_reference
from eae_dist.model.autoencoder import to_unit
from eae_dist.objectives import build_objective
from eae_dist.training import setup
from eae_dist.training.loop import train
from eae_dist.training.setup import set_blocks


def test_sums_are_a_binary_tree():
    # In float32, 2^24 + 1 is 2^24: only neighbors that are added first let the ones count.
    assert float(add_pairwise(torch.tensor([2.0**24, 0, 1, 1]).unbind())) == 2**24 + 2
    assert float(add_pairwise(torch.tensor([2.0**24, 1, 1, 0]).unbind())) == 2**24
    assert float(add_pairwise(torch.tensor([1.0, 2, 3, 4, 5]).unbind())) == 15


def test_sum_over_blocks_and_back_can_be_differentiated_twice():
    def normalized(x):
        parts = split_rows(x, (2, 3, 1))
        means = one_per_block(sum_of_blocks([part.sum(0) for part in parts], True) / 6, 3, True)
        return joined([(part - mean).sin() for part, mean in zip(parts, means, strict=True)])

    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(normalized(x), (x - x.mean(0)).sin())
    assert torch.autograd.gradcheck(normalized, x) and torch.autograd.gradgradcheck(normalized, x)


@pytest.mark.parametrize("sizes", [(4,), (1, 3)])
def test_rows_and_their_gradients_keep_their_memory_format(sizes):
    x = torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last).requires_grad_()
    (gradient,) = torch.autograd.grad(joined(split_rows(x, sizes)).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), x)
    assert all(found.is_contiguous(memory_format=torch.channels_last) for found in (gradient, second))
    assert torch.equal(second, 8 * x)


@pytest.mark.parametrize("shape", [(6, 1, 8, 8), (1, 8, 8, 8), (6, 8, 1, 1)])
def test_one_block_has_the_strides_that_it_has_beside_others(shape):
    # Where a side is 1, its stride says nothing, but kernels choose the order of their sums by it.
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.empty_like(torch.randn(shape), memory_format=memory_format)
        beside = split_rows(joined([x, x]), [len(x)] * 2)[0]
        assert joined([x]).stride() == beside.stride()


def gradients(objective, stream) -> tuple[dict, dict]:
    """Terms and gradients of the first batch."""
    batch = next(iter(stream))
    terms = objective(to_unit(batch["image"], torch.device("cpu")), batch["first"], BATCH, stream.row_ids, 7)
    terms["loss"].backward()
    return terms, {name: parameter.grad for name, parameter in objective.named_parameters()}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_blocks_change_terms_and_gradients_by_rounding_only(shards, name):
    torch.set_default_dtype(torch.float64)
    try:
        config = configured(shards, name, "train.blocks=8", "data.lanes=13")
        stream = ShardStream(shards, "train", BATCH, lanes=13, seed=3)
        found = []
        for settings in (config, replace(config, train=replace(config.train, blocks=0))):
            objective = build_objective(settings.model, settings.objective, (1, 16, 16), 0)
            set_blocks(objective, settings, stream)
            found.append(gradients(objective, stream))
    finally:
        torch.set_default_dtype(torch.float32)
    (terms, gradient), (expected_terms, expected) = found
    for found_tensors, wanted in ((terms, expected_terms), (gradient, expected)):
        assert found_tensors.keys() == wanted.keys()
        for what, tensor in wanted.items():
            torch.testing.assert_close(found_tensors[what].double(), tensor.double(), rtol=1e-11, atol=1e-12)


def test_blocks_are_runs_of_lanes(shards):
    objective = build_objective(configured(shards, "ae").model, configured(shards, "ae").objective, (1, 16, 16), 0)
    config = configured(shards, "ae", "train.blocks=4", "data.lanes=13")
    set_blocks(objective, config, ShardStream(shards, "train", BATCH, lanes=13))
    assert objective.block_edges.tolist() == [0, 6, 12, 18, 26]
    assert local_blocks(objective.block_edges, np.arange(1, BATCH, 2)).sizes == (3, 3, 3, 4)


def test_parts_of_a_network_work_on_one_block_at_a_time(shards):
    config = configured(shards, "ae", "train.blocks=2")
    objective = build_objective(config.model, config.objective, (1, 16, 16), 0)
    set_blocks(objective, config, ShardStream(shards, "train", BATCH))
    seen = []
    objective.autoencoder.encoder.head.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    with in_blocks(local_blocks(objective.block_edges, np.arange(BATCH))):
        objective.autoencoder.encode(torch.rand(BATCH, 1, 16, 16))
    assert seen == [BATCH, 13, 13]  # the whole, and then the blocks


def test_gaussian_reference_in_blocks_is_that_without():
    options = {"k": 1, "average_k": False, "eps2": 1e-4, "seed": 0}
    assert gaussian_reference(50, 5, blocks=8, **options) == pytest.approx(gaussian_reference(50, 5, **options), rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "ranks", "said"),
    [
        (["train.blocks=4"], 3, "train.blocks=4 cannot be shared by 3 ranks"),
        (["train.blocks=4"], 8, "train.blocks=4 cannot be shared by 8 ranks"),
        (["train.blocks=32"], 1, "train.blocks=32 must be at most 26, the number of lanes"),
        (["train.blocks=8", "train.accumulate=4"], 1, "train.accumulate=4 needs as many images in every block"),
    ],
)
def test_what_blocks_cannot_do_is_refused(shards, monkeypatch, settings, ranks, said):
    config = configured(shards, "ae", *settings)
    monkeypatch.setattr(setup, "world_size", lambda: ranks)
    objective = build_objective(config.model, config.objective, (1, 16, 16), 0)
    with pytest.raises(ValueError, match=said):
        set_blocks(objective, config, ShardStream(shards, "train", BATCH))


@pytest.mark.parametrize(
    ("network", "said"),
    [
        ("NormedTogether", "parameters of its own and a batch norm"),
        ("Inside", "model.encoder rounds otherwise if it works on another number of images at a time"),
        ("Reaching", "model.encoder uses the weights head.weight outside of the forward pass of their module"),
        ("Placed", r"the module mixed of model.encoder gets tensors \[\(8, 33\), \(1, 33\)\] for 8 images"),
    ],
)
def test_network_that_cannot_work_block_by_block_is_refused(shards, network, said):
    config = configured(shards, "ae", "train.blocks=2", f"model.encoder=own_networks:{network}")
    objective = build_objective(config.model, config.objective, (1, 16, 16), 0)
    with pytest.raises(ValueError, match=said):
        set_blocks(objective, config, ShardStream(shards, "train", BATCH))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_network_that_draws_random_numbers_is_refused(cpu, shards, tmp_path, accumulate):
    more = f"train.accumulate={accumulate}", "model.encoder=saboteur:DroppingEncoder", f"train.output={tmp_path / 'run'}"
    with pytest.raises(ValueError, match="draws random numbers, as dropout does"):
        train(configured(shards, "ae", "train.blocks=2", *more))


def test_network_that_keeps_statistics_of_its_images_is_refused(cpu, shards, tmp_path):
    more = "train.blocks=2", "model.encoder=own_networks:Counting", f"train.output={tmp_path / 'run'}"
    with pytest.raises(ValueError, match="the module Counting of model.encoder keeps statistics of its images"):
        train(configured(shards, "ae", *more))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["train.blocks=6"], "train.blocks=6 must be 0 or a power of two"),
        (["train.blocks=4", "train.compile=true"], "compiled networks cannot run block by block"),
        (["train.blocks=4", "objective.group=2"], "the entropy of groups depends on the number of ranks"),
    ],
)
def test_settings_that_contradict_blocks_are_refused(shards, settings, said):
    with pytest.raises(ValueError, match=said):
        configured(shards, "eae", *settings)
