"""Keys and values of the text are a plain product, in every mode of differentiation, though written by columns."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from attrib_jax.models.text_states import TextStates
from attrib_jax.models.unet import Attention

jnp = jax.numpy

_RNG = np.random.default_rng(0)
_ROWS = _RNG.normal(size=(4, 2, 5, 6))
_KERNEL = _RNG.normal(size=(6, 3))
_KERNELS = _RNG.normal(size=(4, 6, 3))


def _by_columns(rows, kernel):
    text = TextStates.of(rows)
    return text.dot_general(text.rows, kernel)


def _loss(project):
    return lambda rows, kernel: jnp.sum(jnp.sin(project(rows, kernel)))


# Functions of the projection, rows (4, 2, 5, 6) and a kernel (6, 3).
_MODES = {
    "forward": lambda project: project(_ROWS[0], _KERNEL),
    "of examples": lambda project: jax.vmap(project, (0, None))(_ROWS, _KERNEL),
    "of models": lambda project: jax.vmap(project)(_ROWS, _KERNELS),
    "gradients": lambda project: jax.grad(_loss(project), (0, 1))(_ROWS[0], _KERNEL),
    "gradients of examples": lambda project: jax.vmap(jax.grad(_loss(project), 1), (0, None))(_ROWS, _KERNEL),
    "gradients of models": lambda project: jax.vmap(jax.grad(_loss(project), (0, 1)))(_ROWS, _KERNELS),
    "forward mode": lambda project: jax.jvp(project, (_ROWS[0], _KERNEL), (jnp.cos(_ROWS[0]), jnp.cos(_KERNEL))),
    "forward mode by the kernel": lambda project: jax.jvp(
        lambda kernel: project(_ROWS[0], kernel), (_KERNEL,), (jnp.cos(_KERNEL),)
    ),
    "forward over reverse": lambda project: jax.jvp(
        jax.grad(_loss(project), (0, 1)), (_ROWS[0], _KERNEL), (jnp.cos(_ROWS[0]), jnp.cos(_KERNEL))
    ),
    "recomputed": lambda project: jax.grad(jax.checkpoint(_loss(project)), 1)(_ROWS[0], _KERNEL),
}


@pytest.mark.parametrize("mode", list(_MODES))
def test_equals_the_product(mode):
    with jax.enable_x64(True):
        found, expected = (_MODES[mode](project) for project in (_by_columns, jnp.matmul))
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-13 * np.abs(other).max())


def test_attention_to_text_projects_by_dense_layers():
    """EKFAC finds layers by their class, and shares a factor among those that read one array."""
    seen = []

    def visit(call, args, kwargs, context):
        if isinstance(context.module, nn.Dense):
            seen.append((context.module.name, args[0]))
        return call(*args, **kwargs)

    with nn.intercept_methods(visit):
        Attention(2).init(jax.random.key(0), jnp.ones((1, 3, 4)), TextStates.of(jnp.ones((1, 5, 6))))
    inputs = dict(seen)
    assert set(inputs) == {"to_q", "to_k", "to_v", "to_out_0"}
    assert inputs["to_k"] is inputs["to_v"] and inputs["to_k"].shape == (1, 5, 6)


@pytest.mark.parametrize("text_dtype", [jnp.float32, jnp.bfloat16])
def test_projects_in_the_texts_dtype_and_returns_the_pictures(text_dtype):
    """bfloat16 runs may keep text and projections in float32."""
    module, x = Attention(2), jnp.ones((1, 3, 4), jnp.bfloat16)
    text = TextStates.of(jnp.asarray(_RNG.normal(size=(1, 5, 6)), text_dtype))
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), module.init(jax.random.key(0), x, text))
    params["params"]["to_k"]["kernel"] = params["params"]["to_k"]["kernel"].astype(text_dtype)
    gradient = jax.grad(lambda params: jnp.sum(module.apply(params, x, text).astype(jnp.float32)))(params)
    assert module.apply(params, x, text).dtype == jnp.bfloat16
    assert gradient["params"]["to_k"]["kernel"].dtype == text_dtype
