"""DeepSpeed's ZeRO stages on real CPU ranks: the same training as DDP, and checkpoints that either engine goes on with."""

import json
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import ROOT
from omegaconf import OmegaConf
from ranks import run_ranks
from safetensors.torch import load_file
from world_cases import BATCH, OBJECTIVES, configured

from eae_dist import objectives
from eae_dist.config import load_config
from eae_dist.distributed import ending_ranks, rank
from eae_dist.training import checkpoint as checkpoints
from eae_dist.training import compilation as execution
from eae_dist.training import engines
from eae_dist.training import loop as trainer
from eae_dist.training.compilation import compile_networks
from eae_dist.training.engines import MOMENTS, DeepSpeed, accelerator_options, engine_of
from eae_dist.training.metrics_log import TrainingDiverged

ROWS = ("eae", "eae_linear", "ae", "rae_gp")
STEPS = 20
RELAY = (12, 16, STEPS)  # the steps after which another engine takes over
# Relative. DeepSpeed adds gradients in float32; two ranks have come out with the same bits, but where the gradient was clipped:
# its norm adds up in another order, which the small moments of a bias showed as 3e-6.
PRECISE, OF_MOMENTS = 1e-6, 1e-5
VARIANTS = {  # name: the row that it is a variant of, and what it sets
    "clipped": ("ae", ["train.clip_norm=0.005"]),
    "plateau": (
        "eae",
        [
            "train.learning_rate=0.1",  # so that validations get worse
            "train.schedule=plateau",
            "train.plateau_patience=1",
            f"train.validate_every={BATCH}",
        ],
    ),
    "bf16": ("eae", ["train.precision=bf16", f"train.validate_every={5 * BATCH}"]),
    "computed_twice": ("eae", ["train.checkpoint_activations=true"]),
    "compiled": ("eae", ["train.compile=true"]),
    "averaged": ("ae", ["train.ema=0.9", "train.optimizer=adamw", "train.schedule=cosine", "train.warmup_epochs=0.4"]),
}
installed = pytest.mark.skipif(
    any(engines.find_spec(name) is None for name in ("deepspeed", "transformers")),
    reason="DeepSpeed is not installed: pip install -e '.[deepspeed]'",
)


def arguments(shards: Path, run: Path, name: str, *more: str, steps: int = STEPS) -> list[str]:
    row, settings = VARIANTS.get(name, (name, []))
    return [
        f"objective.name={row}",
        f"data.root={shards}",
        f"train.output={run}",
        f"train.global_batch={BATCH}",
        f"train.epochs={steps * BATCH / 150}",
        "train.learning_rate=0.01",
        f"train.log_every={BATCH}",
        "train.validate_every=1000000",
        "train.sample_every=1000000",
        "train.save_every=1000000",
        "train.trackers=[]",
        "train.device=cpu",
        "train.timeout=60",
        "train.channels_last=false",  # convolutions round alike under both engines if their weights lie alike in memory
        "train.learning_rate=1e-3",
        "model.width=4",
        "model.latent_dim=5",
        *OBJECTIVES[row],
        *settings,
        *more,
    ]


def train_flat(*runs: list[str]) -> None:
    """Trains one run after the other, says why one was refused, and holds every entropy to float32.

    What is compiled is so but for the kernels, which a compiler would take minutes for.
    """
    estimate = objectives.entropy_terms

    def measured(latents, **options):
        assert latents.dtype == torch.float32
        return estimate(latents, **options)

    objectives.entropy_terms = measured
    execution.check_compiler = lambda device: None
    execution.compile_networks = partial(compile_networks, backend="aot_eager")
    with ending_ranks():
        for run in runs:
            AcceleratorState._reset_state()  # it would hold all runs to the first one's precision
            try:
                trainer.train(load_config(run))
            except (ValueError, TrainingDiverged) as error:
                print(f"refused: {error}", flush=True)


def load_again(run: Path, out: Path, settings: list[str]) -> None:
    """Loads a checkpoint and saves what the engine then gives for one, and the batch figures that it took."""
    with ending_ranks():
        config = load_config(settings)
        accelerator = trainer.start_accelerator(config.train)
        stream = trainer.open_stream(config)
        found = checkpoints.open_checkpoint(run)
        objective = objectives.build_objective(found.config.model, found.config.objective, stream.index.image_shape, 1)
        optimizer = torch.optim.Adam(objective.parameters())
        engine = engine_of(accelerator)
        model, _ = engine.prepare(objective, optimizer, config, stream.lanes)
        engine.load(objective, optimizer, found.model_state(), found.optimizer_state())
        state = {"optimizer": engine.optimizer_state(objective, optimizer), "model": dict(objective.state_dict())}
        state["figures"] = [model.train_batch_size(), model.train_micro_batch_size_per_gpu(), model.gradient_accumulation_steps()]
        if rank() == 0:
            torch.save(state, out)


def zero(stage: int) -> dict:
    """What `accelerate launch --config_file launch/deepspeed_zero<stage>.yaml` tells its ranks."""
    settings = ROOT / "launch" / f"deepspeed_zero{stage}.json"
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": settings}


@pytest.fixture(scope="module")
def folder(shards, tmp_path_factory) -> Path:
    """Runs of both engines on two ranks: each whole, and some that go from one engine to the other."""
    folder = tmp_path_factory.mktemp("engines")

    def launch(name: str, environment: dict, *runs: list[str], refusals: int = 0) -> str:
        ended = run_ranks(2, folder / f"logs-{name}", train_flat, *runs, environment=environment)
        assert ended.codes == [0, 0], ended.said
        refused = [line for line in ended.said[0].splitlines() if line.startswith("refused:")]
        assert len(refused) == refusals, refused
        return ended.said[0]

    def whole(engine: str, *names: str) -> list[list[str]]:
        return [arguments(shards, folder / engine / name, name) for name in names]

    def relay(leg: int) -> list[str]:
        return arguments(shards, folder / "relay", "plateau", steps=RELAY[leg])

    halves = [arguments(shards, folder / "halves" / "eae", "eae", steps=steps) for steps in (STEPS // 2, STEPS)]
    broken = arguments(shards, folder / "broken", "eae", "model.encoder=saboteur:DivergingEncoder")
    parts = arguments(shards, folder / "parts", "eae", "train.accumulate=2")
    launch("ddp", {}, *whole("ddp", *ROWS, *VARIANTS), relay(0))
    launch("zero1", zero(1), *whole("zero1", *ROWS))
    said = launch("zero2", zero(2), *whole("zero2", *ROWS, *VARIANTS), relay(1), *halves, parts, broken, refusals=2)
    (folder / "said").write_text(said)
    shutil.copytree(folder / "relay", folder / "halfway", symlinks=True)
    launch("back", {}, relay(2))
    return folder


def state_of(run: Path) -> dict[str, torch.Tensor]:
    """Weights, buffers and Adam's moments at the end."""
    last = run / "checkpoints" / f"step-{STEPS:08d}"
    optimizer = torch.load(last / "optimizer.pt", weights_only=True)
    moments = {f"{number}.{name}": of[name] for number, of in optimizer["state"].items() for name in ("step", *MOMENTS)}
    return load_file(last / "model.safetensors") | moments


def assert_same_training(run: Path, other: Path) -> None:
    """Equal losses, gradients and validations of every step, and equal states at the end."""
    found, expected = ([json.loads(line) for line in (at / "metrics.jsonl").read_text().splitlines()] for at in (run, other))
    assert len(found) == len(expected) == STEPS
    for now, then in zip(found, expected, strict=True):
        timings = {name for name in now if name.startswith("rank_")} | {
            "images_per_second",
            "straggler_spread",
            "peak_memory_mib",
        }
        for name in now.keys() & then.keys() - timings:  # a leg's end is validated as well
            # SSIM is a number of the scale of 1, which lies near 0 for these first weights.
            within = {"abs" if name == "validation_ssim" else "rel": PRECISE}
            assert now[name] == pytest.approx(then[name], **within), (now["step"], name)
    found, expected = state_of(run), state_of(other)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.shape == expected[name].shape
        tolerance = OF_MOMENTS if name.endswith(MOMENTS) else PRECISE
        assert (tensor - expected[name]).abs().max() <= tolerance * expected[name].abs().max(), name


@installed
@pytest.mark.parametrize("engine, name", [(e, n) for e in ("zero1", "zero2") for n in ROWS] + [("zero2", n) for n in VARIANTS])
def test_deepspeed_trains_as_ddp_does(folder, engine, name):
    assert_same_training(folder / engine / name, folder / "ddp" / name)


@installed
def test_clipping_and_mixed_precision_take_effect(folder):
    plain, clipped, eae, bf16 = (state_of(folder / "zero2" / name) for name in ("ae", "clipped", "eae", "bf16"))
    name = next(name for name in plain if name.endswith("head.weight"))
    assert not torch.equal(plain[name], clipped[name]) and not torch.equal(eae[name], bf16[name])
    assert all(tensor.dtype != torch.bfloat16 for tensor in bf16.values())


@installed
def test_run_that_goes_from_ddp_to_deepspeed_and_back_is_the_undisturbed_run(folder):
    assert_same_training(folder / "relay", folder / "ddp" / "plateau")
    rates = [json.loads(line)["learning_rate"] for line in (folder / "relay" / "metrics.jsonl").read_text().splitlines()]
    assert rates[-1] < rates[RELAY[1]] < rates[RELAY[0]] < rates[0]  # each leg went on with the rate of the one before


@installed
def test_run_that_deepspeed_continues_has_the_bits_of_its_undisturbed_run(folder):
    found, expected = state_of(folder / "halves" / "eae"), state_of(folder / "zero2" / "eae")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@installed
def test_killed_rank_ends_the_other_and_deepspeed_goes_on_to_the_same_bits(folder, shards, tmp_path):
    run = arguments(shards, tmp_path / "run", "eae", "model.encoder=saboteur:KillingEncoder", f"train.save_every={5 * BATCH}")
    sabotage = {"SABOTEUR_SIGNAL": "SIGKILL", "SABOTEUR_STEP": 6, "SABOTEUR_MARK": tmp_path / "mark"}
    sabotage["SABOTEUR_AWAITS"] = tmp_path / "run" / "checkpoints" / "latest"
    killed = run_ranks(2, tmp_path / "logs", train_flat, run, environment=zero(2) | sabotage)
    assert killed.codes[0] > 0 and killed.codes[1] == -signal.SIGKILL, killed
    ended = run_ranks(2, tmp_path / "logs", train_flat, run, environment=zero(2) | sabotage)
    assert ended.codes == [0, 0] and f"steps 5 to {STEPS}" in ended.said[0], ended.said
    found, expected = state_of(tmp_path / "run"), state_of(folder / "zero2" / "eae")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@installed
def test_deepspeed_refuses_and_diverges_in_the_same_words(folder):
    said = (folder / "said").read_text()
    assert "refused: train.accumulate=2" in said and "is nan at step" in said, said[-3000:]


@installed
@pytest.mark.parametrize("ranks, stage", [(1, 2), (2, 1)])
def test_checkpoint_is_the_same_after_deepspeed_loaded_it(folder, shards, tmp_path, ranks, stage):
    run, out = folder / "halfway", tmp_path / "state.pt"
    settings = arguments(shards, tmp_path / "run", "plateau")
    ended = run_ranks(ranks, tmp_path / "logs", load_again, run, out, settings, environment=zero(stage))
    assert ended.codes == [0] * ranks, ended.said
    found, checkpoint = torch.load(out, weights_only=True), checkpoints.open_checkpoint(run)
    expected = checkpoint.optimizer_state()
    assert found["figures"] == [BATCH, BATCH // ranks, 1]
    assert found["optimizer"]["param_groups"] == expected["param_groups"]
    assert all(torch.equal(found["model"][name], tensor) for name, tensor in checkpoint.model_state().items())
    assert found["optimizer"]["state"].keys() == expected["state"].keys()
    for number, saved in expected["state"].items():
        assert found["optimizer"]["state"][number].keys() == saved.keys()
        assert all(torch.equal(found["optimizer"]["state"][number][name], tensor) for name, tensor in saved.items())


def settings_of(stage: int, **more) -> dict:
    """The settings in launch/ as accelerate hands them on."""
    return json.loads((ROOT / "launch" / f"deepspeed_zero{stage}.json").read_text()) | {"fp16": {"enabled": False}} | more


@pytest.mark.parametrize(
    "settings, changed, ranks, said",
    [
        ({}, {"accumulate": 2}, 2, "train.accumulate=2 needs whole gradients"),
        ({}, {"blocks": 8}, 2, "train.blocks=8 needs sums over ranks in its own order"),
        ({}, {}, 4, "4 ranks do not divide the 26 lanes"),
        ({}, {"precision": "fp16"}, 2, "take train.precision=bf16"),
        ({}, {"channels_last": True}, 2, "train.channels_last=true"),
        ({}, {"fused": True}, 2, "train.fused=true: the bits of the fused optimizer depend"),
        ({"zero_optimization": {"stage": 3}}, {}, 2, "zero_optimization.stage=3"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, {}, 2, "offload_optimizer"),
        ({"bf16": {"enabled": True}, "optimizer": {"type": "Adam"}}, {}, 2, "'bf16', 'optimizer'"),
    ],
)
def test_what_deepspeed_cannot_keep_is_refused_by_name(shards, monkeypatch, settings, changed, ranks, said):
    monkeypatch.setattr(engines, "world_size", lambda: ranks)
    config = configured(shards, "eae")
    plugin = SimpleNamespace(deepspeed_config=settings_of(2, **settings))
    engine = DeepSpeed(SimpleNamespace(deepspeed_plugin=plugin))
    with pytest.raises(ValueError, match=said):
        engine.refuse(replace(config, train=replace(config.train, **changed)), BATCH)


def test_missing_deepspeed_is_named_with_what_installs_it(shards, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[deepspeed\]'"):
        accelerator_options(configured(shards, "eae").train, cpu=True)


@pytest.mark.parametrize("stage", [1, 2])
def test_launch_files_leave_every_figure_to_the_run(stage):
    launch = OmegaConf.load(ROOT / "launch" / f"deepspeed_zero{stage}.yaml")
    text = (ROOT / launch.deepspeed_config.deepspeed_config_file).read_text()
    assert "auto" not in text and "batch" not in text and json.loads(text)["zero_optimization"]["stage"] == stage
