"""The order of samples in a stream: a function of (seed, step), without stored state.

A split of N samples in S shards is read in *passes*. In pass p the shards are permuted by (seed, p) and the members of each
shard by (seed, p, shard); together they form one sequence of N places. The sequence is cut into L *lanes*: contiguous runs
whose lengths differ by at most one. The global batch of B rows takes B/L rows from every lane. Sample x of lane l has the
number g = x L + l and belongs to pass g // N. So every step depends only on (seed, step), and a resume costs nothing.

Permutations use our own keyed hash, so that the meaning of a seed does not depend on the version of a library. `ORDER_VERSION`
is saved in every checkpoint and increases if the hash changes.
"""

from functools import lru_cache
from typing import Any

import numpy as np
import torch

from eae_dist.errors import UserError
from eae_dist.numerics.keyed_random import derive_key, keyed_hash

ORDER_VERSION = 1
SORTED_LIMIT = 65_536  # longer permutations are computed per place instead of stored
FEISTEL_ROUNDS = 8


def permutation(n: int, key: int) -> np.ndarray:
    """Returns the permutation of range(n) that sorts the keyed hashes, int64 [n]."""
    return np.argsort(keyed_hash(key, np.arange(n, dtype=np.uint64)), kind="stable")


def feistel(n: int, key: int, places: np.ndarray) -> np.ndarray:
    """Maps `places` by a keyed bijection of range(n) that is not stored: int64 [m] -> int64 [m].

    It is a balanced Feistel network on the next even number of bits; it is applied again to values outside the range.
    """
    half = max(1, (int(n - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = [derive_key(key, r) for r in range(FEISTEL_ROUNDS)]

    def rounds(x: np.ndarray) -> np.ndarray:
        left, right = x >> np.uint64(half), x & mask
        for round_key in keys:
            left, right = right, left ^ (keyed_hash(round_key, right) & mask)
        return (left << np.uint64(half)) | right

    out = rounds(places.astype(np.uint64))
    while (outside := out >= np.uint64(n)).any():
        out[outside] = rounds(out[outside])
    return out.astype(np.int64)


def lane_range(lanes: int, rank: int, world: int) -> tuple[int, int]:
    """Returns the lanes [start, stop) of one rank; every lane belongs to one rank, and ranks differ by at most one lane."""
    return rank * lanes // world, (rank + 1) * lanes // world


def blocks_of(total: int, batch: int, rank: int, world: int) -> tuple[int, int]:
    """Returns the blocks [start, stop) of one rank, if `total` rows are cut into blocks of `batch`."""
    return lane_range(-(-total // batch), rank, world)


def filled(x: torch.Tensor, rows: int) -> torch.Tensor:
    """Repeats the last row of a block until it has `rows` rows, [m, ...] -> [rows, ...]."""
    return torch.cat([x, x[-1:].expand(rows - len(x), *x.shape[1:])]) if len(x) < rows else x


class SampleOrder:
    """The (shard, member) at each row of the global batch of each step.

    samples: int64 [S], the number of samples of every shard; B = global_batch, L = lanes, N = samples.sum().
    open_shards: number of shard permutations held at once (default: twice the lanes).
    Raises ValueError unless L <= B <= N and L divides B.
    """

    def __init__(self, samples: np.ndarray, *, seed: int, global_batch: int, lanes: int, open_shards: int | None = None):
        self.samples = np.asarray(samples, dtype=np.int64)
        self.total = int(self.samples.sum())
        self.starts = np.cumsum(self.samples) - self.samples
        self.seed, self.global_batch, self.lanes = seed, global_batch, lanes
        if global_batch > self.total:
            raise UserError(
                f"a batch of {global_batch} needs at least as many samples, the split has {self.total}; "
                f"lower train.global_batch or pack more images"
            )
        if not 1 <= lanes <= global_batch or global_batch % lanes:
            raise UserError(
                f"data.lanes={lanes} must divide train.global_batch={global_batch}; leave data.lanes unset or choose a divisor"
            )
        self.open_shards = open_shards or 2 * lanes
        self._open_caches()

    def _open_caches(self) -> None:
        self._pass = lru_cache(maxsize=4)(self._pass_sequence)
        self._members = lru_cache(maxsize=self.open_shards)(self._member_permutation)

    def __getstate__(self) -> dict[str, Any]:  # caches are not sent to a worker process
        return {name: value for name, value in self.__dict__.items() if name not in ("_pass", "_members")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open_caches()

    def rows(self, steps: np.ndarray, lane_start: int, lane_stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns shards and members of lanes [lane_start, lane_stop) at `steps` [t], ordered by lane: int64 [t, b] x 2.

        b = (lane_stop - lane_start) B / L. Pass a block of steps, because most of the work per call is fixed.
        """
        per_lane = self.global_batch // self.lanes
        given = np.asarray(steps, dtype=np.int64)[:, None, None] * per_lane + np.arange(per_lane)  # [t, 1, B/L]
        lane = np.arange(lane_start, lane_stop, dtype=np.int64)[:, None]
        passes, position, _ = self._positions((given * self.lanes + lane).reshape(len(steps), -1))
        shards, members = np.empty_like(position), np.empty_like(position)
        for p in np.unique(passes).tolist():
            rows = passes == p
            shards[rows], members[rows] = self._locate(p, position[rows])
        return shards, members

    def next_shards(self, step: int, lanes: np.ndarray) -> np.ndarray:
        """Returns the shard that each lane enters after its shard at the end of `step`, int64 [l] -> int64 [l]."""
        number = ((step + 1) * (self.global_batch // self.lanes) - 1) * self.lanes + np.asarray(lanes, dtype=np.int64)
        passes, position, run_end = self._positions(number)
        left = np.empty_like(position)  # samples of the lane in its shard, including this one
        for p in np.unique(passes).tolist():
            rows, (_, ends) = passes == p, self._pass(p)
            left[rows] = np.minimum(ends[np.searchsorted(ends, position[rows], side="right")], run_end[rows]) - position[rows]
        passes, position, _ = self._positions(number + left * self.lanes)
        shards = np.empty_like(position)
        for p in np.unique(passes).tolist():
            rows, (order, ends) = passes == p, self._pass(p)
            shards[rows] = order[np.searchsorted(ends, position[rows], side="right")]
        return shards

    def first(self, step: int) -> np.ndarray:
        """Returns False for rows whose sample is earlier in the global batch of `step`, else True, bool [B].

        Only a batch with the end of one pass and the start of the next can contain a sample twice.
        """
        begin, end = step * self.global_batch, (step + 1) * self.global_batch - 1
        first = np.ones(self.global_batch, dtype=bool)
        if begin // self.total != end // self.total:
            shards, members = self.rows(np.array([step]), 0, self.lanes)
            _, seen = np.unique(self.starts[shards[0]] + members[0], return_index=True)
            first[:] = False
            first[seen] = True
        return first

    def _positions(self, number: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns for sample numbers g the pass, the place in its sequence and the end of the run of the lane."""
        passes, place = np.divmod(number, self.total)
        quotient, extra = divmod(self.total, self.lanes)
        run, within = place % self.lanes, place // self.lanes
        start = run * quotient + np.minimum(run, extra)
        return passes, start + within, start + quotient + (run < extra)

    def _locate(self, p: int, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Converts places in the sequence of pass p to (shard, member)."""
        order, ends = self._pass(p)
        slot = np.searchsorted(ends, position, side="right")
        shards = order[slot]
        offset = position - (ends[slot] - self.samples[shards])
        members = np.empty_like(offset)
        # Rows are grouped by shard, for one look-up per shard.
        by_shard = np.argsort(shards, kind="stable")
        cuts = np.flatnonzero(np.diff(shards[by_shard])) + 1
        for group in np.split(by_shard, cuts):
            shard = int(shards[group[0]])
            n = int(self.samples[shard])
            if n <= SORTED_LIMIT:
                members[group] = self._members(p, shard)[offset[group]]
            else:
                members[group] = feistel(n, derive_key(self.seed, p, 2, shard), offset[group])
        return shards, members

    def _pass_sequence(self, p: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the shards in the order of pass p and the end of each shard in the sequence: int64 [S] x 2."""
        order = permutation(len(self.samples), derive_key(self.seed, p, 1))
        return order, np.cumsum(self.samples[order])

    def _member_permutation(self, p: int, shard: int) -> np.ndarray:
        return permutation(int(self.samples[shard]), derive_key(self.seed, p, 2, shard)).astype(np.uint16)
