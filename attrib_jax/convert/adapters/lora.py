"""LoRA, LoHa, LoKr and DoRA files, merged into a pipeline's weights.

A LoRA adds scale * (alpha / rank) * up @ down to a weight W (Hu et al. 2021, eq. 3, with the scaling of PEFT and
diffusers). Without an alpha, alpha is the rank. The other forms are those of `lora_forms`.
"""

import collections
import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from attrib_jax.convert.adapters import lora_forms
from attrib_jax.convert.adapters.files import check_finite_as, read_floats
from attrib_jax.convert.adapters.lora_files import WeightChange, read_lora
from attrib_jax.convert.pipeline import Pipeline
from attrib_jax.convert.weights.names import from_torch, to_torch
from attrib_jax.core.weights import flatten_names, unflatten_names

_log = logging.getLogger(__name__)


def merge_lora(pipeline: Pipeline, path: str | Sequence[str], scale: float | Sequence[float] = 1.0) -> Pipeline:
    """A pipeline with W + scale * (alpha / rank) * up @ down in place of every weight W that a LoRA file names.

    It is computed in float64 and rounded once to the weight's dtype. Linear layers and convolutions of the UNet and the
    text encoder are merged; several files add up, as with diffusers' `set_adapters`. Forms of the keys:
      `unet.<module>.lora_A.weight` / `lora_B` (PEFT, diffusers today), `unet.<module>.lora.down.weight` / `up`,
      `<attention>.processor.to_k_lora.down.weight` / `up` (`to_out_lora` is `to_out.0`), with or without `unet.`;
      `text_encoder.<module>.lora_A.weight`, `.lora_linear_layer.down.weight`, `.to_q_lora.down.weight`, each with or
      without the `text_model.` level;
      `base_model.model.<module>.lora_A.weight` with an `adapter_config.json` beside the file (PEFT's own);
      kohya's `lora_unet_<module with _ for .>.lora_down.weight`, `lora_te_...`, `lora_te1_...`, over diffusers' module
      names or, for UNets, those of the original code (`input_blocks_1_1_...`).
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
    files = scaled_files(path, scale)
    trees = {part: flatten_names(tree) for part, tree in pipeline.params.items()}
    # The change of a DoRA depends on the weight: all are taken of the base's, so that their order plays no role.
    changes: dict[tuple[str, str], list[Any]] = collections.defaultdict(list)
    for name, strength in files:
        file, found = read_lora(name, pipeline)
        for (part, module), change in found.items():
            changes[part, change.leaf].append((file, f"{part}.{module}", change, strength))
        ranks = sorted({rank for change in found.values() if (rank := lora_forms.rank(change.shapes)) is not None})
        _log.info("%s merged into %d weights, scale %g, rank %s", file, len(found), strength, ranks)
    for (part, leaf), entries in changes.items():
        weight = trees[part][leaf]
        base = to_torch(leaf, np.asarray(weight, np.float64))
        merged = base + sum(_change(base, *entry) for entry in entries)
        file, module, _, strength = entries[-1]
        check_finite_as(merged, weight.dtype, file, f"{module} merged with scale={strength}")
        trees[part][leaf] = jax.device_put(from_torch(leaf, merged).astype(weight.dtype))
    return dataclasses.replace(pipeline, params={part: unflatten_names(tree) for part, tree in trees.items()})


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
