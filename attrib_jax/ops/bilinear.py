"""Convolutions as JAX primitives: the forward pass and its two gradients, which are each other's transposes.

A convolution y = f(x, kernel) is linear in each argument. So are its input gradient (of the cotangent and the kernel)
and its kernel gradient (of x and the cotangent), and the transposes of each of the three are the other two. As
primitives they keep that form under every composition of `grad`, `jvp` and `vmap`, and a platform decides only when a
program is lowered how each is computed; JAX would transpose the sums inside a fast form one by one, into padded arrays.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Pads = tuple[tuple[int, int], tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Static parameters of a convolution.

    Attributes:
      in_size, out_size: height and width of the images before and after.
      kernel_size: height and width of the kernel.
      stride: step of the kernel in both directions.
      padding: zeros added as ((top, bottom), (left, right)).
      precision: `jax.default_matmul_precision` where the convolution is called, since lowering happens elsewhere.
    """

    in_size: tuple[int, int]
    out_size: tuple[int, int]
    kernel_size: tuple[int, int]
    stride: int
    padding: Pads
    precision: str | None


class Form(NamedTuple):
    """How a platform computes a convolution; None takes XLA's transpose of the forward pass.

    Attributes:
      forward: `(x (B, H, W, C), kernel (h, w, C, F), geometry) -> (B, H', W', F)`.
      input_gradient: `(cotangent (B, H', W', F), kernel, geometry) -> (B, H, W, C)`.
      kernel_gradient: `(x, cotangent, geometry) -> (h, w, C, F)`.
    """

    forward: Callable[..., jax.Array]
    input_gradient: Callable[..., jax.Array] | None = None
    kernel_gradient: Callable[..., jax.Array] | None = None


# `(geometry, channels C, features F, dtype) -> Form`
ChooseForm = Callable[[Geometry, int, int, jnp.dtype], Form]


class BilinearConv:
    """The three primitives of a convolution, called as `conv(x, kernel, geometry)`.

    Arrays are (B, H, W, C) and (h, w, C, F) of one dtype. Under `vmap` over kernels an array carries one more leading
    axis, that of the examples which have a kernel each; `vmap` over the images alone extends their batch.
    """

    def __init__(self, name: str, default: Form, on_cpu: ChooseForm):
        """Registers the primitives: lowered to `default`, and on CPUs to the form that `on_cpu` chooses."""
        names = (name, f"{name}_input_gradient", f"{name}_kernel_gradient")
        self.forward, self.input_gradient, self.kernel_gradient = map(Primitive, names)

        def forward_form(choose):
            def compute(x, kernel, geometry):
                return choose(geometry, *kernel.shape[2:], x.dtype).forward(x, kernel, geometry)

            return compute

        def input_gradient_form(choose):
            def compute(cotangent, kernel, geometry):
                form = choose(geometry, *kernel.shape[2:], kernel.dtype)
                if form.input_gradient is not None:
                    return form.input_gradient(cotangent, kernel, geometry)
                shape = (len(cotangent), *geometry.in_size, kernel.shape[2])
                return _transpose(lambda x: form.forward(x, kernel, geometry), shape, cotangent)

            return compute

        def kernel_gradient_form(choose):
            def compute(x, cotangent, geometry):
                form = choose(geometry, x.shape[-1], cotangent.shape[-1], x.dtype)
                if form.kernel_gradient is not None:
                    return form.kernel_gradient(x, cotangent, geometry)
                shape = (*geometry.kernel_size, x.shape[-1], cotangent.shape[-1])
                return _transpose(lambda kernel: form.forward(x, kernel, geometry), shape, cotangent)

            return compute

        self._register(
            self.forward,
            lambda x, kernel, geometry: (x.shape[-4], *geometry.out_size, kernel.shape[-1]),
            lambda cotangent, kernel, **geometry: self.input_gradient.bind(cotangent, kernel, **geometry),
            lambda cotangent, x, **geometry: self.kernel_gradient.bind(x, cotangent, **geometry),
            (forward_form(lambda *_: default), forward_form(on_cpu)),
            batch=True,
        )
        self._register(
            self.input_gradient,
            lambda cotangent, kernel, geometry: (cotangent.shape[-4], *geometry.in_size, kernel.shape[-2]),
            lambda cotangent, kernel, **geometry: self.forward.bind(cotangent, kernel, **geometry),
            lambda cotangent, first, **geometry: self.kernel_gradient.bind(cotangent, first, **geometry),
            (input_gradient_form(lambda *_: default), input_gradient_form(on_cpu)),
            batch=True,
        )
        self._register(
            self.kernel_gradient,
            lambda x, cotangent, geometry: (*geometry.kernel_size, x.shape[-1], cotangent.shape[-1]),
            lambda cotangent, second, **geometry: self.input_gradient.bind(second, cotangent, **geometry),
            lambda cotangent, x, **geometry: self.forward.bind(x, cotangent, **geometry),
            (kernel_gradient_form(lambda *_: default), kernel_gradient_form(on_cpu)),
            batch=False,
        )

    def __call__(self, x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
        return self.forward.bind(x, kernel, geometry=geometry)

    @staticmethod
    def _register(primitive, shape, transpose_first, transpose_second, computations, batch: bool):
        """Gives a primitive its rules.

        Args:
          primitive: of two arrays.
          shape: `(first, second, geometry) -> shape` of the result for arrays without an axis of kernels.
          transpose_first, transpose_second: `(cotangent, the other array, geometry=...)`, the transpose by each array.
          computations: the default one and that of CPUs.
          batch: whether the first array and the result have a batch axis, which `vmap` over the first array extends.
        """

        def abstract(first, second, *, geometry):
            lead = next((a.shape[:1] for a in (first, second) if a.ndim == 5), ())
            return result_like(first, (*lead, *shape(first, second, geometry)))

        def batched(arrays, axes, *, geometry):
            if batch and axes[1] is None:
                return fold_into_batch(lambda x: primitive.bind(x, arrays[1], geometry=geometry), arrays[0], axes[0])
            return _map_kernels(lambda *arrays: primitive.bind(*arrays, geometry=geometry), arrays, axes)

        ad.defbilinear(
            primitive,
            lambda cotangent, first, second, **geometry: _like(transpose_first(cotangent, second, **geometry), first),
            lambda cotangent, first, second, **geometry: _like(transpose_second(cotangent, first, **geometry), second),
        )
        register(primitive, abstract, batched, *map(_with_kernel_axis, computations))


def register(primitive: Primitive, abstract, batched, default, on_cpu) -> None:
    """Registers what every primitive has: its shape, its rule for `vmap`, and what it is lowered to."""
    run = jax.jit(lambda arrays, static: primitive.bind(*arrays, **dict(static)), static_argnums=1)
    primitive.def_impl(lambda *arrays, **static: run(arrays, tuple(static.items())))
    primitive.def_abstract_eval(abstract)
    batching.primitive_batchers[primitive] = batched
    mlir.register_lowering(primitive, mlir.lower_fun(default, multiple_results=False))
    mlir.register_lowering(primitive, mlir.lower_fun(on_cpu, multiple_results=False), platform="cpu")


def result_like(operand, shape: tuple[int, ...]):
    """The abstract result of another shape than `operand`, on the same axes of a device mesh."""
    sharding = jax.sharding.NamedSharding(operand.sharding.mesh, jax.sharding.PartitionSpec(*(None for _ in shape)))
    return operand.update(shape=shape, sharding=sharding)


def fold_into_batch(function, x, axis):
    """Maps `function` over an axis of images (B, ...) or (N, B, ...) in a larger batch -> the results, their axis."""
    place = x.ndim - 5
    x = jnp.moveaxis(x, axis, place)
    result = function(x.reshape(*x.shape[:place], -1, *x.shape[place + 2 :]))
    place = result.ndim - 4
    return result.reshape(*result.shape[:place], *x.shape[-5:-3], *result.shape[place + 1 :]), place


def _map_kernels(function, arrays, axes):
    """Maps a function of two arrays over an axis that gives each example a kernel -> the results, and their axis 0."""
    size = next(array.shape[axis] for array, axis in zip(arrays, axes) if axis is not None)
    arrays = [array if axis is None else jnp.moveaxis(array, axis, 0) for array, axis in zip(arrays, axes)]
    if all(array.ndim - (axis is not None) == 4 for array, axis in zip(arrays, axes)):
        return function(*arrays), 0
    # There is such an axis already: both become one.
    arrays = [array if axis is not None else array[None] for array, axis in zip(arrays, axes)]
    arrays = [array if array.ndim == 6 else array[:, None] for array in arrays]
    inner = max(array.shape[1] for array in arrays)
    arrays = [jnp.broadcast_to(array, (size, inner, *array.shape[2:])) for array in arrays]
    result = function(*(array.reshape(size * inner, *array.shape[2:]) for array in arrays))
    return result.reshape(size, inner, *result.shape[1:]), 0


def _with_kernel_axis(compute):
    """`compute(first, second, geometry)` of arrays that may have a leading axis of kernels, in the right precision."""

    def run(first, second, *, geometry):
        axes = tuple(0 if array.ndim == 5 else None for array in (first, second))
        fn = lambda first, second: compute(first, second, geometry)  # noqa: E731
        with jax.default_matmul_precision(geometry.precision):
            return fn(first, second) if axes == (None, None) else jax.vmap(fn, axes)(first, second)

    return run


def _transpose(function, shape, cotangent):
    return jax.linear_transpose(function, jax.ShapeDtypeStruct(shape, cotangent.dtype))(cotangent)[0]


def _like(result, operand):
    """A transpose by an operand that all kernels share is the sum over them."""
    return result if result.ndim == operand.aval.ndim else jnp.sum(result, axis=0)
