"""Diagonal Fisher information from per-example gradients (METHOD.md section 3)."""

import contextlib
import functools
import math
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from attrib_jax.core.checks import example_mask
from attrib_jax.core.compensated import CompensatedSum
from attrib_jax.core.weights import flatten_names, unflatten_names
from attrib_jax.curvature.diagonal import GRADIENT_SCALE, Diagonal
from attrib_jax.ops.matmul_precision import full_precision_matmuls
from attrib_jax.ops.shards import MODEL_AXIS, Shard, is_shard, map_parameters
from attrib_jax.parallel.sums import sum_over_group

# Microbatches that are added plainly before the compensated sum, which reads and writes twice as much. Of so few
# positive numbers rounding takes no more than it takes from each square.
_PLAIN_ADDITIONS = 8


class TokenProduct(NamedTuple):
    """Gradients of B examples by one kernel (in, out), as factors: sum_t x_t g_t^T = columns @ cotangents.

    One of them has T (in + out) numbers, and the gradient itself in x out: 1.4 GB in float32 for all key and value
    projections of Stable Diffusion XL, beside 51 MB.

    Attributes:
      columns: (B, in, T) inputs of the layer.
      cotangents: (B, T, out) derivatives of each example's loss by the layer's outputs.
    """

    columns: jax.Array
    cotangents: jax.Array

    def add_squares(self, total: jax.Array, keep: jax.Array) -> jax.Array:
        """`total` (in, out) plus the squares of each gradient times GRADIENT_SCALE, of those that `keep` (B,) names."""

        def add(total, example):
            columns, cotangents, keep = example
            # Complete before it is squared, and the only one in memory.
            square = jnp.square((columns @ cotangents).astype(total.dtype) * GRADIENT_SCALE)
            return total + jnp.where(keep, square, 0), None

        return jax.lax.scan(add, total, (self.columns, self.cotangents, keep))[0]

    def part(self, axis: int, keep: jax.Array) -> tuple["TokenProduct", jax.Array]:
        """The gradients of all examples of a group of devices, and their `keep`, by this device's part of a kernel.

        Factors are sent, which are smaller than the gradients that they give. `axis` is the kernel's divided axis.
        """
        columns, cotangents, keep = jax.tree.map(
            lambda leaf: jax.lax.all_gather(leaf, MODEL_AXIS, axis=0, tiled=True), (*self, keep)
        )
        count, place = jax.lax.axis_size(MODEL_AXIS), jax.lax.axis_index(MODEL_AXIS)

        def cut(leaf, axis):
            size = leaf.shape[axis] // count
            return jax.lax.dynamic_slice_in_dim(leaf, place * size, size, axis)

        if axis == 0:
            return TokenProduct(cut(columns, 1), cotangents), keep
        return TokenProduct(columns, cut(cotangents, 2)), keep


class FisherSum(NamedTuple):
    """Sum over examples of squared gradients; `+` adds the sums of two batches or devices.

    The sum is kept as an unevaluated pair `sum + compensation` (core/compensated.py), which doubles its precision: the
    float32 total of a million samples, added one batch at a time, is right to the last bit instead of drifting.

    Attributes:
      sum: nested dict in the layout of the selected weights, leaves sum of (GRADIENT_SCALE * gradient)**2.
      count: () int32, examples that were not padding.
      compensation: what rounding took from `sum`, in the same layout.
    """

    sum: Any
    count: Any
    compensation: Any

    def __add__(self, other: "FisherSum") -> "FisherSum":  # type: ignore[override]  # tuples are joined
        if not isinstance(other, FisherSum):
            return NotImplemented
        total = CompensatedSum(self.sum, self.compensation) + CompensatedSum(other.sum, other.compensation)
        return FisherSum(total.high, self.count + other.count, total.low)

    def __radd__(self, other) -> "FisherSum":
        # `sum(parts)` starts from 0.
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def mean(self) -> Diagonal:
        """The Fisher information, sum / count, as curvature; NaN where no example was counted."""
        total = CompensatedSum(self.sum, self.compensation).value()
        return Diagonal(jax.tree.map(lambda leaf: leaf / self.count, total), GRADIENT_SCALE)


def fisher_diagonal(
    loss_fn: Callable[[Any, Any, Any], jax.Array],
    selected: Any,
    rest: Any,
    batch: Any,
    mask: jax.Array | None = None,
    microbatch: int | None = None,
) -> FisherSum:
    """Sums the squared per-example gradients of a batch: F_j = E_z[(dL(z) / dtheta_j)^2], before the division.

    Each example's gradient is complete (for a key or value projection, summed over its text tokens) before it is
    squared. An example should be one (image, caption, noise, timestep) draw: squaring a gradient that was averaged
    over several draws gives another quantity.

    Args:
      loss_fn: `loss_fn(selected, rest, example) -> ()`, the loss of one example.
      selected: nested dict of the weights to differentiate.
      rest: the other weights.
      batch: pytree of arrays with a leading axis B; an example is one slice of it.
      mask: (B,) 1 for an example, 0 for padding; all are examples if None. Padding adds exactly zero, whatever its
        gradient, NaN included.
      microbatch: number of per-example gradients held at once; None holds all B. It must divide B. It changes memory
        and speed, and the result only by rounding.

    Returns:
      The batch's `FisherSum`; add them over batches and call `.mean()`.

    Raises:
      ValueError: leading axes differ, or `microbatch` does not divide B.
    """
    gradients = jax.vmap(jax.grad(loss_fn), in_axes=(None, None, 0))
    return sum_squares(gradients, selected, rest, batch, mask, microbatch)


def sum_squares(
    gradients: Callable[[Any, Any, Any], Any],
    selected: Any,
    rest: Any,
    batch: Any,
    mask: jax.Array | None = None,
    microbatch: int | None = None,
    like: Any = None,
) -> FisherSum:
    """`fisher_diagonal` where a model has its per-example gradients in another form than `vmap` of a loss's.

    Args:
      gradients: `gradients(selected, rest, examples)`, the gradient of each of several examples, in the layout of
        `selected` with a leading axis; one example's must not depend on the others. A kernel's may be a
        `TokenProduct`.
      selected, rest, batch, mask, microbatch: as in `fisher_diagonal`; so are result and errors.
      like: tree in the layout of `selected` that has a `Shard` for each leaf whose sum a group of devices keeps divided
        (`parallel.sums.divided_like`): the result holds this device's part of the group's sum. None keeps all whole.
    """
    mask = example_mask(mask, batch)
    size = len(mask)
    if microbatch is None:
        microbatch = size
    if microbatch < 1 or size % microbatch:
        raise ValueError(
            f"microbatch={microbatch} must divide the batch of {size} examples; pad the batch with mask 0, or choose "
            "a divisor."
        )
    number = size // microbatch
    # A microbatch takes every (size / microbatch)-th example, so that a batch sharded over devices stays sharded.
    split = jax.tree.map(lambda x: x.reshape(microbatch, number, *x.shape[1:]), (batch, mask))

    def add_squares(total, index):
        examples, keep = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, 1, keepdims=False), split)

        def add(total, gradient):
            if is_shard(total):
                if isinstance(gradient, TokenProduct):
                    product, all_kept = gradient.part(total.axis, keep)
                    return Shard(product.add_squares(total.value, all_kept), total.axis)
                squares = add(jnp.zeros(gradient.shape[1:], total.value.dtype), gradient)
                return jax.tree.map(jnp.add, total, sum_over_group(squares, total))
            if isinstance(gradient, TokenProduct):
                return gradient.add_squares(total, keep)
            squares = jnp.square(gradient.astype(total.dtype) * GRADIENT_SCALE)
            # One after the other: on a CPU a reduction over the first axis of large arrays runs at a tenth of that, and
            # a choice by a mask of the whole array at a quarter.
            kept = [jnp.where(keep[place], squares[place], 0) for place in range(len(squares))]
            return functools.reduce(jnp.add, kept, total)

        return map_parameters(add, total, gradients(selected, rest, examples)), None

    def zero(node):
        if not is_shard(node):
            return jnp.zeros(node.shape, jnp.promote_types(node.dtype, jnp.float32))
        shape = list(node.value.shape)
        shape[node.axis] //= jax.lax.axis_size(MODEL_AXIS)
        return Shard(zero(jax.ShapeDtypeStruct(shape, node.value.dtype)), node.axis)

    zeros = map_parameters(zero, selected if like is None else like)
    few = max(count for count in range(1, _PLAIN_ADDITIONS + 1) if number % count == 0)

    def add_few(total, indices):
        squares = jax.lax.scan(add_squares, zeros, indices)[0]
        count = jnp.sum(split[1][:, indices], dtype=jnp.int32)
        return total + FisherSum(squares, count, zeros), None

    empty = FisherSum(zeros, jnp.zeros((), jnp.int32), zeros)
    with full_precision_matmuls():
        return jax.lax.scan(add_few, empty, jnp.arange(number).reshape(-1, few))[0]


def factored_gradients(loss_fn: Callable[[Any, Any, Any], jax.Array], selected: Any, rest: Any, batch: Any) -> Any:
    """The gradients of a batch's examples, for `sum_squares`, as factors where these are smaller.

    A linear layer (flax `nn.Dense`) with T tokens an example, whose kernel is among `selected`, gives a `TokenProduct`
    where T (in + out) < in x out and it runs once; the gradients of all other leaves are dense. No gradient by such a
    kernel is ever computed: the layers' inputs and the derivatives by their outputs are taken by intercepting calls.

    Args:
      loss_fn: `loss_fn(selected, rest, example) -> ()`, the loss of one example, which calls its modules without `jit`.
      selected, rest: the two halves of the parameters.
      batch: pytree of arrays with a leading axis B.
    """
    flat, layers = flatten_names(selected), _few_tokens(loss_fn, selected, rest, batch)
    others = {name: leaf for name, leaf in flat.items() if name not in layers}

    def of_example(example):
        def loss(others, offsets):
            inputs = {}

            def visit(name, x, y):
                inputs[name] = x
                return y + offsets[name]

            with intercept_dense(layers, visit):
                return loss_fn(unflatten_names({**flat, **others}), rest, example), inputs

        offsets = {name: jnp.zeros(shape.shape, shape.dtype) for name, shape in layers.items()}
        (dense, outputs), inputs = jax.grad(loss, argnums=(0, 1), has_aux=True)(others, offsets)
        products = {
            name: TokenProduct(
                inputs[name].reshape(-1, inputs[name].shape[-1]).T, outputs[name].reshape(-1, outputs[name].shape[-1])
            )
            for name in layers
        }
        return {**dense, **products}

    found = jax.vmap(of_example)(batch)
    return unflatten_names({name: found[name] for name in flat})


def _few_tokens(loss_fn, selected, rest, batch) -> dict[str, jax.ShapeDtypeStruct]:
    """Kernel name -> an example's output of the linear layers whose gradients are smaller in factors."""
    found: dict[str, jax.ShapeDtypeStruct] = {}
    repeated = set()

    def visit(name, x, y):
        repeated.update({name} & found.keys())
        tokens = math.prod(y.shape[:-1])
        if tokens * (x.shape[-1] + y.shape[-1]) < x.shape[-1] * y.shape[-1]:
            found[name] = jax.ShapeDtypeStruct(y.shape, y.dtype)
        return y

    def run(selected, rest, batch):
        with intercept_dense(flatten_names(selected), visit):
            return loss_fn(selected, rest, jax.tree.map(lambda leaf: leaf[0], batch))

    jax.eval_shape(run, selected, rest, batch)
    return {name: shape for name, shape in found.items() if name not in repeated}


@contextlib.contextmanager
def intercept_dense(kernels: Collection[str], visit: Callable[[str, Any, Any], Any]) -> Iterator[None]:
    """Within it, a Dense module whose kernel is among `kernels` returns `visit(kernel name, its input, its output)`."""

    def intercept(call, args, kwargs, context):
        result = call(*args, **kwargs)
        if not isinstance(context.module, nn.Dense) or context.method_name != "__call__":
            return result
        name = "/".join((*context.module.path, "kernel"))
        if name not in kernels:
            return result
        return visit(name, args[0] if args else kwargs["inputs"], result)

    with nn.intercept_methods(intercept):
        yield
