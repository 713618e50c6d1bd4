"""DINOv2 (Oquab et al. 2024), whose distance agrees with people better than FID does (Stein et al. 2023).

The network is timm's, an optional dependency; the weights are the official file, which the user fetches. A feature is the class
token after the last norm, for an image of 224 x 224 pixels.
"""

import functools
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from eae_dist.errors import UserError
from eae_dist.metrics.extractor import GRAY, Extractor, found_weights, in_color, load_weights, resized_as_tf1

URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_{0}/dinov2_{0}_pretrain.pth"
NETWORKS = {  # timm's name, features, sha256 of the official file
    "vits14": ("vit_small_patch14_dinov2", 384, "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9"),
    "vitl14": ("vit_large_patch14_dinov2", 1024, "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428"),
}
SIDE, PATCH = 224, 14  # pixels
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels


def dinov2(size: str, weights: str | Path | None = None, preprocessing: str = "dgm-eval") -> Extractor:
    """Returns DINOv2 of a row of NETWORKS, with its file of weights.

    The distance is called `fd_dinov2_vitl14` only for the official weights (by their sha256) with dgm-eval's preprocessing.
    Other distances are called `fd_dinov2_vitl14_tf1`, `fd_dinov2_vitl14_<sha8>` and so on.
    """
    if preprocessing not in PREPROCESSING:
        raise UserError(f"evaluate.preprocessing={preprocessing} is unknown; for DINOv2 it is one of {', '.join(PREPROCESSING)}")
    name, dimensions, known = NETWORKS[size]
    path, sha256, official = found_weights(weights, URL.format(size), known, f"DINOv2 {size}")
    prepare, description = PREPROCESSING[preprocessing]
    suffixes = ("" if official else f"_{sha256[:8]}") + ("" if preprocessing == "dgm-eval" else f"_{preprocessing}")
    return Extractor(
        vision_transformer(name, load_weights(path), path),
        prepare,
        metric=f"fd_dinov2_{size}{suffixes}",
        dimensions=dimensions,
        sha256=sha256,
        preprocessing=f"{preprocessing}: {description}",
    )


def vision_transformer(name: str, state: dict[str, torch.Tensor], path: Path) -> nn.Module:
    """Returns timm's network of that name with DINOv2's weights, [b, 3, 224, 224] -> [b, f]."""
    try:
        import timm
    except ImportError as error:
        raise UserError("the features dinov2_* need the package timm: pip install 'eae-dist[dinov2]'") from error
    network = timm.create_model(name, pretrained=False, img_size=SIDE, num_classes=0)
    try:
        state = {key: tensor for key, tensor in state.items() if key != "mask_token"}  # it serves training alone
        state["pos_embed"] = positions(state["pos_embed"])
        network.load_state_dict(state)
    except (AttributeError, IndexError, KeyError, RuntimeError) as error:
        raise UserError(f"{path} does not hold the weights of {name} ({str(error)[:300]})") from error
    return network


def positions(embedding: torch.Tensor) -> torch.Tensor:
    """Returns the embeddings of the class token and of 16 x 16 patches, from those of 37 x 37: [1, 1 + 37^2, f] -> [1, 257, f].

    The official code adds 0.1 to the number of patches before it computes the ratio of the sizes, and the weights go with that.
    """
    across, before = SIDE // PATCH, math.isqrt(embedding.shape[1] - 1)
    if before == across:
        return embedding
    patches = embedding[:, 1:].unflatten(1, (before, before)).permute(0, 3, 1, 2)
    ratio = (across + 0.1) / before
    resized = F.interpolate(patches, scale_factor=(ratio, ratio), mode="bicubic", align_corners=False)
    return torch.cat([embedding[:, :1], resized.flatten(2).mT], 1)


def dgm_eval_preprocessing(images: torch.Tensor) -> torch.Tensor:
    """Preprocesses as dgm-eval, the code of Stein et al., does: Pillow's bicubic on uint8 with antialiasing."""
    if images.shape[2:] != (SIDE, SIDE):
        planes = [  # Pillow resizes each channel by itself
            np.asarray(Image.fromarray(plane).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
            for plane in images.cpu().numpy().reshape(-1, *images.shape[2:])
        ]
        images = torch.from_numpy(np.stack(planes)).view(*images.shape[:2], SIDE, SIDE).to(images.device)
    return _normalized(in_color(images) / 255)


def tf1_preprocessing(images: torch.Tensor) -> torch.Tensor:
    """Preprocesses as torch-fidelity does."""
    return _normalized(resized_as_tf1(in_color(images), SIDE) / 255)


def _normalized(images: torch.Tensor) -> torch.Tensor:
    mean, deviation = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (MEAN, DEVIATION))
    return (images - mean) / deviation


SCALED = "(v/255 - mean)/deviation of ImageNet"
PREPROCESSING = {
    "dgm-eval": (dgm_eval_preprocessing, f"{GRAY}, Pillow's bicubic to 224x224 with antialiasing, {SCALED}"),
    "tf1": (tf1_preprocessing, f"{GRAY}, TensorFlow 1's bilinear to 224x224 without antialiasing, {SCALED}"),
}
dinov2_vits14, dinov2_vitl14 = (functools.partial(dinov2, size) for size in ("vits14", "vitl14"))
