"""The Flax autoencoder against diffusers: encode and decode in float32 and float64, and configs."""

import functools

import diffusers
import jax
import numpy as np
import pytest
import torch

from attrib_jax.models.vae import AutoencoderKL, AutoencoderKLConfig
from tests.parity.torch_weights import flax_tree, randomise

SD = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "sample_size": 16,
}
CONFIGS = {
    "sd": SD,
    "no_mid_attention": SD
    | {
        "mid_block_add_attention": False,
        "block_out_channels": [8, 8, 16],
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
    },
    "no_quant_convs": SD
    | {"use_quant_conv": False, "use_post_quant_conv": False, "latent_channels": 6, "layers_per_block": 2},
}
TOLERANCE = {"float32": 1e-4, "float64": 1e-9}


@functools.cache
def torch_model(name: str, dtype: str) -> diffusers.AutoencoderKL:
    model = diffusers.AutoencoderKL(**CONFIGS[name]).eval()
    randomise(model, seed=2)
    return model.to(getattr(torch, dtype))


def module_of(model: diffusers.AutoencoderKL) -> AutoencoderKL:
    return AutoencoderKL(AutoencoderKLConfig.from_dict(dict(model.config)))


def relative_error(actual, expected_nchw: torch.Tensor) -> float:
    expected = expected_nchw.numpy().transpose(0, 2, 3, 1)
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    return np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", CONFIGS)
def test_encode_and_decode_match_diffusers(name, dtype):
    model = torch_model(name, dtype)
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (2, 12, 16, 3)).astype(dtype)
    latents = rng.normal(size=(2, 3, 4, model.config.latent_channels)).astype(dtype)
    with torch.no_grad():
        posterior = model.encode(torch.from_numpy(images.transpose(0, 3, 1, 2))).latent_dist
        decoded = model.decode(torch.from_numpy(latents.transpose(0, 3, 1, 2))).sample
    with jax.enable_x64(dtype == "float64"):
        module, params = module_of(model), {"params": flax_tree(model.state_dict())}
        encode, decode = (jax.jit(functools.partial(module.apply, method=name)) for name in ("encode", "decode"))
        distribution = encode(params, images)
        assert relative_error(distribution.mean, posterior.mean) < TOLERANCE[dtype]
        assert relative_error(distribution.logvar, posterior.logvar) < TOLERANCE[dtype]
        assert relative_error(decode(params, latents), decoded) < TOLERANCE[dtype]


def test_logvar_is_clipped_as_in_diffusers():
    model = torch_model("sd", "float32")
    params = flax_tree(model.state_dict())
    params["quant_conv"]["bias"] = np.array([0.0] * 4 + [100.0, -100.0, 0.0, 0.0], np.float32)
    images = np.random.default_rng(0).uniform(-1, 1, (1, 8, 8, 3)).astype(np.float32)
    encode = jax.jit(functools.partial(module_of(model).apply, method="encode"))
    logvar = encode({"params": params}, images).logvar
    assert np.unique(logvar[..., 0]).tolist() == [20.0]
    assert np.unique(logvar[..., 1]).tolist() == [-30.0]


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_and_config_are_those_of_diffusers(name):
    model = torch_model(name, "float32")
    images = jax.ShapeDtypeStruct((1, 8, 8, 3), np.float32)
    abstract = jax.eval_shape(module_of(model).init, jax.random.key(0, impl="threefry2x32"), images)["params"]
    assert jax.tree.map(np.shape, flax_tree(model.state_dict())) == jax.tree.map(lambda leaf: leaf.shape, abstract)

    config = AutoencoderKLConfig.from_dict(CONFIGS[name])
    assert AutoencoderKLConfig.from_dict(config.to_dict()) == config
    rebuilt = diffusers.AutoencoderKL.from_config(config.to_dict()).state_dict()
    assert {k: v.shape for k, v in rebuilt.items()} == {k: v.shape for k, v in model.state_dict().items()}


def test_absent_keys_take_diffusers_defaults():
    with torch.device("meta"):
        assert AutoencoderKLConfig.from_dict({}) == AutoencoderKLConfig.from_dict(
            dict(diffusers.AutoencoderKL().config)
        )


@pytest.mark.parametrize(
    "change", [{"_class_name": "VQModel"}, {"act_fn": "relu"}, {"up_block_types": ["AttnUpDecoderBlock2D"]}]
)
def test_unsupported_config_is_refused(change):
    (value,) = change.values()
    with pytest.raises(ValueError, match=value[0] if isinstance(value, list) else value):
        AutoencoderKLConfig.from_dict(SD | change)
