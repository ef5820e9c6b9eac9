"""Keys and values of the text, projected before the UNet runs, and gradients by the kernels from their cotangents.

The key and value projections are linear maps of the text alone. So the derivative of a sum of losses by a kernel is the
product of the text and the cotangent of its projection, which has L numbers a channel where the kernel has D: the
cotangents are summed over all losses of one text and multiplied once, or those of many texts are multiplied in one
batched product outside the model.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attrib_jax.core.weights import Params, flatten_names, unflatten_names


class ProjectedText(NamedTuple):
    """Text states with projections of them, which a UNet accepts in place of an array of states.

    Attributes:
      rows: (B, L, D) text states.
      projections: nested dict in the layout of the parameters, `rows @ kernel` (B, L, F) in place of a kernel; the
        layers of these kernels are not applied.
    """

    rows: jax.Array
    projections: Params

    def within(self, name: str) -> "ProjectedText":
        """The same text with the projections of the child module `name`."""
        return ProjectedText(self.rows, self.projections.get(name, {}))


class ProjectedWeights(NamedTuple):
    """Selected weights in which the kernels that project the text are replaced by the text's projections.

    Attributes:
      others: nested dict of the selected weights that do not project the text.
      projections: nested dict in the layout of the parameters, `text @ kernel` (..., L, F) in place of each kernel.
    """

    others: Params
    projections: Params

    def text(self, conditioning: Any) -> Any:
        """The model's conditioning: that of the text with its projections, where there are any."""
        if not self.projections:
            return conditioning
        if isinstance(conditioning, Mapping):
            return {**conditioning, "text": ProjectedText(conditioning["text"], self.projections)}
        return ProjectedText(conditioning, self.projections)


def text_rows(conditioning: Any) -> Any:
    """The text states (..., L, D) in a model's conditioning: the whole of it, or its leaf "text"."""
    text = conditioning["text"] if isinstance(conditioning, Mapping) else conditioning
    return text.rows if isinstance(text, ProjectedText) else text


def text_columns(conditioning: Any) -> jax.Array:
    """The text states transposed, (..., D, L), for `kernel_gradient`."""
    return jnp.swapaxes(text_rows(conditioning), -1, -2)


def kernel_gradient(gradient: ProjectedWeights, selected: Params, columns: jax.Array) -> Params:
    """The gradient by the selected weights, in their layout, from that by the weights of `Predictor.project_text`.

    Args:
      gradient: gradient for one text, or for B texts with a leading axis B in each leaf; so is the result.
      selected: selected weights, for their layout and dtypes.
      columns: (..., D, L) transposed text states, from `text_columns`. Compute them outside of a loop that uses them:
        on a CPU the products are up to twice as fast as those of the text itself, and XLA folds a transposition in the
        loop's body back into the products.
    """
    found = flatten_names(gradient.others)
    found |= {name: columns @ cotangent for name, cotangent in flatten_names(gradient.projections).items()}
    return unflatten_names({name: found[name].astype(leaf.dtype) for name, leaf in flatten_names(selected).items()})
