"""Stage 1: images and captions -> latents and conditioning, encoded once and stored in chunks.

The conditioning is what the denoiser takes beside noisy latents and timestep. Of Stable Diffusion 1 and 2 it is the
text states. Others have more leaves: those that a caption decides are stored beside the text states, those that an
image decides (size ids) beside the latents.
"""

import dataclasses
import functools
import json
import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attrib_jax.convert.pipeline import (
    Pipeline,
    encode_text,
    image_size,
    latent_size,
    takes_size_ids,
    text_width,
    tokenize,
)
from attrib_jax.convert.tokenizer import tokenizer_fingerprint
from attrib_jax.core.fingerprint import digest, params_fingerprint
from attrib_jax.core.keys import purpose_key
from attrib_jax.core.settings import Settings, setting
from attrib_jax.core.weights import flatten_names
from attrib_jax.data.concat import ConcatDataset
from attrib_jax.data.latents import ROWS_FILE, LatentsDataset, broken_views
from attrib_jax.data.readers import ImageReader
from attrib_jax.data.sources import Dataset
from attrib_jax.jobs.encode_to_store import encode_to_store, make_store
from attrib_jax.jobs.encoded_dataset import EncodedDataset, join
from attrib_jax.models.unet import UNetConfig
from attrib_jax.parallel.hosts import is_host0, run_on_host0
from attrib_jax.storage.files import DamagedFileError, read_arrays, write_arrays
from attrib_jax.storage.joined import JoinedArray, ScaledArray
from attrib_jax.storage.skipped import SKIPPED, SkippedRows, read_skipped
from attrib_jax.storage.stage_root import StageRoot
from attrib_jax.storage.stages import Stage

_log = logging.getLogger(__name__)

# Images, and captions, that one device holds at a time.
IMAGE_TILE = 16
TEXT_TILE = 64
_SKIPPED_SHOWN = 5

STORE_DTYPES = ("float32", "float16")
POSTERIORS = ("mean", "sample")


@dataclasses.dataclass(frozen=True)
class EncodeConfig(Settings):
    """How images and captions are encoded and kept."""

    dtype: str = setting(
        "float32",
        "Data type of stored latents and text states; float16 takes half the disk space.",
        choices=STORE_DTYPES,
        flag="store_dtype",
    )
    posterior: str = setting(
        "mean",
        "Latents: the mean of the autoencoder's distribution, or one seeded sample for each image and mirror image.",
        choices=POSTERIORS,
    )
    seed: int = setting(
        0,
        "Seed of sampled latents, which depend on it, the row id and the flip alone.",
        low=0,
        high=2**32 - 1,
        flag="encode_seed",
        only_if=("posterior", "sample"),
    )
    workers: int = setting(
        0, "Processes that read and decode images; 0 takes threads of this process.", low=0, performance=True
    )

    def encoding(self) -> str:
        """What decides the stored values, as one of the inputs that later stages are checked against."""
        return f"{self.dtype} {self.posterior}" + (f" seed {self.seed}" if self.posterior == "sample" else "")


def encode(
    root: StageRoot, pipeline: Pipeline, inputs: dict[str, Any], dataset: Dataset, config: EncodeConfig = EncodeConfig()
) -> EncodedDataset:
    """Encodes a data set with a pipeline's autoencoder and text encoder, resuming or reusing what `root` has.

    Images that cannot be read are left out: counted, logged, and listed in `skipped.json`. A `LatentsDataset` is
    checked and passed through; a `ConcatDataset` is encoded part by part.

    Args:
      root: where the stages `latents` and `text` are kept.
      pipeline: its `vae` and `text_encoder`.
      inputs: fingerprints of model and data set, and `config.encoding()`.
      dataset: see `open_dataset`; images have the model's resolution.
      config: see `EncodeConfig`.

    Raises:
      ValueError: images or latents of another size than the model's, text states of another width, or no image
        could be read.
      StageMismatchError: a stored stage is of another model or data set.
    """
    data = _encode_part(root, "", pipeline, inputs, dataset, config)
    if not len(data):
        reason = next(iter(data.skipped.values()), "it is empty")
        raise ValueError(f"dataset {dataset.name!r} has no image that can be read (the first: {reason})")
    return data


def image_resolution(pipeline: Pipeline) -> int:
    """Side in pixels of the square images that a pipeline was trained on; ValueError where they are not square."""
    height, width = image_size(pipeline)
    if height != width:
        raise ValueError(f"the model was trained on images of {height} x {width} pixels; data sets are read as squares")
    return height


def stage_names(dataset: Dataset, prefix: str = "") -> tuple[str, ...]:
    """The stages that `encode` fills for a data set: none for one that comes encoded."""
    if isinstance(dataset, ConcatDataset):
        return stage_names(dataset.first, prefix + "first-") + stage_names(dataset.second, prefix)
    return () if isinstance(dataset, LatentsDataset) else (f"{prefix}latents", f"{prefix}text")


def _encode_part(root, prefix: str, pipeline, inputs, dataset, config) -> EncodedDataset:
    if isinstance(dataset, ConcatDataset):
        first = _encode_part(root, prefix + "first-", pipeline, inputs, dataset.first, config)
        second = _encode_part(root, prefix, pipeline, inputs, dataset.second, config)
        return join(first, second, np.concatenate([first.row_ids, second.row_ids + dataset.shift]).astype(np.int32))
    if isinstance(dataset, LatentsDataset):
        return _stored_latents(pipeline, dataset)

    # Reading a caption may mean reading its image's whole record: not where nothing is left to encode.
    @functools.cache
    def captions() -> list:
        from attrib_jax.data.captions import read_captions

        return read_captions(dataset)

    latents_name, text_name = stage_names(dataset, prefix)
    with root.stage(latents_name, {}, inputs) as stage:
        by_image = _encode_images(
            stage.path,
            dataset,
            pipeline.vae,
            pipeline.params["vae"],
            config,
            image_size(pipeline),
            takes_size_ids(pipeline),
        )
        latents = by_image.pop("latents")
        skipped = dict(run_on_host0(lambda: list(read_skipped(stage.path).items())))
    kept = np.setdiff1d(np.arange(len(dataset)), list(skipped))
    with root.stage(text_name, {}, inputs) as stage:
        stored = _stored_first_caption(stage)
        if stored is None:
            first_caption = np.concatenate([[0], np.cumsum([len(row) for row in captions()])])
        else:
            first_caption = stored
        by_caption = _encode_captions(stage.path, pipeline, first_caption, captions, config, dataset.row_ids)
        text = by_caption.pop("text")

        def describe() -> None:
            if stored is not None:
                return
            # What `latents:WORKDIR` needs to know, for other models with the same encoders.
            rows = {"row_ids": dataset.row_ids[kept], "positions": kept, "first_caption": first_caption}
            header = {
                "latents": [latents.shape[1:], latents.dtype.name],
                "text": [text.shape[1:], text.dtype.name],
                "encoders": encoder_fingerprints(pipeline, pipeline.text_encoder.config.vocab_size),
            }
            more = {"by_image": by_image, "by_caption": by_caption}
            header |= {
                kind: {name: [array.shape[1:], array.dtype.name] for name, array in arrays.items()}
                for kind, arrays in more.items()
                if arrays
            }
            write_arrays(stage.path / ROWS_FILE, rows, header)

        run_on_host0(describe)
    if skipped and is_host0():
        _log.warning(
            "%d of %d images of %s cannot be read and are left out, such as: %s. All are listed in %s.",
            len(skipped),
            len(dataset),
            dataset.name,
            "; ".join(list(skipped.values())[:_SKIPPED_SHOWN]),
            root.workdir / latents_name / SKIPPED,
        )
    return EncodedDataset(
        dataset.row_ids[kept],
        latents,
        text,
        first_caption,
        kept,
        skipped,
        source=dataset.name,
        by_image=by_image,
        by_caption=by_caption,
    )


def _stored_first_caption(stage: Stage) -> np.ndarray | None:
    """Where each image's captions begin, as a finished stage has it."""

    def read() -> np.ndarray | None:
        if not stage.finished:
            return None
        try:
            return read_arrays(stage.path / ROWS_FILE)[0]["first_caption"]
        except (FileNotFoundError, DamagedFileError):
            return None

    return run_on_host0(read)


def _stored_latents(pipeline: Pipeline, dataset: LatentsDataset) -> EncodedDataset:
    size = (*latent_size(pipeline), pipeline.vae.config.latent_channels)
    if dataset.latents.shape[2:] != size:
        raise ValueError(
            f"dataset {dataset.name!r} has latents (height, width, channels) {dataset.latents.shape[2:]}; the model "
            f"was trained on {size}. Give the latents of the model's own training set."
        )
    width = text_width(pipeline)
    if dataset.text.shape[-1] != width:
        raise ValueError(
            f"dataset {dataset.name!r} has text states of width {dataset.text.shape[-1]}; the model reads {width}. "
            "Encode the captions with the model's own text encoder."
        )
    _check_conditioning(pipeline, dataset)
    if takes_size_ids(pipeline) != bool(dataset.by_image):
        has, takes = ("pooled text and size ids", "text states alone")[:: 1 if dataset.by_image else -1]
        raise ValueError(
            f"dataset {dataset.name!r} has {has}; the model reads {takes}. Encode the data set with this model "
            "(launch.encode)."
        )
    if dataset.encoders is not None:
        found = encoder_fingerprints(pipeline, dataset.encoders["vocab_size"])
        # A store of before the tokenizer was noted has nothing to compare.
        others = [name for name, value in found.items() if dataset.encoders.get(name, value) != value]
        if others:
            raise ValueError(
                f"dataset {dataset.name!r} was encoded by another model: its {' and '.join(others)} differ. Encode the "
                "data set with this model, or with its base."
            )
    latents = dataset.latents
    if not dataset.scaled:
        if getattr(pipeline.vae.config, "shift_factor", None):
            raise ValueError(
                f"dataset {dataset.name!r} has the autoencoder's own latents, and the model shifts them; give latents "
                "that are shifted and scaled"
            )
        latents = ScaledArray(latents, pipeline.vae.config.scaling_factor)
    return EncodedDataset(
        dataset.row_ids,
        latents,
        dataset.text,
        dataset.first_caption,
        dataset.positions,
        source=dataset.name,
        by_image=dataset.by_image,
        by_caption=dataset.by_caption,
    )


def _check_conditioning(pipeline: Pipeline, dataset: LatentsDataset) -> None:
    """Raises ValueError unless a diffusion transformer's conditioning is all there; others are checked by its kind."""
    if isinstance(pipeline.unet.config, UNetConfig):
        return
    found = {"text": tuple(dataset.text.shape[1:])}
    found |= {name: tuple(array.shape[1:]) for name, array in {**dataset.by_image, **dataset.by_caption}.items()}
    tokens = dataset.text.shape[1]
    expected = {
        name: tuple(tokens if size is None else size for size in shape)
        for name, shape in pipeline.unet.config.conditioning.items()
    }
    if found != expected:
        raise ValueError(
            f"dataset {dataset.name!r} has conditioning of the shapes {found}; the model reads {expected}. Encode the "
            "data set with this model (launch.encode)."
        )


def encoder_fingerprints(pipeline: Pipeline, vocab_size: int) -> dict[str, Any]:
    """What decides latents and text states: autoencoder, tokenizer, text encoder with its first `vocab_size` tokens.

    A customised model whose new tokens stand after those reads the captions of its base model as the base does.
    """
    text = flatten_names(pipeline.params["text_encoder"])
    (embedding,) = (name for name in text if name.endswith(("token_embedding/embedding", "shared/embedding")))
    text[embedding] = text[embedding][:vocab_size]
    config = dataclasses.replace(pipeline.text_encoder.config, vocab_size=vocab_size)
    further = {}
    for part, module in list(pipeline.encoders.items())[1:]:
        name = part.replace("text_encoder", "tokenizer")
        tokenizer = getattr(pipeline, name)
        options = module.config.to_dict() | {"max_tokens": tokenizer.model_max_length}
        further[part] = _digest(pipeline.params[part], options)
        further[name] = tokenizer_fingerprint(tokenizer, added=False)
    return further | {
        "vae": _digest(pipeline.params["vae"], pipeline.vae.config.to_dict()),
        "text_encoder": _digest(text, config.to_dict() | {"max_tokens": pipeline.tokenizer.model_max_length}),
        "tokenizer": tokenizer_fingerprint(pipeline.tokenizer, added=False),
        "vocab_size": vocab_size,
    }


def _digest(params: Any, config: dict[str, Any]) -> str:
    return digest([params_fingerprint(params), json.dumps(config, sort_keys=True)])


def encode_images(
    path: str | os.PathLike,
    dataset: Dataset,
    vae: Any,
    params: Any,
    config: EncodeConfig = EncodeConfig(),
    size: tuple[int, int] | None = None,
) -> JoinedArray:
    """Latents of every image and of its mirror image -> (N, 2, h, w, c), scaled, in `config.dtype`.

    Kept in chunks in `path`, and resumed there. Rows that cannot be read hold zeros; `read_skipped(path)` names them.
    `size` is (height, width) of the images, that of the first one if None. Raises ValueError for an image of another
    size.
    """
    return _encode_images(path, dataset, vae, params, config, size)["latents"]


def _encode_images(path, dataset, vae, params, config, size=None, size_ids: bool = False) -> dict[str, JoinedArray]:
    """`encode_images` -> {"latents": ...}, and with `size_ids` {"ids": (N, 6)} float32, see `ImageReader`."""
    size = size or dataset[0].image.shape[:2]
    scale = vae.config.downscale
    shape = (2, size[0] // scale, size[1] // scale, vae.config.latent_channels)
    skipped = SkippedRows(path)
    stored = encode_to_store(
        # Never in half precision, which counts by twos from 2048 on.
        make_store(
            path, "latents", shape, config.dtype, len(dataset), {"ids": ((6,), "float32")} if size_ids else None
        ),
        encode_views,
        (params, purpose_key(config.seed, "posterior")),
        ImageReader(dataset, size, size_ids=size_ids),
        IMAGE_TILE,
        "encode images",
        "image",
        workers=config.workers,
        store_skipped=skipped.store,
        static=(vae, config.posterior),
        name_row=lambda row, value: f"row {int(dataset.row_ids[row])} ({broken_views(value)})",
    )
    skipped.join()
    return stored


def encode_views(vae: Any, posterior: str, shared: Any, batch: Any) -> Any:
    """Images (B, H, W, 3) uint8 and their row ids (B,) -> (B, 2, h, w, c), as they are and mirrored.

    Size ids that come with them are passed through beside the latents.
    """
    params, key = shared
    images, row_ids, *ids = batch
    images = images.astype(jnp.float32) / 127.5 - 1.0

    def latents(flip: int, views):
        distribution = vae.apply({"params": params}, views, method=vae.encode)
        if posterior == "mean":
            return distribution.mean

        def noise(row_id):
            key_of_row = jax.random.fold_in(jax.random.fold_in(key, row_id), flip)
            return jax.random.normal(key_of_row, distribution.mean.shape[1:])

        return distribution.mean + jnp.exp(0.5 * distribution.logvar) * jax.vmap(noise)(row_ids)

    both = [latents(0, images), latents(1, images[:, :, ::-1])]
    stacked = vae.config.scaled(jnp.stack(both, axis=1))
    return {"latents": stacked, "ids": ids[0]} if ids else stacked


def _encode_captions(
    path,
    pipeline: Pipeline,
    first_caption: np.ndarray,
    captions: Callable[[], Sequence[Sequence[str]]],
    config: EncodeConfig,
    row_ids: np.ndarray,
) -> dict[str, JoinedArray]:
    """Field -> (M, ...) of all captions: "text", and what else they decide of the conditioning."""
    ids = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), tokenize(pipeline, [""]))
    encode_one = functools.partial(encode_text, pipeline.conditioner)
    layout = jax.eval_shape(encode_one, pipeline.conditioner_params, ids)
    shapes = {name: leaf.shape[1:] for name, leaf in (layout if isinstance(layout, dict) else {"text": layout}).items()}
    more = {name: (shape, config.dtype) for name, shape in shapes.items() if name != "text"}
    lock = threading.Lock()

    def read(rows):
        with lock:  # a tokenizer's padding is state that two threads must not set at once
            images = np.searchsorted(first_caption, rows, side="right") - 1
            places = zip(images, rows - first_caption[images])
            return tokenize(pipeline, [captions()[image][caption] for image, caption in places]), {}

    def name(caption: int, value: np.ndarray) -> str:
        del value
        image = int(np.searchsorted(first_caption, caption, side="right")) - 1
        number = caption - int(first_caption[image])
        return f"caption {number} of row {int(row_ids[image])} ({captions()[image][number]!r})"

    return encode_to_store(
        make_store(path, "text", shapes["text"], config.dtype, int(first_caption[-1]), more),
        encode_text,
        pipeline.conditioner_params,
        read,
        TEXT_TILE,
        "encode captions",
        "caption",
        static=(pipeline.conditioner,),
        name_row=name,
    )
