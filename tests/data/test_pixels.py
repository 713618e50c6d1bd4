"""One picture has the same pixels whichever way it comes: packed, in a shard of others, judged, packed again or sent."""

import base64
import io
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from eae_dist.data import decoding
from eae_dist.data.decoding import decode_image, decode_with_pillow
from eae_dist.data.image_folders import walk_images
from eae_dist.data.pixels import Fit, Rules, depends_on_rules, read_pixels
from eae_dist.data.shard_index import ShardIndex
from eae_dist.data.stream import ShardStream, walk
from eae_dist.inference.service.images import images_from_text
from eae_dist.pack import main

UPRIGHT = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)  # what a person sees: 8 wide, 6 high
GRAY = np.random.default_rng(1).integers(0, 256, (6, 8), dtype=np.uint8)
# What is stored so that the orientation shows UPRIGHT, by the text of the EXIF standard: row 0 and column 0 are, for 6, the
# right side and the top, and so on.
STORED = {
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.transpose(1, 0, 2),
    6: UPRIGHT[:, ::-1].transpose(1, 0, 2),
    7: UPRIGHT[::-1, ::-1].transpose(1, 0, 2),
    8: UPRIGHT[::-1].transpose(1, 0, 2),
}


def file_of(image: np.ndarray | Image.Image, format: str, **options) -> bytes:
    data = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(np.ascontiguousarray(image))
    image.save(data, format, **options)
    return data.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def xmp(orientation: int) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", f'<rdf:Description tiff:Orientation="{orientation}"/>')
    return info


def png_of_bits(values: np.ndarray, bits: int = 16) -> bytes:
    """A PNG of uint16 values [h, w, 1 to 4]."""
    height, width, channels = values.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def with_holes(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels with an alpha of 0 or 255, and what is seen of them on white."""
    alpha = np.where((np.arange(6)[:, None] + np.arange(8)) % 3 == 0, 0, 255).astype(np.uint8)
    seen = np.where((alpha == 255)[..., None] if pixels.ndim == 3 else alpha == 255, pixels, 255)
    return np.dstack([pixels, alpha]), seen


def palette_with_a_hole() -> tuple[Image.Image, np.ndarray]:
    image = Image.fromarray(UPRIGHT // 128 * 200).quantize(8)
    seen = np.array(image.convert("RGB"))
    seen[np.array(image) == 2] = 255
    return image, seen


def variants() -> dict[str, tuple[bytes, np.ndarray]]:
    """Name of a file -> its bytes, and the pixels [6, 8, 3] that it must have."""
    rgba, seen = with_holes(UPRIGHT)
    la, seen_gray = with_holes(GRAY)
    palette, seen_palette = palette_with_a_hole()
    in_color = GRAY[..., None].repeat(3, axis=2)
    found = {
        "plain.png": (file_of(UPRIGHT, "png"), UPRIGHT),
        "plain.webp": (file_of(UPRIGHT, "webp", lossless=True), UPRIGHT),
        "gray.png": (file_of(GRAY, "png"), in_color),
        "rgba.png": (file_of(rgba, "png"), seen),
        "rgba.webp": (file_of(rgba, "webp", lossless=True, exact=True), seen),
        "opaque.png": (file_of(np.dstack([UPRIGHT, np.full((6, 8), 255, np.uint8)]), "png"), UPRIGHT),
        "la.png": (file_of(la, "png"), seen_gray[..., None].repeat(3, axis=2)),
        "palette.png": (
            file_of(Image.fromarray(UPRIGHT).quantize(64), "png"),
            np.array(Image.fromarray(UPRIGHT).quantize(64).convert("RGB")),
        ),
        "hole.png": (file_of(palette, "png", transparency=2), seen_palette),
        "key.png": (
            file_of(UPRIGHT, "png", transparency=tuple(map(int, UPRIGHT[2, 3]))),
            np.where((UPRIGHT == UPRIGHT[2, 3]).all(2, keepdims=True), 255, UPRIGHT),
        ),
        "xmp.png": (file_of(STORED[6], "png", pnginfo=xmp(6)), UPRIGHT),
        "turned-hole.png": (file_of(with_holes(UPRIGHT)[0][:, ::-1].transpose(1, 0, 2), "png", exif=exif(6)), seen),
    }
    for number, pixels in STORED.items():
        found[f"turned{number}.png"] = (file_of(pixels, "png", exif=exif(number)), UPRIGHT)
        found[f"turned{number}.webp"] = (file_of(pixels, "webp", lossless=True, exif=exif(number)), UPRIGHT)
    # JPEG loses something, so what is stored is decoded and turned by hand.
    for number in (1, 3, 6, 8):
        data = file_of(STORED[number], "jpeg", quality=95, exif=exif(number))
        back = {1: lambda x: x, 3: lambda x: x[::-1, ::-1], 6: lambda x: np.rot90(x, -1), 8: lambda x: np.rot90(x)}[number]
        found[f"turned{number}.jpg"] = (data, back(np.array(Image.open(io.BytesIO(data)).convert("RGB"))))
    cmyk = file_of(Image.fromarray(UPRIGHT).convert("CMYK"), "jpeg", quality=95)
    found["cmyk.jpg"] = (cmyk, np.array(Image.open(io.BytesIO(cmyk)).convert("RGB")))
    return found


VARIANTS = variants()


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def key_of(name: str) -> str:
    return name.replace(".", "_")


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(f"{key_of(name)}.{name.rpartition('.')[2]}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def pack(*arguments) -> int:
    return main([*map(str, arguments), "--workers", "1"])


def images_in(root: Path) -> dict[str, np.ndarray]:
    """Key -> pixels [h, w, c] of all splits."""
    return {
        key: image.permute(1, 2, 0).numpy()
        for split in ShardIndex.load(root).info["splits"]
        for batch in walk(root, split, 16, rank=0, world=1)
        for key, image in zip(batch["key"], batch["image"], strict=True)
    }


def packed_folder(tmp_path: Path, files: dict[str, bytes], *options) -> dict[str, np.ndarray]:
    """Every file has its own folder, since a key is a name without its ending."""
    for name, data in files.items():
        write_folder(tmp_path / "in" / key_of(name), {name: data})
    assert pack("imagefolder", tmp_path / "in", tmp_path / "out", *options) == 0
    return {key.partition("/")[0]: image for key, image in images_in(tmp_path / "out").items()}


def indexed_tar(tmp_path: Path, files: dict[str, bytes], *options) -> dict[str, np.ndarray]:
    write_tar(tmp_path / "wds" / "train-000000.tar", files)
    assert pack("--index", tmp_path / "wds", *options) == 0
    assert pack("--verify", tmp_path / "wds") == 0
    return images_in(tmp_path / "wds")


def streamed_tar(tmp_path: Path, files: dict[str, bytes], *options) -> dict[str, np.ndarray]:
    indexed_tar(tmp_path, files, *options)
    batch = next(iter(ShardStream(tmp_path / "wds", "train", len(files), rank=0, world=1)))
    return {key: image.permute(1, 2, 0).numpy() for key, image in zip(batch["key"], batch["image"], strict=True)}


def packed_tar(tmp_path: Path, files: dict[str, bytes], *options) -> dict[str, np.ndarray]:
    write_tar(tmp_path / "wds" / "00.tar", files)
    assert pack("webdataset", tmp_path / "wds" / "00.tar", tmp_path / "again", *options) == 0
    return images_in(tmp_path / "again")


def judged(tmp_path: Path, files: dict[str, bytes], *options) -> dict[str, np.ndarray]:
    folder = write_folder(tmp_path / "judged", files)
    images = np.concatenate([images.permute(0, 2, 3, 1).numpy() for _, images in walk_images(folder, 4).images])
    return {key_of(name): image for name, image in zip(sorted(files), images, strict=True)}


def sent(tmp_path: Path, files: dict[str, bytes], *options) -> dict[str, np.ndarray]:
    texts = [base64.b64encode(data).decode() for data in files.values()]
    images = [images_from_text([text], (3, 6, 8))[0].transpose(1, 2, 0) for text in texts]
    return dict(zip(map(key_of, files), images, strict=True))


WAYS = [packed_folder, indexed_tar, streamed_tar, packed_tar, judged, sent]


@pytest.mark.parametrize("way", WAYS)
def test_one_picture_has_the_same_pixels_whichever_way_it_comes(way, tmp_path):
    files = {name: data for name, (data, _) in VARIANTS.items()}
    found = way(tmp_path, files)
    assert len(found) == len(VARIANTS)
    for name, (_, pixels) in VARIANTS.items():
        np.testing.assert_array_equal(found[key_of(name)], pixels, err_msg=name)


@pytest.mark.parametrize("way", [packed_folder, indexed_tar, packed_tar])
def test_half_transparent_pixels_are_mixed_with_white(way, tmp_path):
    alpha = np.random.default_rng(2).integers(0, 256, (6, 8), dtype=np.uint8)
    files = {f"{i}.png": file_of(np.dstack([UPRIGHT, alpha]), "png") for i in range(5)}
    expected = 255 + (UPRIGHT.astype(float) - 255) * alpha[..., None] / 255
    for image in way(tmp_path, files).values():
        assert np.abs(image - expected).max() <= 1  # rounded


DEEP = np.random.default_rng(3).integers(0, 65536, (6, 8, 4), dtype=np.uint16)
EIGHT = np.rint(DEEP / 257).astype(np.uint8)  # 65535 / 255 = 257


@pytest.mark.parametrize("way", [packed_folder, indexed_tar, streamed_tar, packed_tar])
def test_sixteen_bits_are_scaled_as_asked(way, tmp_path):
    opaque = np.dstack([DEEP[..., :3], np.full((6, 8), 65535, np.uint16)])
    files = {
        "color.png": png_of_bits(DEEP[..., :3]),
        "gray.png": png_of_bits(DEEP[..., :1]),
        "plain.png": file_of(UPRIGHT, "png"),
    }
    files |= {"alpha.png": png_of_bits(opaque), "la.png": png_of_bits(opaque[..., [0, 3]])}
    found = way(tmp_path, files, "--scale", "0:65535")
    gray = EIGHT[..., :1].repeat(3, axis=2)
    for name, pixels in {"color": EIGHT[..., :3], "gray": gray, "plain": UPRIGHT, "alpha": EIGHT[..., :3], "la": gray}.items():
        np.testing.assert_array_equal(found[f"{name}_png"], pixels, err_msg=name)


@pytest.mark.parametrize("format", ["png", "tiff", "ppm"])
def test_twelve_bits_in_sixteen_fill_the_range(format, tmp_path):
    values = np.linspace(0, 4095, 48).astype(np.uint16).reshape(6, 8)
    image = read_pixels(io.BytesIO(file_of(values, format)), Rules(scale=(0, 4095))).pixels
    np.testing.assert_array_equal(image, np.rint(values / 4095 * 255))
    with pytest.raises(ValueError, match="values from 0 to 4095, outside of --scale 0:1000"):
        read_pixels(io.BytesIO(file_of(values, format)), Rules(scale=(0, 1000)))


def test_floats_in_tiff_are_scaled_and_nan_is_refused():
    values = np.linspace(-1, 1, 48, dtype=np.float32).reshape(6, 8)
    image = read_pixels(io.BytesIO(file_of(values, "tiff")), Rules(scale=(-1, 1)))
    np.testing.assert_array_equal(image.pixels, np.rint((values.astype(float) + 1) / 2 * 255))
    values[2, 2] = np.nan
    with pytest.raises(ValueError, match="nan"):
        read_pixels(io.BytesIO(file_of(values, "tiff")), Rules(scale=(-1, 1)))


def animation(format: str) -> bytes:
    frames = [Image.fromarray(UPRIGHT[:, ::-1].copy()), Image.fromarray(GRAY).convert("RGB")]
    options = {"lossless": True} if format == "webp" else {}
    return file_of(UPRIGHT, format, save_all=True, append_images=frames, duration=100, **options)


@pytest.mark.parametrize("format", ["png", "webp"])
@pytest.mark.parametrize("way", [packed_folder, indexed_tar, streamed_tar, packed_tar])
def test_of_an_animation_the_first_frame_is_taken_when_asked_for(way, format, tmp_path):
    files = {f"{i}.{format}": animation(format) for i in range(5)}
    for image in way(tmp_path, files, "--frames", "first").values():
        np.testing.assert_array_equal(image, UPRIGHT)


REFUSED = {
    "animation.webp": (animation("webp"), "an image of 3 frames", "--frames first"),
    "animation.png": (animation("png"), "an image of 3 frames", "--frames first"),
    "deep.png": (png_of_bits(DEEP[..., :3]), "more than 8 bits a channel", "--scale LOW:HIGH"),
    "deep-gray.png": (png_of_bits(DEEP[..., :1]), "more than 8 bits a channel", "--scale LOW:HIGH"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_be_read_in_several_ways_is_refused_everywhere_until_the_user_chooses(name, tmp_path, capsys):
    data, *wanted = REFUSED[name]
    tar = write_tar(tmp_path / "wds" / "train-000000.tar", {"a.png": file_of(UPRIGHT, "png"), name: data})
    folder = write_folder(tmp_path / "in", {"a.png": file_of(UPRIGHT, "png"), name: data})
    for arguments in (
        ["--index", tmp_path / "wds"],
        ["imagefolder", folder, tmp_path / "a"],
        ["webdataset", tar, tmp_path / "b"],
    ):
        assert pack(*arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and all(word in error for word in (*wanted, key_of(name).partition("_")[0]))
    assert not (tmp_path / "wds" / "index.json").exists() and not (tmp_path / "a").exists() and not (tmp_path / "b").exists()
    with pytest.raises(ValueError, match=wanted[0]):
        decode_image(data, 3)
    with pytest.raises(ValueError, match=wanted[0]):
        list(walk_images(folder, 4).images)
    with pytest.raises(ValueError, match=wanted[0]):
        images_from_text([base64.b64encode(data).decode()], (3, 6, 8))


def test_a_gif_of_several_frames_is_refused_and_one_of_a_single_frame_read(tmp_path, capsys):
    palette = Image.fromarray(UPRIGHT).quantize(32)
    write_folder(tmp_path / "in", {f"{i}.gif": file_of(palette, "gif") for i in range(6)})
    assert pack("imagefolder", tmp_path / "in", tmp_path / "a") == 0
    for image in images_in(tmp_path / "a").values():
        np.testing.assert_array_equal(image, np.array(palette.convert("RGB")))
    (tmp_path / "in" / "7.gif").write_bytes(file_of(palette, "gif", save_all=True, append_images=[palette.rotate(180)]))
    assert pack("imagefolder", tmp_path / "in", tmp_path / "b") == 2
    assert "7.gif (an image of 2 frames" in capsys.readouterr().err
    assert pack("imagefolder", tmp_path / "in", tmp_path / "b", "--frames", "first") == 0
    np.testing.assert_array_equal(images_in(tmp_path / "b")["7"], np.array(palette.convert("RGB")))
    assert "1 images of several frames, the first taken" in ShardIndex.load(tmp_path / "b").info["preprocessing"]


def test_a_photo_with_a_preview_behind_it_is_one_picture(tmp_path):
    photo = file_of(UPRIGHT, "mpo", save_all=True, append_images=[Image.fromarray(UPRIGHT[:3, :4])], quality=95)
    expected = np.array(Image.open(io.BytesIO(photo)).convert("RGB"))
    files = {f"{i}.jpg": photo for i in range(5)}
    for way in (packed_folder, indexed_tar, judged, sent):
        for image in way(tmp_path / way.__name__, files).values():
            np.testing.assert_array_equal(image, expected)


def test_the_index_records_what_was_done(tmp_path, capsys):
    files = {f"{i}.png": file_of(UPRIGHT, "png") for i in range(4)}
    files |= {"t.png": file_of(STORED[6], "png", exif=exif(6)), "a.png": VARIANTS["rgba.png"][0], "w.webp": animation("webp")}
    files |= {"d.png": png_of_bits(DEEP[..., :3]), "g.png": file_of(GRAY, "png"), "c.jpg": VARIANTS["cmyk.jpg"][0]}
    files |= {"p.png": VARIANTS["palette.png"][0]}
    indexed_tar(tmp_path, files, "--frames", "first", "--scale", "0:65535")
    info = ShardIndex.load(tmp_path / "wds").info
    traits = {"turned": 1, "transparent": 1, "palette": 1, "cmyk": 1, "deep": 1, "frames": 1}
    assert info["changed_by_reading"] == traits
    assert info["image"] | {"scale": [0, 65535], "frames": "first", "shape": [3, 6, 8]} == info["image"]
    said = capsys.readouterr().out
    packed_folder(tmp_path, files, "--frames", "first", "--scale", "0:65535")
    how = ShardIndex.load(tmp_path / "out").info["preprocessing"]
    for words in (
        "1 images turned by their EXIF orientation",
        "1 images transparent, composed on white",
        "1 images of more than 8 bits a channel, scaled so that 0 is 0 and 65535 is 255",
        "1 images of several frames, the first taken",
        "1 gray and 10 color images are mixed: all are read as RGB (--channels 1 for gray)",
    ):
        assert words in said and words in how


def test_the_index_of_plain_images_says_no_more_than_it_did(tmp_path):
    indexed_tar(tmp_path, {"a.png": file_of(UPRIGHT, "png"), "b.png": file_of(GRAY, "png"), "c.jpg": file_of(UPRIGHT, "jpeg")})
    info = ShardIndex.load(tmp_path / "wds").info
    assert info["image"] == {"shape": [3, 6, 8], "encoding": "mixed", "npy_header": None} and "changed_by_reading" not in info


@pytest.mark.parametrize("way", [packed_folder, indexed_tar, packed_tar])
def test_a_mixture_is_read_in_gray_when_asked_for(way, tmp_path):
    files = {"color.png": file_of(UPRIGHT, "png"), "gray.png": file_of(GRAY, "png"), "turned.png": VARIANTS["turned6.png"][0]}
    files |= {"color.webp": file_of(UPRIGHT, "webp", lossless=True), "hole.png": VARIANTS["rgba.png"][0]}
    found = way(tmp_path, files, "--channels", "1")
    luma = np.array(Image.fromarray(UPRIGHT).convert("L"))[..., None]
    for name in ("color_png", "color_webp", "turned_png"):
        np.testing.assert_array_equal(found[name], luma, err_msg=name)
    np.testing.assert_array_equal(found["gray_png"], GRAY[..., None])
    np.testing.assert_array_equal(found["hole_png"], np.array(Image.fromarray(VARIANTS["rgba.png"][1]).convert("L"))[..., None])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_plain_images_are_read_by_the_fast_decoders(format, channels, monkeypatch):
    data = file_of(UPRIGHT if channels == 3 else GRAY, format)
    if (format, channels) != ("webp", 1):  # WebP has no gray
        assert not depends_on_rules(data, channels)
        monkeypatch.setattr(decoding, "read_pixels", None)
    assert decode_image(data, channels).shape == (6, 8, channels)


@pytest.mark.parametrize("name", [name for name in VARIANTS if not name.startswith(("plain", "gray", "opaque", "palette"))])
def test_the_fast_decoders_are_left_out_exactly_where_they_would_read_otherwise(name):
    data, pixels = VARIANTS[name]
    differ = not np.array_equal(decode_with_pillow(data, 3), pixels)
    assert depends_on_rules(data, 3) == (differ or name == "cmyk.jpg")


def test_an_orientation_behind_the_pixels_is_found():
    turned = file_of(STORED[6], "png", exif=exif(6))
    at = turned.index(b"eXIf") - 4
    size = 12 + int.from_bytes(turned[at : at + 4], "big")
    moved = turned[:at] + turned[at + size : -12] + turned[at : at + size] + turned[-12:]
    np.testing.assert_array_equal(decode_image(moved, 3), UPRIGHT)


def test_what_indexing_takes_training_can_read_and_verify_says_what_it_cannot(tmp_path, capsys, monkeypatch):
    """A decoder that fails where Pillow does not: found while indexing, in the stated sample or with --decode."""
    files = {f"{i:03d}.png": file_of(UPRIGHT, "png") for i in range(101)} | {"bad.jpg": file_of(UPRIGHT, "jpeg")}
    write_tar(tmp_path / "wds" / "train-000000.tar", files)

    def failing():
        def fail(data, channels):
            raise RuntimeError("no such codec")

        return fail

    monkeypatch.setattr(decoding, "_decoder", failing)
    assert pack("--index", tmp_path / "wds") == 0
    assert "the first 100 images of each shard were decoded as training does" in capsys.readouterr().out
    assert pack("--index", tmp_path / "wds", "--decode") == 2
    assert "'bad_jpg' is not a usable PNG, JPEG or WebP image (not a readable image (no such codec))" in capsys.readouterr().err
    assert pack("--verify", tmp_path / "wds") == 1
    said = capsys.readouterr().out
    assert "train-000000.tar holds what training cannot read: 'bad_jpg' (not a readable image (no such codec))" in said


def test_an_index_from_before_the_orientation_was_applied_says_that_it_is_old(tmp_path, capsys):
    """Shards whose pictures lie on their side were indexed with the sides as stored."""
    indexed_tar(tmp_path, {f"{i}.png": VARIANTS["turned6.png"][0] for i in range(4)})
    path = tmp_path / "wds" / "index.json"
    path.write_text(path.read_text().replace("6,\n      8", "8,\n      6"))
    assert ShardIndex.load(tmp_path / "wds").image_shape == (3, 8, 6)
    with pytest.raises(ValueError, match=r"its shape is \(3, 6, 8\), the index says \(3, 8, 6\)"):
        images_in(tmp_path / "wds")
    assert pack("--verify", tmp_path / "wds") == 1
    assert "4 images, the first: '0_png'" in capsys.readouterr().out


# Crop, pad and size


@pytest.mark.parametrize("shape", [(20, 30), (20, 30, 1), (20, 30, 3)])
def test_fit_crops_then_pads_then_resizes(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.testing.assert_array_equal(Fit(crop=16)(pixels), pixels[2:18, 7:23])
    padded = Fit(pad=32)(pixels)
    np.testing.assert_array_equal(padded[6:26, 1:31], pixels)
    assert padded.shape == (32, 32, *shape[2:]) and padded.sum() == pixels.sum()
    square = np.squeeze(pixels[:, 5:25])
    resized = np.array(Image.fromarray(square).resize((8, 8), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(Fit(size=8)(pixels), resized.reshape(8, 8, *shape[2:]))
    together = Image.fromarray(np.squeeze(np.pad(pixels[2:18, 7:23], ((2, 2), (2, 2), (0, 0))[: pixels.ndim])))
    expected = np.array(together.resize((8, 8), Image.Resampling.BILINEAR)).reshape(8, 8, *shape[2:])
    np.testing.assert_array_equal(Fit(crop=16, pad=20, size=8)(pixels), expected)


@pytest.mark.parametrize(
    "options, wanted", [(["--crop", 7], "8x6 is smaller than --crop 7"), (["--pad", 7], "8x6 is larger than --pad 7")]
)
def test_images_that_do_not_fit_are_bad_files(options, wanted, tmp_path, capsys):
    write_folder(tmp_path / "in", {f"{i}.png": file_of(UPRIGHT, "png") for i in range(4)})
    assert pack("imagefolder", tmp_path / "in", tmp_path / "out", *options) == 2
    assert wanted in capsys.readouterr().err


@pytest.mark.parametrize("scale", ["1:0", "0", "a:b", "0:inf", "5:5"])
def test_a_scale_is_two_numbers_in_order(scale, capsys):
    with pytest.raises(SystemExit):
        main(["imagefolder", "in", "out", "--scale", scale])
    assert "expected LOW:HIGH" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["plain.png", "rgba.webp", "turned6.jpg", "turned6.png", "turned6.webp"])
def test_every_truncation_of_a_file_is_a_value_error_or_an_image(name):
    data, pixels = VARIANTS[name]
    for size in range(len(data)):
        try:
            found = decode_image(data[:size], 3)
        except ValueError:
            continue
        assert found.shape in (pixels.shape, pixels.transpose(1, 0, 2).shape)  # a decoder may pass over the end of a file
