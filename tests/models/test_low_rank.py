"""LoRA factors that are kept apart: the merged model's outputs, the chain rule's gradients, curvature and scores."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attrib_jax.convert.adapters.lora import attach_lora, merge_lora
from attrib_jax.convert.load import load_pipeline
from attrib_jax.core.weights import count_weights, flatten_names, merge_weights, select_weights, unflatten_names
from attrib_jax.curvature.ekfac import fisher_ekfac
from attrib_jax.curvature.fisher import fisher_diagonal
from attrib_jax.models.layers import Conv, UpsampleConv
from attrib_jax.models.low_rank import LowRank
from attrib_jax.models.predictor import cast_params, predictor
from tests.convert.files import save
from tests.tiny_pipeline import MAX_LENGTH, TEXT_WIDTH, make_torch_pipeline

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
# Linear layers, and convolutions of 1x1 and 3x3.
SHAPES = {
    f"{BLOCK}.attn2.to_k": (32, 32),
    f"{BLOCK}.attn2.to_v": (32, 32),
    f"{BLOCK}.attn1.to_out.0": (32, 32),
    "down_blocks.0.attentions.0.proj_in": (32, 32, 1, 1),
    "down_blocks.0.resnets.0.conv2": (32, 32, 3, 3),
}
LINEAR = [name for name, shape in SHAPES.items() if len(shape) == 2]
ALPHA, SCALE = 5.0, 0.7


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("models"))
    make_torch_pipeline(path, unet_channels=(32,))
    return load_pipeline(path)


def lora_file(path, names, rank=2, seed=0, up=0.3):
    rng, content = np.random.default_rng(seed), {}
    for name in names:
        rows, columns, *kernel = SHAPES.get(name, (32, 32))
        prefix = name if name.startswith("text_encoder") else f"unet.{name}"
        content[f"{prefix}.lora_A.weight"] = rng.normal(size=(rank, columns, *kernel)).astype(np.float32)
        content[f"{prefix}.lora_B.weight"] = up * rng.normal(size=(rows, rank, *[1] * len(kernel))).astype(np.float32)
        content[f"{prefix}.alpha"] = ALPHA
    return save(content, path)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    text = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    return lora_file(tmp_path_factory.mktemp("lora") / "lora.safetensors", [*SHAPES, text])


@pytest.fixture(scope="module")
def apart(pipeline, file):
    return attach_lora(pipeline, file, SCALE)


LATENTS = np.random.default_rng(1).normal(size=(3, 8, 8, 4)).astype(np.float32)
TEXT = np.random.default_rng(2).normal(size=(3, MAX_LENGTH, TEXT_WIDTH)).astype(np.float32)
TIMESTEPS = np.array([30, 500, 900], np.int32)


def prediction(pipeline):
    predict = predictor(pipeline.unet)
    return jax.jit(predict.batched)(pipeline.params["unet"], LATENTS, TIMESTEPS, TEXT)


def test_factors_kept_apart_compute_what_the_merged_model_does(pipeline, apart, file, tmp_path):
    other = lora_file(tmp_path / "other.safetensors", LINEAR[:2], rank=3, seed=3)
    for kept, merged in (
        (apart, merge_lora(pipeline, file, SCALE)),
        (attach_lora(pipeline, [file, other], [SCALE, -1]), merge_lora(pipeline, [file, other], [SCALE, -1])),
    ):
        np.testing.assert_allclose(prediction(kept), prediction(merged), rtol=1e-4, atol=2e-5)
        # That of the text encoder is merged.
        jax.tree.map(np.testing.assert_array_equal, kept.params["text_encoder"], merged.params["text_encoder"])
    assert np.abs(prediction(apart) - prediction(pipeline)).max() > 1e-2


def test_the_subset_is_the_factors_alone(apart):
    selected, rest = select_weights(apart.params["unet"], "lora")
    values = sum(2 * (s[0] + s[1] * int(np.prod(s[2:]))) for s in SHAPES.values())
    assert count_weights(selected) == (2 * len(SHAPES), values)
    assert not any("lora" in name for name in flatten_names(rest))
    bfloat16 = flatten_names(cast_params(apart.params["unet"], "bfloat16"))
    assert {str(x.dtype) for name, x in bfloat16.items() if "lora" in name} == {"float32"}


class Tiny(nn.Module):
    """Each kind of layer that may have factors."""

    @nn.compact
    def __call__(self, image, text):
        keys, values = (nn.Dense(4, use_bias=False, name=name)(text) for name in ("to_k", "to_v"))
        image = Conv(4, stride=2, padding=((1, 1), (1, 1)), name="down")(image)
        image = UpsampleConv(4, name="up")(nn.silu(image), (5, 5))
        return nn.Dense(2, name="out")(jnp.tanh(image + jnp.mean(keys * values, axis=-2)[:, None, None]))


FACTORS = {
    "to_k": ((3, 2), (2, 4)),
    "to_v": ((3, 2), (2, 4)),
    "down": ((3, 3, 3, 2), (1, 1, 2, 4)),
    "up": ((3, 3, 4, 2), (1, 1, 2, 4)),
    "out": ((4, 1), (1, 2)),
}
RNG = np.random.default_rng(0)
BATCH = tuple(RNG.normal(size=size).astype(np.float32) for size in ((6, 5, 5, 3), (6, 7, 3), (6, 5, 5, 2)))


@pytest.fixture(scope="module")
def tiny():
    params = Tiny().init(jax.random.key(0), BATCH[0], BATCH[1])["params"]
    drawn = {
        f"{layer}/lora_{side}/kernel": RNG.normal(size=size)
        for layer, sizes in FACTORS.items()
        for side, size in zip("AB", sizes)
    }
    return select_weights(unflatten_names(flatten_names(params) | jax.tree.map(jnp.float32, drawn)), "lora")


def loss(module, selected, rest, example):
    image, text, target = example
    output = module.apply({"params": merge_weights(selected, rest)}, image[None], text[None])
    return jnp.mean(jnp.square(output[0] - target))


def merged_kernels(selected, rest):
    """The parameters of the plain module: K + A B, or the kernel of the two convolutions in a row."""
    flat, factors = dict(flatten_names(rest)), flatten_names(selected)
    for layer in FACTORS:
        down, up = (factors[f"{layer}/lora_{side}/kernel"] for side in "AB")
        flat[f"{layer}/kernel"] = flat[f"{layer}/kernel"] + down @ up.reshape(up.shape[-2:])
    return unflatten_names(flat)


def test_factors_of_zeros_leave_the_base_to_the_bit(tiny):
    selected, rest = tiny
    zeros = {name: 0 * x if "lora_B" in name else x for name, x in flatten_names(selected).items()}
    example = jax.tree.map(lambda x: x[0], BATCH)
    apart = functools.partial(loss, LowRank(Tiny()))
    assert apart(unflatten_names(zeros), rest, example) == loss(Tiny(), {}, rest, example)
    assert apart(selected, rest, example) != loss(Tiny(), {}, rest, example)


def test_gradients_by_the_factors_are_those_of_the_chain_rule(tiny):
    example = jax.tree.map(lambda x: x[0], BATCH)

    def dense(selected, rest, example):
        return loss(Tiny(), merged_kernels(selected, rest), {}, example)

    own = jax.value_and_grad(functools.partial(loss, LowRank(Tiny())))(*tiny, example)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
        own,
        jax.value_and_grad(dense)(*tiny, example),
    )
    assert len(jax.tree.leaves(own[1])) == 10


def test_ekfac_sees_both_factors_as_layers(tiny):
    loss_fn = functools.partial(loss, LowRank(Tiny()))
    curvature = fisher_ekfac(loss_fn, *tiny, BATCH)
    sources = dict(curvature.inputs)
    assert sources.keys() == {f"{layer}/lora_{side}/kernel" for layer in ("to_k", "to_v", "out") for side in "AB"}
    # Keys and values read the same text, and so do their first factors.
    assert sources["to_v/lora_A/kernel"] == "to_k/lora_A/kernel"
    # The eigenvalues sum to what the diagonal does: a rotation keeps the squared length of each gradient.
    diagonal = flatten_names(fisher_diagonal(loss_fn, *tiny, BATCH).mean().tree)
    for name, values in flatten_names(curvature.eigenvalues.tree).items():
        np.testing.assert_allclose(np.sum(values), np.sum(diagonal[name]), rtol=1e-3)


@pytest.mark.parametrize(
    ("scale", "change", "message"),
    [
        (0.0, {}, "scale is 0"),
        (1.0, {"lora_A": "hada_w1_a"}, "without their other half"),
        (1.0, {"dora_scale": (32, 1)}, "as dora_scale, down, up"),
        (1.0, {"unet": "text_encoder"}, "none for the denoiser"),
    ],
)
def test_what_cannot_be_kept_apart(pipeline, tmp_path, scale, change, message):
    name = f"unet.{LINEAR[0]}"
    if "unet" in change:
        name = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    content = {
        f"{name}.lora_A.weight": np.ones((2, 32), np.float32),
        f"{name}.lora_B.weight": np.ones((32, 2), np.float32),
    }
    if "lora_A" in change:
        content = {f"{name}.hada_w1_a": content.popitem()[1]}
    if "dora_scale" in change:
        content[f"{name}.dora_scale"] = np.ones(change["dora_scale"], np.float32)
    with pytest.raises(ValueError, match=message):
        attach_lora(pipeline, save(content, tmp_path / "x.safetensors"), scale)
    with pytest.raises(ValueError, match="weights='lora' selects no parameter.*--lora"):
        select_weights(pipeline.params["unet"], "lora")
