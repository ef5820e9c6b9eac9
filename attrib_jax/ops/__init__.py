"""What platforms compute differently, behind one door: `ops.conv2d`, `ops.attention`, norms, micro-batching.

One function each, which models call without a thought of the platform; the fast forms for a CPU are lowering rules in
here, so that a program lowered for another platform holds none of them, wherever it is lowered.
"""

from attrib_jax.ops.attention import attention
from attrib_jax.ops.conv import TransformedKernel, conv2d, prepare_kernels, upsample_conv2d
from attrib_jax.ops.matmul_precision import full_precision_matmuls
from attrib_jax.ops.norms import group_norm, layer_norm, rms_norm

__all__ = [
    "TransformedKernel",
    "attention",
    "conv2d",
    "full_precision_matmuls",
    "group_norm",
    "layer_norm",
    "prepare_kernels",
    "rms_norm",
    "upsample_conv2d",
]
