"""Distributed training and honest judging of entropic autoencoders.

The names below are imported when they are first used, so that `import eae_dist` alone does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from eae_dist.data.stream import ShardStream
    from eae_dist.inference.trained_model import TrainedModel, load
    from eae_dist.latent.densities import DENSITIES
    from eae_dist.latent.flow import Flow
    from eae_dist.latent.gaussian import Gaussian, Isotropic
    from eae_dist.latent.index import LatentIndex
    from eae_dist.latent.mixture import Mixture
    from eae_dist.latent.two_stage import TwoStage
    from eae_dist.losses.entropy import knn_entropy
    from eae_dist.metrics.frechet import FeatureStats, frechet_distance
    from eae_dist.model.norm import GlobalBatchNorm

_HOMES = {
    "DENSITIES": "latent.densities",
    "FeatureStats": "metrics.frechet",
    "Flow": "latent.flow",
    "Gaussian": "latent.gaussian",
    "GlobalBatchNorm": "model.norm",
    "Isotropic": "latent.gaussian",
    "LatentIndex": "latent.index",
    "Mixture": "latent.mixture",
    "ShardStream": "data.stream",
    "TrainedModel": "inference.trained_model",
    "TwoStage": "latent.two_stage",
    "frechet_distance": "metrics.frechet",
    "knn_entropy": "losses.entropy",
    "load": "inference.trained_model",
}
__all__ = [
    "DENSITIES",
    "FeatureStats",
    "Flow",
    "Gaussian",
    "GlobalBatchNorm",
    "Isotropic",
    "LatentIndex",
    "Mixture",
    "ShardStream",
    "TrainedModel",
    "TwoStage",
    "__version__",
    "frechet_distance",
    "knn_entropy",
    "load",
]


if not TYPE_CHECKING:  # with this function, type checkers would accept every name

    def __getattr__(name: str) -> object:
        if name in _HOMES:
            value = globals()[name] = getattr(import_module(f"eae_dist.{_HOMES[name]}"), name)
            return value
        raise AttributeError(f"module 'eae_dist' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
