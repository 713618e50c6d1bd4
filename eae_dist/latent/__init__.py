"""Latents: their densities, their nearest-neighbor index, and their files."""
