"""A latent-diffusion model with its tokenizer and noise schedule, and what it makes of prompts."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attrib_jax.convert.tokenizer import PromptReport, inspect_prompt, tokenize_prompts
from attrib_jax.diffusion.schedule import NoiseSchedule
from attrib_jax.models.clip import CLIPTextModel
from attrib_jax.models.unet import UNet2DConditionModel
from attrib_jax.models.vae import AutoencoderKL, PixelAutoencoder


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
    """A latent-diffusion model with all that it needs to read a prompt and an image.

    Attributes:
      unet, vae, text_encoder: Flax modules; each holds its frozen `config`.
      tokenizer: a `transformers.CLIPTokenizer`.
      schedule: the `NoiseSchedule` of training.
      params: nested dicts of arrays, keyed `unet`, `vae` and `text_encoder`.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL | PixelAutoencoder
    text_encoder: CLIPTextModel
    tokenizer: Any
    schedule: NoiseSchedule
    params: dict[str, Any]

    def __post_init__(self):
        check_parts(self.unet, self.vae, self.text_encoder, self.tokenizer)


def check_parts(
    unet: UNet2DConditionModel | None = None,
    vae: AutoencoderKL | PixelAutoencoder | None = None,
    text_encoder: CLIPTextModel | None = None,
    tokenizer: Any = None,
) -> None:
    """Raises ValueError, naming both sides, unless the given parts make one model."""

    def check_equal(left: str, left_value: int, right: str, right_value: int) -> None:
        if left_value != right_value:
            raise ValueError(f"the parts do not fit: {left} is {left_value} and {right} is {right_value}")

    if unet is not None and text_encoder is not None:
        width = text_encoder.config.hidden_size
        check_equal("unet cross_attention_dim", unet.config.cross_attention_dim, "text_encoder hidden_size", width)
    if unet is not None and vae is not None:
        check_equal("unet in_channels", unet.config.in_channels, "vae latent_channels", vae.config.latent_channels)
    if tokenizer is None or text_encoder is None:
        return
    text = text_encoder.config
    if len(tokenizer) > text.vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens and the text encoder only {text.vocab_size}")
    if tokenizer.model_max_length > text.max_position_embeddings:
        raise ValueError(
            f"the tokenizer's model_max_length is {tokenizer.model_max_length} and the text encoder has only "
            f"{text.max_position_embeddings} positions; set model_max_length in tokenizer_config.json"
        )


def tokenize(pipeline: Pipeline, prompts: Sequence[str]) -> np.ndarray:
    """Prompts -> input_ids (B, L) int32, L the tokenizer's `model_max_length`: truncated and padded to it."""
    return tokenize_prompts(pipeline.tokenizer, prompts)


def prompt_report(pipeline: Pipeline, prompt: str) -> PromptReport:
    """Says what the tokenizer keeps of `prompt`, what it cuts, and which words it does not know whole."""
    return inspect_prompt(pipeline.tokenizer, prompt)


def latent_size(pipeline: Pipeline) -> tuple[int, int]:
    """Height and width of the latents that a pipeline was trained on.

    Raises ValueError where the UNet's config does not give a `sample_size`.
    """
    size = pipeline.unet.config.sample_size
    if size is None:
        raise ValueError("unet/config.json has no sample_size; add the height and width of the model's latents")
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def initial_unet(pipeline: Pipeline, key: jax.Array) -> Any:
    """Untrained parameters of the pipeline's denoiser, a nested dict; `key` is a scalar random key."""
    latents = (1, *latent_size(pipeline), pipeline.unet.config.in_channels)
    return _initialise(pipeline.unet, key, latents, pipeline.tokenizer.model_max_length)


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _initialise(unet: UNet2DConditionModel, key: jax.Array, latents: tuple[int, ...], tokens: int) -> Any:
    text = jnp.zeros((1, tokens, unet.config.cross_attention_dim))
    return unet.init(key, jnp.zeros(latents), jnp.zeros((1,), jnp.int32), text)["params"]


def encode_text(text_encoder: CLIPTextModel, params: Any, input_ids: jax.typing.ArrayLike) -> jax.Array:
    """input_ids (B, L) int32 -> text states (B, L, d), as the UNet's cross-attention takes them."""
    states: Any = text_encoder.apply({"params": params}, jnp.asarray(input_ids, jnp.int32))
    return states
