"""The paper's Table 1 from the metrics of many runs, as markdown, CSV and LaTeX.

The table shows the paper's own numbers too, if they are for the same data set. Rows beyond the paper have blocks of their own.
"""

import csv
import io
import re
from collections.abc import Sequence
from importlib.resources import files
from statistics import mean, stdev

from eae_dist.errors import UserError
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
    "sigreg": "SIGReg",
    "swae": "SWAE",
}
BEYOND = ("sigreg", "swae")  # rows that the paper does not have
# The models that the paper prints for each density.
BLOCKS = {
    "isotropic": ("vae", "cv_vae", "wae", "two_stage_vae", "eae", "eae_linear"),
    "mvg": ("rae", "rae_l2", "rae_gp", "rae_sn", "ae", "ae_l2", "eae", "eae_linear"),
    "gmm": ("vae", "cv_vae", "wae", "two_stage_vae", "rae", "rae_l2", "rae_gp", "rae_sn", "ae", "ae_l2", "eae", "eae_linear"),
}
TITLES = {
    "isotropic": "N(0, I)",
    "mvg": "MVG",
    "gmm": "GMM",
    "two_stage": "second stage",
    "flow": "flow",
    "reconstruction": "reconstruction",
    "interpolation_linear": "between, linear",
    "interpolation_spherical": "between, spherical",
}


class Results:
    """The metrics of evaluations, each with its row's name in OBJECTIVES; several evaluations of a row are its seeds.

    Raises ValueError if the evaluations used different images, features or settings.
    """

    def __init__(self, evaluations: Sequence[tuple[str, dict]]):
        first = evaluations[0][1]
        for key in ("data", "index_sha256", "reference", "reference_images", "features", "headline", "split", "images"):
            if other := next((row for row, metrics in evaluations if metrics[key] != first[key]), None):
                raise UserError(f"{key} differs between evaluations ({evaluations[0][0]}, {other}); they cannot be compared")
        for key in ("frechet", "components", "neighbor_images", "seed"):
            if other := next((row for row, metrics in evaluations if metrics["settings"][key] != first["settings"][key]), None):
                raise UserError(
                    f"evaluate.{key} differs between evaluations ({evaluations[0][0]}, {other}); they cannot be compared"
                )
        self.evaluations, self.first = list(evaluations), first
        self.metric, self.data = first["headline"], first["data"]
        self.rows = [row for row in MODELS if any(row == name for name, _ in evaluations)]
        self.seeds = max(sum(name == row for name, _ in evaluations) for row in self.rows)

    def values(self, row: str, images: str) -> list[float]:
        """Returns the distances of a row's set of images, one per seed; a seed without this set is left out."""
        sets = [metrics["sets"].get(images, {}) for name, metrics in self.evaluations if name == row]
        return [numbers[self.metric] for numbers in sets if self.metric in numbers]

    def cells(self, images: dict[str, str | None]) -> dict[str, str]:
        """Returns the distances of a set of images for each row, as text, with the lowest mean in **; N/A for None.

        One seed: 85.26. Several seeds: 85.26 ± 1.30, with their number if other rows have more. No seed: -.
        """
        digits = 3 if self.metric == self.first["features"]["kernel_metric"] else 2
        values = {row: [] if name is None else self.values(row, name) for row, name in images.items()}
        known = {row: mean(found) for row, found in values.items() if found}
        best = min(known, key=known.__getitem__) if len(known) > 1 else None
        texts = {row: "N/A" if images[row] is None else self.as_text(found, digits) for row, found in values.items()}
        return {row: f"**{text}**" if row == best else text for row, text in texts.items()}

    def as_text(self, values: Sequence[float], digits: int = 2) -> str:
        """Returns the mean, and the standard deviation of several values, as text."""
        if not values:
            return "-"
        fewer = f" ({len(values)} of {self.seeds} seeds)" if len(values) < self.seeds else ""
        return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "") + fewer

    def described(self) -> str:
        """Returns a sentence that says what the numbers are."""
        first, references = self.first, f"{self.first['reference_images']:,}"
        spread = f"; mean ± standard deviation over {self.seeds} seeds" if self.seeds > 1 else ""
        return (
            f"{self.metric} of {self.data}: {references} draws, and reconstructions of and mid-points between "
            f"{first['images']:,} images of {first['split']}, against {references} images of {first['reference']}; "
            f"{first['features']['preprocessing']}{spread}"
        )


def published(data: str) -> dict[tuple[str, str, str], float]:
    """Returns the paper's numbers for a data set, (density, model, "fid" or "reconstruction") -> FID; empty if it has none."""
    numbers = {}
    for line in csv.DictReader((files("eae_dist.report") / "paper_table1.csv").read_text().splitlines()):
        for column in ("fid", "reconstruction"):
            if text := line.get(f"{data}_{column}"):
                numbers[line["density"], line["model"], column] = float(text)
        if text := line.get(f"{data}_fid_linear_map"):
            numbers[line["density"], MODELS["eae_linear"], "fid"] = float(text)
    return numbers


def set_of_cell(row: str, density: str) -> str | None:
    """Returns the set of images that the paper's table means.

    For N(0, I), a row with a second stage samples that stage; it has no other samples.
    """
    if second_stage := OBJECTIVES[row].second_stage:
        return {"isotropic": second_stage, "reconstruction": "reconstruction"}.get(density)
    return density


def densities_of(row: str) -> list[str]:
    """Returns the densities for which the table prints a row: those of the paper, and all of them for a row beyond it."""
    return [density for density, models in BLOCKS.items() if row in (*models, *BEYOND)]


def table_blocks(results: Results, *, beyond: bool = False) -> dict[str, list[list[str]]]:
    """Returns the paper's table: for each density a line per model, the cells as text, the lowest of a block in **.

    beyond: the same table of the rows that the paper does not have.
    """
    paper, blocks = published(results.data), {}
    for density, models in BLOCKS.items():
        rows = [row for row in (BEYOND if beyond else models) if row in results.rows]
        columns = {"fid": density, "reconstruction": "reconstruction"}
        ours = {column: results.cells({row: set_of_cell(row, images) for row in rows}) for column, images in columns.items()}
        lines = []
        for row in rows:
            cells = [MODELS[row]]
            for column in columns:
                cells.append(ours[column][row])
                if paper:
                    number = paper.get((density, MODELS[row], column))
                    cells.append("" if number is None else f"{number:.2f}")
            lines.append(cells)
        if lines:
            blocks[density] = lines
    return blocks


def block_header(results: Results, density: str) -> list[str]:
    """Returns the headings of a block's columns."""
    if published(results.data):
        return [TITLES[density], results.metric, "FID in the paper", "reconstruction", "in the paper"]
    return [TITLES[density], results.metric, "reconstruction"]


def as_markdown(results: Results) -> str:
    """Returns every model with every set of images, N(0, I) first, and then the paper's table; then the rows beyond the paper."""
    parts = [f"# The table on {results.data}", "", results.described() + "."]
    texts = {False: "What the paper's table prints of these:", True: "The same sets as in the paper's table:"}
    for beyond, text in texts.items():
        if rows := [row for row in results.rows if (row in BEYOND) == beyond]:
            parts += ["", *(["Beyond the paper:", ""] if beyond else []), *markdown_of_rows(results, rows), "", text]
            for density, lines in table_blocks(results, beyond=beyond).items():
                parts += ["", *markdown_table(block_header(results, density), lines)]
    if warnings := warnings_of(results):
        parts += ["", "Warnings:", "", *(f"- {text}" for text in warnings)]
    return "\n".join([*parts, ""])


def markdown_of_rows(results: Results, rows: Sequence[str]) -> list[str]:
    """Returns the lines of a table of these rows with every set of images."""
    columns = {images: results.cells(dict.fromkeys(rows, images)) for images in TITLES}
    shown = [images for images, cells in columns.items() if set(cells.values()) != {"-"}]
    lines = []
    for row in rows:
        errors = [metrics["reconstruction"] for name, metrics in results.evaluations if name == row]
        lines.append([MODELS[row], *(columns[images][row] for images in shown), results.as_text(errors)])
    return markdown_table(["", *(TITLES[images] for images in shown), "squared error per image"], lines)


def warnings_of(results: Results) -> list[str]:
    """Returns every warning once, with the models that it is about."""
    about: dict[str, list[str]] = {}
    for row in results.rows:
        for text in dict.fromkeys(text for name, metrics in results.evaluations if name == row for text in metrics["warnings"]):
            about.setdefault(text, []).append(MODELS[row])
    return [f"{'all' if len(rows) == len(results.rows) else ', '.join(rows)}: {text}" for text, rows in about.items()]


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """Returns the lines of a markdown table."""
    rows = [header, ["---"] * len(header), *lines]
    return ["| " + " | ".join(row) + " |" for row in rows]


def as_csv(results: Results) -> str:
    """Returns every measure of every set of images and of the latents, with the paper's FID if there is one, and the features.

    The squared error, PSNR and SSIM of the reconstructions compare each with its own original.
    """
    paper, file = published(results.data), io.StringIO()
    frechet = results.first["features"]["metric"]
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["model", "images", "measure", "mean", "std", "seeds", "paper_fid", "features", "preprocessing"])
    network = (frechet, results.first["features"]["preprocessing"])
    for row in results.rows:
        in_paper = {set_of_cell(row, density): paper.get((density, MODELS[row], "fid")) for density in BLOCKS}
        in_paper["reconstruction"] = next(
            (n for (_, model, what), n in paper.items() if (model, what) == (MODELS[row], "reconstruction")), None
        )
        measured: dict[tuple[str, str], list[float]] = {}
        for metrics in (metrics for name, metrics in results.evaluations if name == row):
            for images, measures in measured_sets(metrics).items():
                for measure, value in measures.items():
                    measured.setdefault((images, measure), []).append(value)
        for (images, measure), values in measured.items():
            number = in_paper.get(images) if measure == frechet else None
            spread = stdev(values) if len(values) > 1 else None
            writer.writerow([row, images, measure, mean(values), spread, len(values), number, *network])
    return file.getvalue()


def measured_sets(metrics: dict) -> dict[str, dict[str, float]]:
    """Returns measure -> number for every set of images of an evaluation and for the latents."""
    beside = {"squared_error": "reconstruction", "psnr": "psnr", "ssim": "ssim"}
    of_pairs = {measure: metrics[key] for measure, key in beside.items()}
    sets = metrics["sets"]
    return sets | {"reconstruction": sets["reconstruction"] | of_pairs, "latents": metrics["latents"]}


def as_latex(results: Results) -> str:
    """Returns the paper's table for LaTeX, with booktabs, and a note below it on what its numbers are."""
    columns = len(block_header(results, "gmm"))
    blocks = [(*block, "") for block in table_blocks(results).items()]
    blocks += [(*block, ", beyond the paper") for block in table_blocks(results, beyond=True).items()]
    lines = [r"\begin{tabular}{l" + "r" * (columns - 1) + "}"]
    for place, (density, rows, which) in enumerate(blocks):
        lines.append(r"\toprule" if place == 0 else r"\midrule")
        title, *headings = block_header(results, density)
        lines.append(" & ".join(latex(cell) for cell in (title + which, *headings)) + r" \\")
        lines.append(r"\midrule")
        lines += [" & ".join(latex(cell) for cell in row) + r" \\" for row in rows]
    note = rf"\multicolumn{{{columns}}}{{p{{0.8\linewidth}}}}{{\footnotesize {latex(results.described())}}} \\"
    return "\n".join([*lines, r"\bottomrule", note, r"\end{tabular}", ""])


def latex(cell: str) -> str:
    """Returns a cell for LaTeX."""
    if cell.startswith("**"):
        return r"\textbf{" + latex(cell.strip("*")) + "}"
    return re.sub(r"([%&#$_{}])", r"\\\1", cell).replace("^", r"\^{}").replace(" ± ", r" $\pm$ ")
