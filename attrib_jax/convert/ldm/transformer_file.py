"""SD 3, SD 3.5 and FLUX.1 in one file: a transformer that replaces a folder's, or a whole Stable Diffusion 3 model."""

import dataclasses
import logging
import os
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from attrib_jax.convert.config_files import read_json
from attrib_jax.convert.families import check_transformer
from attrib_jax.convert.ldm import configs as ldm_configs
from attrib_jax.convert.ldm.names import UNET, VAE, unpack, vae_table
from attrib_jax.convert.ldm.transformers import (
    FLUX,
    SD3,
    is_original,
    transformer_config,
    transformer_kind,
    transformer_table,
)
from attrib_jax.convert.parts import abstract_part_params, build_module, build_schedule
from attrib_jax.convert.transformer_folder import DENOISERS, abstract_module, load_tokenizer_of, read_module_config
from attrib_jax.convert.transformer_pipeline import FAMILIES, TransformerPipeline, tokenizer_of
from attrib_jax.convert.weights.files import find_weights, open_weights
from attrib_jax.convert.weights.names import name_table, t5_names
from attrib_jax.convert.weights.state_dicts import load_params
from attrib_jax.convert.weights.tensors import LazyTensor, Tensor
from attrib_jax.core.checks import raise_problems
from attrib_jax.models.clip import CLIPTextProjectionConfig
from attrib_jax.models.t5 import T5Config

_log = logging.getLogger(__name__)

_TRANSFORMER = "transformer"
_STEM = "diffusion_pytorch_model"
# The text encoders of Stable Diffusion 3, by part.
_ENCODERS = {
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.clip_g.transformer.",
    "text_encoder_3": "text_encoders.t5xxl.transformer.",
}
_OTHER_PARTS = (VAE, "vae.", "text_encoders.", "cond_stage_model.")
_UNUSED = (
    r"(.*\.)?(logit_scale|position_ids)|text_encoders\.t5xxl\.transformer\.encoder\.embed_tokens\.weight"
    # diffusers takes the identity, with which the model was trained, whatever a file has here.
    r"|text_encoders\.clip_l\.transformer\.text_projection(\.weight)?"
)
# What no shape tells of the published models.
_SD3_SIZE = 128
_SD3_VAE = {"scaling_factor": 1.5305, "shift_factor": 0.0609}
_SD3_SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}


class TransformerFile(NamedTuple):
    """A transformer that replaces a folder's own, before its weights are read.

    Attributes:
      module: built from its config.
      state: diffusers name -> tensor.
      source: what error messages call it.
    """

    module: Any
    state: Mapping[str, Tensor]
    source: str

    def load(self, dtype: Any) -> Any:
        """The parameters."""
        return load_params(self.state, abstract_module(self.module), dtype, source=self.source)


def find_transformer(
    path: str, model: str, class_name: str, config: str | Mapping[str, Any] | None = None
) -> TransformerFile:
    """Finds the transformer that stands in for that of a pipeline folder.

    Args:
      path: a file, under the names of the original code (SD 3 and FLUX.1), with or without `model.diffusion_model.`, or
        of diffusers; or a folder of diffusers' transformer. Other parts in a file are left out.
      model: the pipeline folder.
      class_name: its class.
      config: content of the transformer's config.json, or its file. If not given, the folder's own, or for a file that
        of `model` with what the shapes in the file say in its place.

    Raises:
      FileNotFoundError: `path` does not exist.
      ValueError: the file is of another family, or has tensors that are unknown, missing or misshaped.
    """
    path = os.fspath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"unet {path!r} does not exist; give a transformer's folder or a weight file")
    file = find_weights(path, _STEM) if os.path.isdir(path) else path
    tensors = open_weights(file)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    check_transformer(shapes, file)
    state, others = _split_parts(tensors)
    unknown = [name for name in others if not name.startswith(_OTHER_PARTS)]
    raise_problems(f"{file} holds more than a transformer:", {"unexpected": unknown})
    if others:
        _log.info("%s: left out %d tensors of other parts; they are those of %s", file, len(others), model)
    module_class, config_class = DENOISERS[class_name]
    kind = transformer_kind(state)
    if kind not in (class_name, None) or (kind is None and class_name in (SD3, FLUX)):
        what = "no transformer of a known family" if kind is None else f"a transformer of {FAMILIES[kind].name}"
        raise ValueError(f"unet is {path}, {what}, but model {model!r} is {FAMILIES[class_name].name}; give one of it")
    if config is None:
        own = os.path.join(path if os.path.isdir(path) else os.path.join(model, _TRANSFORMER), "config.json")
        content = read_json(own) if os.path.isfile(own) else {}
        source = own
    else:
        content = dict(config) if isinstance(config, Mapping) else read_json(os.fspath(config))
        source = "unet_config" if isinstance(config, Mapping) else os.fspath(config)
    original = is_original(state)
    if original and config is None:
        assert kind is not None  # by `is_original`
        content, source = content | transformer_config(kind, {n: x.shape for n, x in state.items()}, file), file
    module = module_class(read_module_config(config_class, content, source))
    if original:
        state = _unpacked(state, module, file)
    return TransformerFile(module, state, file)


def load_transformer_file(
    path: str,
    tensors: Mapping[str, Tensor],
    tokenizer: str | None,
    dtype: Any = jnp.float32,
    config: Mapping[str, Mapping[str, Any]] | None = None,
) -> TransformerPipeline:
    """Reads a Stable Diffusion 3 or 3.5 checkpoint with its text encoders and autoencoder in the original naming.

    T5 may be missing, as in diffusers. The projection of the first text encoder is the identity, as there.

    Args:
      path: the file.
      tensors: what it holds.
      tokenizer: a pipeline folder of the family, with tokenizer/, tokenizer_2/ and, for T5, tokenizer_3/ in it.
      dtype: dtype of the loaded parameters.
      config: entries that tensor shapes cannot determine, in the form of `load_single_file`, with `transformer` for
        `unet`.

    Raises:
      FileNotFoundError: tokenizers are missing.
      ValueError: the file lacks parts, which it names with the way out, or does not fit.
    """
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    check_transformer(shapes, path)
    kind = transformer_kind(shapes)
    present = [part for part, prefix in _ENCODERS.items() if any(name.startswith(prefix) for name in shapes)]
    absent = [part for part in ("text_encoder", "text_encoder_2") if part not in present]
    state, others = _split_parts(tensors)
    has_vae = any(name.startswith(VAE) for name in shapes)
    if kind != SD3 or absent or not has_vae or not is_original(state):
        assert kind is not None  # the caller's reason to call
        lacking = "its text encoders and autoencoder" if kind != SD3 else ", ".join(
            [*(f"{part} ({_ENCODERS[part]}*)" for part in absent), *([] if has_vae else [f"vae ({VAE}*)"])]
        )  # fmt: skip
        raise ValueError(
            f"{path} holds a transformer of {FAMILIES[kind].name} without {lacking or 'the original names'}: give the "
            "folder of its base model in the diffusers layout as model (--model), and this file as unet (--unet)"
        )
    if tokenizer is None:
        raise ValueError(
            f"{path} holds no tokenizers: give tokenizer=FOLDER, a pipeline folder of Stable Diffusion 3 with "
            "tokenizer/, tokenizer_2/ and tokenizer_3/ in it"
        )
    encoders = [part for part in _ENCODERS if part in present]
    folders = {tokenizer_of(part): os.path.join(os.fspath(tokenizer), tokenizer_of(part)) for part in encoders}
    missing = [folder for folder in folders.values() if not os.path.isdir(folder)]
    if missing:
        raise FileNotFoundError(f"tokenizer {tokenizer!r} lacks {', '.join(missing)}; give a whole pipeline folder")
    given = _check_config(config, (_TRANSFORMER, "vae", *encoders, "scheduler"))
    configs = _configs(shapes, {name: tensor.shape for name, tensor in state.items()}, encoders, path)
    merged = {part: content | given[part] for part, content in configs.items()}
    modules = _modules(merged, path)
    schedule = build_schedule({**_SD3_SCHEDULER, **given["scheduler"]}, None, f"{path} (scheduler)")
    contents: dict[str, Mapping[str, Tensor]] = {_TRANSFORMER: _unpacked(state, modules[_TRANSFORMER], path)}
    table = vae_table(modules["vae"].config, name_table(abstract_part_params("vae", modules["vae"])))
    known = set(table)
    raise_problems(f"{path} does not hold a whole autoencoder:", {"missing": [n for n in table if n not in tensors]})
    contents["vae"] = unpack(tensors, table, path)
    for part in encoders:
        own = {name: x for name, x in tensors.items() if name.startswith(_ENCODERS[part])}
        known |= own.keys()
        content: dict[str, Tensor] = {
            name.removeprefix(_ENCODERS[part]): x for name, x in own.items() if not re.fullmatch(_UNUSED, name)
        }
        if part == "text_encoder":
            content["text_projection.weight"] = np.eye(modules[part].config.hidden_size, dtype=np.float32)
        contents[part] = t5_names(content) if part == "text_encoder_3" else content
    unknown = [name for name in others if name not in known and not re.fullmatch(_UNUSED, name)]
    raise_problems(f"{path} holds more than a Stable Diffusion 3 model:", {"unexpected": unknown})
    if "text_encoder_3" not in encoders:
        _log.warning("%s: the model has no text_encoder_3; zeros stand for its text states, as in diffusers", path)
    tokenizers = {}
    for part in encoders:
        tokens = load_tokenizer_of(folders[tokenizer_of(part)], modules[part])
        if part != "text_encoder_3":
            # The pooled text is read off at the end token.
            ids = {f"{kind}_token_id": getattr(tokens, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
            settled = dataclasses.replace(modules[part].config, **(ids | _named(given[part], ids)))
            modules[part] = modules[part].clone(config=settled)
        tokenizers[tokenizer_of(part)] = tokens
    params = {}
    for part, tensors_of_part in contents.items():
        abstract = abstract_part_params("vae", modules[part]) if part == "vae" else abstract_module(modules[part])
        params[part] = load_params(tensors_of_part, abstract, dtype, f"{path} ({part})")
    params["unet"] = params.pop(_TRANSFORMER)
    unet = modules.pop(_TRANSFORMER)
    return TransformerPipeline(
        unet=unet, **modules, **tokenizers, schedule=schedule, params=params, class_name=SD3
    )  # fmt: skip


def _named(content: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: content[name] for name in names if name in content}


def _split_parts(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The transformer's tensors without a prefix, and all others."""
    if any(name.startswith(UNET) for name in tensors):
        state = {name.removeprefix(UNET): x for name, x in tensors.items() if name.startswith(UNET)}
        return state, {name: x for name, x in tensors.items() if not name.startswith(UNET)}
    others = {name: x for name, x in tensors.items() if name.startswith(_OTHER_PARTS)}
    return {name: x for name, x in tensors.items() if name not in others}, others


def _unpacked(state: Mapping[str, Tensor], module: Any, source: str) -> dict[str, LazyTensor]:
    table = transformer_table(module.config, name_table(abstract_module(module)))
    raise_problems(
        f"{source} does not hold the transformer that its config describes:",
        {
            "missing": [name for name in table if name not in state],
            "unexpected": [f"{name} {tuple(x.shape)}" for name, x in state.items() if name not in table],
        },
    )
    return unpack(state, table, source)


def _configs(
    shapes: ldm_configs.Shapes, transformer: ldm_configs.Shapes, encoders: Collection[str], source: str
) -> dict[str, dict[str, Any]]:
    configs = {
        _TRANSFORMER: transformer_config(SD3, transformer, source) | {"sample_size": _SD3_SIZE},
        "vae": ldm_configs.vae_config(shapes, _SD3_SIZE, source) | _SD3_VAE,
    }
    for part, activation in (("text_encoder", "quick_gelu"), ("text_encoder_2", "gelu")):
        content = ldm_configs.clip_config(shapes, f"{_ENCODERS[part]}text_model.", source)
        projection = content["hidden_size"]
        if part == "text_encoder_2":
            name = f"{_ENCODERS[part]}text_projection.weight"
            projection = ldm_configs.shape_of(shapes, name, 2, source)[0]
        configs[part] = content | {"hidden_act": activation, "projection_dim": projection}
    if "text_encoder_3" in encoders:
        configs["text_encoder_3"] = _t5_config(shapes, _ENCODERS["text_encoder_3"], source)
    return configs


def _t5_config(shapes: ldm_configs.Shapes, prefix: str, source: str) -> dict[str, Any]:
    block = f"{prefix}encoder.block.0.layer"
    attention = f"{block}.0.SelfAttention"
    vocab_size, width = ldm_configs.shape_of(shapes, f"{prefix}shared.weight", 2, source)
    buckets, heads = ldm_configs.shape_of(shapes, f"{attention}.relative_attention_bias.weight", 2, source)
    return {
        "vocab_size": vocab_size,
        "d_model": width,
        "d_kv": ldm_configs.shape_of(shapes, f"{attention}.q.weight", 2, source)[0] // heads,
        "d_ff": ldm_configs.shape_of(shapes, f"{block}.1.DenseReluDense.wi_0.weight", 2, source)[0],
        "num_layers": ldm_configs.count_modules(ldm_configs.module_paths(shapes, prefix), f"{prefix}encoder.block"),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu",
    }


def _modules(configs: Mapping[str, Mapping[str, Any]], source: str) -> dict[str, Any]:
    module_class, config_class = DENOISERS[SD3]
    classes: dict[str, Any] = {
        "text_encoder": CLIPTextProjectionConfig,
        "text_encoder_2": CLIPTextProjectionConfig,
        "text_encoder_3": T5Config,
    }
    modules = {}
    for part, content in configs.items():
        where = f"{source} ({part})"
        if part == "vae":
            modules[part] = build_module("vae", content, where)
        elif part == _TRANSFORMER:
            modules[part] = module_class(read_module_config(config_class, content, where))
        else:
            if part != "text_encoder_3" and content["num_attention_heads"] is None:
                raise ValueError(
                    f"{where}: shapes cannot determine its num_attention_heads; give it as config of load_single_file, "
                    f"or in a json file as model_config (--model_config): {{'{part}': {{'num_attention_heads': ...}}}}"
                )
            modules[part] = FAMILIES[SD3].encoders[part](read_module_config(classes[part], content, where))
    return modules


def _check_config(config: Mapping[str, Mapping[str, Any]] | None, parts: Collection[str]) -> dict[str, dict[str, Any]]:
    unknown = sorted(set(config or {}) - set(parts))
    if unknown:
        raise ValueError(f"config has the parts {', '.join(unknown)}; expected some of {', '.join(parts)}")
    return {part: dict((config or {}).get(part, {})) for part in parts}
