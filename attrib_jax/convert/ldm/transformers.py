"""The tensor names of the original SD 3 and FLUX.1 transformers, and the configs that the tensors' shapes give.

The naming is that of the modules in Stability-AI/sd3.5 (`mmditx.MMDiTX`) and black-forest-labs/flux (`model.Flux`).
Both keep projections of queries, keys and values as one matrix, and the last modulation as shift before scale, where
diffusers has the scale first.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from attrib_jax.convert.ldm.configs import Shapes, count_modules, module_paths, shape_of
from attrib_jax.convert.ldm.names import UNET, Stored, rename
from attrib_jax.models.flux import FluxConfig
from attrib_jax.models.sd3 import SD3Config

SD3, FLUX = "StableDiffusion3Pipeline", "FluxPipeline"
ORIGINAL_CONFIGS = (SD3Config, FluxConfig)  # of the models that have an original naming
_SD3_HEAD_WIDTH = 64  # of all published models; only those with normalised queries show it
_LEAVES = ("weight", "bias")
_OURS = {  # patterns of names in diffusers' naming
    FLUX: r"single_transformer_blocks\..+",
    SD3: r"transformer_blocks\.\d+\.attn\.add_k_proj\..+",
}
_THEIRS = {
    FLUX: r"double_blocks\.\d+\.(img|txt)_(attn|mlp|mod)\..+",
    SD3: r"joint_blocks\.\d+\.(x|context)_block\..+",
}


def transformer_kind(names: Iterable[str]) -> str | None:
    """The class of the pipeline, `SD3` or `FLUX`, whose transformer has these names in either naming, or None."""
    found = {name.removeprefix(UNET) for name in names}
    for patterns in (_THEIRS, _OURS):
        for kind, pattern in patterns.items():
            if any(re.fullmatch(pattern, name) for name in found):
                return kind
    return None


def is_original(names: Iterable[str]) -> bool:
    """Whether a transformer has the names of the original code."""
    return any(re.fullmatch(pattern, name.removeprefix(UNET)) for name in names for pattern in _THEIRS.values())


def transformer_table(config: SD3Config | FluxConfig, names: Iterable[str]) -> dict[str, Stored]:
    """File name, without a prefix -> content, for a transformer whose tensors have these diffusers `names`."""
    names = list(names)
    table = dict(_fused(config))
    joined = {name for stored in table.values() for name in stored.names}
    modules, swapped = _flux_modules(config) if isinstance(config, FluxConfig) else _sd3_modules(config)
    for name in names:
        if name not in joined:
            table[rename(name, modules)] = Stored((name,), is_swapped=name.rpartition(".")[0] in swapped)
    return table


def _fused(config: SD3Config | FluxConfig) -> Iterable[tuple[str, Stored]]:
    """The matrices that hold several: of queries, keys and values, and in FLUX's single blocks of the network too."""
    image, text = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
    groups: list[tuple[str, str, tuple[str, ...], tuple[int, ...]]] = []
    for index in range(config.num_layers):
        ours = f"transformer_blocks.{index}"
        if isinstance(config, FluxConfig):
            theirs = f"double_blocks.{index}"
            groups.append((f"{theirs}.img_attn.qkv", f"{ours}.attn", image, ()))
            groups.append((f"{theirs}.txt_attn.qkv", f"{ours}.attn", text, ()))
            continue
        theirs = f"joint_blocks.{index}"
        groups.append((f"{theirs}.x_block.attn.qkv", f"{ours}.attn", image, ()))
        groups.append((f"{theirs}.context_block.attn.qkv", f"{ours}.attn", text, ()))
        if index in config.dual_attention_layers:
            groups.append((f"{theirs}.x_block.attn2.qkv", f"{ours}.attn2", image, ()))
    if isinstance(config, FluxConfig):
        parts = tuple(f"attn.{name}" for name in image) + ("proj_mlp",)
        for index in range(config.num_single_layers):
            ours = f"single_transformer_blocks.{index}"
            groups.append((f"single_blocks.{index}.linear1", ours, parts, (1, 1, 1, 4)))
    for theirs, ours, parts, shares in groups:
        for leaf in _LEAVES:
            yield f"{theirs}.{leaf}", Stored(tuple(f"{ours}.{part}.{leaf}" for part in parts), shares=shares)


def _sd3_modules(config: SD3Config) -> tuple[dict[str, str], set[str]]:
    """diffusers' module -> that of the original code; and the modules whose halves are swapped."""
    modules = {
        "pos_embed.pos_embed": "pos_embed",
        "pos_embed.proj": "x_embedder.proj",
        "context_embedder": "context_embedder",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "proj_out": "final_layer.linear",
    }
    for ours, theirs in (("timestep_embedder", "t_embedder"), ("text_embedder", "y_embedder")):
        modules[f"time_text_embed.{ours}.linear_1"] = f"{theirs}.mlp.0"
        modules[f"time_text_embed.{ours}.linear_2"] = f"{theirs}.mlp.2"
    for index in range(config.num_layers):
        block, image, text = f"transformer_blocks.{index}", *(f"joint_blocks.{index}.{x}_block" for x in _SIDES)
        own = {
            "attn.norm_q": f"{image}.attn.ln_q",
            "attn.norm_k": f"{image}.attn.ln_k",
            "attn.norm_added_q": f"{text}.attn.ln_q",
            "attn.norm_added_k": f"{text}.attn.ln_k",
            "attn.to_out.0": f"{image}.attn.proj",
            "attn.to_add_out": f"{text}.attn.proj",
            "attn2.norm_q": f"{image}.attn2.ln_q",
            "attn2.norm_k": f"{image}.attn2.ln_k",
            "attn2.to_out.0": f"{image}.attn2.proj",
            "norm1.linear": f"{image}.adaLN_modulation.1",
            "norm1_context.linear": f"{text}.adaLN_modulation.1",
            "ff.net.0.proj": f"{image}.mlp.fc1",
            "ff.net.2": f"{image}.mlp.fc2",
            "ff_context.net.0.proj": f"{text}.mlp.fc1",
            "ff_context.net.2": f"{text}.mlp.fc2",
        }
        modules |= {f"{block}.{name}": theirs for name, theirs in own.items()}
    # The last block's text has a shift and a scale alone, as the output.
    return modules, {"norm_out.linear", f"transformer_blocks.{config.num_layers - 1}.norm1_context.linear"}


_SIDES = ("x", "context")


def _flux_modules(config: FluxConfig) -> tuple[dict[str, str], set[str]]:
    modules = {
        "x_embedder": "img_in",
        "context_embedder": "txt_in",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "proj_out": "final_layer.linear",
    }
    embedders = {"timestep_embedder": "time_in", "text_embedder": "vector_in", "guidance_embedder": "guidance_in"}
    for ours, theirs in embedders.items():
        modules[f"time_text_embed.{ours}.linear_1"] = f"{theirs}.in_layer"
        modules[f"time_text_embed.{ours}.linear_2"] = f"{theirs}.out_layer"
    for index in range(config.num_layers):
        block, double = f"transformer_blocks.{index}", f"double_blocks.{index}"
        for side, norm, out, mod, network in (
            ("img", "norm", "to_out.0", "norm1", "ff"),
            ("txt", "norm_added", "to_add_out", "norm1_context", "ff_context"),
        ):
            own = {
                f"attn.{norm}_q.weight": f"{double}.{side}_attn.norm.query_norm.scale",
                f"attn.{norm}_k.weight": f"{double}.{side}_attn.norm.key_norm.scale",
                f"attn.{out}": f"{double}.{side}_attn.proj",
                f"{mod}.linear": f"{double}.{side}_mod.lin",
                f"{network}.net.0.proj": f"{double}.{side}_mlp.0",
                f"{network}.net.2": f"{double}.{side}_mlp.2",
            }
            modules |= {f"{block}.{name}": theirs for name, theirs in own.items()}
    for index in range(config.num_single_layers):
        block, single = f"single_transformer_blocks.{index}", f"single_blocks.{index}"
        modules[f"{block}.attn.norm_q.weight"] = f"{single}.norm.query_norm.scale"
        modules[f"{block}.attn.norm_k.weight"] = f"{single}.norm.key_norm.scale"
        modules[f"{block}.norm.linear"] = f"{single}.modulation.lin"
        modules[f"{block}.proj_out"] = f"{single}.linear2"
    return modules, {"norm_out.linear"}


def transformer_config(kind: str, shapes: Shapes, source: str) -> dict[str, Any]:
    """What the shapes of a transformer in the original naming, without a prefix, say of its config.json.

    Raises ValueError naming a tensor that determines the architecture and is absent or of another rank.
    """
    paths = module_paths(shapes, "")
    if kind == FLUX:
        width, channels = shape_of(shapes, "img_in.weight", 2, source)
        (head,) = _vector(shapes, "double_blocks.0.img_attn.norm.query_norm.scale", source)
        found: dict[str, Any] = {
            "in_channels": channels,
            "num_layers": count_modules(paths, "double_blocks"),
            "num_single_layers": count_modules(paths, "single_blocks"),
            "attention_head_dim": head,
            "num_attention_heads": width // head,
            "joint_attention_dim": shape_of(shapes, "txt_in.weight", 2, source)[1],
            "pooled_projection_dim": shape_of(shapes, "vector_in.in_layer.weight", 2, source)[1],
            "guidance_embeds": "guidance_in" in paths,
        }
        return found
    width, channels, patch, _ = shape_of(shapes, "x_embedder.proj.weight", 4, source)
    layers = count_modules(paths, "joint_blocks")
    norm = "joint_blocks.0.x_block.attn.ln_q.weight"
    (head,) = _vector(shapes, norm, source) if norm in shapes else (_SD3_HEAD_WIDTH,)
    return {
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": channels,
        "num_layers": layers,
        "attention_head_dim": head,
        "num_attention_heads": max(width // head, 1),
        "joint_attention_dim": shape_of(shapes, "context_embedder.weight", 2, source)[1],
        "caption_projection_dim": width,
        "pooled_projection_dim": shape_of(shapes, "y_embedder.mlp.0.weight", 2, source)[1],
        "pos_embed_max_size": math.isqrt(shape_of(shapes, "pos_embed", 3, source)[1]),
        "dual_attention_layers": [i for i in range(layers) if f"joint_blocks.{i}.x_block.attn2" in paths],
        "qk_norm": "rms_norm" if norm in shapes else None,
    }


def _vector(shapes: Mapping[str, tuple[int, ...]], name: str, source: str) -> tuple[int, ...]:
    shape = shapes.get(name, ())
    if len(shape) != 1 or not shape[0]:
        raise ValueError(f"{source}: tensor {name}, which gives the width of a head, is {shape or 'absent'}")
    return shape
