"""Scores (METHOD.md section 4): strided losses before and after unlearning, and their difference for each image."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attrib_jax.core.checks import check_choice, check_positive
from attrib_jax.core.keys import check_row_ids, example_noise, shared_noise
from attrib_jax.core.types import Batch, Scores
from attrib_jax.core.weights import Params
from attrib_jax.diffusion.losses import Predict, denoising_losses
from attrib_jax.diffusion.schedule import NoiseSchedule
from attrib_jax.ops.micro_batching import forward_pixels, group_size, num_pixels

FLIP_RULES = ("max", "mean", "none")

# Examples a compiled call holds. Fixed, because XLA's sums may differ in their last bits between batch shapes.
EXAMPLES_PER_TILE = 8


def example_loss(
    predict: Predict,
    schedule: NoiseSchedule,
    params: Params,
    key: jax.Array,
    example: Batch,
    timesteps: jax.Array,
    *,
    shared: bool = False,
) -> jax.Array:
    """The strided loss of one example, the mean over `timesteps` -> (); its mask is ignored.

    Args:
        predict: the model.
        schedule: noise levels and prediction type.
        params: the model's parameters.
        key: `loss_key(seed)`: the noise depends on it and on the example's row id, flip, caption and timestep alone.
        example: a `Batch` without its leading axis.
        timesteps: (S,) int32, see `strided_timesteps`.
        shared: whether all examples have one noise at a timestep, that of `shared_noise`, whose key `key` then is.
    """
    shape = example.latents.shape
    if shared:
        noise = shared_noise(key, timesteps, shape)
    else:
        noise = example_noise(key, example.row_id, example.flip, example.caption, timesteps, shape)
    noise = noise.astype(example.latents.dtype)
    return jnp.mean(denoising_losses(predict, params, schedule, example.latents, example.text, noise, timesteps))


def strided_losses(
    predict: Predict,
    schedule: NoiseSchedule,
    params: Params,
    key: jax.Array,
    batch: Batch,
    timesteps: jax.Array,
    platform: str | None = None,
    *,
    shared: bool = False,
) -> jax.Array:
    """The strided loss of each of B examples -> (B,); padding (mask 0) gives exactly 0.

    Compile it once for one B, the tile (`jax.jit(strided_losses, static_argnums=0)`), and fill the last tile with
    padding: then an example's loss is bitwise the same in whatever order, subset or batch the data set is run.

    Args:
        predict, schedule, params, key, timesteps, shared: as in `example_loss`.
        batch: B examples.
        platform: platform of the devices that run it, such as "cpu" or "tpu", for how many examples run at once; JAX's
            default backend if None.
    """
    pixels = num_pixels(batch.latents.shape[1:]) * len(timesteps)
    count = len(batch.row_id)
    losses = jax.lax.map(
        lambda example: example_loss(predict, schedule, params, key, example, timesteps, shared=shared),
        batch,
        batch_size=group_size(count, pixels, forward_pixels(platform)) % count,  # 0 is a plain vmap
    )
    return jnp.where(jnp.asarray(batch.mask).astype(bool), losses, 0)


tile_losses = jax.jit(strided_losses, static_argnames="predict")


def combine_scores(loss_before: np.ndarray, loss_after: np.ndarray, how: str = "max") -> tuple[np.ndarray, np.ndarray]:
    """Scores from losses under both weights: tau = L(z, theta_unlearned) - L(z, theta0), over the image's flips.

    Args:
        loss_before: (N, flips), captions already averaged; column 0 is the image as is, column 1 mirrored.
        loss_after: (N, flips).
        how: `max` over the flips, `mean`, or `none` (the image as is only).

    Returns:
        `(score, flip)`: (N,) float64, and (N,) int32 the flip with the largest difference (0 for `none`).

    Raises:
        ValueError: shapes differ or are not (N, flips), or `how` is unknown.
    """
    check_choice("flips", how, FLIP_RULES)
    if np.ndim(loss_before) != 2 or np.shape(loss_before) != np.shape(loss_after):
        raise ValueError(
            f"loss_before and loss_after have shapes {np.shape(loss_before)} and {np.shape(loss_after)}; "
            "expected the same (N, flips)."
        )
    return combine_flips(np.asarray(loss_after, np.float64) - np.asarray(loss_before, np.float64), how)


def combine_flips(values: np.ndarray, how: str = "max") -> tuple[np.ndarray, np.ndarray]:
    """Scores from numbers of each image's flips (N, flips), such as linearised scores; the rest as `combine_scores`."""
    check_choice("flips", how, FLIP_RULES)
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or values.shape[1] < 1:
        raise ValueError(f"values has shape {values.shape}; expected (N, flips)")
    if how == "none":
        values = values[:, :1]
    flip = values.argmax(axis=1).astype(np.int32)
    return values.mean(axis=1) if how == "mean" else values.max(axis=1), flip


def make_scores(row_id: np.ndarray, values: np.ndarray, loss_before: np.ndarray | None, how: str = "max") -> Scores:
    """`Scores` of N images from losses after unlearning (N, flips), or from linearised scores or similarities.

    Args:
        row_id: (N,) the images' rows.
        values: (N, flips) losses after unlearning where `loss_before` is given; else numbers that are scores already.
        loss_before: (N, flips) losses before it; None where `values` are scores.
        how: see `combine_scores`.
    """
    if loss_before is None:
        score, flip = combine_flips(values, how)
    else:
        score, flip = combine_scores(loss_before, values, how)
    loss_after = None if loss_before is None else values
    return Scores(row_id, score, loss_before, loss_after, None if how == "mean" else flip)


def standardised_sum(parts: Sequence[Scores], weights: Sequence[float]) -> tuple[Scores, list[int]]:
    """sum_j w_j (s_j - mean(s_j)) / std(s_j) over J scores of one query (docs/METHOD.md, "Ensembles").

    Mean and standard deviation are over the images that all J score, which alone are in the result.

    Args:
        parts: J scores, their rows in any order.
        weights: (J,) numbers.

    Returns:
        The sum, by rising row id, and which of the J are constant: these add 0.

    Raises:
        ValueError: J is 0 or not the number of weights, or no image has all scores.
    """
    if not parts or len(parts) != len(weights):
        raise ValueError(f"weights has {len(weights)} entries: expected {len(parts)}, one for each of the scores")
    rows = functools.reduce(np.intersect1d, (part.row_id for part in parts))
    if not len(rows):
        raise ValueError("parts have no row id in common: expected scores of one data set")
    total, constant = np.zeros(len(rows)), []
    for place, (part, weight) in enumerate(zip(parts, weights)):
        order = np.argsort(part.row_id)
        values = part.score[order][np.searchsorted(part.row_id[order], rows)].astype(np.float64)
        if values.min() == values.max():
            constant.append(place)
        else:
            total += weight * ((values - values.mean()) / values.std())
    return Scores(rows.astype(parts[0].row_id.dtype), total), constant


def dataset_losses(
    predict: Predict,
    schedule: NoiseSchedule,
    params: Params,
    key: jax.Array,
    row_id: np.ndarray,
    latents: np.ndarray,
    text: Any,
    timesteps: np.ndarray,
    *,
    caption_mask: np.ndarray | None = None,
    batch_size: int = EXAMPLES_PER_TILE,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Strided losses of a data set held in memory, the mean over captions -> (N, flips) float64.

    The N x flips x captions examples run in tiles of `EXAMPLES_PER_TILE`, the last one padded.

    Args:
        predict, schedule, params, key, timesteps: as in `example_loss`.
        row_id: (N,) the images' rows in the full data set.
        latents: (N, flips, h, w, c); flip 1 is the mirrored image's.
        text: (N, captions, L, d), or the pytree that the model is conditioned on, with leaves (N, captions, ...).
        caption_mask: (N, captions) 1 for a caption, 0 for padding of images with fewer; all count if None.
        batch_size: examples handed to the device before their losses are fetched, rounded up to whole tiles: it bounds
            the host's lead, and changes no digit.
        progress: called on the host with the number of images x flips x captions done.

    Raises:
        TypeError: row ids are not integers.
        ValueError: shapes do not fit, timesteps are not integers, a row id or timestep is out of range, or an image has
            no caption.
    """
    _check_data(row_id, latents, text)
    timesteps = _checked_timesteps(timesteps, schedule)
    check_positive("batch_size", batch_size, integer=True)
    count, flips = latents.shape[:2]
    captions = jax.tree.leaves(text)[0].shape[1]
    present = np.ones((count, captions), bool) if caption_mask is None else np.asarray(caption_mask).astype(bool)
    if present.shape != (count, captions) or not present.any(axis=1).all():
        raise ValueError(
            f"caption_mask has shape {present.shape}; expected {(count, captions)}, with a caption for every image."
        )
    image, flip, caption = np.nonzero(np.broadcast_to(present[:, None, :], (count, flips, captions)))
    tile = EXAMPLES_PER_TILE
    losses = np.zeros((count, flips, captions), np.float64)
    tiles_per_fetch = -(-batch_size // tile)
    for first in range(0, len(image), tile * tiles_per_fetch):
        pending = []
        for start in range(first, min(first + tile * tiles_per_fetch, len(image)), tile):
            members = np.arange(start, min(start + tile, len(image)))
            # Padding repeats the tile's first example: finite numbers, and no further shape to compile.
            rows = np.pad(members, (0, tile - len(members)), constant_values=start)
            batch = Batch(
                latents=latents[image[rows], flip[rows]],
                text=jax.tree.map(lambda leaf, rows=rows: leaf[image[rows], caption[rows]], text),
                row_id=np.asarray(row_id)[image[rows]].astype(np.int32),
                flip=flip[rows].astype(np.int32),
                caption=caption[rows].astype(np.int32),
                mask=(np.arange(tile) < len(members)).astype(np.float32),
            )
            pending.append((members, tile_losses(predict, schedule, params, key, batch, timesteps)))
        for members, values in pending:
            losses[image[members], flip[members], caption[members]] = np.asarray(values)[: len(members)]
        if progress is not None:
            progress(int(pending[-1][0][-1]) + 1)
    return (losses * present[:, None, :]).sum(axis=2) / present.sum(axis=1)[:, None]


def score_dataset(
    predict: Predict,
    schedule: NoiseSchedule,
    params_before: Params,
    params_after: Params,
    key: jax.Array,
    row_id: np.ndarray,
    latents: np.ndarray,
    text: Any,
    timesteps: np.ndarray,
    *,
    how: str = "max",
    loss_before: np.ndarray | None = None,
    **options: Any,
) -> Scores:
    """Scores every image of a data set held in memory: its loss under the unlearned weights less that before.

    Args:
        params_before, params_after: the model's parameters before and after unlearning.
        how: what to make of an image's flips, see `combine_scores`.
        loss_before: (N, flips) from `dataset_losses` with the same key and timesteps, if known; computed if None.
        options: `caption_mask`, `batch_size` and `progress` of `dataset_losses`; other arguments and errors as there.

    Raises:
        ValueError: also for an unknown `how`, or a `loss_before` of another shape; all before the first loss is taken.
    """
    check_choice("how", how, FLIP_RULES)
    _check_data(row_id, latents, text)
    if loss_before is not None and np.shape(loss_before) != latents.shape[:2]:
        raise ValueError(
            f"loss_before has shape {np.shape(loss_before)}; expected (N, flips) = {latents.shape[:2]}, as "
            "dataset_losses returned them"
        )
    if how == "none":
        latents = latents[:, :1]
        loss_before = None if loss_before is None else loss_before[:, :1]
    run = functools.partial(
        dataset_losses, predict, schedule, key=key, row_id=row_id, latents=latents, text=text, timesteps=timesteps
    )
    if loss_before is None:
        loss_before = run(params=params_before, **options)
    loss_after = run(params=params_after, **options)
    score, flip = combine_scores(loss_before, loss_after, how)
    return Scores(row_id, score, loss_before, loss_after, flip)


def _check_data(row_id: np.ndarray, latents: np.ndarray, text: Any) -> None:
    leaves = jax.tree.leaves(text)
    arrays = [("latents", latents, "(N, flips, h, w, c)")]
    if not isinstance(text, Mapping):
        arrays.append(("text", text, "(N, captions, L, d)"))
    elif len({leaf.shape[:2] for leaf in leaves}) != 1 or leaves[0].ndim < 2:
        shapes = {name: np.shape(leaf) for name, leaf in text.items()}
        raise ValueError(f"text has the shapes {shapes}; expected leaves (N, captions, ...)")
    for name, array, axes in arrays:
        if np.ndim(array) != axes.count(",") + 1 or 0 in np.shape(array)[1:]:
            raise ValueError(f"{name} has shape {np.shape(array)}; expected {axes}")
    rows = len(leaves[0])
    if np.shape(row_id) != (len(latents),) or rows != len(latents):
        raise ValueError(
            f"row_id has shape {np.shape(row_id)}, latents has {len(latents)} rows and text {rows}; expected one "
            "of each for each image"
        )
    check_row_ids(row_id)


def _checked_timesteps(timesteps: np.ndarray, schedule: NoiseSchedule) -> np.ndarray:
    timesteps, last = np.asarray(timesteps), schedule.num_train_timesteps - 1
    if timesteps.ndim != 1 or not timesteps.size or not np.issubdtype(timesteps.dtype, np.integer):
        raise ValueError(
            f"timesteps has shape {timesteps.shape} {timesteps.dtype}; expected one or more integers, such as "
            f"strided_timesteps(50, {last + 1})"
        )
    if timesteps.min() < 0 or timesteps.max() > last:
        raise ValueError(f"timesteps run from {timesteps.min()} to {timesteps.max()}; expected 0 to {last}")
    return timesteps
