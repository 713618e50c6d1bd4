"""Training and the stream against the least that they can take, CPU time with one thread.

training: a bare torch loop with the same networks (channels_last, torch's batch norm) over images in memory, squared error and
Adam. The ratio is that of the training threads. In all threads, ours also reads and decodes the images of the next batches.
stream: the decoder alone, pyspng's, on files in memory; ours reads, checks and decodes them into batches.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyspng
import torch

from benchmarks.images import picture, write_shards
from benchmarks.peer import with_torch_norms
from benchmarks.steps import training
from benchmarks.stream import IMAGES, SAMPLES, SHARDS, passes, stream
from benchmarks.table import Row, of_limit, take_turns
from eae_dist.config import Config, load_config
from eae_dist.data.shard_index import ShardIndex, ShardReader
from eae_dist.objectives import build_objective, resolve

SHAPE, BATCH, BATCHES = (1, 32, 32), 128, 12
STEPS, STEP_ROUNDS, STREAM_ROUNDS = 3, 31, 15
SHARE_OF_TRAINING, SHARE_OF_DECODER = 0.95, 0.9


def rows() -> Iterator[Row]:
    """Yields the rows of the table."""
    with tempfile.TemporaryDirectory() as folder:
        for encoding in ("png", "raw"):
            yield training_row(Path(folder) / encoding, encoding)
        yield training_row(Path(folder) / "fused", "png", "train.fused=true")
        for kind, shape in {"gray": (1, 32, 32), "color": (3, 32, 32)}.items():
            yield stream_row(Path(folder) / kind, kind, shape)


def training_row(folder: Path, encoding: str, *settings: str) -> Row:
    """Returns the row of training on shards of this encoding."""
    root = write_shards(folder / "shards", SHAPE, encoding, shards=4, samples=BATCHES * BATCH // 4)
    own = [f"data.root={root}", f"train.output={folder}/run", f"train.global_batch={BATCH}", "data.validation=null"]
    config = resolve(load_config(["objective.name=ae", "train.device=cpu", "train.trackers=[]", *own, *settings]), SHAPE)
    with training(config) as take_steps:
        turns = {"ours": lambda: take_steps(STEPS), "bare": bare_loop(config)}
        take_turns(turns, 1)  # warms up
        seconds = take_turns(turns, STEP_ROUNDS)
    ours, bare = seconds["ours"], seconds["bare"]
    return Row(
        f"training step, small, batch {BATCH}, {' '.join([encoding, *settings])}: bare loop over images in memory",
        f"{ours.thread / STEPS * 1e3:.1f} ms",
        f"{bare.thread / STEPS * 1e3:.1f} ms",
        **of_limit(SHARE_OF_TRAINING, bare.thread / ours.thread),
        beside=f"CPU of all threads {bare.cpu / ours.cpu:.2f}x",
    )


def bare_loop(config: Config) -> Callable[[], None]:
    """Returns a turn of the bare loop."""
    images = torch.from_numpy(np.stack([picture(number, SHAPE) for number in range(BATCHES * BATCH)])).permute(0, 3, 1, 2)
    batches = (images.contiguous() / 255).split(BATCH)
    autoencoder = build_objective(config.model, config.objective, SHAPE, config.train.seed).autoencoder
    with_torch_norms(autoencoder)
    optimizer = torch.optim.Adam(autoencoder.parameters(), lr=config.train.learning_rate)

    def turn() -> None:
        for step in range(STEPS):
            batch = batches[step % BATCHES]
            optimizer.zero_grad()
            (autoencoder.decode(autoencoder.encode(batch)) - batch).square().mean().backward()
            optimizer.step()

    return turn


def stream_row(folder: Path, kind: str, shape: tuple[int, int, int]) -> Row:
    """Returns the row of the stream of PNG files of a shape."""
    root = write_shards(folder, shape, "png", SHARDS, SAMPLES)
    files, mode = files_in(root), {1: "L", 3: "RGB"}[shape[0]]

    def decode() -> None:
        for file in files:
            pyspng.load(file, mode)

    turns = {"ours": passes(stream(root), 1), "decoder": decode}
    take_turns(turns, 1)  # warms up
    seconds = take_turns(turns, STREAM_ROUNDS)
    ours, decoder = seconds["ours"], seconds["decoder"]
    return Row(
        f"stream of PNG, {kind}: decoder alone",
        *(f"{IMAGES / one.cpu:,.0f} images/s" for one in (ours, decoder)),
        **of_limit(SHARE_OF_DECODER, decoder.cpu / ours.cpu),
    )


def files_in(root: Path) -> list[bytes]:
    """Returns the image files of all shards."""
    reader = ShardReader(ShardIndex.load(root), "train")
    return [
        os.pread(reader._file(shard).fileno(), size, offset)
        for shard in range(SHARDS)
        for size, offset in reader._members(shard)[["bytes", "offset"]].tolist()
    ]
