"""What a model of another family is called, told from class names, config entries and tensor shapes: no weight is read.

Every refusal says what the model is, what is supported, and what to give instead.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

PIPELINE, XL_PIPELINE = "StableDiffusionPipeline", "StableDiffusionXLPipeline"
# Of models whose denoiser is a diffusion transformer.
TRANSFORMER_PIPELINES = (
    "StableDiffusion3Pipeline",
    "FluxPipeline",
    "PixArtSigmaPipeline",
    "PixArtAlphaPipeline",
)
_SUPPORTED = (
    "supported are text-to-image models of the Stable Diffusion 1, 2 and XL families, Stable Diffusion 3 and FLUX.1, "
    "and folders of PixArt"
)
_ORIGIN = "give the text-to-image model that it was made from"
_OTHER = "give a Stable Diffusion 1, 2 or XL model"
_FOLDER = "give the folder of its text-to-image pipeline in the diffusers layout"
_INPAINTING = "an inpainting model, whose UNet also takes a mask and the masked image"
_EDITING = "an image-editing model (InstructPix2Pix), whose UNet also takes the image to edit"
_DEPTH = "a depth-to-image model (depth2img), whose UNet also takes a depth map"
_UPSCALER = "an upscaler, whose UNet also takes the image to enlarge"
_MOST_CHANNELS = 1000  # of latents; more is no other family but a wrong value
_LCM = "a latent consistency model, distilled with the guidance scale as an input"

# Patterns of class names in model_index.json and config.json, the first that matches counts: what the model is, and
# what to give in its place.
_CLASSES: tuple[tuple[str, str, str], ...] = (
    (r"(Flax|Onnx)\w+|\w+Onnx\w*", "weights of another framework than PyTorch", "give the folder of its PyTorch form"),
    (r"AnimateDiff\w*|\w*(Video|3D|Motion|SpatioTemporal)\w*", "a video model", _OTHER),
    (r"StableDiffusionXL\w*Inpaint\w*", "an inpainting model of Stable Diffusion XL", _ORIGIN),
    (
        r"StableDiffusionXL\w*ControlNet\w*",
        "a ControlNet pipeline of Stable Diffusion XL",
        "give the Stable Diffusion model that it steers",
    ),
    (r"StableDiffusionXLInstructPix2Pix\w*", "an image-editing model of Stable Diffusion XL", _ORIGIN),
    (
        r"StableDiffusionXL\w*",
        "a pipeline of Stable Diffusion XL that does more than text to image",
        f"if its parts are those of a text-to-image model, set _class_name to {XL_PIPELINE} in a copy of its index",
    ),
    (r"StableDiffusion3\w*|SD3\w*", "Stable Diffusion 3, but not its text-to-image pipeline", _FOLDER),
    (r"Flux([23])\w*", r"FLUX.\1", _OTHER),
    (r"Flux\w*", "FLUX, but not its text-to-image pipeline", _FOLDER),
    (r"KandinskyV22\w*", "Kandinsky 2.2", _OTHER),
    (r"Kandinsky([3-9])\w*", r"Kandinsky \1", _OTHER),
    (r"Kandinsky\w*", "Kandinsky 2.1", _OTHER),
    (r"PixArt\w*", "PixArt, but not its text-to-image pipeline", _FOLDER),
    (r"Sana\w*", "Sana", _OTHER),
    (r"(StableCascade|Wuerstchen)\w*", "Stable Cascade or Wuerstchen", _OTHER),
    (r"HunyuanDiT\w*", "Hunyuan-DiT", _OTHER),
    (r"IF[A-Z]\w*", "DeepFloyd IF", _OTHER),
    (r"(Stable)?UnCLIP\w*", "an unCLIP model, which is conditioned on image embeddings", _ORIGIN),
    (r"\w*ControlNet\w*", "a ControlNet", "give the Stable Diffusion model that it steers"),
    (r"\w*Adapter\w*", "an adapter pipeline", "give the Stable Diffusion model that it steers"),
    (r"\w*(Inpaint|PaintByExample)\w*", _INPAINTING, _ORIGIN),
    (r"\w*InstructPix2Pix\w*", _EDITING, _ORIGIN),
    (r"\w*Depth2Img\w*", _DEPTH, _ORIGIN),
    (r"\w*(Upscale|SuperResolution)\w*", _UPSCALER, _OTHER),
    (r"\w*(ImageVariation)\w*", "an image-variation model, which is conditioned on images", _ORIGIN),
    (r"\w*GLIGEN\w*", "a GLIGEN model, which is conditioned on boxes", _ORIGIN),
    (r"LatentConsistency\w*", _LCM, _ORIGIN),
    (r"AltDiffusion\w*", "AltDiffusion, which has another text encoder", _OTHER),
    (r"UNet2DModel|(DDPM|DDIM|PNDM|LDM)Pipeline", "an unconditional model", _OTHER),
    (r"\w*Transformer(1D|2D)?Model|\w*DiT\w*", "a transformer model", _OTHER),
    (
        r"StableDiffusion\w+Pipeline",
        "a pipeline that does more than text to image",
        f"if its parts are those of a text-to-image model, set _class_name to {PIPELINE} in a copy of model_index.json",
    ),
)


def refusal(source: str, what: str, instead: str) -> ValueError:
    """The error about a model that is `what`."""
    return ValueError(f"{source} is {what}, which is not supported; {_SUPPORTED}: {instead}")


def check_class(name: Any, supported: Collection[str], source: str) -> None:
    """Raises ValueError, saying what the model is, unless the class `name` of `source` is supported."""
    if isinstance(name, str) and name in supported:
        return
    what, instead = "no model that is known", _OTHER
    if isinstance(name, str):
        for pattern, known_what, known_instead in _CLASSES:
            match = re.fullmatch(pattern, name)
            if match:
                what, instead = match.expand(known_what).rstrip("."), known_instead
                break
    raise refusal(f"{source}, of class {name!r},", what, f"{instead} (class {' or '.join(supported)})")


def check_quantization(config: Mapping[str, Any], source: str) -> None:
    """Raises ValueError where a part's config.json says that its weights are quantised."""
    found = config.get("quantization_config")
    if found:
        method = found.get("quant_method") if isinstance(found, Mapping) else found
        raise ValueError(
            f"{source}: quantization_config is given ({method!r}), and quantised weights are not supported; give the "
            "model in full or half precision"
        )


def check_unet_config(config: Mapping[str, Any], source: str) -> None:
    """Raises ValueError where a UNet's config.json is that of another family, which it names."""
    check_class(config.get("_class_name", "UNet2DConditionModel"), ("UNet2DConditionModel",), source)
    addition, hidden = config.get("addition_embed_type"), config.get("encoder_hid_dim_type")
    channels, out = config.get("in_channels", 4), config.get("out_channels", 4)
    embedding = config.get("class_embed_type")
    what, instead = None, _OTHER
    if addition == "text_time" and (channels in _XL_KINDS or _is_refiner(config)):
        what = "the refiner of Stable Diffusion XL" if channels not in _XL_KINDS else _XL_KINDS[channels]
        instead = _ORIGIN if channels in _XL_KINDS else "give the base model that it refines"
    elif addition == "image" or hidden == "image_proj":
        what = "Kandinsky 2.2"
    elif addition in ("text_image", "image_hint") or hidden == "text_image_proj":
        what = "Kandinsky 2"
    elif addition == "text" or hidden == "text_proj":
        what = "DeepFloyd IF"
    elif embedding in ("projection", "simple_projection"):
        what, instead = "an unCLIP model, which is conditioned on image embeddings", _ORIGIN
    elif config.get("time_cond_proj_dim") is not None:
        what, instead = _LCM, _ORIGIN
    elif config.get("num_class_embeds") is not None and channels == 7:
        what = _UPSCALER
    elif type(channels) is type(out) is int and channels != out and max(channels, out) <= _MOST_CHANNELS:
        what, instead = _more_channels(channels, out)
    if what is not None:
        raise refusal(source, what, instead)


# By in_channels.
_XL_KINDS = {9: "an inpainting model of Stable Diffusion XL", 8: "an image-editing model of Stable Diffusion XL"}


_XL_INPUT = "projection_class_embeddings_input_dim"


def _is_refiner(config: Mapping[str, Any]) -> bool:
    """Whether a UNet reads one text encoder alone: 1280 text states, and the pooled text beside five ids, not six."""
    return config.get("cross_attention_dim") == 1280 and config.get(_XL_INPUT) in (None, 2560)


def _more_channels(channels: int, out: int) -> tuple[str | None, str]:
    """What a UNet is that takes other channels than it predicts; None where another check says it better."""
    found = {9: _INPAINTING, 8: _EDITING, 5: _DEPTH, 7: _UPSCALER}.get(channels) if out == 4 else None
    if found is not None:
        return f"{found} (in_channels is {channels})", _ORIGIN
    if channels > out > 0:
        return f"conditioned on more than text (in_channels is {channels}, out_channels {out})", _ORIGIN
    if out == 2 * channels:
        return f"a model that also predicts a variance (in_channels is {channels}, out_channels {out})", _OTHER
    return None, _OTHER


_UNET = "model.diffusion_model."
# What else people have beside a model: pattern of its tensor names, what it is, and where it belongs.
_PARTS: tuple[tuple[str, str, str], ...] = (
    (
        r"lora_\w+\.(lora_(down|up|mid)|hada_\w+|lokr_\w+|dora_scale|alpha|diff).*|.*[._]lora[._](A|B|down|up|linear_layer).*",
        "a LoRA",
        "give it as lora (--lora), and the model that it was trained on as model (--model)",
    ),
    (
        r"string_to_param\..*|emb_params|clip_[lg]",
        "a learnt token (textual inversion)",
        "give it in tokens (--tokens), and a model as model (--model)",
    ),
    (
        r"(unet\.)?(down_blocks|mid_block)\..*",
        "a UNet alone, under diffusers' names",
        "give it as unet with unet_config (--unet, --unet_config), and a whole model as model (--model)",
    ),
    (
        r"(encoder|decoder)\.(conv_in|mid|down|up)\b.*",
        "an autoencoder alone",
        "give a checkpoint with all parts, or a diffusers folder with the autoencoder in its vae/",
    ),
    (
        r"(text_model|transformer\.resblocks)\..*",
        "a text encoder alone",
        "give a checkpoint with all parts, or a diffusers folder with the text encoder in its text_encoder/",
    ),
)
# Patterns of tensor names in a single file, the first of which one name matches counts: what the model is, and what to
# give.
_TENSORS: tuple[tuple[str, str, str], ...] = (
    (r".*\.(absmax|nested_absmax|quant_map|quant_state\..*|SCB|scale_weight|weight_scale)|scaled_fp8",
     "a model with quantised weights", "give it in full or half precision"),
    (r".*\.(time_stack|time_mixer|temporal_\w+|motion_modules)\..*|motion_modules\..*", "a video model", _OTHER),
    (r"(control_model|controlnet_\w+)\..*|(.*\.)?(input_hint_block|zero_convs|controlnet_cond_embedding)\..*",
     "a ControlNet", "give the Stable Diffusion model that it steers"),
    (rf"({_UNET})?(double_blocks|single_blocks|single_transformer_blocks)\..*", "FLUX under other names", _FOLDER),
    (rf"({_UNET})?joint_blocks\..*|text_encoders\..*", "Stable Diffusion 3 under other names", _FOLDER),
    (rf"({_UNET})?(double_layers|single_layers)\..*", "AuraFlow", _OTHER),
    (rf"({_UNET})?clf\..*|.*channelwise\..*", "Stable Cascade", _OTHER),
    (r"low_scale_model\..*", _UPSCALER, _OTHER),
    (r"conditioner\.embedders\.0\.model\..*", "the refiner of Stable Diffusion XL",
     "give the base model that it refines"),
    (r"(add_embedding|encoder_hid_proj)\.(image_\w+|text_\w+)\..*", "Kandinsky 2", _OTHER),
    (rf"({_UNET})?(adaln_single|caption_projection|y_embedder|x_embedder|pos_embed)\..*",
     "a diffusion transformer", _OTHER),
    (r"(embedder|noise_augmentor)\..*",
     "an unCLIP model, which is conditioned on image embeddings", _ORIGIN),
)  # fmt: skip


def check_tensors(shapes: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Raises ValueError where the tensors of a single file are those of another family, which it names."""
    for pattern, what, instead in _TENSORS:
        if any(re.fullmatch(pattern, name) for name in shapes):
            raise refusal(source, what, instead)
    label = shapes.get(f"{_UNET}label_emb.0.0.weight")
    is_xl = any(name.startswith("conditioner.embedders.") for name in shapes)
    if is_xl and _channels(shapes)[0] in _XL_KINDS:
        raise refusal(source, _XL_KINDS[_channels(shapes)[0]], _ORIGIN)
    if label is not None and len(label) == 2 and not is_xl:
        what = {2816: "Stable Diffusion XL without its text encoders", 2560: "the refiner of Stable Diffusion XL"}
        instead = "give a file that holds all parts" if label[1] == 2816 else _OTHER
        raise refusal(source, what.get(label[1], "a model with class embeddings (SDXL or unCLIP)"), instead)
    if f"{_UNET}label_emb.weight" in shapes:
        raise refusal(source, _UPSCALER, _OTHER)
    channels, out = _channels(shapes)
    if channels is not None and out is not None and channels != out:
        what, instead = _more_channels(channels, out)
        if what is not None:
            raise refusal(source, what, instead)
    if any(name.startswith((_UNET, "first_stage_model.", "cond_stage_model.", "conditioner.")) for name in shapes):
        return
    for pattern, what, instead in _PARTS:
        if any(re.fullmatch(pattern, name) for name in shapes):
            raise ValueError(f"{source} is {what} and not a whole model: {instead}")


def _channels(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int | None, int | None]:
    """in_channels and out_channels of the UNet in a single file; None where the tensor is not there."""
    first, last = (shapes.get(f"{_UNET}{name}.weight", ()) for name in ("input_blocks.0.0", "out.2"))
    return (first[1] if len(first) == 4 else None), (last[0] if len(last) == 4 else None)


# Patterns of names in files that resemble those of SD 3 and FLUX.1.
_TRANSFORMERS: tuple[tuple[str, str, str], ...] = (
    _TENSORS[0],
    (r".*(single_stream_modulation|double_stream_modulation_\w+)\..*", "FLUX.2", _OTHER),
    (r".*distilled_guidance_layer\..*", "Chroma", _OTHER),
    (r".*(controlnet_\w+|input_hint_block|pos_embed_input)\..*", "a ControlNet", "give the model that it steers"),
    (r".*(redux|_ip)\w*\..*", "an image adapter", "give the model that it steers"),
)


def check_transformer(shapes: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Raises ValueError where the tensors of a file with a transformer are not those of SD 3 or FLUX.1."""
    for pattern, what, instead in _TRANSFORMERS:
        if any(re.fullmatch(pattern, name) for name in shapes):
            raise refusal(source, what, instead)
    bare = {name.removeprefix(_UNET): shape for name, shape in shapes.items()}
    taken, made = bare.get("img_in.weight", ()), bare.get("final_layer.linear.weight", ())
    if len(taken) == len(made) == 2 and taken[1] != made[0]:
        raise refusal(source, f"FLUX.1 Fill, Depth or Canny, which takes {taken[1]} channels for {made[0]}", _ORIGIN)


# `modelspec.architecture` of a safetensors header (https://github.com/Stability-AI/ModelSpec), without its prediction.
_ARCHITECTURES: tuple[tuple[str, str, str], ...] = (
    (r".*/(lora|loha|lokr|dora)", "a LoRA", "give it as lora (--lora), and the model as model (--model)"),
    (r".*/textual-inversion", "a learnt token", "give it in tokens (--tokens), and a model as model (--model)"),
    (r".*/controlnet.*", "a ControlNet", "give the Stable Diffusion model that it steers"),
    (r".*inpaint.*", _INPAINTING, _ORIGIN),
    (r".*depth.*", _DEPTH, _ORIGIN),
    (r".*(upscal|x4).*", _UPSCALER, _OTHER),
    (r".*unclip.*", "an unCLIP model, which is conditioned on image embeddings", _ORIGIN),
    (r"stable-diffusion-xl.*refiner.*", "the refiner of Stable Diffusion XL", _OTHER),
    (r"stable-diffusion-(3|v3).*", "Stable Diffusion 3 under other names", _FOLDER),
    (r"flux.*", "FLUX under other names", _FOLDER),
)


def check_architecture(name: Any, source: str) -> None:
    """Raises ValueError where `modelspec.architecture` names another family; an unknown one is left to the shapes."""
    for pattern, what, instead in _ARCHITECTURES:
        if isinstance(name, str) and re.fullmatch(pattern, name.strip().lower()):
            raise refusal(f"{source} (modelspec.architecture {name!r})", what, instead)
