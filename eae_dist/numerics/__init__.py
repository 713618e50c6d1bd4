"""Random numbers, precision and file writing."""
