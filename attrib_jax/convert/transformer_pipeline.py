"""Pipelines whose denoiser is a diffusion transformer: Stable Diffusion 3 and 3.5, FLUX.1, PixArt.

Each has its own text encoders. What they make of a caption is one conditioning, a dict of arrays by the names that the
denoiser's config gives (`config.conditioning`).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attrib_jax.convert.pipeline import Pipeline, image_size
from attrib_jax.convert.tokenizer import PromptReport, inspect_prompt, tokenize_prompts, tokenizer_parts
from attrib_jax.core.text import replace_surrogates
from attrib_jax.models.clip import CLIPTextModel, CLIPTextModelWithProjection
from attrib_jax.models.t5 import T5EncoderModel

# What FLUX.1 dev is told as guidance scale where no image is sampled, diffusers' default in fine-tuning.
TRAINING_GUIDANCE = 3.5
_MASK = "mask"


@dataclasses.dataclass(frozen=True)
class Family:
    """What sets the pipelines of one class apart.

    Attributes:
      name: as error messages have it.
      encoders: part -> class of the text encoder.
      optional: parts that a folder may leave out.
      t5_tokens: length that texts are cut and padded to for T5, diffusers' default.
    """

    name: str
    encoders: Mapping[str, type]
    t5_tokens: int
    optional: tuple[str, ...] = ()


FAMILIES = {
    "StableDiffusion3Pipeline": Family(
        "Stable Diffusion 3",
        {
            "text_encoder": CLIPTextModelWithProjection,
            "text_encoder_2": CLIPTextModelWithProjection,
            "text_encoder_3": T5EncoderModel,
        },
        256,
        ("text_encoder_3",),
    ),
    "FluxPipeline": Family("FLUX.1", {"text_encoder": CLIPTextModel, "text_encoder_2": T5EncoderModel}, 512),
    "PixArtSigmaPipeline": Family("PixArt-Sigma", {"text_encoder": T5EncoderModel}, 300),
    "PixArtAlphaPipeline": Family("PixArt-alpha", {"text_encoder": T5EncoderModel}, 120),
}


@dataclasses.dataclass(frozen=True)
class TextEncoders:
    """All text encoders of a pipeline as one, for `encode_text`.

    Attributes:
      encoders: (part, module), in the order of the family.
      shapes: (name, shape of one example) of the denoiser's conditioning, see `config.conditioning`.
      image_size: height and width of the model's images, which PixArt-alpha is told.
      t5_tokens: see `Family`.
    """

    encoders: tuple[tuple[str, Any], ...]
    shapes: tuple[tuple[str, tuple[int | None, ...]], ...]
    image_size: tuple[int, int]
    t5_tokens: int

    def encode(self, params: Any, ids: Any) -> dict[str, jax.Array]:
        """Tokens of `TransformerPipeline.tokenize` -> the conditioning, leaves (B, ...)."""
        states: list[jax.Array] = []
        pooled: list[jax.Array] = []
        t5: Any = None
        mask = ids.get(_MASK)
        for part, module in self.encoders:
            given = {"params": params[part]}, ids[part]
            if isinstance(module, T5EncoderModel):
                t5 = module.apply(*given, mask)
            elif isinstance(module, CLIPTextModelWithProjection):
                made: Any = module.apply(*given)
                states.append(made.penultimate)
                pooled.append(made.pooled)
            else:
                last: Any = module.apply(*given)
                ends = module.config.end_positions(ids[part])
                pooled.append(last[jnp.arange(len(last)), ends])
        shapes = dict(self.shapes)
        batch, width = len(ids[self.encoders[0][0]]), shapes["text"][-1]
        if t5 is None:
            # Stable Diffusion 3 without T5 reads zeros in its place.
            t5 = jnp.zeros((batch, self.t5_tokens, width), states[0].dtype)
        text = t5
        if states:
            clip = jnp.concatenate(states, axis=-1)
            text = jnp.concatenate([jnp.pad(clip, ((0, 0), (0, 0), (0, width - clip.shape[-1]))), t5], axis=1)
        found = {"text": text}
        if "pooled" in shapes:
            found["pooled"] = jnp.concatenate(pooled, axis=-1)
        if _MASK in shapes:
            found[_MASK] = mask.astype(text.dtype)
        height, width = self.image_size
        constants = {"guidance": TRAINING_GUIDANCE, "resolution": (height, width), "aspect_ratio": (height / width,)}
        for name in constants.keys() & shapes.keys():
            value = jnp.asarray(constants[name], text.dtype)
            found[name] = jnp.broadcast_to(value, (batch, *value.shape))
        return found


@dataclasses.dataclass(frozen=True, eq=False)
class TransformerPipeline(Pipeline):
    """A `Pipeline` whose `unet` is a diffusion transformer.

    Attributes:
      class_name: diffusers' class, a key of `FAMILIES`.
      text_encoder_3, tokenizer_3: T5 of Stable Diffusion 3, None where the model comes without.
    """

    class_name: str = ""
    text_encoder_3: Any = None
    tokenizer_3: Any = None

    def __post_init__(self):
        config: Any = self.unet.config
        family = self.family
        problems = []

        def compare(left: str, left_value: Any, right: str, right_value: Any) -> None:
            if left_value != right_value:
                problems.append(f"{left} is {left_value} and {right} is {right_value}")

        compare(
            "transformer latent channels",
            config.latent_channels,
            "vae latent_channels",
            self.vae.config.latent_channels,
        )
        shapes = config.conditioning
        for part, module in self.encoders.items():
            tokenizer, text = getattr(self, tokenizer_of(part)), module.config
            if len(tokenizer) > text.vocab_size:
                problems.append(f"{tokenizer_of(part)} has {len(tokenizer)} tokens and {part} only {text.vocab_size}")
            if isinstance(module, T5EncoderModel):
                compare(
                    "the width of the transformer's text states", shapes["text"][-1], f"{part} d_model", text.d_model
                )
        clips = [module for module in self.encoders.values() if not isinstance(module, T5EncoderModel)]
        if "pooled" in shapes:
            projected = [module for module in clips if isinstance(module, CLIPTextModelWithProjection)]
            widths = [module.config.projection_dim for module in projected] or [clips[0].config.hidden_size]
            compare(
                "transformer pooled_projection_dim", shapes["pooled"][-1], "the width of the pooled text", sum(widths)
            )
            states = sum(module.config.hidden_size for module in projected)
            if states > shapes["text"][-1]:
                problems.append(
                    f"the CLIP text states have {states} channels, the transformer takes {shapes['text'][-1]}"
                )
        if problems:
            raise ValueError(f"the parts of the {family.name} model do not fit: {'; '.join(problems)}")

    @property
    def family(self) -> Family:
        """What sets this class of pipelines apart."""
        return FAMILIES[self.class_name]

    @property
    def _shapes(self) -> dict[str, tuple[int | None, ...]]:
        config: Any = self.unet.config
        return config.conditioning

    @property
    def encoders(self) -> dict[str, Any]:
        """Part -> text encoder, those that the model has."""
        parts = {part: getattr(self, part) for part in self.family.encoders}
        return {part: module for part, module in parts.items() if module is not None}

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the latents that the model was trained on."""
        side = getattr(self.unet.config, "sample_size", None)
        if side is None:  # FLUX does not say it, but its autoencoder
            pixels: Any = self.vae.config.sample_size
            side = (pixels if isinstance(pixels, int) else pixels[0]) // self.vae.config.downscale
        return side, side

    @property
    def conditioner(self) -> Any:
        """What `encode_text` takes."""
        shapes = tuple(self._shapes.items())
        return TextEncoders(tuple(self.encoders.items()), shapes, image_size(self), self.family.t5_tokens)

    @property
    def conditioner_params(self) -> Any:
        """The parameters of `conditioner`."""
        return {part: self.params[part] for part in self.encoders}

    def tokenize(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """Prompts -> text encoder -> its input_ids (B, L) int32, and "mask" (B, L) where the denoiser takes one."""
        found = {}
        for part, module in self.encoders.items():
            tokenizer = getattr(self, tokenizer_of(part))
            if isinstance(module, T5EncoderModel):
                found[part], mask = _tokenize_t5(tokenizer, self._cleaned(prompts), self.family.t5_tokens)
                if _MASK in self._shapes:
                    found[_MASK] = mask
            else:
                found[part] = tokenize_prompts(tokenizer, prompts)
        return found

    def _cleaned(self, prompts: Sequence[str]) -> list[str]:
        texts = [replace_surrogates(prompt) for prompt in prompts]
        # PixArt was trained on lower-case captions.
        return [text.lower().strip() for text in texts] if self.family.name.startswith("PixArt") else texts

    def prompt_report(self, prompt: str) -> PromptReport:
        """What the tokenizer that reads most keeps of `prompt`: T5's, or CLIP's without it."""
        for part, module in self.encoders.items():
            if isinstance(module, T5EncoderModel):
                (text,) = self._cleaned([prompt])
                return _inspect_t5(getattr(self, tokenizer_of(part)), text, self.family.t5_tokens)
        return inspect_prompt(self.tokenizer, prompt)

    def configs(self) -> dict[str, Any]:
        """All that decides what the model computes but for its weights, as JSON values."""
        modules = {"transformer": self.unet, "vae": self.vae, **self.encoders}
        found = {part: module.config.to_dict() for part, module in modules.items()}
        found |= {part: tokenizer_parts(tokenizer) for part, tokenizer in self.tokenizers.items()}
        return found | {"schedule": self.schedule.to_config(), "class": self.class_name}

    @property
    def tokenizers(self) -> dict[str, Any]:
        """Part -> tokenizer."""
        return {tokenizer_of(part): getattr(self, tokenizer_of(part)) for part in self.encoders}


def tokenizer_of(encoder: str) -> str:
    """The part that is the tokenizer of a text encoder."""
    return encoder.replace("text_encoder", "tokenizer")


def _tokenize_t5(tokenizer: Any, prompts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    encoded = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="np")
    return np.asarray(encoded["input_ids"], np.int32), np.asarray(encoded["attention_mask"], np.int32)


def _inspect_t5(tokenizer: Any, prompt: str, length: int) -> PromptReport:
    # The length is set only because transformers warns about a long prompt where there is none.
    encoded = tokenizer(
        prompt, add_special_tokens=False, truncation=False, max_length=2**30, return_offsets_mapping=True
    )
    ids, spans = encoded["input_ids"], encoded["offset_mapping"]
    starts = [start for start, _ in spans[length - 1 :]]
    cut = starts[0] if starts else len(prompt)
    unknown = [
        prompt[start:end] for token, (start, end) in zip(ids, spans, strict=True) if token == tokenizer.unk_token_id
    ]
    return PromptReport(prompt[:cut].rstrip(), prompt[cut:], tuple(dict.fromkeys(unknown)), ())
