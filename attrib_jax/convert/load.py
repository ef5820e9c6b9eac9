"""A pipeline from everything that people keep beside a model: another UNet, Custom Diffusion weights, tokens, LoRA."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from attrib_jax.convert.adapters.custom_diffusion import apply_custom_diffusion
from attrib_jax.convert.adapters.lora import merge_lora
from attrib_jax.convert.adapters.textual_inversion import add_tokens, read_token_file
from attrib_jax.convert.pipeline import Pipeline, load_pipeline


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """Where a pipeline comes from; applied in the order of the attributes.

    Attributes:
      model: diffusers folder, Hugging Face id, or a single file in the original latent-diffusion naming.
      variant: of the weight files, such as `fp16`; None for full precision where it is there.
      tokenizer: tokenizer or pipeline folder, for a single file, which has none.
      prediction_type: `epsilon` or `v_prediction`, in place of what the files say; a single file may not tell.
      unet: UNet weights that replace the model's: a folder, or a bare state dict with `unet_config`.
      unet_config: `mscoco`, or a json file; brings the noise schedule that the UNet was trained with.
      custom_diffusion: Custom Diffusion weights, or the folder with them and their `<token>` files.
      tokens: textual-inversion files.
      lora: LoRA weights of attention projections in diffusers' format.
      lora_scale: what they are multiplied by.
    """

    model: str
    variant: str | None = None
    tokenizer: str | None = None
    prediction_type: str | None = None
    unet: str | None = None
    unet_config: str | None = None
    custom_diffusion: str | None = None
    tokens: tuple[str, ...] = ()
    lora: str | None = None
    lora_scale: float = 1.0

    def __post_init__(self):
        if self.unet_config is not None and self.unet is None:
            raise ValueError(f"unet_config is {self.unet_config!r} but unet is not given; give the UNet's weights too")
        if self.lora is None and self.lora_scale != 1.0:
            raise ValueError(f"lora_scale is {self.lora_scale} but lora is not given")


def load_model(source: ModelSource, dtype: Any = jnp.float32) -> Pipeline:
    """Loads a pipeline and applies what `source` adds to it.

    Raises:
      FileNotFoundError: a file or folder is missing.
      ValueError: a file is damaged, or does not fit the model; see the functions that read it.
    """
    pipeline = load_pipeline(
        source.model,
        dtype,
        variant=source.variant,
        tokenizer=source.tokenizer,
        prediction_type=source.prediction_type,
        unet=source.unet,
        unet_config=source.unet_config,
    )
    if source.custom_diffusion is not None:
        pipeline = apply_custom_diffusion(pipeline, source.custom_diffusion)
    for file in source.tokens:
        pipeline = add_tokens(pipeline, read_token_file(file))
    if source.lora is not None:
        pipeline = merge_lora(pipeline, source.lora, source.lora_scale)
    return pipeline
