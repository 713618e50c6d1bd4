"""How float32 tensors are multiplied: on a GPU in TF32 where that is allowed, but the entropy and the losses never are."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def allow_tf32(allowed: bool) -> None:
    """Whether a GPU may from now on round the factors of float32 products and convolutions to TF32, 10 bits of mantissa."""
    # Some releases of torch warn about these names, but torch.compile reads them where only the new ones would do.
    warnings.filterwarnings("ignore", "Please use the new API settings to control TF32", UserWarning)
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Neither autocast nor TF32: what is float32 is computed in float32, whatever train.precision and train.tf32 say."""
    products = torch.backends.cuda.matmul
    # From torch 2.9 on. Setting it hides the older name from whoever reads that, which nobody does in here.
    name, exact = ("fp32_precision", "ieee") if hasattr(products, "fp32_precision") else ("allow_tf32", False)
    before = getattr(products, name)
    setattr(products, name, exact)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        setattr(products, name, before)
