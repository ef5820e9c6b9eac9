"""Custom Diffusion: reading its files into a pipeline, and writing a fine-tuned pipeline in their layout.

A folder holds `pytorch_custom_diffusion_weights.bin` (diffusers' name; `.pt` in the Customized-Model benchmark,
`.safetensors` too) and one `<new1>.bin` a learnt token. The weights are values that replace those of the base model,
not differences: diffusers' CustomDiffusionAttnProcessor has layers of its own that run in place of the attention's.
"""

import dataclasses
import logging
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from attrib_jax.convert.adapters.files import (
    check_finite_as,
    open_adapter,
    pick_file,
    read_floats,
    write_adapter,
)
from attrib_jax.convert.adapters.textual_inversion import (
    add_tokens,
    read_token_file,
    read_tokens,
    split_tokens,
    token_vectors,
    write_token_file,
)
from attrib_jax.convert.pipeline import Pipeline
from attrib_jax.convert.weights.names import from_torch, name_table, to_torch, torch_shape
from attrib_jax.convert.weights.tensors import LazyTensor
from attrib_jax.core.checks import raise_problems
from attrib_jax.core.weights import flatten_names, unflatten_names

_log = logging.getLogger(__name__)

_STEM = "pytorch_custom_diffusion_weights"
_SUFFIXES = (".pt", ".bin", ".safetensors")
_TOKEN_FILE = re.compile(r"<[^/\0]+>(\.pt|\.bin|\.safetensors)")
_PROJECTION = re.compile(r"(?P<layer>.+\.attn[12])\.(?P<leaf>to_(?:[qkv]|out\.0)\.(?:weight|bias))")
_KEY_VALUE = ("to_k.weight", "to_v.weight")
_QUERY_OUT = ("to_q.weight", "to_out.0.weight", "to_out.0.bias")
_PROCESSOR = re.compile(r"\.processor\.(to_[qkv]|to_out)_custom_diffusion\.")
# What the original latent-diffusion code calls the parts of a model, and Custom Diffusion its tokens there.
_ORIGINAL_NAMES = ("model.diffusion_model.", "cond_stage_model.", "embed")


def apply_custom_diffusion(pipeline: Pipeline, path: str) -> Pipeline:
    """A pipeline with the weights and tokens of a Custom Diffusion model; `pipeline`, its base, stays as it is.

    Args:
      pipeline: the base model that was fine-tuned.
      path: a weight file, or a folder in the layout above, whose `<...>` token files are added too. Forms of the weight
        file, PyTorch or safetensors, each with or without a leading `unet.`:
          diffusers' `save_attn_procs`: `...attn2.processor.to_k_custom_diffusion.weight`, `to_v...`, and where query
            and output were trained `to_q_custom_diffusion.weight`, `to_out_custom_diffusion.0.weight` and `.bias`; an
            attention layer that was not trained is an empty entry `...attn1.processor`;
          a UNet state dict of those layers alone: `...attn2.to_k.weight`. This is the `.pt` of the Customized-Model
            benchmark, whose code reads it with `load_state_dict(strict=False)`;
          the delta file of Custom Diffusion's own diffusers code: `{"unet": ..., "modifier_token": {token: tensor}}`,
            names as in the second form. Its tokens are added. A compressed one has `{"u": (out, r), "v": (r, in)}` in
            place of a matrix, and this is a difference: base + u @ v.
        Keys and values of every cross-attention layer must be there, as in all files that these programs write.

    Raises:
      FileNotFoundError: the file is missing, or the folder has no weight file.
      ValueError: the file is damaged or for another model (unknown, missing and misshaped names are all listed), or a
        token exists already or does not fit.
    """
    path = os.fspath(path)
    weights = pick_file(path, [_STEM + suffix for suffix in _SUFFIXES])
    tensors, entries = split_tokens(open_adapter(weights)[0])
    tokens = token_vectors(tensors, weights) if tensors else {}
    if os.path.isdir(path):
        for name in sorted(filter(_TOKEN_FILE.fullmatch, os.listdir(path))):
            found = read_token_file(os.path.join(path, name))
            both = sorted(found.keys() & tokens.keys())
            if both:
                raise ValueError(f"folder {path} holds the token {both[0]!r} twice, also in {name}; keep one of them")
            tokens |= found
    flat = flatten_names(pipeline.params["unet"])
    replaced = _replacements(entries, flat, weights)
    matrices = sum(leaf.ndim == 2 for leaf in replaced.values())
    values = sum(leaf.size for leaf in replaced.values())
    _log.info("%s replaces %d matrices, %d values, and adds %d tokens", weights, matrices, values, len(tokens))
    params = pipeline.params | {"unet": unflatten_names({**flat, **replaced})}
    return add_tokens(dataclasses.replace(pipeline, params=params), tokens)


def _replacements(entries: Mapping[str, LazyTensor], flat: dict[str, Any], path: str) -> dict[str, Any]:
    """The new UNet leaves by Flax path."""
    if any(name.startswith(_ORIGINAL_NAMES) for name in entries):
        raise ValueError(
            f"{path} has the names of the original latent-diffusion code; convert it with Custom Diffusion's "
            "convert.py --mode compvis-to-diffuser"
        )
    table = _projections(flat)
    layers = {_layer(name) for name in table}
    shapes = {name: torch_shape(leaf, flat[leaf].shape) for name, leaf in table.items()}
    unknown, repeated, misshaped = [], [], []
    found: dict[str, dict[str, LazyTensor]] = {}
    for key, tensor in entries.items():
        name = _PROCESSOR.sub(r".\1.", key.removeprefix("unet."))
        factor = name[-1] if name[-2:] in (".u", ".v") and name[:-2] in table else ""
        name = name[:-2] if factor else name
        if 0 in tensor.shape and name.removesuffix(".processor") in layers:
            continue
        if name not in table:
            unknown.append(key)
            continue
        parts = found.setdefault(name, {})
        if factor in parts or (parts and "" in (factor, *parts)):
            repeated.append(key)
        elif not factor and tensor.shape != shapes[name]:
            misshaped.append(f"{key}: file {tensor.shape}, model {shapes[name]}")
        parts[factor] = tensor
    for name, parts in found.items():
        if "" not in parts and not _is_product(parts, shapes[name]):
            sizes = ", ".join(f"{factor} {tensor.shape}" for factor, tensor in parts.items())
            misshaped.append(f"{name}: file {sizes}; model (out, r) and (r, in) of {shapes[name]}")
    wanted = {layer for layer in layers if layer.endswith(".attn2")} | {_layer(name) for name in found}
    missing = [f"{layer}.{leaf}" for layer in wanted for leaf in _KEY_VALUE if f"{layer}.{leaf}" not in found]
    hint = " Files of LoRA are for merge_lora." if any("lora" in name for name in unknown) else ""
    raise_problems(
        f"{path} does not fit the attention layers of this UNet.{hint}",
        {"unknown": unknown, "repeated": repeated, "misshaped": misshaped, "missing": missing},
    )
    replaced = {}
    for name, parts in found.items():
        leaf = flat[table[name]]
        array = {factor: read_floats(tensor, path, name) for factor, tensor in parts.items()}
        if "" in array:
            new = from_torch(table[name], array[""])
        else:
            change = array["u"].astype(np.float64) @ array["v"].astype(np.float64)
            new = np.asarray(leaf, np.float64) + from_torch(table[name], change)
        check_finite_as(new, leaf.dtype, path, name)
        replaced[table[name]] = jax.device_put(new.astype(leaf.dtype))
    return replaced


def _is_product(parts: Mapping[str, LazyTensor], shape: tuple[int, ...]) -> bool:
    if parts.keys() != {"u", "v"} or any(tensor.ndim != 2 for tensor in parts.values()):
        return False
    (rows, rank), (inner, columns) = parts["u"].shape, parts["v"].shape
    return rank == inner and (rows, columns) == shape


def _projections(flat: dict[str, Any]) -> dict[str, str]:
    """PyTorch name -> Flax path of every weight and bias in the attention layers."""
    table = name_table(unflatten_names(flat))
    return {name: path for name, path in table.items() if _PROJECTION.fullmatch(name)}


def _layer(name: str) -> str:
    return _PROJECTION.fullmatch(name)["layer"]


def save_custom_diffusion(
    pipeline: Pipeline,
    base: Pipeline,
    folder: str,
    tokens: Iterable[str] = (),
    suffix: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes what fine-tuning changed, in the layout that PyTorch diffusers reads.

    There `pipe.unet.load_attn_procs(folder, weight_name="pytorch_custom_diffusion_weights.pt", _pipeline=pipe)` and
    `pipe.load_textual_inversion(folder, weight_name="<new1>.bin")` load it (diffusers 0.42 without `_pipeline` reads
    the weights and leaves them unused); here `apply_custom_diffusion(base, folder)`. As in diffusers' own files every
    cross-attention layer has its keys and values, and where they changed its query and output; self-attention
    layers are there only where they changed, else they are empty entries. All is float32.

    Args:
      pipeline: the fine-tuned model.
      base: the model that it started from.
      folder: made if need be.
      tokens: names of the learnt tokens, one file each; their vectors are rows of the pipeline's text encoder.
      suffix: suffix of the weight file: ".pt" or ".bin", with token files ".bin", or ".safetensors" for all of them;
        None takes ".pt" where PyTorch is installed, else ".safetensors".
      overwrite: replace the Custom Diffusion files that are in the folder.

    Raises:
      FileExistsError: the folder holds such files and `overwrite` is off.
      ValueError: the two differ in weights that the layout has no place for, or in none that it has; or a token was not
        added to the pipeline or cannot name a file.
    """
    suffix = _checked_suffix(suffix)
    vectors = read_tokens(pipeline, tokens)
    odd = [token for token in vectors if not _TOKEN_FILE.fullmatch(f"{token}.bin")]
    if odd:
        raise ValueError(f"token {odd[0]!r} cannot name a file of this layout; expected a name such as '<new1>'")
    content = _processor_entries(pipeline, _changed(pipeline, base, vectors))

    os.makedirs(folder, exist_ok=True)
    weights = [_STEM + known for known in _SUFFIXES]
    old = {name for name in os.listdir(folder) if name in weights or _TOKEN_FILE.fullmatch(name)}
    if old and not overwrite:
        raise FileExistsError(f"{folder} holds {', '.join(sorted(old))}; pass overwrite=True, or name another folder")
    files = {token: f"{token}.bin" if suffix != ".safetensors" else f"{token}.safetensors" for token in vectors}
    write_adapter(content, os.path.join(folder, _STEM + suffix))
    for token, vector in vectors.items():
        write_token_file(token, vector, os.path.join(folder, files[token]))
    for name in old - {_STEM + suffix, *files.values()}:
        os.remove(os.path.join(folder, name))


def _checked_suffix(suffix: str | None) -> str:
    if suffix is not None and suffix not in _SUFFIXES:
        raise ValueError(f"suffix is {suffix!r}; expected one of {', '.join(_SUFFIXES)}")
    if suffix == ".safetensors":
        return suffix
    try:
        import torch  # noqa: F401
    except ImportError as error:
        if suffix is None:
            return ".safetensors"
        raise ValueError(
            f"suffix={suffix!r} needs PyTorch: pip install torch, or pass suffix='.safetensors' ({error})"
        ) from error
    return suffix or ".pt"


def _changed(pipeline: Pipeline, base: Pipeline, tokens: Iterable[str]) -> set[str]:
    """The PyTorch names of the attention weights that differ; raises for a difference that the layout cannot hold."""
    table = {path: name for name, path in _projections(flatten_names(pipeline.params["unet"])).items()}
    added = pipeline.tokenizer.get_added_vocab()
    rows = [added[token] for token in tokens]
    changed, lost = set(), []
    for part in ("unet", "vae", "text_encoder"):
        flat, base_flat = flatten_names(pipeline.params[part]), flatten_names(base.params[part])
        lost += [f"{part}/{path}" for path in flat.keys() ^ base_flat.keys()]
        for path in flat.keys() & base_flat.keys():
            new, old = np.asarray(flat[path]), np.asarray(base_flat[path])
            if path.endswith("token_embedding/embedding"):
                new, old = np.delete(new, rows, axis=0), np.delete(old, [row for row in rows if row < len(old)], axis=0)
            if np.array_equal(new, old):
                continue
            if part == "unet" and path in table and new.shape == old.shape:
                changed.add(table[path])
            else:
                lost.append(f"{part}/{path}")
    raise_problems(
        "the pipeline differs from its base in weights that Custom Diffusion files have no place for; save it with "
        "save_pipeline, or name all of its learnt tokens in `tokens`",
        {"lost": lost},
    )
    if not changed:
        raise ValueError("pipeline has the same attention weights as base; give the model that was fine-tuned")
    return changed


def _processor_entries(pipeline: Pipeline, changed: set[str]) -> dict[str, Any]:
    """The state dict of diffusers' attention processors."""
    flat = flatten_names(pipeline.params["unet"])
    table = _projections(flat)
    entries: dict[str, Any] = {}
    for layer in dict.fromkeys(map(_layer, table)):
        touched = {name.removeprefix(f"{layer}.") for name in changed if _layer(name) == layer}
        leaves = _KEY_VALUE if touched or layer.endswith(".attn2") else ()
        if touched.intersection(_QUERY_OUT):
            leaves += _QUERY_OUT
        for leaf in leaves:
            path = table[f"{layer}.{leaf}"]
            name = re.sub(r"(to_[qkv]|to_out)", r"\1_custom_diffusion", leaf)
            entries[f"{layer}.processor.{name}"] = to_torch(path, np.asarray(flat[path], np.float32))
        if not leaves:
            entries[f"{layer}.processor"] = {}
    return entries
