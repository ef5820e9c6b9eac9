"""The tensor names of the original latent-diffusion code, as one table for each part of a pipeline.

A table says for every tensor of a single-file checkpoint which tensors of the diffusers naming it holds, and in what
form. It is generated from the module's config, and both loading and saving read it, so that the directions agree.

The naming is that of the modules in CompVis/latent-diffusion (`openaimodel.UNetModel`, `model.Encoder` and
`model.Decoder`), of transformers' CLIPTextModel for Stable Diffusion 1, and of open_clip for Stable Diffusion 2.
"""

import collections
import functools
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from attrib_jax.convert.parts import abstract_part_params
from attrib_jax.convert.weights.names import name_table
from attrib_jax.convert.weights.tensors import LazyTensor, Tensor
from attrib_jax.core.checks import raise_problems
from attrib_jax.models.clip import CLIPTextConfig
from attrib_jax.models.unet import UNetConfig
from attrib_jax.models.vae import AutoencoderKLConfig

_log = logging.getLogger(__name__)

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
# Of Stable Diffusion XL.
XL_CLIP, XL_OPEN_CLIP = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."

_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "conv_shortcut": "nin_shortcut"}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP_ENDS = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_RESBLOCK = re.compile(r"cond_stage_model\.model\.transformer\.resblocks\.([0-9]{1,9})\.")
# What training leaves in a file beside the weights of the model.
_UNUSED = {
    "averaged copies of weights": r"((model|first_stage_model|cond_stage_model)\.)?model_ema\..+",
    "buffers of the noise schedule": (
        r"denoiser\..+|((model|diffusion)\.)?(betas|(sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?|logvar|lvlb_weights|scale_factor"
        r"|posterior_(variance|log_variance_clipped|mean_coef[12]))"
    ),
    "parts of the training loss": r"(first_stage_model\.)?(loss|discriminator)\..+",
    "training state": r"(optimizer|optimizer_states|lr_schedulers|callbacks)\..+|global_step|epoch",
    "learnt tokens beside the text encoder": r"embedding_manager\..+",
    "unused tensors of the text encoder": (
        r"cond_stage_model\.(model\.|transformer\.)?(text_projection(\.weight)?|logit_scale|attn_mask|visual\..+)"
        r"|conditioner\.embedders\.[01]\.(model|transformer)\.(logit_scale|attn_mask|visual\..+)"
        r"|conditioner\.embedders\.0\.(logit_scale|transformer\.text_projection(\.weight)?)"
        r"|(cond_stage_model|conditioner\.embedders\.0)\.transformer\.text_model\.embeddings\.position_ids"
    ),
}


class Stored(NamedTuple):
    """What one tensor of the file holds.

    Attributes:
      names: the diffusers names of the tensors in it, in their order along axis 0.
      is_pointwise: whether the file keeps the matrix (out, in) as a 1x1 convolution (out, in, 1, 1).
      is_transposed: whether the file keeps it as (in, out).
      shares: sizes of the tensors relative to each other; equal if empty.
      is_swapped: whether the file has the second half along axis 0 first.
    """

    names: tuple[str, ...]
    is_pointwise: bool = False
    is_transposed: bool = False
    shares: tuple[int, ...] = ()
    is_swapped: bool = False


def part_tables(modules: Mapping[str, Any]) -> dict[str, dict[str, Stored]]:
    """Part -> file name -> content, for the modules of a pipeline: `unet`, `vae`, and one or two text encoders."""
    functions: dict[str, Callable[..., dict[str, Stored]]] = {
        "unet": unet_table,
        "vae": vae_table,
        "text_encoder": text_table,
    }
    if "text_encoder_2" in modules:
        functions["text_encoder"] = functools.partial(text_table, prefix=XL_CLIP)
        functions["text_encoder_2"] = functools.partial(text_table, prefix=XL_OPEN_CLIP)
    return {
        part: functions[part](module.config, name_table(abstract_part_params(part, module)))
        for part, module in modules.items()
    }


def unet_table(config: UNetConfig, names: Iterable[str]) -> dict[str, Stored]:
    """File name -> content, for a UNet whose tensors have these diffusers `names`."""
    modules = dict(_UNET_ENDS)

    def add_resnet(ours: str, theirs: str) -> None:
        modules.update({f"{ours}.{part}": f"{theirs}.{name}" for part, name in _UNET_RESNET.items()})

    layers_per_block = config.per_level("layers_per_block")
    last = len(layers_per_block) - 1
    block = 1
    for level, layers in enumerate(layers_per_block):
        for layer in range(layers):
            add_resnet(f"down_blocks.{level}.resnets.{layer}", f"input_blocks.{block}.0")
            modules[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{block}.1"
            block += 1
        if level < last:
            modules[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{block}.0.op"
            block += 1
    add_resnet("mid_block.resnets.0", "middle_block.0")
    modules["mid_block.attentions.0"] = "middle_block.1"
    add_resnet("mid_block.resnets.1", "middle_block.2")
    block = 0
    for index, layers in enumerate(reversed(layers_per_block)):
        for layer in range(layers + 1):
            add_resnet(f"up_blocks.{index}.resnets.{layer}", f"output_blocks.{block}.0")
            modules[f"up_blocks.{index}.attentions.{layer}"] = f"output_blocks.{block}.1"
            block += 1
        # The up-sampler is the last member of the last block, which has an attention before it or has not.
        place = 2 if config.up_block_types[index] == "CrossAttnUpBlock2D" else 1
        modules[f"up_blocks.{index}.upsamplers.0.conv"] = f"output_blocks.{block - 1}.{place}.conv"
    return {UNET + rename(name, modules): Stored((name,)) for name in names}


def vae_table(config: AutoencoderKLConfig, names: Iterable[str]) -> dict[str, Stored]:
    """File name -> content, for an autoencoder whose tensors have these diffusers `names`."""
    modules = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    attentions = []

    def add(ours: str, theirs: str, parts: Mapping[str, str]) -> None:
        modules.update({f"{ours}.{part}": f"{theirs}.{name}" for part, name in parts.items()})

    for side in ("encoder", "decoder"):
        add(side, side, {"conv_in": "conv_in", "conv_norm_out": "norm_out", "conv_out": "conv_out"})
        for index in (0, 1):
            add(f"{side}.mid_block.resnets.{index}", f"{side}.mid.block_{index + 1}", _VAE_RESNET)
        attentions.append(f"{side}.mid_block.attentions.0")
        add(attentions[-1], f"{side}.mid.attn_1", _VAE_ATTENTION)
    levels = len(config.block_out_channels)
    for level in range(levels):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{level}"
        # The file numbers both sides from the image inwards, diffusers the decoder from the latents outwards.
        their_down, their_up = f"encoder.down.{level}", f"decoder.up.{levels - 1 - level}"
        for layer in range(config.layers_per_block + 1):
            add(f"{down}.resnets.{layer}", f"{their_down}.block.{layer}", _VAE_RESNET)
            add(f"{up}.resnets.{layer}", f"{their_up}.block.{layer}", _VAE_RESNET)
        modules[f"{down}.downsamplers.0.conv"] = f"{their_down}.downsample.conv"
        modules[f"{up}.upsamplers.0.conv"] = f"{their_up}.upsample.conv"
    pointwise = tuple(f"{path}.{name}.weight" for path in attentions for name in _VAE_ATTENTION if name != "group_norm")
    return {VAE + rename(name, modules): Stored((name,), name in pointwise) for name in names}


def text_table(config: CLIPTextConfig, names: Iterable[str], prefix: str | None = None) -> dict[str, Stored]:
    """File name -> content, for a text encoder whose tensors have these `text_model.` names.

    `hidden_act` tells the two namings apart: Stable Diffusion 2's open_clip encoder has the exact GELU, and keeps the
    query, key and value projections of a layer as one `in_proj`. So does the second encoder of Stable Diffusion XL,
    whose tensors have another `prefix`, and whose projection of the pooled text is stored as (in, out).
    """
    if prefix == XL_CLIP or (prefix is None and config.hidden_act != "gelu"):
        return {(prefix or CLIP) + name: Stored((name,)) for name in names}
    prefix = prefix or OPEN_CLIP
    modules, table = dict(_OPEN_CLIP_ENDS), {}
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"text_model.encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        modules.update({f"{ours}.{part}": f"{theirs}.{name}" for part, name in _OPEN_CLIP_LAYER.items()})
        for leaf in ("weight", "bias"):
            fused = tuple(f"{ours}.self_attn.{part}_proj.{leaf}" for part in "qkv")
            table[f"{prefix}{theirs}.attn.in_proj_{leaf}"] = Stored(fused)
    joined = {name for stored in table.values() for name in stored.names}
    return table | {
        prefix + rename(name, modules): Stored((name,), is_transposed=name == "text_projection.weight")
        for name in names
        if name not in joined
    }


def check_names(
    shapes: Mapping[str, tuple[int, ...]], tables: Mapping[str, Mapping[str, Stored]], text_layers: int, source: str
) -> None:
    """Logs what is left out on purpose; raises ValueError with what is missing or unknown."""
    wanted = {name for table in tables.values() for name in table}
    unused, unexpected = collections.Counter(), []
    for name in shapes.keys() - wanted:
        kind = next((kind for kind, pattern in _UNUSED.items() if re.fullmatch(pattern, name)), None)
        layer = _RESBLOCK.match(name)
        if layer and int(layer[1]) >= text_layers:
            kind = "layers of the text encoder after the last used"
        if kind is None:
            unexpected.append(f"{name} {shapes[name]}")
        else:
            unused[kind] += 1
    for kind, count in sorted(unused.items()):
        _log.info("%s: left out %d tensors: %s", source, count, kind)
    raise_problems(
        f"{source} does not hold a Stable Diffusion 1, 2 or XL model:",
        {"missing": wanted - shapes.keys(), "unexpected": unexpected},
    )


def unpack(state: Mapping[str, Tensor], table: Mapping[str, Stored], source: str) -> dict[str, LazyTensor]:
    """The file's tensors under the diffusers names, nothing read."""
    tensors = {}
    for name, stored in table.items():
        tensor, count = LazyTensor.of(state[name]), len(stored.names)
        if stored.is_pointwise and tensor.shape[2:] == (1, 1):
            tensor = tensor.map(lambda x: x[:, :, 0, 0], tensor.shape[:2])
        if stored.is_transposed:
            tensor = tensor.map(np.transpose, tensor.shape[::-1])
        shares = stored.shares or (1,) * count
        parts = 2 if stored.is_swapped else sum(shares)
        if parts > 1 and (not tensor.shape or tensor.shape[0] % parts):
            sizes = (
                "two halves"
                if stored.is_swapped
                else f"{count} of equal size"
                if len(set(shares)) == 1
                else f"{count} as {shares}"
            )
            raise ValueError(f"{source}: tensor {name} of shape {tensor.shape} does not hold {sizes}")
        if stored.is_swapped:
            tensor = tensor.map(swap_halves)
        tensors |= zip(stored.names, tensor.split(shares) if count > 1 else (tensor,))
    return tensors


def pack(tensors: Mapping[str, LazyTensor], table: Mapping[str, Stored]) -> dict[str, LazyTensor]:
    """The inverse of `unpack`."""
    return {name: _join([tensors[part] for part in stored.names], stored) for name, stored in table.items()}


def _join(parts: list[LazyTensor], stored: Stored) -> LazyTensor:
    joined = parts[0]
    if len(parts) > 1:
        shape = (sum(part.shape[0] for part in parts), *joined.shape[1:])
        joined = LazyTensor(shape, joined.dtype, lambda: np.concatenate([part.read() for part in parts]))
    if stored.is_swapped:
        joined = joined.map(swap_halves)
    if stored.is_transposed:
        joined = joined.map(lambda x: np.ascontiguousarray(x.T), joined.shape[::-1])
    return joined.map(lambda x: x[:, :, None, None], (*joined.shape, 1, 1)) if stored.is_pointwise else joined


def swap_halves(array: np.ndarray) -> np.ndarray:
    """The two halves along axis 0 in the other order: its own inverse."""
    return np.roll(array, len(array) // 2, axis=0)


def rename(name: str, modules: Mapping[str, str]) -> str:
    """`name` with the longest beginning that `modules` holds replaced."""
    start = len(name)
    while start > 0:
        if name[:start] in modules:
            return modules[name[:start]] + name[start:]
        start = name.rfind(".", 0, start)
    raise ValueError(f"tensor {name} has no name in the latent-diffusion layout; save a pipeline folder instead")
