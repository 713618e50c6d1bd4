"""Distributed training and honest judging of entropic autoencoders."""

__version__ = "0.1.0"


def __getattr__(name: str):
    # Lazily, so that `import eae_dist` alone does not import torch.
    if name == "load":
        from eae_dist.generation import load

        return load
    raise AttributeError(f"module 'eae_dist' has no attribute {name!r}")
