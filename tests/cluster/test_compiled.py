"""Training with the kernels of torch's own compiler, which takes a minute: with validation, pictures and blocks of all sizes."""

import json
import shutil
from pathlib import Path

import pytest
from ranks import run_ranks, train_in_turn
from safetensors.torch import load_file
from world_cases import BATCH

pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="needs a C++ compiler")


def arguments(shards: Path, run: Path, compiled: bool) -> list[str]:
    return [
        "objective.name=ae",
        f"data.root={shards}",
        f"train.output={run}",
        f"train.global_batch={BATCH}",
        f"train.epochs={4 * BATCH / 150}",
        f"train.log_every={BATCH}",
        f"train.validate_every={2 * BATCH}",
        f"train.compile={compiled}",
        "train.trackers=[]",
        "train.device=cpu",
        "train.learning_rate=1e-3",
        "model.width=4",
        "model.latent_dim=5",
        "evaluate.batch=16",  # blocks of 16, 16 and 8 images
    ]


@pytest.mark.parametrize("ranks", [1, 2])
def test_compiled_run_is_the_eager_run(shards, tmp_path, ranks):
    runs = {run: tmp_path / run for run in ("eager", "compiled")}
    settings = [arguments(shards, folder, run == "compiled") for run, folder in runs.items()]
    logs = {"TORCH_LOGS": "recompiles"}
    ended = run_ranks(ranks, tmp_path / "logs", train_in_turn, *settings, environment=logs, timeout=900)
    assert ended.codes == [0] * ranks and "limit" not in ended.said[0], ended.said
    eager, compiled = ([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs.values())
    for found, expected in zip(compiled, eager, strict=True):
        assert found.keys() == expected.keys()
        for name in {"loss", "gradient_norm", "validation_loss"} & found.keys():
            # Fused kernels round otherwise, in float32, and Adam amplifies it from step to step: measured 1e-7.
            assert found[name] == pytest.approx(expected[name], rel=1e-4), name
    eager, compiled = (load_file(run / "checkpoints" / "latest" / "model.safetensors") for run in runs.values())
    assert eager.keys() == compiled.keys() and all(eager[name].shape == compiled[name].shape for name in eager)
