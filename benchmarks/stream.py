"""The stream against the plain webdataset pipeline and a folder of files: 32x32 color images per second, wall time.

One process on one processor, batches of 128, every file in the page cache. All read the same images, each in its own random
order: webdataset shuffles 1,000 samples at a time, the others all images.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import webdataset as wds
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import PILToTensor

from benchmarks.images import write_shards
from benchmarks.table import Row, Seconds, at_least, take_turns
from eae_dist.data.shard_index import ShardIndex, ShardReader
from eae_dist.data.stream import ShardStream

SHAPE, SHARDS, SAMPLES, BATCH = (3, 32, 32), 8, 512, 128
IMAGES = SHARDS * SAMPLES
ROUNDS = 9
FASTER_PNG, FASTER_RAW, FASTER_FOLDER = 5, 20, 2.5


def rows() -> Iterator[Row]:
    """Yields the rows of the table."""
    with tempfile.TemporaryDirectory() as folder, one_processor():
        png = write_shards(Path(folder) / "png", SHAPE, "png", SHARDS, SAMPLES)
        raw = write_shards(Path(folder) / "raw", SHAPE, "raw", SHARDS, SAMPLES)
        files = write_files(Path(folder) / "files", png)
        # Passes per turn, so that turns take about equally long; webdataset's buffer begins and ends with a pass, so it has one.
        sources = {
            "png": (stream(png), 2),
            "raw": (stream(raw), 10),
            "webdataset png": (webdataset(png, "png", "torchrgb8"), 1),
            "webdataset raw": (webdataset(raw, "npy"), 1),
            "folder": (image_folder(files), 1),
            "read png": (bare_reads(png), 20),
            "read raw": (bare_reads(raw), 20),
        }
        turns = {name: passes(batches, count) for name, (batches, count) in sources.items()}
        take_turns(turns, 1)  # warms up
        seconds = take_turns(turns, ROUNDS)
        seconds = {name: Seconds(s.cpu / sources[name][1], s.wall / sources[name][1]) for name, s in seconds.items()}
    yield compared("stream of PNG: webdataset", seconds["png"], seconds["webdataset png"], FASTER_PNG)
    yield compared("stream of PNG: ImageFolder + DataLoader", seconds["png"], seconds["folder"], FASTER_FOLDER)
    yield compared("stream of raw images: webdataset", seconds["raw"], seconds["webdataset raw"], FASTER_RAW)
    yield compared("stream of PNG: reads by offset alone", seconds["png"], seconds["read png"])
    yield compared("stream of raw images: reads by offset alone", seconds["raw"], seconds["read raw"])


def compared(what: str, ours: Seconds, theirs: Seconds, faster: float | None = None) -> Row:
    """Returns the row of one comparison."""
    ratio = theirs.wall / ours.wall
    columns = {"ratio": f"{ratio:.2f}x"} if faster is None else at_least(faster, ratio)
    speeds = (f"{IMAGES / seconds.wall:,.0f} images/s" for seconds in (ours, theirs))
    return Row(what, *speeds, **columns, beside=f"CPU {theirs.cpu / ours.cpu:.2f}x")


def stream(root: Path) -> Iterator[int]:
    """Yields the number of images of each batch, without end; so do the other sources below."""
    return (len(batch["image"]) for batch in ShardStream(root, "train", BATCH))


def webdataset(root: Path, extension: str, *decoder: str) -> Iterator[int]:
    """Yields from the plain webdataset pipeline."""
    urls = [str(path) for path in sorted(root.glob("*.tar"))]
    data = wds.WebDataset(urls, shardshuffle=SHARDS).shuffle(1000).decode(*decoder).to_tuple(extension, "cls").batched(BATCH)
    while True:
        yield from (len(images) for images, _ in data)


def image_folder(root: Path) -> Iterator[int]:
    """Yields from a folder of files."""
    loader = DataLoader(ImageFolder(root, PILToTensor()), batch_size=BATCH, shuffle=True, num_workers=0)
    while True:
        yield from (len(images) for images, _ in loader)


def bare_reads(root: Path) -> Iterator[int]:
    """Reads each image with one pread, in random order, without checking or decoding."""
    reader = ShardReader(ShardIndex.load(root), "train")
    places = []
    for shard in range(SHARDS):
        members, number = reader._members(shard), reader._file(shard).fileno()
        places += [(number, size, offset) for size, offset in members[["bytes", "offset"]].tolist()]
    while True:
        for batch in np.random.default_rng(0).permutation(IMAGES).reshape(-1, BATCH).tolist():
            for place in batch:
                os.pread(*places[place])
            yield BATCH


def passes(batches: Iterator[int], count: int):
    """Returns a turn: it takes batches until `count` passes over the images are complete."""

    def turn():
        left = count * IMAGES
        while left > 0:
            left -= next(batches)

    return turn


def write_files(root: Path, shards: Path) -> Path:
    """Writes the images of the shards as files, with a folder per class."""
    reader = ShardReader(ShardIndex.load(shards), "train")
    for shard in range(SHARDS):
        for key, size, offset, label in reader._members(shard)[["key", "bytes", "offset", "label"]].tolist():
            path = root / str(label) / f"{key.decode()}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(os.pread(reader._file(shard).fileno(), size, offset))
    return root


@contextmanager
def one_processor() -> Iterator[None]:
    """Binds this thread and those that it starts to one processor, if the system supports this (Linux)."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)
