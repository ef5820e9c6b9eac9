"""The model outputs whose per-example gradients the projected methods compare (METHOD.md sections 7 and 10)."""

from typing import Any

import jax
import jax.numpy as jnp

from attrib_jax.core.checks import check_choice
from attrib_jax.core.keys import example_noise
from attrib_jax.core.types import Batch
from attrib_jax.diffusion.losses import Predict, denoising_losses, predictions
from attrib_jax.diffusion.schedule import NoiseSchedule

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


def _widened(array: jax.Array) -> jax.Array:
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))
