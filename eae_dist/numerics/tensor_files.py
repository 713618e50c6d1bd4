"""Safetensors files with a checksum of their tensors, which safetensors itself does not keep."""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

CHECKSUM = "tensors_sha256"


def tensors_to_bytes(tensors: dict[str, torch.Tensor], about: dict[str, str]) -> bytes:
    """Returns the bytes of a safetensors file with the tensors, and with `about` and a checksum as its metadata."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return save(tensors, metadata={**about, CHECKSUM: _checksum(tensors)})


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Returns the tensors of a file and its metadata. Raises ValueError for a damaged file; one without a checksum is read."""
    try:
        with safe_open(path, "pt") as file:
            about = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except (SafetensorError, OSError) as error:
        raise ValueError(f"the file is damaged: {error}") from error
    if about.pop(CHECKSUM, None) not in (None, _checksum(tensors)):
        raise ValueError("the file is damaged: its tensors do not match their checksum")
    return tensors, about


def _checksum(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
