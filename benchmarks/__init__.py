"""Speed against what one would use otherwise: `python -m benchmarks [entropy] [stream] [training]`."""
