"""The features of images that a network gives, and what all networks share.

b: images of a batch, c: 1 or 3 channels, f: features.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from eae_dist.errors import MissingFile, UserError
from eae_dist.numerics.atomic_files import sha256_of

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


def in_color(images: torch.Tensor) -> torch.Tensor:
    """Converts uint8 [b, 1 or 3, h, w] to float32 [b, 3, h, w], 0 to 255; gray becomes three equal channels."""
    return images.float().expand(-1, 3, -1, -1)


def resized_as_tf1(images: torch.Tensor, side: int) -> torch.Tensor:
    """Resizes float images to side x side as TensorFlow 1 does: bilinear, positions measured from the corners of pixels."""

    def resized(x: torch.Tensor, dim: int) -> torch.Tensor:
        place = torch.arange(side, dtype=torch.float32, device=x.device) * (x.shape[dim] / side)
        low = place.floor().long()
        below, above = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=x.shape[dim] - 1))
        weight = (place - low).view([-1 if d == dim else 1 for d in range(4)])
        return below + (above - below) * weight

    return resized(resized(images, 3), 2)


def torch_hub(file: str) -> Path:
    """Returns the path at which torch's hub keeps a file of weights."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(os.environ.get("TORCH_HOME", f"{cache}/torch")).expanduser() / "hub" / "checkpoints" / file


def found_weights(weights: str | Path | None, url: str, sha256: str, what: str) -> tuple[Path, str, bool]:
    """Returns the file of weights, its sha256 and whether it is the official one.

    weights: the user's file; default: the place of the official one in the cache of torch's hub. sha256: the start of the
    official file's. Raises FileNotFoundError if there is no file, ValueError if another one lies in the official place.
    """
    path = Path(weights) if weights is not None else torch_hub(url.rpartition("/")[2])
    if not path.is_file():
        raise MissingFile(
            f"{path} does not exist: the weights of {what} are not part of this package and are not downloaded; get them from "
            f"{url} and put them there, or set evaluate.weights"
        )
    found = sha256_of(path)
    if weights is None and not found.startswith(sha256):
        raise UserError(
            f"{path} is damaged or another file: its sha256 begins with {found[:8]}, expected {sha256[:8]}; get it again from "
            f"{url}, or set evaluate.weights to your own weights"
        )
    return path, found, found.startswith(sha256)


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """Reads a file of weights without unpickling objects. Raises ValueError if it is damaged or holds something else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # other bytes give many types of errors, and torch's message advises unsafe unpickling
        raise UserError(f"{path} cannot be read as a file of weights: it is damaged, or holds more than tensors") from error
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, expected a dict of weights")
    return state
