"""Precision of float32 products: a GPU may use TF32 if allowed, but never for the entropy and the losses."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def allow_tf32(allowed: bool) -> None:
    """Allows or forbids a GPU to round the factors of float32 products and convolutions to TF32, 10 bits of mantissa."""
    # Some releases of torch warn about these names, but torch.compile still reads them.
    warnings.filterwarnings("ignore", "Please use the new API settings to control TF32", UserWarning)
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Turns autocast and TF32 off: float32 tensors are computed in float32, whatever train.precision and train.tf32 are."""
    products = torch.backends.cuda.matmul
    # torch 2.9 and later have fp32_precision. After it is set, the older name is not readable; nothing in here reads it.
    name, exact = ("fp32_precision", "ieee") if hasattr(products, "fp32_precision") else ("allow_tf32", False)
    before = getattr(products, name)
    setattr(products, name, exact)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        setattr(products, name, before)
