"""The config files of the published Stable Diffusion folders, as facts: every key that their readers meet.

Copied from public mirrors and quotations of the folders, so with the gaps of the version that wrote each file. Local
paths (`_name_or_path`, `name_or_path`) stand for what each author's disk happened to be.
"""

from typing import Any

_START, _END = "<|startoftext|>", "<|endoftext|>"
_BLOCKS = {
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
# What every UNet file holds since diffusers 0.2.
_UNET = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    **_BLOCKS,
    "center_input_sample": False,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
}
_UNET_1 = {**_UNET, "attention_head_dim": 8, "cross_attention_dim": 768, "sample_size": 64}
_UNET_2 = {
    **_UNET,
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "use_linear_projection": True,
}
# Keys that diffusers wrote from 0.9 and 0.17 on.
_UNET_0_9 = {"num_class_embeds": None, "only_cross_attention": False}
_UNET_0_17 = {
    **_UNET_0_9,
    "addition_embed_type": None,
    "addition_embed_type_num_heads": 64,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "mid_block_only_cross_attention": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "projection_class_embeddings_input_dim": None,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "upcast_attention": None,
    "use_linear_projection": False,
}

# The first folders came before `norm_num_groups` and `scaling_factor`.
_VAE = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "out_channels": 3,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}

# The token ids 0, 2 and 1 are those of another tokenizer, in every one of these files: Stable Diffusion takes the
# last hidden state, so nothing reads them.
_TEXT = {
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "pad_token_id": 1,
    "vocab_size": 49408,
}
_TEXT_1 = {
    **_TEXT,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "torch_dtype": "float32",
}
_TEXT_2 = {
    **_TEXT,
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "projection_dim": 512,
}

_SCHEDULER = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "trained_betas": None,
}
_PNDM = {**_SCHEDULER, "_class_name": "PNDMScheduler", "skip_prk_steps": True}


def _index(scheduler: str, **extra: Any) -> dict[str, Any]:
    return {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": ["transformers", "CLIPFeatureExtractor"],
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        **extra,
    }


_CHECKED = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
_UNCHECKED = {"safety_checker": [None, None], "requires_safety_checker": False}

# One folder's files: part -> the content of its json. Versions 1.1 to 1.3 have the files of 1.4.
PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {
    "CompVis/stable-diffusion-v1-4": {
        "index": _index("PNDMScheduler", _diffusers_version="0.2.2", **_CHECKED),
        "unet": {**_UNET_1, "_diffusers_version": "0.2.2"},
        "vae": {**_VAE, "_diffusers_version": "0.2.2", "sample_size": 512},
        "text_encoder": {
            **_TEXT_1,
            "_name_or_path": "openai/clip-vit-large-patch14",
            "transformers_version": "4.23.1",
        },
        "scheduler": {**_PNDM, "_diffusers_version": "0.4.0.dev0"},
    },
    "runwayml/stable-diffusion-v1-5": {
        "index": _index("PNDMScheduler", _diffusers_version="0.6.0", **_CHECKED),
        "unet": {**_UNET_1, "_diffusers_version": "0.6.0"},
        "vae": {**_VAE, "_diffusers_version": "0.6.0", "norm_num_groups": 32, "sample_size": 512},
        "text_encoder": {**_TEXT_1, "transformers_version": "4.22.0.dev0"},
        "scheduler": {**_PNDM, "_diffusers_version": "0.6.0", "clip_sample": False},
    },
    "runwayml/stable-diffusion-v1-5, saved by diffusers 0.17": {
        "index": _index("PNDMScheduler", _diffusers_version="0.18.0.dev0", requires_safety_checker=True, **_CHECKED),
        "unet": {**_UNET_1, **_UNET_0_17, "_diffusers_version": "0.17.0.dev0"},
        "vae": {
            **_VAE,
            "_diffusers_version": "0.6.0",
            "norm_num_groups": 32,
            "sample_size": 512,
            "scaling_factor": 0.18215,
        },
        "text_encoder": {**_TEXT_1, "projection_dim": 768, "transformers_version": "4.37.2"},
        "scheduler": {
            **_PNDM,
            "_diffusers_version": "0.17.0.dev0",
            "clip_sample": False,
            "clip_sample_range": 1.0,
            "dynamic_thresholding_ratio": 0.995,
            "prediction_type": "epsilon",
            "sample_max_value": 1.0,
            "thresholding": False,
        },
    },
    "stabilityai/stable-diffusion-2": {
        "index": _index("DDIMScheduler", _diffusers_version="0.8.0", **_UNCHECKED),
        "unet": {**_UNET_2, "_diffusers_version": "0.8.0", "sample_size": 96},
        "vae": {**_VAE, "_diffusers_version": "0.8.0", "norm_num_groups": 32, "sample_size": 768},
        "text_encoder": {**_TEXT_2, "torch_dtype": "float32", "transformers_version": "4.25.0.dev0"},
        "scheduler": {
            **_SCHEDULER,
            "_class_name": "DDIMScheduler",
            "_diffusers_version": "0.8.0",
            "clip_sample": False,
            "prediction_type": "v_prediction",
            "skip_prk_steps": True,
        },
    },
    "stabilityai/stable-diffusion-2-base, fine-tuned and saved by diffusers 0.9": {
        "index": _index("DDIMScheduler", _diffusers_version="0.9.0.dev0", **_UNCHECKED),
        "unet": {**_UNET_2, **_UNET_0_9, "_diffusers_version": "0.9.0.dev0", "sample_size": 64},
        "vae": {**_VAE, "_diffusers_version": "0.8.0", "norm_num_groups": 32, "sample_size": 768},
        "text_encoder": {**_TEXT_2, "torch_dtype": "float32", "transformers_version": "4.24.0"},
        "scheduler": {
            **_SCHEDULER,
            "_class_name": "DDIMScheduler",
            "_diffusers_version": "0.9.0.dev0",
            "clip_sample": False,
            "prediction_type": "epsilon",
        },
    },
    "stabilityai/stable-diffusion-2-1": {
        "index": _index("DDIMScheduler", _diffusers_version="0.8.0", **_UNCHECKED),
        "unet": {
            **_UNET_2,
            **_UNET_0_9,
            "_diffusers_version": "0.10.0.dev0",
            "sample_size": 96,
            "upcast_attention": True,
        },
        "vae": {**_VAE, "_diffusers_version": "0.10.0.dev0", "norm_num_groups": 32, "sample_size": 768},
        "text_encoder": {**_TEXT_2, "torch_dtype": "float16", "transformers_version": "4.25.0.dev0"},
        "scheduler": {
            **_SCHEDULER,
            "_class_name": "DDIMScheduler",
            "_diffusers_version": "0.9.0.dev0",
            "clip_sample": False,
            "prediction_type": "v_prediction",
            "skip_prk_steps": True,
        },
    },
    "stabilityai/stable-diffusion-2-1-base": {
        "index": _index("PNDMScheduler", _diffusers_version="0.10.0.dev0", **_UNCHECKED),
        "unet": {**_UNET_2, **_UNET_0_9, "_diffusers_version": "0.10.0.dev0", "sample_size": 64},
        "vae": {**_VAE, "_diffusers_version": "0.10.0.dev0", "norm_num_groups": 32, "sample_size": 768},
        "text_encoder": {**_TEXT_2, "torch_dtype": "float16", "transformers_version": "4.26.0.dev0"},
        "scheduler": {
            **_PNDM,
            "_diffusers_version": "0.10.0.dev0",
            "clip_sample": False,
            "prediction_type": "epsilon",
        },
    },
}


def _token(content: str) -> dict[str, Any]:
    return {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


# Both generations say in tokenizer_config.json that `<|endoftext|>` pads; special_tokens_map.json has the last word.
TOKENIZER_CONFIG: dict[str, Any] = {
    "add_prefix_space": False,
    "bos_token": {"__type": "AddedToken", **_token(_START)},
    "do_lower_case": True,
    "eos_token": {"__type": "AddedToken", **_token(_END)},
    "errors": "replace",
    "model_max_length": 77,
    "name_or_path": "openai/clip-vit-large-patch14",
    "pad_token": _END,
    "special_tokens_map_file": "./special_tokens_map.json",
    "tokenizer_class": "CLIPTokenizer",
    "unk_token": {"__type": "AddedToken", **_token(_END)},
}


def special_tokens_map(generation: int) -> dict[str, Any]:
    """special_tokens_map.json of Stable Diffusion 1, which pads with `<|endoftext|>`, or 2, which pads with `!`."""
    pad = _END if generation == 1 else "!"
    return {"bos_token": _token(_START), "eos_token": _token(_END), "pad_token": pad, "unk_token": _token(_END)}


def later_tokenizer_config(generation: int, start_id: int, end_id: int) -> dict[str, Any]:
    """tokenizer_config.json as transformers 4.34 and later wrote it: the special tokens by id."""
    decoder = {
        str(start_id): {**_token(_START), "special": True},
        str(end_id): {**_token(_END), "normalized": False, "special": True},
    }
    if generation == 2:
        decoder["0"] = {**_token("!"), "normalized": False, "special": True}
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": decoder,
        "bos_token": _START,
        "clean_up_tokenization_spaces": True,
        "do_lower_case": True,
        "eos_token": _END,
        "errors": "replace",
        "model_max_length": 77,
        "pad_token": _END if generation == 1 else "!",
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": _END,
    }
