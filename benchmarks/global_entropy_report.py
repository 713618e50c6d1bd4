"""The means and the plot of runs.csv, which benchmarks.global_entropy writes.

    python -m benchmarks.global_entropy_report FOLDER

It writes FOLDER/means.md and FOLDER/plot.png.
"""

import csv
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

from benchmarks.global_entropy import BATCH

EXPERIMENTS = ("groups", "compared", "batch")
MEASURES = {
    "kernel distance of N(0, I)": lambda line: float(line["isotropic"]),
    "kernel distance of a mixture": lambda line: float(line["gmm"]) if line["gmm"] else None,
    "sliced Wasserstein distance of held-out latents from N(0, I)": lambda line: float(line["held out, sliced_wasserstein"]),
    "entropy that held-out latents lack [nats]": lambda line: (
        float(line["held out, entropy_of_draws"]) - float(line["held out, entropy"])
    ),
    "squared error per image": lambda line: float(line["squared_error"]),
}


def latents_compared(line: dict[str, str]) -> int:
    """Returns how many latents the entropy of a run, a line of runs.csv, compares; 0 for no entropy."""
    value = int(line["value"])
    return value if line["experiment"] != "groups" else BATCH // value if value else 0


def values_of(lines: list[dict[str, str]], measure: str) -> list[float]:
    """Returns a measure of runs, without those that do not have it."""
    return [value for line in lines if (value := MEASURES[measure](line)) is not None]


def write_means(series: dict[tuple[str, int], dict[int, list[dict]]], path: Path) -> None:
    """Writes a Markdown table for each experiment, with means and deviations over seeds."""
    rows = defaultdict(list)
    for (experiment, d), by_count in series.items():
        for count, lines in sorted(by_count.items()):
            cells = (cell(values_of(lines, measure)) for measure in MEASURES)
            rows[experiment].append(f"| {d} | {count or 'no entropy'} | {' | '.join(cells)} | {len(lines)} |")
    head = f"| d | latents compared | {' | '.join(MEASURES)} | seeds |\n{'| --- ' * (len(MEASURES) + 3)}|"
    path.write_text("\n".join(f"{experiment}:\n\n{head}\n" + "\n".join(lines) + "\n" for experiment, lines in rows.items()))


def cell(values: list[float]) -> str:
    """Returns the mean and the deviation of one cell of a table, or "-" without values."""
    if not values:
        return "-"
    return f"{mean(values):.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def draw(series: dict[tuple[str, int], dict[int, list[dict]]], path: Path) -> None:
    """Draws every measure over the number of latents compared: a column for each experiment, a color for each latent size."""
    experiments = [name for name in EXPERIMENTS if name in {experiment for experiment, _ in series}]
    sizes = sorted({d for _, d in series})
    shape = len(MEASURES), len(experiments)
    figure, axes = plt.subplots(*shape, squeeze=False, figsize=(4.2 * shape[1], 2.6 * shape[0]), sharex="col")
    for (experiment, d), by_count in series.items():
        column, color = axes[:, experiments.index(experiment)], f"C{sizes.index(d)}"
        for axis, measure in zip(column, MEASURES, strict=True):
            found = ((count, values_of(lines, measure)) for count, lines in sorted(by_count.items()))
            values = {count: of_runs for count, of_runs in found if of_runs}
            if 0 in values:
                axis.axhline(mean(values.pop(0)), color=color, linestyle=":", label=f"d = {d}, no entropy")
            spreads = [stdev(of_runs) if len(of_runs) > 1 else 0 for of_runs in values.values()]
            axis.errorbar(
                list(values), [*map(mean, values.values())], spreads, color=color, marker="o", capsize=3, label=f"d = {d}"
            )
            axis.set_xscale("log", base=2)
    for axis, experiment in zip(axes[0], experiments, strict=True):
        axis.set_title(experiment)
        axis.legend(fontsize=7)
    for axis, name in zip(axes[:, 0], MEASURES, strict=True):
        axis.set_ylabel(name.replace(" of ", "\nof ", 1).replace(" that ", "\nthat "), fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("latents compared")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> None:
    """Runs the command line."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    with open(folder / "runs.csv", newline="") as file:
        lines = sorted(csv.DictReader(file), key=lambda line: (EXPERIMENTS.index(line["experiment"]), int(line["latent_dim"])))
    series = defaultdict(lambda: defaultdict(list))  # runs by experiment and latent size, then by the number of latents compared
    for line in lines:
        series[line["experiment"], int(line["latent_dim"])][latents_compared(line)].append(line)
    write_means(series, folder / "means.md")
    draw(series, folder / "plot.png")


if __name__ == "__main__":
    main()
