"""A latent-diffusion model with its tokenizer and noise schedule, and what it makes of prompts."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attrib_jax.convert.tokenizer import PromptReport, inspect_prompt, tokenize_prompts, tokenizer_parts
from attrib_jax.diffusion.schedule import NoiseSchedule
from attrib_jax.models.clip import CLIPTextModel, CLIPTextModelWithProjection
from attrib_jax.models.unet import UNet2DConditionModel, UNetConfig, empty_conditioning
from attrib_jax.models.vae import AutoencoderKL, PixelAutoencoder

# The text encoders of a model with two, as `Pipeline.params` and folders name them.
TEXT_PARTS = ("text_encoder", "text_encoder_2")


@dataclasses.dataclass(frozen=True)
class TextEncoderPair:
    """The text encoders of Stable Diffusion XL as one; `encode_text` takes it where others have one encoder."""

    first: CLIPTextModel
    second: CLIPTextModelWithProjection

    def encode(self, params: Any, ids: Any) -> dict[str, jax.Array]:
        """Tokens of both, by the name of their encoder -> "text" (B, L, d1 + d2) and "pooled" (B, p)."""
        first, second = TEXT_PARTS
        states: Any = self.first.apply({"params": params[first]}, ids[first], penultimate=True)
        projected: Any = self.second.apply({"params": params[second]}, ids[second])
        return {"text": jnp.concatenate([states, projected.penultimate], axis=-1), "pooled": projected.pooled}


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
    """A latent-diffusion model with all that it needs to read a prompt and an image.

    Attributes:
      unet, vae, text_encoder: Flax modules; each holds its frozen `config`.
      tokenizer: a `transformers.CLIPTokenizer`.
      schedule: the `NoiseSchedule` of training.
      params: nested dicts of arrays, keyed `unet`, `vae`, `text_encoder`, and `text_encoder_2` where there is one.
      text_encoder_2, tokenizer_2: of Stable Diffusion XL, whose pooled text they make; None for others.
      zeros_for_empty_prompt: whether guidance is away from text states of zeros instead of those of the empty prompt
        (diffusers' `force_zeros_for_empty_prompt`, which Stable Diffusion XL's base model sets).
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL | PixelAutoencoder
    text_encoder: CLIPTextModel
    tokenizer: Any
    schedule: NoiseSchedule
    params: dict[str, Any]
    text_encoder_2: CLIPTextModelWithProjection | None = None
    tokenizer_2: Any = None
    zeros_for_empty_prompt: bool = False

    def __post_init__(self):
        check_parts(
            self.unet, self.vae, self.text_encoder, self.tokenizer, self.text_encoder_2, self.tokenizer_2, whole=True
        )

    @property
    def conditioner(self) -> CLIPTextModel | TextEncoderPair:
        """What `encode_text` takes: the text encoder, or the pair of them."""
        if self.text_encoder_2 is None:
            return self.text_encoder
        return TextEncoderPair(self.text_encoder, self.text_encoder_2)

    @property
    def conditioner_params(self) -> Any:
        """The parameters of `conditioner`."""
        if self.text_encoder_2 is None:
            return self.params["text_encoder"]
        return {part: self.params[part] for part in TEXT_PARTS}

    @property
    def encoders(self) -> dict[str, Any]:
        """Part -> text encoder, those that the model has."""
        second = {} if self.text_encoder_2 is None else {"text_encoder_2": self.text_encoder_2}
        return {"text_encoder": self.text_encoder, **second}

    @property
    def latent_size(self) -> tuple[int, int]:
        """See the function `latent_size`."""
        size = self.unet.config.sample_size
        if size is None:
            raise ValueError("unet/config.json has no sample_size; add the height and width of the model's latents")
        height, width = (size, size) if isinstance(size, int) else size
        return height, width

    def tokenize(self, prompts: Sequence[str]) -> Any:
        """See the function `tokenize`."""
        first = tokenize_prompts(self.tokenizer, prompts)
        if self.tokenizer_2 is None:
            return first
        return dict(zip(TEXT_PARTS, (first, tokenize_prompts(self.tokenizer_2, prompts))))

    def prompt_report(self, prompt: str) -> PromptReport:
        """See the function `prompt_report`."""
        return inspect_prompt(self.tokenizer, prompt)

    def configs(self) -> dict[str, Any]:
        """All that decides what the model computes but for its weights, as JSON values."""
        configs: dict[str, Any] = {
            "unet": self.unet.config.to_dict(),
            "vae": self.vae.config.to_dict(),
            "text_encoder": self.text_encoder.config.to_dict(),
            "schedule": self.schedule.to_config(),
            "max_tokens": self.tokenizer.model_max_length,
            **tokenizer_parts(self.tokenizer),
        }
        if self.text_encoder_2 is not None:
            configs |= {
                "text_encoder_2": self.text_encoder_2.config.to_dict(),
                "tokenizer_2": tokenizer_parts(self.tokenizer_2),
                "zeros_for_empty_prompt": self.zeros_for_empty_prompt,
            }
        return configs


def check_parts(
    unet: UNet2DConditionModel | None = None,
    vae: AutoencoderKL | PixelAutoencoder | None = None,
    text_encoder: CLIPTextModel | None = None,
    tokenizer: Any = None,
    text_encoder_2: CLIPTextModelWithProjection | None = None,
    tokenizer_2: Any = None,
    *,
    whole: bool = False,
) -> None:
    """Raises ValueError, naming both sides, unless the given parts make one model; None is a part that is not given.

    With `whole`, the given parts are all: None is a part that the model lacks.
    """

    def check_equal(left: str, left_value: int, right: str, right_value: int) -> None:
        if left_value != right_value:
            raise ValueError(f"the parts do not fit: {left} is {left_value} and {right} is {right_value}")

    if unet is not None and text_encoder_2 is not None and unet.config.pooled_width is None:
        raise ValueError(
            "the parts do not fit: the unet takes text states alone (addition_embed_type is None), and the model has a "
            "second text encoder, as Stable Diffusion XL; give a UNet of that family"
        )
    if whole and unet is not None and unet.config.pooled_width is not None and text_encoder_2 is None:
        raise ValueError(
            "the parts do not fit: the unet takes pooled text (addition_embed_type is 'text_time'), and the model has "
            "no text_encoder_2 that would make it; give a model of the Stable Diffusion XL family"
        )
    if (
        unet is not None
        and text_encoder is not None
        and (unet.config.pooled_width is None or text_encoder_2 is not None)
    ):
        names, width = "text_encoder hidden_size", text_encoder.config.hidden_size
        if text_encoder_2 is not None:
            names, width = f"{names} plus that of text_encoder_2", width + text_encoder_2.config.hidden_size
        check_equal("unet cross_attention_dim", unet.config.cross_attention_dim, names, width)
    if unet is not None and text_encoder_2 is not None:
        config, width = unet.config, text_encoder_2.config.projection_dim
        name = "unet projection_class_embeddings_input_dim less 6 times addition_time_embed_dim"
        check_equal(name, config.pooled_width, "text_encoder_2 projection_dim", width)
    if unet is not None and vae is not None:
        check_equal("unet in_channels", unet.config.in_channels, "vae latent_channels", vae.config.latent_channels)
    for number, tokens, encoder in (("", tokenizer, text_encoder), ("second ", tokenizer_2, text_encoder_2)):
        if tokens is None or encoder is None:
            continue
        text = encoder.config
        if len(tokens) > text.vocab_size:
            raise ValueError(
                f"the {number}tokenizer has {len(tokens)} tokens and the {number}text encoder only {text.vocab_size}"
            )
        if tokens.model_max_length > text.max_position_embeddings:
            raise ValueError(
                f"the {number}tokenizer's model_max_length is {tokens.model_max_length} and the {number}text encoder "
                f"has only {text.max_position_embeddings} positions; set model_max_length in tokenizer_config.json"
            )
    if tokenizer is not None and tokenizer_2 is not None:
        lengths = tokenizer.model_max_length, tokenizer_2.model_max_length
        check_equal("the tokenizer's model_max_length", lengths[0], "the second tokenizer's", lengths[1])


def tokenize(pipeline: Pipeline, prompts: Sequence[str]) -> Any:
    """Prompts -> input_ids (B, L) int32, L the tokenizer's `model_max_length`: truncated and padded to it.

    For a model with two tokenizers a dict of both, by the name of their text encoder.
    """
    return pipeline.tokenize(prompts)


def prompt_report(pipeline: Pipeline, prompt: str) -> PromptReport:
    """Says what the tokenizer keeps of `prompt`, what it cuts, and which words it does not know whole."""
    return pipeline.prompt_report(prompt)


def latent_size(pipeline: Pipeline) -> tuple[int, int]:
    """Height and width of the latents that a pipeline was trained on.

    Raises ValueError where the UNet's config does not give a `sample_size`.
    """
    return pipeline.latent_size


def text_width(pipeline: Pipeline) -> int:
    """Width of the text states that the denoiser reads."""
    config: Any = pipeline.unet.config
    return config.cross_attention_dim if isinstance(config, UNetConfig) else config.conditioning["text"][-1]


def initial_unet(pipeline: Pipeline, key: jax.Array) -> Any:
    """Untrained parameters of the pipeline's UNet, a nested dict; `key` is a scalar random key."""
    require_unet(pipeline, "a model from scratch (retraining, mirrored unlearning)")
    latents = (1, *latent_size(pipeline), pipeline.unet.config.in_channels)
    return _initialise(pipeline.unet, key, latents, pipeline.tokenizer.model_max_length)


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _initialise(unet: UNet2DConditionModel, key: jax.Array, latents: tuple[int, ...], tokens: int) -> Any:
    conditioning = empty_conditioning(unet.config, 1, tokens)
    return unet.init(key, jnp.zeros(latents), jnp.zeros((1,), jnp.int32), conditioning)["params"]


def encode_text(text_encoder: CLIPTextModel | TextEncoderPair, params: Any, input_ids: Any) -> Any:
    """Tokens -> the part of the conditioning that a text decides.

    Args:
      text_encoder: `Pipeline.conditioner`.
      params: `Pipeline.conditioner_params`.
      input_ids: from `tokenize`: (B, L) int32, or a dict of these.

    Returns:
      Text states (B, L, d), as the UNet's cross-attention takes them; for a pair of encoders the dict of their states
      joined along the width, "text" (B, L, d1 + d2), and of the "pooled" text (B, p).
    """
    ids = jax.tree.map(lambda each: jnp.asarray(each, jnp.int32), input_ids)
    one: Any = text_encoder
    if hasattr(one, "encode"):  # several encoders as one
        return one.encode(params, ids)
    return one.apply({"params": params}, ids)


def takes_size_ids(pipeline: Pipeline) -> bool:
    """Whether the denoiser is conditioned on the sizes and the crop of an image, see `size_ids`."""
    return isinstance(pipeline.unet.config, UNetConfig) and pipeline.unet.config.pooled_width is not None


def size_ids(original: tuple[int, int], crop: tuple[int, int], target: tuple[int, int]) -> np.ndarray:
    """Stable Diffusion XL's size ids of an image (6,) float32.

    Args:
      original: (height, width) in pixels before it was resized.
      crop: (top, left) of what was cut out of the resized image.
      target: (height, width) of that.
    """
    return np.array([*original, *crop, *target], np.float32)


def with_size_ids(pipeline: Pipeline, conditioning: Any, ids: Any = None) -> Any:
    """What `encode_text` returns, with the size `ids` that the denoiser takes beside it, if it does.

    `ids` are (6,) or (B, 6); those of whole images of the model's own size if None, with which it samples.
    """
    if not takes_size_ids(pipeline):
        return conditioning
    if ids is None:
        size = image_size(pipeline)
        ids = size_ids(size, (0, 0), size)
    shape = (*np.shape(conditioning["pooled"])[:-1], np.shape(ids)[-1])
    return {**conditioning, "ids": jnp.broadcast_to(jnp.asarray(ids, jnp.float32), shape)}


def unconditional(pipeline: Pipeline) -> Any:
    """What guidance leads away from, without size ids and batch axis: the empty prompt's conditioning, or zeros."""
    empty = encode_text(pipeline.conditioner, pipeline.conditioner_params, tokenize(pipeline, [""]))
    empty = jax.tree.map(lambda leaf: leaf[0], empty)
    return jax.tree.map(jnp.zeros_like, empty) if pipeline.zeros_for_empty_prompt else empty


def image_size(pipeline: Pipeline) -> tuple[int, int]:
    """Height and width in pixels of the images that a pipeline was trained on."""
    height, width = (size * pipeline.vae.config.downscale for size in latent_size(pipeline))
    return height, width


def require_unet(pipeline: Pipeline, what: str) -> None:
    """Raises ValueError where the model has a diffusion transformer, which `what` does not support."""
    if not isinstance(pipeline.unet.config, UNetConfig):
        name = type(pipeline.unet).__name__
        raise ValueError(f"{what} is not supported for a model with a transformer ({name}); give one with a UNet")


def require_one_text_encoder(pipeline: Pipeline, what: str, instead: str) -> None:
    """Raises ValueError where the model has two text encoders, which `what` does not support; says what to do."""
    require_unet(pipeline, what)
    if pipeline.text_encoder_2 is not None:
        raise ValueError(f"{what} is not supported for a model with two text encoders (Stable Diffusion XL); {instead}")
