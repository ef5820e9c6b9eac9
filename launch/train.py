"""Trains a small text-to-image pipeline, a UNet alone or a tower, or teaches a pipeline a new word from a few pictures.

python -m launch.train --flagfile=configs/train_openmoji.cfg
python -m launch.train --flagfile=configs/train_digits.cfg
python -m launch.train --flagfile=configs/customize_openmoji.cfg
python -m launch.train --flagfile=configs/train_tower.cfg
"""

import functools

from absl import flags

from attrib_jax.convert.adapters.custom_diffusion import apply_custom_diffusion
from attrib_jax.convert.diffusers_folder import save_pipeline
from attrib_jax.convert.tokenizer import load_tokenizer
from attrib_jax.evaluation.retrain import Recipe
from attrib_jax.evaluation.small_models import SmallUNet, pixel_pipeline, replace_unet_architecture, train_small
from attrib_jax.jobs.encode import image_resolution
from attrib_jax.storage.stages import lock
from attrib_jax.training.customize import CustomizeConfig, customize
from attrib_jax.training.loop import FitConfig
from attrib_jax.training.pipeline import TrainConfig, train
from attrib_jax.training.tower import TowerConfig, train_tower
from launch import common

_MODE = flags.DEFINE_enum(
    "mode",
    "scratch",
    ["scratch", "unet", "customize", "tower"],
    "Train a pipeline from scratch on --dataset; or only a UNet, on the fixed encoders of --model or on pixels, as "
    "launch.evaluate trains it; or fine-tune --model on --exemplars; or train a small CLIP for feature baselines.",
)
# All modes; where the defaults differ, they are those of scratch, unet, customize and tower.
_STEPS = flags.DEFINE_integer("train_steps", None, "Steps (default: 3000; 400; 300; 1000).", lower_bound=1)
_BATCH = flags.DEFINE_integer("train_batch_size", None, "Pictures a step (default: 128; 64; 8; 96).", lower_bound=1)
_RATE = flags.DEFINE_float(
    "learning_rate", None, "Peak rate, of customising the constant one (1e-3; 3e-3; 1e-5; 1.5e-3).", lower_bound=0
)
_SEED = flags.DEFINE_integer("train_seed", 0, "Seed of weights, batches and noise.", lower_bound=0)
_RESOLUTION = flags.DEFINE_integer(
    "resolution",
    None,
    "Pixels a side that pictures are resized and cropped to; as they are if not given.",
    lower_bound=1,
)
_EVERY = flags.DEFINE_integer("checkpoint_every", 250, "Steps between checkpoints.", lower_bound=1)

_VAE_STEPS = flags.DEFINE_integer("vae_steps", 3500, "Steps of the autoencoder.", lower_bound=1)
_VAE_BATCH = flags.DEFINE_integer("vae_batch_size", 16, "Pictures a step of the autoencoder.", lower_bound=1)
_VAE_RATE = flags.DEFINE_float("vae_learning_rate", 2e-3, "Peak learning rate of the autoencoder.", lower_bound=0)
_DROPOUT = flags.DEFINE_float("caption_dropout", 0.1, "Share of empty captions.", lower_bound=0, upper_bound=1)
_DTYPE = flags.DEFINE_enum("weights_dtype", "float32", ["float32", "float16"], "Of the written weights.")

_TOKEN = flags.DEFINE_string("token", "<new1>", "The new word, in <>.")
_INITIALIZER = flags.DEFINE_string(
    "initializer_token", None, "A word that the model knows, near the new one in meaning: its embedding is the first."
)
_CAPTION = flags.DEFINE_string(
    "exemplar_caption", None, "Caption of every exemplar, with the token in it; their own if not given."
)
_PRIOR = flags.DEFINE_string(
    "prior_dataset", None, "A few hundred real pictures (as --dataset) that keep the model from forgetting their kind."
)
_PRIOR_WEIGHT = flags.DEFINE_float("prior_weight", 1.0, "Of their loss beside the exemplars'.", lower_bound=0)
_FLIPS = flags.DEFINE_boolean("random_flips", False, "Mirror half of the pictures that are drawn.")
_SAVE = flags.DEFINE_boolean("save_pipeline", False, "Also write the whole fine-tuned pipeline to <workdir>/model.")

_CHANNELS = flags.DEFINE_list("unet_channels", ["32"], "Channels of each level of --mode=unet's UNet.")
_HOLDOUT = flags.DEFINE_float(
    "holdout", 0.05, "Share of near-duplicate groups that a tower is tested and never trained on.", lower_bound=0
)

# Flags that the other modes have no use for: given there, they show a mistake.
_ONLY = {
    "scratch": (
        "dataset",
        "resolution",
        "vae_steps",
        "vae_batch_size",
        "vae_learning_rate",
        "caption_dropout",
        "weights_dtype",
    ),
    "unet": ("dataset", "model", "tokenizer", "resolution", "unet_channels", "caption_dropout", "random_flips"),
    "tower": ("dataset", "tokenizer", "resolution", "holdout", "weights_dtype"),
    "customize": (
        "model",
        "tokenizer",
        "exemplars",
        "token",
        "initializer_token",
        "exemplar_caption",
        "prior_dataset",
        "prior_weight",
        "random_flips",
        "save_pipeline",
    ),
}


def main():
    common.require(workdir=common.WORKDIR.value)
    _refuse_flags_of_another_mode()
    {"scratch": _scratch, "unet": _unet, "customize": _customize, "tower": _tower}[_MODE.value]()


def _scratch():
    shared = {"seed": _SEED.value, "checkpoint_every": _EVERY.value, "log_every": 25}
    steps = _given(_STEPS, 3000)
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
            steps=steps,
            batch_size=_given(_BATCH, 128),
            learning_rate=_given(_RATE, 1e-3),
            warmup_steps=min(200, steps // 10),
            ema_decay=0.999,
            **shared,
        ),
        caption_dropout=_DROPOUT.value,
    )
    dataset = common.load_dataset(_RESOLUTION.value)
    with lock(common.WORKDIR.value):
        model = train(common.WORKDIR.value, dataset, config, _DTYPE.value)
    print(f"model: {model}")


def _unet():
    if not _CHANNELS.value or not all(text.isdecimal() for text in _CHANNELS.value):
        raise ValueError(f"unet_channels is {','.join(_CHANNELS.value)!r}; expected whole numbers, one a level")
    unet = SmallUNet(channels=tuple(map(int, _CHANNELS.value)))
    steps = _given(_STEPS, 400)
    recipe = Recipe(
        steps=steps,
        batch_size=_given(_BATCH, 64),
        learning_rate=_given(_RATE, 3e-3),
        warmup_steps=min(50, steps // 10),
        caption_dropout=_DROPOUT.value,
        random_flips=_FLIPS.value,
    )
    if common.MODEL.value is None:
        dataset = common.load_dataset(_RESOLUTION.value)
        untrained = pixel_pipeline(dataset, unet)
    else:
        if _RESOLUTION.value is not None:
            raise ValueError(
                f"resolution is {_RESOLUTION.value}, but pictures have the size that {common.MODEL.value}, given with "
                "--model, encodes; leave one out"
            )
        untrained = replace_unet_architecture(common.load_model(), unet)
        dataset = common.load_dataset(image_resolution(untrained))
    with lock(common.WORKDIR.value):
        model = train_small(common.WORKDIR.value, dataset, untrained, recipe, _SEED.value)
    print(f"model: {model}")


def _tower():
    common.require(tokenizer=common.TOKENIZER.value)
    steps = _given(_STEPS, 1000)
    config = TowerConfig(
        run=FitConfig(
            steps=steps,
            batch_size=_given(_BATCH, 96),
            learning_rate=_given(_RATE, 1.5e-3),
            warmup_steps=min(100, steps // 10),
            ema_decay=0.99,
            weight_decay=0.1,
            seed=_SEED.value,
            checkpoint_every=_EVERY.value,
            log_every=10,
        ),
        holdout=_HOLDOUT.value,
    )
    dataset, tokenizer = common.load_dataset(_RESOLUTION.value), load_tokenizer(common.TOKENIZER.value)
    with lock(common.WORKDIR.value):
        folder, results = train_tower(common.WORKDIR.value, dataset, tokenizer, config, _DTYPE.value)
    for name, value in results.items():
        print(f"{name}: {value:g}")
    print(f"tower: {folder}")


def _customize():
    common.require(model=common.MODEL.value, exemplars=common.EXEMPLARS.value, initializer_token=_INITIALIZER.value)
    config = CustomizeConfig(
        initializer_token=_INITIALIZER.value,
        token=_TOKEN.value,
        caption=_CAPTION.value,
        steps=_given(_STEPS, 300),
        batch_size=_given(_BATCH, 8),
        learning_rate=_given(_RATE, 1e-5),
        prior_weight=_PRIOR_WEIGHT.value,
        random_flips=_FLIPS.value,
        seed=_SEED.value,
        checkpoint_every=_EVERY.value,
    )
    pipeline = common.load_model()
    open_source = functools.partial(
        common.open_source, resolution=image_resolution(pipeline), caption_key=common.CAPTION_KEY.value
    )
    exemplars, prior = (name and open_source(name) for name in (common.EXEMPLARS.value, _PRIOR.value))
    with lock(common.WORKDIR.value):
        folder = customize(common.WORKDIR.value, pipeline, exemplars, config, prior)
        if _SAVE.value:
            model = folder.with_name("model")
            save_pipeline(apply_custom_diffusion(pipeline, str(folder)), str(model), overwrite=model.exists())
            print(f"model: {model}")
    print(f"weights and token: {folder}")


def _given(flag: flags.FlagHolder, default: float) -> float:
    return default if flag.value is None else flag.value


def _refuse_flags_of_another_mode() -> None:
    others = dict.fromkeys(name for names in _ONLY.values() for name in names if name not in _ONLY[_MODE.value])
    # `present` counts how often a flag was given, in a flagfile or after it.
    wrong = [name for name in others if flags.FLAGS[name].present]
    if _MODE.value == "customize" and _PRIOR.value is None and flags.FLAGS["prior_weight"].present:
        raise ValueError("--prior_weight is given without --prior_dataset; give both or neither")
    if wrong:
        modes = [mode for mode, names in _ONLY.items() if set(wrong) <= set(names)] or ["other modes"]
        raise ValueError(
            f"{', '.join(f'--{name}' for name in wrong)} belong to --mode={' or '.join(modes)}, but the mode is "
            f"{_MODE.value}; leave them out"
        )


if __name__ == "__main__":
    common.run(main, one_host=True)
