"""Tunes one setting of every row of a table on the validation split, and prints the score of each value:

    python -m benchmarks.tuning configs/NAME.yaml [--only ROW,ROW | --grid ROW=VALUE,VALUE] [--jobs N] --out OUT [key=value ...]

The plain autoencoder has no weight of its own, so its trials are of the learning rate, which configs/NAME.yaml then sets for all
rows. The trials of the two-stage VAE are of its second stage, on the weights of configs/NAME/two_stage_vae.yaml. The score is the
mean distance over the densities that the table prints for the row. `--grid` replaces the values of a row, and then only the rows
with a `--grid` are tuned. Finished trials are left as they are.
"""

import argparse
import csv
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

from eae_dist.distributed.launch import JobPool
from eae_dist.report.table import MODELS, densities_of, set_of_cell
from eae_dist.table import Run, finish_all, judged, planned, row_files

GRIDS: dict[str, tuple[str, tuple[float, ...]]] = {
    "ae": ("train.learning_rate", (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)),
    "ae_l2": ("objective.decoder_weight", (1e-8, 1e-7, 1e-6, 1e-5, 1e-4)),
    "rae": ("objective.latent_weight", (1e-4, 5e-4, 2.5e-3, 1.2e-2, 6e-2)),
    "rae_l2": ("objective.decoder_weight", (1e-8, 1e-7, 1e-6, 1e-5, 1e-4)),
    "rae_gp": ("objective.gradient_weight", (5e-9, 5e-8, 5e-7, 5e-6, 5e-5, 5e-4)),
    "rae_sn": ("objective.latent_weight", (3e-3, 9e-3, 2.7e-2, 8e-2, 2.4e-1)),
    "vae": ("objective.kl_weight", (0.01, 0.03, 0.1, 0.312, 1, 3)),
    "cv_vae": ("objective.kl_weight", (0.012, 0.039, 0.12, 0.4, 1.2)),
    "wae": ("objective.mmd_weight", (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)),
    "eae": ("objective.entropy_weight", (1e-3, 3e-3, 6e-3, 1e-2, 3e-2, 6e-2)),
    "eae_linear": ("objective.entropy_weight", (1e-3, 3e-3, 6e-3, 1e-2, 3e-2, 6e-2)),
    "sigreg": ("objective.sigreg_weight", (1e-2, 3e-2, 1e-1, 3e-1, 1)),
    "swae": ("objective.wasserstein_weight", (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
    "two_stage_vae": ("evaluate.second_stage_weight", (1.5e-4, 5e-4, 1.5e-3, 5e-3, 1.5e-2)),
}
ON_VALIDATION = ("evaluate.split=validation", "evaluate.reference=validation")


def trial(config: Path, row: str, value: float, out: Path, settings: Sequence[str]) -> Run:
    """Returns the run of a row with one value of its grid, in its own folder. Raises ValueError for what a user can correct."""
    key, _ = GRIDS[row]
    run = planned(config, row_files(config, [row])[row], row, 0, out, [*ON_VALIDATION, *settings, f"{key}={value}"])
    folder = out / "runs" / f"{row}-{value:g}"
    arguments = tuple(f"train.output={folder}" if text.startswith("train.output=") else text for text in run.arguments)
    return replace(run, folder=folder, arguments=arguments)


def tuned(config: Path, grids: dict[str, Sequence[float]], job_pool: JobPool, out: Path, settings: Sequence[str]) -> list[dict]:
    """Runs a trial for each value of each row in `grids`, and returns a record for each finished one."""
    trials = {(row, value): trial(config, row, value, out, settings) for row, values in grids.items() for value in values}
    first_stage = next((run for (row, _), run in trials.items() if row == "two_stage_vae"), None)
    # The trials of a second stage share the first one's weights.
    first_stages = {
        run: first_stage if run.row == "two_stage_vae" and run is not first_stage else None for run in trials.values()
    }
    for failure in finish_all(list(trials.values()), first_stages, job_pool, out / "logs"):
        print(failure)
    records = []
    for (row, value), run in trials.items():
        if (metrics := judged(run)) is None:
            continue
        names = [set_of_cell(row, density) for density in densities_of(row)]
        sets = [metrics["sets"][name] for name in names if name in metrics["sets"]]
        for measure in (metrics["features"][name] for name in ("metric", "kernel_metric")):
            score = mean(numbers[measure] for numbers in sets)
            setting = {"epochs": run.config.train.epochs, "row": row, "setting": GRIDS[row][0], "value": value}
            records.append(setting | {"measure": measure, "score": score})
            for name, numbers in metrics["sets"].items():
                records[-1][name] = numbers[measure]
    return records


def grid(text: str) -> tuple[str, tuple[float, ...]]:
    """Reads ROW=VALUE,VALUE. Raises ValueError for another form, argparse.ArgumentTypeError for an unknown row."""
    row, values = text.split("=")
    if row not in GRIDS:
        raise argparse.ArgumentTypeError(f"the row {row!r} is unknown; it is one of {', '.join(GRIDS)}")
    return row, tuple(float(value) for value in values.split(","))


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--only", default=",".join(GRIDS), metavar="ROW,ROW")
    which.add_argument("--grid", action="append", type=grid, metavar="ROW=VALUE,VALUE")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("settings", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    grids = dict(arguments.grid or ((row, GRIDS[row][1]) for row in arguments.only.split(",")))
    records = tuned(arguments.config, grids, JobPool(arguments.jobs, None), arguments.out, arguments.settings)
    columns = list(dict.fromkeys(key for record in records for key in record))
    with open(arguments.out / "tuning.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
    for measure in dict.fromkeys(record["measure"] for record in records):
        print(f"\n| row | setting | {measure} on validation |\n| --- | --- | --- |")
        for row in dict.fromkeys(record["row"] for record in records):
            found = {r["value"]: r["score"] for r in records if (r["row"], r["measure"]) == (row, measure)}
            best = min(found, key=found.get)
            cells = (
                f"{'**' if value == best else ''}{value:g}: {score:.4g}{'**' if value == best else ''}"
                for value, score in found.items()
            )
            print(f"| {MODELS[row]} | `{GRIDS[row][0]}` | {', '.join(cells)} |")


if __name__ == "__main__":
    main()
