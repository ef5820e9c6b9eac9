"""Small models to retrain many times: a UNet of their own on encoders that are fixed.

For pixels the encoders need no training at all: latents are the pixels, and captions of a few words go through a CLIP
text encoder with random weights, whose states tell the words apart. For images that need an autoencoder it comes,
with the text encoder, from a trained pipeline.
"""

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attrib_jax.convert.diffusers_folder import save_pipeline
from attrib_jax.convert.pipeline import Pipeline, latent_size
from attrib_jax.convert.tokenizer import train_tokenizer
from attrib_jax.core.checks import check_positive
from attrib_jax.core.keys import purpose_key
from attrib_jax.data.readers import image_side
from attrib_jax.data.sources import Dataset
from attrib_jax.diffusion.schedule import NoiseSchedule
from attrib_jax.evaluation.retrain import Recipe, Retrainer, Training
from attrib_jax.jobs.context import model_fingerprint
from attrib_jax.jobs.encode import EncodeConfig, encode
from attrib_jax.models.clip import CLIPTextConfig, CLIPTextModel
from attrib_jax.models.unet import UNet2DConditionModel, UNetConfig
from attrib_jax.models.vae import PixelAutoencoder, PixelAutoencoderConfig
from attrib_jax.storage.stage_root import StageRoot
from attrib_jax.storage.state import StateStore

# The betas of denoising diffusion in pixels (arXiv 2006.11239). v prediction (arXiv 2202.00512), because a small model
# that predicts the noise does so too coarsely where there is almost nothing else: its samples stay noise.
_PIXEL_SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
_TEXT_WIDTH, _TEXT_HEADS, _MAX_TOKENS, _VOCABULARY = 32, 4, 4, 1024


@dataclasses.dataclass(frozen=True)
class SmallUNet:
    """The architecture of a small UNet.

    Attributes:
      channels: block_out_channels; every level but the last of several cross-attends to the text.
      heads, groups: attention heads of every level, and norm_num_groups.
    """

    channels: tuple[int, ...] = (32,)
    heads: int = 4
    groups: int = 8

    def __post_init__(self):
        for size in self.channels:
            check_positive("unet_channels", size, integer=True)

    def config(self, sample_size: Any, latent_channels: int, text_width: int) -> UNetConfig:
        """The UNet's config for latents of that size and text states of that width."""
        inner = len(self.channels) - 1
        crossing, last = ["CrossAttnDownBlock2D"] * max(inner, 1), ["DownBlock2D"] * min(inner, 1)
        return UNetConfig.from_dict(
            {
                "sample_size": sample_size,
                "in_channels": latent_channels,
                "out_channels": latent_channels,
                "block_out_channels": list(self.channels),
                "layers_per_block": 1,
                "down_block_types": crossing + last,
                "up_block_types": [name.replace("Down", "Up") for name in (crossing + last)[::-1]],
                "attention_head_dim": self.heads,
                "norm_num_groups": self.groups,
                "cross_attention_dim": text_width,
            }
        )


def pixel_pipeline(dataset: Dataset, unet: SmallUNet, patch: int = 4, grey: bool = True, seed: int = 0) -> Pipeline:
    """A pipeline on the pixels of `dataset`, its text encoder random and its UNet untrained.

    Args:
      dataset: square images, with captions of few words.
      unet: the UNet's architecture.
      patch, grey: see `PixelAutoencoderConfig`.
      seed: of the text encoder's weights and of the UNet's.
    """
    side = image_side(dataset)
    vae = PixelAutoencoder(PixelAutoencoderConfig(side, patch, grey))
    captions = [text for index in range(len(dataset)) for text in dataset.captions(index)]
    tokenizer = train_tokenizer(captions, _VOCABULARY, _MAX_TOKENS)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=_TEXT_WIDTH,
            intermediate_size=2 * _TEXT_WIDTH,
            num_hidden_layers=1,
            num_attention_heads=_TEXT_HEADS,
            max_position_embeddings=_MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    key = purpose_key(seed, "fixed text encoder")
    text_params = jax.jit(text_encoder.init)(key, jnp.zeros((1, _MAX_TOKENS), jnp.int32))["params"]
    module = UNet2DConditionModel(unet.config(side // patch, vae.config.latent_channels, _TEXT_WIDTH))
    schedule = NoiseSchedule.from_config(_PIXEL_SCHEDULER)
    params = {"unet": {}, "vae": {}, "text_encoder": text_params}
    return Pipeline(module, vae, text_encoder, tokenizer, schedule, params)


def replace_unet_architecture(pipeline: Pipeline, unet: SmallUNet) -> Pipeline:
    """`pipeline` with an untrained UNet of another architecture on its own encoders."""
    config = unet.config(
        latent_size(pipeline), pipeline.vae.config.latent_channels, pipeline.text_encoder.config.hidden_size
    )
    module = UNet2DConditionModel(config)
    return dataclasses.replace(pipeline, unet=module, params=pipeline.params | {"unet": {}})


def train_small(
    workdir: str | os.PathLike, dataset: Dataset, untrained: Pipeline, recipe: Recipe, seed: int = 0
) -> Path:
    """Trains the UNet of `untrained` on all of `dataset` by `recipe` -> `<workdir>/model`, a pipeline folder.

    It is the model that `launch.evaluate` retrains without some images: one code path trains both. Resumable. Hold
    the lock of the workdir. Raises StageMismatchError where the workdir holds another training.
    """
    inputs = {
        "dataset": dataset.fingerprint(),
        # Weights, configs, schedule and tokenizer; the UNet's weights are yet to be trained.
        "model": model_fingerprint(dataclasses.replace(untrained, params=untrained.params | {"unet": {}})),
    }
    settings = {"recipe": recipe.settings(), "seed": seed, "unet": untrained.unet.config.to_dict()}
    root = StageRoot(workdir)
    data = encode(root, untrained, inputs | {"encoding": EncodeConfig().encoding()}, dataset)
    model = Path(workdir) / "model"
    with root.stage("training", settings, inputs) as stage:
        if stage.finished and model.exists():
            return model
        retrainer = Retrainer(untrained, data, recipe)
        states = StateStore(stage.path, f"training{retrainer.models_at_once}")
        trained = retrainer.train([Training(np.array([], np.int64), seed)], states, description="train")
        params = jax.tree.map(lambda leaf: np.asarray(leaf[0]), trained)
        for leftover in model.parent.glob(f".{model.name}.*"):
            # What `save_pipeline` was writing when a run was killed.
            shutil.rmtree(leftover, ignore_errors=True)
        pipeline = dataclasses.replace(untrained, params=untrained.params | {"unet": params})
        save_pipeline(pipeline, str(model), overwrite=model.exists())
        states.remove()
    return model
