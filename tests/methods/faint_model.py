"""A model that mirrored unlearning has room to unlearn from."""

import dataclasses

import jax


def make_faint_model(pipeline):
    """`pipeline` predicting almost nothing: its loss is near 1, and an untrained one's above."""
    unet = pipeline.params["unet"]
    small = unet | {"conv_out": jax.tree.map(lambda leaf: 0.1 * leaf, unet["conv_out"])}
    return dataclasses.replace(pipeline, params=pipeline.params | {"unet": small})
