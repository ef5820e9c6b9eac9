"""Configs: of every published folder against PyTorch's own classes, and those by name."""

import dataclasses
import json

import diffusers
import flax.traverse_util
import numpy as np
import pytest
import torch
import transformers

from attrib_jax.convert.configs import MSCOCO, named_config
from attrib_jax.convert.parts import abstract_text_params, abstract_unet_params, abstract_vae_params
from attrib_jax.convert.weights.names import name_table, text_encoder_names, torch_shape, vae_names
from attrib_jax.diffusion.schedule import NoiseSchedule
from attrib_jax.models.clip import CLIPTextConfig, CLIPTextModel
from attrib_jax.models.unet import UNet2DConditionModel, UNetConfig
from attrib_jax.models.vae import AutoencoderKL, AutoencoderKLConfig
from tests.convert.published_configs import PUBLISHED


# What the tests replace in a config before its parameters are traced has no part in their shapes; models that differ in
# nothing else are then traced once.
def torch_shapes(abstract):
    flat = flax.traverse_util.flatten_dict(abstract, sep="/")
    return {name: torch_shape(path, flat[path].shape) for name, path in name_table(abstract).items()}


def meta_shapes(make, rename=lambda state: state):
    with torch.device("meta"):
        state = make().state_dict()
    return {name: tuple(tensor.shape) for name, tensor in rename(state).items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_unet(name):
    published = PUBLISHED[name]["unet"]
    config = UNetConfig.from_dict(published)
    expected = meta_shapes(lambda: diffusers.UNet2DConditionModel.from_config(published))
    module = UNet2DConditionModel(dataclasses.replace(config, sample_size=None, upcast_attention=False))
    assert torch_shapes(abstract_unet_params(module)) == expected
    version_2 = "stable-diffusion-2" in name
    assert config.per_level("attention_head_dim") == ((5, 10, 20, 20) if version_2 else (8, 8, 8, 8))
    assert config.cross_attention_dim == (1024 if version_2 else 768)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_autoencoder(name):
    published = PUBLISHED[name]["vae"]
    config = AutoencoderKLConfig.from_dict(published)
    expected = meta_shapes(lambda: diffusers.AutoencoderKL.from_config(published), vae_names)
    assert torch_shapes(abstract_vae_params(AutoencoderKL(dataclasses.replace(config, sample_size=32)))) == expected
    theirs = diffusers.AutoencoderKL.from_config(published, block_out_channels=[32] * 4).config
    assert (config.scaling_factor, config.norm_num_groups) == (theirs.scaling_factor, theirs.norm_num_groups)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_text_encoder(name):
    published = PUBLISHED[name]["text_encoder"]
    config = CLIPTextConfig.from_dict(published)
    theirs = transformers.CLIPTextConfig.from_dict(dict(published))
    expected = meta_shapes(lambda: transformers.CLIPTextModel(theirs), text_encoder_names)
    module = CLIPTextModel(dataclasses.replace(config, projection_dim=None))
    assert torch_shapes(abstract_text_params(module)) == expected
    for field in ("hidden_act", "layer_norm_eps", "num_attention_heads", "max_position_embeddings"):
        assert getattr(config, field) == getattr(theirs, field)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_schedule(name):
    published = PUBLISHED[name]["scheduler"]
    schedule = NoiseSchedule.from_config(published)
    theirs = getattr(diffusers, published["_class_name"]).from_config(published)
    np.testing.assert_array_equal(schedule.alphas_cumprod, theirs.alphas_cumprod.numpy())
    assert schedule.prediction_type == theirs.config.prediction_type
    is_v = name in ("stabilityai/stable-diffusion-2", "stabilityai/stable-diffusion-2-1")
    assert schedule.prediction_type == ("v_prediction" if is_v else "epsilon")
    assert schedule.steps_offset == theirs.config.steps_offset
    assert schedule.timestep_spacing == theirs.config.timestep_spacing


def test_mscoco_is_the_papers_model():
    """METHOD.md section 6: 57.4 M weights, of which 32 key and value matrices with 7.08 M."""
    abstract = abstract_unet_params(UNet2DConditionModel(UNetConfig.from_dict(MSCOCO.unet)))
    sizes = {path: np.prod(leaf.shape) for path, leaf in flax.traverse_util.flatten_dict(abstract, sep="/").items()}
    assert round(sum(sizes.values()) / 1e6, 1) == 57.4
    projections = [size for path, size in sizes.items() if "attn2/to_k" in path or "attn2/to_v" in path]
    assert len(projections) == 32
    assert round(sum(projections) / 1e6, 2) == 7.08
    assert torch_shapes(abstract) == meta_shapes(lambda: diffusers.UNet2DConditionModel.from_config(MSCOCO.unet))


def test_mscoco_schedule():
    schedule = NoiseSchedule.from_config(MSCOCO.scheduler)
    betas = np.linspace(1e-4, 0.02, 1000)
    np.testing.assert_allclose(schedule.alphas_cumprod, np.cumprod(1 - betas), rtol=1e-6)
    assert (schedule.prediction_type, schedule.clip_sample, schedule.num_train_timesteps) == ("epsilon", True, 1000)


def test_a_config_by_name_json_or_content(tmp_path):
    assert named_config("mscoco") is MSCOCO
    path = tmp_path / "config.json"
    path.write_text(json.dumps(MSCOCO.unet))
    assert named_config(path) == named_config(str(path)) == (MSCOCO.unet, None)
    path.write_text(json.dumps(MSCOCO._asdict()))
    assert named_config(str(path)) == named_config(MSCOCO._asdict()) == MSCOCO


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("mscocco", "'mscocco'.*'mscoco'"),
        ("nowhere/config.json", r"nowhere/config\.json"),
        ({"unet": MSCOCO.unet, "vae": {}}, "'vae'"),
        ({"unet": "mscoco"}, "'unet'"),
        ({"beta_start": 1}, "beta_start"),
        ({}, "holds nothing"),
    ],
)
def test_bad_configs(config, message):
    with pytest.raises(ValueError, match=message):
        named_config(config)
