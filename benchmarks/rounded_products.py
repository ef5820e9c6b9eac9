"""Products as a tensor core takes them, on any device: factors with fewer digits, sums in float32."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

# Bits of the mantissa that are stored, of 23.
TENSORFLOAT32_BITS = 10
BFLOAT16_BITS = 7

_GRADIENTS = ("_input_gradient", "_kernel_gradient")
_PRODUCTS = ("dot_general", "conv_general_dilated")
_PRODUCTS += tuple(f"{name}{part}" for name in ("conv2d", "upsample_conv2d") for part in ("", *_GRADIENTS))
# Its factors are computed from the kernel before the program.
_PREPARED = "conv2d_prepared"
# Calls, by the parameter that holds what they call.
_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "custom_jvp_call": "call_jaxpr"}
_CALLS |= {"custom_vjp_call": "call_jaxpr", "checkpoint": "jaxpr", "remat2": "jaxpr"}
# What takes other jaxprs in place of its own.
_LOOPS_AND_BRANCHES = ("scan", "while", "cond")


def round_products(fn: Callable[..., Any], mantissa_bits: int, truncate: bool = False) -> Callable[..., Any]:
    """`fn`, each factor of every float32 product of matrices or convolution rounded to `mantissa_bits` first.

    All else, the sums of products included, stays as it is. `fn` is what it is after differentiation: factors of a
    tangent are rounded as those of a primal are. The result is for `jax.jit` and is not to be differentiated itself.

    Args:
      fn: of pytrees of arrays.
      mantissa_bits: that a factor keeps, 1 to 22.
      truncate: towards zero, instead of to the nearest.
    Raises:
      TypeError: when called, for products inside of other operations than calls, loops and branches, or with prepared
        kernels (`ops.prepare_kernels`).
    """
    rounding = functools.partial(_truncate if truncate else _round, mantissa_bits)

    def rounded(*args):
        jaxpr, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
        results = _evaluate(jaxpr, rounding, *jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shape), results)

    return rounded


def _round(mantissa_bits: int, x: jax.Array) -> jax.Array:
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=mantissa_bits)


def _truncate(mantissa_bits: int, x: jax.Array) -> jax.Array:
    kept = jnp.uint32(0xFFFFFFFF << (23 - mantissa_bits) & 0xFFFFFFFF)
    return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, jnp.uint32) & kept, jnp.float32)


def _evaluate(closed: core.ClosedJaxpr, rounding: Callable[[jax.Array], jax.Array], *args: Any) -> list[Any]:
    jaxpr, known = closed.jaxpr, {}
    known.update(zip(jaxpr.constvars, closed.consts, strict=True))
    known.update(zip(jaxpr.invars, args, strict=True))
    for eqn in jaxpr.eqns:
        inputs = [atom.val if isinstance(atom, core.Literal) else known[atom] for atom in eqn.invars]
        known.update(zip(eqn.outvars, _apply(eqn, rounding, inputs), strict=True))
    return [atom.val if isinstance(atom, core.Literal) else known[atom] for atom in jaxpr.outvars]


def _apply(eqn: core.JaxprEqn, rounding: Callable[[jax.Array], jax.Array], inputs: list[Any]) -> list[Any]:
    name = eqn.primitive.name
    if name in _CALLS:
        called = eqn.params[_CALLS[name]]
        closed = called if isinstance(called, core.ClosedJaxpr) else core.ClosedJaxpr(called, ())
        return _evaluate(closed, rounding, *inputs)
    params = eqn.params
    if name == _PREPARED:
        raise TypeError("round_products does not round the filters of a TransformedKernel: give it the kernel itself")
    if name in _PRODUCTS:
        inputs = [rounding(x) if x.dtype == jnp.float32 else x for x in inputs]
    elif _has_products(eqn):
        if name not in _LOOPS_AND_BRANCHES:
            raise TypeError(f"products inside of {name}, which round_products does not look into")
        params = jax.tree.map(lambda value: _rounded(value, rounding), params, is_leaf=_is_jaxpr)
    results = eqn.primitive.bind(*inputs, **params)
    return results if eqn.primitive.multiple_results else [results]


def _rounded(value: Any, rounding: Callable[[jax.Array], jax.Array]) -> Any:
    """A parameter of an equation; a jaxpr as one that rounds."""
    if not isinstance(value, core.ClosedJaxpr):
        return value
    shapes = [jax.ShapeDtypeStruct(variable.aval.shape, variable.aval.dtype) for variable in value.jaxpr.invars]
    return jax.make_jaxpr(lambda *args: _evaluate(value, rounding, *args))(*shapes)


def _has_products(eqn: core.JaxprEqn) -> bool:
    return any(
        inner.primitive.name in _PRODUCTS or _has_products(inner)
        for value in jax.tree.leaves(eqn.params, is_leaf=_is_jaxpr)
        if _is_jaxpr(value)
        for inner in value.eqns
    )


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, core.ClosedJaxpr | core.Jaxpr)
