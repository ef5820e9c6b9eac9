"""Flax modules of the UNet, the autoencoder and the CLIP text encoder, with their configs."""
