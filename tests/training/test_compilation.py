"""How networks are run changes no result: activations that are computed twice, torch.compile, layouts."""

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from ranks import run_ranks, train_in_turn
from safetensors.torch import load_file
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from world_cases import configured, run_of

from eae_dist.config import ModelConfig, load_config
from eae_dist.distributed import ending_ranks
from eae_dist.model.autoencoder import Autoencoder, build_autoencoder, resolve_model
from eae_dist.model.norm import GlobalBatchNorm
from eae_dist.objectives import build_objective
from eae_dist.training import compilation as execution
from eae_dist.training import loop as trainer
from eae_dist.training import run as run_module
from eae_dist.training.compilation import checkpoint_activations, compile_networks

SHAPE, CPU = (1, 16, 16), torch.device("cpu")


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / "latest" / "model.safetensors")


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """Relative to the largest entry of each tensor."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= tolerance * tensor.abs().max(), name


@pytest.fixture(autouse=True)
def own_state():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)  # its precision would be that of the tests to come


# Norms that are differentiated twice.


@pytest.mark.parametrize("name", ["rae", "rae_gp"])
def test_norms_of_a_decoder_that_is_differentiated_twice_know_it(shards, name):
    config = configured(shards, name)
    objective = build_objective(config.model, config.objective, SHAPE, seed=0)
    execution.set_execution(objective, config.train, CPU)
    encoder, decoder = (
        {layer.twice_differentiated for layer in network.modules() if isinstance(layer, GlobalBatchNorm)}
        for network in (objective.autoencoder.encoder, objective.autoencoder.decoder)
    )
    assert encoder == {False} and decoder == {name == "rae_gp"}


def test_norm_that_is_differentiated_twice_is_the_same_to_the_second_derivative():
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(8, 3, 4, 5, dtype=torch.float64, generator=generator) for _ in range(2))
    found = {}
    for twice in (False, True):
        norm, at = GlobalBatchNorm(3).double(), (3 * x + 7).requires_grad_()
        norm.twice_differentiated = twice
        y = norm(at)
        gx, gw, gb = torch.autograd.grad(y, [at, norm.weight, norm.bias], dy, create_graph=True)
        (ggx,) = torch.autograd.grad(gx.square().sum(), at)
        found[twice] = {"y": y, "gx": gx, "gw": gw, "gb": gb, "ggx": ggx} | norm.state_dict()
    assert found[True]["y"].grad_fn.name() != found[False]["y"].grad_fn.name()  # they are two implementations
    assert_close(found[True], found[False], 1e-12)


# Activations that are computed twice. That they change no bit in training is a case of world.py.


def autoencoder(*, checkpointed: bool = False, spectral: bool = False, **settings) -> Autoencoder:
    torch.manual_seed(0)
    config = resolve_model(ModelConfig(width=4, latent_dim=5, **settings), SHAPE)
    model = build_autoencoder(config, SHAPE, spectral=spectral)
    if checkpointed:
        checkpoint_activations(model)
    return model


def images(count: int = 12) -> torch.Tensor:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("spectral", [False, True])
def test_activations_computed_twice_under_autocast_change_no_bit(spectral):
    states = []
    for checkpointed in (False, True):
        model = autoencoder(checkpointed=checkpointed, spectral=spectral)
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model.decode(model.encode(images())).square().sum()
            loss.backward()
        states.append({f"gradient of {name}": p.grad for name, p in model.named_parameters()} | model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("network", ["small", "rae32", "rae64"])
def test_one_activation_of_two_is_dropped(network):
    dropped = []
    for checkpointed in (False, True):
        model, kept = autoencoder(checkpointed=checkpointed, network=network), []
        for layer in model.modules():
            if isinstance(layer, nn.ReLU):
                layer.register_forward_hook(lambda _, __, out, kept=kept: kept.append(StorageWeakRef(out.untyped_storage())))
        out = model.decode(model.encode(images()))
        dropped.append([activation.expired() for activation in kept])
        out.sum().backward()
    layers = len(dropped[0])
    assert not any(dropped[0])
    assert sum(dropped[1]) == layers - 1  # the dense layer after the encoder's convolutions keeps its input


class Convolutions(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten.convolution.default
        return function(*args, **(kwargs or {}))


def test_no_convolution_is_computed_twice():
    model = autoencoder(checkpointed=True)
    with Convolutions() as forward:
        out = model.decode(model.encode(images()))
    with Convolutions() as backward:
        out.sum().backward()
    assert forward.count == 6 and backward.count == 0


def test_networks_without_anything_to_drop_are_refused(shards, tmp_path):
    with pytest.raises(ValueError, match="train.checkpoint_activations=true .* no network has them in"):
        autoencoder(checkpointed=True, norm="none")
    with pytest.raises(ValueError, match="train.compile=true: .* set train.checkpoint_activations=false"):
        load_config(run_of(shards, tmp_path, "train.compile=true", "train.checkpoint_activations=true"))


# torch.compile. Its own compiler takes minutes (tests/cluster/test_compiled.py); what comes before it is the same without.

COMPILED = {  # of which the first half is not compiled, or the last
    "eae": ["data.validation=null"],
    "rae_sn": ["data.validation=null"],
    "rae_gp": ["data.validation=null", "train.accumulate=2"],
}


def compiled_in_turn(*runs: list[str]) -> None:
    """Trains one run after the other, compiled as far as that goes without a compiler, and draws no pictures."""
    execution.check_compiler = lambda device: None
    execution.compile_networks = functools.partial(compile_networks, backend="aot_eager")
    run_module.draw_grids = lambda *_: {}
    with ending_ranks():
        for run in runs:
            trainer.train(load_config(run))


@pytest.mark.slow
def test_runs_go_from_eager_to_compiled_and_back_and_end_with_the_weights_of_those_that_stayed(shards, tmp_path):
    runs = []
    for name, settings in COMPILED.items():
        halves = [f"train.compile={first}" for first in (("true", "false") if name == "rae_sn" else ("false", "true"))]
        runs.append(run_of(shards, tmp_path / f"{name}-eager", *settings, name=name))
        for steps, compiled in zip((2, 4), halves, strict=True):
            runs.append(run_of(shards, tmp_path / f"{name}-both", *settings, compiled, name=name, steps=steps))
    ended = run_ranks(2, tmp_path / "logs", compiled_in_turn, *runs, timeout=400)  # on one: tests/cluster/test_compiled.py
    assert ended.codes == [0, 0], ended.said
    for name in COMPILED:
        # Without a compiler of kernels the same bits were measured; another decomposition of an operation may round differently.
        assert_close(weights(tmp_path / f"{name}-both"), weights(tmp_path / f"{name}-eager"), 1e-5)


def test_missing_compiler_is_one_line_that_names_the_setting(shards, tmp_path):
    nothing = {"CXX": "/nowhere/c++", "PATH": "/nowhere", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    arguments = run_of(shards, tmp_path / "run", "train.compile=true")
    ended = run_ranks(1, tmp_path / "logs", train_in_turn, arguments, environment=nothing)
    assert ended.codes == [1]
    last = ended.said[0].strip().splitlines()[-1]
    assert last.startswith("error: train.compile=true needs what torch.compile needs on cpu: InvalidCxxCompiler"), ended.said[0]


# Layouts.


def test_run_goes_on_in_another_layout(shards, tmp_path):
    def trained(*halves: str) -> dict[str, torch.Tensor]:
        run = tmp_path / "-".join(halves)
        for steps, layout in zip((2, 4), halves, strict=True):
            trainer.train(load_config(run_of(shards, run, f"train.channels_last={layout}", name="ae", steps=steps)))
        return weights(run)

    straight, other, both = trained("null", "true"), trained("false", "false"), trained("true", "false")
    # Rounding of four steps at learning rate 1e-3: measured 3e-6.
    assert_close(other, straight, 1e-4)
    assert_close(both, straight, 1e-4)
    kernel = next(tensor for name, tensor in straight.items() if tensor.ndim == 4)
    assert kernel.is_contiguous()


@pytest.mark.parametrize("channels_last", [None, True, False])
def test_layout_is_that_of_the_setting(channels_last):
    config = configured(Path(), "eae")
    objective = build_objective(config.model, config.objective, SHAPE, 0)
    execution.set_execution(objective, replace(config.train, channels_last=channels_last), CPU)
    kernels = [p for p in objective.parameters() if p.ndim == 4 and p.shape[1] > 1]
    layout = torch.contiguous_format if channels_last is False else torch.channels_last
    assert kernels and all(kernel.is_contiguous(memory_format=layout) for kernel in kernels)
