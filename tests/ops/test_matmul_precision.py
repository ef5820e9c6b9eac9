"""Float32 products stay float32 on devices that would round them, unless the caller says otherwise."""

import re

import jax
import jax.numpy as jnp
import pytest

from attrib_jax.attribution import influence_matrix, influence_scores, query_gradient, strided_losses
from attrib_jax.attribution.scores import tile_losses
from attrib_jax.core.keys import loss_key, purpose_key
from attrib_jax.core.types import Batch
from attrib_jax.core.weights import merge_weights, select_weights
from attrib_jax.curvature.fisher import fisher_diagonal
from tests.attribution import tiny_denoiser
from tests.attribution.tiny_denoiser import SCHEDULE, predict


def product_precisions(function):
    """Those of every product in the program, as the words that they print as."""
    program = jax.jit(function).lower().as_text()
    products = [line for line in program.splitlines() if "stablehlo.dot_general" in line]
    return {re.search(r"precision = \[(\w+), \1\]", line)[1] for line in products}


def programs():
    params = tiny_denoiser.init_params()
    selected, rest = select_weights(params, "cross-attn-kv")
    row_id, latents, text = tiny_denoiser.make_data(4)
    zeros = jnp.zeros(4, jnp.int32)
    batch = Batch(latents[:, 0], text[:, 0], jnp.asarray(row_id, jnp.int32), zeros, zeros, jnp.ones(4))
    timesteps = jnp.arange(0, 100, 50)
    key, query_key = loss_key(0), purpose_key(0, "query")

    def loss(selected, rest, example):
        prediction = predict(merge_weights(selected, rest), example.latents, timesteps[0], example.text)
        return jnp.mean(prediction**2)

    directions = jax.tree.map(lambda leaf: leaf[None], selected)
    return {
        "strided_losses": lambda: strided_losses(predict, SCHEDULE, params, key, batch, timesteps),
        "tile_losses": lambda: tile_losses(predict, SCHEDULE, params, key, batch, timesteps),
        "query_gradient": lambda: query_gradient(
            predict, SCHEDULE, selected, rest, latents[0, 0], text[0, 0], query_key, 4, tile=4
        ),
        "fisher_diagonal": lambda: fisher_diagonal(loss, selected, rest, batch).sum,
        "influence_scores": lambda: influence_scores(loss, selected, rest, batch, selected),
        "influence_matrix": lambda: influence_matrix(loss, selected, rest, batch, directions),
    }


@pytest.mark.parametrize("name", list(programs()))
def test_products_are_float32_unless_the_caller_asks_for_less(name):
    run = programs()[name]
    assert product_precisions(run) == {"HIGHEST"}
    with jax.default_matmul_precision("tensorfloat32"):
        assert product_precisions(run) == {"HIGH"}
