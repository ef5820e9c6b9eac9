"""Method `pixel`: similarity of pixels (docs/METHOD.md section 7)."""

import dataclasses
import functools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from attrib_jax.attribution.scores import make_scores
from attrib_jax.attribution.similarity import normalise
from attrib_jax.core.fingerprint import array_digest
from attrib_jax.core.settings import setting
from attrib_jax.data.images import resize_and_crop
from attrib_jax.data.readers import ImageReader
from attrib_jax.jobs.context import Run, check_images, dataset_fingerprints
from attrib_jax.jobs.encode_to_store import encode_to_store, make_store
from attrib_jax.jobs.settings import FlipSettings
from attrib_jax.methods.base import MethodConfig, QueryJob, Scored
from attrib_jax.parallel.hosts import run_on_host0
from attrib_jax.storage.skipped import SkippedRows, read_skipped

_TILE = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class PixelConfig(MethodConfig, FlipSettings):
    """Settings of pixel similarity."""

    method: str = setting("pixel", "Attribution method.", choices=("pixel",))


def prepare(run: Run, config: PixelConfig) -> None:
    """Nothing is shared: the images are read once for all queries that come together."""
    check_images(run.dataset, config.method)


def score(run: Run, queries: Sequence[QueryJob], config: PixelConfig) -> list[Scored]:
    """Cosine similarities of flattened pixels in [-1, 1] of the query and of each training image.

    Training images are resized to the query's size. They are compared as they are and mirrored, and `config.flips` says
    what to make of the two. All queries are compared in one pass over the data set, a stage of the workdir.
    """
    prepare(run, config)
    dataset, images = run.dataset, np.stack([query.prepared.image for query in queries])
    digest, size = array_digest(images), images.shape[1:3]
    with run.timed("pixels"):
        inputs = {**dataset_fingerprints(run), "queries": digest}
        with run.root.stage(f"pixels/{digest[:12]}", {}, inputs) as stage:
            skipped = SkippedRows(stage.path)
            values = encode_to_store(
                make_store(stage.path, "similarity", (len(queries), 2), "float32", len(dataset)),
                _similarities,
                images,
                ImageReader(dataset, size, functools.partial(resize_and_crop, height=size[0], width=size[1])),
                _TILE,
                "compare pixels",
                "image",
                workers=run.encode_config.workers,
                store_skipped=skipped.store,
            )
            skipped.join()
            left_out = dict(run_on_host0(lambda: list(read_skipped(stage.path).items())))
    kept = np.setdiff1d(np.arange(len(dataset)), list(left_out))
    values, row_ids = np.asarray(values["similarity"])[kept], dataset.row_ids[kept]
    return [Scored(make_scores(row_ids, values[:, place], None, config.flips)) for place in range(len(queries))]


def _similarities(queries, batch):
    """Queries (J, H, W, 3) and images (B, H, W, 3), uint8 -> (B, J, 2), of the images as they are and mirrored."""
    images, _ = batch
    queries, *both = (_unit_vectors(views) for views in (queries, images, images[:, :, ::-1]))
    return jnp.stack([view @ queries.T for view in both], axis=-1)


def _unit_vectors(images):
    pixels = images.astype(jnp.float32) / 127.5 - 1.0
    return normalise(pixels.reshape(len(pixels), -1))
