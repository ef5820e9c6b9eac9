"""Group, layer and root-mean-square normalisation; a two-pass variance keeps its digits when the mean is large."""

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def group_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, num_groups: int, epsilon: float) -> jax.Array:
    """Normalises each example over its pixels and the channels of each group, as torch.nn.GroupNorm.

    Args:
      x: (B, ..., C), in the dtype of the result; statistics are float32 at least.
      scale, bias: (C,), in the same dtype.
      num_groups: divisor of C.
      epsilon: added to the variance.
    """
    dtype, x = x.dtype, at_least_float32(x)

    def group_mean(channel_means):
        """(B, C) means of the channels -> (B, C), each channel holding the mean of its group."""
        grouped = channel_means.reshape(channel_means.shape[0], num_groups, -1)
        means = jnp.mean(grouped, axis=-1, keepdims=True)
        return jnp.broadcast_to(means, grouped.shape).reshape(channel_means.shape)

    # Over the pixels first, then over the channels of each group: contiguous reductions, several times faster on a CPU
    # than one reduction over both.
    pixels = x.reshape(x.shape[0], -1, x.shape[-1])
    centred = pixels - group_mean(jnp.mean(pixels, axis=1))[:, None]
    variance = group_mean(jnp.mean(jnp.square(centred), axis=1))
    factor = jax.lax.rsqrt(variance + epsilon) * scale
    factor = _materialise_cotangent(jnp.broadcast_to(factor[:, None], centred.shape))
    return (centred * factor + bias).reshape(x.shape).astype(dtype)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """Normalises over the last axis of (..., C), as torch.nn.LayerNorm; arguments as in `group_norm`."""
    dtype, x = x.dtype, at_least_float32(x)
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    factor = _materialise_cotangent(jnp.broadcast_to(jax.lax.rsqrt(variance + epsilon), x.shape))
    return (centred * factor * scale + bias).astype(dtype)


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """Divides by the root of the mean square over the last axis of (..., C), as torch.nn.RMSNorm."""
    dtype, x = x.dtype, at_least_float32(x)
    return (x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon) * scale).astype(dtype)


def at_least_float32(x: jax.Array) -> jax.Array:
    """Half-precision numbers as float32, others as they are."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _materialise_cotangent(x):
    """x; on a CPU the cotangent that reaches it is written to memory before anything is computed from it.

    The gradient of a norm holds norm-gradient reductions, products of two arrays summed over an axis, that XLA:CPU
    lowers to slow batched dots, a row times a column for each entry of the other axes: 8 ms for 4 images of 256 pixels
    and 384 channels, where a sum alone takes 0.04. `jax.lax.optimization_barrier` would have x itself written, too.
    """
    return _barrier.bind(x, here=False)


# The transpose of a barrier is none, and the other way round.
_barrier = Primitive("one_way_barrier")
_barrier.def_impl(lambda x, here: x)
_barrier.def_abstract_eval(lambda x, here: x)
ad.deflinear2(_barrier, lambda cotangent, x, here: [_barrier.bind(cotangent, here=not here)])
batching.defvectorized(_barrier)
mlir.register_lowering(_barrier, mlir.lower_fun(lambda x, here: x, multiple_results=False))
mlir.register_lowering(
    _barrier,
    mlir.lower_fun(lambda x, here: jax.lax.optimization_barrier(x) if here else x, multiple_results=False),
    platform="cpu",
)
