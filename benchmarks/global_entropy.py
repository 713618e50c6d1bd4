"""The gain from comparing a latent with those of all ranks: no entropy, that of parts of the batch, and that of all of it.

    python -m benchmarks.global_entropy configs/NAME.yaml --out FOLDER [--jobs N] [--seeds N] [--dims D,D] [--only E,E] [K=V]

The runs of the EAE see equal numbers of images and differ only in what is named here:

    groups   a batch of 128 rows; the entropy is the mean over 1, 2, 4 or 8 groups of neighboring rows, which as many ranks
             would hold (`objective.group`); 0: no entropy, the batch norm alone
    compared a batch of 512 rows; groups of 32, 64, 128, 256 or 512 rows
    batch    32 to 2,048 rows, all compared; the learning rate grows as the root of the batch

Each run is judged on validation: the distances of draws of N(0, I) and of a mixture, if there are enough latents to fit one, and
how far held-out latents are from N(0, I), compared with as many latents of the training split. It writes FOLDER/runs.csv, with a
line for each run. A run that has a line there, or its end in FOLDER/runs, is not done again.
"""

import argparse
import csv
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

from eae_dist.config import load_config
from eae_dist.data.stream import walk
from eae_dist.distributed.launch import CommandFailed, JobPool
from eae_dist.evaluate import evaluate
from eae_dist.inference.trained_model import load
from eae_dist.latent.gaussianity import gaussianity
from eae_dist.losses.entropy import entropy_terms
from eae_dist.model.autoencoder import to_unit
from eae_dist.objectives import EAE, OBJECTIVES
from eae_dist.train import main as train

DIMS, BATCH, LARGE = (8, 16, 64), 128, 512
KEY = ("experiment", "value", "latent_dim", "seed")  # what identifies a line of runs.csv
GROUPS, COMPARED, BATCHES = (0, 1, 2, 4, 8), (32, 64, 128, 256, 512), (32, 128, 512, 2048)


def grouped(groups: int) -> type[EAE]:
    """Returns the EAE whose entropy is the mean over this many groups of neighboring rows of the batch, for one process."""

    class GroupedEAE(EAE):
        def entropy(self, latents, is_first_copy, global_batch, row_ids, key):
            config = self.config
            options = {"k": config.k, "average_k": config.average_k, "eps2": config.eps2}
            parts = groups if self.training else 1  # validation compares all of its images
            valid = [None] * parts if is_first_copy is None else is_first_copy.chunk(parts)
            found = [entropy_terms(z, valid=v, **options) for z, v in zip(latents.chunk(parts), valid, strict=True)]
            entropy = torch.stack([terms.entropy for terms in found]).mean()
            return {"entropy": entropy, "floored_pairs": sum(terms.floored for terms in found)}

    return GroupedEAE


def experiments(dims: Sequence[int], rate: float) -> Iterator[tuple[str, int, list[str]]]:
    """Yields the name, groups and settings of every run, without its seed."""
    for d in dims:
        for groups in GROUPS:
            weight = [] if groups else ["objective.entropy_weight=0"]
            yield f"groups-{groups}-d{d}", max(groups, 1), [f"model.latent_dim={d}", *weight]
        for compared in COMPARED:
            yield f"compared-{compared}-d{d}", LARGE // compared, [f"model.latent_dim={d}", f"train.global_batch={LARGE}"]
        for batch in BATCHES:
            scaled = f"train.learning_rate={rate * (batch / BATCH) ** 0.5:.6g}"
            yield f"batch-{batch}-d{d}", 1, [f"model.latent_dim={d}", f"train.global_batch={batch}", scaled]


def run(groups: int, folder: Path, settings: Sequence[str]) -> None:
    """Trains and judges one run in this process, and writes folder/result.json."""
    OBJECTIVES["eae"] = grouped(groups)
    train([*settings, f"train.output={folder}"])
    metrics = evaluate(folder, ("evaluate.split=validation", "evaluate.reference=validation"))
    headline, sets = metrics["headline"], metrics["sets"]
    result = {name: sets[name][headline] if name in sets else None for name in ("reconstruction", "isotropic", "gmm")}
    result |= {"measure": headline, "squared_error": metrics["reconstruction"]}
    config, model = load_config(settings), load(folder)
    for split, name in (("held out", config.data.validation), ("trained on", config.data.split)):
        images = next(walk(config.data.root, name, metrics["latents"]["images"]))["image"]
        with torch.no_grad():
            latents = torch.cat([model.encode(to_unit(part, torch.device("cpu"))) for part in images.split(256)])
        result |= {f"{split}, {key}": value for key, value in gaussianity(latents).items()}
    (folder / "result.json").write_text(json.dumps(result, indent=2))


def main() -> None:
    """Runs the command line."""
    if sys.argv[1:2] == ["--run"]:  # in the processes that are started below
        groups, folder, *settings = sys.argv[2:]
        return run(int(groups), Path(folder), settings)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--dims", default=",".join(map(str, DIMS)), help="latent sizes, as 8,16")
    parser.add_argument("--only", default="groups,compared,batch", help="experiments, as groups,batch")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    files = ["--config", str(arguments.config), str(arguments.config.with_suffix("") / "eae.yaml"), *arguments.settings]
    job_pool = JobPool(arguments.jobs, 1)
    (arguments.out / "logs").mkdir(parents=True, exist_ok=True)
    only, dims = arguments.only.split(","), [int(text) for text in arguments.dims.split(",")]
    table = arguments.out / "runs.csv"
    kept, waiting = kept_runs(table), {}
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for seed in range(arguments.seeds):
            for name, groups, own in experiments(dims, load_config(files).train.learning_rate):
                experiment, value, d = name.split("-")
                key = (experiment, value, d[1:], str(seed))
                if experiment in only and key not in kept:
                    folder = arguments.out / "runs" / f"{name}-{seed}"
                    command = ["--run", str(groups), str(folder), *files, *own, f"train.seed={seed}"]
                    log = arguments.out / "logs" / folder.name
                    waiting[pool.submit(finish, job_pool, folder, command, log)] = key
        for done in as_completed(waiting):
            if (result := done.result()) is not None:
                key = waiting[done]
                kept[key] = dict(zip(KEY, key, strict=True)) | result
                write_runs(table, kept)


def finish(job_pool: JobPool, folder: Path, command: Sequence[str], log: Path) -> dict | None:
    """Returns the result of a run, which it starts if the run has none yet. Prints why a run failed and returns None."""
    result = folder / "result.json"
    try:
        if not result.is_file():
            job_pool.call("benchmarks.global_entropy", command, log)
    except CommandFailed as error:
        print(f"{folder.name}: {error}")
        return None
    return json.loads(result.read_text())


def write_runs(path: Path, kept: dict[tuple[str, ...], dict]) -> None:
    """Writes runs.csv, sorted by experiment, latent size, value and seed."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(next(iter(kept.values()))), lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept[key] for key in sorted(kept, key=lambda key: (key[0], int(key[2]), int(key[1]), int(key[3]))))


def kept_runs(path: Path) -> dict[tuple[str, ...], dict]:
    """Returns the lines of runs.csv by KEY; empty without this file."""
    if not path.is_file():
        return {}
    with open(path, newline="") as file:
        return {tuple(line[name] for name in KEY): line for line in csv.DictReader(file)}


if __name__ == "__main__":
    main()
