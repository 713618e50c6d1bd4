"""Sources: data sets of uint8 images that `python -m eae_dist.pack` converts to shards.

A source is a function that returns a `Source`; its parameters are its arguments on the command line. To add a source, write such
a function and add it to SOURCES. Every source has train, validation and test: the official split if there is one, else a part
of train, drawn by class and always the same. A function that takes no `fit` returns arrays, which pack fits.
"""

from collections.abc import Callable

from eae_dist.data.sources.arrays import npz
from eae_dist.data.sources.celeba import celeba
from eae_dist.data.sources.cifar import cifar10
from eae_dist.data.sources.folders import imagefolder
from eae_dist.data.sources.idx import fashion_mnist, mnist, mnist5k
from eae_dist.data.sources.parquet import parquet
from eae_dist.data.sources.samples import CACHE, Samples, Source, held_out, numbered, with_held_out_splits
from eae_dist.data.sources.webdataset import webdataset
from eae_dist.data.split_names import SPLITS

SOURCES: dict[str, Callable[..., Source]] = {
    "mnist5k": mnist5k,
    "mnist": mnist,
    "fashion_mnist": fashion_mnist,
    "cifar10": cifar10,
    "celeba": celeba,
    "imagefolder": imagefolder,
    "npz": npz,
    "webdataset": webdataset,
    "parquet": parquet,
}

__all__ = ["CACHE", "SOURCES", "SPLITS", "Samples", "Source", "held_out", "numbered", "with_held_out_splits"]
