"""Speed comparisons with alternatives: `python -m benchmarks [NAME ...]`; __main__.py lists the names."""
