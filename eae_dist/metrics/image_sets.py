"""Sets of images, each described once by its features, and the distances between sets.

The images that share a batch do not depend on the number of ranks: a set is cut into blocks of one size, ranks take whole blocks,
and the last block is filled up. This matters because a row's float32 features can depend on the other rows of the batch.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from eae_dist.config import EvaluateConfig
from eae_dist.data.order import filled
from eae_dist.distributed import gather_objects, gather_rows, on_rank_zero, rank, sum_over_ranks
from eae_dist.errors import UserError
from eae_dist.metrics.extractor import Extractor
from eae_dist.metrics.frechet import FeatureStats, frechet_distance, warnings_about
from eae_dist.metrics.kid import kernel_distance
from eae_dist.metrics.prdc import precision_recall_density_coverage
from eae_dist.numerics.atomic_files import replace_file
from eae_dist.numerics.tensor_files import read_tensors, tensors_to_bytes

log = logging.getLogger("eae_dist")

SUBSET = 1000  # rows per subset of the kernel distance; half of the rows of smaller sets


@dataclass(frozen=True)
class ImageSet:
    """The moments of the features of all images of a set, and the features of its first images, float32 [m, f] in order.

    of_the_rule: how many of the images have pixels that depend on the rule by which they were read (evaluate.read).
    """

    stats: FeatureStats
    rows: torch.Tensor
    of_the_rule: int = 0

    def to_bytes(self, key: str) -> bytes:
        """Returns a safetensors file with the set and the key that says what it was made from."""
        state = {**self.stats.state_dict(), "rows": self.rows, "of_the_rule": torch.tensor(self.of_the_rule)}
        return tensors_to_bytes(state, {"key": key})

    @classmethod
    def from_file(cls, path: Path, key: str) -> "ImageSet":
        """Reads a set. Raises ValueError if the file is damaged or was made from something else."""
        try:
            state, about = read_tensors(path)
        except ValueError as error:
            raise UserError(f"{path} is not usable: {error}; remove it") from error
        if about.get("key") != key:
            raise UserError(f"{path} was made from {about.get('key')}, expected {key}; remove it")
        stats = FeatureStats()
        stats.load_state_dict(state)
        return cls(stats, state["rows"], int(state.get("of_the_rule", 0)))


def describe(
    blocks: Iterable[tuple[int, torch.Tensor]], extractor: Extractor, block: int, keep: int, device: torch.device, what: str
) -> ImageSet:
    """Returns the image set of the blocks of all ranks, each (number of its first image, uint8 [m, c, h, w]).

    m = block, except in the last. keep: the features of images 0 to keep - 1 are kept. Call it on every rank; the result is the
    same on all ranks. Raises ValueError on every rank for features that are not finite, and for fewer than 2 images; `what`
    names the set.
    """
    stats, kept, broken = FeatureStats(), [], 0
    for start, images in blocks:
        # The one wait for a GPU of a block; the moments are summed on the CPU.
        features = extractor(filled(images, block).to(device, non_blocking=True))[: len(images)].cpu()
        finite = features.isfinite().all(1)
        broken += int((~finite).sum())
        stats.add(features[finite])
        if start < keep:
            kept.append(features[: keep - start].clone())  # a view would keep the whole block in memory
    broken = int(sum_over_ranks(torch.tensor(broken, device=device)))
    if broken:
        raise UserError(f"{extractor.metric}: the features of {broken} images of {what} are not finite numbers")
    total = stats.sum_over_ranks(device)
    if total.count < 2:
        raise UserError(f"{what} has {total.count} images; a distance between sets needs at least 2")
    mine = torch.cat(kept) if kept else torch.zeros(0, total.features)
    return ImageSet(total, gather_rows(mine.to(device)).cpu())


def compare(
    real: ImageSet, generated: ImageSet, extractor: Extractor, root: str, device: torch.device, what: str
) -> tuple[dict, list[str]]:
    """Returns the distances of a set from the real one by name, and warnings about them. Call it on every rank.

    Both sets have features of this extractor. Precision and recall use k = 3, density and coverage k = 5.
    """
    rows, others = real.rows.to(device), generated.rows.to(device)
    small = min(len(rows), len(others))
    kernel = kernel_distance(rows, others, subset_size=SUBSET if small >= 2 * SUBSET else max(small // 2, 2))
    numbers = {
        extractor.metric: frechet_distance(real.stats, generated.stats, root),
        "images": generated.stats.count,
        extractor.kernel_metric: kernel.mean,
        f"{extractor.kernel_metric}_std": kernel.std,
        f"{extractor.kernel_metric}_subset_size": kernel.subset_size,
    }
    if small > 5:  # density and coverage use 5 neighbors
        scores = precision_recall_density_coverage(rows, others)
        numbers |= scores._asdict() | {"neighbor_images": small}
    return numbers, warnings_about(generated.stats, what)


def headline(fewest: int, features: int, extractor: Extractor) -> tuple[str, list[str]]:
    """Returns the name of the distance to read first, and warnings about the other one; fewest: images of the smallest set.

    The Fréchet distance needs covariances of full rank, and so more images than features. The kernel distance is unbiased for any
    number of images.
    """
    if fewest > features:
        return extractor.metric, []
    return extractor.kernel_metric, [
        f"{extractor.metric} is too large, and compares only at equal numbers of images: {fewest} images for {features} features "
        f"give a covariance of rank {fewest - 1} at most; read {extractor.kernel_metric}, or judge more than {features} images"
    ]


def cached_image_set(
    key: dict, settings: EvaluateConfig, extractor: Extractor, device: torch.device, compute: Callable[[], ImageSet]
) -> ImageSet:
    """Returns the result of `compute`, or reads it from evaluate.cache if it was computed before. Call it on every rank.

    key: identifies the images.
    """
    cache_key = key | {
        "rows": settings.neighbor_images,
        "block": settings.batch,
        "features": extractor.record(),
        "dtype": "float32",
        "device": device.type,
        "torch": torch.__version__,
    }
    key_text = json.dumps(cache_key, sort_keys=True)
    path = Path(settings.cache).expanduser() / f"{hashlib.sha256(key_text.encode()).hexdigest()[:32]}.safetensors"
    # A user's function has no known weights, so it is not cached. The file may be missing on some of the machines.
    if extractor.sha256 is not None and all(gather_objects(path.is_file())):
        return ImageSet.from_file(path, key_text)
    described = compute()
    with on_rank_zero() as is_rank_zero:
        if is_rank_zero and extractor.sha256 is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                replace_file(path, described.to_bytes(key_text))
            except OSError as error:
                log.warning("evaluate.cache=%s cannot be written (%s); continuing without it", settings.cache, error)
    return described


def announce(extractor: Extractor) -> None:
    """Logs how images are compared."""
    if rank() == 0:
        log.info("comparing images by %s: %s", extractor.metric, extractor.preprocessing)
