"""Shards as packed, indexed and verified: even, shuffled, reproducible, whole or not there."""

import fcntl
import io
import json
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import tarfile
import zlib
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import webdataset
from conftest import ROOT
from PIL import Image

from eae_dist.data import packing
from eae_dist.data.indexing import build_index, class_correlation
from eae_dist.data.scanning import index_shard
from eae_dist.data.shard_index import ShardIndex
from eae_dist.data.stream import ShardStream, walk
from eae_dist.data.verifying import verify
from eae_dist.distributed.processes import run_tasks
from eae_dist.pack import main

IMAGES = np.random.default_rng(0).integers(0, 256, (113, 6, 5, 3), dtype=np.uint8)
LABELS = np.arange(113) // 12  # sorted by class


@pytest.fixture
def npz(tmp_path) -> Path:
    """A file of 113 images: rows 0 to 90 of IMAGES are for train, then 11 for validation and 11 for test."""
    parts = {"train": slice(91), "validation": slice(91, 102), "test": slice(102, None)}
    images = {f"{split}_images": IMAGES[rows] for split, rows in parts.items()}
    labels = {f"{split}_labels": LABELS[rows] for split, rows in parts.items()}
    np.savez(tmp_path / "some.npz", **images, **labels)
    return tmp_path / "some.npz"


def pack(*arguments, workers: int = 1) -> int:
    return main([*map(str, arguments), "--workers", str(workers)])


def packed(root: Path) -> dict[str, tuple]:
    """Key -> (image [h, w, c], label) of all splits of a data set."""
    return {
        key: (image.permute(1, 2, 0).numpy(), int(label))
        for split in ShardIndex.load(root).info["splits"]
        for batch in walk(root, split, 16, rank=0, world=1)
        for key, image, label in zip(batch["key"], batch["image"], batch["label"], strict=True)
    }


def files_of(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.iterdir()}


def rows_of(root: Path, split: str = "train") -> list[int]:
    """The original rows of a split's samples, in the order of its shards."""
    return [int(key[-6:]) for batch in walk(root, split, 16, rank=0, world=1) for key in batch["key"]]


# Packing


@pytest.mark.parametrize("shard_size", [1, 10, 45, 91, 1000])
def test_shards_of_a_split_differ_by_at_most_one_sample(npz, tmp_path, shard_size):
    assert pack("npz", npz, tmp_path / "out", "--shard-size", shard_size) == 0
    index = ShardIndex.load(tmp_path / "out")
    for name, samples in (("train", 91), ("validation", 11), ("test", 11)):
        sizes = index.split(name).table["samples"]
        assert sizes.sum() == samples and len(sizes) == -(-samples // shard_size) and np.ptp(sizes) <= 1


def test_samples_lie_in_a_seeded_random_order(npz, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert pack("npz", npz, tmp_path / name, "--seed", seed, "--shard-size", 30) == 0
    a, b, c = (rows_of(tmp_path / name) for name in "abc")
    assert a == b != c and sorted(a) == sorted(c)
    # Rows come sorted by class: of 90 neighbors 9 share their class by chance (sd 3), and 81 if nothing is shuffled.
    assert np.sum(LABELS[a[:-1]] == LABELS[a[1:]]) < 25
    assert abs(ShardIndex.load(tmp_path / "a").info["splits"]["train"]["class_correlation"]) < 0.1
    assert ShardIndex.load(tmp_path / "c").info["seed"] == 1


@pytest.mark.parametrize("workers", [1, 3])
def test_bytes_do_not_depend_on_workers_time_or_folder(npz, tmp_path, workers):
    assert pack("npz", npz, tmp_path / "a", "--shard-size", 9) == 0
    assert pack("npz", npz, tmp_path / "b", "--shard-size", 9, workers=workers) == 0
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("format, extension", [("png", "png"), ("webp", "webp"), ("raw", "npy")])
def test_lossless_formats_give_the_pixels_back(format, extension, channels, tmp_path):
    images = IMAGES[..., :channels]
    np.savez(tmp_path / "some.npz", images=images, labels=LABELS)
    assert pack("npz", tmp_path / "some.npz", tmp_path / "out", "--format", format) == 0
    index = ShardIndex.load(tmp_path / "out")
    assert index.image_shape == (channels, 6, 5) and index.info["image"]["encoding"] == format
    assert (index.npy_header is not None) == (format == "raw")
    found = packed(tmp_path / "out")
    assert len(found) == 113
    for i in range(113):
        image, label = found[f"image-{i:06d}"]
        np.testing.assert_array_equal(image, images[i])
        assert label == LABELS[i]
    info = build_index(tmp_path / "out")[0]  # by others' eyes, who know only the files
    assert info["image"] == index.info["image"]
    with tarfile.open(tmp_path / "out" / "test-000000.tar") as tar:
        assert {name.partition(".")[2] for name in tar.getnames()} == {extension, "cls"}


def test_jpeg_quality_is_applied(tmp_path):
    ramp = np.add.outer(np.arange(32), np.arange(32)).astype(np.uint8)[None].repeat(12, axis=0) * 4
    np.savez(tmp_path / "some.npz", images=ramp)
    sizes, errors = [], []
    for quality in (10, 100):
        out = tmp_path / str(quality)
        assert pack("npz", tmp_path / "some.npz", out, "--format", "jpeg", "--quality", quality) == 0
        assert ShardIndex.load(out).info["image"]["encoding"] == "jpg"
        errors.append(max(np.abs(image[..., 0].astype(int) - ramp[0]).max() for image, _ in packed(out).values()))
        sizes.append(int(index_shard(out / "train-000000.tar").members["bytes"].sum()))
    assert errors[1] <= 3 < errors[0] and sizes[0] < sizes[1]


def test_plain_webdataset_reads_packed_shards(npz, tmp_path):
    assert pack("npz", npz, tmp_path / "out", "--shard-size", 40) == 0
    shards = [str(path) for path in sorted((tmp_path / "out").glob("train-*.tar"))]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"train-{row:06d}" for row in rows_of(tmp_path / "out")]
    for sample in samples:
        row = int(sample["__key__"][-6:])
        np.testing.assert_array_equal(np.array(Image.open(io.BytesIO(sample["png"]))), IMAGES[row])
        assert int(sample["cls"]) == LABELS[row]


def test_long_and_foreign_names_are_keys(tmp_path):
    names = [f"{'a long folder name/' * 14}{'ü' * 60}-{i} of ten" for i in range(10)]
    for name, image in zip(names, IMAGES, strict=False):
        path = tmp_path / "in" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    assert pack("imagefolder", tmp_path / "in", tmp_path / "out") == 0
    assert sorted(packed(tmp_path / "out")) == sorted(names)
    shards = [str(path) for path in sorted((tmp_path / "out").glob("*.tar"))]
    assert sorted(sample["__key__"] for sample in webdataset.WebDataset(shards, shardshuffle=False)) == sorted(names)


def test_the_index_says_what_was_packed(npz, tmp_path, capsys):
    assert pack("npz", npz, tmp_path / "out", "--shard-size", 40, "--seed", 5) == 0
    said = capsys.readouterr().out
    info = json.loads((tmp_path / "out" / "index.json").read_text())
    assert info["name"] == "some" and info["seed"] == 5 and info["version"] == 1
    assert info["image"] == {"shape": [3, 6, 5], "encoding": "png", "npy_header": None}
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("train-*.tar"))
    train = info["splits"]["train"]
    assert (train["samples"], train["shards"], train["bytes"]) == (91, 3, size)
    assert "91 samples" in said and "3 shards" in said and "3x6x5" in said and str(tmp_path / "out") in said


@pytest.mark.parametrize(
    "arguments, wanted",
    [
        ([], "mnist5k"),
        (["nothing", "out"], "imagefolder"),
        (["npz", "{npz}", "{tmp}/out", "--shard-size", "0"], "at least 1"),
        (["npz", "{npz}", "{tmp}/out", "--seed", "x"], "'x'"),
        (["npz", "{npz}", "{tmp}/out", "--quality", "50"], "--format jpeg"),
        (["npz", "{npz}", "{tmp}/full"], "not empty"),
        (["npz", "{npz}", "{npz}"], "is a file"),
        (["npz", "{npz}", "{npz}/out"], "some.npz"),
        (["npz", "{npz}", "{tmp}/odd"], "odd.incomplete is in the way"),
        (["--index", "{tmp}/missing"], "not a folder"),
        (["--index", "{tmp}/full"], "no .tar"),
        (["--verify", "{tmp}/full"], "no index.json"),
        (["--split", "train"], "--index"),
        (["--index", "{tmp}/full", "npz", "{npz}", "{tmp}/out"], "one source"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(arguments, wanted, npz, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    (tmp_path / "odd.incomplete").mkdir()
    (tmp_path / "odd.incomplete" / "thesis.txt").write_text("precious")
    try:
        code = main([argument.format(npz=npz, tmp=tmp_path) for argument in arguments])
    except SystemExit as exit:  # argparse's way
        code = exit.code
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 and wanted in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "odd.incomplete", "some.npz"]


def test_a_data_set_is_never_overwritten(npz, tmp_path, capsys):
    assert pack("npz", npz, tmp_path / "out") == 0
    before = files_of(tmp_path / "out")
    assert pack("npz", npz, tmp_path / "out", "--seed", 1) == 2
    assert "holds a data set already" in capsys.readouterr().err
    assert files_of(tmp_path / "out") == before


# Interrupted, killed, out of space

INTERRUPTED = """
import os, signal, sys
from eae_dist import pack
from eae_dist.data import packing

signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background of a shell inherit that it is ignored

class Progress(packing.tqdm):
    def update(self, n=1):
        os.{call}

packing.tqdm = Progress
sys.exit(pack.main(sys.argv[1:]))
"""


def run_interrupted(call: str, *arguments) -> subprocess.CompletedProcess:
    # Returns when the last process that holds the pipes has ended: workers that stayed behind would run into the limit.
    code = INTERRUPTED.format(call=call)
    command = [sys.executable, "-c", code, *map(str, arguments), "--workers", "2", "--shard-size", "1"]
    folder = ROOT
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder, start_new_session=True)


def test_a_killed_pack_leaves_nothing_that_looks_complete_and_the_next_one_succeeds(npz, tmp_path, capsys):
    out = tmp_path / "out"
    assert run_interrupted("kill(os.getpid(), signal.SIGKILL)", "npz", npz, out).returncode == -9
    assert not out.exists() and list((tmp_path / "out.incomplete").glob("*.tar"))
    with pytest.raises(FileNotFoundError):
        ShardStream(tmp_path / "out.incomplete", "train", global_batch=10)

    assert pack("npz", npz, out) == 0
    assert "interrupted pack left" in capsys.readouterr().err
    assert pack("npz", npz, tmp_path / "undisturbed") == 0
    assert files_of(out) == files_of(tmp_path / "undisturbed")
    assert not (tmp_path / "out.incomplete").exists()


def test_ctrl_c_ends_cleanly_with_all_worker_processes(npz, tmp_path):
    done = run_interrupted("killpg(0, signal.SIGINT)", "npz", npz, tmp_path / "out")
    assert done.returncode == 130 and done.stderr == "interrupted\n"
    assert [path.name for path in tmp_path.iterdir()] == ["some.npz"]


def test_a_worker_that_dies_is_an_error_not_a_hang(npz, tmp_path, capsys, monkeypatch):
    class Progress(packing.tqdm):
        def update(self, n=1):
            for process in multiprocessing.active_children():
                process.kill()

    monkeypatch.setattr(packing, "tqdm", Progress)
    assert pack("npz", npz, tmp_path / "out", "--shard-size", 1, workers=2) == 2
    assert "fewer --workers" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["some.npz"]


def test_a_full_disk_is_an_error_that_leaves_nothing(tmp_path, capsys):
    np.savez(tmp_path / "some.npz", images=np.random.default_rng(0).integers(0, 256, (40, 100, 100), dtype=np.uint8))
    limit, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))  # fails a write as a full disk does
    try:
        code = pack("npz", tmp_path / "some.npz", tmp_path / "out", "--format", "raw")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    error = capsys.readouterr().err
    assert code == 2 and error.startswith(f"error: cannot write {tmp_path / 'out'}") and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["some.npz"]


def test_a_second_pack_into_the_same_folder_is_refused(npz, tmp_path, capsys):
    (tmp_path / "out.incomplete").mkdir()
    with open(tmp_path / "out.incomplete" / packing.LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert pack("npz", npz, tmp_path / "out") == 2
        assert "another pack is writing" in capsys.readouterr().err
        assert (tmp_path / "out.incomplete" / packing.LOCK).exists()
    assert pack("npz", npz, tmp_path / "out") == 0


def test_a_file_that_changes_while_it_is_packed_is_an_error(tmp_path, capsys, monkeypatch):
    (tmp_path / "in").mkdir()
    for i, image in enumerate(IMAGES[:12]):
        Image.fromarray(image).save(tmp_path / "in" / f"{i}.png")
    plan = packing.shard_plan

    def break_a_file(*arguments):
        (tmp_path / "in" / "7.png").write_text("changed")
        return plan(*arguments)

    monkeypatch.setattr(packing, "shard_plan", break_a_file)
    assert pack("imagefolder", tmp_path / "in", tmp_path / "out") == 2
    assert "'7' changed while it was packed" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def pause_at(task: int) -> int:
    if task == 1:
        signal.pause()
    return task


def test_closing_ends_worker_processes_in_the_middle_of_a_task():
    results = run_tasks(pause_at, [0, 1, 1, 1, 1], workers=2)
    assert next(results) == 0
    results.close()
    assert multiprocessing.active_children() == []


def test_tasks_are_drawn_a_few_at_a_time_and_answered_in_order():
    drawn = []
    tasks = (drawn.append(i) or str(i) for i in range(100))
    with closing(run_tasks(int, tasks, workers=2)) as results:
        assert next(results) == 0 and len(drawn) <= 4
        assert list(results) == list(range(1, 100))
    with pytest.raises(ValueError, match="'x'"):
        list(run_tasks(int, ["1", "x"], workers=2))


# Shards that others made


def write_shards(folder: Path, *, labels=LABELS, maxcount=40, extension="png", split="train", **more) -> None:
    """Shards by webdataset's own writer; `more`: extension -> what else each sample has."""
    folder.mkdir(exist_ok=True)
    with webdataset.ShardWriter(str(folder / f"{split}-%06d.tar"), maxcount=maxcount, verbose=0) as writer:
        for i, label in enumerate(labels):
            writer.write({"__key__": f"{i:05d}", extension: IMAGES[i], "cls": int(label), **more})


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def encoded(image: np.ndarray, format: str = "png") -> bytes:
    data = io.BytesIO()
    Image.fromarray(image).save(data, format=format)
    return data.getvalue()


def npy(array: np.ndarray, **options) -> bytes:
    data = io.BytesIO()
    np.save(data, array, **options)
    return data.getvalue()


def damaged_within(png: bytes) -> bytes:
    """A PNG of one data chunk with a bit of its compressed pixels flipped, and the chunk's checksum set right again."""
    start = png.index(b"IDAT")
    end = start + 4 + int.from_bytes(png[start - 4 : start], "big")
    chunk = bytearray(png[start:end])
    chunk[-1] ^= 1
    return png[:start] + chunk + zlib.crc32(chunk).to_bytes(4, "big") + png[end + 4 :]


PNG = encoded(IMAGES[0])


@pytest.mark.parametrize("workers", [1, 2])
def test_webdatasets_shards_are_indexed(tmp_path, workers):
    write_shards(tmp_path / "wds")
    write_shards(tmp_path / "wds", labels=LABELS[:20], split="val")
    assert pack("--index", tmp_path / "wds", workers=workers) == 0
    index = ShardIndex.load(tmp_path / "wds")
    assert index.info["splits"]["train"]["shards"] == 3 and index.info["splits"]["val"]["samples"] == 20
    assert index.image_shape == (3, 6, 5) and index.info["seed"] is None and index.name == "wds"
    for batch in walk(tmp_path / "wds", "train", 16, rank=0, world=1):
        for key, image, label in zip(batch["key"], batch["image"], batch["label"], strict=True):
            np.testing.assert_array_equal(image.permute(1, 2, 0), IMAGES[int(key)])
            assert label == LABELS[int(key)]
    stream = ShardStream(tmp_path / "wds", "train", global_batch=113, rank=0, world=1)
    assert sorted(next(iter(stream))["key"]) == [f"{i:05d}" for i in range(113)]


def test_indexing_packed_shards_again_finds_the_same_tables(npz, tmp_path, capsys):
    assert pack("npz", npz, tmp_path / "out", "--shard-size", 20) == 0
    before = files_of(tmp_path / "out")
    for path in (tmp_path / "out").glob("*.npy"):
        path.unlink()
    assert pack("--index", tmp_path / "out") == 0
    after = files_of(tmp_path / "out")
    info, again = json.loads(before.pop("index.json")), json.loads(after.pop("index.json"))
    assert before == after and info | {"seed": None} == again
    assert "kept from the previous index.json" in capsys.readouterr().out


def test_jpegs_and_other_members_are_indexed_and_nothing_is_unpickled(tmp_path, capsys):
    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "sprung"), "w")

    write_shards(tmp_path / "wds", extension="jpg", json={"a": 1}, pkl=pickle.dumps(Trap()))
    assert pack("--index", tmp_path / "wds") == 0
    assert "113 .json" in (said := capsys.readouterr().out) and "113 .pkl" in said
    assert ShardIndex.load(tmp_path / "wds").info["image"]["encoding"] == "jpg"
    assert len(packed(tmp_path / "wds")) == 113 and not (tmp_path / "sprung").exists()


def test_what_is_no_regular_image_or_label_is_counted(tmp_path):
    path = tmp_path / "train-000000.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind, data in (
            ("./", tarfile.DIRTYPE, b""),
            ("./a.png", tarfile.REGTYPE, PNG),
            ("./b.png", tarfile.SYMTYPE, b""),
            ("./c.seg.png", tarfile.REGTYPE, PNG),
            ("./.hidden.png", tarfile.REGTYPE, PNG),
            ("./README", tarfile.REGTYPE, b"text"),
            ("./d.cls", tarfile.REGTYPE, b"3"),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.size, member.linkname = kind, len(data), "a.png"
            tar.addfile(member, io.BytesIO(data))
    scan = index_shard(path)
    assert scan.members["key"].tolist() == [b"./a"] and scan.members["label"].tolist() == [-1]
    assert dict(scan.ignored) == {
        "folders": 1,
        "links and special files": 1,
        ".seg.png": 1,
        "files without a key or an extension": 2,
        ".cls without an image": 1,
    }


def test_an_empty_shard_is_a_shard(tmp_path):
    write_shards(tmp_path / "wds", labels=LABELS[:30])
    write_tar(tmp_path / "wds" / "train-000001.tar", {})
    write_tar(tmp_path / "wds" / "val-000000.tar", {})
    info, _ = build_index(tmp_path / "wds")
    assert info["splits"]["train"] | {"samples": 30, "shards": 2} == info["splits"]["train"]
    assert info["splits"]["val"]["samples"] == 0 and len(packed(tmp_path / "wds")) == 30


def test_the_split_is_in_the_name_or_said(tmp_path, capsys):
    write_tar(tmp_path / "wds" / "pictures.tar", {"a.png": PNG})
    write_tar(tmp_path / "wds" / "train-000000.tar", {"b.png": PNG})
    assert pack("--index", tmp_path / "wds") == 2
    assert "pictures.tar" in (error := capsys.readouterr().err) and "rename the files; --split would" in error
    assert pack("--index", tmp_path / "wds", "--split", "all") == 0
    assert ShardIndex.load(tmp_path / "wds").info["splits"].keys() == {"all"} and set(packed(tmp_path / "wds")) == {"a", "b"}
    assert pack("--index", tmp_path / "wds", "--split", "../all") == 2


def test_gray_among_color_is_read_as_color_and_said(tmp_path, capsys):
    gray = IMAGES[1][..., 0]
    members = {"a.png": PNG, "b.png": encoded(gray), "c.webp": encoded(IMAGES[2], "webp")}
    write_tar(tmp_path / "wds" / "train-000000.tar", members)
    assert pack("--index", tmp_path / "wds") == 0
    assert "all are read as RGB" in capsys.readouterr().out
    assert ShardIndex.load(tmp_path / "wds").info["image"] == {"shape": [3, 6, 5], "encoding": "mixed", "npy_header": None}
    np.testing.assert_array_equal(packed(tmp_path / "wds")["b"][0], gray[..., None].repeat(3, axis=2))


def test_raw_shards_are_indexed(tmp_path):
    write_tar(tmp_path / "wds" / "train-000000.tar", {f"{i}.npy": npy(IMAGES[i]) for i in range(20)})
    write_tar(tmp_path / "wds" / "train-000001.tar", {f"{i}.npy": npy(IMAGES[i]) for i in range(20, 40)})
    build_index(tmp_path / "wds")
    for key, (image, _) in packed(tmp_path / "wds").items():
        np.testing.assert_array_equal(image, IMAGES[int(key)])


WIDE = IMAGES[0][:, :4]


@pytest.mark.parametrize(
    "members, wanted",
    [
        ({"a.png": PNG, "a.jpg": PNG}, ["'a'", "several images (.png, .jpg)"]),
        ({"a.png": PNG, "b.png": encoded(WIDE)}, ["'b' is 4x6", "'a' is 5x6"]),
        ({"a.png": PNG, "b.npy": npy(IMAGES[0])}, ["'b'", "cannot be mixed"]),
        ({"a.png": PNG, "a.cls": b"cat"}, ["'a'", "integer", "cat"]),
        ({"a.png": PNG, "a.cls": b"1" * 30}, ["'a'", "integer"]),
        ({"a.png": b"not a png"}, ["'a'", "not a usable PNG"]),
        ({"a.png": encoded(IMAGES[0], "gif")}, ["'a'", "not a usable PNG"]),
        ({"a.png": PNG[:50] + bytes([PNG[50] ^ 1]) + PNG[51:]}, ["'a'", "not a usable PNG"]),
        ({"a.png": damaged_within(PNG)}, ["'a'", "not a usable PNG", "broken data stream"]),
        ({"a.jpg": encoded(IMAGES[0], "jpeg")[:-20]}, ["'a'", "not a usable PNG", "truncated"]),
        ({"a.png": encoded(IMAGES[0][..., 0].astype(np.uint16))}, ["'a'", "more than 8 bits"]),
        ({"a.npy": npy(IMAGES[0].astype(np.float32))}, ["'a'", "float32", "uint8"]),
        ({"a.npy": npy(np.asfortranarray(IMAGES[0]))}, ["'a'", "Fortran"]),
        ({"a.npy": npy(IMAGES[:2])}, ["'a'", "[2, 6, 5, 3]"]),
        ({"a.npy": npy(np.array([{}]), allow_pickle=True)}, ["'a'", "object"]),
        ({"a.npy": b"\x93NUMPY\x01\x00\x02\x00{("}, ["'a'", "not a readable .npy"]),
        ({"a.npy": npy(IMAGES[0]), "b.npy": npy(WIDE)}, ["'b'", "'a'", "header"]),
        ({"a.npy": npy(IMAGES[0]), "b.npy": npy(IMAGES[0])[:-1]}, ["'b'", "bytes"]),
        ({"a.txt": b"a", "b.json": b"{}"}, ["no image", "1 .txt"]),
    ],
)
def test_unusable_samples_are_named(members, wanted, tmp_path, capsys):
    write_tar(tmp_path / "wds" / "train-000000.tar", members)
    assert pack("--index", tmp_path / "wds") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in wanted), error
    assert not (tmp_path / "wds" / "index.json").exists()


@pytest.mark.parametrize(
    "first, second, wanted",
    [
        ({"a.png": PNG}, {"a.png": PNG}, "'a' twice (train-000000.tar, train-000001.tar)"),
        ({"a.png": PNG}, {"b.png": encoded(WIDE)}, "'b' of train-000001.tar is 4x6"),
        ({"a.png": PNG}, {"b.npy": npy(IMAGES[0])}, "cannot be mixed"),
        ({"a.npy": npy(IMAGES[0])}, {"b.npy": npy(IMAGES[0][..., :1])}, "different npy headers"),
    ],
)
def test_shards_that_do_not_fit_together_are_named(first, second, wanted, tmp_path, capsys):
    write_tar(tmp_path / "wds" / "train-000000.tar", first)
    write_tar(tmp_path / "wds" / "train-000001.tar", second)
    assert pack("--index", tmp_path / "wds") == 2
    assert wanted in capsys.readouterr().err


def test_a_key_may_come_again_in_another_split(tmp_path):
    write_tar(tmp_path / "wds" / "train-000000.tar", {"a.png": PNG})
    write_tar(tmp_path / "wds" / "val-000000.tar", {"a.png": PNG})
    assert pack("--index", tmp_path / "wds") == 0


def test_a_repeated_name_in_one_tar_is_refused(tmp_path, capsys):
    path = tmp_path / "wds" / "train-000000.tar"
    write_tar(path, {"a.png": PNG})
    with tarfile.open(path, "a") as tar:
        member = tarfile.TarInfo("a.png")
        member.size = len(PNG)
        tar.addfile(member, io.BytesIO(PNG))
    assert pack("--index", tmp_path / "wds") == 2
    assert "several images (.png, .png)" in capsys.readouterr().err


def truncated_inside_of_a_member(data: bytes) -> bytes:
    return data[: len(data) // 2 - 300]


def truncated_between_two_members(data: bytes) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return data[: tar.getmembers()[10].offset]


def with_a_broken_header(data: bytes) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        at = tar.getmembers()[10].offset + 150
    return data[:at] + b"\xff" + data[at + 1 :]


def with_another_tar_behind(data: bytes) -> bytes:
    return data + data


def empty(data: bytes) -> bytes:
    return b""


@pytest.mark.parametrize(
    "damage",
    [truncated_inside_of_a_member, truncated_between_two_members, with_a_broken_header, with_another_tar_behind, empty],
)
def test_a_damaged_tar_is_never_a_shorter_one(damage, tmp_path, capsys):
    write_shards(tmp_path / "wds")
    path = tmp_path / "wds" / "train-000001.tar"
    path.write_bytes(damage(path.read_bytes()))
    assert pack("--index", tmp_path / "wds") == 2
    assert f"{path} is truncated, damaged or not a tar file" in capsys.readouterr().err


@pytest.mark.parametrize("compression, program", [("gz", "gunzip"), ("bz2", "bunzip2"), ("xz", "unxz")])
@pytest.mark.parametrize("keep_name", [True, False])
def test_a_compressed_tar_is_an_error_that_says_how_to_unpack_it(compression, program, keep_name, tmp_path, capsys):
    path = tmp_path / ("train-000000.tar" if keep_name else f"train-000000.tar.{compression}")
    with tarfile.open(path, f"w:{compression}"):
        pass
    assert pack("--index", tmp_path) == 2
    assert str(path) in (error := capsys.readouterr().err) and program in error


def test_shards_sorted_by_class_are_warned_of(tmp_path, capsys):
    write_shards(tmp_path / "sorted", maxcount=12)
    assert pack("--index", tmp_path / "sorted") == 0
    assert "sorted by class" in capsys.readouterr().out
    assert ShardIndex.load(tmp_path / "sorted").info["splits"]["train"]["class_correlation"] > 0.9
    write_shards(tmp_path / "mixed", labels=np.arange(113) % 10, maxcount=40)
    assert pack("--index", tmp_path / "mixed") == 0
    assert "sorted by class" not in capsys.readouterr().out


def test_class_correlation_is_1_for_pure_shards_and_undefined_for_one_shard_or_class():
    assert class_correlation([np.full(n, n % 3) for n in (5, 7, 12, 9)]) == pytest.approx(1, abs=1e-12)
    assert class_correlation([np.arange(9) % 3]) is None
    assert class_correlation([np.zeros(9), np.zeros(4)]) is None
    assert class_correlation([np.full(1, i) for i in range(5)]) is None
    assert class_correlation([np.full(9, -1), np.array([], dtype=int)]) is None


def test_class_correlation_of_shuffled_shards_is_0_on_average():
    # 400 draws of a split of 200 samples: the standard error of their mean is below 0.001.
    draw = np.random.default_rng(0)
    labels = np.arange(200) % 5
    rho = [class_correlation(np.split(draw.permutation(labels), [20, 60, 110, 150])) for _ in range(400)]
    assert abs(np.mean(rho)) < 0.003


def test_class_correlation_is_the_intraclass_correlation_of_a_two_class_indicator():
    # Donner and Koval (1980), eq. 1, on a 0/1 variable; two classes count it twice, which cancels.
    draw = np.random.default_rng(1)
    shards = [(draw.random(n) < p).astype(int) for n, p in ((12, 0.2), (30, 0.5), (7, 0.9))]
    sizes = np.array([len(shard) for shard in shards])
    total, mean = sizes.sum(), np.concatenate(shards).mean()
    between = sum(len(shard) * (shard.mean() - mean) ** 2 for shard in shards) / (len(shards) - 1)
    within = sum(((shard - shard.mean()) ** 2).sum() for shard in shards) / (total - len(shards))
    n_0 = (total - (sizes**2).sum() / total) / (len(shards) - 1)
    assert class_correlation(shards) == pytest.approx((between - within) / (between + (n_0 - 1) * within), rel=1e-12)


# Verifying


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", ["train-000001.tar", "train-000000.members.npy", "validation.shards.npy"])
def test_verify_names_the_file_with_a_flipped_byte(name, workers, npz, tmp_path, capsys):
    out = tmp_path / "out"
    assert pack("npz", npz, out, "--shard-size", 50) == 0
    assert pack("--verify", out, workers=workers) == 0
    data = bytearray((out / name).read_bytes())
    data[len(data) // 2] ^= 1
    (out / name).write_bytes(data)
    capsys.readouterr()
    assert pack("--verify", out, workers=workers) == 1
    said = capsys.readouterr().out
    assert str(out / name) in said and "1 damaged" in said


def test_verify_names_everything_that_is_missing_or_wrong(npz, tmp_path):
    out = tmp_path / "out"
    assert pack("npz", npz, out, "--shard-size", 50) == 0
    assert verify(out) == []
    (out / "train-000000.tar").unlink()
    (out / "test-000000.members.npy").unlink()
    with open(out / "train-000001.tar", "ab") as file:
        file.write(b"\0")
    info = json.loads((out / "index.json").read_text())
    info["splits"]["train"]["samples"] += 1
    (out / "index.json").write_text(json.dumps(info))
    problems = "\n".join(verify(out))
    for name in ("train-000000.tar is missing", "test-000000.members.npy is missing", "train-000001.tar is damaged"):
        assert name in problems
    assert "index.json: split train has 92 samples, its table 91" in problems
    assert len(verify(out)) == 4
    for text in ("{", "[]", json.dumps(info | {"splits": [1]}), json.dumps(info | {"splits": {"train": {}}})):
        (out / "index.json").write_text(text)
        assert len(verify(out)) == 1 and "index.json" in verify(out)[0]


def test_verify_needs_no_worker_for_a_data_set_without_files(tmp_path):
    info = {"version": 1, "name": "x", "image": {"shape": [1, 2, 2], "encoding": "png", "npy_header": None}, "classes": []}
    (tmp_path / "index.json").write_text(json.dumps(info | {"splits": {}}))
    assert verify(tmp_path, workers=os.cpu_count()) == []
