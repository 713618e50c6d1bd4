"""Batches of images from shards: the endless training stream, and one walk over a split.

The batch of step t depends only on (seed, t) (`order.py`), so the step is the only state of a stream: it resumes in O(1), on any
number of ranks and loader workers, and yields every sample exactly once per pass. A *lane* is a contiguous run of the sequence
of a pass; every batch takes the same number of rows from each lane (`order.py`).
"""

import atexit
import copy
import queue
import signal
import threading
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from eae_dist.config import DataConfig
from eae_dist.data.order import ORDER_VERSION, SampleOrder, blocks_of, lane_range
from eae_dist.data.remote import Cache
from eae_dist.data.shard_index import ShardIndex, ShardReader
from eae_dist.distributed import rank as this_rank
from eae_dist.distributed import world_size
from eae_dist.errors import UserError, is_users

STEPS_PER_BLOCK = 32  # steps whose order is computed at once; one step at a time is a tenth slower


class ShardStream(IterableDataset):
    """The training batches of this rank from `start_step` on, without end.

    Yields dicts with this rank's rows of each global batch: "image" uint8 [b, c, h, w], "label" int64 [b] (-1: none), "key"
    list of str, "first" bool [b] (False: the same sample is earlier in the global batch, which is possible where two passes
    meet), "distinct" (True on every rank: no sample is in the global batch twice). A new iteration starts again at start_step.

    root: a folder of shards, or the address of one, which is read through `cache` (default: that of the default configuration).
    lanes: number of lanes; it must divide the global batch and be at least the number of ranks. Default: see `resolve_lanes`.
    workers: processes that read ahead; with 0, a thread reads ahead.
    Raises OSError or ValueError for a missing or damaged index or shard, an unknown split, an image of another shape, a batch
    larger than the split, lanes that do not divide the batch, more ranks than lanes, and a cache too small for the lanes.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        global_batch: int,
        lanes: int | None = None,
        seed: int = 0,
        start_step: int = 0,
        rank: int | None = None,
        world: int | None = None,
        workers: int = 0,
        prefetch: int = 2,
        cache: Cache | None = None,
    ):
        cache = cache or Cache.of(DataConfig())
        self.index = ShardIndex.load(root, cache)
        self.lanes = resolve_lanes(self.index, split, global_batch, lanes, cache)
        self.rank = this_rank() if rank is None else rank
        self.world = world_size() if world is None else world
        if not 0 <= self.rank < self.world or start_step < 0:
            got = f"rank={self.rank}, world={self.world}, start_step={start_step}"
            raise ValueError(f"a stream needs 0 <= rank < world and start_step >= 0, got {got}")
        if self.world > self.lanes:
            what = f"data.lanes={lanes}" if lanes is not None else f"train.global_batch={global_batch}"
            if lanes is None and self.lanes < global_batch:
                what = f"data.cache_bytes={cache.bytes}"
            raise UserError(
                f"{what} needs at most {self.lanes} ranks, got {self.world}; lower the ranks or raise {what.split('=')[0]}"
            )
        self.lane_range = lane_range(self.lanes, self.rank, self.world)
        # A lane stays in one shard for many steps and then enters the next. Twice the lanes of the rank covers both shards.
        in_use = 2 * (self.lane_range[1] - self.lane_range[0])
        self.reader = ShardReader(self.index, split, open_shards=in_use)
        samples = self.reader.split.table["samples"]
        self.order = SampleOrder(samples, seed=seed, global_batch=global_batch, lanes=self.lanes, open_shards=in_use)
        self.start_step, self.workers, self.prefetch = start_step, workers, prefetch

    @property
    def rows(self) -> int:
        """The number b of this rank's rows in every global batch."""
        start, stop = self.lane_range
        return (stop - start) * self.order.global_batch // self.lanes

    @property
    def row_ids(self) -> np.ndarray:
        """The numbers of this rank's rows in the global batch, int64 [b]."""
        return np.arange(self.rows) + self.lane_range[0] * self.order.global_batch // self.lanes

    @property
    def samples(self) -> int:
        """The number N of samples in the split, the images per pass."""
        return self.order.total

    def identity(self) -> dict:
        """Returns everything that determines the order of the data; streams with equal identity yield the same batches."""
        order = self.order
        return {
            "seed": order.seed,
            "global_batch": order.global_batch,
            "lanes": order.lanes,
            "index_sha256": self.index.sha256,
            "order_version": ORDER_VERSION,
        }

    def __iter__(self) -> Generator[dict, None, None]:
        if (worker := get_worker_info()) is not None:
            # Worker j of w makes the steps start + j, start + j + w, ...; the loader reads the workers in turn.
            try:
                yield from self._batches(copy.copy(self.reader), self.start_step + worker.id, worker.num_workers)
            except Exception as error:
                if not is_users(error):
                    raise
                # If raised here, its message would be the traceback of the worker.
                yield error  # type: ignore[misc]  # _closing_workers raises it
            return
        # Fetches the missing shards of the first step now; `_batches` fetches the others shortly before it needs them.
        per_lane = self.order.global_batch // self.lanes
        shards, _ = self.order.rows(np.array([self.start_step]), *self.lane_range)
        self.reader.fetch(np.unique(shards[0, ::per_lane]).tolist())
        if self.workers:
            yield from _closing_workers(
                DataLoader(
                    self,
                    batch_size=None,
                    num_workers=self.workers,
                    prefetch_factor=self.prefetch,
                    worker_init_fn=_ignore_stop_signals,
                )
            )
        else:
            reader = copy.copy(self.reader)
            yield from _read_ahead(self._batches(reader, self.start_step, 1), self.prefetch, reader)

    def _batches(self, reader: ShardReader, step: int, stride: int) -> Iterator[dict]:
        lane_start, lane_stop = self.lane_range
        per_lane = self.order.global_batch // self.lanes
        entered = np.full(lane_stop - lane_start, -1)
        while True:
            steps = step + stride * np.arange(STEPS_PER_BLOCK)
            shards, members = self.order.rows(steps, lane_start, lane_stop)
            for t, shard, member in zip(steps.tolist(), shards, members, strict=True):
                of_all = self.order.first(t)
                first = torch.from_numpy(of_all[lane_start * per_lane : lane_stop * per_lane])
                if self.index.tars.remote:  # a lane requests its next shard when it enters a shard
                    before, entered = entered, shard[per_lane - 1 :: per_lane]
                    lanes = lane_start + np.flatnonzero(entered != before)
                    reader.fetch_ahead(dict.fromkeys(self.order.next_shards(t, lanes).tolist()))
                yield reader.read(shard, member) | {"first": first, "distinct": bool(of_all.all())}
            step = int(steps[-1]) + stride


def resolve_lanes(index: ShardIndex, split: str, global_batch: int, lanes: int | None, cache: Cache) -> int:
    """Returns the number of lanes: `lanes`, or by default the number of rows of the global batch.

    For remote shards the default is the largest divisor of the global batch for which the cache can hold the open and the next
    shard of every lane, whichever shards these are. It depends only on index and configuration, not on the machine.
    Raises ValueError for a cache that is too small for the lanes.
    """
    if not index.tars.remote:
        return global_batch if lanes is None else lanes
    largest = np.cumsum(np.sort(index.split(split).table["bytes"])[::-1])
    for candidate in [lanes] if lanes is not None else range(global_batch, 0, -1):
        needed = int(largest[min(2 * candidate, len(largest)) - 1])
        if (lanes is not None or global_batch % candidate == 0) and needed <= cache.bytes:
            return candidate
    raise UserError(
        f"data.cache_bytes={cache.bytes} cannot hold the open and the next shard of every lane: {candidate} lane(s) of "
        f"{index.root} take {needed} bytes; raise data.cache_bytes" + ("" if candidate == 1 else " or lower data.lanes")
    )


def walk(
    root: str | Path,
    split: str,
    batch: int,
    *,
    count: int | None = None,
    rank: int | None = None,
    world: int | None = None,
    cache: Cache | None = None,
) -> Iterator[dict]:
    """Yields this rank's contiguous blocks of `batch` rows among the first `count` samples of a split (default: all), in order.

    The rows of a block do not depend on the number of ranks; no row is padded or repeated, and only the last block of the split
    can be shorter. Yields dicts as `ShardStream`, but with "number" (numbers of the samples in the split, numpy int64 [b])
    instead of "first".
    """
    rank, world = this_rank() if rank is None else rank, world_size() if world is None else world
    reader = ShardReader(ShardIndex.load(root, cache), split, open_shards=2)
    return _read_ahead(_blocks(reader, batch, count, rank, world), 2, reader)


def read_samples(root: str | Path, split: str, numbers: np.ndarray, cache: Cache | None = None) -> torch.Tensor:
    """Returns the images of samples of a split, numbered in the order of `walk`: uint8 [m, c, h, w]."""
    reader = ShardReader(ShardIndex.load(root, cache), split, open_shards=2)
    try:
        return reader.read(*_places(np.cumsum(reader.split.table["samples"]), numbers))["image"]
    finally:
        reader.close()


def _places(ends: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns shard and member of each sample number, int64 [m] x 2; ends: cumulative samples at the end of each shard."""
    shards = np.searchsorted(ends, numbers, side="right")
    return shards, numbers - np.where(shards > 0, ends[shards - 1], 0)


def _blocks(reader: ShardReader, batch: int, count: int | None, rank: int, world: int) -> Iterator[dict]:
    ends = np.cumsum(reader.split.table["samples"])
    total = int(ends[-1]) if count is None else min(count, int(ends[-1]))
    start, stop = blocks_of(total, batch, rank, world)
    last = int(np.searchsorted(ends, min(stop * batch, total) - 1, side="right"))
    entered = -1
    for block in range(start, stop):
        numbers = np.arange(block * batch, min((block + 1) * batch, total))
        shards, members = _places(ends, numbers)
        if shards[-1] != entered:
            entered = shards[-1]
            reader.fetch_ahead(range(entered + 1, min(entered + 1, last) + 1))
        yield reader.read(shards, members) | {"number": numbers}


def _ignore_stop_signals(worker_id: int) -> None:
    # Ctrl-C and the SIGTERM of torchrun reach the whole process group; the training process decides when workers end.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _closing_workers(loader: DataLoader) -> Iterator[dict]:
    """Yields the batches of the loader; its workers end when this iterator ends or fails, at the latest with the process.

    Python would end remaining workers by SIGTERM, which they ignore, and wait for them forever.
    """
    batches: Any = iter(loader)
    end = batches._shutdown_workers  # there is no public name for it
    atexit.register(end)

    def received() -> Iterator[dict]:
        for batch in batches:
            if isinstance(batch, Exception):
                raise batch
            yield batch

    try:
        # Receiving a tensor from another process takes 1 ms, so the next batch is received during a step.
        with closing(_read_ahead(received(), 1)) as ahead:
            yield from ahead
    finally:
        end()
        atexit.unregister(end)


def _read_ahead(batches: Iterator[dict], depth: int, reader: ShardReader | None = None) -> Generator[dict, None, None]:
    """Yields the batches, read by a thread that stays `depth` batches ahead; its exceptions are raised here.

    reader: the reader of the batches if they are read in this process; it is closed at the end.
    """
    ahead: queue.Queue = queue.Queue(maxsize=depth)
    closed = threading.Event()

    def put(item: tuple[dict | None, BaseException | None]) -> bool:
        while not closed.is_set():
            try:
                ahead.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def fill() -> None:
        try:
            for batch in batches:
                if torch.cuda.is_initialized():
                    batch["image"] = batch["image"].pin_memory()
                if not put((batch, None)):
                    return
            put((None, None))  # marks the end
        except BaseException as error:  # the consumer raises it
            put((None, error))

    thread = threading.Thread(target=fill, name="shard-stream", daemon=True)
    thread.start()
    try:
        while True:
            batch, error = ahead.get()
            if error is not None:
                raise error
            if batch is None:
                return
            yield batch
    finally:
        closed.set()
        if reader is not None:
            reader.stop_fetching()
        thread.join()  # a thread still inside torch at the end of the process would abort it
        if reader is not None:
            reader.close()
