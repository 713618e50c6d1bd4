"""Tests what the supplement of the EAE's paper advises, each note with runs of the EAE, for docs/results/notes.md:

    python -m benchmarks.notes configs/mnist5k.yaml --color shards/NAME --out OUT [--jobs N] [--only NOTE,NOTE]
    python -m benchmarks.notes --early OUT-OF-EPOCH-10 OUT-OF-THE-END

The first command makes a table of the row `eae` with three seeds for each value of a setting, and prints the mean and the
standard deviation of its kernel distances. What is finished is left as it is. --color: a data set of color images, for the note
on their latent size. The second command prints how the order of two tables agrees, by Spearman's rank correlation.
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from scipy.stats import spearmanr

from eae_dist.table import main as make_table

NOTES: dict[str, dict[str, tuple[str, ...]]] = {
    "neighbors": {f"k = {k}": (f"objective.k={k}",) for k in (1, 2, 5)},
    "convolutions": {
        f"{n} convolutions": (f"model.encoder=benchmarks.depths:Encoder{n}", f"model.decoder=benchmarks.depths:Decoder{n}")
        for n in (1, 2, 3, 4)
    },
    "decay": {f"decay {decay}": (f"train.decay={decay}",) for decay in (1.0, 0.98, 0.95, 0.9)},
    "latent size": {f"d = {d}": (f"model.latent_dim={d}",) for d in (8, 16, 32, 64, 128)},
}
SETS = ("isotropic", "gmm", "reconstruction")
COLOR_EPOCHS = 80  # of about 1,500 images: as many steps as the digits' 40 epochs


def numbers(folder: Path, row: str, images: str) -> tuple[float, float] | None:
    """Returns the mean and the standard deviation over seeds of a row's kernel distance, from a folder of a table.

    None if the table has no such images: evaluation leaves out a density that needs more latents than there are.
    """
    with (folder / "table.csv").open() as file:
        for line in csv.DictReader(file):
            kernel_distance = "k" + line["features"][1:]
            if (line["model"], line["images"], line["measure"]) == (row, images, kernel_distance):
                return float(line["mean"]), float(line["std"] or "nan")
    return None


def try_notes(config: Path, color: Path | None, out: Path, jobs: int, only: Sequence[str]) -> None:
    """Makes the tables that are missing, and prints one line for each value of each setting."""
    for note, values in NOTES.items():
        if note not in only or (note == "latent size" and color is None):
            continue
        print(f"\n| {note} | {' | '.join(SETS)} |\n| --- |{' --- |' * len(SETS)}")
        for value, settings in values.items():
            folder = out / value.replace(" = ", "-").replace(" ", "-")
            data = [f"data.root={color}", f"train.epochs={COLOR_EPOCHS}"] if note == "latent size" else []
            if not (folder / "table.csv").is_file():
                arguments = ["--only", "eae", "--seeds", "3", "--jobs", str(jobs), "--out", str(folder)]
                make_table([str(config), *arguments, *data, *settings])
            found = (numbers(folder, "eae", images) for images in SETS)
            cells = ("{:.3f} ± {:.3f}".format(*distance) if distance else "-" for distance in found)
            print(f"| {value} | {' | '.join(cells)} |", flush=True)


def agreement(early: Path, late: Path) -> None:
    """Prints the rank correlation of each set's distances over the rows that have it in both tables."""
    for images in ("isotropic", "mvg", "gmm", "reconstruction"):
        with (late / "table.csv").open() as file:
            rows = dict.fromkeys(line["model"] for line in csv.DictReader(file))
        pairs = [(numbers(early, row, images), numbers(late, row, images)) for row in rows]
        before, after = zip(*((first[0], last[0]) for first, last in pairs if first and last), strict=True)
        print(
            f"{images}: rank correlation {spearmanr(before, after).statistic:.2f} over {len(before)} rows; mean distance "
            f"{mean(before):.3f}, then {mean(after):.3f}"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, nargs="?")
    parser.add_argument("--color", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(NOTES))
    parser.add_argument("--early", type=Path, nargs=2)
    given = parser.parse_args()
    if given.early:
        agreement(*given.early)
    elif given.config and given.out:
        try_notes(given.config, given.color, given.out, given.jobs, given.only)
    else:
        parser.error("expected a configuration and --out, or --early and two folders of tables")
