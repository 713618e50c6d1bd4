"""The networks that give the features by which images are compared. Each names its own distance; only one distance is called FID.

To add a network, write a function that returns an `Extractor` and add a row to FEATURES. Nothing is downloaded, and weights are
read without unpickling objects.
"""

import sys
from collections.abc import Callable
from pathlib import Path

from eae_dist.errors import UserError
from eae_dist.metrics.dinov2 import dinov2_vitl14, dinov2_vits14
from eae_dist.metrics.efficientnet import SMALL_SIDE, efflite0, efflite0_64px
from eae_dist.metrics.extractor import Extractor
from eae_dist.metrics.inception import inception
from eae_dist.model.own_networks import imported
from eae_dist.numerics.atomic_files import sha256_of

FEATURES: dict[str, Callable[..., Extractor]] = {
    "inception": inception,
    "efflite0": efflite0,
    "efflite0_64px": efflite0_64px,
    "dinov2_vits14": dinov2_vits14,
    "dinov2_vitl14": dinov2_vitl14,
}
OF_A_FILE = ("inception", "dinov2_vits14", "dinov2_vitl14")  # the user has their weights and chooses their preprocessing


def features_for(height: int, width: int) -> str:
    """Returns the default row of FEATURES for images of that size; docs/results/judges.md gives the reason."""
    return "efflite0_64px" if max(height, width) <= SMALL_SIDE else "efflite0"


def build_features(name: str, *, weights: str | Path | None = None, preprocessing: str | None = None) -> Extractor:
    """Returns the extractor of that row of FEATURES, or of a user's function named `package.module:function`.

    weights: the file of weights, and preprocessing: how images are prepared, for the rows of OF_A_FILE only. Raises ValueError
    for an unknown name or option or a damaged file, FileNotFoundError for a missing file.
    """
    if name in OF_A_FILE:
        return FEATURES[name](weights, **({} if preprocessing is None else {"preprocessing": preprocessing}))
    if weights is not None or preprocessing is not None:
        of_a_file = ", ".join(OF_A_FILE)
        raise UserError(f"evaluate.features={name} has its own weights and preprocessing; these are options of {of_a_file}")
    if name in FEATURES:
        return FEATURES[name]()
    if ":" in name:
        return users_function(name)
    raise UserError(
        f"evaluate.features={name} is unknown; it is one of {', '.join(FEATURES)} or your function package.module:function"
    )


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
