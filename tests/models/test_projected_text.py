"""Keys and values projected ahead of the UNet, and derivatives by them, are those of the layers in it."""

import jax
import numpy as np
import pytest

from attrib_jax.attribution import query_gradient
from attrib_jax.core.weights import merge_weights, select_weights
from attrib_jax.diffusion.schedule import NoiseSchedule
from attrib_jax.models.predictor import as_predictor, predictor
from attrib_jax.models.projected_text import ProjectedText, kernel_gradient
from attrib_jax.models.unet import UNet2DConditionModel, UNetConfig
from tests.models.random_params import random_params

jnp = jax.numpy

_WIDTH, _LENGTH, _SIZE = 6, 5, 8
_UNET = UNet2DConditionModel(
    UNetConfig(
        block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=_WIDTH,
    )
)
# In the down and the mid block, and two in the up block.
_ATTENTIONS = 4
_TIMESTEPS = np.array([0, 400, 800], np.int32)


@pytest.fixture
def case():
    """(predict, params, latents (3, ...), texts (3, L, D)) in float64."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        latents, texts = rng.normal(size=(3, _SIZE, _SIZE, 4)), rng.normal(size=(3, _LENGTH, _WIDTH))
        yield predictor(_UNET), random_params(_UNET, _SIZE, (_LENGTH, _WIDTH), np.float64), latents, texts


def _assert_close(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-12 * np.abs(other).max())


def _each(case, text=None):
    """The predictions for each of the images, with its text or with number `text`."""
    predict, params, latents, texts = case
    predict = jax.jit(predict)
    return jnp.stack([predict(params, latents[i], _TIMESTEPS[i], texts[i if text is None else text]) for i in range(3)])


@pytest.mark.parametrize("wrap", [lambda predict: predict, lambda predict: as_predictor(lambda *args: predict(*args))])
def test_a_batch_is_its_examples(case, wrap):
    """Also where the predictor is a function."""
    predict, params, latents, texts = case
    batched = jax.jit(wrap(predict).batched)
    _assert_close(batched(params, latents, _TIMESTEPS, texts), _each(case))
    _assert_close(batched(params, latents, _TIMESTEPS, texts[1:2]), _each(case, text=1))


def test_equal_predictors_are_the_same_static_argument(case):
    again = predictor(UNet2DConditionModel(_UNET.config))
    assert again == case[0] and hash(again) == hash(case[0]) and again is as_predictor(again)
    assert predictor(_UNET, "bfloat16") != again
    function = lambda params, noisy, timestep, text: noisy  # noqa: E731
    assert as_predictor(function) == as_predictor(function) and hash(as_predictor(function)) is not None


@pytest.mark.parametrize("subset", ["cross-attn-kv", "cross-attn"])
def test_layers_of_projections_are_not_applied(case, subset):
    predict, params, latents, texts = case
    selected, rest = select_weights(params, subset)
    weights = predict.project_text(selected, texts)
    assert [leaf.shape for leaf in jax.tree.leaves(weights.projections)] == 2 * _ATTENTIONS * [(3, _LENGTH, 8)]
    text = weights.text(texts)
    assert isinstance(text, ProjectedText)
    # The kernels are not even there.
    found = jax.jit(predict.batched)(merge_weights(weights.others, rest), latents, _TIMESTEPS, text)
    _assert_close(found, _each(case))


def test_the_gradient_of_one_text(case):
    predict, params, latents, texts = case
    selected, rest = select_weights(params, "cross-attn")

    def loss(weights, text):
        return jnp.sum(jnp.sin(predict.batched(merge_weights(weights, rest), latents, _TIMESTEPS, text)))

    weights = predict.project_text(selected, texts[0])

    def of_projections(weights):
        return loss(weights.others, jax.tree.map(lambda leaf: leaf[None], weights.text(texts[0])))

    found = kernel_gradient(jax.jit(jax.grad(of_projections))(weights), selected, texts[0].T)
    _assert_close(found, jax.jit(jax.grad(loss))(selected, texts[:1]))


def test_the_gradients_of_several_texts(case):
    predict, params, latents, texts = case
    selected, rest = select_weights(params, "cross-attn-kv")

    def loss(weights):
        return jnp.sum(jnp.sin(predict.batched(rest, latents, _TIMESTEPS, weights.text(texts))))

    gradient = jax.jit(jax.grad(loss))(predict.project_text(selected, texts))
    found = kernel_gradient(gradient, selected, np.swapaxes(texts, 1, 2))

    def of_example(selected, *example):
        return jnp.sum(jnp.sin(predict(merge_weights(selected, rest), *example)))

    expected = jax.jit(jax.vmap(jax.grad(of_example), (None, 0, 0, 0)))(selected, latents, _TIMESTEPS, texts)
    _assert_close(found, expected)


def test_weights_that_project_no_text_stay_and_gradients_have_the_weights_dtype(case):
    predict, params, _, (text, *_) = case
    selected, _ = select_weights(params, "cross-attn-kv")
    for weights in (
        as_predictor(lambda params, latents, timestep, text: latents).project_text(selected, text),
        predict.project_text({"conv_in": params["conv_in"]}, text),
    ):
        assert not weights.projections and weights.text(text) is text
    np.testing.assert_array_equal(weights.others["conv_in"]["kernel"], params["conv_in"]["kernel"])
    selected = jax.tree.map(lambda leaf: leaf.astype(np.float32), selected)
    weights = predict.project_text(selected, text)
    assert {leaf.dtype for leaf in jax.tree.leaves(weights.projections)} == {np.dtype(np.float64)}
    found = kernel_gradient(weights, selected, text.T)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype(np.float32)}


def test_a_query_gradient_of_single_draws(case):
    """Large latents leave one draw in a group."""
    predict, params, latents, texts = case
    selected, rest = select_weights(params, "cross-attn-kv")
    schedule = NoiseSchedule.from_config({})
    arguments = predict, schedule, selected, rest, latents[0], texts[0], jax.random.key(3), 3
    run = jax.jit(query_gradient, static_argnums=(0, 7), static_argnames="tile")
    _assert_close(run(*arguments, tile=1), run(*arguments, tile=3))
