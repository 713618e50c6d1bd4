"""The Inception-v3 that defines FID: the network of pytorch-fid, with its file of weights."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from eae_dist.errors import UserError
from eae_dist.metrics.extractor import GRAY, Extractor, found_weights, in_color, load_weights, resized_as_tf1

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_FILE}"
INCEPTION_SIDE = 299  # pixels


def inception(weights: str | Path | None = None, preprocessing: str = "pytorch-fid", dimensions: int = 2048) -> Extractor:
    """Returns the Inception-v3 that defines FID: pytorch-fid's network with its file of weights.

    The distance is called `fid` only for the standard weights (by their sha256) with pytorch-fid's preprocessing. Other distances
    are called `fid_clean`, `fd_inception_<sha8>` and so on. dimensions: 64, 192 and 768 are pytorch-fid's --dims.
    """
    if preprocessing not in PREPROCESSING:
        raise UserError(f"evaluate.preprocessing={preprocessing} is unknown; it is one of {', '.join(PREPROCESSING)}")
    known = Path(INCEPTION_FILE).stem.rsplit("-", 1)[1]  # the name ends with the start of the sha256
    path, sha256, official = found_weights(weights, INCEPTION_URL, known, f"pytorch-fid's Inception, {INCEPTION_FILE} (95 MB),")
    base = "fid" if official else f"fd_inception_{sha256[:8]}"
    suffix = "" if preprocessing == "pytorch-fid" else f"_{preprocessing}"
    prepare, description = PREPROCESSING[preprocessing]
    return Extractor(
        _inception_network(load_weights(path), dimensions, path),
        prepare,
        metric=base + suffix + ("" if dimensions == 2048 else f"_dims{dimensions}"),
        dimensions=dimensions,
        sha256=sha256,
        preprocessing=f"{preprocessing}: {description}",
    )


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


def pytorch_fid_preprocessing(images: torch.Tensor) -> torch.Tensor:
    """Preprocesses as pytorch-fid does: bilinear on [0, 1] without antialiasing."""
    size = (INCEPTION_SIDE, INCEPTION_SIDE)
    return 2 * F.interpolate(in_color(images) / 255, size, mode="bilinear", align_corners=False) - 1


def tf1_preprocessing(images: torch.Tensor) -> torch.Tensor:
    """Preprocesses as the original TensorFlow 1 code and torch-fidelity do."""
    return (resized_as_tf1(in_color(images), INCEPTION_SIDE) - 128) / 128


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
