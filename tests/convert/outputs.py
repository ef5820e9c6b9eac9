"""Outputs of our tiny pipeline and of the PyTorch one, on the same fixed inputs."""

import functools

import jax
import numpy as np
import torch

from attrib_jax.convert.pipeline import tokenize
from tests.tiny_pipeline import MAX_LENGTH, TEXT_WIDTH

_RNG = np.random.default_rng(0)
_LATENTS = _RNG.normal(size=(2, 8, 8, 4)).astype(np.float32)
_TEXT = _RNG.normal(size=(2, MAX_LENGTH, TEXT_WIDTH)).astype(np.float32)
_TIMESTEPS = np.array([10, 900], np.int32)


@functools.lru_cache
def _compiled(module):
    return jax.jit(module.apply)


def unet_output(pipeline) -> np.ndarray:
    """The UNet's output (2, 8, 8, 4)."""
    return np.asarray(_compiled(pipeline.unet)({"params": pipeline.params["unet"]}, _LATENTS, _TIMESTEPS, _TEXT))


def torch_unet_output(theirs) -> np.ndarray:
    """The same of a diffusers pipeline."""
    with torch.no_grad():
        sample = theirs.unet(
            torch.from_numpy(_LATENTS.transpose(0, 3, 1, 2)), torch.from_numpy(_TIMESTEPS), torch.from_numpy(_TEXT)
        ).sample
    return sample.permute(0, 2, 3, 1).numpy()


def text_states(pipeline, prompts) -> np.ndarray:
    """The text encoder's states of prompts (B, L, d)."""
    ids = tokenize(pipeline, prompts)
    return np.asarray(_compiled(pipeline.text_encoder)({"params": pipeline.params["text_encoder"]}, ids))


def torch_text_states(theirs, prompts) -> np.ndarray:
    """The same of a diffusers pipeline."""
    with torch.no_grad():
        states, _ = theirs.encode_prompt(prompts, "cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    return states.numpy()


def relative_error(actual, expected) -> float:
    """The largest absolute difference over the largest absolute value."""
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def assert_same_modules(left, right) -> None:
    """Two diffusers pipelines have the same tensors under the same names."""
    for part in ("unet", "vae", "text_encoder"):
        states = [getattr(side, part).state_dict() for side in (left, right)]
        assert states[0].keys() == states[1].keys()
        for name, tensor in states[0].items():
            assert torch.equal(tensor, states[1][name]), f"{part}: {name}"
