"""The order of the data and the stream; test_laws.py has what training makes of it."""

import io
import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import ROOT, TRAIN_SIZES, encode, image_of, write_shards
from PIL import Image

from eae_dist.data import decoding as decode
from eae_dist.data.order import SampleOrder, feistel, lane_range, permutation
from eae_dist.data.stream import ShardStream, walk
from eae_dist.numerics.keyed_random import derive_key, keyed_hash

N = sum(TRAIN_SIZES)


def take(stream: ShardStream, steps: int) -> list[dict]:
    batches = iter(stream)
    taken = [next(batches) for _ in range(steps)]
    batches.close()
    return taken


def keys_of(*args, steps: int, **kwargs) -> list[list[str]]:
    return [batch["key"] for batch in take(ShardStream(*args, **kwargs), steps)]


def all_ranks(shards, steps: int, world: int, **kwargs) -> list[list[str]]:
    """The keys of each step over all ranks, joined in rank order."""
    ranks = [keys_of(shards, "train", rank=r, world=world, steps=steps, **kwargs) for r in range(world)]
    return [[key for keys in step for key in keys] for step in zip(*ranks, strict=True)]


def test_hash_and_permutations_are_pinned():
    # Golden values: a change of these is a change of every order, and needs a new ORDER_VERSION.
    assert [hex(h) for h in keyed_hash(7, np.arange(3, dtype=np.uint64)).tolist()] == GOLDEN_HASH
    assert derive_key(1, 2, 3) == GOLDEN_KEY
    assert permutation(10, 42).tolist() == GOLDEN_PERMUTATION
    assert feistel(100_000, 42, np.arange(5)).tolist() == GOLDEN_FEISTEL


GOLDEN_HASH = ["0x63cbe1e459320dd7", "0x44c3cd7f43c661c", "0xe6984080bab12a02"]
GOLDEN_KEY = 2869315087210772132
GOLDEN_PERMUTATION = [4, 1, 6, 2, 8, 3, 9, 0, 7, 5]
GOLDEN_FEISTEL = [96566, 21170, 85438, 81192, 74087]


@pytest.mark.parametrize("n", [1, 2, 3, 17, 1000, 65_537])
def test_feistel_network_is_a_bijection(n):
    assert np.array_equal(np.sort(feistel(n, 5, np.arange(n))), np.arange(n))


def test_permutations_of_different_passes_and_shards_are_unrelated():
    same = [
        (permutation(1000, derive_key(0, p, 2, s)) == permutation(1000, derive_key(0, q, 2, t))).sum()
        for p, s, q, t in [(0, 0, 1, 0), (0, 0, 0, 1), (3, 4, 4, 3)]
    ]
    assert max(same) < 10  # of 1,000 places one agrees by chance; ten would have a probability of 1e-7


@pytest.mark.parametrize(("batch", "lanes"), [(26, 26), (26, 13), (26, 1), (150, 150), (150, 50), (7, 7)])
def test_every_sample_is_given_floor_or_ceiling_of_its_share_at_any_step(batch, lanes):
    order = SampleOrder(np.array(TRAIN_SIZES), seed=1, global_batch=batch, lanes=lanes)
    given = Counter()
    for step in range(60):
        shards, members = order.rows(np.array([step]), 0, lanes)
        given.update(zip(shards[0].tolist(), members[0].tolist(), strict=True))
        rows = (step + 1) * batch
        counts = [given[(s, m)] for s, size in enumerate(TRAIN_SIZES) for m in range(size)]
        assert set(counts) <= {rows // N, -(-rows // N)} and sum(counts) == rows


def test_large_shards_are_given_exactly_once_too():
    order = SampleOrder(np.array([70_000, 3, 66_000]), seed=0, global_batch=8, lanes=4)
    steps = order.total // 8 + 1
    shards, members = order.rows(np.arange(steps), 0, 4)
    numbers = (order.starts[shards] + members).reshape(-1)
    counts = np.bincount(numbers, minlength=order.total)
    assert counts.min() == 1 and counts.sum() == steps * 8


@pytest.mark.parametrize("world", [2, 3, 4, 7, 26])
def test_batches_are_the_same_on_any_number_of_ranks(shards, world):
    assert all_ranks(shards, 7, world, global_batch=26) == all_ranks(shards, 7, 1, global_batch=26)


@pytest.mark.parametrize("lanes", [13, 2])
def test_batches_are_the_same_on_any_number_of_ranks_with_fewer_lanes(shards, lanes):
    assert all_ranks(shards, 7, 2, global_batch=26, lanes=lanes) == all_ranks(shards, 7, 1, global_batch=26, lanes=lanes)


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores
def test_workers_change_nothing(shards, workers):
    a, b = (take(ShardStream(shards, "train", 26, start_step=2, workers=w), 9) for w in (0, workers))
    assert [x["key"] for x in a] == [x["key"] for x in b]
    assert all(torch.equal(x[name], y[name]) for x, y in zip(a, b, strict=True) for name in ("image", "label", "first"))


@pytest.mark.parametrize("start", [1, 5, 6, 40, 10**6])
def test_stream_resumes_at_any_step(shards, start):
    resumed = keys_of(shards, "train", 26, start_step=start, steps=3)
    if start < 100:
        assert resumed == keys_of(shards, "train", 26, steps=start + 3)[start:]
    assert resumed == keys_of(shards, "train", 26, start_step=start, steps=3)


def test_iterating_again_starts_again(shards):
    stream = ShardStream(shards, "train", 26, start_step=4)
    assert [b["key"] for b in take(stream, 3)] == [b["key"] for b in take(stream, 3)]


def test_seeds_and_passes_give_other_orders(shards):
    a, b = keys_of(shards, "train", 150, steps=2)
    assert a != b and sorted(a) == sorted(b)
    assert a != keys_of(shards, "train", 150, seed=1, steps=1)[0]


def test_batches_mix_all_parts_of_a_split(shards):
    # With as many lanes as rows the first batch holds samples of both large shards, near their shares of 26 / 150.
    first = [int(key) for key in keys_of(shards, "train", 26, steps=1)[0]]
    assert 3 <= sum(number < 40 for number in first) <= 13


def test_first_is_false_exactly_where_a_sample_stands_twice_in_a_batch(shards):
    seen_twice = 0
    for batch in take(ShardStream(shards, "train", 140), 12):
        key, first = batch["key"], batch["first"].tolist()
        assert first == [k not in key[:i] for i, k in enumerate(key)]
        seen_twice += first.count(False)
    assert seen_twice > 0
    halves = [take(ShardStream(shards, "train", 140, rank=r, world=2), 12) for r in range(2)]
    joined = [torch.cat([a["first"], b["first"]]) for a, b in zip(*halves, strict=True)]
    whole = [batch["first"] for batch in take(ShardStream(shards, "train", 140), 12)]
    assert all(torch.equal(a, b) for a, b in zip(joined, whole, strict=True))


# WebP has no gray images: they are color images that happen to be gray.
@pytest.mark.parametrize(
    ("extension", "shape"),
    [("png", (1, 16, 16)), ("png", (3, 8, 12)), ("npy", (1, 16, 16)), ("npy", (3, 8, 12)), ("webp", (3, 8, 12))],
)
def test_pixels_and_labels_are_those_that_were_written(tmp_path, extension, shape):
    root = write_shards(tmp_path / "data", {"train": (5, 6)}, shape, extension)
    for batch in take(ShardStream(root, "train", 11), 1):
        assert batch["image"].dtype == torch.uint8 and batch["image"].shape == (11, *shape)
        for image, label, key in zip(batch["image"], batch["label"].tolist(), batch["key"], strict=True):
            written = torch.from_numpy(image_of(int(key), shape)).permute(2, 0, 1)
            assert torch.equal(image, written)
            assert label == int(key) % 10


@pytest.mark.parametrize("extension", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_decoder_that_is_installed_gives_the_same_pixels(extension, channels):
    data = encode(image_of(3, (channels, 16, 16)), extension)
    expected = decode.decode_with_pillow(data, channels)
    found = decode.decode_image(data, channels)
    assert found.shape == expected.shape == (16, 16, channels)
    # JPEG and WebP decoders differ in rounding and in the upsampling of color.
    assert np.abs(found.astype(int) - expected).max() <= {"png": 0, "jpeg": 6, "webp": 6}[extension]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_every_kind_of_png_gives_the_same_pixels_with_and_without_pyspng(mode, monkeypatch):
    gray = mode in ("1", "L", "LA")
    image = Image.fromarray(image_of(3, (3, 8, 12))).convert("L" if gray else "RGB").convert(mode)
    file = io.BytesIO()
    image.save(file, "png")
    for channels in (1, 3) if gray else (3,):
        found = decode.decode_image(file.getvalue(), channels)
        with monkeypatch.context() as context:
            context.setattr(decode, "pyspng", None)
            expected = decode.decode_image(file.getvalue(), channels)
        assert np.array_equal(found, expected)
        assert np.array_equal(found, decode.decode_with_pillow(file.getvalue(), channels))


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_walk_gives_a_split_in_order_in_blocks_that_do_not_depend_on_ranks(shards, world):
    blocks = [b["key"] for r in range(world) for b in walk(shards, "test", 8, rank=r, world=world)]
    assert [len(block) for block in blocks] == [8, 8, 8, 8, 1]
    assert [key for block in blocks for key in block] == [f"{i:06d}" for i in range(33)]
    first = walk(shards, "test", 8, count=10, rank=0, world=1)
    assert [key for b in first for key in b["key"]] == [f"{i:06d}" for i in range(10)]


def test_stream_survives_pickling(shards):
    stream = pickle.loads(pickle.dumps(ShardStream(shards, "train", 26, seed=2)))
    assert [b["key"] for b in take(stream, 2)] == keys_of(shards, "train", 26, seed=2, steps=2)


def test_lanes_of_ranks_cover_all_lanes_once():
    for lanes, world in [(100, 8), (26, 4), (5, 5)]:
        ranges = [lane_range(lanes, r, world) for r in range(world)]
        assert [lane for start, stop in ranges for lane in range(start, stop)] == list(range(lanes))


# What a user or a file can get wrong.


def copy(shards, tmp_path):
    return shutil.copytree(shards, tmp_path / "copy")


def test_missing_index_says_how_to_make_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no index.json.*eae_dist.pack"):
        ShardStream(tmp_path, "train", 4)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        ShardStream(tmp_path / "nowhere", "train", 4)


def test_unknown_split_names_the_known(shards):
    with pytest.raises(ValueError, match="no split 'valid'; it has test, train, validation"):
        ShardStream(shards, "valid", 4)


def test_more_ranks_than_lanes_is_an_error_with_the_numbers(shards):
    with pytest.raises(ValueError, match=r"train.global_batch=4 needs at most 4 ranks, got 5"):
        ShardStream(shards, "train", 4, rank=0, world=5)
    with pytest.raises(ValueError, match=r"data.lanes=2 needs at most 2 ranks, got 3"):
        ShardStream(shards, "train", 4, lanes=2, rank=0, world=3)


@pytest.mark.parametrize("wrong", [{"rank": 2, "world": 2}, {"rank": -1, "world": 2}, {"start_step": -1}])
def test_place_that_no_rank_or_step_has_is_refused(shards, wrong):
    name, value = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=f"needs 0 <= rank < world and start_step >= 0, got .*{name}={value}"):
        ShardStream(shards, "train", 26, **wrong)


def test_lanes_that_do_not_divide_the_batch_are_an_error(shards):
    with pytest.raises(ValueError, match=r"data.lanes=3 must divide train.global_batch=4"):
        ShardStream(shards, "train", 4, lanes=3)


def test_batch_of_more_than_all_samples_is_an_error(shards):
    with pytest.raises(ValueError, match="batch of 151 .* the split has 150"):
        ShardStream(shards, "train", 151)


@pytest.mark.parametrize("workers", [0, 1])
def test_truncated_shard_is_named(shards, tmp_path, workers):
    root = copy(shards, tmp_path)
    with open(root / "train-000004.tar", "r+b") as file:
        file.truncate(5000)
    with pytest.raises(ValueError, match=rf"^{root}/train-000004.tar is truncated: 5000 bytes.*$"):
        take(ShardStream(root, "train", 150, workers=workers), 1)


HOLD_A_BATCH = """
import sys
from eae_dist.data.stream import ShardStream

batches = iter(ShardStream(sys.argv[1], "train", 26, workers=1))
next(batches)
if sys.argv[2] == "error":
    raise ValueError("on purpose")
"""


@pytest.mark.parametrize("end", ["quietly", "error"])
def test_process_that_still_holds_a_stream_with_workers_ends(shards, end):
    command = [sys.executable, "-c", HOLD_A_BATCH, str(shards), end]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == (1 if end == "error" else 0), done.stderr


def test_workers_of_a_fork_server_read_the_same(shards):
    """Python 3.14 starts processes so by default."""
    usual = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        by_workers = keys_of(shards, "train", 26, workers=2, steps=4)
    finally:
        multiprocessing.set_start_method(usual, force=True)
    assert by_workers == keys_of(shards, "train", 26, steps=4)


def test_worker_that_is_killed_ends_the_stream_with_an_error(shards):
    before = set(multiprocessing.active_children())
    batches = iter(ShardStream(shards, "train", 26, workers=1))
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - before
    worker.kill()
    with pytest.raises((RuntimeError, OSError, EOFError)):  # what it was doing decides which
        for _ in range(10):  # some had been made
            next(batches)


def test_missing_shard_is_named(shards, tmp_path):
    root = copy(shards, tmp_path)
    (root / "train-000001.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"train-000001.tar is named in the index and missing"):
        take(ShardStream(root, "train", 150), 1)


@pytest.mark.parametrize("extension", ["png", "npy"])
def test_flipped_byte_is_found_and_its_sample_named(tmp_path, extension):
    root = write_shards(tmp_path / "data", {"train": (8,)}, extension=extension)
    path = root / "train-000000.tar"
    data = bytearray(path.read_bytes())
    members = np.load(root / "train-000000.members.npy")
    data[members["offset"][3] + members["bytes"][3] - 20] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"sample '000003' of .*train-000000.tar is damaged: its checksum.*--verify"):
        take(ShardStream(root, "train", 8), 1)


def test_index_without_splits_is_an_error_that_names_it(shards, tmp_path):
    root = copy(shards, tmp_path)
    info = json.loads((root / "index.json").read_text())
    del info["splits"]
    (root / "index.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match=f"^{root}/index.json cannot be read as a shard index .splits is missing.*pack --index"):
        ShardStream(root, "train", 26)


@pytest.mark.parametrize("table", ["train.shards.npy", "train-000000.members.npy"])
def test_changed_table_is_a_checksum_mismatch(shards, tmp_path, table):
    root = copy(shards, tmp_path)
    with open(root / table, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    with pytest.raises(ValueError, match=f"{table} is missing or is not the table .*checksum mismatch"):
        take(ShardStream(root, "train", 150), 1)


def test_image_of_another_shape_is_named(shards, tmp_path):
    root = copy(shards, tmp_path)
    index = root / "index.json"
    index.write_text(index.read_text().replace("16,\n      16", "16,\n      12"))
    with pytest.raises(ValueError, match=r"its shape is \(1, 16, 16\), the index says \(1, 16, 12\)"):
        take(ShardStream(root, "train", 4), 1)


@pytest.mark.parametrize("name", ["../train-000000.tar", "/etc/passwd", "pipe:rm x", "a/b-000000.tar"])
def test_shard_names_that_leave_the_folder_are_refused(tmp_path, name):
    from eae_dist.data.shard_index import plain_name

    with pytest.raises(ValueError, match="plain file name"):
        plain_name(tmp_path, name)


def test_closing_a_stream_ends_its_thread(shards):
    import threading

    before = threading.active_count()
    take(ShardStream(shards, "train", 26), 2)
    for thread in threading.enumerate():
        if thread.name == "shard-stream":
            thread.join(timeout=10)
    assert threading.active_count() <= before


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "{}", "3", '{"version": 1', '{"version": 1, "splits": []}', "\0", "[" * 100_000]
)
def test_index_with_another_content_is_an_error_that_names_it(shards, tmp_path, text):
    root = copy(shards, tmp_path)
    (root / "index.json").write_text(text)
    with pytest.raises(ValueError, match=f"^{root}/index.json cannot be read as a shard index .*pack --index"):
        ShardStream(root, "train", 8)


@pytest.mark.parametrize("change", [1, -1, 1000, -150])
def test_number_of_samples_that_the_table_does_not_have_is_an_error(shards, tmp_path, change):
    root = copy(shards, tmp_path)
    info = json.loads((root / "index.json").read_text())
    info["splits"]["train"]["samples"] += change
    (root / "index.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match=f"{root}/index.json says {150 + change} samples of train, its table 150"):
        ShardStream(root, "train", 8)
