"""Stage 1: pictures and captions -> latents and text states, encoded once and stored in chunks."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import grain
import jax.numpy as jnp
import numpy as np

from attrib_jax.convert.pipeline import Pipeline, encode_text, latent_size, tokenize
from attrib_jax.data.sources import Dataset
from attrib_jax.runtime.chunks import ChunkStore
from attrib_jax.runtime.mesh import data_mesh, padded_tiles, replicate, shard_batch, tile_map
from attrib_jax.runtime.progress import progress
from attrib_jax.stages.root import StageRoot

# Pictures, and captions, that one device holds at a time.
IMAGE_TILE = 16
TEXT_TILE = 64
_ROWS_PER_CHUNK = 1024


@dataclasses.dataclass(frozen=True)
class EncodedDataset:
    """A data set as the UNet sees it, in memory; numpy arrays.

    Attributes:
      row_ids: (N,) int32.
      latents: (N, 2, h, w, c) float32, multiplied by the scaling factor; [:, 1] of the mirrored picture.
      text: (M, L, d) float32, the text states of all captions of all rows, row by row.
      first_caption: (N + 1,) int64; the captions of row i are text[first_caption[i]:first_caption[i + 1]].
    """

    row_ids: np.ndarray
    latents: np.ndarray
    text: np.ndarray
    first_caption: np.ndarray

    def __len__(self) -> int:
        return len(self.row_ids)

    @property
    def num_captions(self) -> np.ndarray:
        """(N,) captions of each row."""
        return np.diff(self.first_caption)


def encode(
    root: StageRoot, pipeline: Pipeline, model_fingerprint: str, dataset: Dataset, dataset_fingerprint: str
) -> EncodedDataset:
    """Encodes a data set with a pipeline's autoencoder and text encoder, resuming or reusing what `root` has.

    Raises StageMismatchError where a stored stage is of another model or data set.
    """
    expected = tuple(size * pipeline.vae.config.downscale for size in latent_size(pipeline))
    if dataset[0].image.shape[:2] != expected:
        raise ValueError(
            f"dataset {dataset.name!r} has pictures of {dataset[0].image.shape[:2]} pixels (height, width); the model "
            f"was trained on {expected}. Give the model's own training set, at its resolution."
        )
    inputs = {"model": model_fingerprint, "dataset": dataset_fingerprint}
    settings = {"dataset": dataset.name}
    captions = [dataset.captions(index) for index in range(len(dataset))]
    first_caption = np.concatenate([[0], np.cumsum([len(row) for row in captions])])
    with root.stage("latents", settings, inputs) as stage:
        latents = encode_images(stage.path, dataset, pipeline.vae, pipeline.params["vae"])
    with root.stage("text", settings, inputs) as stage:
        text = _encode_captions(stage.path, pipeline, [caption for row in captions for caption in row])
    return EncodedDataset(dataset.row_ids, latents, text, first_caption)


def encode_images(path: str | os.PathLike, dataset: Dataset, vae: Any, params: Any) -> np.ndarray:
    """Mean latents of every picture and of its mirror image -> (N, 2, h, w, c) float32, scaled; resumable in `path`."""
    config = vae.config
    image = dataset[0].image
    size = (image.shape[0] // config.downscale, image.shape[1] // config.downscale)
    shape = (2, *size, config.latent_channels)
    store = ChunkStore(path, {"latents": (shape, np.float32)}, len(dataset), _ROWS_PER_CHUNK, name="latents")

    def encode_tile(params, images):
        images = images.astype(jnp.float32) / 127.5 - 1.0
        both = [vae.apply({"params": params}, view, method=vae.encode).mean for view in (images, images[:, :, ::-1])]
        return jnp.stack(both, axis=1) * config.scaling_factor

    return _fill(store, encode_tile, params, lambda index: dataset[index].image, IMAGE_TILE, "encode pictures", "image")


def _encode_captions(path, pipeline: Pipeline, captions: Sequence[str]) -> np.ndarray:
    input_ids = tokenize(pipeline, captions)
    shape = (input_ids.shape[1], pipeline.text_encoder.config.hidden_size)
    store = ChunkStore(path, {"text": (shape, np.float32)}, len(captions), _ROWS_PER_CHUNK, name="text")

    def encode_tile(params, input_ids):
        return encode_text(pipeline.text_encoder, params, input_ids)

    params = pipeline.params["text_encoder"]
    return _fill(store, encode_tile, params, input_ids.__getitem__, TEXT_TILE, "encode captions", "caption")


def _fill(store: ChunkStore, encode_tile, params, read, tile: int, description: str, unit: str) -> np.ndarray:
    """Computes the missing chunks of a store of one field, `tile` rows a device at a time, and returns the whole."""
    (field,) = store.fields
    missing = list(store.missing())
    if missing:
        mesh = data_mesh()
        run = tile_map(mesh, encode_tile)
        params = replicate(mesh, params)
        done = store.num_rows - sum(store.rows(index).stop - store.rows(index).start for index in missing)
        with progress(store.num_rows, description, unit, initial=done) as bar:
            for chunk in missing:
                rows = np.arange(store.num_rows)[store.rows(chunk)]
                tiles, _ = padded_tiles(len(rows), tile * mesh.size)
                batches = grain.MapDataset.source(rows[tiles]).map(lambda batch: np.stack([read(row) for row in batch]))
                results = []
                for batch in batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)):
                    results.append(run(params, shard_batch(mesh, batch)))
                    bar.update(min(len(batch), len(rows) - len(batch) * (len(results) - 1)))
                values = np.concatenate([np.asarray(result) for result in results])[: len(rows)]
                store.write(chunk, {field: values})
    return store.read_all()[field]
