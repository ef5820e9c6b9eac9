"""The Flax CLIP text encoder against transformers: forward in float32 and float64, causality, and configs."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import torch
import transformers

from attrib_jax.models.clip import CLIPTextConfig, CLIPTextModel
from tests.parity.torch_weights import flax_tree, randomise

# Small stand-ins with the options of real checkpoints' config.json: SD 1.x, and SD 2.x with an epsilon that shows.
SD1 = {
    "architectures": ["CLIPTextModel"],
    "bos_token_id": 0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 24,
    "intermediate_size": 40,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 9,
    "model_type": "clip_text_model",
    "num_attention_heads": 3,
    "num_hidden_layers": 3,
    "pad_token_id": 1,
    "projection_dim": 24,
    "vocab_size": 50,
}
SD2 = SD1 | {"hidden_act": "gelu", "num_attention_heads": 4, "layer_norm_eps": 1e-2, "eos_token_id": 49}
TOLERANCE = {"float32": 1e-4, "float64": 1e-9}


@functools.cache
def torch_model(name: str, dtype: str) -> transformers.CLIPTextModel:
    # Plain ("eager") attention rounds its softmax to float32 whatever the model's type, so float64 needs "sdpa".
    config = transformers.CLIPTextConfig(**{"sd1": SD1, "sd2": SD2}[name])
    config._attn_implementation = "sdpa"
    model = transformers.CLIPTextModel(config).eval()
    randomise(model, seed=1)
    return model.to(getattr(torch, dtype))


def flax_params(model: transformers.CLIPTextModel) -> dict:
    params = flax_tree(model.state_dict())
    for table in params["embeddings"].values():
        table["embedding"] = table.pop("kernel").T
    return {"text_model": params}


def token_ids(shape: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, SD1["vocab_size"], shape).astype(np.int32)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["sd1", "sd2"])
@pytest.mark.parametrize("length", [9, 5])
def test_forward_matches_transformers(name, dtype, length):
    model = torch_model(name, dtype)
    ids = token_ids((2, length))
    with torch.no_grad():
        expected = model(torch.from_numpy(ids).long()).last_hidden_state.numpy()
    with jax.enable_x64(dtype == "float64"):
        module = CLIPTextModel(CLIPTextConfig.from_dict(model.config.to_dict()))
        actual = np.asarray(jax.jit(module.apply)({"params": flax_params(model)}, ids))
    assert actual.dtype == expected.dtype == np.dtype(dtype)
    assert np.abs(actual - expected).max() / np.abs(expected).max() < TOLERANCE[dtype]


def test_initial_values_follow_transformers():
    config = CLIPTextConfig(vocab_size=600, hidden_size=64, intermediate_size=256, num_hidden_layers=2)
    module = CLIPTextModel(config)
    params = jax.jit(module.init)(jax.random.key(0, impl="threefry2x32"), token_ids((1, 9)))["params"]
    torch.manual_seed(0)
    model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**dataclasses.asdict(config)))
    reference = flax_params(model)
    assert jax.tree.map(np.shape, reference) == jax.tree.map(np.shape, params)
    stds, expected = (jax.tree.map(np.std, tree) for tree in (params, reference))
    for (path, actual), std in zip(jax.tree.leaves_with_path(stds), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(actual, std, rtol=0.1, err_msg=jax.tree_util.keystr(path))


def test_later_tokens_do_not_change_earlier_states():
    model = torch_model("sd1", "float32")
    module = CLIPTextModel(CLIPTextConfig.from_dict(SD1))
    params = flax_params(model)
    ids = token_ids((1, 9))
    changed = ids.copy()
    changed[0, 6] = (ids[0, 6] + 1) % SD1["vocab_size"]
    apply = jax.jit(module.apply)
    states, changed_states = (np.asarray(apply({"params": params}, x)) for x in (ids, changed))
    np.testing.assert_array_equal(states[:, :6], changed_states[:, :6])
    assert np.abs(states[:, 6:] - changed_states[:, 6:]).max(axis=(0, 2)).min() > 1e-3


@pytest.mark.parametrize("options", [{}, SD1, SD2])
def test_config_round_trip_and_defaults_are_those_of_transformers(options):
    config = CLIPTextConfig.from_dict(options)
    assert CLIPTextConfig.from_dict(config.to_dict()) == config
    reference = transformers.CLIPTextConfig(**options)
    assert CLIPTextConfig.from_dict(reference.to_dict()) == config
    assert all(getattr(reference, name) == value for name, value in dataclasses.asdict(config).items())
    # Padding that is not masked may be stated.
    assert CLIPTextConfig.from_dict(options | {"use_attention_mask": False}) == config


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_act": "gelu_new"}, r"hidden_act='gelu_new'.*\['gelu', 'quick_gelu'\]"),
        ({"num_attention_heads": 5}, "hidden_size=24.*num_attention_heads=5"),
        ({"model_type": "t5"}, "model_type='t5'"),
        ({"architectures": ["CLIPTextModelWithProjection"]}, "CLIPTextModelWithProjection"),
        ({"use_attention_mask": True}, "use_attention_mask=True"),
    ],
)
def test_unsupported_config_is_refused(change, named):
    with pytest.raises(ValueError, match=named):
        CLIPTextConfig.from_dict(SD1 | change)


@pytest.mark.parametrize(("ids", "named"), [(token_ids((1, 10)), "10 .* 9"), (np.zeros((1, 9), np.float32), "float32")])
def test_bad_token_ids_are_refused(ids, named):
    module = CLIPTextModel(CLIPTextConfig.from_dict(SD1))
    with pytest.raises(ValueError, match=named):
        jax.eval_shape(module.init, jax.random.key(0), ids)
