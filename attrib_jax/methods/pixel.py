"""Attribution by the similarity of pixels (METHOD.md section 7)."""

import functools
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from attrib_jax.data.images import resize_and_crop
from attrib_jax.data.readers import ImageReader
from attrib_jax.jobs.fill import fill, make_store
from attrib_jax.jobs.scoring import make_scores
from attrib_jax.methods.config import AttributeConfig
from attrib_jax.methods.features import check_pictures, picture_inputs
from attrib_jax.parallel.hosts import run_on_host0
from attrib_jax.storage.skipped import SkippedRows, read_skipped
from attrib_jax.training.contrastive import normalise

if TYPE_CHECKING:
    from attrib_jax.attribute import Attributor
    from attrib_jax.methods.registry import Job, Scored

_TILE = 64


def pixel_scores(attributor: "Attributor", jobs: Sequence["Job"], config: AttributeConfig) -> list["Scored"]:
    """Cosine similarities of flattened pixels in [-1, 1] of the query and of each training picture.

    Training pictures are resized to the query's size. They are compared as they are and mirrored, and `config.flips`
    says what to make of the two. All queries are compared in one pass over the data set, a stage of the workdir.
    """
    dataset = attributor.dataset
    check_pictures(dataset, config.method)
    queries = np.stack([job.prepared.image for job in jobs])
    digest = hashlib.sha256(repr(queries.shape).encode() + queries.tobytes()).hexdigest()
    size = queries.shape[1:3]
    with attributor.timed("pixels"):
        inputs = {**picture_inputs(attributor), "queries": digest}
        with attributor.root.stage(f"pixels/{digest[:12]}", {}, inputs) as stage:
            skipped = SkippedRows(stage.path)
            values = fill(
                make_store(stage.path, "similarity", (len(jobs), 2), "float32", len(dataset)),
                _similarities,
                queries,
                ImageReader(dataset, size, functools.partial(resize_and_crop, height=size[0], width=size[1])),
                _TILE,
                "compare pixels",
                "image",
                workers=attributor.encode_config.workers,
                store_skipped=skipped.store,
            )
            skipped.join()
            left_out = dict(run_on_host0(lambda: list(read_skipped(stage.path).items())))
    kept = np.setdiff1d(np.arange(len(dataset)), list(left_out))
    values = np.asarray(values)[kept]
    return [(make_scores(dataset.row_ids[kept], values[:, job], None, config), ()) for job in range(len(jobs))]


def _similarities(queries, batch):
    """Queries (J, H, W, 3) and pictures (B, H, W, 3), uint8 -> (B, J, 2), of the pictures as they are and mirrored."""
    images, _ = batch
    queries, *both = (_unit_vectors(pictures) for pictures in (queries, images, images[:, :, ::-1]))
    return jnp.stack([views @ queries.T for views in both], axis=-1)


def _unit_vectors(pictures):
    pixels = pictures.astype(jnp.float32) / 127.5 - 1.0
    return normalise(pixels.reshape(len(pixels), -1))
