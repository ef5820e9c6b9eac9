"""Trains a small text-to-image pipeline, a UNet alone or a tower, a LoRA, or teaches a pipeline a new word.

python -m launch.train --flagfile=configs/train_openmoji.cfg
python -m launch.train --flagfile=configs/train_digits.cfg
python -m launch.train --flagfile=configs/customize_openmoji.cfg
python -m launch.train --flagfile=configs/train_lora_openmoji.cfg
python -m launch.train --flagfile=configs/train_tower.cfg
"""

import dataclasses
import functools

from absl import flags

from attrib_jax.convert.adapters.custom_diffusion import apply_custom_diffusion
from attrib_jax.convert.diffusers_folder import save_pipeline
from attrib_jax.convert.tokenizer import load_tokenizer
from attrib_jax.core.settings import Settings, setting
from attrib_jax.evaluation.retrain import Recipe
from attrib_jax.evaluation.small_models import SmallUNet, pixel_pipeline, replace_unet_architecture, train_small
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.encode import image_resolution
from attrib_jax.storage.stage_root import StageRoot
from attrib_jax.storage.stages import lock
from attrib_jax.training.customize import CustomizeConfig, customize
from attrib_jax.training.lora import LoraConfig, train_lora
from attrib_jax.training.pipeline import TrainConfig, train
from attrib_jax.training.tower import TowerConfig, train_tower
from launch import common
from launch.flags import check_unread, define_choice, define_mode_flags, read_config

# What each mode reads: its config, and of the command's own and the shared flags those that it has a use for; others
# are refused. The shared ones, such as --model, are defined in launch/common.py and have no help text here.


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Data(Settings):
    dataset: str = setting("openmoji", "")
    resolution: int | None = setting(
        None, "Side that images are resized and cropped to; as they are if not given.", low=1, unit="pixels"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Weights(Settings):
    weights_dtype: str = setting("float32", "Data type of the written weights.", choices=("float32", "float16"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Scratch(TrainConfig, _Data, _Weights):
    pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class _UNet(Recipe, _Data):
    model: str | None = setting(None, "")
    tokenizer: str | None = setting(None, "")
    unet_channels: tuple[int, ...] = setting((32,), "Channels of each level of the UNet.", low=1)
    seed: int = setting(0, "Seed of weights, batches and noise.", low=0, high=2**32 - 1, flag="train_seed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Customize(CustomizeConfig):
    model: str | None = setting(None, "")
    tokenizer: str | None = setting(None, "")
    exemplars: str | None = setting(None, "")
    prior_dataset: str | None = setting(
        None, "A few hundred real images (as --dataset) that keep the model from forgetting their kind."
    )
    save_pipeline: bool = setting(False, "Whether the whole fine-tuned pipeline is written to <workdir>/model, too.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Lora(LoraConfig):
    model: str | None = setting(None, "")
    tokenizer: str | None = setting(None, "")
    dataset: str = setting("openmoji", "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tower(TowerConfig, _Data, _Weights):
    tokenizer: str | None = setting(None, "")


_MODES = {"scratch": _Scratch, "unet": _UNet, "customize": _Customize, "lora": _Lora, "tower": _Tower}

_MODE = define_choice(
    "mode",
    "scratch",
    _MODES,
    "What is trained. scratch: a pipeline on --dataset; unet: a UNet alone, on the fixed encoders of --model or on "
    "pixels, as launch.evaluate trains it; customize: --model on --exemplars, to learn a new word; lora: low-rank "
    "factors beside the weights of --model, on --dataset; tower: a small CLIP for the methods that compare features.",
)
define_mode_flags(_MODES, skip=["weight_decay"])


def main():
    common.require(workdir=common.workdir())
    mode = _MODE.value
    check_unread(f"mode {mode!r}", {f"mode {name!r}": config for name, config in _MODES.items()}, flagfiles=True)
    {"scratch": _scratch, "unet": _unet, "customize": _customize, "lora": _lora, "tower": _tower}[mode]()


def _scratch():
    config, own = read_config(TrainConfig), flags.FLAGS
    dataset = common.load_dataset(own.resolution)
    with lock(common.workdir()):
        model = train(common.workdir(), dataset, config, own.weights_dtype)
    print(f"model: {model}")


def _unet():
    own = read_config(_UNet)
    recipe, unet = read_config(Recipe), SmallUNet(channels=own.unet_channels)
    if own.model is None:
        dataset = common.load_dataset(own.resolution)
        untrained = pixel_pipeline(dataset, unet)
    else:
        if own.resolution is not None:
            raise ValueError(
                f"resolution is {own.resolution}, but images have the size that {own.model}, given with --model, "
                "encodes. Leave one out."
            )
        untrained = replace_unet_architecture(common.load_model(), unet)
        dataset = common.load_dataset(image_resolution(untrained))
    with lock(common.workdir()):
        model = train_small(common.workdir(), dataset, untrained, recipe, own.seed)
    print(f"model: {model}")


def _tower():
    common.require(tokenizer=common.TOKENIZER.value)
    config, own = read_config(TowerConfig), flags.FLAGS
    dataset, tokenizer = common.load_dataset(own.resolution), load_tokenizer(common.TOKENIZER.value)
    with lock(common.workdir()):
        folder, results = train_tower(common.workdir(), dataset, tokenizer, config, own.weights_dtype)
    for name, value in results.items():
        print(f"{name}: {value:g}")
    print(f"tower: {folder}")


def _lora():
    common.require(model=flags.FLAGS.model)
    config = read_config(LoraConfig)
    pipeline = common.load_model()
    dataset = common.load_dataset(image_resolution(pipeline))
    with lock(common.workdir()):
        run = Run(pipeline, dataset, StageRoot(common.workdir()), common.encode_config())
        folder = train_lora(common.workdir(), run, config)
    print(f"lora: {folder}")


def _customize():
    own = flags.FLAGS
    common.require(model=own.model, exemplars=own.exemplars, initializer_token=own.initializer_token)
    if own.prior_dataset is None and own["prior_weight"].present:
        raise ValueError(f"prior_weight is {own.prior_weight}, but prior_dataset is not given; give both or neither")
    config = read_config(CustomizeConfig)
    pipeline = common.load_model()
    open_source = functools.partial(
        common.open_source, resolution=image_resolution(pipeline), caption_key=common.CAPTION_KEY.value
    )
    exemplars, prior = (name and open_source(name) for name in (own.exemplars, own.prior_dataset))
    with lock(common.workdir()):
        folder = customize(common.workdir(), pipeline, exemplars, config, prior)
        if own.save_pipeline:
            model = folder.with_name("model")
            save_pipeline(apply_custom_diffusion(pipeline, str(folder)), str(model), overwrite=model.exists())
            print(f"model: {model}")
    print(f"weights and token: {folder}")


if __name__ == "__main__":
    common.run(main, one_host=True)
