"""The autoencoder and its layers."""
