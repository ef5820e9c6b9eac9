"""Stable Diffusion XL at its published size, random weights: written by PyTorch in half precision, read and run here.

    python -m benchmarks.sdxl --folder=runs/sdxl

Writes the parts of the base model one by one (7 GB) with diffusers and transformers, each with what it computes on
fixed inputs, then loads each with this library, one in memory at a time, and prints seconds, peak memory and the
largest difference over the largest value. The UNet runs in bfloat16 on both sides, everything else in float32.
"""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from absl import app, flags

_FOLDER = flags.DEFINE_string("folder", None, "Folder of the model; what is there is used again.", required=True)
_PART = flags.DEFINE_string("part", None, "Of one process: the part that it writes or reads.")
_WRITE = flags.DEFINE_boolean("write", False, "Of one process: whether it writes with PyTorch.")

_TOKENS, _SIDE, _PIXELS = 77, 16, 128
_TEXT = {"vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 49407, "bos_token_id": 49406}
# The published config.json of each part.
CONFIGS = {
    "text_encoder": _TEXT
    | {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
    | {"projection_dim": 768, "hidden_act": "quick_gelu"},
    "text_encoder_2": _TEXT
    | {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32}
    | {"projection_dim": 1280, "hidden_act": "gelu"},
    "vae": {
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "layers_per_block": 2,
        "sample_size": 1024,
        "scaling_factor": 0.13025,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    },
    "unet": {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "cross_attention_dim": 2048,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "layers_per_block": 2,
        "projection_class_embeddings_input_dim": 2816,
        "sample_size": 128,
        "transformer_layers_per_block": [1, 2, 10],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "use_linear_projection": True,
    },
}


def inputs(part: str) -> dict[str, np.ndarray]:
    """The fixed inputs of a part, channels last."""
    rng = np.random.default_rng(0)
    if part == "vae":
        return {"images": rng.uniform(-1, 1, (1, _PIXELS, _PIXELS, 3)).astype(np.float32)}
    if part == "unet":
        ids = np.array([[600, 1024, 0, 37, 1024, 1024]], np.float32)
        shapes = {"latents": (1, _SIDE, _SIDE, 4), "text": (1, _TOKENS, 2048), "pooled": (1, 1280)}
        return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()} | {"ids": ids}
    tokens = rng.integers(0, 49000, (1, _TOKENS))
    tokens[:, 0], tokens[:, 20:] = 49406, 49407
    return {"tokens": tokens.astype(np.int32)}


def write(part: str, folder: Path) -> None:
    """Makes a part with random weights and saves it in float16, with what it computes in `reference.npz`."""
    import diffusers
    import torch
    import transformers

    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    classes = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}
    with torch.device("meta"):
        if part in classes:
            module = classes[part].from_config(CONFIGS[part])
        else:
            name = "CLIPTextModel" + ("WithProjection" if part.endswith("2") else "")
            module = getattr(transformers, name)(transformers.CLIPTextConfig(**CONFIGS[part]))
    module = module.half().to_empty(device="cpu").eval()
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, min(0.02, parameter[0].numel() ** -0.5))
        else:
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.02)
    module.save_pretrained(folder / part)
    if hasattr(module, "text_model") or part == "text_encoder":
        text = getattr(module, "text_model", module)
        text.embeddings.position_ids.copy_(torch.arange(_TOKENS)[None])
    given = {name: torch.from_numpy(array) for name, array in inputs(part).items()}
    if part == "unet":
        module = module.to(torch.bfloat16)
        latents, text, pooled = (given[name].to(torch.bfloat16) for name in ("latents", "text", "pooled"))
        added = {"text_embeds": pooled, "time_ids": given["ids"]}
        out = module(latents.permute(0, 3, 1, 2), torch.tensor([500]), text, added_cond_kwargs=added).sample
        found = {"out": out.permute(0, 2, 3, 1)}
    elif part == "vae":
        found = {"out": module.float().encode(given["images"].permute(0, 3, 1, 2)).latent_dist.mean.permute(0, 2, 3, 1)}
    else:
        states = module.float()(given["tokens"].long(), output_hidden_states=True)
        found = {"out": states.hidden_states[-2]}
        if part == "text_encoder_2":
            found["pooled"] = states.text_embeds
    np.savez(folder / part / "reference.npz", **{name: array.float().numpy() for name, array in found.items()})


def read(part: str, folder: Path) -> dict[str, float]:
    """Loads a part and runs it on the same inputs -> seconds, and errors by output."""
    import jax
    import jax.numpy as jnp

    from attrib_jax.convert.diffusers_folder import STEMS, find_weights
    from attrib_jax.convert.parts import build_module, load_part

    started = time.monotonic()
    module = build_module(part, json.loads((folder / part / "config.json").read_text()), part)
    dtype = jnp.bfloat16 if part == "unet" else jnp.float32
    params = load_part(part, module, find_weights(str(folder / part), STEMS[part]), dtype)
    loaded = time.monotonic()
    given = inputs(part)
    if part == "unet":
        latents = given.pop("latents").astype(dtype)
        conditioning = {name: array if name == "ids" else array.astype(dtype) for name, array in given.items()}
        found = {"out": jax.jit(module.apply)({"params": params}, latents, jnp.array([500]), conditioning)}
    elif part == "vae":
        encode = jax.jit(lambda params, images: module.apply({"params": params}, images, method=module.encode).mean)
        found = {"out": encode(params, given["images"])}
    elif part == "text_encoder":
        states = jax.jit(lambda params, ids: module.apply({"params": params}, ids, penultimate=True))
        found = {"out": states(params, given["tokens"])}
    else:
        projected = jax.jit(module.apply)({"params": params}, given["tokens"])
        found = {"out": projected.penultimate, "pooled": projected.pooled}
    expected = np.load(folder / part / "reference.npz")
    errors = {
        f"error of {name}": float(
            np.abs(np.asarray(array, np.float32) - expected[name]).max() / np.abs(expected[name]).max()
        )
        for name, array in found.items()
    }
    values = sum(leaf.size for leaf in jax.tree.leaves(params))
    seconds = {"seconds to load": loaded - started, "seconds to compile and run": time.monotonic() - loaded}
    return {"values": values, **seconds, **errors}


def main(argv) -> None:
    del argv
    folder = Path(_FOLDER.value)
    if _PART.value is not None:
        found = write(_PART.value, folder) if _WRITE.value else read(_PART.value, folder)
        if found is not None:
            found["GiB at most"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            print(_PART.value, json.dumps({name: float(f"{value:.4g}") for name, value in found.items()}), flush=True)
        return
    # A process each: what one took is given back.
    for part in CONFIGS:
        for step in ([] if (folder / part / "reference.npz").exists() else ["--write"]) + ["--nowrite"]:
            command = [sys.executable, "-m", "benchmarks.sdxl", f"--folder={folder}", f"--part={part}", step]
            subprocess.run(command, check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})


if __name__ == "__main__":
    app.run(main)
