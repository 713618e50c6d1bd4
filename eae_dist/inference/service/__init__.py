"""The HTTP service of `python -m eae_dist.serve`: a trained model, and a page to look at it."""
