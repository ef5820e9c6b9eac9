"""`launch.train` on a tiny model: the files of --mode=customize, each mode's defaults, and contradictory flags."""

import json

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from PIL import Image

from attrib_jax.convert.adapters.custom_diffusion import apply_custom_diffusion
from attrib_jax.convert.load import load_pipeline
from attrib_jax.convert.pipeline import tokenize
from attrib_jax.evaluation.retrain import Recipe
from attrib_jax.training.customize import CustomizeConfig
from attrib_jax.training.pipeline import TrainConfig
from attrib_jax.training.tower import TowerConfig
from launch import train
from launch.flags import read_config

SETTINGS = ("--mode=customize", "--initializer_token=heart", "--train_steps=2", "--train_batch_size=4")


@pytest.fixture(scope="module")
def exemplars(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exemplars")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 20, 24, 3), dtype=np.uint8)
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a <new1> {number}\n")
    return folder


@pytest.fixture
def command(model, exemplars, tmp_path, capsys):
    def run(*arguments, settings=SETTINGS):
        given = (f"--model={model}", f"--exemplars=folder:{exemplars}") if settings else ()
        with flagsaver.flagsaver():
            flags.FLAGS(["train", f"--workdir={tmp_path / 'work'}", *given, *settings, *arguments])
            train.main()
        return capsys.readouterr().out

    return run


def test_writes_the_files_the_metrics_and_the_pipeline(command, model, tmp_path):
    output = command("--save_pipeline", "--learning_rate=1e-3")
    custom, whole = tmp_path / "work" / "custom", tmp_path / "work" / "model"
    assert f"weights and token: {custom}" in output and f"model: {whole}" in output
    lines = (tmp_path / "work" / "customize" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 2
    applied, saved = apply_custom_diffusion(load_pipeline(str(model)), str(custom)), load_pipeline(str(whole))
    kernel = "down_blocks_0/attentions_0/transformer_blocks_0/attn2/to_k/kernel".split("/")
    sides = [side.params["unet"] for side in (applied, saved)]
    for part in kernel:
        sides = [side[part] for side in sides]
    np.testing.assert_array_equal(*sides)
    np.testing.assert_array_equal(*(tokenize(side, ["a <new1> hat"]) for side in (applied, saved)))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--dataset=digits"], "dataset is 'digits'.* mode 'scratch', 'unet', 'lora', 'tower'"),
        (["--vae_steps=5"], "vae_steps is 5.* mode 'scratch'"),
        (["--latent_channels=5"], "latent_channels is 5.* mode 'scratch'"),
        (["--holdout=0.1"], "holdout is 0.1.* mode 'tower'"),
        (["--resolution=16"], "resolution is 16"),
        (["--prior_weight=2"], "prior_weight is 2.0.*prior_dataset"),
        # It is taken, for a model in a single file; a folder has its own.
        (["--tokenizer=x"], "tokenizer"),
        (["--mode=scratch"], "mode 'scratch' does not read it"),
        (["--initializer_token=zebra"], "'zebra'"),
        (["--token=new1"], "token is 'new1'"),
        (["--learning_rate=0"], "learning_rate is 0"),
        (["--exemplar_caption=a hat"], "exemplar_caption is 'a hat'"),
        (["--exemplars=folder:nowhere"], "nowhere"),
    ],
)
def test_wrong_flags_are_named_and_store_nothing(command, tmp_path, arguments, named):
    with pytest.raises((ValueError, OSError), match=named):
        command(*arguments)
    stored = [path.name for path in (tmp_path / "work").rglob("*")] if (tmp_path / "work").exists() else []
    assert stored in ([], [".lock"])


def test_a_models_images_have_its_size(command, model):
    with pytest.raises(ValueError, match="resolution is 16.*--model"):
        command("--mode=unet", f"--model={model}", "--resolution=16", settings=())


def test_missing_flags_are_named(command):
    with pytest.raises(ValueError, match="--model, --exemplars, --initializer_token not given"):
        command("--mode=customize", settings=())


@pytest.mark.parametrize(
    ("config", "given", "expected"),
    [
        (TrainConfig, (), {"steps": 3000, "batch_size": 128, "learning_rate": 1e-3, "unet_channels": (64, 128, 128)}),
        (Recipe, (), {"steps": 400, "batch_size": 64, "learning_rate": 3e-3, "warmup_steps": 40}),
        (TowerConfig, (), {"steps": 1000, "batch_size": 96, "learning_rate": 1.5e-3}),
        (CustomizeConfig, ("--initializer_token=hat",), {"steps": 300, "batch_size": 8, "learning_rate": 1e-5}),
        (TrainConfig, ("--train_steps=7", "--train_seed=3", "--latent_channels=2"), {"steps": 7, "seed": 3}),
    ],
)
def test_each_mode_has_defaults_of_its_own(config, given, expected):
    with flagsaver.flagsaver():
        flags.FLAGS(["train", *given])
        found = read_config(config)
    assert {name: getattr(found, name) for name in expected} == expected
