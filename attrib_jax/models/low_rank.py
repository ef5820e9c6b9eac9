"""Low-rank factors (LoRA) kept apart from the weights that they change, so that they can be moved or trained alone."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax

from attrib_jax.models.layers import Conv, UpsampleConv
from attrib_jax.ops import conv2d, upsample_conv2d

# Names of the factors beside a layer's kernel; with `kernel` below them they are PEFT's names in PyTorch.
DOWN, UP = "lora_A", "lora_B"


@dataclasses.dataclass(frozen=True)
class LowRank:
    """A Flax module whose layers add what their low-rank factors make of their input.

    A linear layer with `lora_A/kernel` A (in, r) and `lora_B/kernel` B (r, out) beside its kernel K computes
    x K + (x A) B, bias aside: the same as with the kernel K + A B, but the gradients by A and B take r (in + out)
    numbers an example and never in x out. Each factor is a `nn.Dense` of its own, so EKFAC sees the inputs and output
    gradients of both. A of a convolution, (kh, kw, in, r), has its stride and padding, and B (1, 1, r, out) follows
    pixel by pixel. Layers without factors stay as they are.

    Attributes:
      module: Flax module with `nn.Dense`, `Conv` and `UpsampleConv` layers.
    """

    module: Any

    @property
    def config(self) -> Any:
        """The module's own config."""
        return self.module.config

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """What `module.apply` returns, with the factors that `variables["params"]` holds."""
        with nn.intercept_methods(_add_product):
            return self.module.apply(variables, *args, **kwargs)


def _add_product(call, args, kwargs, context):
    result = call(*args, **kwargs)
    module = context.module
    if context.method_name != "__call__" or not isinstance(module, (nn.Dense, Conv, UpsampleConv)):
        return result
    factors = module.variables["params"]
    if DOWN not in factors:
        return result
    product = _product(module, factors, *args, **kwargs)
    # Factors stay float32 where the layer computes in bfloat16.
    return result + product.astype(result.dtype)


def _product(module, factors, x: jax.Array, size: tuple[int, int] | None = None) -> jax.Array:
    down, up = factors[DOWN]["kernel"], factors[UP]["kernel"]
    if isinstance(module, nn.Dense):
        for name, kernel in ((DOWN, down), (UP, up)):
            scope: Any = module.scope.push(name, reuse=True)
            x = nn.Dense(kernel.shape[-1], use_bias=False, parent=scope)(x)
        return x
    hidden = (
        upsample_conv2d(x, down, size)
        if isinstance(module, UpsampleConv)
        else conv2d(x, down, module.stride, module.padding)
    )
    return conv2d(hidden, up, 1, ((0, 0), (0, 0)))
