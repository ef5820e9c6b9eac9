"""The config files of the published Stable Diffusion folders, as facts: every key that their readers meet.

Copied from public mirrors and quotations of the folders, so with the gaps of the version that wrote each file. Local
paths (`_name_or_path`, `name_or_path`) stand for what each author's disk happened to be.
"""

import json
from typing import Any

_START, _END = "<|startoftext|>", "<|endoftext|>"

# What every UNet file holds since diffusers 0.2.
_UNET = json.loads("""{
  "_class_name": "UNet2DConditionModel", "act_fn": "silu", "block_out_channels": [320, 640, 1280, 1280],
  "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
  "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
  "center_input_sample": false, "downsample_padding": 1, "flip_sin_to_cos": true, "freq_shift": 0, "in_channels": 4,
  "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4
}""")
_UNET_1 = _UNET | {"attention_head_dim": 8, "cross_attention_dim": 768, "sample_size": 64}
_UNET_2 = _UNET | {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "dual_cross_attention": False}
_UNET_2["use_linear_projection"] = True
# Keys that diffusers wrote from 0.9 and 0.17 on.
_UNET_0_9 = {"num_class_embeds": None, "only_cross_attention": False}
_UNET_0_17 = _UNET_0_9 | json.loads("""{
  "addition_embed_type": null, "addition_embed_type_num_heads": 64, "class_embed_type": null,
  "class_embeddings_concat": false, "conv_in_kernel": 3, "conv_out_kernel": 3, "cross_attention_norm": null,
  "dual_cross_attention": false, "encoder_hid_dim": null, "mid_block_only_cross_attention": null,
  "mid_block_type": "UNetMidBlock2DCrossAttn", "projection_class_embeddings_input_dim": null,
  "resnet_out_scale_factor": 1.0, "resnet_skip_time_act": false, "resnet_time_scale_shift": "default",
  "time_cond_proj_dim": null, "time_embedding_act_fn": null, "time_embedding_dim": null,
  "time_embedding_type": "positional", "timestep_post_act": null, "upcast_attention": null,
  "use_linear_projection": false
}""")
# The first folders came before `norm_num_groups` and `scaling_factor`.
_VAE = json.loads("""{
  "_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": [128, 256, 512, 512], "in_channels": 3,
  "latent_channels": 4, "layers_per_block": 2, "out_channels": 3
}""")
_VAE |= {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
# The token ids 0, 2 and 1 are those of another tokenizer, in every one of these files: Stable Diffusion takes the
# last hidden state, so nothing reads them.
_TEXT = json.loads("""{
  "architectures": ["CLIPTextModel"], "attention_dropout": 0.0, "bos_token_id": 0, "dropout": 0.0, "eos_token_id": 2,
  "initializer_factor": 1.0, "initializer_range": 0.02, "layer_norm_eps": 1e-05, "max_position_embeddings": 77,
  "model_type": "clip_text_model", "pad_token_id": 1, "vocab_size": 49408
}""")
_TEXT_1 = _TEXT | json.loads("""{
  "hidden_act": "quick_gelu", "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
  "num_hidden_layers": 12, "torch_dtype": "float32"
}""")
_TEXT_2 = _TEXT | json.loads("""{
  "hidden_act": "gelu", "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
  "num_hidden_layers": 23, "projection_dim": 512
}""")
_SCHEDULER = json.loads("""{
  "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000,
  "set_alpha_to_one": false, "steps_offset": 1, "trained_betas": null
}""")
_PNDM = _SCHEDULER | {"_class_name": "PNDMScheduler", "skip_prk_steps": True}
_DDIM = _SCHEDULER | {"_class_name": "DDIMScheduler", "clip_sample": False}
_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": ["transformers", "CLIPFeatureExtractor"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def _folder(index, unet, vae, text, scheduler, checked=False, **more) -> dict[str, dict[str, Any]]:
    """One folder's files: part -> the content of its json; (version, content) of each, and more keys of the index."""
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    more |= (
        {"safety_checker": checker} if checked else {"safety_checker": [None, None], "requires_safety_checker": False}
    )
    versions = {"unet": unet, "vae": vae, "scheduler": scheduler}
    return {
        "index": _INDEX | {"_diffusers_version": index, "scheduler": ["diffusers", scheduler[1]["_class_name"]]} | more,
        "text_encoder": text[1] | {"transformers_version": text[0]},
        **{part: content | {"_diffusers_version": version} for part, (version, content) in versions.items()},
    }


_VAE_512, _VAE_768 = (_VAE | {"norm_num_groups": 32, "sample_size": size} for size in (512, 768))
_TEXT_2_FULL, _TEXT_2_HALF = (_TEXT_2 | {"torch_dtype": dtype} for dtype in ("float32", "float16"))
_OPENAI = {"_name_or_path": "openai/clip-vit-large-patch14"}
_EPSILON, _V = ({"prediction_type": kind} for kind in ("epsilon", "v_prediction"))
_V |= {"skip_prk_steps": True}
_PNDM_0_17 = _PNDM | _EPSILON | {"clip_sample": False, "clip_sample_range": 1.0, "dynamic_thresholding_ratio": 0.995}
_PNDM_0_17 |= {"sample_max_value": 1.0, "thresholding": False}

# Versions 1.1 to 1.3 have the files of 1.4.
PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {
    "CompVis/stable-diffusion-v1-4": _folder(
        "0.2.2",
        ("0.2.2", _UNET_1),
        ("0.2.2", _VAE | {"sample_size": 512}),
        ("4.23.1", _TEXT_1 | _OPENAI),
        ("0.4.0.dev0", _PNDM),
        checked=True,
    ),
    "runwayml/stable-diffusion-v1-5": _folder(
        "0.6.0",
        ("0.6.0", _UNET_1),
        ("0.6.0", _VAE_512),
        ("4.22.0.dev0", _TEXT_1),
        ("0.6.0", _PNDM | {"clip_sample": False}),
        checked=True,
    ),
    "runwayml/stable-diffusion-v1-5, saved by diffusers 0.17": _folder(
        "0.18.0.dev0",
        ("0.17.0.dev0", _UNET_1 | _UNET_0_17),
        ("0.6.0", _VAE_512 | {"scaling_factor": 0.18215}),
        ("4.37.2", _TEXT_1 | {"projection_dim": 768}),
        ("0.17.0.dev0", _PNDM_0_17),
        checked=True,
        requires_safety_checker=True,
    ),
    "stabilityai/stable-diffusion-2": _folder(
        "0.8.0",
        ("0.8.0", _UNET_2 | {"sample_size": 96}),
        ("0.8.0", _VAE_768),
        ("4.25.0.dev0", _TEXT_2_FULL),
        ("0.8.0", _DDIM | _V),
    ),
    "stabilityai/stable-diffusion-2-base, fine-tuned and saved by diffusers 0.9": _folder(
        "0.9.0.dev0",
        ("0.9.0.dev0", _UNET_2 | _UNET_0_9 | {"sample_size": 64}),
        ("0.8.0", _VAE_768),
        ("4.24.0", _TEXT_2_FULL),
        ("0.9.0.dev0", _DDIM | _EPSILON),
    ),
    "stabilityai/stable-diffusion-2-1": _folder(
        "0.8.0",
        ("0.10.0.dev0", _UNET_2 | _UNET_0_9 | {"sample_size": 96, "upcast_attention": True}),
        ("0.10.0.dev0", _VAE_768),
        ("4.25.0.dev0", _TEXT_2_HALF),
        ("0.9.0.dev0", _DDIM | _V),
    ),
    "stabilityai/stable-diffusion-2-1-base": _folder(
        "0.10.0.dev0",
        ("0.10.0.dev0", _UNET_2 | _UNET_0_9 | {"sample_size": 64}),
        ("0.10.0.dev0", _VAE_768),
        ("4.26.0.dev0", _TEXT_2_HALF),
        ("0.10.0.dev0", _PNDM | _EPSILON | {"clip_sample": False}),
    ),
}


def _token(content: str) -> dict[str, Any]:
    return {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


# Both generations say in tokenizer_config.json that `<|endoftext|>` pads; special_tokens_map.json has the last word.
_TOKENIZER = json.loads("""{
  "add_prefix_space": false, "do_lower_case": true, "errors": "replace", "model_max_length": 77,
  "tokenizer_class": "CLIPTokenizer"
}""")
TOKENIZER_CONFIG: dict[str, Any] = _TOKENIZER | {
    "bos_token": {"__type": "AddedToken", **_token(_START)},
    "eos_token": {"__type": "AddedToken", **_token(_END)},
    "name_or_path": "openai/clip-vit-large-patch14",
    "pad_token": _END,
    "special_tokens_map_file": "./special_tokens_map.json",
    "unk_token": {"__type": "AddedToken", **_token(_END)},
}


def special_tokens_map(generation: int) -> dict[str, Any]:
    """special_tokens_map.json of Stable Diffusion 1, which pads with `<|endoftext|>`, or 2, which pads with `!`."""
    pad = _END if generation == 1 else "!"
    return {"bos_token": _token(_START), "eos_token": _token(_END), "pad_token": pad, "unk_token": _token(_END)}


def later_tokenizer_config(generation: int, start_id: int, end_id: int) -> dict[str, Any]:
    """tokenizer_config.json as transformers 4.34 and later wrote it: the special tokens by id."""
    pad = _END if generation == 1 else "!"
    ids = {str(start_id): _START, str(end_id): _END} | ({} if generation == 1 else {"0": pad})
    decoder = {i: _token(token) | {"normalized": token == _START, "special": True} for i, token in ids.items()}
    special = {"bos_token": _START, "eos_token": _END, "pad_token": pad, "unk_token": _END}
    return _TOKENIZER | special | {"added_tokens_decoder": decoder, "clean_up_tokenization_spaces": True}
