"""Keys and values that a UNet makes of the text, projected before it runs, and derivatives by the kernels from theirs.

The key and value projections are linear maps of the text alone. So the derivative of a sum of losses by a kernel is a
product of the text and of the cotangents of its projection, which have L numbers a channel where the kernel has D: they
are added up over all losses of one text and multiplied once, and many texts' are multiplied apart from the model.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from attrib_jax.core.weights import Params, flatten_names, unflatten_names

_KERNELS = ("attn2/to_k/kernel", "attn2/to_v/kernel")


class ProjectedText(NamedTuple):
    """Text states with projections of them, which a UNet takes in place of an array of states.

    Attributes:
      rows: (B, L, D), the states.
      projections: `rows @ kernel` (B, L, F) by the '/'-joined name of the kernel, whose layer is then not applied.
    """

    rows: jax.Array
    projections: dict[str, jax.Array]


class ProjectedWeights(NamedTuple):
    """Selected weights, in place of each kernel that projects the text the text's projection (`project_text`).

    Attributes:
      others: nested dict, the selected weights that project no text.
      projections: `text @ kernel` (..., L, F) by the '/'-joined name of the kernel.
    """

    others: Params
    projections: dict[str, jax.Array]

    def text(self, text: jax.Array) -> jax.Array | ProjectedText:
        """What the model takes for the text: with its projections, where there are any."""
        return ProjectedText(text, self.projections) if self.projections else text


def text_rows(text: jax.Array | ProjectedText) -> jax.Array:
    """The states themselves."""
    return text.rows if isinstance(text, ProjectedText) else text


def project_text(predict: Callable[..., Any], selected: Params, text: jax.Array) -> ProjectedWeights:
    """Projects text states (..., L, D) by the selected kernels that do so in the UNet of `predict`.

    By none where `predict` takes no projections, see `attrib_jax.models.unet.predictor`.
    """
    flat = flatten_names(selected)
    names = [name for name in flat if name.endswith(_KERNELS)] if hasattr(predict, "of_batch") else []
    projections = {name: text @ flat.pop(name) for name in names}
    return ProjectedWeights(unflatten_names(flat), projections)


def kernel_gradient(gradient: ProjectedWeights, selected: Params, columns: jax.Array) -> Params:
    """The derivative by the weights that `project_text` gave, as that by the selected weights, in their layout.

    Args:
      gradient: by the weights of one text, or of B texts, each leaf with a leading axis B; so is the result.
      selected: for its layout and dtypes.
      columns: (..., D, L), the text's transpose. Made outside of a loop that uses it: on a CPU the products are up to
        twice as fast as of the text itself, and what a loop's body transposes XLA folds back into the products.
    """
    found = flatten_names(gradient.others)
    found |= {name: columns @ cotangent for name, cotangent in gradient.projections.items()}
    return unflatten_names({name: found[name].astype(leaf.dtype) for name, leaf in flatten_names(selected).items()})
