"""Judging images that lie in files, without a model: folders, zip files, and files of statistics.

evaluate_folders          compares one set of images with another
save_folder_statistics    writes the statistics of a set for later comparisons
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from eae_dist.config import HOW_TO_START, EvaluateConfig, load_config
from eae_dist.data.image_folders import ImageWalk, contents_sha256, walk_images
from eae_dist.distributed import from_rank_zero, on_rank_zero, sum_over_ranks
from eae_dist.errors import UserError
from eae_dist.inference.trained_model import with_progress
from eae_dist.metrics.extractor import Extractor
from eae_dist.metrics.features import build_features, features_for
from eae_dist.metrics.frechet import FeatureStats, Moments, frechet_distance, warnings_about
from eae_dist.metrics.image_sets import ImageSet, announce, cached_image_set, compare, describe, headline
from eae_dist.metrics.statistics_file import SavedStatistics, save_statistics
from eae_dist.numerics.atomic_files import replace_file
from eae_dist.numerics.json_files import sealed
from eae_dist.training.checkpoint import versions
from eae_dist.training.run_folder import lock


def evaluate_folders(real: Path, generated: Path, assignments: Sequence[str], out: Path | None = None) -> dict:
    """Returns the distances of one set of images from another's, and writes them to out/metrics.json if there is an out.

    Each is a folder, a zip file, or an .npz file of statistics, of which only the Fréchet distance can be told. Only evaluate.*
    applies. The features of a folder are read from evaluate.cache if they were computed before. Call it on every rank.
    Raises ValueError or OSError for other settings, folders without images, broken files and features that are not available.
    """
    settings, device, paths = settings_for_images(assignments), PartialState().device, (real, generated)
    # Both are opened before the first goes through the network, so that an error in the second is reported at once.
    sides = [opened(path, settings) for path in paths]
    walks = [side for side in sides if isinstance(side, ImageWalk)]
    saved = [side for side in sides if isinstance(side, SavedStatistics)]
    if walks:
        extractor = extractor_of(settings, walks[0], saved).to(device)
        features = extractor.record()
        announce(extractor)
    else:
        features = features_of_both(*saved)
    _lock = None if out is None else lock(out, "--out")  # held until this function returns
    described = [
        folder_images(path, side, settings, extractor, device) if isinstance(side, ImageWalk) else side
        for path, side in zip(paths, sides, strict=True)
    ]
    warnings = warnings_about_reading(paths, described, sides, settings)
    reals, fakes = described
    if isinstance(reals, ImageSet) and isinstance(fakes, ImageSet):
        numbers, doubts = compare(reals, fakes, extractor, settings.frechet, device, f"the images of {generated}")
        fewest = min(reals.stats.count, fakes.stats.count)
        read_first, more = headline(fewest, reals.stats.features, extractor)
        warnings += more + warnings_about(reals.stats, f"the images of {real}") + doubts
    else:
        read_first = features["metric"]
        distance = frechet_distance(moments_of(reals), moments_of(fakes), settings.frechet)
        numbers = {read_first: distance, "images": count_of(fakes)}
        warnings += warnings_about_statistics(saved, [count_of(one) for one in described], read_first)
    metrics = {
        "real": str(real),
        "generated": str(generated),
        "reference_images": count_of(reals),
        "sizes": [f"{side.size[1]}x{side.size[0]}" if isinstance(side, ImageWalk) else None for side in sides],
        "headline": read_first,
        "features": features,
        "settings": asdict(settings),
        "versions": versions(),
        "sets": {"generated": numbers},
        "warnings": list(dict.fromkeys(warnings)),
    }
    with on_rank_zero() as is_rank_zero:
        if is_rank_zero and out is not None:
            replace_file(out / "metrics.json", sealed(metrics))
    return metrics


def save_folder_statistics(images: Path, out: Path, assignments: Sequence[str]) -> str:
    """Writes the statistics of a folder's or zip file's images to an .npz file; returns lines about it. Call it on every rank."""
    settings, device = settings_for_images(assignments), PartialState().device
    if out.suffix != ".npz":
        raise UserError(f"--save-stats {images} {out}: the name of the file of statistics must end in .npz")
    walk = opened(images, settings)
    if isinstance(walk, SavedStatistics):
        raise UserError(f"--save-stats {images} is a file of statistics already; give a folder or a zip file of images")
    extractor = extractor_of(settings, walk, []).to(device)
    announce(extractor)
    described = folder_images(images, walk, settings, extractor, device)
    with on_rank_zero() as is_rank_zero:
        if is_rank_zero:
            save_statistics(out, described.stats, extractor)
    said = [f"statistics of {described.stats.count:,} images of {images}, {extractor.preprocessing}, in {out}"]
    return "\n".join(said + [f"warning: {text}" for text in warnings_about_reading((images,), [described], [walk], settings)])


def settings_for_images(assignments: Sequence[str]) -> EvaluateConfig:
    """Returns the settings for files of images. Raises ValueError for settings of other sections than evaluate."""
    own = ("evaluate.", *(f"train.{key}=" for key in HOW_TO_START))
    if other := [text for text in assignments if not text.startswith(own)]:
        raise UserError(f"{other[0]}: only evaluate.* settings apply to files of images")
    return load_config(assignments).evaluate


def opened(path: Path, settings: EvaluateConfig) -> ImageWalk | SavedStatistics:
    """Opens a folder or zip file of images, or a file of statistics."""
    if path.suffix == ".npz" and not path.is_dir():
        return SavedStatistics.read(path)
    return walk_images(path, settings.batch, count=settings.count, rule=settings.read, resize=settings.resize)


def extractor_of(settings: EvaluateConfig, images: ImageWalk, saved: Sequence[SavedStatistics]) -> Extractor:
    """Returns the extractor of the settings, or the default for the images. Raises ValueError if saved statistics have others."""
    for one in saved:
        if settings.features is None and one.features is None:
            raise UserError(f"{one.path} does not say which features it is of; set evaluate.features (pytorch-fid's: inception)")
    name = settings.features or features_for(*images.size)
    extractor = build_features(name, weights=settings.weights, preprocessing=settings.preprocessing)
    for one in saved:
        one.check_features(extractor)
    return extractor


def folder_images(
    folder: Path, images: ImageWalk, settings: EvaluateConfig, extractor: Extractor, device: torch.device
) -> ImageSet:
    """Returns the features of a folder's or zip file's images, computed or from evaluate.cache. Call it on every rank."""

    def compute() -> ImageSet:
        blocks, what = with_progress(images.images, str(folder), images.blocks), f"the images of {folder}"
        described = describe(blocks, extractor, settings.batch, settings.neighbor_images, device, what)
        of_the_rule = int(sum_over_ranks(torch.tensor(len(images.of_the_rule), device=device)))
        return replace(described, of_the_rule=of_the_rule)

    with on_rank_zero() as is_rank_zero:
        sha256 = contents_sha256(folder, settings.count) if is_rank_zero else None
    key = {"files_sha256": from_rank_zero(sha256), "read": settings.read, "resize": settings.resize}
    return cached_image_set(key, settings, extractor, device, compute)


def features_of_both(real: SavedStatistics, generated: SavedStatistics) -> dict[str, Any]:
    """Returns the record of the features of two files of statistics. Raises ValueError if they differ."""
    sizes = [len(one.moments[0]) for one in (real, generated)]
    if sizes[0] != sizes[1] or (real.features and generated.features and real.features != generated.features):
        raise UserError(
            f"{real.path} and {generated.path} are of different features ({sizes[0]} and {sizes[1]}), made by other "
            f"networks or preprocessing; give two files made alike"
        )
    unknown = {"metric": "frechet_distance", "kernel_metric": "kernel_distance", "dimensions": sizes[0], "sha256": None}
    return real.features or generated.features or unknown | {"preprocessing": "features that neither file names"}


def moments_of(one: ImageSet | SavedStatistics) -> FeatureStats | Moments:
    """Returns what the Fréchet distance needs."""
    return one.stats if isinstance(one, ImageSet) else one.moments


def count_of(one: ImageSet | SavedStatistics) -> int | None:
    """Returns the number of images, or None for statistics that do not say it."""
    return one.stats.count if isinstance(one, ImageSet) else one.count


def warnings_about_reading(
    paths: Sequence[Path],
    described: Sequence[ImageSet | SavedStatistics],
    sides: Sequence[ImageWalk | SavedStatistics],
    settings: EvaluateConfig,
) -> list[str]:
    """Returns warnings about images whose pixels depend on how they are read, and about sets of different sizes."""
    warnings, rules = [], {"pack": "applied the orientation and composed transparency on white", "pytorch-fid": "ignored both"}
    for path, one in zip(paths, described, strict=True):
        if isinstance(one, ImageSet) and one.of_the_rule:
            warnings.append(
                f"{one.of_the_rule:,} of {one.stats.count:,} images of {path} have an EXIF orientation or transparency; "
                f"evaluate.read={settings.read} {rules[settings.read]}"
            )
    sizes = {path: side.size for path, side in zip(paths, sides, strict=True) if isinstance(side, ImageWalk)}
    if len(set(sizes.values())) > 1:
        said = ", ".join(f"those of {path} {width}x{height}" for path, (height, width) in sizes.items())
        warnings.append(
            f"the images differ in size ({said}; width x height), which a distance shows too; evaluate.resize=N makes them alike"
        )
    return warnings


def warnings_about_statistics(saved: Sequence[SavedStatistics], counts: Sequence[int | None], metric: str) -> list[str]:
    """Returns warnings about a Fréchet distance from files of statistics. counts: of the images, None where a file is silent."""
    warnings = [f"only the Fréchet distance can be told from statistics ({', '.join(str(one.path) for one in saved)})"]
    known, features = [count for count in counts if count is not None], len(saved[0].moments[0])
    if known and min(known) <= features:
        fewest = f"{min(known)} images for {features} features"
        warnings.append(f"{metric} is too large, and compares only at equal numbers of images: {fewest}")
    return warnings
