"""Uses of a trained model: decoding, encoded data sets, and the HTTP service."""
