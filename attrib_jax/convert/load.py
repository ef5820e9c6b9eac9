"""The one way in: a pipeline from a folder, a Hugging Face id or a single file, with what people keep beside it."""

import dataclasses
import itertools
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from attrib_jax.convert.config_files import read_json
from attrib_jax.convert.diffusers_folder import (
    UNetFile,
    find_unet,
    load_folder,
    replaced_parts,
    transformer_class,
)
from attrib_jax.convert.pipeline import Pipeline, check_parts
from attrib_jax.core.checks import expand_path
from attrib_jax.core.settings import Settings, setting
from attrib_jax.models.unet import UNet2DConditionModel


@dataclasses.dataclass(frozen=True)
class ModelSource(Settings):
    """Where a pipeline comes from; applied in the order of the fields."""

    model: str = setting(
        "",
        "Model: a pipeline folder in the diffusers layout, a Hugging Face id, or a single-file checkpoint in the "
        "original naming.",
        path=True,
    )
    variant: str | None = setting(
        None, "Variant of the model's weight files, such as fp16; full precision where it is there, if not given."
    )
    tokenizer: str | None = setting(
        None, "Tokenizer or pipeline folder, for a single-file checkpoint, which has no tokenizer.", path=True
    )
    prediction_type: str | None = setting(
        None,
        "What the denoiser predicts: in place of what a folder's scheduler config says, or of a single file that does "
        "not say it.",
        choices=("epsilon", "v_prediction"),
    )
    model_config: str | None = setting(
        None,
        "Json file with the config entries of a single-file checkpoint that tensor shapes cannot determine: "
        '{"unet": {...}, "vae": {...}, "text_encoder": {...}, "scheduler": {...}}.',
        path=True,
    )
    unet: str | None = setting(
        None,
        "UNet weights that replace the model's: a folder, or the file of a state dict with --unet_config. For a folder "
        "of Stable Diffusion 3 or FLUX.1 its transformer, also in one file with the original names.",
        path=True,
    )
    unet_config: str | None = setting(
        None,
        "Config of such a state dict: mscoco, or a json file; it brings the noise schedule that the UNet was trained "
        "with.",
        path=True,
        only_if="unet",
    )
    custom_diffusion: str | None = setting(
        None, "Custom Diffusion weights, or the folder with them and their <token> files.", path=True
    )
    tokens: tuple[str, ...] = setting((), "Textual-inversion files, separated by commas.", path=True)
    lora: tuple[str, ...] = setting(
        (), "LoRA files (LoHa, LoKr and DoRA too), separated by commas, merged into the model.", path=True
    )
    lora_scale: tuple[float, ...] = setting(
        (1.0,), "Factor of the LoRA weights; one for all files, or one for each.", only_if="lora"
    )


def load_model(source: ModelSource, dtype: Any = jnp.float32, weights: Collection[str] = ()) -> Pipeline:
    """Loads a pipeline and applies what `source` adds to it.

    Args:
      source: where it is.
      dtype: dtype of the parameters.
      weights: subsets that will be selected; for "lora" the LoRA's factors are kept apart and not merged.

    Raises:
      FileNotFoundError: a file or folder is missing.
      ValueError: a file is damaged, or does not fit the model; see the functions that read it.
    """
    if "lora" in weights and not source.lora:
        raise ValueError("weights is 'lora', but lora is not given; give the LoRA file with --lora, or other weights")
    pipeline = load_pipeline(
        source.model,
        dtype,
        variant=source.variant,
        tokenizer=source.tokenizer,
        prediction_type=source.prediction_type,
        model_config=source.model_config,
        unet=source.unet,
        unet_config=source.unet_config,
    )
    adapters = {"custom_diffusion": source.custom_diffusion, "tokens": source.tokens}
    for name, value in adapters.items():
        if value and type(pipeline) is not Pipeline:
            raise ValueError(f"{name} is {value!r}, but the model has a transformer, for which it is not supported")
    # Imported where they are used, as most models come without: a command starts faster.
    if source.custom_diffusion is not None:
        from attrib_jax.convert.adapters.custom_diffusion import apply_custom_diffusion

        pipeline = apply_custom_diffusion(pipeline, expand_path(source.custom_diffusion))
    for file in _rejoin(source.tokens):
        from attrib_jax.convert.adapters.textual_inversion import add_tokens, read_token_file

        pipeline = add_tokens(pipeline, read_token_file(expand_path(file)))
    if source.lora:
        from attrib_jax.convert.adapters.lora import attach_lora, merge_lora

        apply = attach_lora if "lora" in weights else merge_lora
        pipeline = apply(pipeline, [expand_path(file) for file in _rejoin(source.lora)], source.lora_scale)
    return pipeline


_MOST_COMMAS = 5  # in one path


def _rejoin(paths: Sequence[str]) -> list[str]:
    """Paths of which a list of flags, separated by commas, may have cut those that hold a comma themselves.

    Parts that are no file are joined with those after them where together they name one; others stay as they are.
    """
    joined: list[str] = []
    rest = list(paths)
    while rest:
        count, name = 1, rest[0]
        for end in range(1, min(len(rest), _MOST_COMMAS + 1) + 1):
            # The list's parser has stripped the blanks after a comma.
            choices = [[rest[0]], *([f",{part}", f", {part}"] for part in rest[1:end])]
            candidates = map("".join, itertools.product(*choices))
            found = next((path for path in candidates if os.path.exists(expand_path(path))), None)
            if found is not None:
                count, name = end, found
                break
        joined.append(name)
        del rest[:count]
    return joined


def load_pipeline(
    path: str,
    dtype: Any = jnp.float32,
    *,
    variant: str | None = None,
    tokenizer: str | None = None,
    prediction_type: str | None = None,
    model_config: str | Mapping[str, Mapping[str, Any]] | None = None,
    unet: str | None = None,
    unet_config: str | Mapping[str, Any] | None = None,
) -> Pipeline:
    """Reads a pipeline: a diffusers folder, a Hugging Face id, or a single-file checkpoint.

    Folders of every age are read as they are: weights as safetensors or `.bin`, whole or in shards, under today's names
    and those of the published files. Tensors are read one by one. A folder's parts that the arguments replace are
    neither read nor downloaded, and may be missing.

    Args:
      path: the folder that holds model_index.json, unet/, vae/, text_encoder/, tokenizer/ and scheduler/; or
        `owner/name[@revision]`, see `resolve_model`; or a file, see `load_single_file`. Stable Diffusion XL also has
        text_encoder_2/ and tokenizer_2/.
      dtype: dtype of the loaded parameters, whatever the files hold.
      variant: variant of the weight files, such as "fp16". None takes full precision, or `fp16` where nothing else is
        there.
      tokenizer: a tokenizer folder, or a pipeline folder with one, in place of the model's own; see
        `load_given_tokenizers` for a model with two.
      prediction_type: "epsilon" or "v_prediction", in place of what the scheduler's config says, `unet_config`'s too;
        what a weight file's own header or marks say must agree.
      model_config: `config` of `load_single_file`, or the json file that holds it; for a single file.
      unet, unet_config: another UNet and its config, as for `replace_unet`, in place of the model's own; for the folder
        of a model with a transformer another one, see `find_transformer`.

    Raises:
      FileNotFoundError: the model, or files in it, are missing; all of them are listed.
      ValueError: a class, option or tensor that this library does not support, or a damaged file; says which.
    """
    tokenizer = None if tokenizer is None else expand_path(tokenizer)
    unet_config = expand_path(unet_config) if isinstance(unet_config, str) else unet_config
    path = expand_path(path)
    kind = None if unet is None else transformer_class(path)
    if unet is None:
        replacement = None
    elif kind is None:
        replacement = find_unet(expand_path(unet), unet_config)
    else:
        from attrib_jax.convert.ldm.transformer_file import find_transformer  # no other model needs it

        transformer = find_transformer(expand_path(unet), path, kind, unet_config)
        return load_folder(
            path, dtype, variant=variant, tokenizer=tokenizer, prediction_type=prediction_type, unet=transformer
        )
    if not os.path.exists(path):
        from attrib_jax.convert.hub import resolve_model

        path = resolve_model(path, variant, replaced=replaced_parts(replacement, tokenizer))
    if not os.path.isfile(path):
        if model_config is not None:
            raise ValueError(
                f"model_config is {model_config!r}, but {path} is a folder with config files of its own; leave it out"
            )
        return load_folder(
            path, dtype, variant=variant, tokenizer=tokenizer, prediction_type=prediction_type, unet=replacement
        )
    if variant is not None:
        raise ValueError(f"variant is {variant!r}, but {path} is one file; only a folder has variants")
    from attrib_jax.convert.single_file import load_single_file  # not needed for folders

    if model_config is not None and not isinstance(model_config, Mapping):
        model_config = read_json(expand_path(os.fspath(model_config)))
    if replacement is None:
        return load_single_file(path, tokenizer, prediction_type, dtype, model_config)
    try:
        # The prediction type is that of the UNet which replaces the file's own.
        pipeline = load_single_file(path, tokenizer, None, dtype, model_config)
    except ValueError:  # perhaps because the file does not say what it predicts itself
        pipeline = load_single_file(path, tokenizer, prediction_type, dtype, model_config)
    return _with_unet(pipeline, replacement, dtype, prediction_type)


def load_unet(
    path: str, config: str | Mapping[str, Any] | None = None, dtype: Any = jnp.float32
) -> tuple[UNet2DConditionModel, Any]:
    """Reads one UNet -> (module, params).

    Args:
      path: a diffusers UNet folder (config.json and weights), or a file with a bare state dict.
      config: config of the UNet, see `named_config`: needed for a file, and replaces a folder's config.json.
      dtype: dtype of the loaded parameters, whatever the file holds.

    Raises FileNotFoundError and ValueError as `load_pipeline`.
    """
    unet = find_unet(path, config)
    return unet.module, unet.load(dtype)


def replace_unet(
    pipeline: Pipeline,
    path: str,
    config: str | Mapping[str, Any] | None = None,
    dtype: Any = jnp.float32,
    prediction_type: str | None = None,
) -> Pipeline:
    """`pipeline` with another UNet, and with the noise schedule that its config brings.

    A config without a scheduler, or a UNet folder's own config.json, leaves the schedule as it is.

    Args:
      pipeline: gives the autoencoder, text encoder and tokenizer.
      path, config, dtype: as for `load_unet`.
      prediction_type: "epsilon" or "v_prediction", in place of what the schedule says.

    Raises FileNotFoundError and ValueError as `load_unet`; ValueError if the UNet does not fit the other parts.
    """
    return _with_unet(pipeline, find_unet(path, config), dtype, prediction_type)


def _with_unet(pipeline: Pipeline, unet: UNetFile, dtype: Any, prediction_type: str | None) -> Pipeline:
    schedule = unet.schedule(pipeline.schedule.to_config(), prediction_type)
    if schedule.to_config() == pipeline.schedule.to_config():
        schedule = pipeline.schedule
    texts = pipeline.text_encoder, pipeline.tokenizer, pipeline.text_encoder_2, pipeline.tokenizer_2
    check_parts(unet.module, pipeline.vae, *texts, whole=True)
    params = pipeline.params | {"unet": unet.load(dtype)}
    return dataclasses.replace(pipeline, unet=unet.module, schedule=schedule, params=params)
