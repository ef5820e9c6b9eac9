"""The query: an image that the model generates from a prompt, or one that is given, as latents and text states."""

import dataclasses
import functools
import logging
import os
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from attrib_jax.attribution.regions import region_mask, shape_mask
from attrib_jax.convert.pipeline import (
    Pipeline,
    encode_text,
    image_size,
    latent_size,
    prompt_report,
    takes_size_ids,
    tokenize,
    with_size_ids,
)
from attrib_jax.core.checks import check_finite, check_range, expand_path
from attrib_jax.core.fingerprint import array_digest, file_digest, json_digest
from attrib_jax.core.keys import purpose_key
from attrib_jax.core.settings import Settings, setting
from attrib_jax.core.text import replace_surrogates
from attrib_jax.data.images import read_image
from attrib_jax.data.latents import open_npy
from attrib_jax.diffusion.losses import Predict
from attrib_jax.diffusion.samplers import SAMPLERS, sample
from attrib_jax.jobs.settings import RegionSettings
from attrib_jax.models.unet import UNetConfig
from attrib_jax.parallel.mesh import num_parts, place_parameters, tile_map

_log = logging.getLogger(__name__)

_MAX_NAME_BYTES = 200


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SamplerSettings(Settings):
    """How the model draws a query."""

    guidance_scale: float = setting(7.5, "Weight of classifier-free guidance of the generated query.", low=0)
    sampler: str = setting(
        "ddim", "Sampler of the generated query; flow-matching models take Euler steps.", choices=tuple(SAMPLERS)
    )
    sampler_steps: int = setting(50, "Sampling steps of the generated query.", low=1)


@dataclasses.dataclass(frozen=True, eq=False)
class Query(SamplerSettings):
    """What to attribute.

    Attributes:
      prompt: its caption; half a surrogate pair, which JSON can escape, becomes '?'.
      image: path of an image, or (H, W, 3) uint8; None generates one from the prompt.
      latents: (h, w, c), multiplied by the scaling factor, instead of an image; None otherwise.
      text: (L, d) text states instead of those of the prompt; None encodes the prompt. For Stable Diffusion XL a dict
        of these as "text" and of the "pooled" text (p,); size "ids" (6,) in it stand in place of the image's own size.
      seed: seed of the initial noise of a generated image.
      guidance_scale: weight of classifier-free guidance.
      sampler: `ddim` or `ddpm`; flow-matching models take Euler steps whatever it says.
      sampler_steps: steps of the sampler.
    """

    prompt: str
    image: str | os.PathLike | np.ndarray | None = None
    latents: np.ndarray | None = None
    text: Any = None
    seed: int = setting(0, "Seed of the generated query.", low=0, high=2**32 - 1)

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.prompt, str):
            raise ValueError(f"prompt is {self.prompt!r}; expected a text")
        object.__setattr__(self, "prompt", replace_surrogates(self.prompt))
        if isinstance(self.image, str | os.PathLike):
            object.__setattr__(self, "image", expand_path(self.image))
        if self.image is not None and self.latents is not None:
            raise ValueError("the query has an image and latents; give one of them")
        if self.text is not None and self.latents is None and self.image is None:
            raise ValueError("the query has text states but no image or latents; give one of them too")


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedQuery:
    """A query as image and as the UNet's input.

    Attributes:
      image: (H, W, 3) uint8.
      latents: (h, w, c) float32, multiplied by the scaling factor.
      text: the model's conditioning, float32: text states (L, d), or a dict of these and others.
      notes: what a user should know of how the prompt or image was read.
      prompt: its caption.
    """

    image: np.ndarray
    latents: np.ndarray
    text: Any
    notes: tuple[str, ...]
    prompt: str = ""


def prepare_query(pipeline: Pipeline, predict: Predict, query: Query, mesh: Mesh | None = None) -> PreparedQuery:
    """Generates or reads the query's image and encodes it.

    A generated query keeps the latents that the sampler ended with: they are what the model made; encoding its decoded
    image again would add the autoencoder's error. On a `mesh` with the axis `model` the sampler's weights are divided.

    Raises:
      ValueError: the image is no image, or the sampler cannot run with these steps.
      FileNotFoundError: the image does not exist.
    """
    notes = () if query.text is not None else prompt_notes(pipeline, query.prompt)
    if query.latents is not None:
        latents = _given("latents", query.latents, (*latent_size(pipeline), pipeline.vae.config.latent_channels))[None]
        image = decode(pipeline, latents)[0]
    elif query.image is None:
        latents = generate(pipeline, predict, [query.prompt], [query.seed], query, mesh)
        image = decode(pipeline, latents)[0]
    else:
        image, latents = _encode_image(pipeline, query.image)
    text: Any
    if query.text is not None:
        text = _given_conditioning(pipeline, query.text)
    else:
        text = jax.tree.map(lambda leaf: leaf[0], text_states(pipeline, [query.prompt]))
    return PreparedQuery(image, np.asarray(latents[0]), jax.tree.map(np.asarray, text), notes, query.prompt)


def _given_conditioning(pipeline: Pipeline, text: Any) -> Any:
    """A query's own text states, checked; as a dict with pooled text and size ids for a model that takes these."""
    config = pipeline.unet.config
    if not isinstance(pipeline.unet.config, UNetConfig):
        wanted = config.conditioning
        if not isinstance(text, Mapping) or text.keys() != wanted.keys():
            raise ValueError(f"the query's text must be a dict of {sorted(wanted)}. Leave it out to encode the prompt")
        return {name: _given(name, text[name], shape) for name, shape in wanted.items()}
    states = (None, config.cross_attention_dim)
    if not takes_size_ids(pipeline):
        if isinstance(text, Mapping):
            raise ValueError(f"the query's text is a dict of {sorted(text)}; the model takes an array of text states")
        return _given("text", text, states)
    if not isinstance(text, Mapping) or not {"text", "pooled"} <= {*text} <= {"text", "pooled", "ids"}:
        found = f"a dict of {sorted(text)}" if isinstance(text, Mapping) else "an array"
        raise ValueError(
            f"the query's text is {found}; the model takes a dict of text and pooled (and ids). Leave it out, and the "
            "prompt is encoded"
        )
    given = {
        "text": _given("text", text["text"], states),
        "pooled": _given("pooled", text["pooled"], (config.pooled_width,)),
    }
    ids = _given("ids", text["ids"], (6,)) if "ids" in text else None
    return with_size_ids(pipeline, given, ids)


def _given(name: str, array: Any, shape: tuple[int | None, ...]) -> np.ndarray:
    array = np.asarray(array, np.float32)
    if array.ndim != len(shape) or any(size not in (None, given) for size, given in zip(shape, array.shape)):
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"the query's {name} have shape {array.shape}; the model takes ({expected})")
    check_finite(f"the query's {name}", array)
    return array


def read_stored_query(latents: str | os.PathLike, text: str | os.PathLike | None, index: int) -> dict[str, Any]:
    """The fields `latents` and `text` of a `Query` from numpy files as METHOD.md section 9 has them.

    Args:
      latents: (Q, c, h, w), multiplied by the scaling factor.
      text: (Q, captions, L, d), of which the first caption is taken; None for none.
      index: of the query.

    Raises ValueError for a damaged file, another shape or an index outside it; FileNotFoundError for a missing one.
    """
    files = {"latents": latents} | ({} if text is None else {"text": text})
    arrays = {name: open_npy(file) for name, file in files.items()}
    for name, array in arrays.items():
        if array.ndim != 4:
            raise ValueError(f"query {name} have shape {array.shape}; expected four axes, the queries first")
        check_range("query_index", index, 0, len(array) - 1, integer=True)
        check_finite(f"row {index} of {os.fspath(files[name])}", array[index])
    fields = {"latents": np.moveaxis(arrays["latents"][index], 0, -1)}
    return fields | ({} if text is None else {"text": arrays["text"][index, 0]})


def prompt_notes(pipeline: Pipeline, prompt: str) -> tuple[str, ...]:
    """Sentences on what a tokenizer cuts off or does not know of a prompt; logged as warnings too."""
    report = prompt_report(pipeline, prompt)
    notes = []
    if report.truncated:
        notes.append(f"The prompt is longer than the model reads; cut off: {report.truncated!r}.")
    if report.unknown:
        notes.append(f"Words with characters that the tokenizer does not know: {', '.join(report.unknown)}.")
    if report.split:
        notes.append(
            "Words that the tokenizer knows only in pieces, rare or absent in its training captions: "
            f"{', '.join(report.split)}."
        )
    for note in notes:
        _log.warning(note)
    return tuple(notes)


def generate(
    pipeline: Pipeline,
    predict: Predict,
    prompts: list[str],
    seeds: list[int],
    query: SamplerSettings,
    mesh: Mesh | None = None,
) -> np.ndarray:
    """Draws one latent for each prompt with the sampler settings of `query` -> (B, h, w, c), scaled.

    The initial noise of an image depends on its seed alone. On a `mesh` with the axis `model` every device draws all
    images, with its part of the weights.
    """
    check_range("sampler_steps", query.sampler_steps, 1, pipeline.schedule.num_train_timesteps, integer=True)
    if pipeline.schedule.prediction_type == "flow":
        return _generate_by_flow(pipeline, predict, prompts, seeds, query, mesh)
    both = text_states(pipeline, list(prompts) + [""])
    text, empty = (jax.tree.map(lambda leaf, part=part: leaf[part], both) for part in (slice(-1), -1))
    if pipeline.zeros_for_empty_prompt:
        empty = with_size_ids(pipeline, jax.tree.map(jnp.zeros_like, empty))
    initial = [initial_noise(pipeline, seed) for seed in seeds]
    if query.sampler == "ddim":
        return _sample(pipeline, predict, text, empty, jnp.stack(initial), None, query, mesh)
    # Fresh noise at every step, so one by one: an image's noise must not depend on its place in a batch.
    images = [
        _sample(
            pipeline,
            predict,
            jax.tree.map(lambda leaf, place=place: leaf[place, None], text),
            empty,
            noise[None],
            purpose_key(seed, "sampler noise"),
            query,
            mesh,
        )
        for place, (noise, seed) in enumerate(zip(initial, seeds))
    ]
    return np.concatenate(images)


def _generate_by_flow(pipeline, predict, prompts, seeds, query: SamplerSettings, mesh: Mesh | None) -> np.ndarray:
    """`generate` for a flow-matching model, whose sampler takes Euler steps, whatever `query.sampler` says."""
    from attrib_jax.diffusion.flow import sample_flow  # no other model needs it

    both = text_states(pipeline, [*prompts, ""])
    text, empty = (jax.tree.map(lambda leaf, part=part: leaf[part], both) for part in (slice(-1), -1))
    scale = query.guidance_scale
    if pipeline.schedule.uniform_sigmas:
        # FLUX was distilled with guidance: dev is told its scale, schnell has none.
        if "guidance" in text:
            text = {**text, "guidance": jnp.full_like(text["guidance"], scale)}
        empty, scale = None, 1.0
    initial = jnp.stack([initial_noise(pipeline, seed) for seed in seeds])
    steps = query.sampler_steps
    if mesh is not None and num_parts(mesh) > 1:
        drawn = _divided_sampler(sample_flow, mesh, predict, (steps, scale), ())
        shared = (place_parameters(mesh, pipeline.params["unet"]), pipeline.schedule)
        return np.asarray(drawn(shared, (text, empty, initial, None)))
    with jax.default_matmul_precision("highest"):
        params, schedule = pipeline.params["unet"], pipeline.schedule
        return np.asarray(sample_flow(predict, params, schedule, text, empty, initial, steps, scale))


@functools.lru_cache(maxsize=4)
def _divided_sampler(draw, mesh: Mesh, predict: Predict, settings: tuple, options: tuple):
    """`draw` compiled for weights that are divided; every device draws all images."""

    def run(shared, batch):
        (params, schedule), (text, empty, initial, key) = shared, batch
        named = dict(options) if key is None else {**dict(options), "key": key}
        return draw(predict, params, schedule, text, empty, initial, *settings, **named)

    return tile_map(mesh, run, takes_shards=True, whole_results=True)


def _sample(pipeline, predict, text, empty_text, initial, key, query: SamplerSettings, mesh: Mesh | None) -> np.ndarray:
    if mesh is not None and num_parts(mesh) > 1:
        settings = (query.sampler_steps, query.guidance_scale)
        drawn = _divided_sampler(sample, mesh, predict, settings, (("sampler", query.sampler),))
        shared = (place_parameters(mesh, pipeline.params["unet"]), pipeline.schedule)
        return np.asarray(drawn(shared, (text, empty_text, initial, key)))
    with jax.default_matmul_precision("highest"):
        latents = sample(
            predict,
            pipeline.params["unet"],
            pipeline.schedule,
            text,
            empty_text,
            initial,
            query.sampler_steps,
            query.guidance_scale,
            sampler=query.sampler,
            key=key,
        )
    return np.asarray(latents)


def initial_noise(pipeline: Pipeline, seed: int) -> np.ndarray:
    """The noise (h, w, c) that an image with this seed starts from."""
    config = pipeline.vae.config
    shape = (*latent_size(pipeline), config.latent_channels)
    return np.asarray(jax.random.normal(purpose_key(seed, "sample"), shape))


def decode(pipeline: Pipeline, latents: np.ndarray) -> np.ndarray:
    """Scaled latents (B, h, w, c) -> images (B, H, W, 3) uint8."""
    with jax.default_matmul_precision("highest"):
        images = _decode(pipeline.vae, pipeline.params["vae"], latents)
    return np.asarray(jnp.round(jnp.clip(images * 0.5 + 0.5, 0, 1) * 255)).astype(np.uint8)


def _encode_image(pipeline: Pipeline, image: Any) -> tuple[np.ndarray, np.ndarray]:
    height, width = image_size(pipeline)
    if not isinstance(image, np.ndarray):
        image = read_image(image, height, width)
    if image.shape != (height, width, 3) or image.dtype != np.uint8:
        raise ValueError(f"query image has shape {image.shape} {image.dtype}; expected {(height, width, 3)} uint8")
    with jax.default_matmul_precision("highest"):
        mean = _encode(pipeline.vae, pipeline.params["vae"], image[None].astype(np.float32) / 127.5 - 1.0)
    return image, pipeline.vae.config.scaled(np.asarray(mean))


def text_states(pipeline: Pipeline, prompts: list[str]) -> Any:
    """The conditioning of prompts, for images of the model's own size; leaves (B, ...)."""
    with jax.default_matmul_precision("highest"):
        states = _encode_prompts(pipeline.conditioner, pipeline.conditioner_params, tokenize(pipeline, prompts))
        return with_size_ids(pipeline, states)


@functools.partial(jax.jit, static_argnums=0)
def _encode_prompts(text_encoder, params, input_ids):
    return encode_text(text_encoder, params, input_ids)


@functools.partial(jax.jit, static_argnums=0)
def _decode(vae, params, latents):
    return vae.apply({"params": params}, vae.config.unscaled(latents), method=vae.decode)


@functools.partial(jax.jit, static_argnums=0)
def _encode(vae, params, images):
    return vae.apply({"params": params}, images, method=vae.encode).mean


def check_query_name(name: str) -> None:
    """Raises ValueError unless `name` can name a query's folder."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]*\w[\w.-]*", name):
        raise ValueError(f"query_name is {name!r}; expected letters, digits, '.', '_' and '-', as in a file name")
    if len(name.encode()) > _MAX_NAME_BYTES:
        raise ValueError(
            f"query_name is {name[:40]!r}... of {len(name.encode())} bytes; expected at most {_MAX_NAME_BYTES}, as "
            "names of folders allow"
        )


def query_name(query: Query, settings: dict[str, Any]) -> str:
    """Folder name of a query: its prompt, its seed if generated, and a digest of every setting.

    Letters and digits of all scripts are kept; emoji and other symbols are spelled out by their Unicode names.
    """
    spelled = "".join(
        character if character.isalnum() or character.isascii() else f" {unicodedata.name(character, '')} "
        for character in unicodedata.normalize("NFKC", query.prompt)
    )
    slug = re.sub(r"[\W_]+", "-", spelled.lower()).strip("-")[:40].rstrip("-")
    origin = "latents" if query.latents is not None else f"seed{query.seed}" if query.image is None else "image"
    return f"{slug or ('symbols' if query.prompt.strip() else 'empty-prompt')}-{origin}-{json_digest(settings)[:8]}"


def query_settings(query: Query) -> dict[str, Any]:
    """What decides a query as JSON values; of images and arrays their content.

    Raises FileNotFoundError where its image does not exist.
    """
    settings = {field.name: getattr(query, field.name) for field in dataclasses.fields(query)}
    given = {name: value for name in ("image", "latents", "text") if (value := settings.pop(name)) is not None}
    if not {"image", "latents"} & given.keys():
        return settings
    if isinstance(given.get("text"), Mapping):
        given |= {f"text.{name}": np.asarray(value) for name, value in given.pop("text").items()}
    content = {
        name: array_digest(value) if isinstance(value, np.ndarray) else file_digest(Path(value))
        for name, value in given.items()
    }
    return {"prompt": query.prompt} | content


def query_mask(query: PreparedQuery, config: RegionSettings) -> np.ndarray | None:
    """The weights (h, w) of the query's latent pixels; None where all count.

    Raises ValueError where the region does not fit the query's image, or its mask is no PNG or empty;
    FileNotFoundError where the mask's file does not exist.
    """
    size, latent_size = query.image.shape[:2], query.latents.shape[:2]
    if config.region is not None:
        return region_mask(config.region, size, latent_size)
    if config.region_mask is not None:
        return shape_mask(read_region_mask(config.region_mask, size), latent_size)
    return None


def read_region_mask(path: str | os.PathLike, image_size: tuple[int, int]) -> np.ndarray:
    """Reads a mask for a image of (H, W) pixels -> (H, W) bool.

    Pixels count where any colour channel is not 0; transparent ones do not.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no PNG file, or of another size; no pixel counts.
    """
    name, (height, width) = os.fspath(path), image_size
    if not Path(path).is_file():
        raise FileNotFoundError(f"region_mask {name!r} does not exist")
    try:
        with Image.open(path, formats=["PNG"]) as opened:
            # Before the pixels are decoded, so that none are that could not be used.
            if opened.size != (width, height):
                raise ValueError(
                    f"region_mask {name!r} has {opened.width} x {opened.height} pixels; expected {width} x {height}, "
                    "as many as the query's image"
                )
            if opened.has_transparency_data:
                *colours, opaque = opened.convert("RGBA").split()
                marked = np.any([np.asarray(colour) for colour in colours], axis=0) & (np.asarray(opaque) > 0)
            else:
                # Palettes hold colours; 1-bit and 16-bit greys are taken as they are.
                pixels = np.asarray(opened.convert("RGB") if opened.mode == "P" else opened)
                marked = pixels.reshape(height, width, -1).any(axis=-1)
    except (OSError, SyntaxError) as error:
        raise ValueError(f"region_mask {name!r} cannot be read as a PNG file ({error})") from error
    if not marked.any():
        raise ValueError(f"region_mask {name!r} marks no pixel; paint what counts in any colour but black")
    return np.asarray(marked)
