"""EKFAC: Kronecker-factored curvature with corrected eigenvalues (METHOD.md section 10; George et al. 2018).

For a linear layer y = x K with kernel K (in, out), tokens t, inputs x_t and loss gradients g_t with respect to y_t, the
gradient of one example is G = sum_t x_t g_t^T. The eigenvectors Q_A of A = E[x x^T] and Q_S of S = E[g g^T] make a
basis, Q_A K Q_S^T, in which the layer's Fisher information is nearly diagonal; its diagonal there,
Lambda = E[(Q_A^T G Q_S)^2], is taken exactly. In the paper's notation, with kernels (out, in), all are transposed.

Layers are the `nn.Dense` modules whose kernels are among the selected weights. Their inputs and output gradients are
taken by intercepting calls, so modules need nothing of this; layers that read one and the same array, as all key and
value projections of the text do, share its A. Every other leaf (biases, norms, convolutions) keeps the diagonal
Fisher information.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attrib_jax.core.checks import check_range, example_mask
from attrib_jax.core.weights import flatten_names, unflatten_names
from attrib_jax.curvature.diagonal import GRADIENT_SCALE, Diagonal
from attrib_jax.curvature.fisher import (
    FisherSum,
    TokenProduct,
    factored_gradients,
    fisher_diagonal,
    intercept_dense,
    sum_squares,
)
from attrib_jax.ops.matmul_precision import full_precision_matmuls

RELATIVE_DAMPING = 0.1

# loss_fn(selected, rest, example) -> (), the loss of one example.
LossFn = Callable[[Any, Any, Any], jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EKFAC:
    """Curvature that is diagonal in a basis of its own for each linear layer, a pytree.

    Attributes:
      eigenvalues: Lambda of the kernels of linear layers, in their bases, and F of all other leaves; its tree has the
        layout of the selected weights.
      input_bases: input name -> (in, in), the eigenvectors of A as columns.
      output_bases: kernel name -> (out, out), the eigenvectors of S as columns.
      inputs: (kernel name, input name) of every linear layer.
      relative_damping: share of each leaf's mean eigenvalue that is added to its eigenvalues.
    """

    eigenvalues: Diagonal
    input_bases: dict[str, Any]
    output_bases: dict[str, Any]
    inputs: tuple[tuple[str, str], ...] = dataclasses.field(metadata={"static": True})
    relative_damping: float = dataclasses.field(default=RELATIVE_DAMPING, metadata={"static": True})

    def solve(self, tree: Any, damping: float = 0.0) -> Any:
        """F^-1 v in `tree`'s layout; usable under `jit`.

        For a kernel Q_A [(Q_A^T v Q_S) / (Lambda + relative_damping * mean(Lambda) + damping)] Q_S^T; `damping` is
        absolute, as that of `Diagonal.solve`.
        """
        return self._rotate(self._damped().solve(self._rotate(tree, into=True), damping), into=False)

    def check_solvable(self, tree: Any, damping: float = 0.0) -> None:
        """Checks on the host that `solve(tree, damping)` is finite; raises as `Diagonal.check_solvable` does."""
        names, known = flatten_names(tree), flatten_names(self.eigenvalues.tree)
        if {name: np.shape(leaf) for name, leaf in names.items()} != {n: np.shape(x) for n, x in known.items()}:
            # A layout that does not fit is named by it, and could not be rotated.
            self.eigenvalues.check_solvable(tree, damping)
        self._damped().check_solvable(self._rotate(tree, into=True), damping)

    def _damped(self) -> Diagonal:
        def add_share(leaf):
            return leaf + self.relative_damping * jnp.mean(leaf)

        return dataclasses.replace(self.eigenvalues, tree=jax.tree.map(add_share, self.eigenvalues.tree))

    def _rotate(self, tree: Any, into: bool) -> Any:
        """`tree` with its kernels in their eigenbases, or from there back."""
        flat = dict(flatten_names(tree))
        for name, source in self.inputs:
            left, right = self.input_bases[source], self.output_bases[name]
            factors = (left.T, flat[name], right) if into else (left, flat[name], right.T)
            flat[name] = jnp.linalg.multi_dot(factors, precision="highest")
        return unflatten_names(flat)


class LinearLayer(NamedTuple):
    """A linear layer as one example runs it.

    Attributes:
      name: name of its kernel, joined by '/'.
      input: the name of the first layer that reads the same array.
      shape: shape of its output for one example, (..., out).
      dtype: dtype of its output.
    """

    name: str
    input: str
    shape: tuple[int, ...]
    dtype: Any


class Factors(NamedTuple):
    """Sums over the tokens of examples.

    Attributes:
      inputs: input name -> (in, in), the sum of x x^T.
      outputs: kernel name -> (out, out), the sum of g g^T, the gradients scaled by GRADIENT_SCALE.
    """

    inputs: dict[str, Any]
    outputs: dict[str, Any]


def linear_layers(loss_fn: LossFn, selected: Any, rest: Any, example: Any) -> tuple[LinearLayer, ...]:
    """The linear layers whose kernels are among `selected`, in the order in which they run.

    Nothing is computed; `example` may hold `jax.ShapeDtypeStruct`s.

    Raises:
      ValueError: there is none, or one runs more than once in an example.
    """
    layers, sources = {}, {}

    def visit(name, x, y):
        if name in layers:
            raise ValueError(
                f"the linear layer {name!r} runs more than once in an example; EKFAC takes each layer's inputs from "
                "one run. Use the diagonal curvature for it."
            )
        # The arrays are kept alive by `sources`, so that their ids stay theirs.
        source, _ = sources.setdefault(id(x), (name, x))
        layers[name] = LinearLayer(name, source, tuple(y.shape), jnp.dtype(y.dtype))
        return y

    def run(selected, rest, example):
        with intercept_dense(flatten_names(selected), visit):
            return loss_fn(selected, rest, example)

    jax.eval_shape(run, selected, rest, example)
    if not layers:
        some = ", ".join(list(flatten_names(selected))[:3])
        raise ValueError(
            f"no flax nn.Dense with a selected kernel runs in the loss (selected: {some}, ...), so there is no factor "
            "to fit. Use the diagonal curvature, or a model of flax modules whose parameters are named as selected."
        )
    return tuple(layers.values())


def factor_sums(
    loss_fn: LossFn,
    layers: Sequence[LinearLayer],
    selected: Any,
    rest: Any,
    batch: Any,
    mask: jax.Array | None = None,
) -> Factors:
    """Sums x x^T and g g^T over the tokens of a batch.

    Args:
      loss_fn: the loss of one example.
      layers: from `linear_layers`.
      selected, rest: the two halves of the parameters.
      batch: pytree of arrays with a leading axis B; an example is one slice of it.
      mask: (B,) 1 for an example, 0 for padding, which adds exactly zero; all are examples if None.
    """
    mask = example_mask(mask, batch)
    sources = {layer.name: layer.input for layer in layers}

    def gradients_and_inputs(example):
        def loss(offsets):
            inputs = {}

            def visit(name, x, y):
                inputs.setdefault(sources[name], x)
                return y + offsets[name]

            with intercept_dense(sources, visit):
                return loss_fn(selected, rest, example), inputs

        offsets = {layer.name: jnp.zeros(layer.shape, layer.dtype) for layer in layers}
        return jax.grad(loss, has_aux=True)(offsets)

    with full_precision_matmuls():
        outputs, inputs = jax.vmap(gradients_and_inputs)(batch)

    # Inputs may be float32 in a float64 model.
    dtype = jnp.result_type(jnp.float32, *(layer.dtype for layer in layers))

    def outer(rows, scale=1.0):
        rows = rows.astype(dtype) * scale
        rows = jnp.where(mask.reshape(-1, *(1,) * (rows.ndim - 1)), rows, 0)
        rows = rows.reshape(-1, rows.shape[-1])
        return jnp.matmul(rows.T, rows, precision="highest")

    return Factors(
        {name: outer(rows) for name, rows in inputs.items()},
        {name: outer(rows, GRADIENT_SCALE) for name, rows in outputs.items()},
    )


def eigenbases(factors: Factors) -> Factors:
    """Orthonormal eigenvectors of every factor, as columns in place of the sums; float64, on the host."""

    def vectors(matrix):
        matrix = np.asarray(matrix, np.float64)
        return np.linalg.eigh((matrix + matrix.T) / 2)[1]

    return jax.tree.map(vectors, factors)


def eigenvalue_sums(
    loss_fn: LossFn,
    layers: Sequence[LinearLayer],
    bases: Factors,
    selected: Any,
    rest: Any,
    batch: Any,
    mask: jax.Array | None = None,
    microbatch: int | None = None,
    factored: bool = False,
) -> FisherSum:
    """Sums the squares of per-example gradients, those of kernels in their eigenbases, over a batch.

    Args:
      bases: from `eigenbases`, in the dtype to compute in.
      loss_fn, layers, selected, rest, batch, mask: as in `factor_sums`.
      microbatch: per-example gradients held at once, see `fisher_diagonal`.
      factored: whether gradients are held as factors where these are smaller, see `factored_gradients`.

    Returns:
      Sums in the layout of `selected`.
    """
    sources = {layer.name: layer.input for layer in layers}
    if factored:

        def gradients(selected, fixed, examples):
            rest, bases = fixed
            found = flatten_names(factored_gradients(loss_fn, selected, rest, examples))
            return unflatten_names({name: rotate(name, each, bases) for name, each in found.items()})

        def rotate(name, gradient, bases):
            if name not in sources:
                return gradient
            left, right = bases.inputs[sources[name]].T, bases.outputs[name]
            if isinstance(gradient, TokenProduct):
                return TokenProduct(left @ gradient.columns, gradient.cotangents @ right)
            return left @ gradient @ right

        return sum_squares(gradients, selected, (rest, bases), batch, mask, microbatch)

    def loss(weights, fixed, example):
        # A kernel K + Q_A W Q_S^T at W = 0: the gradient by W is Q_A^T G Q_S, and takes tokens x in x out products.
        selected, rest, bases = fixed
        moved = flatten_names(weights)
        kept = {name: moved[name] for name in moved if name not in sources}

        def visit(name, x, y):
            rotated = jax.lax.stop_gradient(x) @ bases.inputs[sources[name]]
            return y + rotated @ moved[name] @ bases.outputs[name].T

        with intercept_dense(sources, visit):
            return loss_fn(unflatten_names({**flatten_names(selected), **kept}), rest, example)

    weights = {name: jnp.zeros_like(x) if name in sources else x for name, x in flatten_names(selected).items()}
    return fisher_diagonal(loss, unflatten_names(weights), (selected, rest, bases), batch, mask, microbatch)


def fisher_ekfac(
    loss_fn: LossFn,
    selected: Any,
    rest: Any,
    batch: Any,
    mask: jax.Array | None = None,
    relative_damping: float = RELATIVE_DAMPING,
) -> EKFAC:
    """Fits EKFAC on one batch that fits in memory: factors first, then eigenvalues on the same examples.

    Arguments as in `factor_sums`; `relative_damping` as in `EKFAC`. Not for use under `jit`: the eigenvectors are taken
    on the host. An example should be one (image, caption, noise, timestep) draw, as in `fisher_diagonal`.

    Raises:
      ValueError: `relative_damping` is negative; no linear layer is selected, or one runs twice; `mask` does not
        fit, or leaves no example.
    """
    check_range("relative_damping", relative_damping, 0.0)
    mask = example_mask(mask, batch)
    if not mask.any():
        raise ValueError(f"mask leaves none of {len(mask)} examples; expected one or more to fit on")
    layers = linear_layers(loss_fn, selected, rest, jax.tree.map(lambda leaf: leaf[0], batch))
    factors = jax.jit(factor_sums, static_argnums=(0, 1))(loss_fn, layers, selected, rest, batch, mask)
    bases = jax.tree.map(lambda basis, factor: basis.astype(factor.dtype), eigenbases(factors), factors)
    sums = jax.jit(eigenvalue_sums, static_argnums=(0, 1))(loss_fn, layers, bases, selected, rest, batch, mask)
    return make_ekfac(sums.mean(), bases, layers, relative_damping)


def make_ekfac(
    eigenvalues: Diagonal, bases: Factors, layers: Sequence[LinearLayer], relative_damping: float = RELATIVE_DAMPING
) -> EKFAC:
    """The curvature from its parts."""
    inputs = tuple((layer.name, layer.input) for layer in layers)
    return EKFAC(eigenvalues, dict(bases.inputs), dict(bases.outputs), inputs, relative_damping)
