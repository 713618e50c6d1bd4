"""What people look at: the log of a run, and its pictures."""

import json
import math
import os
import sys
import types

import accelerate
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from eae_dist.config import ModelConfig
from eae_dist.errors import UserError
from eae_dist.model.autoencoder import Autoencoder, build_autoencoder, resolve_model
from eae_dist.report.grids import BETWEEN, PAIRS, SAMPLES, draw_grids, grid_inputs, save_grids
from eae_dist.training import metrics_log
from eae_dist.training.crash_report import reported_crashes
from eae_dist.training.metrics_log import (
    FINITE_NORMS,
    MetricsLog,
    TrainingDiverged,
    averaged,
    lines_up_to,
    mlflow_kept_in,
    project_name,
    require_finite,
)

CPU = torch.device("cpu")


def written(path, *steps: int, tail: str = "") -> list[str]:
    """A metrics file with a line a step, and what follows; returns its complete lines."""
    lines = [json.dumps({"step": step, "loss": 1 / step}) for step in steps]
    path.write_text("".join(f"{line}\n" for line in lines) + tail)
    return lines


def test_lines_after_the_step_are_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = written(path, 10, 20, 30, 40)
    assert lines_up_to(path, 20) == lines[:2]
    assert lines_up_to(path, 29) == lines[:2]
    assert lines_up_to(path, 40) == lines
    assert lines_up_to(path, 9) == []
    assert lines_up_to(tmp_path / "absent", 9) == []


def test_last_line_that_a_kill_cut_short_is_dropped_at_whatever_byte(tmp_path):
    path = tmp_path / "metrics.jsonl"
    last = json.dumps({"step": 30, "loss": 0.25})
    for length in range(len(last)):
        lines = written(path, 10, 20, tail=last[:length])
        assert lines_up_to(path, 30) == lines
    written(path, 10, 20, tail=last)  # whole but for the line's end
    assert lines_up_to(path, 30)[2] == last


@pytest.fixture
def autoencoder() -> Autoencoder:
    torch.manual_seed(0)
    config = resolve_model(ModelConfig("small", width=4, latent_dim=5), (1, 8, 16))
    return build_autoencoder(config, (1, 8, 16), latent_norm=True).eval()


def images(count: int, shape=(1, 8, 16)) -> torch.Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(3))


def tiles(picture: torch.Tensor, across: int, height: int = 8, width: int = 16) -> torch.Tensor:
    """The tiles of a grid with one dark pixel around each, [3, H, W] -> [rows x across, 3, height, width]."""
    _, high, wide = picture.shape
    assert wide == across * (width + 1) + 1 and (high - 1) % (height + 1) == 0
    rows = [picture[:, 1 + y : 1 + y + height] for y in range(0, high - 1, height + 1)]
    return torch.stack([row[:, :, 1 + x : 1 + x + width] for row in rows for x in range(0, wide - 1, width + 1)])


@torch.no_grad()
def test_grids_show_samples_pairs_and_interpolations_where_they_should(autoencoder):
    inputs = grid_inputs(images(64), 5, seed=0)
    grids = draw_grids(autoencoder, inputs)
    assert grids.keys() == {"samples", "reconstructions", "interpolations"}
    latents = autoencoder.encode(inputs.images)

    samples = tiles(grids["samples"], 10)
    assert len(samples) == SAMPLES == 100
    torch.testing.assert_close(samples, autoencoder.decode(inputs.latents).expand(-1, 3, -1, -1))

    pairs = tiles(grids["reconstructions"], 10)
    assert len(pairs) == 4 * PAIRS
    torch.testing.assert_close(pairs[0::2], images(2 * PAIRS).expand(-1, 3, -1, -1))
    torch.testing.assert_close(pairs[1::2], autoencoder.decode(latents).expand(-1, 3, -1, -1))

    between = tiles(grids["interpolations"], BETWEEN)
    assert len(between) == PAIRS * BETWEEN
    rows = between.unflatten(0, (PAIRS, BETWEEN))
    torch.testing.assert_close(rows[:, 0], pairs[1::4])  # the reconstructions of both ends
    torch.testing.assert_close(rows[:, -1], pairs[3::4])
    third = latents[0::2] + 3 / 7 * (latents[1::2] - latents[0::2])
    torch.testing.assert_close(rows[:, 3], autoencoder.decode(third).expand(-1, 3, -1, -1))


@pytest.mark.parametrize(("count", "pairs"), [(64, 20), (40, 20), (7, 3), (2, 1)])
def test_splits_with_fewer_images_give_smaller_grids(autoencoder, count, pairs):
    grids = draw_grids(autoencoder, grid_inputs(images(count), 5, seed=0))
    shown = min(count, 2 * PAIRS)
    found = tiles(grids["reconstructions"], min(10, 2 * shown))
    assert len(found) >= 2 * shown and not found[2 * shown :].any()  # the last row is filled up with black
    assert len(tiles(grids["interpolations"], BETWEEN)) == pairs * BETWEEN
    assert len(tiles(grids["samples"], 10)) == SAMPLES


def test_grids_follow_from_seed_and_weights_alone(autoencoder):
    def drawn(seed: int, noise: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        grids = draw_grids(autoencoder, grid_inputs(images(8), 5, seed))
        assert torch.equal(torch.get_rng_state(), before)  # drawing a picture changes no later draw of the run
        return grids

    one, again, other = drawn(1, 0), drawn(1, 7), drawn(2, 0)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["samples"], other["samples"])
    assert torch.equal(one["reconstructions"], other["reconstructions"])


def test_grids_of_color_images_keep_their_colors():
    class Reddening(nn.Module):
        def forward(self, z):
            return torch.tensor([1.0, 0.5, 0.0]).view(1, 3, 1, 1).expand(len(z), 3, 8, 16)

    model = Autoencoder(nn.Flatten(), Reddening(), (3, 8, 16), 384)
    grids = draw_grids(model, grid_inputs(images(4, (3, 8, 16)), 384, seed=0))
    assert torch.equal(tiles(grids["samples"], 10)[5].mean((1, 2)), torch.tensor([1.0, 0.5, 0.0]))


def test_pictures_are_saved_under_their_names_with_a_prefix(tmp_path):
    picture = torch.zeros(3, 4, 6)
    picture[0, 1, 2] = 1.0
    save_grids({"samples": picture, "pairs": picture}, tmp_path / "new", "step-00000007-")
    assert set(os.listdir(tmp_path / "new")) == {"step-00000007-samples.png", "step-00000007-pairs.png"}
    image = Image.open(tmp_path / "new" / "step-00000007-samples.png")
    assert image.size == (6, 4) and image.getpixel((2, 1)) == (255, 0, 0) and image.getpixel((0, 0)) == (0, 0, 0)


def test_picture_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    save_grids({"samples": torch.zeros(3, 4, 4)}, tmp_path)
    before = (tmp_path / "samples.png").read_bytes()

    def full(path):
        raise OSError("No space left on device")

    monkeypatch.setattr("eae_dist.numerics.atomic_files.fsync", full)  # called between writing aside and renaming
    with pytest.raises(OSError, match="No space left"):
        save_grids({"samples": torch.ones(3, 4, 4)}, tmp_path)
    assert (tmp_path / "samples.png").read_bytes() == before


NAMES = ["loss", "entropy", FINITE_NORMS, "gradient_norm"]


def window(*steps: tuple[float, float, float]) -> list[torch.Tensor]:
    """Loss, entropy and gradient norm of each step; all norms have seen finite rows."""
    return [torch.tensor([loss, entropy, 7, gradient], dtype=torch.float64) for loss, entropy, gradient in steps]


def none() -> None:
    """That there is no checkpoint."""


@pytest.fixture
def three_ranks(monkeypatch):
    """Rank 0's shares as they are; rank 1's entropy and gradient are no numbers in the last step, rank 2's entropy in all."""

    def gathered(shares: torch.Tensor) -> torch.Tensor:
        late, always = shares.clone(), shares.clone()
        late[:, -1, [1, 3]] = math.nan
        always[..., 1] = math.nan
        return torch.cat([shares, late, always])

    monkeypatch.setattr(metrics_log, "gather_rows", gathered)


def test_record_is_the_mean_over_the_steps_and_ranks(monkeypatch):
    monkeypatch.setattr(metrics_log, "gather_rows", lambda shares: torch.cat([shares, 3 * shares]))
    record = averaged(window((1, 2, 3), (3, 6, 9)), NAMES, 20, none, ignore_gradient=False)
    assert record == {"loss": 4, "entropy": 8, "gradient_norm": 12}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_term_that_is_not_finite_is_named_with_its_value_its_step_and_its_rank(value):
    # Steps 18, 19 and 20; in 19 the entropy is bad and so what follows from it, in 20 everything is.
    steps = window((1, 2, 3), (value, value, math.nan), (math.nan, math.nan, math.nan))
    with pytest.raises(TrainingDiverged, match=f"^entropy is {value} at step 19 on rank 0; no checkpoint was saved before"):
        averaged(steps, NAMES, 20, none, ignore_gradient=False)


def test_only_the_ranks_with_the_bad_term_are_named(three_ranks):
    with pytest.raises(TrainingDiverged, match="^entropy is nan at step 19 on rank 2;"):
        averaged(window((1, 2, 3), (1, 2, 3)), NAMES, 20, none, ignore_gradient=False)
    with pytest.raises(TrainingDiverged, match="^entropy is nan at step 19 on rank 1, 2;"):
        averaged(window((math.inf, 2, math.nan)), NAMES, 19, none, ignore_gradient=False)


def test_ranks_are_named_whose_rows_were_the_first_to_be_no_numbers(monkeypatch):
    def gathered(shares: torch.Tensor) -> torch.Tensor:
        first, second = shares.clone(), shares.clone()
        first[..., 2], second[..., 2] = 4, 3
        return torch.cat([first, second, first])

    monkeypatch.setattr(metrics_log, "gather_rows", gathered)
    with pytest.raises(TrainingDiverged, match="^entropy is nan at step 19 on rank 1;"):
        averaged(window((math.nan, math.nan, math.nan)), NAMES, 19, none, ignore_gradient=False)


def test_loss_that_overflows_though_its_terms_do_not_is_named_on_every_rank(monkeypatch):
    monkeypatch.setattr(metrics_log, "gather_rows", lambda shares: torch.cat([shares, shares]))
    with pytest.raises(TrainingDiverged, match="^loss is inf at step 19 on rank 0, 1;"):
        averaged(window((math.inf, 2, math.nan)), NAMES, 19, none, ignore_gradient=False)


def test_gradient_that_loss_scaling_made_overflow_stops_nothing():
    steps = window((1, 2, math.inf), (1, 2, 4), (1, 2, math.nan))
    assert averaged(steps, NAMES, 3, none, ignore_gradient=True)["gradient_norm"] == pytest.approx(4 / 3)
    with pytest.raises(TrainingDiverged, match="gradient_norm is inf at step 1"):
        averaged(steps, NAMES, 3, none, ignore_gradient=False)
    with pytest.raises(TrainingDiverged, match="loss is nan at step 3"):
        averaged(window((math.nan, 2, 4)), NAMES, 3, none, ignore_gradient=True)


def test_divergence_names_the_last_good_checkpoint_and_what_to_change(tmp_path):
    checkpoint = tmp_path / "checkpoints" / "step-00000010"
    require_finite({"loss": 1.0}, 12, none)
    with pytest.raises(TrainingDiverged, match=f"loss is nan at step 12; the last good checkpoint is {checkpoint}.*clip_norm"):
        require_finite({"entropy": 1.0, "loss": math.nan}, 12, lambda: checkpoint)
    with pytest.raises(TrainingDiverged, match="^validation_entropy is nan"):
        require_finite({"validation_loss": math.nan, "validation_entropy": math.nan}, 12, none)


@pytest.fixture
def fresh_accelerator(tmp_path):
    """fresh_accelerator(trackers): as a new process would make it, writing below tmp_path/trackers."""

    def make(trackers: list[str]) -> Accelerator:
        AcceleratorState._reset_state(reset_partial_state=True)
        return Accelerator(cpu=True, log_with=trackers or None, project_dir=tmp_path / "trackers")

    yield make
    AcceleratorState._reset_state(reset_partial_state=True)


def run_log(run, accelerator: Accelerator, start: int, losses: dict[int, float]) -> None:
    log = MetricsLog(run, accelerator, start, {"train.seed": 0, "train.output": str(run)})
    for step, loss in losses.items():
        log.write({"step": step, "images": 26 * step, "loss": loss})
    for tracker in accelerator.trackers:
        tracker.finish()


def test_log_of_a_continued_run_holds_every_step_once(tmp_path, fresh_accelerator):
    # Killed after step 40, continued from the checkpoint of step 20.
    run_log(tmp_path, fresh_accelerator(["tensorboard"]), 0, {10: 1.0, 20: 2.0, 30: 3.0, 40: 4.0})
    run_log(tmp_path, fresh_accelerator(["tensorboard"]), 20, {30: 5.0, 40: 6.0, 50: 7.0})
    expected = [(10, 1.0), (20, 2.0), (30, 5.0), (40, 6.0), (50, 7.0)]

    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(record["step"], record["loss"]) for record in records] == expected
    assert all(record["images"] == 26 * record["step"] for record in records)

    events = EventAccumulator(str(tmp_path / "trackers" / tmp_path.name))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == expected
    assert sorted(events.Tags()["scalars"]) == ["images", "loss"]


def test_what_every_rank_has_a_number_of_is_a_curve_of_each_in_tensorboard(tmp_path, fresh_accelerator):
    log = MetricsLog(tmp_path, fresh_accelerator(["tensorboard"]), 0, {})
    log.write({"step": 10, "images": 260, "rank_data_wait": [0.25, 0.5]})
    log.accelerator.trackers[0].finish()
    events = EventAccumulator(str(tmp_path / "trackers" / tmp_path.name))
    events.Reload()
    curves = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert curves == {"images": [(10, 260)], "rank_data_wait/rank-0": [(10, 0.25)], "rank_data_wait/rank-1": [(10, 0.5)]}


def test_tensorboard_shows_one_run_a_folder(tmp_path, fresh_accelerator):
    # Settings stored as hyperparameters would make a folder of their own, a second run on the page.
    run_log(tmp_path, fresh_accelerator(["tensorboard"]), 0, {10: 1.0})
    folders = {file.parent for file in (tmp_path / "trackers").rglob("events.out.tfevents.*")}
    assert folders == {tmp_path / "trackers" / tmp_path.name}


def test_curves_of_an_earlier_version_are_continued_under_their_name(tmp_path, fresh_accelerator):
    (tmp_path / "trackers" / "run").mkdir(parents=True)
    run_log(tmp_path, fresh_accelerator(["tensorboard"]), 0, {10: 1.0})
    assert {file.parent.name for file in (tmp_path / "trackers").rglob("events.out.tfevents.*")} == {"run"}


@pytest.mark.parametrize(
    ("folder", "name"),
    [("mnist5k-eae", "mnist5k-eae"), ("a: b #1", "a- b -1"), ("50%?", "50--"), ("it's", "it-s"), ("x" * 140, "x" * 128)],
)
def test_trackers_call_a_run_by_its_folder(tmp_path, folder, name):
    assert project_name(tmp_path / folder) == name


class Service(GeneralTracker):
    """Stands for a tracker of a service; keeps how each start called it and what it was sent."""

    requires_logging_directory = False
    started, sent = [], []

    def __init__(self, project: str, **options):
        super().__init__()
        self.project, self.options = project, options

    def start(self):
        self.started.append((self.project, self.options))
        given = self.options.get("run_id") or f"run-{len(self.started)}"
        self.active = types.SimpleNamespace(info=types.SimpleNamespace(run_id=given))

    tracker = property(lambda self: self.active)

    def store_init_configuration(self, values):
        self.sent.append(("settings", values))

    def log(self, values, step, **options):
        self.sent.append((step, values))

    def log_images(self, values, step, **options):
        self.sent.append((step, {name: picture.shape for name, picture in values.items()}))

    def log_artifact(self, path, artifact_path):
        self.sent.append((artifact_path, path))


def mlflow_at(address: str = "") -> types.SimpleNamespace:
    """Stands for the module mlflow, with an address that the user has set, or none."""
    module = types.SimpleNamespace(address=address)
    module.is_tracking_uri_set = lambda: bool(module.address)
    module.get_tracking_uri = lambda: module.address
    module.set_tracking_uri = lambda address: setattr(module, "address", address)
    return module


def test_mlflow_keeps_its_runs_in_the_run_folder_unless_told_where(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", module := mlflow_at())
    for run in ("one", "two"):  # the second run of a process does not go to the first
        folder = tmp_path / run
        assert mlflow_kept_in(folder) == {"logging_dir": str(folder / "artifacts")}
        assert module.address == f"sqlite:///{folder}/eae_dist.db" and folder.is_dir()
    monkeypatch.setitem(sys.modules, "mlflow", module := mlflow_at("http://host:5000"))
    assert mlflow_kept_in(tmp_path / "three") == {} and module.address == "http://host:5000"
    assert not (tmp_path / "three").exists()


def test_tracker_that_does_not_start_is_one_line_and_starts_no_second_run_later(tmp_path, monkeypatch, fresh_accelerator):
    class Refused(Exception):
        pass

    def refuse(self):
        raise Refused("the tracking server is gone\nTraceback of the server")

    service = type("wandb", (Service,), {"name": "wandb", "started": [], "sent": []})
    monkeypatch.setitem(accelerate.accelerator.LOGGER_TYPE_TO_CLASS, "wandb", service)
    (tmp_path / "run").mkdir()
    known = []
    for start in (refuse, Service.start):
        monkeypatch.setattr(service, "start", start)
        accelerator = fresh_accelerator([])
        accelerator.log_with = ["wandb"]
        if start is refuse:
            wanted = r"train.trackers=\['wandb'\]: one did not start \(test_report: the tracking server is gone\); set it right"
            with pytest.raises(UserError, match=wanted):
                MetricsLog(tmp_path / "run", accelerator, 0, {})
        else:
            MetricsLog(tmp_path / "run", accelerator, 0, {})
        known.append(json.loads((tmp_path / "run" / "trackers" / "ids.json").read_text())["wandb"])
    assert known[0] == known[1] == service.started[0][1]["id"]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_service_gets_the_grids_and_a_restart_continues_its_run(tmp_path, monkeypatch, fresh_accelerator, name):
    service = type(name, (Service,), {"name": name, "started": [], "sent": []})
    monkeypatch.setitem(accelerate.accelerator.LOGGER_TYPE_TO_CLASS, name, service)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow_at())
    run = tmp_path / "photos-eae"
    run.mkdir()
    for start in (0, 20):
        accelerator = fresh_accelerator([])
        accelerator.log_with = [name]
        log = MetricsLog(run, accelerator, start, {"train.epochs": start + 20})
        log.write({"step": start + 10, "images": 26, "loss": 0.5})
        grids = {"samples": torch.rand(3, 12, 23)}
        log.show(grids, save_grids(grids, run / "samples", "step-"), start + 10)
    (first, again), sent = service.started, service.sent
    assert first[0] == again[0] == "photos-eae"
    settings = [values for what, values in sent if what == "settings"]
    assert settings == [{"train.epochs": "20"}, {"train.epochs": "40"}][: 2 if name == "wandb" else 1]  # mlflow takes no other
    assert (10, {"images": 26, "loss": 0.5}) in sent and (30, {"images": 26, "loss": 0.5}) in sent
    if name == "wandb":
        assert first[1] == again[1] and first[1]["resume"] == "allow" and first[1]["dir"] == str(run)
        assert (30, {"samples": (1, 12, 23, 3)}) in sent
    else:
        assert first[1]["run_id"] is None and again[1]["run_id"] == "run-1"
        assert first[1]["logging_dir"] == again[1]["logging_dir"] == str(run / "trackers" / "mlflow" / "artifacts")
        assert ("samples", str(run / "samples" / "step-samples.png")) in sent


def test_grids_are_pictures_in_tensorboard(tmp_path, fresh_accelerator):
    log = MetricsLog(tmp_path, fresh_accelerator(["tensorboard"]), 0, {})
    log.show({"samples": torch.rand(3, 12, 23)}, {}, 10)
    log.finish()
    events = EventAccumulator(str(tmp_path / "trackers" / tmp_path.name))
    events.Reload()
    (event,) = events.Images("samples")
    assert (event.step, event.width, event.height) == (10, 23, 12)


def test_torn_line_is_gone_before_the_next_is_written(tmp_path, fresh_accelerator):
    written(tmp_path / "metrics.jsonl", 10, 20, tail='{"step": 3')
    run_log(tmp_path, fresh_accelerator([]), 20, {30: 1.0})
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [10, 20, 30]


def test_single_image_has_no_interpolations(autoencoder):
    assert draw_grids(autoencoder, grid_inputs(images(1), autoencoder.latent_dim, 0)).keys() == {"samples", "reconstructions"}


def test_crash_before_the_first_checkpoint_says_that_the_run_starts_anew(tmp_path, capsys):
    with pytest.raises(KeyError), reported_crashes(tmp_path, lambda: 0, lambda: None, 1.0):
        raise KeyError
    for said in (capsys.readouterr().err, (tmp_path / "crashes" / "rank-0.txt").read_text()):
        assert "failed in step 1: KeyError" in said and "no checkpoint was saved yet; run the same command to start again" in said
