"""DINOv2's features: another implementation's on the same random weights, and the preprocessing of the programs that use them."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import image_of
from PIL import Image
from torchvision import transforms

from eae_dist.metrics import dinov2
from eae_dist.metrics.dinov2 import MEAN, PREPROCESSING, positions
from eae_dist.metrics.extractor import resized_as_tf1
from eae_dist.metrics.features import build_features

pytest.importorskip("timm")


def images(count: int, shape=(3, 40, 30)) -> torch.Tensor:
    pixels = np.stack([image_of(number, shape) for number in range(count)])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


NAMES = {  # of transformers 4, of transformers 5 or of both: of the official file
    "embeddings.cls_token": "cls_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "encoder.layer": "blocks",
    "layernorm": "norm",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "attention.output.dense": "attn.proj",
    "attention.o_proj": "attn.proj",
    "attention.attention.query": "attn.0",
    "attention.attention.key": "attn.1",
    "attention.attention.value": "attn.2",
    "attention.q_proj": "attn.0",
    "attention.k_proj": "attn.1",
    "attention.v_proj": "attn.2",
}


def official(theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of transformers under the names of the official file, where queries, keys and values are one matrix."""
    out = {}
    for key, tensor in theirs.items():
        for old, new in NAMES.items():
            key = key.replace(old, new)
        out[key] = tensor
    for key in [key for key in out if ".attn.0." in key]:
        parts = [out.pop(key.replace(".attn.0.", f".attn.{part}.")) for part in range(3)]
        out[key.replace(".attn.0.", ".attn.qkv.")] = torch.cat(parts)
    return out


@pytest.fixture(scope="module")
def reference():
    """DINOv2 of transformers with random weights, for images of 224 x 224, so that it changes no position."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": 224, "patch_size": 14}
    torch.manual_seed(0)
    network = transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).eval()
    with torch.no_grad():  # as they start, the positions and the layer scales hide the rest
        network.embeddings.position_embeddings.normal_(std=0.3)
        for name, parameter in network.named_parameters():
            if "lambda1" in name:
                parameter.uniform_(0.1, 1)
    return network


@pytest.fixture(scope="module")
def weights(reference, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("hub") / "vits14.pth"
    torch.save(official(reference.state_dict()), path)
    return path


def test_feature_is_the_class_token_of_another_implementation(reference, weights):
    extractor, batch = build_features("dinov2_vits14", weights=weights), images(2)
    with torch.no_grad():
        expected = reference(extractor.prepare(batch)).last_hidden_state[:, 0]
    got = extractor(batch)
    assert got.shape == (2, extractor.dimensions) == (2, 384) and (got[0] - got[1]).abs().max() > 0.1
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4)
    gray = images(2, (1, 32, 32))
    assert torch.equal(extractor(gray), extractor(gray.expand(-1, 3, -1, -1)))


def test_positions_of_the_official_file_are_resized_with_its_ratio():
    """Patch i lies at (i + 1/2) 37/16.1 - 1/2 of the old ones; with the ratio 37/16 the last one would lie 0.2 farther."""
    row, column = torch.meshgrid(torch.arange(37.0), torch.arange(37.0), indexing="ij")
    old = torch.cat([torch.tensor([[[7.0, 8.0]]]), torch.stack([row, column], -1).view(1, -1, 2)], 1)
    new = positions(old)
    assert new.shape == (1, 257, 2) and new[0, 0].tolist() == [7, 8]
    grid = new[0, 1:].view(16, 16, 2)[1:-1, 1:-1]
    # torch's bicubic kernel gives a linear function to 0.05.
    expected = (torch.arange(1, 15) + 0.5) * 37 / 16.1 - 0.5
    torch.testing.assert_close(grid[..., 0], expected[:, None].expand(14, 14), rtol=0, atol=0.06)
    torch.testing.assert_close(grid[..., 1], expected.expand(14, 14), rtol=0, atol=0.06)
    assert positions(new) is new


@pytest.mark.parametrize("shape", [(3, 40, 30), (1, 28, 28), (3, 300, 300), (3, 224, 224)])
def test_default_preprocessing_is_that_of_dgm_eval(shape):
    theirs = transforms.Compose(
        [
            transforms.Resize((224, 224), transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize(np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])),
        ]
    )
    batch = images(2, shape)
    expected = torch.stack([theirs(Image.fromarray(image_of(number, shape).squeeze()).convert("RGB")) for number in range(2)])
    assert torch.allclose(PREPROCESSING["dgm-eval"][0](batch), expected, atol=1e-6)


def test_other_preprocessing_is_that_of_torch_fidelity():
    batch = images(2)
    theirs = transforms.functional.normalize(
        resized_as_tf1(batch.float(), 224), [255 * 0.485, 255 * 0.456, 255 * 0.406], [255 * 0.229, 255 * 0.224, 255 * 0.225]
    )
    assert torch.allclose(PREPROCESSING["tf1"][0](batch), theirs, atol=1e-5)
    black = PREPROCESSING["tf1"][0](torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
    assert black[0, :, 5, 5].tolist() == pytest.approx([-MEAN[0] / 0.229, -MEAN[1] / 0.224, -MEAN[2] / 0.225])


def test_distance_has_the_short_name_for_the_official_weights_alone(weights, monkeypatch):
    own = build_features("dinov2_vits14", weights=weights)
    assert own.metric == f"fd_dinov2_vits14_{own.sha256[:8]}" and own.kernel_metric == f"kd_dinov2_vits14_{own.sha256[:8]}"
    assert build_features("dinov2_vits14", weights=weights, preprocessing="tf1").metric == f"{own.metric}_tf1"
    monkeypatch.setattr("eae_dist.metrics.extractor.sha256_of", lambda path: dinov2.NETWORKS["vits14"][2])
    assert build_features("dinov2_vits14", weights=weights).metric == "fd_dinov2_vits14"
    assert build_features("dinov2_vits14", weights=weights).preprocessing.startswith("dgm-eval: gray as three equal channels")


def test_missing_damaged_and_wrong_weights_and_a_missing_package_are_told(weights, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(
        FileNotFoundError,
        match=r"dinov2_vitl14_pretrain.pth does not exist: .* get them from https://dl.fbaip.* or "
        "set evaluate.weights",
    ):
        build_features("dinov2_vitl14")
    place = tmp_path / "hub/checkpoints/dinov2_vits14_pretrain.pth"
    place.parent.mkdir(parents=True)
    place.write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"is damaged or another file: its sha256 begins with \w{8}, expected b938bf1b"):
        build_features("dinov2_vits14")
    with pytest.raises(ValueError, match="vits14.pth does not hold the weights of vit_large_patch14_dinov2"):
        build_features("dinov2_vitl14", weights=weights)
    for state in ({}, {"pos_embed": torch.zeros(3)}, {"pos_embed": "none"}):
        torch.save(state, tmp_path / "other.pth")
        with pytest.raises(ValueError, match="other.pth does not hold the weights of vit_small_patch14_dinov2"):
            build_features("dinov2_vits14", weights=tmp_path / "other.pth")
    with pytest.raises(ValueError, match="evaluate.preprocessing=clean is unknown; for DINOv2 it is one of dgm-eval, tf1"):
        build_features("dinov2_vits14", weights=weights, preprocessing="clean")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"need the package timm: pip install 'eae-dist\[dinov2\]'"):
        build_features("dinov2_vits14", weights=weights)
