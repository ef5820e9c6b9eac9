"""The latent-diffusion names and configs of the published models at full size, by shapes alone, against diffusers."""

import diffusers
import pytest
import torch
import transformers
from diffusers.loaders import single_file_utils

from attrib_jax.convert.ldm.configs import infer_configs
from attrib_jax.convert.ldm.names import pack, part_tables
from attrib_jax.convert.parts import abstract_part_params
from attrib_jax.convert.weights.state_dicts import state_dict_of
from attrib_jax.models.clip import CLIPTextConfig, CLIPTextModel
from attrib_jax.models.unet import UNet2DConditionModel, UNetConfig
from attrib_jax.models.vae import AutoencoderKL, AutoencoderKLConfig

FULL_SIZE = {
    "sd1": (
        UNetConfig(sample_size=64, cross_attention_dim=768),
        CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768),
    ),
    "sd2": (
        UNetConfig(
            sample_size=96, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
        ),
        CLIPTextConfig(
            hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=23, hidden_act="gelu"
        ),
    ),
}


@pytest.mark.parametrize("family", FULL_SIZE)
def test_full_size_names_and_configs(family):
    """Stable Diffusion 1.4 and 2.1 by shapes alone: diffusers finds every tensor that it needs, in the right shape."""
    unet, text = FULL_SIZE[family]
    size = unet.sample_size
    vae = AutoencoderKLConfig(block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=8 * size)
    modules = {"unet": UNet2DConditionModel(unet), "vae": AutoencoderKL(vae), "text_encoder": CLIPTextModel(text)}
    shapes = {}
    for part, table in part_tables(modules).items():
        tensors = pack(state_dict_of(abstract_part_params(part, modules[part])), table)
        shapes |= {name: tensor.shape for name, tensor in tensors.items()}

    prefixes = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.")
    counts = [sum(name.startswith(prefix) for name in shapes) for prefix in prefixes]
    # The published files' counts. v1-4.ckpt's text encoder has one more, the position_ids; 2.1's open_clip has 12 of an
    # unused layer, text_projection and logit_scale more.
    assert counts == [686, 248, 196 if family == "sd1" else 4 + 23 * 12]
    assert shapes[single_file_utils.CHECKPOINT_KEY_NAMES["v1"]] == (320, 640, 1, 1)
    assert shapes[single_file_utils.CHECKPOINT_KEY_NAMES["v2"]] == (320, text.hidden_size)

    configs = infer_configs(shapes, "v_prediction" if family == "sd2" else "epsilon", "x")
    assert UNetConfig.from_dict(configs["unet"]) == unet
    assert AutoencoderKLConfig.from_dict(configs["vae"]) == vae
    assert CLIPTextConfig.from_dict(configs["text_encoder"]) == text

    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in shapes.items()}
        theirs = {
            "unet": diffusers.UNet2DConditionModel.from_config(unet.to_dict()),
            "vae": diffusers.AutoencoderKL.from_config(vae.to_dict()),
            "text_encoder": transformers.CLIPTextModel(transformers.CLIPTextConfig(**vars(text))),
        }
        assert single_file_utils.infer_diffusers_model_type(state) == {"sd1": "v1", "sd2": "v2"}[family]
        converted = {
            "unet": single_file_utils.convert_ldm_unet_checkpoint(dict(state), theirs["unet"].config),
            "vae": single_file_utils.convert_ldm_vae_checkpoint(dict(state), theirs["vae"].config),
            "text_encoder": single_file_utils.convert_ldm_clip_checkpoint(state)
            if family == "sd1"
            else single_file_utils.convert_open_clip_checkpoint(theirs["text_encoder"], state),
        }
    for part, module in theirs.items():
        expected = {name: tensor.shape for name, tensor in module.state_dict().items()}
        actual = {name.removeprefix("text_model."): tensor.shape for name, tensor in converted[part].items()}
        assert actual == expected
