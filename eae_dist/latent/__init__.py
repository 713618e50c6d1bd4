"""Densities of the latents: what is drawn from to generate."""
