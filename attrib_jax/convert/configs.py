"""Model configs that come without a folder: the paper's MSCOCO model by name, others as json files."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from attrib_jax.convert.config_files import read_json
from attrib_jax.core.checks import check_choice
from attrib_jax.models.unet import UNetConfig


class ModelConfig(NamedTuple):
    """What a bare UNet state dict leaves open.

    Attributes:
      unet: the content of its config.json.
      scheduler: the content of the scheduler_config.json that it was trained with; None where that is not told.
    """

    unet: dict[str, Any]
    scheduler: dict[str, Any] | None


# METHOD.md section 6: latents 16x16x4 of 128 pixel images, 57.4 M weights. Its images were drawn with DDPM, which
# clips its estimates.
MSCOCO = ModelConfig(
    unet={
        "_class_name": "UNet2DConditionModel",
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [128, 256, 256, 256],
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "attention_head_dim": 8,
        "cross_attention_dim": 1024,
    },
    scheduler={
        "_class_name": "DDPMScheduler",
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "clip_sample": True,
    },
)
_NAMED = {"mscoco": MSCOCO}


def named_config(config: str | os.PathLike | Mapping[str, Any]) -> ModelConfig:
    """A model config by its name or from a json file.

    Args:
      config: a known name ("mscoco"); the path of a json file; or what such a file holds: a UNet's config.json, or
        {"unet": its config.json, "scheduler": its scheduler_config.json}.

    Raises ValueError for an unknown name (the nearest is suggested) and for a file that is damaged or holds neither.
    """
    if isinstance(config, Mapping):
        return _parse(config, "config")
    path = os.fspath(config)
    if path not in _NAMED and os.path.isfile(path):
        return _parse(read_json(path), path)
    if path.endswith(".json"):
        raise ValueError(f"config {path} does not exist; give a UNet's config.json, or one of: {', '.join(_NAMED)}")
    check_choice("config (a name, or a json file that exists)", path, _NAMED)
    return _NAMED[path]


def _parse(content: Mapping[str, Any], source: str) -> ModelConfig:
    parts = content if "unet" in content else {"unet": content}
    unknown = sorted(set(parts) - {"unet", "scheduler"})
    wrong = [part for part, value in parts.items() if not isinstance(value, Mapping)]
    if unknown or wrong:
        raise ValueError(f'{source} has the entries {unknown or wrong}; expected {{"unet": {{}}, "scheduler": {{}}}}')
    unet = dict(parts["unet"])
    known = {field.name for field in dataclasses.fields(UNetConfig)}
    if not known & unet.keys():
        some = ", ".join(sorted(unet)[:5]) or "nothing"
        raise ValueError(f"{source} is no UNet's config.json, it holds {some}; expected keys like block_out_channels")
    return ModelConfig(unet, dict(parts["scheduler"]) if "scheduler" in parts else None)
