"""The Flax UNet against diffusers: forward, K/V gradients, configs, and the K/V projections under vmap."""

import functools
import math

import diffusers
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor

from attrib_jax.convert.parts import abstract_unet_params
from attrib_jax.core.weights import count_weights, merge_weights, select_weights
from attrib_jax.models.predictor import predictor
from attrib_jax.models.unet import UNet2DConditionModel, UNetConfig
from tests.parity.torch_weights import flax_tree, randomise

TEXT_LENGTH = 5

# Small stand-ins with the options of real checkpoints' config.json. The channels are few, the structure is theirs.
SD1 = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [16, 32],
    "center_input_sample": False,
    "cross_attention_dim": 24,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "layers_per_block": 1,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-5,
    "norm_num_groups": 8,
    "sample_size": 8,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}
SD2 = SD1 | {
    "attention_head_dim": [2, 4],
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "upcast_attention": True,
    "use_linear_projection": True,
}
MSCOCO = SD1 | {
    "block_out_channels": [8, 16, 16, 16],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "layers_per_block": 2,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "norm_num_groups": 4,
}
# The remaining options, one number a level where that is possible, and an epsilon that cannot be overlooked. Of its two
# up-samplings of 7x10 latents, each doubles one side and rounds the other down.
OTHER = SD1 | {
    "block_out_channels": [16, 16, 16],
    "center_input_sample": True,
    "cross_attention_dim": 20,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 5,
    "layers_per_block": [1, 2, 1],
    "norm_eps": 0.1,
    "out_channels": 3,
    "time_embedding_dim": 40,
    "transformer_layers_per_block": [2, 1, 1],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"],
}
# Depth and heads by level, pooled text and size ids.
SDXL = SD2 | {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 6,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "projection_class_embeddings_input_dim": 10 + 6 * 6,
    "transformer_layers_per_block": [1, 2],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "upcast_attention": None,
}
CASES = {
    "sdxl": (SDXL, (8, 8)),
    "sd1": (SD1, (8, 8)),
    "sd2": (SD2, (8, 8)),
    "mscoco": (MSCOCO, (16, 16)),
    "odd_size_and_other_options": (OTHER, (7, 10)),
}


def sinusoids_float64(config: dict, width: int, timesteps: torch.Tensor) -> torch.Tensor:
    """The timestep features in float64, one element at a time; diffusers itself has them in float32 only."""
    half = width // 2
    rows = []
    for timestep in timesteps.tolist():
        angles = [timestep * 10000.0 ** (-i / (half - config["freq_shift"])) for i in range(half)]
        sines, cosines = [math.sin(a) for a in angles], [math.cos(a) for a in angles]
        rows.append(cosines + sines if config["flip_sin_to_cos"] else sines + cosines)
    return torch.tensor(rows, dtype=torch.float64)


def torch_model(config: dict, dtype: torch.dtype) -> torch.nn.Module:
    model = diffusers.UNet2DConditionModel.from_config(config).eval().to(dtype)
    randomise(model, seed=1)
    if dtype == torch.float64:
        model.set_attn_processor(AttnProcessor())
        model.time_proj.forward = functools.partial(sinusoids_float64, config, config["block_out_channels"][0])
        if "addition_embed_type" in config:
            width = config["addition_time_embed_dim"]
            model.add_time_proj.forward = functools.partial(sinusoids_float64, config, width)
    return model


def is_kv(name: str) -> bool:
    return "attn2.to_k" in name or "attn2.to_v" in name


def compare(case: str, dtype: np.dtype) -> tuple[float, dict[str, float]]:
    """Relative error of the forward, and of the gradient of a squared loss with respect to every K/V matrix."""
    config, (height, width) = CASES[case]
    if dtype == np.float64:
        config = config | {"upcast_attention": False}  # Upcasting is to float32: it would take digits from float64.
    model = torch_model(config, torch.float64 if dtype == np.float64 else torch.float32)
    rng = np.random.default_rng(2)
    module = UNet2DConditionModel(UNetConfig.from_dict(config))
    latents = rng.normal(size=(2, height, width, module.config.in_channels)).astype(dtype)
    target = rng.normal(size=(2, height, width, module.config.out_channels)).astype(dtype)
    text = rng.normal(size=(2, TEXT_LENGTH, module.config.cross_attention_dim)).astype(dtype)
    timesteps = np.array([981, 3], np.int32)

    conditioning, added = text, None
    if module.config.pooled_width is not None:
        pooled = rng.normal(size=(2, module.config.pooled_width)).astype(dtype)
        ids = np.array([[600, 1024, 0, 37, 1024, 1024], [1024, 1024, 0, 0, 1024, 1024]], dtype)
        conditioning = {"text": text, "pooled": pooled, "ids": ids}
        added = {"text_embeds": torch.from_numpy(pooled), "time_ids": torch.from_numpy(ids)}
    expected = model(
        torch.from_numpy(latents.transpose(0, 3, 1, 2)),
        torch.from_numpy(timesteps),
        torch.from_numpy(text),
        added_cond_kwargs=added,
    ).sample.permute(0, 2, 3, 1)
    ((expected - torch.from_numpy(target)) ** 2).mean().backward()
    reference_gradients = named_leaves(flax_tree({n: p.grad for n, p in model.named_parameters() if is_kv(n)}))

    params = flax_tree(model.state_dict())

    def loss(selected, rest):
        prediction = module.apply({"params": merge_weights(selected, rest)}, latents, timesteps, conditioning)
        return jnp.mean((prediction - target) ** 2), prediction

    with jax.enable_x64(dtype == np.float64):
        shapes = jax.eval_shape(module.init, jax.random.key(0), latents, timesteps, conditioning)["params"]
        assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(np.shape, params)
        gradients, prediction = jax.jit(jax.grad(loss, has_aux=True))(*select_weights(params, "cross-attn-kv"))
        gradients = named_leaves(gradients)
    assert prediction.dtype == dtype
    assert gradients.keys() == reference_gradients.keys()
    errors = {name: relative_error(gradients[name], reference) for name, reference in reference_gradients.items()}
    return relative_error(prediction, expected.detach().numpy()), errors


def named_leaves(tree) -> dict:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def relative_error(value, reference: np.ndarray) -> float:
    assert value.shape == reference.shape
    return np.abs(np.asarray(value) - reference).max() / np.abs(reference).max()


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, (1e-4, 1e-4)), (np.float64, (1e-9, 1e-8))])
@pytest.mark.parametrize("case", CASES)
def test_forward_and_kv_gradients_match_diffusers(case, dtype, tolerance):
    forward, gradients = compare(case, dtype)
    assert forward < tolerance[0]
    assert gradients and max(gradients.values()) < tolerance[1], gradients


def test_the_published_sd_1_4_unet_has_860_million_values():
    module = UNet2DConditionModel(UNetConfig.from_dict({"cross_attention_dim": 768}))
    inputs = jnp.zeros((1, 16, 16, 4)), 0, jnp.zeros((1, 77, 768))
    params = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 859_520_964
    assert sum(map(is_kv, named_leaves(params))) == 32


def test_the_published_sdxl_unet_has_2_6_billion_values_and_140_key_and_value_matrices():
    config = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "cross_attention_dim": 2048,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "projection_class_embeddings_input_dim": 2816,
        "transformer_layers_per_block": [1, 2, 10],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "use_linear_projection": True,
    }
    params = abstract_unet_params(UNet2DConditionModel(UNetConfig.from_dict(config)))
    assert count_weights(params).values == 2_567_463_684
    assert count_weights(select_weights(params, "cross-attn-kv")[0]) == (140, 340_787_200)


@pytest.mark.parametrize(
    "config", [SD1, SD2, SDXL, MSCOCO, OTHER, {}], ids=["sd1", "sd2", "sdxl", "mscoco", "other", "defaults"]
)
def test_exported_config_is_read_back_by_both(config):
    exported = UNetConfig.from_dict(config).to_dict()
    assert UNetConfig.from_dict(exported) == UNetConfig.from_dict(config)
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel.from_config(exported)
        original = diffusers.UNet2DConditionModel.from_config(config)
    for key, value in exported.items():
        if key != "_class_name":
            assert theirs.config[key] == value
    assert {k: v.shape for k, v in theirs.state_dict().items()} == {
        k: v.shape for k, v in original.state_dict().items()
    }


def test_num_attention_heads_takes_precedence():
    assert UNetConfig.from_dict(SD1 | {"num_attention_heads": [2, 4]}).attention_head_dim == (2, 4)
    assert UNetConfig.from_dict(SD1 | {"num_attention_heads": None}).attention_head_dim == 8


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"_class_name": "UNet2DModel"}, "_class_name='UNet2DModel'"),
        ({"class_embed_type": "timestep"}, "class_embed_type='timestep'"),
        ({"addition_embed_type": "image"}, "addition_embed_type='image'"),
        ({"addition_embed_type": "text_time"}, "addition_time_embed_dim .* None"),
        (
            {"addition_embed_type": "text_time"}
            | {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 48},
            "projection_class_embeddings_input_dim=48",
        ),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type="),
        ({"only_cross_attention": True}, "only_cross_attention=True"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type='fourier'"),
        ({"act_fn": "gelu"}, "act_fn='gelu'"),
        ({"encoder_hid_dim": 12}, "encoder_hid_dim=12"),
        ({"dual_cross_attention": True}, "dual_cross_attention=True"),
        ({"attention_type": "gated"}, "attention_type='gated'"),
        ({"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, "down_block_types .*'AttnDownBlock2D'"),
        ({"up_block_types": ["UpBlock2D"]}, "up_block_types has 1 "),
        ({"attention_head_dim": [2, 4, 8]}, "attention_head_dim has 3 "),
        ({"attention_head_dim": 5}, "attention_head_dim=5"),
        ({"norm_num_groups": None}, "norm_num_groups .* None"),
        ({"cross_attention_dim": [24, 24]}, "cross_attention_dim"),
    ],
)
def test_unsupported_config_is_named(change, named):
    with pytest.raises(ValueError, match=named):
        UNetConfig.from_dict(SD1 | change)


def test_conditioning_of_another_architecture_is_named():
    text, latents = jnp.zeros((1, 5, 24)), jnp.zeros((1, 8, 8, 4))
    xl = {"text": text, "pooled": jnp.zeros((1, 10)), "ids": jnp.zeros((1, 6))}
    for config, conditioning, named in (
        (SDXL, text, "text states alone: expected a dict of text, pooled and ids"),
        (SD2, xl, r"\['ids', 'pooled', 'text'\]: expected text states alone"),
        (SDXL, xl | {"pooled": jnp.zeros((1, 9))}, r"pooled has shape \(1, 9\): expected \(B, 10\)"),
    ):
        module = UNet2DConditionModel(UNetConfig.from_dict(config))
        with pytest.raises(ValueError, match=named):
            jax.eval_shape(module.init, jax.random.key(0), latents, 0, conditioning)


@pytest.mark.parametrize(
    ("latents", "text", "named"),
    [
        ((1, 8, 8, 4), (1, 5, 23), r"text has shape \(1, 5, 23\)"),
        ((3, 8, 8, 4), (2, 5, 24), r"text has shape \(2, 5, 24\)"),
        ((1, 4, 8, 8), (1, 5, 24), r"latents has shape \(1, 4, 8, 8\)"),
    ],
)
def test_misshaped_input_is_named(latents, text, named):
    module = UNet2DConditionModel(UNetConfig.from_dict(SD1))
    with pytest.raises(ValueError, match=named):
        jax.eval_shape(module.init, jax.random.key(0), jnp.zeros(latents), 0, jnp.zeros(text))


def matmuls(jaxpr):
    """Operand sizes of every dot_general, those of nested jaxprs included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield tuple(operand.aval.shape for operand in equation.invars)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from matmuls(inner)


@pytest.mark.parametrize("text_mapped", [False, True])
def test_keys_and_values_are_computed_once_for_all_timesteps(text_mapped):
    config = UNetConfig.from_dict(SD1 | {"cross_attention_dim": 23})  # A width that no other matrix has.
    module = UNet2DConditionModel(config)
    steps = 3
    latents, timesteps = jnp.zeros((steps, 8, 8, 4)), jnp.arange(steps)
    text = jnp.zeros((steps, TEXT_LENGTH, 23) if text_mapped else (TEXT_LENGTH, 23))
    one = jnp.zeros((1, TEXT_LENGTH, 23))
    params = jax.eval_shape(module.init, jax.random.key(0), latents[:1], timesteps[:1], one)["params"]
    predict = jax.vmap(predictor(module), in_axes=(None, 0, 0, 0 if text_mapped else None))
    traced = jax.make_jaxpr(predict)(params, latents, timesteps, text)
    assert traced.out_avals[0].shape == (steps, 8, 8, 4)
    projected = [shapes for shapes in matmuls(traced.jaxpr) if any(23 in shape for shape in shapes)]
    layers = 1 + 1 + 2  # Of the down, mid and up block: a key and a value projection each.
    assert len(projected) == 2 * layers
    expected_tokens = TEXT_LENGTH * (steps if text_mapped else 1)
    assert all(math.prod(text_shape) == expected_tokens * 23 for text_shape, _ in projected)


def test_predictor_is_the_batched_forward_of_one_example():
    config = SD1 | {"block_out_channels": [16], "down_block_types": SD1["down_block_types"][:1]}
    config |= {"up_block_types": SD1["up_block_types"][1:]}
    module = UNet2DConditionModel(UNetConfig.from_dict(config))
    rng = np.random.default_rng(3)
    latents = rng.normal(size=(2, 8, 8, 4)).astype(np.float32)
    text = rng.normal(size=(TEXT_LENGTH, 24)).astype(np.float32)
    timesteps = np.array([7, 500])
    params = flax_tree(torch_model(config, torch.float32).state_dict())
    batched = jax.jit(module.apply)({"params": params}, latents, timesteps, np.stack([text, text]))
    mapped = jax.jit(jax.vmap(predictor(module), in_axes=(None, 0, 0, None)))(params, latents, timesteps, text)
    np.testing.assert_allclose(mapped, batched, atol=1e-5)
    assert np.abs(mapped[0] - mapped[1]).max() > 0.1
