"""The model outputs whose per-example gradients the projected methods compare (METHOD.md sections 7 and 10)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from attrib_jax.core.checks import check_choice
from attrib_jax.core.keys import example_noise
from attrib_jax.core.types import Batch
from attrib_jax.diffusion.losses import Predict, denoising_losses, predictions
from attrib_jax.diffusion.schedule import NoiseSchedule
from attrib_jax.models.predictor import as_predictor
from attrib_jax.models.projected_text import ProjectedWeights, kernel_gradient, text_columns, text_rows
from attrib_jax.ops.matmul_precision import full_precision_matmuls

# `loss`: TRAK (Park et al. 2023) and Journey-TRAK (Georgiev et al. 2023). `square`: D-TRAK (Zheng et al. 2024).
# `mean`: DAS, the Diffusion Attribution Score (Lin et al. 2024).
OUTPUTS = ("loss", "square", "mean")


def output_gradient(
    output: str,
    predict: Predict,
    schedule: NoiseSchedule,
    merge: Any,
    selected: Any,
    key: jax.Array,
    example: Batch,
    timesteps: jax.Array,
) -> tuple[Any, jax.Array]:
    """The gradient of one example's output, and its residual.

    With p_t the model's prediction at timestep t (its noise or its v, as it was trained) and y_t what it should be,
    means being over the latent's dimensions:

    - `loss`: the gradient of mean_t mean((p_t - y_t)^2), the training loss.
    - `square`: the gradient of mean_t mean(p_t^2).
    - `mean`: mean_t g_t / |g_t|, g_t the gradient of mean(p_t): gradients shrink by orders of magnitude as t grows, so
      each is brought to length 1 over all selected weights; one of zero stays zero.

    Args:
      output: see `OUTPUTS`.
      predict: the model.
      schedule: noise levels and prediction type.
      merge: `merge(selected) -> params`.
      selected: nested dict of the weights to differentiate by.
      key: `loss_key(seed)`; the noise is that of `example_noise`.
      example: a `Batch` without its leading axis; its mask is ignored.
      timesteps: (S,) int32.

    Returns:
      `(gradient, residual)`: a nested dict like `selected`, and () mean_t sqrt(mean((p_t - y_t)^2)) for `mean`, else 0.

    Raises:
      ValueError: unknown `output`.
    """
    check_choice("output", output, OUTPUTS)
    latents, text = example.latents, example.text
    noise = example_noise(key, example.row_id, example.flip, example.caption, timesteps, latents.shape)
    noise = noise.astype(latents.dtype)

    def averaged(selected):
        arguments = predict, merge(selected), schedule, latents, text, noise, timesteps
        if output == "loss":
            return jnp.mean(denoising_losses(*arguments))
        return jnp.mean(jnp.square(_widened(predictions(*arguments)[0])))

    if output != "mean":
        return jax.grad(averaged)(selected), jnp.zeros((), latents.dtype)

    def at_timestep(selected, noise, timestep):
        arguments = predict, merge(selected), schedule, latents, text, noise[None], timestep[None]
        prediction, target = map(_widened, predictions(*arguments))
        return jnp.mean(prediction), jnp.sqrt(jnp.mean(jnp.square(prediction - target)))

    # The text is not mapped, so its keys and values are computed once for all timesteps.
    gradients, residuals = jax.vmap(jax.grad(at_timestep, has_aux=True), in_axes=(None, 0, 0))(
        selected, noise, jnp.asarray(timesteps)
    )
    squares = [jnp.sum(jnp.square(leaf), axis=tuple(range(1, leaf.ndim))) for leaf in jax.tree.leaves(gradients)]
    norms = jnp.sqrt(sum(squares))
    weights = jnp.where(norms > 0, 1 / jnp.where(norms > 0, norms, 1), 0) / len(norms)
    return jax.tree.map(lambda leaf: jnp.tensordot(weights, leaf, 1), gradients), jnp.mean(residuals)


def output_gradients(
    output: str,
    predict: Predict,
    schedule: NoiseSchedule,
    merge: Any,
    selected: Any,
    rest: Any,
    key: jax.Array,
    batch: Batch,
    timesteps: jax.Array,
    reduce: Callable[[ProjectedWeights, jax.Array], Any] | None = None,
) -> tuple[Any, jax.Array]:
    """`output_gradient` of each of B examples -> (gradients, each leaf with a leading axis B; residuals (B,)).

    Where the selected weights all project the text, the model runs once on the examples' B S noisy latents, and not
    under `vmap`, whose additional axes cost copies; and a gradient by a kernel is the product of the text and of the
    cotangent of its projection, once an example and not a timestep. Otherwise it is `output_gradient` under `vmap`.

    Args:
      rest: the weights that are not selected, in the precision of the forward pass; maybe from `prepare_kernels`.
      batch: B examples; their masks are ignored.
      reduce: `(gradients in factors, columns (B, D, L)) -> tree`, such as `sketch`, in place of the gradients; see
        `kernel_gradient`.
      output, predict, schedule, merge, selected, key, timesteps: as in `output_gradient`.

    Raises:
      ValueError: unknown `output`.
    """
    check_choice("output", output, OUTPUTS)
    predict = as_predictor(predict)
    weights = predict.project_text(selected, batch.text)
    if weights.others or not weights.projections:

        def alone(example):
            return output_gradient(output, predict, schedule, merge, selected, key, example, timesteps)

        gradients, residuals = jax.vmap(alone)(batch)
        if reduce is not None:
            gradients = reduce(ProjectedWeights(gradients, {}), text_columns(batch.text))
        return gradients, residuals

    def reduced(gradient):
        return kernel_gradient(gradient, selected, columns) if reduce is None else reduce(gradient, columns)

    count, steps, shape = len(batch.row_id), len(timesteps), batch.latents.shape[1:]

    def draw(row_id, flip, caption):
        return example_noise(key, row_id, flip, caption, timesteps, shape)

    def repeat(array):
        """(B, ...) -> (B S, ...), an example's timesteps one after the other."""
        return jnp.broadcast_to(array[:, None], (count, steps, *array.shape[1:])).reshape(-1, *array.shape[1:])

    noise = jax.vmap(draw)(batch.row_id, batch.flip, batch.caption).astype(batch.latents.dtype).reshape(-1, *shape)
    latents, timestep = repeat(batch.latents), jnp.tile(jnp.asarray(timesteps), count)
    noisy, target = schedule.add_noise(latents, noise, timestep), schedule.target(latents, noise, timestep)
    told, target, columns = schedule.model_timesteps(timestep), _widened(target), text_columns(batch.text)

    def values(text):
        """Each forward's output and residual, (B S,)."""
        prediction = _widened(predict.batched(rest, noisy, told, text))
        axes = tuple(range(1, prediction.ndim))
        errors = jnp.mean(jnp.square(prediction - target), axis=axes)
        if output == "mean":
            return jnp.mean(prediction, axis=axes), jnp.sqrt(errors)
        return (errors if output == "loss" else jnp.mean(jnp.square(prediction), axis=axes)), errors

    with full_precision_matmuls():
        if output != "mean":
            # An example's timesteps read one projection, so its cotangent is their sum.
            def mean_output(weights):
                return jnp.sum(values(jax.tree.map(repeat, weights.text(batch.text)))[0]) / steps

            gradients = reduced(jax.grad(mean_output)(weights))
            return gradients, jnp.zeros(count, batch.latents.dtype)

        def summed(weights):
            found, residuals = values(weights.text(jax.tree.map(repeat, batch.text)))
            return jnp.sum(found), residuals

        cotangents, residuals = jax.grad(summed, has_aux=True)(jax.tree.map(repeat, weights))
        cotangents = jax.tree.map(lambda leaf: leaf.reshape(count, steps, *leaf.shape[1:]), cotangents)
        # |c^T g|^2 = sum_lm (c_l . c_m) (g_l . g_m), without the gradient of each timestep.
        rows = text_rows(batch.text)
        gram = jnp.einsum("bld,bmd->blm", rows, rows)
        squares = [
            jnp.einsum("bslf,blm,bsmf->bs", leaf, gram, leaf, optimize="optimal")
            for leaf in jax.tree.leaves(cotangents)
        ]
        norms = jnp.sqrt(jnp.maximum(sum(squares), 0))
        shares = jnp.where(norms > 0, 1 / jnp.where(norms > 0, norms, 1), 0) / steps
        mean = jax.tree.map(lambda leaf: jnp.einsum("bs,bslf->blf", shares, leaf), cotangents)
        return reduced(mean), jnp.mean(residuals.reshape(count, steps), axis=1)


def _widened(array: jax.Array) -> jax.Array:
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))
