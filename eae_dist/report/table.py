"""The paper's Table 1 from the metrics of many runs: as markdown, CSV and LaTeX, with the paper's own numbers where they are of
the same data set."""

import csv
import io
from collections.abc import Sequence
from importlib.resources import files
from statistics import mean, stdev

from eae_dist.objectives import OBJECTIVES

MODELS = {
    "vae": "VAE",
    "cv_vae": "CV-VAE",
    "wae": "WAE",
    "two_stage_vae": "2SVAE",
    "rae": "RAE",
    "rae_l2": "RAE-L2",
    "rae_gp": "RAE-GP",
    "rae_sn": "RAE-SN",
    "ae": "AE",
    "ae_l2": "AE-L2",
    "eae": "EAE",
    "eae_linear": "EAE, linear map",
}
# Which models the paper prints for which density.
BLOCKS = {
    "isotropic": ("vae", "cv_vae", "wae", "two_stage_vae", "eae", "eae_linear"),
    "mvg": ("rae", "rae_l2", "rae_gp", "rae_sn", "ae", "ae_l2", "eae", "eae_linear"),
    "gmm": ("vae", "cv_vae", "wae", "two_stage_vae", "rae", "rae_l2", "rae_gp", "rae_sn", "ae", "ae_l2", "eae", "eae_linear"),
}
TITLES = {
    "reconstruction": "reconstruction",
    "isotropic": "Isotropic",
    "mvg": "MVG",
    "gmm": "GMM",
    "interpolation_linear": "between, linear",
    "interpolation_spherical": "between, spherical",
}


class Results:
    """The metrics of evaluations, each with its row's name in OBJECTIVES; several of a row are its seeds.

    Raises ValueError if they compare with other images, by other features or under other settings.
    """

    def __init__(self, evaluations: Sequence[tuple[str, dict]]):
        first = evaluations[0][1]
        for key in ("data", "index_sha256", "reference", "reference_images", "features", "split", "images"):
            if other := next((row for row, metrics in evaluations if metrics[key] != first[key]), None):
                raise ValueError(f"{key} differs between evaluations ({evaluations[0][0]}, {other}); they do not compare")
        for key in ("frechet", "components", "neighbor_images", "seed"):
            if other := next((row for row, metrics in evaluations if metrics["settings"][key] != first["settings"][key]), None):
                raise ValueError(
                    f"evaluate.{key} differs between evaluations ({evaluations[0][0]}, {other}); they do not compare"
                )
        self.evaluations, self.first = list(evaluations), first
        self.metric, self.data = first["features"]["metric"], first["data"]
        self.rows = [row for row in MODELS if any(row == name for name, _ in evaluations)]
        self.seeds = max(sum(name == row for name, _ in evaluations) for row in self.rows)

    def values(self, row: str, images: str, measure: str | None = None) -> list[float]:
        """A measure (default: the Fréchet distance) of a row's set of images, one number a seed; none where it was not taken.

        `isotropic` of a row with a second stage are the draws of that, which is what it draws N(0, I) for.
        """
        images = OBJECTIVES[row].second_stage or images if images == "isotropic" else images
        sets = [metrics["sets"].get(images, {}) for name, metrics in self.evaluations if name == row]
        return [numbers[measure or self.metric] for numbers in sets if (measure or self.metric) in numbers]

    def best(self, images: str, rows: Sequence[str]) -> str | None:
        """The row with the lowest mean Fréchet distance."""
        known = {row: mean(values) for row in rows if (values := self.values(row, images))}
        return min(known, key=known.get) if known else None

    def described(self) -> str:
        """What the numbers are, in a sentence."""
        first, references = self.first, f"{self.first['reference_images']:,}"
        spread = f"; mean ± standard deviation over {self.seeds} seeds" if self.seeds > 1 else ""
        return (
            f"{self.metric} of {self.data}: {references} draws, and reconstructions of and mid-points between "
            f"{first['images']:,} images of {first['split']}, against {references} images of {first['reference']}; "
            f"{first['features']['preprocessing']}{spread}"
        )


def published(data: str) -> dict[tuple[str, str, str], float]:
    """The paper's numbers of a data set, (density, model, "fid" or "reconstruction") -> FID; none for data it has no table of."""
    numbers = {}
    for line in csv.DictReader((files("eae_dist.report") / "paper_table1.csv").read_text().splitlines()):
        for column in ("fid", "reconstruction"):
            if text := line.get(f"{data}_{column}"):
                numbers[line["density"], line["model"], column] = float(text)
        if text := line.get(f"{data}_fid_linear_map"):
            numbers[line["density"], MODELS["eae_linear"], "fid"] = float(text)
    return numbers


def table_blocks(results: Results) -> dict[str, list[list[str]]]:
    """The paper's table: for each density a line a model, the cells as text; the lowest of a block in **."""
    paper, blocks = published(results.data), {}
    for density, rows in BLOCKS.items():
        rows = [row for row in rows if row in results.rows]
        best = {images: results.best(images, rows) for images in (density, "reconstruction")}
        lines = []
        for row in rows:
            cells = [MODELS[row]]
            for images, column in ((density, "fid"), ("reconstruction", "reconstruction")):
                text = "N/A" if (row, images) == ("two_stage_vae", "gmm") else as_text(results.values(row, images))
                cells.append(f"**{text}**" if row == best[images] else text)
                if paper:
                    number = paper.get((density, MODELS[row], column))
                    cells.append("" if number is None else f"{number:.2f}")
            lines.append(cells)
        if lines:
            blocks[density] = lines
    return blocks


def block_header(results: Results, density: str) -> list[str]:
    """The heads of a block's columns."""
    if published(results.data):
        return [TITLES[density], results.metric, "FID in the paper", "reconstruction", "in the paper"]
    return [TITLES[density], results.metric, "reconstruction"]


def as_text(values: Sequence[float]) -> str:
    """85.26, 85.26 ± 1.30, or - for none."""
    if not values:
        return "-"
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def as_markdown(results: Results) -> str:
    """The paper's table, and after it every model with every set of images."""
    parts = [f"# The table on {results.data}", "", results.described() + ".", ""]
    for density, lines in table_blocks(results).items():
        parts += [*markdown_table(block_header(results, density), lines), ""]
    parts += ["Every model with every density, and the mid-points between pairs of images:", ""]
    lines = []
    best = {images: results.best(images, results.rows) for images in TITLES}
    for row in results.rows:
        cells = {images: as_text(results.values(row, images)) for images in TITLES}
        marked = [f"**{text}**" if best[images] == row else text for images, text in cells.items()]
        errors = [metrics["reconstruction"] for name, metrics in results.evaluations if name == row]
        lines.append([MODELS[row], *marked, as_text(errors)])
    parts += markdown_table(["", *TITLES.values(), "squared error per image"], lines)
    if warnings := sorted({f"{MODELS[row]}: {text}" for row, metrics in results.evaluations for text in metrics["warnings"]}):
        parts += ["", "Warnings:", "", *(f"- {text}" for text in warnings)]
    return "\n".join([*parts, ""])


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    rows = [header, ["---"] * len(header), *lines]
    return ["| " + " | ".join(row) + " |" for row in rows]


def as_csv(results: Results) -> str:
    """Every measure of every set of images: model, images, measure, mean, standard deviation, seeds, the paper's FID."""
    paper, file = published(results.data), io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["model", "images", "measure", "mean", "std", "seeds", "paper_fid"])
    for row in results.rows:
        sets = [metrics["sets"] for name, metrics in results.evaluations if name == row]
        for images in dict.fromkeys(name for found in sets for name in found):
            for measure in dict.fromkeys(name for found in sets for name in found.get(images, {})):
                values = results.values(row, images, measure)
                density = "isotropic" if images == OBJECTIVES[row].second_stage else images
                number = paper.get((density, MODELS[row], "fid")) if measure == results.metric else None
                spread = stdev(values) if len(values) > 1 else None
                writer.writerow([row, images, measure, mean(values), spread, len(values), number])
    return file.getvalue()


def as_latex(results: Results) -> str:
    """The paper's table for LaTeX, with booktabs."""
    blocks = table_blocks(results)
    lines = [r"\begin{tabular}{l" + "r" * (len(block_header(results, "gmm")) - 1) + "}"]
    for place, (density, rows) in enumerate(blocks.items()):
        lines.append(r"\toprule" if place == 0 else r"\midrule")
        lines.append(" & ".join(latex(cell) for cell in block_header(results, density)) + r" \\")
        lines.append(r"\midrule")
        lines += [" & ".join(latex(cell) for cell in row) + r" \\" for row in rows]
    return "\n".join([f"% {results.described()}", *lines, r"\bottomrule", r"\end{tabular}", ""])


def latex(cell: str) -> str:
    if cell.startswith("**"):
        return r"\textbf{" + latex(cell.strip("*")) + "}"
    return cell.replace("_", r"\_").replace(" ± ", r" $\pm$ ")
