"""Trains a small text-to-image pipeline from scratch.

python -m launch.train --flagfile=configs/train_openmoji.cfg
"""

from absl import flags

from attrib_jax.data.sources import open_dataset
from attrib_jax.runtime.stages import lock
from attrib_jax.stages.fit import FitConfig
from attrib_jax.stages.train import TrainConfig, train
from launch import common

_VAE_STEPS = flags.DEFINE_integer("vae_steps", 3500, "Steps of the autoencoder.", lower_bound=1)
_VAE_BATCH = flags.DEFINE_integer("vae_batch_size", 16, "Pictures a step of the autoencoder.", lower_bound=1)
_VAE_RATE = flags.DEFINE_float("vae_learning_rate", 2e-3, "Peak learning rate of the autoencoder.", lower_bound=0)
_STEPS = flags.DEFINE_integer("train_steps", 3000, "Steps of UNet and text encoder.", lower_bound=1)
_BATCH = flags.DEFINE_integer("train_batch_size", 128, "Pictures a step of UNet and text encoder.", lower_bound=1)
_RATE = flags.DEFINE_float("learning_rate", 1e-3, "Peak learning rate of UNet and text encoder.", lower_bound=0)
_DROPOUT = flags.DEFINE_float("caption_dropout", 0.1, "Share of empty captions.", lower_bound=0, upper_bound=1)
_SEED = flags.DEFINE_integer("train_seed", 0, "Seed of weights, batches and noise.", lower_bound=0)
_DTYPE = flags.DEFINE_enum("weights_dtype", "float32", ["float32", "float16"], "Of the written weights.")
_EVERY = flags.DEFINE_integer("checkpoint_every", 250, "Steps between checkpoints.", lower_bound=1)


def main():
    common.require(workdir=common.WORKDIR.value)
    shared = {"seed": _SEED.value, "checkpoint_every": _EVERY.value, "log_every": 25}
    config = TrainConfig(
        autoencoder=FitConfig(
            steps=_VAE_STEPS.value,
            batch_size=_VAE_BATCH.value,
            learning_rate=_VAE_RATE.value,
            warmup_steps=min(100, _VAE_STEPS.value // 10),
            ema_decay=0.998,
            **shared,
        ),
        diffusion=FitConfig(
            steps=_STEPS.value,
            batch_size=_BATCH.value,
            learning_rate=_RATE.value,
            warmup_steps=min(200, _STEPS.value // 10),
            ema_decay=0.999,
            **shared,
        ),
        caption_dropout=_DROPOUT.value,
    )
    dataset = open_dataset(common.DATASET.value, common.DATA_DIR.value)
    with lock(common.WORKDIR.value):
        model = train(common.WORKDIR.value, dataset, config, _DTYPE.value)
    print(f"model: {model}")


if __name__ == "__main__":
    common.run(main)
