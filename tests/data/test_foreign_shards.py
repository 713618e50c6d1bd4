"""Tars and parquet files as the internet has them, packed again: every image and label comes back, or is named."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from eae_dist.data.shard_index import ShardIndex
from eae_dist.data.stream import walk
from eae_dist.pack import main

IMAGES = np.random.default_rng(0).integers(0, 256, (300, 8, 8, 3), dtype=np.uint8)


def encoded(image: np.ndarray, format: str = "png", **options) -> bytes:
    data = io.BytesIO()
    Image.fromarray(image).save(data, format, **options)
    return data.getvalue()


def npy(array: np.ndarray) -> bytes:
    data = io.BytesIO()
    np.save(data, array)
    return data.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_tars(folder: Path, count: int = 3, each: int = 10, name: str = "{:05d}.tar", **more) -> dict[str, tuple[int, int]]:
    """Tars of row, key `ROW`; more: extension -> function of the row. Returns key -> (row, row % 3)."""
    for number in range(count):
        members = {}
        for row in range(number * each, number * each + each):
            members[f"{row:06d}.png"] = encoded(IMAGES[row])
            members |= {f"{row:06d}.{extension}": make(row) for extension, make in more.items()}
        write_tar(folder / name.format(number), members)
    return {f"{row:06d}": (row, row % 3) for row in range(count * each)}


def pack(*arguments, workers: int = 1) -> int:
    return main([*map(str, arguments), "--workers", str(workers)])


def packed(root: Path) -> dict[str, dict[str, tuple[np.ndarray, int]]]:
    """Split -> key -> (image [h, w, c], label)."""
    return {
        split: {
            key: (image.permute(1, 2, 0).numpy(), int(label))
            for batch in walk(root, split, 16, rank=0, world=1)
            for key, image, label in zip(batch["key"], batch["image"], batch["label"], strict=True)
        }
        for split in ShardIndex.load(root).info["splits"]
    }


def together(root: Path) -> dict[str, tuple[np.ndarray, int]]:
    return {key: sample for samples in packed(root).values() for key, sample in samples.items()}


def check(found: dict, expected: dict[str, tuple[int, int]]) -> None:
    """Every expected key has the image of its row and its label, and there is no other."""
    assert found.keys() == expected.keys()
    for key, (row, label) in expected.items():
        np.testing.assert_array_equal(found[key][0], IMAGES[row], err_msg=key)
        assert found[key][1] == label, key


def cls(row: int) -> bytes:
    return b"%d" % (row % 3)


def files_of(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.iterdir()}


@pytest.mark.parametrize("pattern", ["{00000..00002}.tar", "*.tar", "0000?.tar"])
def test_tars_are_named_by_patterns(pattern, tmp_path):
    expected = write_tars(tmp_path / "in", cls=cls)
    assert pack("webdataset", tmp_path / "in" / pattern, tmp_path / "out") == 0
    check(together(tmp_path / "out"), expected)
    assert not (tmp_path / "out.parts").exists()


def test_bytes_do_not_depend_on_workers(tmp_path):
    write_tars(tmp_path / "in", cls=cls)
    for name, workers in (("a", 1), ("b", 2)):
        assert pack("webdataset", tmp_path / "in" / "*.tar", tmp_path / name, "--shard-size", 7, workers=workers) == 0
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_images_of_all_tars_are_shuffled_and_drawn_by_class(tmp_path):
    for number in range(3):
        rows = range(100 * number, 100 * number + 100)  # a class a tar
        members = {
            f"{row:06d}.{end}": data for row in rows for end, data in (("png", encoded(IMAGES[row])), ("cls", b"%d" % number))
        }
        write_tar(tmp_path / "in" / f"{number}.tar", members)
    fractions = ["--split-fractions", "0.8,0.1,0.1"]
    assert pack("webdataset", tmp_path / "in" / "*.tar", tmp_path / "out", "--shard-size", 30, *fractions) == 0
    splits = packed(tmp_path / "out")
    counts = {split: np.bincount([label for _, label in samples.values()]).tolist() for split, samples in splits.items()}
    assert counts == {"train": [80] * 3, "validation": [10] * 3, "test": [10] * 3}
    assert abs(ShardIndex.load(tmp_path / "out").info["splits"]["train"]["class_correlation"]) < 0.1
    check(together(tmp_path / "out"), {f"{row:06d}": (row, row // 100) for row in range(300)})


@pytest.mark.parametrize("text", ["0.9,0.1", "0.5,0.5,0.5", "1,0,0", "a,b,c", "0.9,0.05,0.06"])
def test_fractions_are_three_and_sum_to_1(text, capsys):
    with pytest.raises(SystemExit):
        main(["webdataset", "a.tar", "out", "--split-fractions", text])
    assert "three positive fractions that sum to 1" in capsys.readouterr().err


def test_splits_in_the_names_of_tars_are_kept(tmp_path):
    for split, start in (("train", 0), ("val", 100), ("test", 200)):
        members = {f"{row:06d}.png": encoded(IMAGES[row]) for row in range(start, start + 12)}
        write_tar(tmp_path / "in" / f"{split}-0000.tar", members)
    assert pack("webdataset", tmp_path / "in" / "*.tar", tmp_path / "out") == 0
    for split, start in (("train", 0), ("validation", 100), ("test", 200)):
        check(packed(tmp_path / "out")[split], {f"{row:06d}": (row, -1) for row in range(start, start + 12)})
    assert pack("--index", tmp_path / "in") == 0
    assert ShardIndex.load(tmp_path / "in").info["splits"].keys() == {"train", "val", "test"}
    write_tar(tmp_path / "in" / "more.tar", {"a.png": encoded(IMAGES[50])})
    assert pack("webdataset", tmp_path / "in" / "*.tar", tmp_path / "b") == 2


@pytest.mark.parametrize(
    "key, make, classes",
    [
        ("json:label", lambda row: {"label": row % 3}, []),
        ("json:label", lambda row: {"label": "abc"[row % 3]}, ["a", "b", "c"]),
        ("json:meta.class", lambda row: {"meta": {"class": "abc"[row % 3]}}, ["a", "b", "c"]),
        ("json:label", lambda row: {"label": str(row % 3)}, []),
    ],
)
def test_labels_in_json_are_read(key, make, classes, tmp_path):
    expected = write_tars(tmp_path / "in", json=lambda row: json.dumps(make(row)).encode())
    assert pack("webdataset", tmp_path / "in" / "*.tar", tmp_path / "out", "--label-key", key) == 0
    check(together(tmp_path / "out"), expected)
    assert ShardIndex.load(tmp_path / "out").classes == classes


def test_labels_in_text_are_names_of_classes(tmp_path):
    expected = write_tars(tmp_path / "in", txt=lambda row: b"ant bee cow".split()[row % 3] + b"\n", cls=lambda row: b"7")
    assert pack("webdataset", tmp_path / "in" / "*.tar", tmp_path / "out", "--label-key", "txt") == 0
    check(together(tmp_path / "out"), expected)
    assert ShardIndex.load(tmp_path / "out").classes == ["ant", "bee", "cow"]


@pytest.mark.parametrize(
    "make, wanted",
    [
        (lambda row: b'{"class": 1, "url": "x"}', "no sample has the label json:label; a .json holds class, url"),
        (lambda row: b'{"label": [1]}', "its .json: its label is [1], expected a number or a text"),
        (lambda row: b'{"label": ', "its .json: Expecting value"),
        (lambda row: b'{"label": 1}' if row else b'{"label": "a"}', "some are numbers (1), some are texts ('a')"),
        (lambda row: b'{"label": -5}', "go from -5 to -5"),
    ],
)
def test_labels_that_are_none_are_one_line(make, wanted, tmp_path, capsys):
    write_tars(tmp_path / "in", json=make)
    assert pack("webdataset", tmp_path / "in" / "*.tar", tmp_path / "out", "--label-key", "json:label") == 2
    error = capsys.readouterr().err
    assert wanted in error and error.count("\n") == 1


def test_images_without_a_label_are_counted(tmp_path, capsys):
    write_tars(tmp_path / "in", json=lambda row: b"{}" if row < 4 else b'{"label": 1}')
    assert pack("webdataset", tmp_path / "in" / "*.tar", tmp_path / "out", "--label-key", "json:label") == 0
    assert "4 images have no label" in capsys.readouterr().out
    assert {key for key, (_, label) in together(tmp_path / "out").items() if label == -1} == {f"{row:06d}" for row in range(4)}


def test_images_of_all_sizes_and_formats_are_resized(tmp_path, capsys):
    members, expected = {}, {}
    for row, (format, size) in enumerate((f, s) for f in ("png", "jpeg", "webp", "gif", "bmp") for s in ((20, 30), (9, 17))):
        image = Image.fromarray(np.random.default_rng(row).integers(0, 256, (*size, 3), dtype=np.uint8))
        data = io.BytesIO()
        image.save(data, format)
        members[f"{row}.{format}"] = data.getvalue()
        pixels = Image.open(io.BytesIO(data.getvalue())).convert("RGB")
        side = min(size)
        left, top = (size[1] - side) // 2, (size[0] - side) // 2
        expected[str(row)] = np.array(pixels.crop((left, top, left + side, top + side)).resize((8, 8), Image.Resampling.BILINEAR))
    array = np.random.default_rng(99).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    members["99.npy"], expected["99"] = npy(array), array
    write_tar(tmp_path / "in" / "a.tar", members)
    assert pack("webdataset", tmp_path / "in" / "a.tar", tmp_path / "out") == 2
    assert "0 is 30x20" in (error := capsys.readouterr().err) and "give --size N" in error
    assert pack("webdataset", tmp_path / "in" / "a.tar", tmp_path / "out", "--size", 8) == 0
    found = together(tmp_path / "out")
    assert found.keys() == expected.keys()
    for key, pixels in expected.items():
        np.testing.assert_array_equal(found[key][0], pixels, err_msg=key)


def test_indexing_tars_of_several_sizes_names_the_command_that_reads_them(tmp_path, capsys):
    write_tar(tmp_path / "in" / "train-000000.tar", {"a.png": encoded(IMAGES[0]), "b.png": encoded(IMAGES[1][:4])})
    assert pack("--index", tmp_path / "in") == 2
    assert "`pack webdataset TARS... OUT --size N`" in capsys.readouterr().err


def test_keys_with_dots_are_explained_and_read(tmp_path, capsys):
    members = {f"img.{row:03d}.png": encoded(IMAGES[row]) for row in range(300)}
    write_tar(tmp_path / "in" / "train-000000.tar", members)
    for arguments in (["--index", tmp_path / "in"], ["webdataset", tmp_path / "in" / "train-000000.tar", tmp_path / "out"]):
        assert pack(*arguments) == 2
        error = capsys.readouterr().err
        assert (
            len(error) < 600 and "300 images with a dot before the extension (KEY.000.png)" in error and "--dots-in-keys" in error
        )
    assert pack("webdataset", tmp_path / "in" / "train-000000.tar", tmp_path / "again", "--dots-in-keys") == 0
    check(together(tmp_path / "again"), {f"img.{row:03d}".replace(".", "_"): (row, -1) for row in range(300)})


@pytest.mark.parametrize(
    "name",
    [
        "1.5-{}",
        "img.{}",
        "{}.final",
        "a.b.c.{}",
        "v1.0/{}",
        "v1.0/x.{}",
        "2024.01.02-{}",
        "{}.jpg.aug",
        "{}.cls",
        "é.{}",
        "x.{}.orig",
    ],
)
def test_keys_with_dots_are_told_apart_by_their_last_dot(name, tmp_path):
    members = {f"{name.format(row)}.png": encoded(IMAGES[row]) for row in range(12)}
    members |= {f"{name.format(row)}.cls": cls(row) for row in range(12)}
    write_tar(tmp_path / "in" / "a.tar", members)
    assert pack("webdataset", tmp_path / "in" / "a.tar", tmp_path / "out", "--dots-in-keys") == 0
    folder, slash, base = name.rpartition("/")
    key = folder + slash + base.replace(".", "_")
    check(together(tmp_path / "out"), {key.format(row): (row, row % 3) for row in range(12)})


BROKEN = {
    "cut.png": encoded(IMAGES[0])[:60],
    "flipped.png": encoded(IMAGES[0])[:70] + b"\xff" + encoded(IMAGES[0])[71:],
    "cut.jpg": encoded(IMAGES[0], "jpeg")[:300],
    "cut.webp": encoded(IMAGES[0], "webp", lossless=True)[:100],
    "empty.png": b"",
    "text.png": b"<!DOCTYPE html>",
    "pdf.jpg": b"%PDF-1.4",
    "short.npy": npy(IMAGES[0])[:-5],
    "object.npy": b"\x93NUMPY\x01\x00garbage",
    "moves.webp": encoded(IMAGES[0], "webp", save_all=True, append_images=[Image.fromarray(IMAGES[1])]),
    "deep.png": (lambda data: (Image.new("I;16", (8, 8), 300).save(data, "png"), data.getvalue())[1])(io.BytesIO()),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_image_behind_good_ones_is_never_indexed_and_can_be_left_out(name, tmp_path, capsys):
    npys = name.endswith(".npy")
    good = {f"{row:03d}.{'npy' if npys else 'png'}": npy(IMAGES[row]) if npys else encoded(IMAGES[row]) for row in range(120)}
    write_tar(tmp_path / "in" / "train-000000.tar", good | {f"{name}": BROKEN[name]})
    assert pack("--index", tmp_path / "in") == 2
    error = capsys.readouterr().err
    assert f"'{name.partition('.')[0]}'" in error and "train-000000.tar" in error and error.count("\n") == 1
    assert npys or "`pack webdataset TARS... OUT --skip-bad`" in error
    assert pack("webdataset", tmp_path / "in" / "train-000000.tar", tmp_path / "out", "--skip-bad") == 0
    check(together(tmp_path / "out"), {f"{row:03d}": (row, -1) for row in range(120)})


def test_lists_of_other_members_name_five_kinds(tmp_path, capsys):
    members = (
        {"a.png": encoded(IMAGES[0])} | {f"a.kind{'x' * n}": b"" for n in range(900)} | {f"{n}.json": b"" for n in range(50)}
    )
    write_tar(tmp_path / "in" / "train-000000.tar", members)
    assert pack("--index", tmp_path / "in") == 0
    said = capsys.readouterr().out
    left = next(line for line in said.splitlines() if "members left alone" in line)
    assert "50 .json" in left and "896 of 896 other kinds" in left and len(left) < 400


def test_one_bad_image_is_named_and_left_out_when_asked(tmp_path, capsys):
    expected = write_tars(tmp_path / "in", cls=cls)
    bad = {"x.png": b"not an image", "y.png": encoded(IMAGES[0])[:60], "z.jpg": encoded(IMAGES[0], "jpeg")[:300]}
    write_tar(tmp_path / "in" / "90000.tar", bad | {"000200.png": encoded(IMAGES[200])})
    pattern = tmp_path / "in" / "*.tar"
    assert pack("webdataset", pattern, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "3 of 34 samples are not usable images" in error and "--skip-bad" in error and error.count("\n") == 1
    assert pack("webdataset", pattern, tmp_path / "out", "--skip-bad") == 0
    said = capsys.readouterr().out
    assert all(f"90000.tar/{key} (" in said for key in "xyz") and "4 of 4 files had been converted by an interrupted pack" in said
    check(together(tmp_path / "out"), expected | {"000200": (200, -1)})


@pytest.mark.parametrize(
    "members, wanted",
    [
        ({"a.png": encoded(IMAGES[0]), "a.jpg": encoded(IMAGES[0], "jpeg")}, "several images (.png, .jpg); --image-key"),
        ({"a.npy": npy(IMAGES[0].astype(np.float32))}, "an array float32; `pack --scale LOW:HIGH`"),
        ({"a.npy": npy(np.zeros((2, 8, 8, 3), np.uint8))}, "an array uint8 [2, 8, 8, 3]"),
        ({"a.npy": b"\x93NUMPY"}, "not a readable .npy file"),
        ({"a.txt": b"a"}, "no usable image in a.tar: members left alone: 1 .txt"),
    ],
)
def test_unusable_samples_are_named(members, wanted, tmp_path, capsys):
    write_tar(tmp_path / "in" / "a.tar", members)
    assert pack("webdataset", tmp_path / "in" / "a.tar", tmp_path / "out") == 2
    assert wanted in (error := capsys.readouterr().err) and error.count("\n") == 1


def test_the_image_of_a_sample_can_be_chosen(tmp_path):
    members = {}
    for row in range(12):
        members |= {
            f"{row}.input.png": encoded(IMAGES[row]),
            f"{row}.target.png": encoded(IMAGES[row + 100]),
            f"{row}.cls": cls(row),
        }
    write_tar(tmp_path / "in" / "a.tar", members)
    for name, more in (("input", 0), ("target", 100)):
        assert pack("webdataset", tmp_path / "in" / "a.tar", tmp_path / name, "--image-key", f"{name}.png") == 0
        check(together(tmp_path / name), {str(row): (row + more, row % 3) for row in range(12)})


def test_labels_may_stand_anywhere_in_a_tar(tmp_path):
    images = {f"{row}.png": encoded(IMAGES[row]) for row in range(20)}
    labels = {f"{row}.cls": cls(row) for row in range(20)}
    write_tar(tmp_path / "in" / "a.tar", dict(list(labels.items())[:10]) | images | labels)
    assert pack("webdataset", tmp_path / "in" / "a.tar", tmp_path / "out") == 0
    check(together(tmp_path / "out"), {str(row): (row, row % 3) for row in range(20)})


def test_keys_that_tars_share_get_the_name_of_the_tar(tmp_path, capsys):
    for number in range(2):
        members = {f"{i}.png": encoded(IMAGES[100 * number + i]) for i in range(10)}
        write_tar(tmp_path / "in" / f"part-{number}.tar", members)
    assert pack("webdataset", tmp_path / "in" / "*.tar", tmp_path / "out") == 0
    check(together(tmp_path / "out"), {f"part-{n}/{i}": (100 * n + i, -1) for n in range(2) for i in range(10)})
    assert "files share keys" in capsys.readouterr().out


def test_a_truncated_tar_is_named_and_what_stands_before_is_kept_when_asked(tmp_path, capsys):
    expected = write_tars(tmp_path / "in")
    path = tmp_path / "in" / "00002.tar"
    with tarfile.open(path) as tar:
        end = tar.getmembers()[4].offset + 700
    path.write_bytes(path.read_bytes()[:end])
    assert pack("webdataset", tmp_path / "in" / "*.tar", tmp_path / "out") == 2
    assert "00002.tar is truncated, damaged or not a tar file" in capsys.readouterr().err
    assert pack("webdataset", tmp_path / "in" / "*.tar", tmp_path / "out", "--skip-bad") == 0
    assert "00002.tar/(end)" in capsys.readouterr().out
    check(together(tmp_path / "out"), {key: (row, -1) for key, (row, _) in expected.items() if row < 24})


def test_gray_and_color_are_mixed_as_stated(tmp_path, capsys):
    members = {f"{row}.png": encoded(IMAGES[row]) for row in range(8)} | {
        f"g{row}.png": encoded(IMAGES[row][..., 0]) for row in range(4)
    }
    write_tar(tmp_path / "in" / "a.tar", members)
    assert pack("webdataset", tmp_path / "in" / "a.tar", tmp_path / "out") == 0
    assert "4 gray and 8 color images are mixed: all are read as RGB" in ShardIndex.load(tmp_path / "out").info["preprocessing"]
    found = together(tmp_path / "out")
    np.testing.assert_array_equal(found["g1"][0], IMAGES[1][..., :1].repeat(3, axis=2))
    np.testing.assert_array_equal(found["1"][0], IMAGES[1])
    assert pack("webdataset", tmp_path / "in" / "a.tar", tmp_path / "raw", "--format", "raw") == 2
    assert "give --channels 3 or --channels 1" in capsys.readouterr().err
    assert pack("webdataset", tmp_path / "in" / "a.tar", tmp_path / "raw3", "--format", "raw", "--channels", 3) == 0
    np.testing.assert_array_equal(together(tmp_path / "raw3")["g1"][0], IMAGES[1][..., :1].repeat(3, axis=2))


# Interrupted


class Server(ThreadingHTTPServer):
    """Serves a folder and counts what it was asked for."""

    def __init__(self, root: Path):
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(root)))
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self.server.asked.append(self.path.lstrip("/"))
        super().do_GET()


def test_tars_at_an_address_are_fetched_once_and_a_stopped_pack_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    expected = write_tars(tmp_path / "in", cls=cls)
    missing = tmp_path / "in" / "00002.tar"
    aside = missing.rename(tmp_path / "aside.tar")
    server = Server(tmp_path / "in")
    try:
        arguments = ["webdataset", f"http://127.0.0.1:{server.server_port}/{{00000..00002}}.tar", tmp_path / "out"]
        assert pack(*arguments, "--set", "data.retries=0") == 2
        assert "00002.tar could not be fetched" in capsys.readouterr().err and not (tmp_path / "out").exists()
        aside.rename(missing)
        assert pack(*arguments) == 0
    finally:
        server.shutdown()
        server.server_close()
    assert "2 of 3 files had been converted by an interrupted pack" in capsys.readouterr().out
    assert server.asked.count("00000.tar") == server.asked.count("00001.tar") == 1
    check(together(tmp_path / "out"), expected)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "home") == ["in", "out"]


KILLED = """
import os, signal, sys
from eae_dist import pack
from eae_dist.data.sources import parts

done = parts.replace_file

def replaced(path, data):
    done(path, data)
    if path.name == "000001.json":
        os.kill(os.getpid(), signal.SIGKILL)

parts.replace_file = replaced
sys.exit(pack.main(sys.argv[1:]))
"""


def killed_pack(folder: Path, *options: str) -> Path:
    """Packs the tars of a folder into `out` beside it, and is killed in the second; returns out.parts."""
    command = ["webdataset", str(folder / "*.tar"), str(folder.parent / "out"), "--workers", "1", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", KILLED, *command], env=environment, capture_output=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL
    return folder.parent / "out.parts"


def test_a_killed_pack_goes_on_with_the_same_bytes_and_converts_changed_tars_again(tmp_path, capsys):
    write_tars(tmp_path / "in", cls=cls)
    parts = killed_pack(tmp_path / "in")
    assert not (tmp_path / "out").exists() and (parts / "000001.json").exists()
    os.utime(tmp_path / "in" / "00000.tar")
    assert pack("webdataset", tmp_path / "in" / "*.tar", tmp_path / "out") == 0
    assert "1 of 3 files had been converted by an interrupted pack" in capsys.readouterr().out
    assert pack("webdataset", tmp_path / "in" / "*.tar", tmp_path / "whole") == 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_parts_of_another_pack_are_not_taken(tmp_path, capsys):
    write_tars(tmp_path / "in", cls=cls)
    parts = killed_pack(tmp_path / "in")
    arguments = ["webdataset", tmp_path / "in" / "*.tar", tmp_path / "out"]
    for options, differ in ((["--size", 4, "--label-key", "txt"], "fit, label_key"), (["--format", "webp"], "encoding")):
        assert pack(*arguments, *options) == 2
        assert f"with other options ({differ}); give the same, or remove" in capsys.readouterr().err
    report = parts / "000000.json"
    report.write_text(report.read_text().replace('"bytes"', '"bites"', 1))
    assert pack(*arguments) == 2
    assert "000000.json cannot be read (it does not match its checksum); remove it" in capsys.readouterr().err
    (tmp_path / "b.parts").mkdir()
    (tmp_path / "b.parts" / "thesis.txt").write_text("precious")
    assert pack("webdataset", tmp_path / "in" / "*.tar", tmp_path / "b") == 2
    assert "b.parts is in the way and was not created by pack" in capsys.readouterr().err


@pytest.mark.parametrize("format", ["png", "jpeg", "raw"])
def test_a_damaged_image_of_an_interrupted_pack_is_named_and_converted_again(format, tmp_path, capsys):
    write_tars(tmp_path / "in", cls=cls)
    parts = killed_pack(tmp_path / "in", "--format", format)
    images = bytearray((parts / "000000.images").read_bytes())
    images[-3] ^= 1  # of an array this changes a pixel, and nothing else would notice
    (parts / "000000.images").write_bytes(images)
    arguments = ["webdataset", tmp_path / "in" / "*.tar", tmp_path / "out", "--format", format]
    assert pack(*arguments) == 2
    error = capsys.readouterr().err
    assert f"{parts}/000000.images is damaged; remove {parts}/000000.json" in error and error.count("error:") == 1
    (parts / "000000.json").unlink()
    assert pack(*arguments) == 0
    assert pack(*arguments[:2], tmp_path / "whole", "--format", format) == 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@pytest.mark.parametrize(
    "members, options, advised",
    [
        ({"a.b.png": 0, "c.d.png": 1}, [], ["--dots-in-keys"]),
        ({"a.png": 0, "a.jpg": 1}, [], ["--image-key", "png"]),
        ({"a.png": 0, "b.png": (4, 4)}, [], ["--size", "4"]),
        ({"a.json": b'{"kind": 1}', "a.png": 0}, ["--label-key", "json:label"], ["--label-key", "json:kind"]),
    ],
)
def test_what_an_error_advises_can_be_done_at_once(members, options, advised, tmp_path, capsys):
    files = {}
    for number in range(20):
        for name, what in members.items():
            image = IMAGES[number, :4, :4] if isinstance(what, tuple) else IMAGES[number]
            files[f"{number:03d}{name}"] = (
                what if isinstance(what, bytes) else encoded(image, Path(name).suffix[1:].replace("jpg", "jpeg"))
            )
    write_tar(tmp_path / "in" / "a.tar", files)
    arguments = ["webdataset", tmp_path / "in" / "a.tar", tmp_path / "out"]
    assert pack(*arguments, *options) == 2
    assert advised[0] in capsys.readouterr().err
    assert pack(*arguments, *advised) == 0
    assert not (tmp_path / "out.parts").exists()
    assert len(together(tmp_path / "out")) == 20 * sum(name.endswith(".png") for name in members)


@pytest.mark.parametrize(
    "tars, wanted",
    [("nothing.tar", "nothing.tar is not a file"), ("{1..", "braces do not match"), ("no*.tar", "no*.tar is not a file")],
)
def test_wrong_tars_are_one_line(tars, wanted, tmp_path, capsys):
    assert pack("webdataset", tmp_path / tars, tmp_path / "out") == 2
    assert wanted in (error := capsys.readouterr().err) and error.count("\n") == 1
    assert not (tmp_path / "out.parts").exists()


# What indexing says of shards that do not fit as they are


def test_indexing_advises_on_labels_in_json_and_a_lone_split(tmp_path, capsys):
    write_tars(tmp_path / "in", name="train-{:06d}.tar", json=lambda row: b'{"label": 1}')
    assert pack("--index", tmp_path / "in") == 0
    said = capsys.readouterr().out
    assert "`pack webdataset --label-key json:FIELD` reads labels from .json" in said
    assert "all images are in the split train" in said and "--split-fractions 0.8,0.1,0.1" in said


# Parquet


def write_parquet(path: Path, columns: dict, metadata: dict | None = None) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    pq.write_table(table.replace_schema_metadata(metadata or {}), path, row_group_size=7)


def records(rows: range) -> list[dict]:
    return [{"bytes": encoded(IMAGES[row]), "path": None} for row in rows]


def rows_by_pixels(root: Path) -> dict[str, dict[int, int]]:
    rows = {image.tobytes(): row for row, image in enumerate(IMAGES)}
    return {split: {rows[image.tobytes()]: label for image, label in samples.values()} for split, samples in packed(root).items()}


@pytest.mark.parametrize(
    "names",
    [
        ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"),
        ("train/0000.parquet", "train/0001.parquet", "test/0000.parquet"),
        ("Train-1.parquet", "Train-2.parquet", "testing.parquet"),
    ],
)
def test_parquet_files_of_the_hub_are_read(names, tmp_path, capsys):
    features = {"info": {"features": {"label": {"names": ["ant", "bee", "cow"]}}}}
    for number, name in enumerate(names):
        rows = range(100 * number, 100 * number + 20)
        columns = {"image": records(rows), "label": [row % 3 for row in rows], "caption": ["x"] * 20}
        write_parquet(tmp_path / "in" / name, columns, {"huggingface": json.dumps(features)})
    assert pack("parquet", tmp_path / "in", tmp_path / "out") == 0
    found = rows_by_pixels(tmp_path / "out")
    assert found["test"] == {row: row % 3 for row in range(200, 220)}
    assert found["train"] | found["validation"] == {row: row % 3 for row in (*range(20), *range(100, 120))}
    assert ShardIndex.load(tmp_path / "out").classes == ["ant", "bee", "cow"]
    assert "images are in the column image, labels in label; left out: caption" in capsys.readouterr().out


def test_columns_of_parquet_can_be_named_and_texts_are_classes(tmp_path, capsys):
    rows = range(30)
    columns = {"photo": [encoded(IMAGES[row]) for row in rows], "mask": [b""] * 30, "kind": ["abc"[row % 3] for row in rows]}
    write_parquet(tmp_path / "in" / "all.parquet", columns)
    assert pack("parquet", tmp_path / "in", tmp_path / "out") == 2
    assert "the columns photo, mask can all hold images; name it with --image-column" in capsys.readouterr().err
    options = ["--image-column", "photo", "--label-column", "kind", "--split-fractions", "0.6,0.2,0.2"]
    assert pack("parquet", tmp_path / "in", tmp_path / "out", *options) == 0
    found = rows_by_pixels(tmp_path / "out")
    assert {split: len(part) for split, part in found.items()} == {"train": 18, "validation": 6, "test": 6}
    assert found["train"] | found["validation"] | found["test"] == {row: row % 3 for row in rows}
    assert ShardIndex.load(tmp_path / "out").classes == ["a", "b", "c"]
    assert pack("parquet", tmp_path / "in", tmp_path / "b", "--image-column", "x") == 2
    assert "--image-column x: " in (error := capsys.readouterr().err) and "photo, mask, kind" in error


def test_bad_rows_of_parquet_are_named(tmp_path, capsys):
    columns = {"image": [*records(range(20)), {"bytes": None, "path": "gone.jpg"}, {"bytes": b"x", "path": None}]}
    write_parquet(tmp_path / "in" / "train.parquet", columns)
    assert pack("parquet", tmp_path / "in", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "a path without the image's bytes (gone.jpg)" in error and "train/000021 (not an image)" in error
    assert pack("parquet", tmp_path / "in", tmp_path / "out", "--skip-bad") == 0
    assert sorted(row for part in rows_by_pixels(tmp_path / "out").values() for row in part) == list(range(20))


def test_wrong_parquet_folders_are_one_line(tmp_path, capsys, monkeypatch):
    pytest.importorskip("pyarrow")
    (tmp_path / "in").mkdir()
    assert pack("parquet", tmp_path / "in", tmp_path / "out") == 2
    assert "holds no .parquet file" in capsys.readouterr().err
    (tmp_path / "in" / "a.parquet").write_bytes(b"PAR1 nothing")
    assert pack("parquet", tmp_path / "in", tmp_path / "out") == 2
    assert "is damaged or not a parquet file" in capsys.readouterr().err
    write_parquet(tmp_path / "in" / "a.parquet", {"x": [1, 2]})
    assert pack("parquet", tmp_path / "in", tmp_path / "out") == 2
    assert "none of x holds images" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert pack("parquet", tmp_path / "in", tmp_path / "out") == 2
    assert "pip install -e '.[parquet]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00001.parquet", "train"),
        ("data/train-00000-of-00001.parquet", "train"),
        ("data/validation-00003-of-00004.parquet", "validation"),
        ("data/valid-00000-of-00001.parquet", "validation"),
        ("default/test/0000.parquet", "test"),
        ("plain_text/partial-train/0000.parquet", None),
        ("train.parquet", "train"),
        ("Test.parquet", "test"),
        ("dev/part-0.parquet", "validation"),
        ("0000.parquet", None),
        ("mnist/0000.parquet", None),
    ],
)
def test_the_split_of_a_parquet_file_is_in_its_name_or_its_folders(name, split):
    pytest.importorskip("pyarrow")
    from eae_dist.data.sources.parquet import split_of_file

    assert split_of_file(name) == split


@pytest.mark.parametrize("kind", ["binary", "large_binary", "struct"])
@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd"])
def test_parquet_files_of_any_writer_are_read(kind, compression, tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    data = [encoded(IMAGES[row]) for row in range(30)]
    column = {
        "binary": lambda: pa.array(data, pa.binary()),
        "large_binary": lambda: pa.array(data, pa.large_binary()),
        "struct": lambda: pa.array([{"bytes": one, "path": None} for one in data]),
    }[kind]()
    (tmp_path / "in").mkdir()
    table = pa.table({"img": column, "label": [row % 3 for row in range(30)]})
    pq.write_table(table, tmp_path / "in" / "a.parquet", compression=compression, row_group_size=7)
    assert pack("parquet", tmp_path / "in", tmp_path / "out") == 0
    check(together(tmp_path / "out"), {f"a/{row:06d}": (row, row % 3) for row in range(30)})
