"""Latents: their densities, their nearest-neighbor index, and their files."""

# torch comes before FAISS, whose wheel makes its own CUDA libraries visible to all that is loaded later.
import torch  # noqa: F401
