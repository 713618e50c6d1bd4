"""Judges a checkpoint on a split that it was not trained on, or a folder of images against a folder of real ones:

    python -m eae_dist.evaluate --ckpt DIR [--nproc N] [--out DIR] [key=value ...]
    python -m eae_dist.evaluate --images REAL GENERATED [--nproc N] [--out DIR] [key=value ...]
    python -m eae_dist.evaluate --save-stats IMAGES FILE.npz [--nproc N] [key=value ...]

REAL, GENERATED and IMAGES are folders or zip files; REAL and GENERATED may be .npz files of statistics (mu, sigma).

Without a launcher it uses all local GPUs, or N CPU ranks; under accelerate, torchrun or srun it uses their ranks. The numbers do
not depend on the number of ranks, and a run that was killed continues where it was. It writes metrics.json, the fitted densities
and PNG grids into RUN/evaluation, or into --out.
"""

import argparse
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState

from eae_dist.config import Config, EvaluateConfig
from eae_dist.data.order import blocks_of, filled
from eae_dist.data.remote import Cache
from eae_dist.data.shard_index import ShardIndex
from eae_dist.data.stream import walk
from eae_dist.distributed import gather_rows, on_rank_zero, rank, world_size
from eae_dist.distributed.launch import run_on_ranks
from eae_dist.errors import UserError
from eae_dist.inference.evaluation_progress import EvaluationProgress
from eae_dist.inference.image_comparison import evaluate_folders, save_folder_statistics
from eae_dist.inference.judged_checkpoint import evaluation_config, evaluation_folder, load_objective, named_networks, open_data
from eae_dist.inference.trained_model import LatentsOf, decoded, interpolations, sample_seeds, with_progress
from eae_dist.latent.densities import DENSITIES, Density, ReconstructingDensity, load_density, save_density
from eae_dist.latent.gaussianity import gaussianity
from eae_dist.losses.terms import squared_error
from eae_dist.metrics.extractor import Extractor
from eae_dist.metrics.features import build_features, features_for
from eae_dist.metrics.frechet import warnings_about
from eae_dist.metrics.image_sets import ImageSet, announce, cached_image_set, compare, describe, headline
from eae_dist.metrics.similarity import psnr, ssim
from eae_dist.model.autoencoder import Autoencoder, encoded, to_unit
from eae_dist.numerics.atomic_files import replace_file
from eae_dist.numerics.json_files import sealed
from eae_dist.objectives import objective_class
from eae_dist.report.grids import ACROSS, SAMPLES, draw_grids, grid, grid_inputs, save_grids
from eae_dist.report.summaries import summary, summary_of_folders
from eae_dist.training.checkpoint import open_on_rank_zero, versions
from eae_dist.training.run_folder import lock
from eae_dist.training.setup import how_to_judge


def evaluate(directory: Path, assignments: Sequence[str], out: Path | None = None) -> dict:
    """Returns the metrics of a checkpoint; rank 0 also writes them to disk. Call it on every rank.

    Raises ValueError or FileNotFoundError for a damaged or missing checkpoint, settings other than evaluate.* and data.root,
    images of another shape than the model's, and features that are not available.
    """
    # The checkpoint, the data and the features.
    checkpoint = open_on_rank_zero(directory)
    config = evaluation_config(checkpoint, assignments)
    settings = config.evaluate
    for key, default in (("read", "pack"), ("resize", None)):
        if getattr(settings, key) != default:
            raise UserError(f"evaluate.{key}={getattr(settings, key)} is for files of images (--images), not for shards (--ckpt)")
    index = open_data(checkpoint, config)
    check_splits(index, config)
    second_stage = objective_class(config.objective.name).second_stage
    densities = density_names(settings, second_stage)
    device = PartialState().device
    autoencoder = load_objective(checkpoint, named_networks(assignments)).autoencoder.to(device)
    extractor = open_features(settings, index, assignments).to(device)
    out = out or evaluation_folder(checkpoint)
    judged = {
        "checkpoint": str(checkpoint.path),
        "step": checkpoint.state["step"],
        "model_sha256": checkpoint.model_sha256,
        "objective": config.objective.name,
        "data": index.name,
        "index_sha256": index.sha256,
        "split": settings.split,
        "reference": settings.reference,
        "features": extractor.record(),
        "settings": asdict(settings),
        "versions": versions(),
    }
    announce(extractor)
    _lock = lock(out, "--out")  # held until this function returns
    done = EvaluationProgress(out, judged)

    # The features of the real images, the densities of the training latents, the latents of the split.
    real = reference_images(config, index, extractor, device)
    fitted, reports = fit_densities(autoencoder, config, densities, done, device, needed={*settings.densities, second_stage})
    stage = fitted[second_stage] if second_stage else None
    assert stage is None or isinstance(stage, ReconstructingDensity)
    through = None if stage is None else stage.reconstruct
    errors, similarities, latents = reconstructed(autoencoder, config, device, through)

    # Every set of images is made, described by its features and compared with the real ones.
    read_first, warnings = headline(min(real.stats.count, len(errors)), real.stats.features, extractor)
    sets, warnings = {}, warnings + warnings_about(real.stats, f"the split {settings.reference}")
    doubts_about: dict[str, list[str]] = {}
    doubts_of_fits: dict[str, list[str]] = {}
    for name, (latents_of, count) in latent_sets(fitted, latents, through, real.stats.count, settings.seed).items():
        if name not in done.sets:
            images, what = decoded(autoencoder, latents_of, count, settings.batch, device, name), f"the set {name}"
            described = describe(images, extractor, settings.batch, settings.neighbor_images, device, what)
            done.record(name, compare(real, described, extractor, settings.frechet, device, what))
        sets[name], doubts = done.sets[name]
        doubts_about[f"the set {name}"] = doubts

    warnings += said_once(doubts_about)
    for name, report in reports.items():
        doubts_of_fits[name] = [f"{name}: {report[what]}" for what in ("failed", "warning") if what in report]
    warnings += said_once(doubts_of_fits)
    per_image, numbers = errors.mean().item(), int(np.prod(index.image_shape))
    metrics = judged | {
        "images": len(errors),
        "reference_images": real.stats.count,
        "headline": read_first,
        "reconstruction": per_image,
        "reconstruction_per_pixel": per_image / numbers,
        "psnr": psnr(errors, numbers).mean().item(),
        "ssim": similarities.mean().item(),
        "latents": gaussianity(latents[: settings.neighbor_images], seed=settings.seed),
        "sets": sets,
        "densities": reports,
        "warnings": list(dict.fromkeys(warnings)),
    }
    with on_rank_zero() as is_rank_zero:
        if is_rank_zero:
            images = next(walk(config.data.root, settings.split, 64, rank=0, world=1, cache=Cache.of(config.data)))["image"]
            inputs = grid_inputs(to_unit(images, device), autoencoder.latent_dim, settings.seed)
            save_grids(draw_grids(autoencoder, inputs) | sample_grids(autoencoder, fitted, settings, device), out)
            replace_file(out / "metrics.json", sealed(metrics))
            done.remove()
    return metrics | {"out": str(out)}


def check_splits(index: ShardIndex, config: Config) -> None:
    """Raises ValueError if the judged split or the reference split is missing or empty."""
    for key, split in {"split": config.evaluate.split, "reference": config.evaluate.reference}.items():
        if index.split(split, f"evaluate.{key}").samples == 0:
            raise UserError(f"evaluate.{key}={split} of {config.data.root} holds no images")


def density_names(settings: EvaluateConfig, second_stage: str | None) -> list[str]:
    """Returns the densities of evaluate.densities, or the objective's own.

    The second stage of an objective is always among them.
    """
    own = [second_stage] if second_stage else []
    names = settings.densities or own or ["isotropic", "mvg", "gmm"]
    for name in names:
        if name not in DENSITIES:
            raise UserError(f"evaluate.densities: {name} is unknown; it is one of {', '.join(DENSITIES)}")
    return list(dict.fromkeys([*own, *names]))


def open_features(settings: EvaluateConfig, index: ShardIndex, assignments: Sequence[str]) -> Extractor:
    """Returns the extractor that evaluate.features names, or the default for the data.

    A user's function is run only if the command line names it, not if only the checkpoint does.
    """
    name = settings.features or features_for(*index.image_shape[1:])
    if ":" in name and f"evaluate.features={name}" not in assignments:
        raise UserError(f"evaluate.features={name} is named only by the checkpoint; give it on the command line to run it")
    return build_features(name, weights=settings.weights, preprocessing=settings.preprocessing)


def said_once(warnings: dict[str, list[str]]) -> list[str]:
    """Returns the warnings about several things, each of which names its thing; those that differ in nothing else become one."""
    about: dict[str, list[str]] = {}
    for thing, texts in warnings.items():
        for text in texts:
            about.setdefault(text.replace(thing, "\0"), []).append(thing)
    return [text.replace("\0", ", ".join(dict.fromkeys(things))) for text, things in about.items()]


def reference_images(config: Config, index: ShardIndex, extractor: Extractor, device: torch.device) -> ImageSet:
    """Returns the features of the reference split."""
    settings = config.evaluate

    def compute() -> ImageSet:
        blocks = walked(config, settings.reference, f"features of {settings.reference}", settings.count)
        images = ((int(batch["number"][0]), batch["image"]) for batch in blocks)
        what = f"the split {settings.reference}"
        return describe(images, extractor, settings.batch, settings.neighbor_images, device, what)

    key = {"index_sha256": index.sha256, "split": settings.reference, "count": settings.count}
    return cached_image_set(key, settings, extractor, device, compute)


def walked(config: Config, split: str, description: str, count: int | None = None) -> Iterable[dict]:
    """Returns the batches of `walk` over the first images of a split, in blocks of evaluate.batch, with a progress bar."""
    root, block, cache = config.data.root, config.evaluate.batch, Cache.of(config.data)
    images = ShardIndex.load(root, cache).split(split).samples
    start, stop = blocks_of(min(images, count or images), block, rank(), world_size())
    return with_progress(walk(root, split, block, count=count, cache=cache), description, stop - start)


@torch.no_grad()
def reconstructed(
    autoencoder: Autoencoder,
    config: Config,
    device: torch.device,
    through: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the squared error, the SSIM and the latent of every image, float64 [n] x 2 and float32 [n, d], on every rank.

    through: the function on the CPU that a latent passes before it is decoded, [b, d] -> [b, d].

    A row's float32 result can depend on how many rows share its batch. So ranks take whole blocks of evaluate.batch, the last
    block is filled up, and the bits are the same on any number of ranks.
    """
    split, block = config.evaluate.split, config.evaluate.batch
    compared = [torch.zeros(0, 2, dtype=torch.float64, device=device)]
    latents = [torch.zeros(0, autoencoder.latent_dim, device=device)]
    for batch in walked(config, split, f"reconstructing {split}", config.evaluate.count):
        images = filled(to_unit(batch["image"], device), block)
        z = autoencoder.encode(images)
        decoded_from = z if through is None else through(z.cpu()).to(z, non_blocking=True)
        reconstruction = autoencoder.decode(decoded_from)
        both = torch.stack([squared_error(reconstruction, images), ssim(reconstruction, images)], 1)
        compared.append(both[: len(batch["image"])].double())
        latents.append(z[: len(batch["image"])])
    errors, similarities = gather_rows(torch.cat(compared)).cpu().unbind(1)
    return errors, similarities, gather_rows(torch.cat(latents)).cpu()


def training_latents(autoencoder: Autoencoder, config: Config, device: torch.device) -> torch.Tensor:
    """Returns the latents of this rank's run of the training split, [b, d]."""
    latents = [torch.zeros(0, autoencoder.latent_dim, device=device)]
    for batch in walked(config, config.data.split, f"encoding {config.data.split}"):
        latents.append(encoded(autoencoder, batch["image"], config.evaluate.batch, device))
    return torch.cat(latents)


def fit_densities(
    autoencoder: Autoencoder,
    config: Config,
    names: Sequence[str],
    done: EvaluationProgress,
    device: torch.device,
    needed: Collection[str | None],
) -> tuple[dict[str, Density], dict[str, dict]]:
    """Returns the densities, fitted to the training latents or read from disk, and a report on each fit.

    If a density cannot be fitted, ValueError is raised if it is needed; otherwise it is left out and reported.
    """
    settings, model = config.evaluate, done.key["model_sha256"]
    options: dict[str, dict[str, Any]] = {
        "gmm": {"components": settings.components, "seed": settings.seed},
        "two_stage": {
            "kl_weight": settings.second_stage_weight,
            "epochs": settings.second_stage_epochs,
            "seed": settings.seed,
        },
        "flow": {"seed": settings.seed},
    }
    folder, latents, fitted = done.path.parent / "densities", None, {}
    for name in names:
        density, path = DENSITIES[name](**options.get(name, {})), folder / f"{name}.safetensors"
        if name not in done.densities:
            latents = training_latents(autoencoder, config, device) if latents is None else latents
            try:
                density.fit(latents)
                report = density.report()
            except UserError as error:  # known to every rank
                if name in needed:
                    raise UserError(f"evaluate.densities: {name} cannot be fitted: {error}") from error
                report = {"failed": str(error)}
            with on_rank_zero() as is_rank_zero:
                if is_rank_zero:
                    done.remove_numbers_of_others()
                if is_rank_zero and "failed" in report:
                    path.unlink(missing_ok=True)
                elif is_rank_zero:
                    save_density(density, path, model)
            done.record_density(name, report)
        if "failed" not in done.densities[name]:
            fitted[name] = load_density(name, path, model)
    return fitted, done.densities


def latent_sets(
    fitted: dict[str, Density], latents: torch.Tensor, through: Callable | None, draws: int, seed: int
) -> dict[str, tuple[LatentsOf, int]]:
    """Returns for each set of images a function from the numbers of images to their latents, and how many images there are."""

    def reconstruction(numbers: np.ndarray) -> torch.Tensor:
        return latents[numbers] if through is None else through(latents[numbers])

    sets: dict[str, tuple[LatentsOf, int]] = {"reconstruction": (reconstruction, len(latents))}
    for name, density in fitted.items():

        def drawn(numbers: np.ndarray, density: Density = density) -> torch.Tensor:
            return density.sample(sample_seeds(seed, numbers))

        sets[name] = (drawn, draws)
    return sets | {name: (latents_of, len(latents)) for name, latents_of in interpolations(latents, seed).items()}


@torch.no_grad()
def sample_grids(autoencoder: Autoencoder, fitted: dict[str, Density], settings: EvaluateConfig, device: torch.device) -> dict:
    """Returns a picture of the first samples of each density."""
    seeds = sample_seeds(settings.seed, np.arange(SAMPLES))
    latents = {name: density.sample(seeds).to(device, torch.get_default_dtype()) for name, density in fitted.items()}
    return {f"samples-{name}": grid(autoencoder.decode(z), ACROSS) for name, z in latents.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m eae_dist.evaluate", description=__doc__.split(":\n")[0])
    judged = parser.add_mutually_exclusive_group(required=True)
    judged.add_argument("--ckpt", type=Path, help="a checkpoint folder, or a run folder (its latest checkpoint)")
    judged.add_argument(
        "--images", type=Path, nargs=2, metavar=("REAL", "GENERATED"), help="two folders or zip files of images, no model"
    )
    saved = "write the statistics of a folder's images, as pytorch-fid does"
    judged.add_argument("--save-stats", type=Path, nargs=2, metavar=("IMAGES", "FILE.npz"), help=saved)
    parser.add_argument("--nproc", type=int, help="local ranks; default: one per GPU, or one on a CPU")
    parser.add_argument("--out", type=Path, help="where to write; default: RUN/evaluation, for --images nowhere")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="evaluate.* and data.root")
    arguments = parser.parse_intermixed_args(argv)
    settings, out = arguments.settings, arguments.out

    def work() -> str:
        if arguments.save_stats:
            images, file = arguments.save_stats
            return save_folder_statistics(images, file, settings)
        if arguments.images:
            real, generated = arguments.images
            return summary_of_folders(evaluate_folders(real, generated, settings, out))
        return summary(evaluate(arguments.ckpt, settings, out))

    if arguments.save_stats and out:
        parser.error("--save-stats names its file itself; --out is for --ckpt and --images")
    chosen = {"--ckpt": [arguments.ckpt], "--images": arguments.images, "--save-stats": arguments.save_stats}
    command = next([name, *map(str, paths)] for name, paths in chosen.items() if paths and paths[0])
    command += [*(["--out", str(out)] if out else []), *settings]
    said = run_on_ranks("eae_dist.evaluate", arguments.nproc, command, partial(how_to_judge, settings), work)
    if said is not None:
        print(said)


if __name__ == "__main__":
    main()
