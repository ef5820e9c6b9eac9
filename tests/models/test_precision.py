"""What each precision rounds, read off the traced program, and what that does to gradients and derivatives."""

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from attrib_jax.core.weights import flatten_names, merge_weights, select_weights
from attrib_jax.diffusion.losses import denoising_losses
from attrib_jax.diffusion.schedule import NoiseSchedule
from attrib_jax.models.predictor import PRECISIONS, cast_params, matmul_precision, predictor
from attrib_jax.models.unet import UNet2DConditionModel, UNetConfig
from tests.models.random_params import random_params

TEXT_WIDTH = 23  # No other matrix has this width: products with the text are known by it.
TEXT_LENGTH = 5
SIZE = 8
TIMESTEPS = np.array([0, 400, 800], np.int32)
PRODUCTS = ("dot_general", "conv2d", "upsample_conv2d")
UNET = UNet2DConditionModel(
    UNetConfig(
        block_out_channels=(16,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=8,
    )
)
ATTENTIONS = 4  # To the text: one in the down and the mid block, two in the up block.
SCHEDULE = NoiseSchedule.from_config({})


@pytest.fixture(scope="module")
def params():
    return random_params(UNET, SIZE, (TEXT_LENGTH, TEXT_WIDTH))


@pytest.fixture(scope="module")
def example():
    rng = np.random.default_rng(1)
    latents, noise = rng.normal(size=(SIZE, SIZE, 4)), rng.normal(size=(len(TIMESTEPS), SIZE, SIZE, 4))
    text = rng.normal(size=(TEXT_LENGTH, TEXT_WIDTH))
    return tuple(array.astype(np.float32) for array in (latents, text, noise))


def loss(precision, selected, rest, example):
    latents, text, noise = example
    params = merge_weights(selected, rest)
    losses = denoising_losses(predictor(UNET, precision), params, SCHEDULE, latents, text, noise, TIMESTEPS)
    return jnp.mean(losses)


def halves(params, precision):
    return select_weights(cast_params(params, precision), "cross-attn-kv")


def equations(jaxpr):
    """Every equation, those of nested jaxprs included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


def traced_dtypes(precision, params, example):
    """Operand dtypes of products with the text, of all others, and of exponentials and inverse roots; the result's."""
    traced = jax.make_jaxpr(loss, static_argnums=0)(precision, *halves(params, precision), example)
    text, others, wide = [], [], []
    for equation in equations(traced.jaxpr):
        operands = [variable.aval for variable in equation.invars]
        if equation.primitive.name in PRODUCTS:
            with_text = any(TEXT_WIDTH in operand.shape for operand in operands)
            (text if with_text else others).append({str(operand.dtype) for operand in operands})
        elif equation.primitive.name in ("exp", "rsqrt"):
            wide.append({str(operand.dtype) for operand in operands})
    return text, others, wide, str(traced.out_avals[0].dtype)


@pytest.mark.parametrize(
    ("precision", "of_text", "of_others"),
    [(name, "float32", "bfloat16" if name == "bfloat16" else "float32") for name in PRECISIONS]
    + [("float32", "float64", "float64")],
)
def test_products_have_the_dtypes_of_the_precision(params, example, precision, of_text, of_others):
    with jax.enable_x64(of_text == "float64"):
        inputs = jax.tree.map(lambda leaf: np.asarray(leaf, of_text), (params, example))
        text, others, wide, result = traced_dtypes(precision, *inputs)
    assert text == [{of_text}] * 2 * ATTENTIONS
    assert len(others) > 30 and all(dtypes == {of_others} for dtypes in others)
    # Softmax and norms: statistics of bfloat16 numbers are float32.
    assert len(wide) > 2 * ATTENTIONS
    assert {*map(frozenset, wide)} <= {frozenset({of_text}), frozenset({"float32"})} and {of_text} in wide
    assert result == of_text


def test_float32_is_the_plain_forward(params, example):
    latents, text, _ = example

    def plain(params, latents, timestep, text):
        return UNET.apply({"params": params}, latents[None], timestep, text[None])[0]

    arguments = (params, latents, np.int32(3), text)
    expected = str(jax.make_jaxpr(plain)(*arguments))
    for precision in ("float32", "tensorfloat32", "bfloat16-products"):
        assert str(jax.make_jaxpr(predictor(UNET, precision))(*arguments)) == expected
        assert cast_params(params, precision) is params
    assert str(jax.make_jaxpr(predictor(UNET))(*arguments)) == expected
    assert str(jax.make_jaxpr(predictor(UNET, "bfloat16"))(*arguments)) != expected


@pytest.mark.parametrize("precision", PRECISIONS)
def test_products_of_float32_numbers_are_asked_for_by_name(params, example, precision):
    with jax.default_matmul_precision(matmul_precision(precision)):
        traced = jax.make_jaxpr(predictor(UNET, precision))(params, example[0], np.int32(3), example[1])
    asked = set()
    for equation in equations(traced.jaxpr):
        if equation.primitive.name == "dot_general":
            asked |= {str(factor) for factor in equation.params["precision"]}
        elif equation.primitive.name in PRODUCTS:
            asked.add(str(jax.lax.Precision(equation.params["geometry"].precision)))
    precisions = {"tensorfloat32": jax.lax.Precision.HIGH, "bfloat16-products": jax.lax.Precision.DEFAULT}
    assert asked == {str(precisions.get(precision, jax.lax.Precision.HIGHEST))}


def test_a_small_step_of_keys_and_values_survives(params):
    selected, rest = select_weights(params, "cross-attn-kv")
    moved = jax.tree.map(lambda leaf: leaf * np.float32(1 + 1e-4), selected)  # A bfloat16 step is 2^-8 or so.
    before, after = (halves(merge_weights(tree, rest), "bfloat16")[0] for tree in (selected, moved))
    changed = [np.mean(new != old) for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(before))]
    assert len(changed) == 2 * ATTENTIONS
    assert min(changed) > 0.99
    # The others are rounded.
    assert {leaf.dtype for leaf in jax.tree.leaves(halves(params, "bfloat16")[1])} == {jnp.dtype(jnp.bfloat16)}


def test_gradients_of_keys_and_values_are_float32_and_close(params, example):
    gradients = {}
    for precision in ("float32", "bfloat16"):
        run = jax.jit(jax.grad(loss, argnums=1), static_argnums=0)
        gradients[precision] = flatten_names(run(precision, *halves(params, precision), example))
    assert len(gradients["bfloat16"]) == 2 * ATTENTIONS
    for name, gradient in gradients["bfloat16"].items():
        expected = gradients["float32"][name]
        assert gradient.dtype == jnp.float32
        error = np.linalg.norm(gradient - expected) / np.linalg.norm(expected)
        # Of some hundred roundings by 2^-9 each. A gradient that agrees better was not taken in bfloat16.
        assert 1e-4 < error < 0.05, (name, error)


def test_the_derivative_along_a_tiny_step_loses_nothing_more(params, example):
    """A step of 2^-20 the size gives 2^-20 of the derivative, to the bit: the difference of two losses would be 0."""
    direction = jax.tree.map(lambda leaf: np.flip(leaf), halves(params, "float32")[0])

    def derivative(halves, direction, example):
        selected, rest = halves
        return jax.jvp(lambda selected: loss("bfloat16", selected, rest, example), (selected,), (direction,))[1]

    run = jax.jit(derivative)
    whole = run(halves(params, "bfloat16"), direction, example)
    tiny = run(halves(params, "bfloat16"), jax.tree.map(lambda leaf: leaf * np.float32(2**-20), direction), example)
    assert whole.dtype == jnp.float32 and whole != 0
    assert tiny == whole * 2**-20


@pytest.mark.parametrize("call", [lambda x: cast_params({}, x), matmul_precision, lambda x: predictor(UNET, x)])
def test_an_unknown_precision_is_named(call):
    with pytest.raises(ValueError, match="precision .*'bfloat'.*'bfloat16'"):
        call("bfloat")
