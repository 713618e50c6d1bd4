"""Data sets: packing, indexing, reading and ordering of images."""
