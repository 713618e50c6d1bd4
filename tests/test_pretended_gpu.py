"""Whole runs on a pretended GPU (`pretended_gpu.py`), beside the same on the CPU: no tensor lies on the wrong device."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pretended_gpu as gpu
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from conftest import image_of
from ranks import run_ranks
from run_folders import save_run
from safetensors.torch import load_file
from world_cases import BATCH, OBJECTIVES, configured, run_of

from eae_dist.config import load_config
from eae_dist.data.stream import ShardStream
from eae_dist.distributed import StopRequest, barrier, ending_ranks, gather_rows, message_device, rank, sum_over_ranks
from eae_dist.encode import encode
from eae_dist.evaluate import evaluate
from eae_dist.generate import generate
from eae_dist.inference.encoded_dataset import EncodedDataset
from eae_dist.inference.service.model import ServedModel
from eae_dist.latent.densities import DENSITIES
from eae_dist.losses import entropy
from eae_dist.metrics.features import FEATURES, OF_A_FILE, build_features
from eae_dist.metrics.inception import INCEPTION_FILE, PREPROCESSING
from eae_dist.neighbors import neighbors
from eae_dist.numerics.keyed_random import derive_key
from eae_dist.objectives import build_objective
from eae_dist.training.engines import engine_of
from eae_dist.training.loop import train, training_step
from eae_dist.training.run import Run
from eae_dist.training.setup import set_blocks
from eae_dist.training.validation import validate

pytestmark = pytest.mark.skipif(gpu.MISSING is not None, reason=f"{gpu.MISSING} cannot pretend to have a GPU")


def pretended(folder: Path, work: Callable, *arguments, device: str = "gpu", ranks: int = 1):
    """Returns what `work` returned on rank 0 of ranks of their own, which pretend to have the device or use the CPU."""
    environment, out = {"CUDA_VISIBLE_DEVICES": ""}, folder / f"{device}.pt"
    ended = run_ranks(ranks, folder / "logs", _saved, device, out, work, *arguments, environment=environment, timeout=900)
    assert ended.codes == [0] * ranks, "\n".join(text[-4000:] for text in ended.said)
    return torch.load(out, weights_only=False)


def _saved(device: str, out: Path, work: Callable, *arguments) -> None:
    with ending_ranks():
        if device == "gpu":
            gpu.pretend()
        with nullcontext() if device == "gpu" else gpu.Watching():
            found = work(*arguments)
        if rank() == 0:
            torch.save(gpu.values_of(found), out)


def on_both(folder: Path, work: Callable, *arguments, ranks: int = 1) -> list:
    """Returns what `work` returned on the CPU and on the pretended GPU, each with a folder of its own as its last argument."""
    return [pretended(folder, work, *arguments, folder / device, device=device, ranks=ranks) for device in ("cpu", "gpu")]


def of_every_row(work: Callable, shards: Path, _: Path) -> dict:
    """Returns what `work` returns for each row, all in one launch."""
    return {name: work(shards, name) for name in OBJECTIVES}


# The pretended GPU itself.


def behave_as_a_gpu() -> None:
    here, there = torch.arange(6.0, device=gpu.DEVICE).view(2, 3), torch.ones(3)
    for mixed in (lambda: here + there, lambda: torch.cat([here, there[None]]), lambda: here.addcmul_(there, here)):
        with pytest.raises(RuntimeError, match=r"mixes tensors of the GPU and of the CPU, the latter of shape \((1, )?3,?\)"):
            mixed()
    with pytest.raises((TypeError, RuntimeError), match="numpy"):
        here.numpy()
    assert (here * torch.tensor(2.0)).device == gpu.DEVICE and gpu.values_of(here * 2).sum() == 30
    mask, target = here > 2, torch.empty(2, 3)
    waiting = {
        "_local_scalar_dense": lambda: float(here.sum()),
        "_to_copy": lambda: here.cpu(),
        "nonzero": lambda: mask.nonzero(),
        "index": lambda: here[mask],
        "copy_": lambda: target.copy_(here),
        "equal": lambda: torch.equal(here, here),
    }
    for name, work in waiting.items():
        with gpu.waits() as found:
            work()
        assert [wait.split()[0] for wait in found] == [name]
    for work in (lambda: here.tolist(), lambda: bool(mask.any()), lambda: there.to(gpu.DEVICE), lambda: here.max().item()):
        with gpu.waits() as found:
            work()
        assert len(found) == 1
    with gpu.waits() as found:
        there.to(gpu.DEVICE, non_blocking=True)
        torch.where(mask, here, 0.0).masked_fill(mask, 1.0)[mask] = 3.0
        torch.zeros(3, device=gpu.DEVICE).index_add_(0, torch.zeros(2, dtype=torch.int64, device=gpu.DEVICE), here[:, 0])
    assert found == []


def test_tensors_of_two_devices_do_not_mix_and_waits_are_listed(tmp_path):
    pretended(tmp_path, behave_as_a_gpu)


def send_from_the_wrong_device() -> None:
    PartialState(cpu=True)
    assert message_device() == "gpu:0"
    mine = torch.full((2,), float(rank()), device=gpu.DEVICE)
    assert gpu.values_of(gather_rows(mine)).tolist() == [0, 0, 1, 1]
    assert gpu.values_of(sum_over_ranks(mine)).tolist() == [1, 1]
    for collective in (sum_over_ranks, gather_rows):
        with pytest.raises(RuntimeError, match="that are not on the gpu"):
            collective(torch.zeros(2))
    group = dist.new_group(backend="gloo")
    dist.all_reduce(torch.zeros(2), group=group)
    with pytest.raises(RuntimeError, match="that are not on the cpu"):
        dist.all_reduce(mine, group=group)


def test_collectives_refuse_tensors_of_another_device_than_their_groups(tmp_path):
    pretended(tmp_path, send_from_the_wrong_device, ranks=2)


# Training.


def steps_of(shards: Path, name: str, *settings: str) -> tuple[torch.Tensor, dict, dict]:
    """The terms of three steps, in the last of which two passes meet, the state after them, and the validation."""
    config = configured(shards, name, *settings)
    precision = config.train.precision
    AcceleratorState._reset_state()  # it keeps the precision of the first
    accelerator = Accelerator(cpu=True, mixed_precision="no" if precision == "fp32" else precision)
    stream = ShardStream(shards, "train", BATCH, seed=3, start_step=3)
    assert [stream.order.first(step).all() for step in (3, 4, 5)] == [True, True, False]
    objective = build_objective(config.model, config.objective, stream.index.image_shape, config.train.seed)
    optimizer = torch.optim.Adam(objective.parameters(), lr=1e-3)
    set_blocks(objective, config, stream)
    model, prepared = engine_of(accelerator).prepare(objective, optimizer, config, stream.lanes)
    terms = []
    for step, batch in zip((3, 4, 5), stream, strict=False):
        key = derive_key(3, step)
        terms.append(training_step(accelerator, model, prepared, batch, stream.row_ids, key, config.train)[1])
    with StopRequest(config.train.timeout) as stop:
        validation = validate(accelerator, objective, config, stop)
    assert all(tensor.device.type == accelerator.device.type for tensor in (*terms, *objective.state_dict().values()))
    return gpu.values_of((torch.stack(terms), objective.state_dict(), validation))


def every_kind_of_step(shards: Path, name: str) -> dict:
    kinds = ("train.clip_norm=1", "train.accumulate=2", "train.precision=bf16", "train.blocks=2")
    return {kind: steps_of(shards, name, kind) for kind in kinds}


@pytest.fixture(scope="module")
def steps_on_both(shards, tmp_path_factory) -> list[dict]:
    return on_both(tmp_path_factory.mktemp("steps"), of_every_row, every_kind_of_step, shards)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_steps_and_validation_of_every_row_have_the_bits_of_the_cpu(steps_on_both, name):
    on_cpu, found = (of_device[name] for of_device in steps_on_both)
    for kind, (terms, state, validation) in on_cpu.items():
        assert torch.equal(found[kind][0], terms) and terms.isfinite().all(), kind
        assert [key for key in state if not torch.equal(found[kind][1][key], state[key])] == [], kind
        assert found[kind][2] == validation, kind


def train_here(*runs: list[str]) -> None:
    """Trains one run after the other."""
    for arguments in runs:
        AcceleratorState._reset_state()  # it refuses to be asked for a CPU again
        train(load_config(arguments))


def run_on(device: str, shards: Path, run: Path, steps: int, *more: str, name: str = "eae") -> list[str]:
    return run_of(shards, run, f"train.device={'cpu' if device == 'cpu' else 'auto'}", *more, name=name, steps=steps)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / "latest" / "model.safetensors")


def test_averaged_weights_and_fused_steps_have_the_bits_of_the_cpu(shards, tmp_path):
    more = ("train.ema=0.9", "train.optimizer=adamw", "train.fused=true", f"train.validate_every={2 * BATCH}")
    for device in ("cpu", "gpu"):
        pretended(tmp_path, train_here, run_on(device, shards, tmp_path / device, 4, *more), device=device)
    on_cpu, found = weights(tmp_path / "cpu"), weights(tmp_path / "gpu")
    assert on_cpu.keys() == found.keys() and any(name.startswith("average.") for name in found)
    assert all(torch.equal(found[name], tensor) for name, tensor in on_cpu.items())


@pytest.mark.parametrize("ranks", [1, 2])
def test_runs_go_from_one_device_to_the_other_and_back_with_the_same_bits(shards, tmp_path, ranks):
    legs = {
        "whole": ["cpu"] * 3,
        "there": ["cpu", "gpu", "gpu"],
        "back": ["gpu", "cpu", "cpu"],
        "both": ["gpu", "cpu", "gpu"],
    }
    for leg, steps in enumerate((2, 4, 6)):
        for device in ("cpu", "gpu"):
            runs = [run for run, devices in legs.items() if devices[leg] == device]
            pictures = f"train.sample_every={2 * BATCH}"
            lines = [run_on(device, shards, tmp_path / run, steps, pictures) for run in runs]
            if lines:
                pretended(tmp_path, train_here, *lines, device=device, ranks=ranks)
    whole = weights(tmp_path / "whole")
    for run in legs:
        assert all(torch.equal(tensor, whole[name]) for name, tensor in weights(tmp_path / run).items()), run
        assert json.loads((tmp_path / run / "checkpoints" / "latest" / "state.json").read_text())["step"] == 6
        assert len(list((tmp_path / run / "samples").glob("step-0000000[246]-*.png"))) == 9


# Evaluation.

OF_DENSITIES = (f"evaluate.densities=[{','.join(DENSITIES)}]", "evaluate.second_stage_epochs=2")


def evaluated(run: Path, folder: Path) -> dict:
    PartialState(cpu=True)
    return evaluate(run, [*OF_DENSITIES, f"evaluate.cache={folder.parent}/cache"], folder)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", ["eae", "two_stage_vae"])
def test_evaluation_with_every_density_has_the_numbers_of_the_cpu(shards, tmp_path, name, ranks):
    run = save_run(tmp_path / "run", configured(shards, name))
    on_cpu, found = on_both(tmp_path, evaluated, run, ranks=ranks)
    assert {**found, "out": ""} == {**on_cpu, "out": ""} and found["sets"].keys() > DENSITIES.keys()


OF_A_PACKAGE = [name for name in FEATURES if name not in OF_A_FILE]


def of_the_cpu(images: torch.Tensor) -> torch.Tensor:
    """A user's features that lie on the CPU, wherever the images do."""
    return images.cpu().float().mean((2, 3))


def features_of_two_images(weights: Path, _) -> dict[str, torch.Tensor]:
    images = torch.stack([torch.from_numpy(image_of(number, (3, 32, 32))).permute(2, 0, 1) for number in range(2)])
    device = PartialState(cpu=True).device
    extractors = {name: build_features(name) for name in (*OF_A_PACKAGE, f"{__name__}:of_the_cpu")}
    extractors |= {name: build_features("inception", weights=weights, preprocessing=name) for name in PREPROCESSING}
    found = {name: extractor.to(device)(images.to(device)) for name, extractor in extractors.items()}
    assert all(features.device.type == device.type for features in found.values())
    return found


def test_every_feature_network_has_the_features_of_the_cpu(tmp_path, fid_case):
    on_cpu, found = on_both(tmp_path, features_of_two_images, fid_case / "hub" / "checkpoints" / INCEPTION_FILE)
    assert len(found) == len(OF_A_PACKAGE) + 1 + len(PREPROCESSING)
    assert [name for name, features in on_cpu.items() if not torch.equal(found[name], features)] == []


# What is done with a trained model.


@pytest.fixture
def judged(shards, tmp_path, request) -> Path:
    """A run of the row that the test names, with every density fitted to its latents on the CPU."""
    run = save_run(tmp_path / "run", configured(shards, request.param))
    pretended(tmp_path, evaluated, run, run / "evaluation", device="cpu")
    return run


def used(run: Path, folder: Path) -> tuple:
    """Latents and draws as files, and what is said about neighbors."""
    PartialState(cpu=True)
    encode(run, folder / "latents", ["evaluate.batch=8"])
    generate(run, folder / "drawn", "gmm", 20, ["evaluate.batch=8"])
    about = neighbors(EncodedDataset(folder / "latents", None, ["index.k=3"]), folder / "neighbors")
    barrier()
    files = {path.name: path.read_bytes() for path in [*folder.glob("latents/*.npy"), *folder.glob("drawn/*.png")]}
    return files, {name: about[name] for name in ("memorization", "duplicates", "label_accuracy", "entropy")}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("judged", ["eae"], indirect=True)
def test_latents_draws_and_neighbors_are_those_of_the_cpu(judged, tmp_path, ranks):
    on_cpu, (files, numbers) = on_both(tmp_path, used, judged, ranks=ranks)
    assert len(files) > 20 and (files, numbers) == on_cpu


def served(run: Path, _) -> list[np.ndarray]:
    images = np.stack([image_of(number).transpose(2, 0, 1) for number in range(3)])
    latents = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    device = PartialState(cpu=True).device
    model = ServedModel(run, None, [])
    assert model.device == device and not model.unreconstructed and model.densities.keys() == DENSITIES.keys()
    drawn = (model.sample(np.arange(3, dtype=np.uint64), name) for name in model.densities)
    return [*model.encode(images), *model.decode(latents), *model.reconstruct(images), *(array for two in drawn for array in two)]


@pytest.mark.parametrize("judged", ["eae", "two_stage_vae"], indirect=True)
def test_service_answers_what_it_answers_on_the_cpu(judged, tmp_path):
    on_cpu, found = on_both(tmp_path, served, judged)
    assert len(found) == 5 + 2 * len(DENSITIES) and all(map(np.array_equal, found, on_cpu))


# How often the host waits. Each entry is the beginning of a wait, with the reason why there is one.

WHERE_PASSES_MEET = {
    "_to_copy in training/loop.py: first = ": "second copies are known to the host, and left out of the entropy",
    "_to_copy in training/accumulation.py: is_first_copy = ": "the same of an accumulated step",
    "index in losses/entropy.py: rows = ": "the copies that are left out",
    "_local_scalar_dense in losses/entropy.py: sizes = ": "how many remain in each block, under train.blocks",
    "index_put outside of this package": "the gradient of those that are not",
    "copy_ in distributed/collectives.py: return _of_every_rank(torch.tensor(rows": "how many each rank leaves out",
    "_to_copy in distributed/collectives.py: return _of_every_rank(torch.tensor(rows": "the answer",
}


def waits_of_steps(shards: Path, name: str) -> dict[str, list[list[str]]]:
    """The waits of each of four steps, in the last of which two passes meet, and those of a validation of three blocks."""
    found = {}
    for kind in ("train.accumulate=1", "train.accumulate=2", "train.blocks=4"):
        AcceleratorState._reset_state()
        config = configured(shards, name, kind, "train.clip_norm=1")
        accelerator = Accelerator(cpu=True)
        stream = ShardStream(shards, "train", BATCH, seed=3, start_step=2)
        run = Run(config, accelerator, stream)
        steps = []
        for step, batch in zip((2, 3, 4, 5), stream, strict=False):
            with gpu.waits() as waits:
                arguments = (batch, stream.row_ids, derive_key(3, step), config.train)
                training_step(accelerator, run.model, run.prepared_optimizer, *arguments)
            steps.append(waits)
        found[kind] = steps
    with StopRequest(config.train.timeout) as stop, gpu.waits() as waits:
        validate(accelerator, run.objective, config, stop)
    return found | {"validation": [waits]}


@pytest.fixture(scope="module", params=[1, 2])
def waits_on_ranks(shards, tmp_path_factory, request) -> dict:
    folder = tmp_path_factory.mktemp("waits")
    return pretended(folder, of_every_row, waits_of_steps, shards, folder, ranks=request.param)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_host_waits_in_no_step_but_where_two_passes_meet(waits_on_ranks, name):
    found = dict(waits_on_ranks[name])
    (validation,) = found.pop("validation")
    for kind, (*_, between, meeting) in found.items():  # the first step makes the optimizer's state, the second DDP's buckets
        assert between == [], kind
        assert [wait for wait in meeting if not wait.startswith(tuple(WHERE_PASSES_MEET))] == [], kind
    # Of three blocks of 16 images; what it reads in the end does not grow with their number.
    assert len(validation) <= 3 + 8, validation


def test_host_waits_for_no_neighbor_of_many_tiles(tmp_path):
    pretended(tmp_path, search_in_tiles)


def search_in_tiles() -> None:
    z = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    expected = entropy.nearest_neighbors(z, 1, 20, 270)
    entropy.GPU_TILE = 64
    with gpu.waits() as waits:
        found = entropy.nearest_neighbors(z.to(gpu.DEVICE, non_blocking=True), 1, 20, 270)
    assert waits == [] and torch.equal(gpu.values_of(found), expected)


def waits_of_evaluation(run: Path, folder: Path) -> list[int]:
    """The waits of an evaluation in blocks of 16 images, and in blocks of 8."""
    PartialState(cpu=True)
    counts = []
    for batch in (16, 8):
        with gpu.waits() as waits:
            evaluate(run, ["evaluate.densities=[isotropic]", f"evaluate.batch={batch}"], folder / str(batch))
        counts.append(len(waits))
    return counts


def test_host_waits_once_a_block_of_an_evaluation(shards, tmp_path):
    run = save_run(tmp_path / "run", configured(shards, "eae", f"evaluate.cache={tmp_path}/cache"))
    of_three_blocks, of_five_blocks = pretended(tmp_path, waits_of_evaluation, run, tmp_path)
    sets = 5  # the reference, reconstructions, draws, two interpolations; each has 33 images
    assert of_five_blocks - of_three_blocks <= 2 * sets
