"""Judging images, compared with pytorch-fid: the Fréchet distance of two sets of statistics, and images per second by Inception.

The network has random weights in the layout of pytorch-fid's file; the values have no effect on the speed.
"""

import contextlib
import io
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from PIL import Image
from threadpoolctl import threadpool_limits

from benchmarks.images import picture
from benchmarks.table import Row, at_least, take_turns
from eae_dist.data.image_folders import walk_images
from eae_dist.metrics.frechet import GRID_BITS, FeatureStats, frechet_distance
from eae_dist.metrics.image_sets import describe
from eae_dist.metrics.inception import inception, inception_layout

FEATURES, MANY, FEW = 2048, 5000, 500  # samples of statistics with and without full rank
IMAGES, BATCH = 32, 16
ROUNDS = 3


def rows() -> Iterator[Row]:
    """Yields the rows of the table."""
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pytorch-fid's warnings about scipy
        yield from distance()
        yield throughput()


def samples(count: int, seed: int) -> torch.Tensor:
    """Returns features [count, FEATURES] on the grid of the statistics.

    Their spectrum falls as that of Inception features does.
    """
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, FEATURES + 1) ** -0.5
    features = (torch.randn(count, FEATURES, generator=generator) * scale + seed * scale / 10).abs()
    return (features * 2**GRID_BITS).round() / 2**GRID_BITS


def distance() -> Iterator[Row]:
    """Yields the rows on the Fréchet distance."""
    from pytorch_fid.fid_score import calculate_frechet_distance

    for count in (MANY, FEW):
        sets = [samples(count, seed) for seed in (0, 1)]
        stats = [FeatureStats(), FeatureStats()]
        for one, x in zip(stats, sets, strict=True):
            one.add(x)
        moments = [(one.mean.numpy(), one.covariance.numpy()) for one in stats]
        found = {}

        def ours(stats=stats, found=found) -> None:
            found["ours"] = frechet_distance(*stats)

        def theirs(moments=moments, found=found) -> None:
            with contextlib.redirect_stdout(io.StringIO()):
                found["theirs"] = calculate_frechet_distance(*moments[0], *moments[1])

        seconds = take_turns({"ours": ours, "theirs": theirs}, ROUNDS)
        exact, trace = distance_of_rows(*sets, stats)
        errors = {who: abs(value - exact) / trace for who, value in found.items()}
        yield Row(
            f"Fréchet distance, f = {FEATURES:,}, n = {count:,}: pytorch-fid",
            f"{seconds['ours'].cpu:.1f} s",
            f"{seconds['theirs'].cpu:.1f} s",
            **at_least(3, seconds["theirs"].cpu / seconds["ours"].cpu),
            beside=f"wall {seconds['theirs'].wall / seconds['ours'].wall:.1f}x",
        )
        yield Row(
            f"Fréchet distance, f = {FEATURES:,}, n = {count:,}: error over trace, pytorch-fid's",
            f"{errors['ours']:.0e}",
            f"{errors['theirs']:.0e}",
            "",
            "ours at most 1e-9",
            errors["ours"] <= 1e-9,
        )


def distance_of_rows(x: torch.Tensor, y: torch.Tensor, stats: list[FeatureStats]) -> tuple[float, float]:
    """Returns the distance from the centered rows themselves, and the trace of both covariances.

    tr (a b)^(1/2) with a = X^T X / (n - 1) is the sum of the singular values of X Y^T / (n - 1), so no root is taken.
    """
    centered = [rows.double() - one.mean for rows, one in zip((x, y), stats, strict=True)]
    root = torch.linalg.svdvals(centered[0] @ centered[1].T).sum() / (len(x) - 1)
    trace = sum(rows.square().sum() for rows in centered) / (len(x) - 1)
    return ((stats[0].mean - stats[1].mean).square().sum() + trace - 2 * root).item(), trace.item()


def throughput() -> Row:
    """Returns the row on images per second."""
    from pytorch_fid import inception as theirs
    from pytorch_fid.fid_score import calculate_activation_statistics

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder, weights = Path(name) / "images", Path(name) / "weights.pth"
        folder.mkdir()
        torch.save(inception_layout().state_dict(), weights)
        for number in range(IMAGES):
            Image.fromarray(picture(number, (3, 32, 32))).save(folder / f"{number:03d}.png")
        with mock.patch.object(theirs, "load_state_dict_from_url", lambda *_, **__: torch.load(weights, weights_only=True)):
            network = theirs.InceptionV3([theirs.InceptionV3.BLOCK_INDEX_BY_DIM[FEATURES]])
        extractor, paths, cpu = inception(weights), sorted(folder.iterdir()), torch.device("cpu")

        def their_loop() -> None:
            with contextlib.redirect_stderr(io.StringIO()):
                calculate_activation_statistics(paths, network, BATCH, FEATURES, "cpu", num_workers=0)

        def our_loop() -> None:
            describe(walk_images(folder, BATCH)[2], extractor, BATCH, IMAGES, cpu, "the images")

        seconds = take_turns({"ours": our_loop, "theirs": their_loop}, ROUNDS)
    return Row(
        f"moments of {IMAGES} images by Inception, batch {BATCH}: pytorch-fid",
        *(f"{IMAGES / seconds[who].cpu:.1f} images/s" for who in ("ours", "theirs")),
        **at_least(1, seconds["theirs"].cpu / seconds["ours"].cpu),
        beside=f"wall {seconds['theirs'].wall / seconds['ours'].wall:.2f}x",
    )
