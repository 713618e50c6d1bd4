"""What `python -m eae_dist.serve` runs: a trained model over HTTP, and a page to look at it."""
