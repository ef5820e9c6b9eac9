"""The models of benchmarks/throughput.py and benchmarks/scaling.py."""

import dataclasses
from pathlib import Path
from typing import Any

from attrib_jax.convert.config_files import read_json
from attrib_jax.convert.configs import MSCOCO


@dataclasses.dataclass(frozen=True)
class Size:
    """A model, whose weights will be random, and what it is run on.

    Attributes:
      unet: the content of its config.json.
      scheduler: the content of its scheduler_config.json.
      length: tokens of a caption.
      stride: of the strided losses' timesteps.
      seed: of weights and inputs.
    """

    unet: dict[str, Any]
    scheduler: dict[str, Any]
    length: int
    stride: int = 50
    seed: int = 0

    @property
    def num_train_timesteps(self) -> int:
        """T."""
        return self.scheduler.get("num_train_timesteps", 1000)


# The paper's model, and one for tests and for many examples.
SIZES = {
    "mscoco": Size(MSCOCO.unet, MSCOCO.scheduler, length=77),
    "tiny": Size(
        {
            **MSCOCO.unet,
            "sample_size": 8,
            "block_out_channels": [32],
            "down_block_types": ["CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D"],
            "layers_per_block": 1,
            "attention_head_dim": 4,
            "cross_attention_dim": 32,
            "norm_num_groups": 8,
        },
        MSCOCO.scheduler,
        length=8,
        stride=200,
    ),
}


def size_of(name: str) -> Size:
    """One of `SIZES`, or the size of a pipeline folder's model, such as models/openmoji.

    Raises ValueError for another name, and for a model that does not predict the noise.
    """
    if name in SIZES:
        return SIZES[name]
    folder = Path(name)
    if not (folder / "unet" / "config.json").is_file():
        raise ValueError(f"size is {name!r}; expected one of {', '.join(SIZES)}, or a pipeline folder")
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    if scheduler.get("prediction_type", "epsilon") != "epsilon":
        raise ValueError(f"{name} predicts {scheduler['prediction_type']!r}; the PyTorch side has epsilon only")
    length = read_json(folder / "tokenizer" / "tokenizer_config.json")["model_max_length"]
    return Size(read_json(folder / "unet" / "config.json"), scheduler, length)
