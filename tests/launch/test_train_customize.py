"""`launch.train --mode=customize` on a tiny model: its files, and flags that contradict each other."""

import json

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from PIL import Image

from attrib_jax.convert.adapters.custom_diffusion import apply_custom_diffusion
from attrib_jax.convert.load import load_pipeline
from attrib_jax.convert.pipeline import tokenize
from launch import common, train

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
            code = common.execute(train.main)
        return code, capsys.readouterr()

    return run


def test_writes_the_files_the_metrics_and_the_pipeline(command, model, tmp_path):
    code, output = command("--save_pipeline", "--learning_rate=1e-3")
    assert code == 0, output.err
    custom, whole = tmp_path / "work" / "custom", tmp_path / "work" / "model"
    assert f"weights and token: {custom}" in output.out and f"model: {whole}" in output.out
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
    ("arguments", "message"),
    [
        (["--dataset=openmoji"], "--dataset belong to --mode=scratch"),
        (["--vae_steps=5", "--caption_dropout=0.2"], "--vae_steps, --caption_dropout belong to --mode=scratch"),
        (["--prior_weight=2"], "--prior_weight is given without --prior_dataset"),
        (["--holdout=0.1"], "--holdout belong to --mode=tower"),
        (["--resolution=16"], "--resolution belong to --mode=scratch or unet or tower"),
        # It is taken, for a model in a single file; a folder has its own.
        (["--tokenizer=x"], "tokenizer"),
        (["--mode=scratch"], "--model, --exemplars, --initializer_token belong to --mode=customize"),
        (["--initializer_token=zebra"], "'zebra'"),
        (["--token=new1"], "token is 'new1'"),
        (["--exemplar_caption=a hat"], "does not hold the token"),
        (["--exemplars=folder:nowhere"], "nowhere"),
    ],
)
def test_wrong_flags_are_one_clear_line_and_store_nothing(command, tmp_path, arguments, message):
    code, output = command(*arguments)
    assert code == 1 and message in output.err and output.err.startswith("error:")
    stored = [path.name for path in (tmp_path / "work").rglob("*")] if (tmp_path / "work").exists() else []
    assert stored in ([], [".lock"])


def test_a_models_pictures_have_its_size(command, model):
    code, output = command("--mode=unet", f"--model={model}", "--resolution=16", settings=())
    assert code == 1 and "resolution is 16, but pictures have the size" in output.err


def test_missing_flags_are_named(command):
    code, output = command("--mode=customize", settings=())
    assert code == 1 and "--model, --exemplars, --initializer_token not given" in output.err
