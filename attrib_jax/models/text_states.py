"""Text states beside their transpose, from which key and value projections take their derivative."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


class TextStates(NamedTuple):
    """Text states, which a UNet takes in place of an array of them; results stay the same.

    For programs that take the gradient of each example by the projections, which on a CPU is up to twice as fast by the
    transpose as by the states. Make it outside of the loop that uses it: what a loop's body transposes itself, XLA
    folds back into the products.

    Attributes:
      rows: (..., L, D), the states.
      columns: (..., D, L), their transpose.
    """

    rows: jax.Array
    columns: jax.Array

    @classmethod
    def of(cls, rows: jax.Array) -> "TextStates":
        return cls(rows, jnp.swapaxes(rows, -1, -2))

    def dot_general(self, rows, kernel, *_, **__):
        """What `nn.Dense` takes instead of `jax.lax.dot_general`: `rows`, in its dtype, times a kernel."""
        return _project(rows, self.columns.astype(rows.dtype), kernel)


@jax.custom_jvp
def _project(rows, columns, kernel):
    """`rows @ kernel`, whose derivative by the kernel is taken from `columns`."""
    return rows @ kernel


def _project_jvp(primals, tangents):
    rows, columns, kernel = primals
    rows_dot, _, kernel_dot = tangents
    parts = []
    if not isinstance(rows_dot, SymbolicZero):
        parts.append(rows_dot @ kernel)
    if not isinstance(kernel_dot, SymbolicZero):
        parts.append(_by_columns_p.bind(columns, kernel_dot))
    result = _project(*primals)
    return result, sum(parts) if parts else jnp.zeros_like(result)


_project.defjvp(_project_jvp, symbolic_zeros=True)


def _by_columns(columns, kernel):
    """(..., D, L) and (D, F) -> (..., L, F)."""
    return jnp.einsum("...dl,df->...lf", columns, kernel)


def _transpose_by_kernel(cotangent, columns, kernel):
    # A primitive for this order of the factors: of JAX's own transpose, which has the cotangent first, XLA makes a
    # product of the states as they were.
    if columns.size == math.prod(columns.shape[-2:]):
        return (columns @ cotangent).reshape(kernel.aval.shape)
    return jnp.einsum("...dl,...lf->df", columns, cotangent)


def _transpose_by_columns(cotangent, columns, kernel):
    return jnp.einsum("df,...lf->...dl", kernel, cotangent)


_by_columns_p = Primitive("project_by_columns")
_by_columns_p.def_impl(jax.jit(_by_columns))
_by_columns_p.def_abstract_eval(
    lambda columns, kernel: columns.update(shape=(*columns.shape[:-2], columns.shape[-1], kernel.shape[-1]))
)
ad.defbilinear(_by_columns_p, _transpose_by_columns, _transpose_by_kernel)
batching.primitive_batchers[_by_columns_p] = lambda arguments, axes: (jax.vmap(_by_columns, axes)(*arguments), 0)
mlir.register_lowering(_by_columns_p, mlir.lower_fun(_by_columns, multiple_results=False))
