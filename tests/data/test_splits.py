"""Splits by the names of folders, arrays and shards: understood, said, or refused, but never taken for classes in silence."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eae_dist.data.shard_index import ShardIndex, split_in_name
from eae_dist.data.sources.arrays import role_of
from eae_dist.data.split_names import looks_like_split, split_called
from eae_dist.data.stream import walk
from eae_dist.pack import main

IMAGES = np.random.default_rng(0).integers(0, 256, (400, 4, 4, 3), dtype=np.uint8)


def write_images(folder: Path, rows: range) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        Image.fromarray(IMAGES[row]).save(folder / f"{row}.png")


def pack(*arguments) -> int:
    return main([*map(str, arguments), "--workers", "1"])


def packed(root: Path) -> dict[str, dict[int, str | None]]:
    """Split -> row of IMAGES, found by its pixels -> the name of its class."""
    rows = {image.tobytes(): row for row, image in enumerate(IMAGES)}
    index, found = ShardIndex.load(root), {}
    for split in index.info["splits"]:
        found[split] = {}
        for batch in walk(root, split, 16, rank=0, world=1):
            for image, label in zip(batch["image"], batch["label"].tolist(), strict=True):
                row = rows[image.permute(1, 2, 0).contiguous().numpy().tobytes()]
                found[split][row] = (index.classes or range(1000))[label] if label >= 0 else None
    return found


@pytest.mark.parametrize(
    "train, validation, test",
    [
        ("train", "val", "test"),
        ("Train", "Val", "Test"),
        ("training", "validation", "testing"),
        ("TRAIN", "VALID", "TEST"),
        ("train", "dev", "test"),
        ("Training", "Valid", "Testing"),
        ("train_set", "valid_set", "test_set"),
        ("trainset", "devset", "testset"),
        ("Train Set", "Validation Set", "Test Set"),
        ("photos/train", "photos/val", "photos/test"),
        ("a/b/Train", "a/b/Dev", "a/b/Test"),
    ],
)
def test_usual_names_of_splits_are_understood_and_said(train, validation, test, tmp_path, capsys):
    for folder, start in ((train, 0), (validation, 100), (test, 200)):
        write_images(tmp_path / "in" / folder / "cat", range(start, start + 4))
        write_images(tmp_path / "in" / folder / "dog", range(start + 4, start + 8))
    assert pack("imagefolder", tmp_path / "in", tmp_path / "out") == 0
    expected = {
        split: {start + i: "cat" if i < 4 else "dog" for i in range(8)}
        for split, start in (("train", 0), ("validation", 100), ("test", 200))
    }
    assert packed(tmp_path / "out") == expected
    said = capsys.readouterr().out
    if (train, validation, test) != ("train", "validation", "test"):
        assert f"{train}/ is train" in said and f"{validation}/ is validation" in said and f"{test}/ is test" in said


def test_missing_splits_are_drawn_from_train_alone(tmp_path):
    write_images(tmp_path / "in" / "Train", range(30))
    write_images(tmp_path / "in" / "Test", range(100, 105))
    assert pack("imagefolder", tmp_path / "in", tmp_path / "out") == 0
    found = packed(tmp_path / "out")
    assert set(found["test"]) == set(range(100, 105)) and set(found["train"]) | set(found["validation"]) == set(range(30))
    assert len(found["validation"]) == 3


@pytest.mark.parametrize(
    "folders, wanted",
    [
        (["train", "test", "cat"], "some folders have names of splits (test, train), others do not (cat)"),
        (["Train", "holdout"], "some folders have names of splits (Train), others do not (holdout)"),
        (["test", "val"], "test, val and no folder for train"),
        (["test"], "test and no folder for train"),
        (["train", "val", "valid"], "both val/ and valid/, which mean validation"),
        (["train", "Train", "test"], "both Train/ and train/, which mean train"),
        (["seg_train", "seg_test"], "seg_test, seg_train look like splits"),
        (["train2017", "val2017"], "train2017, val2017 look like splits"),
        (["images-train", "images-test"], "images-test, images-train look like splits"),
        (["cat/train", "cat/test", "dog/train", "dog/test"], "cat/test, cat/train, dog/test, dog/train look like splits inside"),
        (["train/train", "test/test"], "folders inside of a split have names of splits (test/test, train/train)"),
    ],
)
@pytest.mark.parametrize("options", [[], ["--skip-bad"]])
def test_what_may_be_a_split_is_never_taken_for_a_class(folders, wanted, options, tmp_path, capsys):
    for number, folder in enumerate(folders):
        write_images(tmp_path / "in" / folder, range(20 * number, 20 * number + 20))
    assert pack("imagefolder", tmp_path / "in", tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert wanted in error and "--classes" in error and "--splits" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_splits_can_be_named(tmp_path, capsys):
    write_images(tmp_path / "in" / "seg_train" / "seg_train" / "sea", range(20))
    write_images(tmp_path / "in" / "seg_train" / "seg_train" / "ice", range(20, 40))
    write_images(tmp_path / "in" / "seg_test" / "seg_test" / "sea", range(100, 103))
    write_images(tmp_path / "in" / "seg_pred", range(200, 204))
    splits = "train=seg_train/seg_train,test=seg_test/seg_test"
    assert pack("imagefolder", tmp_path / "in", tmp_path / "out", "--splits", splits) == 0
    found = packed(tmp_path / "out")
    assert found["test"] == dict.fromkeys(range(100, 103), "sea")
    assert found["train"] | found["validation"] == dict.fromkeys(range(20), "sea") | dict.fromkeys(range(20, 40), "ice")
    assert "4 files outside of seg_train/seg_train/ and seg_test/seg_test/ were not looked at" in capsys.readouterr().out


def test_a_class_called_train_has_a_way(tmp_path):
    for number, name in enumerate(("car", "train", "test tube")):
        write_images(tmp_path / "in" / name, range(20 * number, 20 * number + 20))
    assert pack("imagefolder", tmp_path / "in", tmp_path / "out") == 2
    assert pack("imagefolder", tmp_path / "in", tmp_path / "out", "--classes") == 0
    assert ShardIndex.load(tmp_path / "out").classes == ["car", "test tube", "train"]
    together = {row: name for samples in packed(tmp_path / "out").values() for row, name in samples.items()}
    assert together == {row: ("car", "train", "test tube")[row // 20] for row in range(60)}
    for split, start in (("train", 100), ("test", 200)):
        write_images(tmp_path / "both" / split / "car", range(start, start + 20))
        write_images(tmp_path / "both" / split / "train", range(start + 20, start + 40))
    assert pack("imagefolder", tmp_path / "both", tmp_path / "b", "--splits", "train=train,test=test") == 0
    assert packed(tmp_path / "b")["test"] == {row: "car" if row < 220 else "train" for row in range(200, 240)}


@pytest.mark.parametrize(
    "splits, wanted",
    [
        ("train=nothing", "--splits names nothing, which is not a folder"),
        ("train=a,test=a/b", "splits cannot hold each other"),
        ("train=a,test=a", "splits cannot hold each other"),
    ],
)
def test_wrong_names_of_splits_are_one_line(splits, wanted, tmp_path, capsys):
    write_images(tmp_path / "in" / "a" / "b", range(20))
    assert pack("imagefolder", tmp_path / "in", tmp_path / "out", "--splits", splits) == 2
    assert wanted in capsys.readouterr().err


@pytest.mark.parametrize("splits", ["test=a", "train", "train=", "train=a,holdout=b", "train=a,train=b"])
def test_splits_are_train_validation_and_test(splits, capsys):
    with pytest.raises(SystemExit):
        main(["imagefolder", "in", "out", "--splits", splits])
    assert "expected train=FOLDER" in capsys.readouterr().err


def test_an_empty_class_folder_keeps_its_number_and_is_named(tmp_path, capsys):
    for split, start in (("train", 0), ("test", 100)):
        write_images(tmp_path / "in" / split / "ant", range(start, start + 10))
        write_images(tmp_path / "in" / split / "cow", range(start + 10, start + 20))
    (tmp_path / "in" / "train" / "bee").mkdir()
    write_images(tmp_path / "in" / "test" / "dog", range(120, 122))
    assert pack("imagefolder", tmp_path / "in", tmp_path / "out") == 0
    assert ShardIndex.load(tmp_path / "out").classes == ["ant", "bee", "cow", "dog"]
    test = {row: "ant" if row < 110 else "cow" if row < 120 else "dog" for row in range(100, 122)}
    assert packed(tmp_path / "out")["test"] == test
    said = capsys.readouterr().out
    assert "classes without an image, which keep their numbers: bee" in said
    assert "classes without an image in train: dog" in said


def test_an_empty_folder_beside_images_without_classes_is_no_class(tmp_path):
    write_images(tmp_path / "in", range(20))
    (tmp_path / "in" / "later").mkdir()
    assert pack("imagefolder", tmp_path / "in", tmp_path / "out") == 0
    assert ShardIndex.load(tmp_path / "out").classes == []


def test_a_folder_without_images_beside_the_splits_is_no_mixture(tmp_path, capsys):
    write_images(tmp_path / "in" / "train", range(20))
    (tmp_path / "in" / "annotations").mkdir()
    (tmp_path / "in" / "annotations" / "train.json").write_text("{}")
    assert pack("imagefolder", tmp_path / "in", tmp_path / "out") == 2
    assert "train.json (outside of train/)" in capsys.readouterr().err
    assert pack("imagefolder", tmp_path / "in", tmp_path / "out", "--skip-bad") == 0
    assert sum(map(len, packed(tmp_path / "out").values())) == 20


@pytest.mark.parametrize("name", ["cat", "contest", "devil", "vale", "training shoes"[9:], "Testarossa", "trainer"])
def test_words_that_only_begin_alike_are_no_splits(name):
    assert split_called(name) is None and not looks_like_split(name)


# Arrays


@pytest.mark.parametrize(
    "names",
    [
        ("train_images", "train_labels", "val_images", "val_labels", "test_images", "test_labels"),
        ("train_images", "train_labels", "valid_images", "valid_labels", "test_images", "test_labels"),
        ("x_train", "y_train", "x_val", "y_val", "x_test", "y_test"),
        ("X_train", "Y_train", "X_valid", "Y_valid", "X_test", "Y_test"),
        ("xtrain", "ytrain", "xval", "yval", "xtest", "ytest"),
        ("trainX", "trainY", "devX", "devY", "testX", "testY"),
        ("images", "labels", "dev_images", "dev_labels", "testing_images", "testing_labels"),
        ("x", "y", "val_x", "val_y", "test_x", "test_y"),
        ("image", "label", "valid_image", "valid_label", "test_image", "test_label"),
        ("data", "target", "validation_data", "validation_target", "test_data", "test_target"),
        ("train", "train_y", "val", "val_y", "test", "test_y"),
        ("arr_0", "arr_1", "val_x", "val_y", "test_x", "test_y"),
    ],
)
def test_usual_names_of_arrays_are_understood_and_said(names, tmp_path, capsys):
    parts = {"train": slice(0, 20), "validation": slice(20, 27), "test": slice(27, 40)}
    arrays = {}
    for rows, images, labels in zip(parts.values(), names[::2], names[1::2], strict=True):
        arrays |= {images: IMAGES[rows], labels: np.arange(400)[rows, None] % 3}
    np.savez(tmp_path / "a.npz", **arrays)
    assert pack("npz", tmp_path / "a.npz", tmp_path / "out") == 0
    said = capsys.readouterr().out
    for (split, rows), images, labels in zip(parts.items(), names[::2], names[1::2], strict=True):
        assert f"{images} as the images of {split}, {labels} as their labels" in said
        found = {}
        for batch in walk(tmp_path / "out", split, 16, rank=0, world=1):
            for image, label in zip(batch["image"], batch["label"].tolist(), strict=True):
                found[image.permute(1, 2, 0).contiguous().numpy().tobytes()] = label
        assert found == {IMAGES[row].tobytes(): row % 3 for row in range(400)[rows]}


@pytest.mark.parametrize(
    "name", ["embedding", "train_embedding", "train_val_images", "weights", "x_train_names", "arr_2", "holdout"]
)
def test_other_names_of_arrays_have_no_role(name):
    assert role_of(name) is None


def test_arrays_that_are_not_taken_are_named(tmp_path, capsys):
    people = np.array([{"name": "a"}] * 20, dtype=object)
    more = {"people": people, "embedding": np.zeros((20, 5)), "test_labels": np.zeros(5, int)}
    np.savez(tmp_path / "a.npz", images=IMAGES[:20], labels=np.arange(20) % 3, **more)
    assert pack("npz", tmp_path / "a.npz", tmp_path / "out") == 0
    said = capsys.readouterr().out
    left = next(line for line in said.splitlines() if "left out:" in line)
    assert "people (its name says neither images nor labels)" in left and "embedding (its name" in left
    assert "test_labels (no images of test beside it)" in left
    assert sum(map(len, packed(tmp_path / "out").values())) == 20


@pytest.mark.parametrize("low, high, dtype", [(0, 1, np.float32), (-1, 1, np.float64), (0, 1, np.float16), (0, 65535, np.uint16)])
def test_numbers_are_scaled_as_asked(low, high, dtype, tmp_path, capsys):
    values = (low + IMAGES[:30].astype(np.float64) / 255 * (high - low)).astype(dtype)
    np.savez(tmp_path / "a.npz", images=values)
    assert pack("npz", tmp_path / "a.npz", tmp_path / "out") == 2
    assert "--scale 0:1" in (error := capsys.readouterr().err) and np.dtype(dtype).name in error
    assert pack("npz", tmp_path / "a.npz", tmp_path / "out", "--scale", f"{low}:{high}") == 0
    found = {row for samples in packed(tmp_path / "out").values() for row in samples}
    assert found == set(range(30))  # every pixel, since rows are found by them


def test_values_outside_of_the_scale_are_refused(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", images=IMAGES[:30].astype(np.float32))
    assert pack("npz", tmp_path / "a.npz", tmp_path / "out", "--scale", "0:1") == 2
    assert "images has values from 0 to 255, outside of --scale 0:1" in capsys.readouterr().err


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_first_is_read_when_said_so(channels, tmp_path, capsys):
    np.savez(tmp_path / "a.npz", images=IMAGES[:30, ..., :channels].transpose(0, 3, 1, 2))
    assert pack("npz", tmp_path / "a.npz", tmp_path / "out") == 2
    assert "--layout nchw reads [n, c, h, w]" in capsys.readouterr().err
    assert pack("npz", tmp_path / "a.npz", tmp_path / "out", "--layout", "nchw") == 0
    found = {}
    for split in ("train", "validation", "test"):
        for batch in walk(tmp_path / "out", split, 16, rank=0, world=1):
            found |= dict(zip(batch["key"], batch["image"], strict=True))
    for row in range(30):
        np.testing.assert_array_equal(found[f"image-{row:06d}"], IMAGES[row, ..., :channels].transpose(2, 0, 1))


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--pad", 32], lambda image: np.pad(image, ((2, 2), (2, 2), (0, 0)))),
        (["--crop", 20], lambda image: image[4:24, 4:24]),
        (["--size", 32], lambda image: np.array(Image.fromarray(image).resize((32, 32), Image.Resampling.BILINEAR))),
    ],
)
def test_arrays_of_28_pixels_are_fitted(options, expected, tmp_path):
    images = np.random.default_rng(5).integers(0, 256, (20, 28, 28, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", train_images=images, train_labels=np.arange(20)[:, None] % 2)
    assert pack("npz", tmp_path / "a.npz", tmp_path / "out", *options) == 0
    for split in ("train", "validation", "test"):
        for batch in walk(tmp_path / "out", split, 16, rank=0, world=1):
            for key, image, label in zip(batch["key"], batch["image"], batch["label"].tolist(), strict=True):
                row = int(key[-6:])
                np.testing.assert_array_equal(image.permute(1, 2, 0), expected(images[row]))
                assert label == row % 2
    assert "28" not in str(ShardIndex.load(tmp_path / "out").image_shape)


# Names of shards


@pytest.mark.parametrize(
    "name, split",
    [
        ("train-000000.tar", "train"),
        ("cats-000000.tar", "cats"),
        ("my-set-0000001.tar", "my-set"),
        ("train-0000.tar", "train"),
        ("val-00.tar", "val"),
        ("imagenet1k-validation-07.tar", "imagenet1k-validation"),
        ("train_0001.tar", "train"),
        ("test.tar", "test"),
        ("train0.tar", "train"),
        ("train-00000-of-00010.tar", "train"),
        ("Validation-01.tar", "Validation"),
        ("cats-0000.tar", None),
        ("00000.tar", None),
        ("2024-01-02.tar", None),
        ("pictures.tar", None),
    ],
)
def test_the_split_in_the_name_of_a_shard(name, split):
    assert split_in_name(name) == split
