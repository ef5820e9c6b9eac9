"""Noise schedule, losses, samplers and the training step: pure functions."""
