"""LoRA, LoHa, LoKr and DoRA files, merged into a pipeline's weights, or a LoRA's factors kept apart.

A LoRA adds scale * (alpha / rank) * up @ down to a weight W (Hu et al. 2021, eq. 3, with the scaling of PEFT and
diffusers). Without an alpha, alpha is the rank. The other forms are those of `lora_forms`.
"""

import collections
import dataclasses
import logging
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attrib_jax.convert.adapters import lora_forms
from attrib_jax.convert.adapters.files import check_finite_as, read_floats, write_adapter
from attrib_jax.convert.adapters.lora_files import LORA_FILE, WeightChange, read_lora
from attrib_jax.convert.pipeline import Pipeline
from attrib_jax.convert.weights.names import from_torch, to_torch, torch_name
from attrib_jax.core.weights import flatten_names, unflatten_names
from attrib_jax.models.low_rank import DOWN, UP, LowRank

_log = logging.getLogger(__name__)


def merge_lora(pipeline: Pipeline, path: str | Sequence[str], scale: float | Sequence[float] = 1.0) -> Pipeline:
    """A pipeline with W + scale * (alpha / rank) * up @ down in place of every weight W that a LoRA file names.

    It is computed in float64 and rounded once to the weight's dtype. Linear layers and convolutions of the denoiser and
    the text encoders are merged; several files add up, as with diffusers' `set_adapters`. Forms of the keys:
      `unet.<module>.lora_A.weight` / `lora_B` (PEFT, diffusers today), `unet.<module>.lora.down.weight` / `up`,
      `<attention>.processor.to_k_lora.down.weight` / `up` (`to_out_lora` is `to_out.0`), with or without `unet.`;
      `text_encoder.<module>.lora_A.weight`, `.lora_linear_layer.down.weight`, `.to_q_lora.down.weight`, each with or
      without the `text_model.` level;
      `base_model.model.<module>.lora_A.weight` with an `adapter_config.json` beside the file (PEFT's own);
      kohya's `lora_unet_<module with _ for .>.lora_down.weight`, `lora_te_...`, `lora_te1_...`, over diffusers' module
      names or those of the original code (`input_blocks_1_1_...`, `double_blocks_0_img_attn_qkv`).
    Where the denoiser is a transformer, `transformer.` stands for `unet.`, and `lora_transformer_` may for
    `lora_unet_`; the original names of SD 3 and FLUX.1 may have dots too, with `diffusion_model.` or without. Of their
    matrices that hold several weights each weight takes its rows.
    In each of them `hada_...` (LoHa) and `lokr_...` (LoKr) may stand for the two factors, and a `dora_scale` or
    `lora_magnitude_vector` (DoRA) beside them: the weight is then m (W + D) / ||W + D||, D the scaled change, as PEFT
    has it.
    Alphas are read from `.alpha` entries, or from the adapter metadata in the header of diffusers' safetensors files.

    Args:
      pipeline: the base model; it stays as it is.
      path: the file, or a folder with `pytorch_lora_weights.safetensors` or `.bin`; or several.
      scale: strength, 1 as trained, 0 for none; one for all files, or one for each.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: `scale` is not finite or not one for each file; a file is damaged, or has keys that are no LoRA of
        this model, parts of a change, or factors of other shapes: all are listed.
    """
    found = [(*read_lora(file, pipeline), strength) for file, strength in scaled_files(path, scale)]
    return _merged(pipeline, found)


def attach_lora(pipeline: Pipeline, path: str | Sequence[str], scale: float | Sequence[float] = 1.0) -> Pipeline:
    """A pipeline that computes as that of `merge_lora`, with the denoiser's LoRA factors beside the weights: what
    `select_weights(params, "lora")` selects and `--weights=lora` moves.

    A layer's factors are `lora_A/kernel` and `lora_B/kernel`, see `LowRank`; B holds scale * alpha / rank. Factors of
    several files for one layer lie side by side, so that their products add up. What files change in text encoders
    is merged: it decides the conditioning, and is not moved.

    Args:
      pipeline: the base model; it stays as it is.
      path, scale: as in `merge_lora`.

    Raises as `merge_lora`, and ValueError where a scale is 0, or a file has no factors of the denoiser, or such of
    another form than `down` and `up`, which do not make a LoRA that can be moved.
    """
    found = [(*read_lora(file, pipeline), strength) for file, strength in scaled_files(path, scale)]
    flat = flatten_names(pipeline.params["unet"])
    parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = collections.defaultdict(list)
    for file, changes, strength in found:
        own = {module: change for (part, module), change in changes.items() if part == "unet"}
        if strength == 0 or not own:
            what = "its scale is 0" if strength == 0 else "it has none for the denoiser"
            raise ValueError(f"the factors of {file} cannot be kept apart to be moved: {what}. Leave the file out.")
        for module, change in own.items():
            if change.tensors.keys() != {"down", "up"}:
                roles = ", ".join(sorted(change.tensors))
                raise ValueError(
                    f"{file} keeps the change of unet.{module} as {roles}; only the two factors of a plain LoRA can be "
                    "moved. Choose other weights than 'lora', and the file is merged."
                )
            parts[change.leaf].append(_factors(file, module, change, strength, flat[change.leaf].ndim))
    for leaf, pairs in parts.items():
        layer = leaf.removesuffix("/kernel")
        flat[f"{layer}/{DOWN}/kernel"] = jnp.concatenate([down for down, _ in pairs], axis=-1)
        flat[f"{layer}/{UP}/kernel"] = jnp.concatenate([up for _, up in pairs], axis=-2)
    texts = [(file, {at: x for at, x in changes.items() if at[0] != "unet"}, scale) for file, changes, scale in found]
    unet: Any = LowRank(pipeline.unet)
    params = _merged(pipeline, texts).params | {"unet": unflatten_names(flat)}
    _log.info("%d layers with LoRA factors of their own", len(parts))
    return dataclasses.replace(pipeline, unet=unet, params=params)


def read_factors(path: str, pipeline: Pipeline) -> dict[str, Any]:
    """The factors of a file that `save_lora` wrote, by part as it takes them; raises as `merge_lora`."""
    file, changes = read_lora(path, pipeline)
    flat: dict[str, dict[str, np.ndarray]] = collections.defaultdict(dict)
    for (part, module), change in changes.items():
        ndim = flatten_names(pipeline.params[part])[change.leaf].ndim
        layer = change.leaf.removesuffix("/kernel")
        pair = _factors(file, module, change, 1.0, ndim)
        flat[part] |= {f"{layer}/{side}/kernel": factor for side, factor in zip((DOWN, UP), pair, strict=True)}
    return {part: unflatten_names(tree) for part, tree in flat.items()}


def _factors(file: str, module: str, change: WeightChange, scale: float, ndim: int) -> tuple[np.ndarray, np.ndarray]:
    """The two factors of a layer in our layout, float32, with their strength in the second."""
    down, up = (read_floats(change.tensors[role], file, f"unet.{module} {role}") for role in ("down", "up"))
    if change.block is not None:
        down, up = _own_ranks(down, up, *change.block)
    # Those of a 1x1 convolution may be written as those of a linear layer, and the reverse.
    down = down.reshape(*down.shape[:2], *down.shape[2:ndim] or [1] * (ndim - 2))
    up = up.reshape(*up.shape[:2], *[1] * (ndim - 2)) * (scale * change.strength)
    return from_torch("kernel", down.astype(np.float32)), from_torch("kernel", up.astype(np.float32))


def _own_ranks(down: np.ndarray, up: np.ndarray, number: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The ranks that act on one of `count` weights, where each was trained with ranks of its own.

    Programs that train them apart and store one pair put zeros elsewhere (diffusers' `_convert_kohya_flux_lora`).
    """
    size = len(down) // count
    own = slice(number * size, (number + 1) * size)
    if count == 1 or len(down) % count or np.any(np.delete(up, np.r_[own], axis=1)):
        return down, up
    return down[own], up[:, own]


def _merged(pipeline: Pipeline, found: Sequence[tuple[str, Mapping[tuple[str, str], WeightChange], float]]) -> Pipeline:
    """The pipeline with the changes of files, which go with a scale each."""
    trees = {part: flatten_names(tree) for part, tree in pipeline.params.items()}
    # The change of a DoRA depends on the weight: all are taken of the base's, so that their order plays no role.
    entries: dict[tuple[str, str], list[Any]] = collections.defaultdict(list)
    for file, changes, strength in found:
        for (part, module), change in changes.items():
            entries[part, change.leaf].append((file, f"{part}.{module}", change, strength))
        ranks = sorted({rank for change in changes.values() if (rank := lora_forms.rank(change.shapes)) is not None})
        _log.info("%s merged into %d weights, scale %g, rank %s", file, len(changes), strength, ranks)
    for (part, leaf), all_changes in entries.items():
        weight = trees[part][leaf]
        base = to_torch(leaf, np.asarray(weight, np.float64))
        merged = base + sum(_change(base, *entry) for entry in all_changes)
        file, module, _, strength = all_changes[-1]
        check_finite_as(merged, weight.dtype, file, f"{module} merged with scale={strength}")
        trees[part][leaf] = jax.device_put(from_torch(leaf, merged).astype(weight.dtype))
    return dataclasses.replace(pipeline, params={part: unflatten_names(tree) for part, tree in trees.items()})


def save_lora(factors: Mapping[str, Any], folder: str | os.PathLike, denoiser: str = "unet") -> str:
    """Writes factors as `<folder>/pytorch_lora_weights.safetensors` -> path; diffusers' `load_lora_weights` reads it.

    Args:
      factors: part (`unet`, also for a transformer, `text_encoder`) -> tree of `lora_A/kernel` and `lora_B/kernel` by
        layer. B holds the strength, so the file needs no alpha: every reader takes the rank for it. The names are
        PEFT's.
      folder: made if need be; a file that is there is replaced.
      denoiser: what the file calls the part `unet`, see `denoiser_part`.
    """
    tensors = {
        f"{denoiser if part == 'unet' else part}.{torch_name(path)}": to_torch(path, np.asarray(leaf, np.float32))
        for part, tree in factors.items()
        for path, leaf in flatten_names(tree).items()
    }
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, LORA_FILE)
    write_adapter(tensors, path)
    return path


def scaled_files(path: str | Sequence[str], scale: float | Sequence[float]) -> list[tuple[str, float]]:
    """Files with their scales; ValueError where a scale is not finite, or they are not one for each file."""
    paths = [path] if isinstance(path, str) else list(path)
    scales: list[Any] = list(scale) if isinstance(scale, (list, tuple)) else [scale] * len(paths)
    for value in scales:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"scale is {value!r}: expected a finite number, such as 1.0")
    scales = scales * len(paths) if len(scales) == 1 else scales
    if len(scales) != len(paths):
        raise ValueError(f"scale has {len(scales)} numbers for {len(paths)} LoRA files: expected one, or one for each")
    return list(zip(paths, scales, strict=True))


def _change(base: np.ndarray, file: str, module: str, found: WeightChange, scale: float) -> np.ndarray:
    """What one file adds to a weight in PyTorch's layout (float64)."""
    arrays = {role: read_floats(tensor, file, f"{module} {role}") for role, tensor in found.tensors.items()}
    if scale == 0:
        return np.zeros_like(base)
    change = scale * found.strength * lora_forms.change(arrays, base.shape)
    for role in lora_forms.MAGNITUDES:
        if role in arrays:
            return lora_forms.with_magnitude(base + change, role, arrays[role]) - base
    return change
