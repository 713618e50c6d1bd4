"""Speed against what one would use otherwise: `python -m benchmarks [NAME ...]`; the names stand in __main__.py."""
