"""The table: what it runs, what it leaves as it is, and what it prints."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import ROOT, rank_environment, write_shards
from PIL import Image

import eae_dist
from eae_dist.config import load_config, save_config
from eae_dist.data.shard_index import ShardIndex
from eae_dist.distributed.launch import CommandFailed, JobPool
from eae_dist.inference.judged_checkpoint import evaluation_config, evaluation_folder
from eae_dist.latent.densities import save_density
from eae_dist.latent.two_stage import TwoStage
from eae_dist.numerics.json_files import read_json, sealed
from eae_dist.objectives import OBJECTIVES, build_objective, resolve
from eae_dist.report.figure import COLUMNS, KINDS, figure, pictures
from eae_dist.report.table import BEYOND, BLOCKS, MODELS, Results, as_csv, as_latex, as_markdown
from eae_dist.table import main, table
from eae_dist.training import checkpoint as checkpoints
from eae_dist.training.setup import last_step

pytestmark = pytest.mark.usefixtures("cpu")
ROWS = ("vae", "two_stage_vae", "rae", "eae")


@pytest.fixture
def configs(shards, tmp_path) -> Path:
    """A data set's file with four rows beside it: two steps a run on the tests' small images."""
    path = tmp_path / "configs" / "tiny.yaml"
    (path.parent / "tiny").mkdir(parents=True)
    path.write_text(
        f"data:\n  root: {shards}\nmodel:\n  width: 4\n  latent_dim: 5\n"
        f"train:\n  global_batch: 26\n  epochs: 0.3\n  trackers: []\n  device: cpu\n"
        f"evaluate:\n  features: efflite0_64px\n  components: 2\n  second_stage_epochs: 1\n  cache: {tmp_path}/cache\n"
    )
    for row in ROWS:
        (path.parent / "tiny" / f"{row}.yaml").write_text(f"objective:\n  name: {row}\n")
    return path


class Here:
    """Stands for JobPool: saves a checkpoint of the last step instead of training, and numbers instead of evaluating."""

    def __init__(self, jobs: int = 1, fails: tuple[str, ...] = ()):
        self.jobs, self.fails, self.trained, self.judged, self.steps = jobs, fails, [], [], None

    def call(self, module: str, command, output: Path) -> None:
        (self.evaluate if module == "eae_dist.evaluate" else self.train)(command)

    def train(self, command) -> None:
        config = load_config(command)
        if config.objective.name in self.fails:
            raise CommandFailed("train ended with status 1: error: loss is nan")
        index = ShardIndex.load(config.data.root)
        config, end = resolve(config, index.image_shape), self.steps or last_step(config, index)
        objective = build_objective(config.model, config.objective, index.image_shape, config.train.seed)
        folder = Path(config.train.output)
        state = {"step": end, "best_step": end, "image_shape": list(index.image_shape)}
        state["stream"] = {"index_sha256": index.sha256}
        checkpoints.save(folder, config, objective.state_dict(), {}, state)
        checkpoints.mark_best(folder, end)
        save_config(config, folder / "config.yaml")
        self.trained.append(folder.name)

    def evaluate(self, command) -> None:
        checkpoint = checkpoints.open_checkpoint(command[1])
        config = evaluation_config(checkpoint, command[2:])
        ((_, metrics),) = evaluations(rows=(config.objective.name,))
        metrics |= {
            "model_sha256": checkpoint.model_sha256,
            "settings": asdict(config.evaluate),
            "checkpoint": str(checkpoint.path),
        }
        metrics |= {"index_sha256": ShardIndex.load(config.data.root).sha256, "reference_images": config.evaluate.count or 33}
        folder = evaluation_folder(checkpoint)
        folder.mkdir(exist_ok=True)
        (folder / "metrics.json").write_text(sealed(metrics))
        if config.objective.name == "two_stage_vae":
            density = TwoStage(width=4, epochs=1)
            density.fit(torch.randn(20, 5))
            save_density(density, folder / "densities" / "two_stage.safetensors", checkpoint.model_sha256)
        self.judged.append(folder.parent.name)


def failures_of(*arguments) -> list[str]:
    return table(*arguments)[1]


def test_table_runs_what_is_missing_and_leaves_what_is_finished(configs, tmp_path):
    out, here = tmp_path / "out", Here()
    assert failures_of(configs, ["eae", "rae"], 2, here, out, []) == []
    assert here.trained == ["rae-0", "eae-0", "rae-1", "eae-1"] == here.judged
    before = {name: (out / name).read_bytes() for name in ("table.md", "table.csv", "table.tex", "figure.png")}

    assert failures_of(configs, ["eae", "rae"], 2, again := Here(), out, []) == []
    assert again.trained == again.judged == []
    assert {name: (out / name).read_bytes() for name in before} == before

    # Another setting of the evaluation judges again; a third seed trains that alone; one that lost its numbers is judged.
    assert failures_of(configs, ["eae"], 1, judge := Here(), out, ["evaluate.count=20"]) == []
    assert (judge.trained, judge.judged) == ([], ["eae-0"])
    (out / "runs" / "eae-1" / "evaluation" / "metrics.json").unlink()
    assert failures_of(configs, ["eae"], 3, more := Here(), out, ["evaluate.count=20"]) == []
    assert (more.trained, more.judged) == (["eae-2"], ["eae-1", "eae-2"])
    assert "against 20 images of test" in (out / "table.md").read_text()


def test_rows_beyond_the_paper_are_run_when_they_are_asked_for(configs, tmp_path):
    for row in BEYOND:
        (configs.parent / "tiny" / f"{row}.yaml").write_text(f"objective:\n  name: {row}\n")
    found = []
    for only, beyond in (([], False), (["eae"], True), (["swae"], False)):
        out = tmp_path / f"{only}-{beyond}"
        here = Here()
        assert table(configs, only, 1, here, out, [], beyond=beyond)[1] == []
        found.append({name.removesuffix("-0") for name in here.judged})
    assert found == [set(ROWS), {"eae", *BEYOND}, {"swae"}]


@pytest.mark.parametrize("name", ["tab #1", "007", "1e5", "2024_01_02", "tab ", "no"])
def test_folder_of_any_name_holds_the_table_and_its_runs(configs, tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert failures_of(configs, ["eae"], 1, here := Here(), Path(name), []) == []
    assert here.trained == here.judged == ["eae-0"]
    assert (tmp_path / name / "runs" / "eae-0" / "config.yaml").is_file() and (tmp_path / name / "table.md").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"configs", name}


def test_rows_that_were_judged_by_different_features_are_no_table(configs, tmp_path):
    assert failures_of(configs, ["eae", "rae"], 1, Here(), tmp_path, []) == []
    numbers = tmp_path / "runs" / "rae-0" / "evaluation" / "metrics.json"
    metrics = read_json(numbers, {}, "")
    metrics["features"]["preprocessing"] = "of another version"
    numbers.write_text(sealed(metrics))
    with pytest.raises(ValueError, match="different features, or versions of them: .*-0, .*-0; remove their evaluation"):
        failures_of(configs, ["eae", "rae"], 1, Here(), tmp_path, [])


def test_settings_of_a_row_are_not_refused_for_others_that_an_earlier_command_made(configs, tmp_path):
    out = tmp_path / "out"
    assert failures_of(configs, ["eae"], 1, Here(), out, []) == []
    assert failures_of(configs, ["vae"], 1, here := Here(), out, ["objective.kl_weight=0.2"]) == []
    assert here.trained == ["vae-0"]


def test_two_stage_vae_takes_over_the_vae_of_its_seed(configs, tmp_path):
    out, here = tmp_path / "out", Here(jobs=2)
    assert failures_of(configs, [], 1, here, out, []) == []
    assert sorted(here.trained) == ["eae-0", "rae-0", "vae-0"] and len(here.judged) == len(ROWS)
    one, other = (checkpoints.open_checkpoint(out / "runs" / f"{row}-0") for row in ("vae", "two_stage_vae"))
    assert other.config.objective.name == "two_stage_vae" and one.state["step"] == other.state["step"]
    states = one.model_state(), other.model_state()
    assert states[0].keys() == states[1].keys() and all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    # Its isotropic draws are those of its second stage; it has no mixture.
    lines = {line["model"] + line["images"] for line in csv.DictReader((out / "table.csv").read_text().splitlines())}
    assert "two_stage_vaetwo_stage" in lines and "two_stage_vaegmm" not in lines and "vaegmm" in lines
    assert failures_of(configs, ["vae"], 1, Here(), tmp_path / "apart", []) == []  # also from an earlier command
    later, other = Here(), Here()
    assert failures_of(configs, ["two_stage_vae"], 1, later, tmp_path / "apart", []) == []
    assert later.trained == [] and later.judged == ["two_stage_vae-0"]

    (configs.parent / "tiny" / "two_stage_vae.yaml").write_text("objective:\n  name: two_stage_vae\n  kl_weight: 0.5\n")
    assert failures_of(configs, ["vae", "two_stage_vae"], 1, other, tmp_path / "own", []) == []
    assert other.trained == ["vae-0", "two_stage_vae-0"]  # of other settings: trained for itself


def test_run_that_fails_is_named_and_the_others_are_in_the_table(configs, tmp_path):
    failures = failures_of(configs, ["rae", "eae"], 1, Here(fails=("rae",)), tmp_path / "out", [])
    assert failures == ["rae, seed 0: train ended with status 1: error: loss is nan"]
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| EAE |" in text and "RAE" not in text


def test_training_that_was_stopped_half_way_is_a_failure_and_not_judged(configs, tmp_path):
    here = Here()
    here.steps = 1  # of two: as after a SIGTERM, on which training saves and exits with status 0
    (failure,) = failures_of(configs, ["eae"], 1, here, tmp_path / "out", [])
    assert "training was stopped after 1 of 2 steps; run the same command to continue" in failure
    assert here.judged == [] and not (tmp_path / "out" / "table.md").exists()


def test_evaluation_without_numbers_of_the_checkpoint_is_a_failure(configs, tmp_path, monkeypatch):
    monkeypatch.setattr(Here, "evaluate", lambda self, command: None)
    (failure,) = failures_of(configs, ["eae"], 1, Here(), tmp_path / "out", [])
    assert "holds no metrics of the checkpoint" in failure


def test_runs_on_other_data_are_trained_again_and_other_weights_judged_again(configs, tmp_path, shards):
    out = tmp_path / "out"
    table(configs, ["eae"], 1, Here(), out, [])
    table(configs, ["eae"], 1, moved := Here(), out, [f"data.root={shutil.copytree(shards, tmp_path / 'moved')}"])
    assert moved.trained == moved.judged == []
    other = write_shards(tmp_path / "other", {"train": (150,), "validation": (40,), "test": (30,)})
    table(configs, ["eae"], 1, again := Here(), out, [f"data.root={other}"])
    assert again.trained == again.judged == ["eae-0"]
    shutil.rmtree(out / "runs" / "eae-0" / "checkpoints")
    table(configs, ["eae"], 1, anew := Here(), out, [f"data.root={other}", "train.learning_rate=0.5"])
    assert anew.trained == anew.judged == ["eae-0"]


def test_two_stage_vae_of_another_length_is_trained_for_itself(configs, tmp_path):
    (configs.parent / "tiny" / "two_stage_vae.yaml").write_text("objective:\n  name: two_stage_vae\ntrain:\n  epochs: 0.5\n")
    assert failures_of(configs, ["vae", "two_stage_vae"], 1, here := Here(), tmp_path / "out", []) == []
    assert here.trained == ["vae-0", "two_stage_vae-0"]


def test_run_that_was_trained_for_longer_is_refused(configs, tmp_path):
    table(configs, ["eae"], 1, Here(), tmp_path / "out", ["train.epochs=0.6"])
    (failure,) = failures_of(configs, ["eae"], 1, Here(), tmp_path / "out", [])
    assert "was trained for 4 steps, expected at most 2; take another --out" in failure


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("objective: {name: eae}\nmodel: {width: wide}\n", "model.width"),
        ("objective: {name: eae}\nmodel: {widht: 3}\n", "did you mean model.width"),
        ("objective: {name: eae, kl_weight: 0.2}\n", "objective.kl_weight=0.2 has no effect"),
        ("objective: {name: eae}\nmodel: {network: resnet}\n", "resnet"),
        ("objective: {name: eae}\ntrain: {global_batch: 0}\n", "train.global_batch=0"),
        ("objective: {name: eae}\ndata: {root: /nowhere}\n", "/nowhere"),
        ("- eae\n", "expected sections"),
        ("", "is empty"),
        ("objective: {name: [\n", "not a YAML mapping"),
    ],
)
def test_error_in_the_file_of_a_row_names_the_file(configs, tmp_path, text, message):
    file = configs.parent / "tiny" / "eae.yaml"
    file.write_text(text)
    with pytest.raises(SystemExit) as ended:
        main([str(configs), "--only", "eae", "--out", str(tmp_path / "out")])
    assert str(file) in str(ended.value) and message in str(ended.value) and "\n" not in str(ended.value)


DAMAGES = {"empty": "", "null": "null", "list": "[]", "cut": '{"sets": {"iso', "number": "3", "no sets": "{}", "bytes": "\0\1"}


@pytest.mark.parametrize("text", DAMAGES.values(), ids=DAMAGES)
def test_row_whose_small_files_cannot_be_read_is_done_again(configs, tmp_path, caplog, text):
    out, rows = tmp_path / "out", ["eae", "rae"]
    before = table(configs, rows, 1, Here(), out, [])
    numbers = out / "runs" / "eae-0" / "evaluation" / "metrics.json"
    numbers.write_text(text)
    assert table(configs, rows, 1, again := Here(), out, []) == before
    assert (again.trained, again.judged) == ([], ["eae-0"]) and str(numbers) in caplog.text
    for name in ("state.json", "manifest.json", "config.yaml"):
        (out / "runs" / "rae-0" / "checkpoints" / "latest" / name).write_text(text)
        assert table(configs, rows, 1, again := Here(), out, []) == before, name
        assert (again.trained, again.judged) == (["rae-0"], ["rae-0"]) and name in caplog.text


def test_changed_digit_in_the_numbers_of_a_row_is_seen(configs, tmp_path):
    out = tmp_path / "out"
    before = table(configs, ["eae"], 1, Here(), out, [])
    numbers = out / "runs" / "eae-0" / "evaluation" / "metrics.json"
    text = numbers.read_text()
    places = [at for at, character in enumerate(text) if character.isdigit() and at < text.index('"checksum"')]
    for place in places[:: max(len(places) // 5, 1)]:
        numbers.write_text(text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :])
        assert table(configs, ["eae"], 1, again := Here(), out, []) == before and again.judged == ["eae-0"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.yaml"], "nowhere.yaml: there is no such configuration file"),
        (["{configs}", "--only", "ae"], "tiny has no row ae, but vae, two_stage_vae, rae, eae; change --only or leave"),
        (["{configs}", "--beyond"], "tiny has no row sigreg swae, but vae"),
        (["{configs}", "--seeds", "0"], "--seeds=0 must be at least 1"),
        (["{configs}", "--jobs", "0"], "--jobs=0 and --nproc=None must be at least 1"),
        (["{configs}", "train.seed=3"], "train.seed=3: the table sets this itself; give --out, --seeds or --only"),
        (["{configs}", "objective.kl_weight=0.2"], "objective.kl_weight=0.2 has no effect with objective.name=rae"),
        (["{configs}", "data.root=nowhere"], "nowhere"),
        # What only the evaluation reads is refused before anything is trained.
        (["{configs}", "evaluate.features=inception", "evaluate.weights=nowhere.pth"], "nowhere.pth does not exist: "),
        (["{configs}", "evaluate.densities=[mgv]"], "evaluate.densities: mgv is unknown"),
        (["{configs}", "evaluate.split=tset"], "no split 'tset'"),
        (["{configs}", "evaluate.features=own_features:mean"], "cannot be imported"),
        (["{alone}"], "alone holds no file of a row, such as .*alone/eae.yaml; copy those of configs/mnist5k"),
        (["{wrong}"], "eae.yaml: objective.name=ae, but the file's name says eae"),
    ],
)
def test_wrong_input_is_one_line(configs, tmp_path, arguments, message):
    alone, wrong = tmp_path / "alone.yaml", tmp_path / "wrong.yaml"
    color = write_shards(tmp_path / "color", {"train": (30,), "validation": (9,), "test": (9,)}, shape=(3, 16, 16))
    for path in (alone, wrong):
        path.write_text(configs.read_text())
    (tmp_path / "wrong").mkdir()
    (tmp_path / "wrong" / "eae.yaml").write_text("objective:\n  name: ae\n")
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        main(
            [text.format(configs=configs, alone=alone, wrong=wrong, color=color) for text in arguments]
            + ["--out", str(tmp_path / "out")]
        )
    assert not (tmp_path / "out").exists()


def test_command_trains_and_judges_a_row_in_processes_of_its_own(configs, tmp_path):
    command = [sys.executable, "-m", "eae_dist.table", str(configs), "--only", "rae", "evaluate.components=3"]
    command += ["--out", str(tmp_path / "out")]
    done = subprocess.run(command, env=rank_environment(), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "rae, seed 0: trained in 0:" in done.stderr and "| RAE |" in done.stdout
    metrics = json.loads((tmp_path / "out" / "runs" / "rae-0" / "evaluation" / "metrics.json").read_text())
    assert metrics["step"] == 2 and metrics["settings"]["components"] == 3
    assert metrics["headline"] == "kd_efflite0_64px" and f"{metrics['sets']['gmm']['kd_efflite0_64px']:.3f}" in done.stdout


# Commands side by side


def test_failed_command_says_its_own_error_and_where_the_rest_lies(tmp_path):
    with pytest.raises(CommandFailed, match=r"pack ended with status 2: error: .*nowhere.* \(all of it: .*log\)"):
        JobPool(1, None).call("eae_dist.pack", ["--verify", "nowhere"], tmp_path / "log")


def test_error_of_several_lines_is_told_whole_and_without_the_bar_before_it(tmp_path):
    said = "settings: 0/1error: other settings:\\n  a: 1 -> 2\\n  b: 3 -> 4\\nTraceback\\n  File"
    with pytest.raises(CommandFailed, match="status 3: error: other settings:\n  a: 1 -> 2\n  b: 3 -> 4 \\(all of it"):
        JobPool(1, 1).call("timeit", ["-s", f"import os; print('{said}', flush=True); os._exit(3)"], tmp_path / "log")
    with pytest.raises(CommandFailed, match="status 3: it said nothing"):
        JobPool(1, 1).call("timeit", ["-s", "import os; os._exit(3)"], tmp_path / "log")


WAIT = "import time; time.sleep(600)"


def test_commands_are_ended_and_none_is_started_after_a_stop(tmp_path):
    job_pool, failures = JobPool(2, 1), []

    def sleep():
        try:
            job_pool.call("timeit", ["-n", "1", "-s", "import time; print(1, flush=True)", "time.sleep(600)"], tmp_path / "log")
        except CommandFailed as error:
            failures.append(str(error))

    thread = threading.Thread(target=sleep)
    thread.start()
    while not ((tmp_path / "log").is_file() and (tmp_path / "log").read_text()):
        time.sleep(0.01)
    job_pool.stop()
    thread.join(timeout=60)
    assert len(failures) == 1 and "ended with status -15" in failures[0]
    sleep()
    assert "not started" in failures[1]


def test_what_is_sent_to_our_process_group_reaches_commands_once(tmp_path):
    """By `stop`: torchrun that is told twice leaves its ranks before they have saved."""
    said = "import os; print(os.getpgid(0) == os.getpid())"
    JobPool(1, 1).call("timeit", ["-n", "1", "-r", "1", said], tmp_path / "log")
    assert (tmp_path / "log").read_text().startswith("True")


def test_gpus_are_shared_out_among_jobs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7,8")
    job_pool = JobPool(2, None)
    environments = [job_pool._environments.get() for _ in range(2)]
    assert job_pool.ranks == 2
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in environments] == ["4,5", "6,7"]
    with pytest.raises(ValueError, match=r"--jobs=3 with 2 rank\(s\) each needs 6 GPUs, but there are 5"):
        JobPool(3, 2)


# What is printed


PAPER = tuple(row for row in OBJECTIVES if row not in BEYOND)


def evaluations(rows=PAPER, seeds: int = 1, data: str = "mnist5k") -> list[tuple[str, dict]]:
    """Metrics as evaluate writes them: the distance tells row, set of images and seed."""
    found = []
    for seed in range(seeds):
        for number, row in enumerate(rows):
            own = ("two_stage",) if row == "two_stage_vae" else ("isotropic", "mvg", "gmm")
            names = ("reconstruction", *own, "interpolation_linear", "interpolation_spherical")
            sets = {name: {"fd_x": 100.0 * place + number + 2 * seed, "kd_x": 0.5 + number} for place, name in enumerate(names)}
            metrics = {"data": data, "index_sha256": "a", "split": "test", "reference": "test", "reference_images": 1000}
            metrics |= {
                "features": {"metric": "fd_x", "kernel_metric": "kd_x", "preprocessing": "v/255"},
                "headline": "fd_x",
                "sets": sets,
                "warnings": [],
                "images": 1000,
            }
            metrics["settings"] = {"frechet": "svd", "components": 10, "neighbor_images": 100, "seed": 0}
            pairs = {"reconstruction": 11.5, "psnr": 20.5, "ssim": 0.75}
            found.append((row, metrics | pairs | {"latents": {"sliced_wasserstein": 0.25, "entropy": 20.0}}))
    return found


def markdown_cells(text: str) -> list[list[str]]:
    return [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]


@pytest.mark.parametrize(("data", "cells"), [("cifar10", 46), ("celeba", 45)])
def test_every_number_of_the_paper_stands_beside_ours(data, cells):
    # 23 lines of a distance and a reconstruction, one distance not there; of CIFAR-10 one more, of the linear map.
    text = as_markdown(Results(evaluations(data=data)))
    ours = {(block, line[0]): line[1:] for block, lines in blocks_of(text).items() for line in lines}
    found = 0
    for line in csv.DictReader((ROOT / "eae_dist" / "report" / "paper_table1.csv").read_text().splitlines()):
        block = {"isotropic": "N(0, I)", "mvg": "MVG", "gmm": "GMM"}[line["density"]]
        distance, theirs, reconstruction, theirs_too = ours[block, line["model"]]
        assert [theirs, theirs_too] == [line[f"{data}_fid"], line[f"{data}_reconstruction"]]
        assert (distance == "N/A") == (not theirs) and float(reconstruction) >= 0
        found += bool(theirs) + bool(theirs_too)
    found += ours["N(0, I)", "EAE, linear map"][1] == ("84.53" if data == "cifar10" else None)
    assert found == cells


def blocks_of(text: str) -> dict[str, list[list[str]]]:
    """The lines of the paper's three blocks, by their head."""
    blocks: dict[str, list[list[str]]] = {}
    for line in markdown_cells(text):
        if line[0] in ("N(0, I)", "MVG", "GMM") or line[0] == "":
            blocks[line[0]] = lines = []
        elif line[0] != "---":
            lines.append(line)
    return blocks


def test_table_on_other_data_has_no_column_of_the_paper_s_and_every_cell_of_ours():
    text = as_markdown(Results(evaluations()))
    blocks = blocks_of(text)
    assert {len(line) for block in ("N(0, I)", "MVG", "GMM") for line in blocks[block]} == {3}
    assert [line[0] for line in blocks[""]] == [MODELS[row] for row in PAPER]
    eae = next(line for line in blocks[""] if line[0] == "EAE")
    assert eae[1:] == ["110.00", "210.00", "310.00", "-", "10.00", "410.00", "510.00", "11.50"]
    two_stage = next(line for line in blocks[""] if line[0] == "2SVAE")
    assert two_stage[1:5] == ["-", "-", "-", "103.00"]  # the draws of its second stage
    assert ["2SVAE", "N/A", "3.00"] in blocks["GMM"]


def test_rows_beyond_the_paper_have_blocks_of_their_own_and_change_no_other():
    every = evaluations((*PAPER, *BEYOND))
    found = every[: len(PAPER)], every, every[len(PAPER) :]
    alone, both, theirs = (as_markdown(Results(rows)) for rows in found)
    assert both.startswith(alone.rstrip()) and "SIGReg" not in alone
    head, text, beyond = both.partition("Beyond the paper:")
    assert text and "SIGReg" not in head and theirs.endswith(text + beyond)
    blocks = blocks_of(beyond)
    assert {head: [line[0] for line in lines] for head, lines in blocks.items()} == {
        head: ["SIGReg", "SWAE"] for head in ("", "N(0, I)", "MVG", "GMM")
    }
    assert blocks["MVG"][0][1:] == ["212.00", "12.00"]
    assert "| SIGReg | **212.00** | **12.00** |" in beyond  # the lowest of these two, but not of all

    latex_of_the_paper, latex, _ = (as_latex(Results(rows)).splitlines() for rows in found)
    assert latex[: len(latex_of_the_paper) - 3] == latex_of_the_paper[:-3]  # but for its last three lines
    assert sum("beyond the paper" in line for line in latex) == 3 and sum("SWAE" in line for line in latex) == 3


def test_numbers_over_seeds_are_mean_and_sample_deviation_and_the_lowest_is_bold():
    text = as_markdown(Results(evaluations(rows=("rae", "ae", "eae"), seeds=3)))
    assert "| RAE | **202.00 ± 2.00** | **2.00 ± 2.00** |" in text and "| AE | 203.00 ± 2.00 | 3.00 ± 2.00 |" in text
    assert "mean ± standard deviation over 3 seeds" in text


def test_sets_that_the_papers_table_has_not_stand_under_their_own_name():
    found = evaluations(rows=("two_stage_vae", "eae"), data="cifar10")
    for _, metrics in found:
        metrics["sets"] |= {name: {"fd_x": 777.0 + len(name)} for name in ("isotropic", "gmm", "two_stage", "flow")}
    text, lines = as_markdown(Results(found)), list(csv.DictReader(as_csv(Results(found)).splitlines()))
    assert ["2SVAE", "786.00", "109.77", "0.00", "62.54"] in blocks_of(text)["N(0, I)"]  # draws of the second stage
    assert "| 2SVAE | N/A |" in text and "**780.00**" in text  # nothing of N/A is the best
    theirs = {(one["model"], one["images"]): one["paper_fid"] for one in lines}
    assert theirs["two_stage_vae", "two_stage"] == "109.77" and theirs["eae", "isotropic"] == "85.26"
    assert theirs["two_stage_vae", "isotropic"] == theirs["two_stage_vae", "gmm"] == theirs["eae", "two_stage"] == ""
    assert "| second stage | flow |" in text


def test_row_with_fewer_seeds_than_others_says_so():
    found = evaluations(rows=("rae", "ae"), seeds=3)[:-1]
    assert "| AE | 202.00 ± 1.41 (2 of 3 seeds) |" in as_markdown(Results(found))


def test_csv_has_every_measure_of_every_set():
    lines = list(csv.DictReader(as_csv(Results(evaluations(seeds=2, data="celeba"))).splitlines()))
    assert len(lines) == (11 * 6 + 4) * 2 + 12 * 5
    others = {
        (one["images"], one["measure"]): one["mean"]
        for one in lines
        if one["model"] == "eae" and not one["measure"].endswith("_x")
    }
    assert others == {
        ("reconstruction", "squared_error"): "11.5",
        ("reconstruction", "psnr"): "20.5",
        ("reconstruction", "ssim"): "0.75",
        ("latents", "sliced_wasserstein"): "0.25",
        ("latents", "entropy"): "20.0",
    }
    line = next(one for one in lines if (one["model"], one["images"], one["measure"]) == ("eae", "gmm", "fd_x"))
    assert (float(line["mean"]), line["seeds"], line["paper_fid"]) == (311.0, "2", "39.76")
    assert {(one["features"], one["preprocessing"]) for one in lines} == {("fd_x", "v/255")}
    theirs = {(one["model"], one["images"]): one["paper_fid"] for one in lines if one["paper_fid"]}
    assert theirs["eae", "reconstruction"] == "40.26" and theirs["two_stage_vae", "two_stage"] == "49.7"
    assert len(theirs) == 5 + 7 + 10 + 11  # isotropic, mvg, gmm without 2SVAE, reconstructions
    assert float(line["std"]) == pytest.approx(2**0.5)
    assert next(one for one in lines if one["measure"] == "kd_x")["paper_fid"] == ""


def test_latex_has_as_many_cells_a_line_as_columns_and_no_bare_special_character():
    text = as_latex(Results(evaluations(seeds=2)))
    note, *lines = [line for line in text.splitlines()[::-1] if line.endswith(r"\\")]
    assert note.startswith(r"\multicolumn{3}") and r"fd\_x of mnist5k" in note
    assert {line.count("&") for line in lines} == {2} and text.count("{lrr}") == 1
    assert len(lines) == 3 + sum(map(len, BLOCKS.values()))
    assert r"fd\_x" in text and "_x" not in text.replace(r"\_x", "") and r"$\pm$" in text and "**" not in text


def test_latex_takes_any_name_of_a_data_set():
    text = as_latex(Results(evaluations(data="train_50%&#$^{}")))
    assert r"train\_50\%\&\#\$\^{}\{\}" in text


def test_evaluations_that_do_not_compare_are_refused():
    one, (row, other) = evaluations(rows=("rae",)), evaluations(rows=("eae",))[0]
    for key, value in {"index_sha256": "b", "reference_images": 10, "features": {"metric": "fid"}}.items():
        with pytest.raises(ValueError, match=f"{key} differs between evaluations \\(rae, eae\\); they cannot be compared"):
            Results([*one, (row, other | {key: value})])
    with pytest.raises(ValueError, match="evaluate.frechet differs"):
        Results([*one, (row, other | {"settings": other["settings"] | {"frechet": "sqrtm"}})])


def test_figure_has_a_row_of_four_kinds_for_every_model_and_frames_what_the_paper_prints():
    white, black = torch.full((COLUMNS, 1, 32, 32), 255, dtype=torch.uint8), torch.zeros(COLUMNS, 1, 32, 32, dtype=torch.uint8)
    rows = [("ground truth", [black]), ("EAE", [black, white, black, black]), ("AE", [black, white[:0], black, black])]
    picture = figure(rows, {"EAE": {"draws of N(0, I)", "draws of a mixture"}, "AE": {"draws of a mixture"}})
    width = (picture.width - 130) // len(KINDS)

    def color(row: int, kind: int, x: int = 5) -> tuple[int, int, int]:
        return picture.getpixel((130 + kind * width + x, 2 * 13 + row * 68 + 20))

    found = [[color(row, kind) for kind in range(4)] for row in range(3)]
    light, dark = (255, 255, 255), (0, 0, 0)
    assert found == [[dark, light, light, light], [dark, light, dark, dark], [dark, light, dark, dark]]
    framed = [[color(row, kind, x=-1) != light for kind in range(4)] for row in range(3)]
    assert framed == [[False] * 4, [False, True, True, False], [False, False, True, False]]
    assert isinstance(picture, Image.Image) and picture.height == 2 * 13 + 3 * 68


def test_kinds_that_cannot_be_drawn_are_left_white(run):
    model, images = eae_dist.load(run), torch.zeros(1, 1, 16, 16, dtype=torch.uint8)
    assert [len(part) for part in pictures(model, "ae", images, seed=0)] == [1, 6, 0, 0]  # no mixture, no second image
    assert [len(part) for part in pictures(model, "ae", images.expand(6, -1, -1, -1), seed=0)] == [6, 6, 0, 6]
    assert [len(part) for part in pictures(model, "two_stage_vae", images, seed=0)] == [1, 0, 0, 0]  # not fitted; never a mixture


def test_warnings_are_said_once_with_the_models_they_are_about():
    found = evaluations(rows=("rae", "ae", "eae"), seeds=2)
    for row, metrics in found:
        metrics["warnings"] = ["of all of them"] + ["of the adversary"] * (row != "eae")
    said = as_markdown(Results(found)).partition("Warnings:")[2]
    assert said.strip().splitlines() == ["- all: of all of them", "- RAE, AE: of the adversary"]


@pytest.mark.parametrize("data", ["mnist5k", "celeba"])
def test_job_array_has_every_row_of_the_paper_before_those_beyond_it(data, tmp_path):
    (tmp_path / "srun").write_text('#!/bin/sh\necho "$@"\n')  # what the script calls last, on a cluster
    (tmp_path / "srun").chmod(0o755)
    rows = [path.stem for path in (ROOT / "configs" / data).glob("*.yaml")]
    found = []
    for index in range(len(rows)):
        variables = {"SLURM_ARRAY_TASK_ID": str(index), "SLURM_JOB_NUM_NODES": "1", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        command = ["bash", "launch/table_array.sbatch", f"configs/{data}.yaml", "--seeds", "3"]
        said = subprocess.run(command, env=os.environ | variables, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        found.append(re.search(rf"table configs/{data}.yaml --only (\w+) --seeds 3$", said, re.MULTILINE)[1])
    assert sorted(found[:12]) == sorted(MODELS.keys() - set(BEYOND))
    assert sorted(found) == sorted(rows)
