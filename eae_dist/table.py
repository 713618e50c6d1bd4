"""The paper's table on one data set: trains and judges every row of it, and prints it as the paper does.

    python -m eae_dist.table CONFIG.yaml [--only ROW ...] [--beyond] [--seeds N] [--jobs N] [--nproc N] [--out DIR]
                             [key=value ...]

CONFIG.yaml holds the settings of the data set, and the folder CONFIG/ beside it has one file for each row. Rows beyond the paper
are added with --beyond, in blocks of their own. Finished rows are left as they are and interrupted ones continue, so the same
command finishes a table that was interrupted. It writes table.md, table.csv, table.tex and figure.png.
"""

import argparse
import json
import logging
import math
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

from eae_dist.config import (
    WHERE_DATA_LIES,
    Config,
    changed_keys,
    find_config,
    is_assignment,
    load_config,
    save_config,
)
from eae_dist.data.remote import Cache
from eae_dist.data.shard_index import ShardIndex
from eae_dist.data.stream import resolve_lanes
from eae_dist.distributed.launch import CommandFailed, JobPool
from eae_dist.errors import MissingFile, UserError, is_users
from eae_dist.evaluate import check_splits, density_names, open_features
from eae_dist.inference.trained_model import load
from eae_dist.numerics.atomic_files import replace_file
from eae_dist.numerics.json_files import read_json
from eae_dist.objectives import OBJECTIVES, resolve
from eae_dist.report.figure import save_figure
from eae_dist.report.table import BEYOND, Results, as_csv, as_latex, as_markdown
from eae_dist.training import checkpoint as checkpoints
from eae_dist.training.setup import last_step

log = logging.getLogger("eae_dist")


@dataclass(frozen=True, eq=False)
class Run:
    """One row of the table with one seed. `arguments`: for eae_dist.train; `config`: the settings that they resolve to."""

    row: str
    seed: int
    folder: Path
    arguments: tuple[str, ...]
    config: Config
    index: ShardIndex


def table(
    config: Path,
    only: Sequence[str],
    seeds: int,
    job_pool: JobPool,
    out: Path,
    settings: Sequence[str],
    *,
    beyond: bool = False,
) -> tuple[str | None, list[str]]:
    """Trains, judges and writes the table into `out`. Returns it as markdown, or None without any finished row, and the failures.

    only: rows; if it is empty, all rows of the paper. beyond: the rows beyond the paper as well. Raises ValueError or OSError for
    what a user can correct.
    """
    config = find_config(config)
    added = BEYOND if beyond else ()
    files = row_files(config, [*only, *added])
    rows = [row for row in files if row in added or (row in only if only else row not in BEYOND)]
    wanted = {OBJECTIVES[row].first_stage for row in rows}
    there = [row for row in files if row in rows or (row in wanted and (out / "runs" / f"{row}-0").is_dir())]
    every = {(row, seed): planned(config, files[row], row, seed, out, settings) for seed in range(seeds) for row in there}
    first_stages = {run: every.get((OBJECTIVES[row].first_stage or "", seed)) for (row, seed), run in every.items()}
    runs = [run for run in every.values() if run.row in rows]
    runs.sort(key=lambda run: (run.seed, first_stages[run] is not None))  # runs that wait for the weights of others are last
    check_judging([run for run in runs if judged(run) is None])
    failures = finish_all(runs, first_stages, job_pool, out / "logs")

    found = {run: metrics for run in runs if (metrics := judged(run)) is not None}
    if not found:
        return None, failures
    by_features = {json.dumps(metrics["features"]): str(run.folder) for run, metrics in found.items()}
    if len(by_features) > 1:
        raise UserError(
            f"rows were judged by different features, or versions of them: {', '.join(by_features.values())}; "
            f"remove their evaluation folders and run the same command to judge them again"
        )
    results = Results([(run.row, metrics) for run, metrics in found.items()])
    text = as_markdown(results)
    for name, content in {"table.md": text, "table.csv": as_csv(results), "table.tex": as_latex(results)}.items():
        replace_file(out / name, content)
    data, judging, allow = runs[0].config.data, runs[0].config.evaluate, own_networks(runs[0]).values()
    models = {row: load(next(chosen(run) for run in found if run.row == row), allow=allow) for row in results.rows}
    save_figure(models, data.root, judging.split, judging.seed, out / "figure.png", Cache.of(data))
    return text, failures


def row_files(config: Path, only: Sequence[str]) -> dict[str, Path]:
    """Returns the file of each row in the folder beside the data set's file, in the table's order.

    Raises ValueError if a row of `only` has no file, FileNotFoundError if no row has one.
    """
    folder = config.with_suffix("")
    files = {row: folder / f"{row}.yaml" for row in OBJECTIVES if (folder / f"{row}.yaml").is_file()}
    if not files:
        raise MissingFile(f"{folder} holds no file of a row, such as {folder}/eae.yaml; copy those of configs/mnist5k")
    if missing := [row for row in only if row not in files]:
        raise UserError(f"{folder} has no row {' '.join(missing)}, but {', '.join(files)}; change --only or leave out --beyond")
    return files


def planned(config: Path, file: Path, row: str, seed: int, out: Path, settings: Sequence[str]) -> Run:
    """Returns the run of a row with a seed. Raises ValueError for settings that the table sets itself."""
    folder = out / "runs" / f"{row}-{seed}"
    if own := [text for text in settings if text.startswith(("train.output=", "train.seed=", "objective.name="))]:
        raise UserError(f"{own[0]}: the table sets this itself; give --out, --seeds or --only")
    arguments = ("--config", str(config), str(file), *settings, f"train.output={folder}", f"train.seed={seed}")
    try:
        loaded = load_config(arguments)
        if loaded.objective.name != row:
            raise UserError(f"objective.name={loaded.objective.name}, but the file's name says {row}")
        data, cache = loaded.data, Cache.of(loaded.data)
        index = ShardIndex.load(data.root, cache)
        lanes = resolve_lanes(index, data.split, loaded.train.global_batch, data.lanes, cache)
        return Run(row, seed, folder, arguments, resolve(loaded, index.image_shape, lanes), index)
    except (ValueError, OSError) as error:
        text = str(error)
        raise UserError(text if str(file) in text else f"row {row}, {file}: {text}") from error


def check_judging(runs: Sequence[Run]) -> None:
    """Raises ValueError or FileNotFoundError for what would end every evaluation.

    Without this check, the error would come after training, which may take days.
    """
    for run in runs:
        check_splits(run.index, run.config)
        density_names(run.config.evaluate, OBJECTIVES[run.row].second_stage)
    for run in runs[:1]:  # all rows of a table are judged by the same features
        extractor = open_features(run.config.evaluate, run.index, [f"evaluate.features={run.config.evaluate.features}"])
        extractor(torch.zeros(2, *run.index.image_shape, dtype=torch.uint8))


def finish_all(runs: Sequence[Run], first_stages: dict[Run, Run | None], job_pool: JobPool, logs: Path) -> list[str]:
    """Finishes every run, several at a time, and returns a line for each failure; a failure does not stop the other runs."""
    failures, started = [], time.monotonic()
    logs.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(job_pool.jobs) as pool:
        futures: dict[Run, Future] = {}
        for run in runs:
            first_stage = first_stages[run]
            after = None if first_stage is None else futures.get(first_stage)
            futures[run] = pool.submit(finish, run, first_stage, after, job_pool, logs)
        try:
            for run, future in futures.items():
                try:
                    said = future.result()
                except Exception as error:
                    if not isinstance(error, CommandFailed) and not is_users(error):
                        raise
                    said = str(error)
                    failures.append(f"{run.row}, seed {run.seed}: {error}")
                log.info("[%s] %s, seed %d: %s", clock(time.monotonic() - started), run.row, run.seed, said)
        except BaseException:
            job_pool.stop()
            pool.shutdown(cancel_futures=True)
            raise
    return failures


def finish(run: Run, first_stage: Run | None, ends: Future | None, job_pool: JobPool, logs: Path) -> str:
    """Finishes one run, and returns a text on how long that took.

    first_stage: the run whose weights this run takes over if that run is trained. ends: the future of first_stage, if it is among
    the runs.
    """
    if judged(run) is not None:
        return "is finished"
    if (taken := steps_taken(run)) > (wanted := last_step(run.config, run.index)):
        raise UserError(f"{run.folder} was trained for {taken} steps, expected at most {wanted}; take another --out")
    started = time.monotonic()
    if not trained(run):
        if ends is not None:
            ends.exception()  # waits
        if first_stage is not None and trained(first_stage) and same_training(run, first_stage):
            adopt(run, first_stage)
        else:
            job_pool.call("eae_dist.train", run.arguments, logs / f"{run.folder.name}-train.log")
        if not trained(run):
            raise CommandFailed(
                f"training was stopped after {steps_taken(run)} of {wanted} steps; run the same command to continue"
            )
    if intact(chosen(run)) is None:
        raise UserError(f"{chosen(run)}, which has the lowest validation loss, is missing or damaged; remove {run.folder}")
    training = clock(time.monotonic() - started)
    command = ["--ckpt", str(chosen(run)), *(f"data.{key}={getattr(run.config.data, key)}" for key in WHERE_DATA_LIES)]
    for key, value in asdict(run.config.evaluate).items():
        command.append(f"evaluate.{key}={value if isinstance(value, str) else json.dumps(value)}")
    command += [f"model.{part}={name}" for part, name in own_networks(run).items()]
    job_pool.call("eae_dist.evaluate", command, logs / f"{run.folder.name}-evaluate.log")
    if judged(run) is None:
        raise CommandFailed(f"{run.folder}/evaluation holds no metrics of the checkpoint {chosen(run)}")
    return f"trained in {training}, judged after {clock(time.monotonic() - started)}"


def trained(run: Run) -> bool:
    """Returns True if the run's folder holds the end of this training."""
    last = intact(run.folder / "checkpoints" / "latest")
    if last is None or last.state["step"] != last_step(run.config, run.index):
        return False
    if changed_keys(last.config, run.config, changeable=False) or last.state.get("unfinished"):
        return False
    return last.state["stream"]["index_sha256"] == run.index.sha256


def steps_taken(run: Run) -> int:
    """Returns the number of steps of the last checkpoint."""
    last = intact(run.folder / "checkpoints" / "latest")
    return 0 if last is None else last.state["step"]


def intact(path: Path) -> checkpoints.Checkpoint | None:
    """Returns the verified checkpoint in a folder, or None if there is none or it is damaged, which is said."""
    try:
        changed = tuple((path / name).stat().st_mtime_ns for name in (*checkpoints.FILES, "manifest.json"))
        return _opened(path.resolve(), changed)
    except FileNotFoundError:
        return None
    except checkpoints.DamagedCheckpoint as error:
        log.warning("%s", error)
        return None


@lru_cache(maxsize=256)
def _opened(path: Path, changed: tuple[int, ...]) -> checkpoints.Checkpoint:
    return checkpoints.open_checkpoint(path)  # verifies checksums, and every row is asked about several times


def chosen(run: Run) -> Path:
    """Returns the checkpoint to judge: the one with the lowest validation loss, or the last one without validation.

    The run is trained. The state names the best step, since a link can be lost.
    """
    last = run.folder / "checkpoints" / "latest"
    checkpoint = intact(last)
    assert checkpoint is not None  # the run is trained
    best_step = checkpoint.state.get("best_step")
    return last.with_name(f"step-{best_step:08d}") if best_step else last.resolve()


def judged(run: Run) -> dict | None:
    """Returns the metrics of a trained run, or None if they are not of its checkpoint under the present settings."""
    path = run.folder / "evaluation" / "metrics.json"
    if not path.is_file() or not trained(run) or (weights := intact(chosen(run))) is None:
        return None
    try:  # metrics of earlier versions have no headline or no checksum, and the run is judged again
        metrics = read_json(path, {"headline": str, "sets": dict}, "the row is judged again", is_sealed=True)
    except ValueError as error:
        log.warning("%s", error)
        return None
    wanted = {"model_sha256": weights.model_sha256, "settings": asdict(run.config.evaluate), "index_sha256": run.index.sha256}
    return metrics if all(metrics.get(key) == value for key, value in wanted.items()) else None


def same_training(run: Run, other: Run) -> bool:
    """Returns True if two runs have the same weights under the names of two rows."""
    objective = replace(run.config.objective, name=other.row)
    train = replace(run.config.train, output=other.config.train.output)
    return replace(run.config, objective=objective, train=train, evaluate=other.config.evaluate) == other.config


def adopt(run: Run, other: Run) -> None:
    """Copies the other run's best and last checkpoint."""
    for path in sorted({chosen(other), (other.folder / "checkpoints" / "latest").resolve()}):
        found = checkpoints.open_checkpoint(path)
        checkpoints.save(run.folder, run.config, found.model_state(), found.optimizer_state(), found.state)
        checkpoints.mark_best(run.folder, found.state["best_step"])
    save_config(run.config, run.folder / "config.yaml")


def own_networks(run: Run) -> dict[str, str]:
    """Returns the user's own network classes, by part."""
    return {part: name for part in ("encoder", "decoder") if (name := getattr(run.config.model, part))}


def clock(seconds: float) -> str:
    """Returns seconds as minutes:seconds."""
    minutes, seconds = divmod(math.floor(seconds), 60)
    return f"{minutes}:{seconds:02d}"


def interrupt(*_: object) -> None:
    """Handles SIGTERM as Ctrl-C."""
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m eae_dist.table", description=__doc__.split(":\n")[0])
    parser.add_argument(
        "config",
        type=Path,
        metavar="CONFIG.yaml",
        help="a data set's file, beside the folder of its rows, or the name of a shipped one",
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="ROW", help="a table of these rows alone; default: the paper's")
    parser.add_argument("--beyond", action="store_true", help="the rows beyond the paper as well: sigreg, swae")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="runs of each row; from 2 on, mean ± deviation")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, sharing the GPUs or cores; default: 1")
    parser.add_argument("--nproc", type=int, help="ranks of a run; default: all GPUs of a job, or one on a CPU")
    parser.add_argument("--out", type=Path, help="folder of the table and its runs; default: runs/NAME-table")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of every row")
    arguments = parser.parse_intermixed_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    signal.signal(signal.SIGTERM, interrupt)
    out = arguments.out or Path("runs") / f"{arguments.config.stem}-table"
    try:
        if arguments.seeds < 1:
            raise UserError(f"--seeds={arguments.seeds} must be at least 1")
        job_pool = JobPool(arguments.jobs, arguments.nproc)
        rows = [text for text in arguments.only if not is_assignment(text)]  # --only also takes the settings that follow it
        settings = [*filter(is_assignment, arguments.only), *arguments.settings]
        text, failures = table(arguments.config, rows, arguments.seeds, job_pool, out, settings, beyond=arguments.beyond)
    except KeyboardInterrupt:
        sys.exit("stopped; run the same command to continue")
    except Exception as error:
        if not is_users(error):
            raise
        sys.exit(f"error: {error}")
    if text is not None:
        print(text)
        print(f"table.md, table.csv, table.tex and figure.png in {out}")
    if failures:
        sys.exit("\n".join(["error: not in the table:", *failures]))


if __name__ == "__main__":
    main()
