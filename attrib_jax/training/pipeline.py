"""Training a latent-diffusion pipeline from scratch: autoencoder, tokenizer, then text encoder and UNet together."""

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attrib_jax.convert.diffusers_folder import save_pipeline
from attrib_jax.convert.pipeline import Pipeline, encode_text
from attrib_jax.convert.tokenizer import (
    load_tokenizer,
    save_tokenizer,
    tokenize_captions,
    tokenize_prompts,
    train_tokenizer,
)
from attrib_jax.core.durable import new_folder, remove_leftovers
from attrib_jax.core.fingerprint import params_fingerprint
from attrib_jax.core.keys import purpose_key
from attrib_jax.core.settings import Settings, setting
from attrib_jax.data.readers import TrainingImages, image_side
from attrib_jax.data.sources import Dataset
from attrib_jax.diffusion.schedule import NoiseSchedule
from attrib_jax.diffusion.training import DiffusionBatch, autoencoder_loss, diffusion_loss
from attrib_jax.jobs.encode import encode_images
from attrib_jax.models.clip import CLIPTextConfig, CLIPTextModel
from attrib_jax.models.predictor import predictor
from attrib_jax.models.unet import UNet2DConditionModel, UNetConfig
from attrib_jax.models.vae import AutoencoderKL, AutoencoderKLConfig
from attrib_jax.storage.files import storage_errors
from attrib_jax.storage.skipped import read_skipped
from attrib_jax.storage.stages import open_stage
from attrib_jax.training.loop import FitConfig, fit

_SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """Schedule and architecture of a pipeline that is trained from scratch.

    Beside the settings, which have flags:

    Attributes:
      vae_channels, vae_groups: block_out_channels and norm_num_groups of the autoencoder.
      mse_weight, kl_weight: weights of the autoencoder's squared error and of its KL term, see `autoencoder_loss`.
      unet_channels: block_out_channels of the UNet; all levels but the last cross-attend to the text.
      unet_heads, unet_groups: attention heads of every level, and norm_num_groups.
      text_width, text_layers, text_heads: width, layers and attention heads of the CLIP text encoder.
      vocab_size, max_tokens: size of the tokenizer's vocabulary, and tokens of a caption.
      log_every: steps between two lines of metrics.jsonl.
    """

    vae_steps: int = setting(3500, "Steps of the autoencoder.", low=1)
    vae_batch_size: int = setting(16, "Images a step of the autoencoder, over all devices.", low=1)
    vae_learning_rate: float = setting(2e-3, "Peak learning rate of the autoencoder.", above=0)
    latent_channels: int = setting(8, "Channels of the autoencoder's latents.", low=1)
    steps: int = setting(3000, "Optimiser steps.", low=1, flag="train_steps")
    batch_size: int = setting(128, "Images a step, over all devices.", low=1, flag="train_batch_size")
    learning_rate: float = setting(1e-3, "Peak learning rate.", above=0)
    caption_dropout: float = setting(
        0.1, "Share of captions replaced by the empty one, for classifier-free guidance.", low=0, high=1
    )
    seed: int = setting(0, "Seed of weights, batches and noise.", low=0, high=2**32 - 1, flag="train_seed")
    checkpoint_every: int = setting(250, "Steps between checkpoints.", low=1, performance=True)

    vae_channels: tuple[int, ...] = (16, 32, 64, 128)
    vae_groups: int = 8
    mse_weight: float = 2.0
    kl_weight: float = 2e-4
    unet_channels: tuple[int, ...] = (64, 128, 128)
    unet_heads: int = 4
    unet_groups: int = 16
    text_width: int = 128
    text_layers: int = 2
    text_heads: int = 4
    vocab_size: int = 1536
    max_tokens: int = 16
    log_every: int = 25

    @property
    def autoencoder(self) -> FitConfig:
        """The training run of the autoencoder."""
        return FitConfig(
            steps=self.vae_steps,
            batch_size=self.vae_batch_size,
            learning_rate=self.vae_learning_rate,
            warmup_steps=min(100, self.vae_steps // 10),
            ema_decay=0.998,
            seed=self.seed,
            checkpoint_every=self.checkpoint_every,
            log_every=self.log_every,
        )

    @property
    def diffusion(self) -> FitConfig:
        """The training run of UNet and text encoder."""
        return FitConfig(
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            warmup_steps=min(200, self.steps // 10),
            ema_decay=0.999,
            seed=self.seed,
            checkpoint_every=self.checkpoint_every,
            log_every=self.log_every,
        )


# The settings of the two stages, beside their training runs.
_AUTOENCODER = ("latent_channels", "vae_channels", "vae_groups", "mse_weight", "kl_weight")
_DIFFUSION = (
    *("unet_channels", "unet_heads", "unet_groups", "text_width", "text_layers", "text_heads"),
    *("vocab_size", "max_tokens", "caption_dropout"),
)


class _Images:
    """The images of a data set alone, for the autoencoder's batches."""

    def __init__(self, dataset: Dataset, side: int):
        self._images = TrainingImages(dataset, side)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> np.ndarray:
        return self._images(index)[1]


class _Latents:
    """Latents and token ids, for the UNet's batches."""

    def __init__(self, latents: np.ndarray, input_ids: np.ndarray, num_captions: np.ndarray):
        self._arrays = DiffusionBatch(latents, input_ids, num_captions)

    def __len__(self) -> int:
        return len(self._arrays.latents)

    def __getitem__(self, index: int) -> DiffusionBatch:
        return DiffusionBatch(*(array[index] for array in self._arrays))


def train(workdir: str | os.PathLike, dataset: Dataset, config: TrainConfig, dtype: Any = None) -> Path:
    """Trains what is missing and writes `<workdir>/model`, a pipeline folder in the diffusers layout -> its path.

    Both runs resume from their newest checkpoint, and leave out images that cannot be read. Hold the lock of `workdir`.

    Args:
      workdir: folder of the stages `autoencoder` and `diffusion`, and of the result.
      dataset: square images of one size, with captions.
      config: schedule and architecture.
      dtype: dtype of the written weights; float32 if None.

    Raises:
      StageMismatchError: the folder holds a run with other settings or another data set.
      ValueError: images of several sizes, or of one that is not square or that the autoencoder cannot shrink evenly.
    """
    fingerprint = dataset.fingerprint()
    # Before anything is stored: images that cannot be trained on should leave nothing behind.
    vae = _autoencoder(dataset, config)
    settings = {"autoencoder": config.autoencoder.describe(), **{name: getattr(config, name) for name in _AUTOENCODER}}
    stage = open_stage(workdir, "autoencoder", settings, {"dataset": fingerprint})
    vae_params = _train_autoencoder(stage.path, vae, dataset, config)
    stage.finish()

    inputs = {"dataset": fingerprint, "autoencoder": params_fingerprint(vae_params)}
    settings = {"diffusion": config.diffusion.describe(), **{name: getattr(config, name) for name in _DIFFUSION}}
    stage = open_stage(workdir, "diffusion", settings, inputs)
    folder = stage.path
    side: Any = vae.config.sample_size  # square, as `_autoencoder` makes it
    latents = np.asarray(encode_images(folder, dataset, vae, vae_params, size=(side, side)))
    kept = np.setdiff1d(np.arange(len(dataset)), list(read_skipped(folder)))
    latents, captions = latents[kept], [dataset.captions(row) for row in kept.tolist()]
    # One scale for all latents, so that they have the unit variance that the noise schedule expects.
    vae = AutoencoderKL(dataclasses.replace(vae.config, scaling_factor=float(1.0 / latents.std())))
    pipeline = _train_diffusion(folder, captions, config, vae, vae_params, latents * vae.config.scaling_factor)
    model = Path(workdir) / "model"
    remove_leftovers(model)
    save_pipeline(pipeline, model, dtype, overwrite=model.exists())
    stage.finish()
    return model


def _autoencoder(dataset: Dataset, config: TrainConfig) -> AutoencoderKL:
    side = image_side(dataset)
    vae = AutoencoderKL(
        AutoencoderKLConfig(
            latent_channels=config.latent_channels,
            block_out_channels=config.vae_channels,
            norm_num_groups=config.vae_groups,
            sample_size=side,
            scaling_factor=1.0,
        )
    )
    if side % vae.config.downscale:
        raise ValueError(
            f"dataset {dataset.name!r} has images of {side} pixels a side; expected a multiple of "
            f"{vae.config.downscale}, by which the autoencoder shrinks them. Give such a --resolution."
        )
    return vae


def _train_autoencoder(folder: Path, vae: AutoencoderKL, dataset: Dataset, config: TrainConfig) -> Any:
    side: Any = vae.config.sample_size
    key = purpose_key(config.autoencoder.seed, "autoencoder weights")
    params = jax.jit(vae.init)(key, jnp.zeros((1, side, side, 3)))["params"]

    def loss_fn(params, images, key):
        return autoencoder_loss(vae, params, images, key, config.mse_weight, config.kl_weight)

    return fit(folder, loss_fn, params, _Images(dataset, side), config.autoencoder, "train autoencoder")


def _train_diffusion(folder, captions, config: TrainConfig, vae, vae_params, latents) -> Pipeline:
    tokenizer = _tokenizer(folder / "tokenizer", [text for row in captions for text in row], config)
    input_ids, num_captions = tokenize_captions(tokenizer, captions)
    empty_ids = jnp.asarray(tokenize_prompts(tokenizer, [""])[0])

    unet, text_encoder = _modules(config, vae.config, tokenizer)
    schedule = NoiseSchedule.from_config(_SCHEDULER)
    unet_key, text_key = jax.random.split(purpose_key(config.diffusion.seed, "diffusion weights"))
    size = (1, *latents.shape[2:])
    text = jnp.zeros((1, config.max_tokens, config.text_width))
    params = {
        "unet": jax.jit(unet.init)(unet_key, jnp.zeros(size), jnp.zeros((1,), jnp.int32), text)["params"],
        "text_encoder": jax.jit(text_encoder.init)(text_key, empty_ids[None])["params"],
    }
    loss_fn = functools.partial(
        diffusion_loss,
        predictor(unet),
        functools.partial(encode_text, text_encoder),
        schedule,
        empty_ids=empty_ids,
        caption_dropout=config.caption_dropout,
    )
    source = _Latents(latents, input_ids, num_captions)
    trained = fit(folder, loss_fn, params, source, config.diffusion, "train diffusion")
    return Pipeline(unet, vae, text_encoder, tokenizer, schedule, {**trained, "vae": vae_params})


def _tokenizer(folder: Path, captions: list[str], config: TrainConfig) -> Any:
    """Trained once and kept, so that a resumed run has the token ids that it started with."""
    if not folder.exists():
        with storage_errors(folder), new_folder(folder) as fresh:
            save_tokenizer(train_tokenizer(captions, config.vocab_size, config.max_tokens), str(fresh))
    return load_tokenizer(str(folder))


def _modules(config: TrainConfig, vae: Any, tokenizer) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    levels = len(config.unet_channels)
    unet = UNetConfig.from_dict(
        {
            "sample_size": vae.sample_size // vae.downscale,
            "in_channels": vae.latent_channels,
            "out_channels": vae.latent_channels,
            "block_out_channels": config.unet_channels,
            "layers_per_block": 1,
            "down_block_types": ["CrossAttnDownBlock2D"] * (levels - 1) + ["DownBlock2D"],
            "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (levels - 1),
            "attention_head_dim": config.unet_heads,
            "norm_num_groups": config.unet_groups,
            "cross_attention_dim": config.text_width,
        }
    )
    text_encoder = CLIPTextConfig.from_dict(
        {
            "hidden_size": config.text_width,
            "intermediate_size": 4 * config.text_width,
            "num_hidden_layers": config.text_layers,
            "num_attention_heads": config.text_heads,
            "max_position_embeddings": config.max_tokens,
            "vocab_size": len(tokenizer),
            "hidden_act": "quick_gelu",
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
    )
    return UNet2DConditionModel(unet), CLIPTextModel(text_encoder)
