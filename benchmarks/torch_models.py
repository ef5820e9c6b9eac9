"""Random Stable Diffusion and MSCOCO models in PyTorch: what benchmarks/formats.py saves and compares with.

The configurations are those of the published folders, or shrunken ones of the same kinds of layers. One part is in
memory at a time.
"""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers

from attrib_jax.convert.tokenizer import save_tokenizer, train_tokenizer

PARTS = {
    "unet": diffusers.UNet2DConditionModel,
    "vae": diffusers.AutoencoderKL,
    "text_encoder": transformers.CLIPTextModel,
}
PROMPTS = ("a photo of a cat on a table", "", "two dogs! and a bird, " * 40)
_LENGTH = 77
_TIMESTEP = 500


@dataclasses.dataclass(frozen=True)
class Spec:
    """One model: the configs of its parts, and the sizes of the inputs that it is compared on.

    Attributes:
      name: one of `MODELS`.
      scale: "full" or "small".
      unet, vae, text_encoder, scheduler: the content of their config files.
      pad_token: what the tokenizer pads with; None for its end token.
      latent_size: of the UNet's input, in latent pixels.
      image_size: of the autoencoder's input, in pixels.
    """

    name: str
    scale: str
    unet: dict[str, Any]
    vae: dict[str, Any]
    text_encoder: dict[str, Any]
    scheduler: dict[str, Any]
    pad_token: str | None
    latent_size: int
    image_size: int


_UNET = {
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 2,
}
_UNET_1 = {**_UNET, "sample_size": 64, "attention_head_dim": 8, "cross_attention_dim": 768}
_UNET_2 = {
    **_UNET,
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
_UNET_MSCOCO = {
    **_UNET,
    "sample_size": 16,
    "block_out_channels": (128, 256, 256, 256),
    "attention_head_dim": 8,
    "cross_attention_dim": 1024,
}
_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
_CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
_CLIP_H = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 512,
}
_BETAS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
_PNDM = {"_class_name": "PNDMScheduler", **_BETAS, "skip_prk_steps": True}
_DDIM_V = {"_class_name": "DDIMScheduler", **_BETAS, "clip_sample": False, "prediction_type": "v_prediction"}
_DDPM_LINEAR = {"_class_name": "DDPMScheduler", "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}

_VAE_1, _VAE_2 = {**_VAE, "sample_size": 512}, {**_VAE, "sample_size": 768}
_UNET_2_V, _UNET_2_BASE = {**_UNET_2, "sample_size": 96, "upcast_attention": True}, {**_UNET_2, "sample_size": 64}
_FULL = {
    "sd14": Spec("sd14", "full", _UNET_1, _VAE_1, _CLIP_L, _PNDM, None, latent_size=64, image_size=256),
    "sd21": Spec("sd21", "full", _UNET_2_V, _VAE_2, _CLIP_H, _DDIM_V, "!", latent_size=64, image_size=256),
    "sd21base": Spec("sd21base", "full", _UNET_2_BASE, _VAE_2, _CLIP_H, _PNDM, "!", latent_size=64, image_size=256),
    "mscoco": Spec("mscoco", "full", _UNET_MSCOCO, _VAE_2, _CLIP_H, _DDPM_LINEAR, "!", latent_size=16, image_size=128),
}
MODELS = tuple(_FULL)


def spec(name: str, scale: str, image_size: int | None = None) -> Spec:
    """The model `name` of `MODELS` at `scale` "full" or "small"; `image_size` replaces the autoencoder input's."""
    model = _FULL[name] if scale == "full" else _shrunk(_FULL[name])
    return model if image_size is None else dataclasses.replace(model, image_size=image_size)


def _shrunk(model: Spec) -> Spec:
    """Two levels and one layer each, narrow; the same kinds of blocks and heads, so single files are recognised."""
    is_linear = "use_linear_projection" in model.unet
    width = 64 if model.text_encoder is _CLIP_L else 128
    unet = {
        "block_out_channels": (64, 128) if is_linear else (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": width,
        **({"attention_head_dim": (1, 2)} if is_linear else {}),
    }
    vae = {
        "block_out_channels": (32, 64),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
    }
    text = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 64}
    if model.text_encoder is _CLIP_L:  # the other keeps 23 layers, by whose number its file is recognised
        text["num_hidden_layers"] = 3
    return dataclasses.replace(
        model,
        scale="small",
        unet=model.unet | unet,
        vae=model.vae | vae,
        text_encoder=model.text_encoder | text,
        latent_size=8,
        image_size=32,
    )


def build(model: Spec, folder: Path, references: Path) -> None:
    """Saves the model as a diffusers folder, and its `outputs` in `references`/float32.npz and float16.npz.

    Both are computed in float32; the second with weights that were rounded to float16.
    """
    folder.mkdir(parents=True)
    references.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(PROMPTS, vocab_size=600, model_max_length=_LENGTH)
    if model.pad_token is not None:
        tokenizer.pad_token = model.pad_token
    save_tokenizer(tokenizer, str(folder / "tokenizer"))
    tokenizer = load_torch_tokenizer(folder)  # a padding token counts as special only after loading
    found = {"float32": {}, "float16": {}}
    for seed, part in enumerate(PARTS):
        module = new_part(model, part, seed)
        module.save_pretrained(folder / part)
        found["float32"] |= outputs(model, part, module, tokenizer)
        found["float16"] |= outputs(model, part, module.half().float(), tokenizer)
        del module
    write_json({**model.scheduler}, folder / "scheduler" / "scheduler_config.json")
    index = {part: [cls.__module__.split(".")[0], cls.__name__] for part, cls in PARTS.items()}
    index |= {"_class_name": "StableDiffusionPipeline", "_diffusers_version": diffusers.__version__}
    index |= {
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", model.scheduler["_class_name"]],
    }
    index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    write_json(index, folder / "model_index.json")
    for name, arrays in found.items():
        save_reference(folder, references / f"{name}.npz", arrays)


def save_reference(folder: Path, path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes the `outputs` of all parts, and the noise levels that diffusers makes of the folder's scheduler config."""
    name = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["_class_name"]
    scheduler = getattr(diffusers, name).from_pretrained(folder / "scheduler")
    levels = {"alphas_cumprod": scheduler.alphas_cumprod.numpy(), "prediction_type": scheduler.config.prediction_type}
    np.savez(path, **arrays, **{f"scheduler.{key}": value for key, value in levels.items()})


def new_part(model: Spec, part: str, seed: int) -> torch.nn.Module:
    """A part with every parameter drawn at random: none keeps a 0 or 1 behind which a swapped tensor could hide."""
    config = getattr(model, part)
    with torch.device("meta"):
        if part == "text_encoder":
            module = transformers.CLIPTextModel(transformers.CLIPTextConfig(**config))
        else:
            module = PARTS[part](**config)
    module = module.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            if not name.endswith("position_ids"):
                raise ValueError(f"{part} has the buffer {name}, which no one fills")
            buffer.copy_(torch.arange(buffer.shape[-1]).expand(buffer.shape))
        for name, parameter in module.named_parameters():
            parameter.normal_(generator=generator)
            if parameter.ndim > 1:
                parameter.div_(parameter[0].numel() ** 0.5)
            else:
                parameter.mul_(0.1).add_(1.0 if name.endswith("weight") else 0.0)
    return module


@torch.no_grad()
def outputs(model: Spec, part: str, module: torch.nn.Module, tokenizer: Any, prompts=PROMPTS) -> dict[str, np.ndarray]:
    """Inputs drawn from a fixed seed and what `module` makes of them, channels last, named `<part>.<what>`."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape, np.float32)

    if part == "unet":
        latents = normal(1, model.latent_size, model.latent_size, 4)
        text, timesteps = normal(1, _LENGTH, model.unet["cross_attention_dim"]), np.array([_TIMESTEP], np.int32)
        prediction = module(_channels_first(latents), torch.from_numpy(timesteps), torch.from_numpy(text)).sample
        found = {"latents": latents, "timesteps": timesteps, "text": text, "prediction": _channels_last(prediction)}
    elif part == "vae":
        images = rng.uniform(-1, 1, (1, model.image_size, model.image_size, 3)).astype(np.float32)
        side = model.image_size // 2 ** (len(model.vae["block_out_channels"]) - 1)
        latents = normal(1, side, side, 4)
        found = {"images": images, "latents": latents}
        encoded = module.encode(_channels_first(images)).latent_dist
        found |= {"mean": _channels_last(encoded.mean), "logvar": _channels_last(encoded.logvar)}
        found["decoded"] = _channels_last(module.decode(_channels_first(latents)).sample)
    else:
        encoded = tokenizer(list(prompts), padding="max_length", max_length=_LENGTH, truncation=True)
        ids = np.asarray(encoded["input_ids"], np.int32)
        # The small vocabulary reaches few rows of the embedding: random ids reach the others.
        random_ids = rng.integers(0, model.text_encoder.get("vocab_size", 49408), (1, _LENGTH), np.int32)
        found = {"prompts": np.array(prompts), "prompt_ids": ids, "ids": np.concatenate([ids, random_ids])}
        found["states"] = module(torch.from_numpy(found["ids"])).last_hidden_state.numpy()
    return {f"{part}.{name}": array for name, array in found.items()}


def load_parts(folder: Path) -> Iterator[tuple[str, torch.nn.Module]]:
    """The parts of a diffusers folder, one after the other."""
    for part, cls in PARTS.items():
        yield part, cls.from_pretrained(folder / part).eval()


def copy_small_files(base: Path, target: Path) -> None:
    """Everything of a pipeline folder but the weights."""
    shutil.copytree(base, target, ignore=shutil.ignore_patterns("*.safetensors"))


def load_torch_tokenizer(folder: Path) -> Any:
    return transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)


def write_json(content: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def _channels_first(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2)))


def _channels_last(tensor: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.permute(0, 2, 3, 1).numpy())
