"""The configs of a single-file checkpoint, read off the names and shapes of its tensors.

Each function returns the content of a diffusers or transformers config.json. A few numbers leave no trace in any shape
and take the published models' value: the heads of an attention, the groups of a norm, the size of an image. Where the
widths do not allow the published number of heads, it is None.
"""

from collections.abc import Mapping
from typing import Any

from attrib_jax.convert.ldm.names import CLIP, OPEN_CLIP, UNET, VAE, XL_CLIP, XL_OPEN_CLIP
from attrib_jax.models.unet import SIZE_IDS

Shapes = Mapping[str, tuple[int, ...]]

_UNET_HEADS = 8  # of Stable Diffusion 1, at every level
_HEAD_WIDTH = 64  # of all text encoders, and of the UNets of Stable Diffusion 2 and XL
_XL_SCALING_FACTOR = 0.13025  # of Stable Diffusion XL's autoencoder
# open_clip's text tower has 24 layers, of which Stable Diffusion 2 was trained on the last but one's output.
_OPEN_CLIP_LAYERS = 24


def infer_configs(shapes: Shapes, prediction_type: str, source: str) -> dict[str, dict[str, Any]]:
    """The config.json of `unet`, `vae` and the text encoders; arguments and errors as `unet_config`."""
    if has_two_encoders(shapes):
        size = 128  # Stable Diffusion XL was trained on 1024 pixels
        projection = shape_of(shapes, f"{XL_OPEN_CLIP}text_projection", 2, source)[1]
        label = f"{UNET}label_emb.0.0.weight"
        width = shape_of(shapes, label, 2, source)[1]
        if width <= projection or (width - projection) % SIZE_IDS:
            raise ValueError(
                f"{source}: tensor {label} takes {width} numbers, which are not {projection} of the pooled text and "
                f"{SIZE_IDS} times as many of each size id"
            )
        addition = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": (width - projection) // SIZE_IDS,
            "projection_class_embeddings_input_dim": width,
        }
        return {
            "unet": unet_config(shapes, size, source) | addition,
            "vae": vae_config(shapes, size, source) | {"scaling_factor": _XL_SCALING_FACTOR},
            "text_encoder": clip_config(shapes, f"{XL_CLIP}text_model.", source),
            "text_encoder_2": _open_clip_config(shapes, XL_OPEN_CLIP, source) | {"projection_dim": projection},
        }
    # Stable Diffusion 2 with v prediction was trained on 768 pixels, all else on 512.
    size = 96 if prediction_type == "v_prediction" and has_open_clip(shapes) else 64
    return {
        "unet": unet_config(shapes, size, source),
        "vae": vae_config(shapes, size, source),
        "text_encoder": text_config(shapes, source),
    }


def has_two_encoders(shapes: Mapping[str, Any]) -> bool:
    """Whether the text encoders are Stable Diffusion XL's."""
    return any(name.startswith((XL_CLIP, XL_OPEN_CLIP)) for name in shapes)


def has_open_clip(shapes: Mapping[str, Any]) -> bool:
    """Whether the text encoder is Stable Diffusion 2's."""
    return any(name.startswith(OPEN_CLIP) for name in shapes)


def unet_config(shapes: Shapes, sample_size: int, source: str) -> dict[str, Any]:
    """The unet/config.json of a file.

    Args:
      shapes: file name -> shape of every tensor.
      sample_size: height and width of the latents that the model was trained on.
      source: what the error messages call the file.

    Raises:
      ValueError: a tensor that determines the architecture is absent or of another rank; it is named.
    """
    prefixes = module_paths(shapes, UNET)
    conv_in = shape_of(shapes, f"{UNET}input_blocks.0.0.weight", 4, source)
    channels, layers, depths, types, block = [conv_in[0]], [0], [0], [], 1
    while True:
        place = f"{UNET}input_blocks.{block}"
        if f"{place}.0.op" in prefixes:
            channels, layers, depths = [*channels, channels[-1]], [*layers, 0], [*depths, 0]
        elif f"{place}.0" in prefixes:
            layers[-1] += 1
            channels[-1] = shape_of(shapes, f"{place}.0.out_layers.3.weight", 4, source)[0]
            depths[-1] = count_modules(prefixes, f"{place}.1.transformer_blocks")
        else:
            break
        block += 1
    types = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths]
    up_types, block = [], 0
    for count in reversed(layers):
        attends = f"{UNET}output_blocks.{block}.1.transformer_blocks" in prefixes
        up_types.append("CrossAttnUpBlock2D" if attends else "UpBlock2D")
        block += count + 1
    middle = f"{UNET}middle_block.1"
    # A level without attention has no depth of its own; the innermost shares its number with the middle block.
    inner = count_modules(prefixes, f"{middle}.transformer_blocks")
    if has_two_encoders(shapes):
        # As Stable Diffusion XL's config has it.
        depths = [*(depth or 1 for depth in depths[:-1]), depths[-1] or inner]
    else:
        depths = [depth or inner for depth in depths]
    time_width = shape_of(shapes, f"{UNET}time_embed.0.weight", 2, source)[0]
    is_linear = len(shape_of(shapes, f"{middle}.proj_in.weight", None, source)) == 2
    return {
        "sample_size": sample_size,
        "in_channels": conv_in[1],
        "out_channels": shape_of(shapes, f"{UNET}out.2.weight", 4, source)[0],
        "down_block_types": types,
        "up_block_types": up_types,
        "block_out_channels": channels,
        "layers_per_block": _same(layers),
        "cross_attention_dim": shape_of(shapes, f"{middle}.transformer_blocks.0.attn2.to_k.weight", 2, source)[1],
        "transformer_layers_per_block": _same(depths),
        "attention_head_dim": _heads(channels) if is_linear else _UNET_HEADS,
        "use_linear_projection": is_linear,
        "time_embedding_dim": None if time_width == 4 * channels[0] else time_width,
    }


def vae_config(shapes: Shapes, sample_size: int, source: str) -> dict[str, Any]:
    """The vae/config.json of a file without its scaling factor; arguments and errors as `unet_config`."""
    prefixes = module_paths(shapes, VAE)
    levels = count_modules(prefixes, f"{VAE}encoder.down")
    conv1 = [f"{VAE}encoder.down.{level}.block.0.conv1.weight" for level in range(levels)]
    if not levels:
        raise ValueError(f"{source} lacks the autoencoder's {VAE}encoder.down.0; expected a whole pipeline in one file")
    decoder_in = shape_of(shapes, f"{VAE}decoder.conv_in.weight", 4, source)
    return {
        "sample_size": sample_size * 2 ** (levels - 1),
        "in_channels": shape_of(shapes, f"{VAE}encoder.conv_in.weight", 4, source)[1],
        "out_channels": shape_of(shapes, f"{VAE}decoder.conv_out.weight", 4, source)[0],
        "block_out_channels": [shape_of(shapes, name, 4, source)[0] for name in conv1],
        "layers_per_block": count_modules(prefixes, f"{VAE}encoder.down.0.block"),
        "latent_channels": decoder_in[1],
        "norm_num_groups": 32,
        "use_quant_conv": f"{VAE}quant_conv" in prefixes,
        "use_post_quant_conv": f"{VAE}post_quant_conv" in prefixes,
        "mid_block_add_attention": f"{VAE}encoder.mid.attn_1" in prefixes,
    }


def text_config(shapes: Shapes, source: str) -> dict[str, Any]:
    """The text_encoder/config.json of a file without its token ids; arguments and errors as `unet_config`."""
    if not has_open_clip(shapes):
        return clip_config(shapes, f"{CLIP}text_model.", source)
    config = _open_clip_config(shapes, OPEN_CLIP, source)
    if config["num_hidden_layers"] == _OPEN_CLIP_LAYERS:
        config["num_hidden_layers"] -= 1
    return config


# The published `projection_dim` of each; text states do not depend on it.
def clip_config(shapes: Shapes, prefix: str, source: str) -> dict[str, Any]:
    """The config.json of the CLIP text encoder whose `text_model` has this prefix; errors as `unet_config`."""
    tokens, positions = (f"{prefix}embeddings.{kind}_embedding.weight" for kind in ("token", "position"))
    config = _text_config(shapes, tokens, positions, f"{prefix}encoder.layers", "mlp.fc1.weight", source)
    return config | {"hidden_act": "quick_gelu", "projection_dim": 768}


def _open_clip_config(shapes: Shapes, prefix: str, source: str) -> dict[str, Any]:
    tokens, positions = f"{prefix}token_embedding.weight", f"{prefix}positional_embedding"
    config = _text_config(shapes, tokens, positions, f"{prefix}transformer.resblocks", "mlp.c_fc.weight", source)
    return config | {"hidden_act": "gelu", "projection_dim": 512}


def _text_config(shapes: Shapes, tokens: str, positions: str, layers: str, widest: str, source: str) -> dict[str, Any]:
    vocab_size, width = shape_of(shapes, tokens, 2, source)
    return {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": shape_of(shapes, f"{layers}.0.{widest}", 2, source)[0],
        "num_hidden_layers": count_modules(module_paths(shapes, layers), layers),
        "num_attention_heads": width // _HEAD_WIDTH if width % _HEAD_WIDTH == 0 else None,
        "max_position_embeddings": shape_of(shapes, positions, 2, source)[0],
    }


def shape_of(shapes: Shapes, name: str, rank: int | None, source: str) -> tuple[int, ...]:
    """The shape of a tensor that gives the architecture; ValueError where it is absent or has not `rank` axes."""
    if name not in shapes:
        raise ValueError(f"{source} lacks the tensor {name}, which gives the architecture; copy or download it again")
    shape = shapes[name]
    if 0 in shape or len(shape) < 2 or (rank is not None and len(shape) != rank):
        wanted = "2 or more" if rank is None else rank
        raise ValueError(f"{source}: tensor {name} has shape {shape}; expected {wanted} axes, none of them empty")
    return shape


def module_paths(shapes: Shapes, start: str) -> set[str]:
    """Every module path that leads to a tensor whose name begins with `start`."""
    found = set()
    for name in shapes:
        if name.startswith(start):
            parts = name.split(".")
            found.update(".".join(parts[:length]) for length in range(1, len(parts)))
    return found


def count_modules(prefixes: set[str], path: str) -> int:
    """How many modules `path.0`, `path.1`, ... there are before the first gap."""
    count = 0
    while f"{path}.{count}" in prefixes:
        count += 1
    return count


def _heads(widths: list[int]) -> list[int] | None:
    return None if any(width % _HEAD_WIDTH for width in widths) else [width // _HEAD_WIDTH for width in widths]


def _same(values: list[int]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else values
