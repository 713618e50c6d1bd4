"""The index that a command keeps on the disk and uses again."""

import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from eae_dist.config import IndexConfig
from eae_dist.distributed import from_rank_zero, rank
from eae_dist.latent.index import DamagedIndex, LatentIndex, index_description

log = logging.getLogger("eae_dist")

TUNING = 1_000  # queries of all ranks for tuning an index


def kept_index(
    path: Path,
    about: dict,
    settings: IndexConfig,
    rows: Callable[[], np.ndarray],
    tune: Callable[[LatentIndex], float],
) -> LatentIndex:
    """Returns the index in `path` if it was made with these settings for rows about which the same is said, otherwise a new one.

    rows: returns those of this rank. tune: sets the effort of an index that is not exact, and returns the share that it finds.
    Call it on every rank. Raises DamagedIndex if the index cannot be read, and what LatentIndex.build and save raise.
    """
    about = about | {name: asdict(settings)[name] for name in ("kind", "metric", "recall", "memory", "seed")}
    try:
        if from_rank_zero((path / "index.json").is_file() and index_description(path)["about"] == about):
            return LatentIndex.load(path)
    except DamagedIndex as error:
        raise DamagedIndex(f"{error}; remove {path} to make it again") from error
    made = LatentIndex.build(
        rows(),
        settings.kind,
        metric=settings.metric,
        recall=settings.recall,
        memory=settings.memory,
        seed=settings.seed,
        about=about,
    )
    if rank() == 0:
        log.info("index: %s; %s", made.kind, made.reason)
    if made.kind != "flat":
        share = tune(made)
        if rank() == 0:
            log.info("the index finds %.1f %% of the ten nearest rows", 100 * share)
    made.save(path)
    return made
