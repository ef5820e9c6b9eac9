"""Unlearning the query: gradient ascent on its loss, held near the old weights by the Fisher information.

METHOD.md section 3. The objective is L_unlearn = -L(query) + N/2 (theta - theta0)^T F (theta - theta0); a step of
Newton's method with Hessian N F, the pull of the second term dropped, is eq. 5. Everything here is written as ascent:
steps are *added* to the weights and raise the query's loss.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from attrib_jax.core.checks import check_choice, check_positive, check_range
from attrib_jax.core.keys import check_key
from attrib_jax.core.weights import merge_weights
from attrib_jax.curvature.diagonal import Diagonal
from attrib_jax.curvature.ekfac import EKFAC
from attrib_jax.diffusion.losses import Predict, denoising_losses
from attrib_jax.diffusion.schedule import NoiseSchedule
from attrib_jax.models.predictor import as_predictor
from attrib_jax.models.projected_text import ProjectedWeights, kernel_gradient, text_columns
from attrib_jax.ops.matmul_precision import full_precision_matmuls
from attrib_jax.ops.micro_batching import even_group_size, gradient_pixels, num_pixels, sum_groups

METHODS = ("newton", "sgd")

# Draws whose gradient is taken in one pass. Fixed, and not a batch size that a user sets, because sums over groups of
# another size differ in their last bits.
DRAWS_PER_TILE = 16

# At most this many tiles between two calls of `progress`.
_MAX_TILES_PER_CALL = 8


class QueryGradient(NamedTuple):
    """The query's loss and its gradient with respect to the selected weights, averaged over draws (or summed)."""

    loss: jax.Array
    gradient: Any


class Unlearned(NamedTuple):
    """Weights after unlearning, and one number a step of what happened; after fewer steps, what `unlearn` goes on from.

    Attributes:
        selected: nested dict, the moved weights.
        query_loss: (steps,) float32, the query's loss before each step, estimated from that step's draws.
        update_norm: (steps,) float32, Euclidean norm of each step.
    """

    selected: Any
    query_loss: Any
    update_norm: Any


class NewtonState(NamedTuple):
    """State of `scale_by_newton`, which carries the arrays that an update needs as arguments.

    Attributes:
        curvature: as given.
        origin: the weights that `init` saw, theta0, if the EWC gradient is kept; else None.
    """

    curvature: Diagonal | EKFAC
    origin: Any


def query_draws(
    key: jax.Array, indices: jax.Array, num_train_timesteps: int, shape: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """The timestep and noise of draws number `indices` (S,) -> ((S,) int32, (S, *shape) float32).

    A draw depends on the key and its index alone, so it is the same however draws are grouped. Draws 0..T-1 take each
    of the T timesteps once, in random order, as do the next T: without replacement (METHOD.md section 3). TypeError for
    a key that is no typed threefry key.
    """
    check_key(key)
    timestep_key, noise_key = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)

    def draw(index):
        order = jax.random.permutation(
            jax.random.fold_in(timestep_key, index // num_train_timesteps),
            jnp.arange(num_train_timesteps, dtype=jnp.int32),
        )
        noise = jax.random.normal(jax.random.fold_in(noise_key, index), shape, jnp.float32)
        return order[index % num_train_timesteps], noise

    return jax.vmap(draw)(indices)


def query_gradient(
    predict: Predict,
    schedule: NoiseSchedule,
    selected: Any,
    rest: Any,
    latents: jax.Array,
    text: jax.Array,
    key: jax.Array,
    draws: int,
    *,
    mask: jax.Array | None = None,
    tile: int = DRAWS_PER_TILE,
) -> QueryGradient:
    """Gradient of the query's loss with respect to the selected weights, averaged over (t, noise) draws.

    One program, for use under `jit`; `unlearn` takes the same gradient a few tiles at a time.

    Args:
        predict: the model, `predict(params, noisy (h, w, c), timestep (), text (L, d)) -> (h, w, c)`.
        schedule: noise levels and prediction type.
        selected: nested dict of the weights to differentiate.
        rest: the other weights.
        latents: (h, w, c) the query's latents, multiplied by the autoencoder's scaling factor.
        text: (L, d) text states of its prompt.
        key: threefry key of the draws, such as `purpose_key(seed, "query")`.
        draws: number of draws, static.
        mask: (h, w) weights of the latent pixels, see `region_mask`; all count if None.
        tile: draws held at once, static. It changes neither which draws are taken nor, beyond rounding, the result.

    Raises:
        TypeError: `key` is no typed threefry key.
        ValueError: `draws` or `tile` is below 1.
    """
    _check_draws(draws, tile)
    with full_precision_matmuls():
        weights = as_predictor(predict).project_text(selected, text)
        fixed = (schedule, weights, rest, latents, text, key, mask)
        total = _add_query_tiles(predict, zero_gradient(weights), *fixed, 0, draws, tile, -(-draws // tile))
        total = by_selected(total, selected, text)
    return jax.tree.map(lambda leaf: leaf / draws, total)


def newton_step(
    selected: Any, gradient: Any, curvature: Diagonal | EKFAC, step_size: float, num_examples: int, damping: float = 0.0
) -> Any:
    """One Newton step, eq. 5: theta + step_size / num_examples * (F + damping)^-1 gradient.

    Args:
        selected: nested dict of weights.
        gradient: the query's loss gradient, in the same layout.
        curvature: anything with `.solve(tree, damping)`, such as `Diagonal` or `EKFAC`.
        step_size: alpha.
        num_examples: N, the number of training images.
        damping: added to F.

    Returns:
        The new selected weights, in their dtype. Call `curvature.check_solvable(gradient, damping)` before, on the
        host, if F may hold zeros.

    Raises:
        ValueError: `num_examples` or `step_size` is not above 0, or `damping` below 0; arrays are not checked.
    """
    for name, value in (("step_size", step_size), ("num_examples", num_examples)):
        if isinstance(value, (int, float, np.number)):
            check_positive(name, value)
    if isinstance(damping, (int, float, np.number)):
        check_range("damping", damping, low=0)
    return _add_scaled(selected, curvature.solve(gradient, damping), step_size / num_examples)


def sgd_step(selected: Any, gradient: Any, step_size: float) -> Any:
    """Plain gradient ascent, theta + step_size * gradient: the paper's failing baseline, which forgets everything."""
    return _add_scaled(selected, gradient, step_size)


def scale_by_newton(
    curvature: Diagonal | EKFAC, num_examples: int, damping: float = 0.0, keep_ewc_gradient: bool = False
) -> optax.GradientTransformation:
    """`newton_step` as an optax transformation: a gradient g becomes the ascent direction (F + damping)^-1 g / N.

    Chain it with `optax.scale(step_size)`, which keeps its sign, and add the result with `optax.apply_updates`.

    With `keep_ewc_gradient` the second term of L_unlearn is not dropped. With F + damping as the precision throughout,
    its gradient is N (F + damping) (theta - theta0), which the inverse Hessian turns into theta - theta0; so the
    direction becomes (F + damping)^-1 g / N - (theta - theta0), where theta0 is what `init` saw. The first step is the
    same; later ones are pulled back.

    Raises:
        ValueError: `num_examples` is below 1 or `damping` below 0; from `update`, if the EWC gradient is kept and
            `params` is not given.
    """
    _check_newton(num_examples, damping)

    def init(params):
        return NewtonState(curvature, params if keep_ewc_gradient else None)

    def update(updates, state, params=None):
        if keep_ewc_gradient and params is None:
            raise ValueError("params is None; with keep_ewc_gradient, call update(gradient, state, params).")
        return _newton_direction(updates, state.curvature, num_examples, damping, params, state.origin), state

    return optax.GradientTransformation(init, update)


def unlearn(
    predict: Predict,
    schedule: NoiseSchedule,
    selected: Any,
    rest: Any,
    latents: jax.Array,
    text: jax.Array,
    key: jax.Array,
    *,
    draws: int,
    step_size: float,
    method: str = "newton",
    curvature: Diagonal | EKFAC | None = None,
    num_examples: int | None = None,
    steps: int = 1,
    damping: float = 0.0,
    keep_ewc_gradient: bool = False,
    mask: jax.Array | None = None,
    tile: int = DRAWS_PER_TILE,
    progress: Callable[[int], None] | None = None,
) -> Unlearned:
    """Unlearns the query: each step takes the gradient at the current weights, from fresh draws, and adds an update.

    A loop on the host around compiled steps, because the check of F needs values. Pass the same `predict` object to
    every call: it is part of the compiled programs' identity. `attrib_jax.methods.unlearn` is the same loop on all
    devices, stored and resumed.

    Args:
        predict, schedule, selected, rest, latents, text, mask, tile: as in `query_gradient`.
        key: threefry key; step number i draws from `fold_in(key, i)`.
        draws: (t, noise) draws a step.
        step_size: alpha.
        method: "newton" (eq. 5) or "sgd" (plain ascent, without F).
        curvature: F, for "newton".
        num_examples: N, for "newton"; plain ascent does not use it.
        steps: number of steps.
        damping: added to F.
        keep_ewc_gradient: keep the pull towards the first weights, see `scale_by_newton`.
        progress: called on the host with the number of draws done so far, up to draws * steps.

    Raises:
        TypeError: `key` is not a typed threefry key.
        ValueError: an argument is out of range or contradicts the method; F is 0 where the gradient is not (the leaf
            is named); the gradient is NaN or infinite.
    """
    _check_draws(draws, tile)
    check_positive("steps", steps, integer=True)
    check_positive("step_size", step_size)
    check_choice("method", method, METHODS)
    check_key(key)
    if mask is not None:
        mask = _checked_mask(mask)
    if method == "newton":
        if curvature is None or num_examples is None:
            raise ValueError("method='newton' needs curvature and num_examples; fit F first, or use method='sgd'.")
        _check_newton(num_examples, damping)
    else:
        if damping or keep_ewc_gradient or curvature is not None:
            raise ValueError(
                "method='sgd' has no F: curvature, damping and keep_ewc_gradient belong to method='newton'. Leave them "
                "out, or take that method."
            )
        num_examples = 1
    origin = selected if keep_ewc_gradient else None
    tiles = -(-draws // tile)
    # A divisor, so that every call is the same compiled program and none runs tiles that do not count.
    tiles_per_call = max(count for count in range(1, _MAX_TILES_PER_CALL + 1) if tiles % count == 0)
    losses, norms = [], []
    for step in range(steps):
        # The sums over the step's draws, a few tiles a call, so that progress shows.
        step_key = jax.random.fold_in(key, step)
        with full_precision_matmuls():
            weights = _project_text_jit(predict, selected, text)
            total = zero_gradient(weights)
            for first in range(0, tiles, tiles_per_call):
                fixed = (schedule, weights, rest, latents, text, step_key, mask)
                total = _add_query_tiles_jit(predict, total, *fixed, first * tile, draws, tile, tiles_per_call)
                if progress is not None:
                    jax.block_until_ready(total.loss)
                    progress(step * draws + min((first + tiles_per_call) * tile, draws))
            total = _by_selected_jit(total, selected, text)
        if curvature is not None:
            curvature.check_solvable(total.gradient, damping)
        selected, loss, norm = ascend(
            selected, total, curvature, origin, draws, step_size, num_examples=num_examples, damping=damping
        )
        check_step(step, steps, loss, norm, step_size)
        losses.append(loss)
        norms.append(norm)
    return Unlearned(selected, jnp.stack(losses), jnp.stack(norms))


def check_step(step: int, steps: int, loss: jax.Array, norm: jax.Array, step_size: float) -> None:
    """Raises ValueError where the loss or the norm that `ascend` returned for step number `step` is not finite."""
    if not (jnp.isfinite(loss) and jnp.isfinite(norm)):
        raise ValueError(
            f"step {step + 1} of {steps} is not finite (query loss {float(loss)}, update norm {float(norm)}). "
            f"Check the weights for NaN, or take a smaller step_size than {step_size}."
        )


def ascend(
    selected: Any,
    total: QueryGradient,
    curvature: Diagonal | EKFAC | None,
    origin: Any,
    draws: int,
    step_size: float,
    *,
    num_examples: int,
    damping: float = 0.0,
) -> tuple[Any, jax.Array, jax.Array]:
    """One step of unlearning from the sums over its draws -> new weights, the query's mean loss, the step's norm.

    Args:
        selected: nested dict of the weights before the step.
        total: sums over `draws` draws of the query's loss and gradient.
        curvature: F of a Newton step (eq. 5); None for plain ascent, which does not use `num_examples` and `damping`.
        origin: the weights before the first step where the EWC gradient is kept, see `scale_by_newton`; else None.
        draws: number of draws in the sums.
        step_size: alpha.
        num_examples: N.
        damping: added to F.
    """
    # N may exceed int32 (LAION-5B), so it is passed as a float.
    return ascend_program(selected, total, curvature, origin, draws, step_size, float(num_examples), float(damping))


def _newton_direction(gradient, curvature, num_examples, damping, selected=None, origin=None):
    """(F + damping)^-1 gradient / N, less selected - origin unless `origin` is None."""
    direction = jax.tree.map(lambda leaf: leaf / num_examples, curvature.solve(gradient, damping))
    if origin is None:
        return direction
    return jax.tree.map(lambda leaf, new, old: leaf - (new - old), direction, selected, origin)


@jax.jit
def ascend_program(selected, total, curvature, origin, draws, step_size, num_examples, damping):
    """One step of `unlearn` from the sum over its draws; plain ascent where `curvature` is None."""
    loss, direction = jax.tree.map(lambda leaf: leaf / draws, total)
    if curvature is not None:
        direction = _newton_direction(direction, curvature, num_examples, damping, selected, origin)
    return _add_scaled(selected, direction, step_size), loss, step_size * optax.tree.norm(direction)


def _add_scaled(selected: Any, update: Any, scale) -> Any:
    return jax.tree.map(lambda leaf, change: (leaf + scale * change).astype(leaf.dtype), selected, update)


def _checked_mask(mask: Any) -> np.ndarray:
    mask = np.asarray(mask)
    if not np.all((mask >= 0) & (mask <= 1)):
        raise ValueError(f"mask has values from {mask.min()} to {mask.max()}; expected weights in [0, 1]")
    if not mask.any():
        raise ValueError("mask selects no latent pixel; give a region that covers part of the image.")
    return mask


def _check_newton(num_examples: int, damping: float) -> None:
    check_positive("num_examples", num_examples, integer=True)
    check_range("damping", damping, low=0)


def _check_draws(draws: int, tile: int) -> None:
    check_positive("draws", draws, integer=True)
    check_positive("tile", tile, integer=True)


def tile_gradient(
    predict,
    schedule,
    weights: ProjectedWeights,
    rest,
    latents,
    text,
    key,
    mask,
    indices: jax.Array,
    draws,
    platform: str | None = None,
) -> QueryGradient:
    """Sums of the query's loss and gradient over the draws number `indices` (S,); numbers from `draws` on count zero.

    The gradient is by `weights`, those of `Predictor.project_text`; `by_selected` turns the sum over all tiles into
    that by the selected weights. `platform` is as in `strided_losses`, the others as in `query_gradient`.
    """

    def group_gradient(indices):
        timesteps, noise = query_draws(key, indices, schedule.num_train_timesteps, latents.shape)
        noise = noise.astype(latents.dtype)

        def loss_sum(weights):
            params = merge_weights(weights.others, rest)
            projected = weights.text(text)
            losses = denoising_losses(predict, params, schedule, latents, projected, noise, timesteps, mask=mask)
            return jnp.sum(losses * (indices < draws).astype(losses.dtype))

        return QueryGradient(*jax.value_and_grad(loss_sum)(weights))

    size = even_group_size(len(indices), num_pixels(latents.shape), gradient_pixels(platform))
    return sum_groups(group_gradient, indices, size)


def zero_gradient(weights: ProjectedWeights) -> QueryGradient:
    """The sums of `tile_gradient` over no tiles."""
    dtype = jnp.result_type(*jax.tree.leaves(weights), jnp.float32)
    return QueryGradient(jnp.zeros((), dtype), jax.tree.map(jnp.zeros_like, weights))


def by_selected(total: QueryGradient, selected: Any, text: jax.Array) -> QueryGradient:
    """Sums of `tile_gradient` with the gradient by the selected weights, from which and `text` the tiles' were made."""
    return QueryGradient(total.loss, kernel_gradient(total.gradient, selected, text_columns(text)))


def _add_query_tiles(
    predict, total, schedule, weights, rest, latents, text, key, mask, first, draws, tile, tiles
) -> QueryGradient:
    """Adds to `total` the sums over `tiles` tiles of draws from number `first`; numbers from `draws` on count zero.

    The total is the scan's carry, so tiles are added in the same order however they are spread over calls.
    """

    def add_tile(total, start):
        indices = first + start + jnp.arange(tile, dtype=jnp.int32)
        part = tile_gradient(predict, schedule, weights, rest, latents, text, key, mask, indices, draws)
        return jax.tree.map(lambda old, new: old + new.astype(old.dtype), total, part), None

    return jax.lax.scan(add_tile, total, tile * jnp.arange(tiles, dtype=jnp.int32))[0]


# `first` and `draws` stay traced, so every call of every step runs one compiled program.
_add_query_tiles_jit = jax.jit(
    _add_query_tiles, static_argnames=("predict", "tile", "tiles"), donate_argnames=("total",)
)
_project_text_jit = jax.jit(lambda predict, *args: as_predictor(predict).project_text(*args), static_argnums=0)
_by_selected_jit = jax.jit(by_selected)
