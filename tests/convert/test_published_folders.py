"""Folders in the form of the published ones, and every form of their weights: read as they are."""

import shutil
import subprocess
import sys

import diffusers
import jax
import numpy as np
import pytest

from attrib_jax.convert.diffusers_folder import save_pipeline
from attrib_jax.convert.load import load_pipeline
from attrib_jax.convert.pipeline import tokenize
from attrib_jax.convert.weights.files import write_weights
from tests.convert import old_layout
from tests.convert.outputs import assert_same_modules
from tests.tiny_pipeline import CAPTIONS, MAX_LENGTH


@pytest.fixture(scope="module")
def old_folder(folder, tmp_path_factory):
    path = old_layout.copy_folder(folder, tmp_path_factory.mktemp("old") / "sd1")
    old_layout.age_folder(path)
    return path


@pytest.fixture
def old_copy(old_folder, tmp_path):
    return old_layout.copy_folder(old_folder, tmp_path / "old")


def assert_same_pipeline(left, right):
    assert (left.unet, left.vae) == (right.unet, right.vae)
    jax.tree.map(np.testing.assert_array_equal, left.params, right.params)
    prompts = [*CAPTIONS, "", "an unknown word <|endoftext|>", "a polar bear " * 9]
    np.testing.assert_array_equal(tokenize(left, prompts), tokenize(right, prompts))
    np.testing.assert_array_equal(left.schedule.alphas_cumprod, right.schedule.alphas_cumprod)


FORMS = {
    "safetensors": {},
    "bin": {"kind": "bin"},
    "safetensors in shards": {"shards": 3},
    "bin in shards": {"kind": "bin", "shards": 2},
}


@pytest.mark.parametrize("form", FORMS)
def test_published_folders_load_as_they_are(old_copy, ours, form):
    old_layout.store_weights(old_copy, **FORMS[form])
    assert_same_pipeline(load_pipeline(str(old_copy)), ours)


VARIANTS = {
    "fp16.safetensors": {},
    "fp16.bin": {"kind": "bin"},
    "safetensors.index.fp16.json": {"shards": 2},
    "bin.index.fp16.json": {"kind": "bin", "shards": 2},
    "safetensors.fp16.index.json": {"shards": 2, "early_index": True},
}


@pytest.mark.parametrize("form", VARIANTS)
def test_variants_load_by_name_and_beside_full_precision_only_so(old_copy, ours, form):
    old_layout.store_weights(old_copy, variant="fp16", dtype="float16", keep=True, **VARIANTS[form])
    assert list((old_copy / "unet").glob(f"*.{form}"))
    assert_same_pipeline(load_pipeline(str(old_copy)), ours)
    half = load_pipeline(str(old_copy), variant="fp16")
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(np.float16).astype(np.float32), ours.params)
    jax.tree.map(np.testing.assert_array_equal, half.params, rounded)


def test_half_precision_alone_is_read_with_a_word_about_it(old_copy, caplog):
    old_layout.store_weights(old_copy, variant="fp16", dtype="float16")
    load_pipeline(str(old_copy))
    assert caplog.text.count("fp16 weights of") == 3


def test_a_variant_of_the_unet_alone(old_copy, ours, caplog):
    doubled = {name: 2 * x for name, x in old_layout.read_weights(old_copy / "unet").items()}
    old_layout.store_weights(old_copy, variant="non_ema", parts=("unet",), keep=True)
    write_weights(doubled, old_copy / "unet/diffusion_pytorch_model.non_ema.safetensors")
    loaded = load_pipeline(str(old_copy), variant="non_ema")
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, 2 * y), loaded.params["unet"], ours.params["unet"])
    jax.tree.map(np.testing.assert_array_equal, loaded.params["vae"], ours.params["vae"])
    assert "full precision weights of vae" in caplog.text


def test_an_absent_variant_lists_what_is_there(old_copy, tmp_path):
    old_layout.store_weights(old_copy, kind="bin", variant="fp16", parts=("vae",), keep=True)
    expected = "'bf16'.* unet: full precision; vae: full precision, fp16; text_encoder: full precision"
    with pytest.raises(FileNotFoundError, match=expected):
        load_pipeline(str(old_copy), variant="bf16")
    (tmp_path / "model.ckpt").touch()
    with pytest.raises(ValueError, match="variant is 'fp16'.*model.ckpt"):
        load_pipeline(str(tmp_path / "model.ckpt"), variant="fp16")


def test_an_interrupted_copy_of_shards_is_named(old_copy):
    old_layout.store_weights(old_copy, shards=2)
    (old_copy / "vae/diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"vae/.*\.index\.json .*00002-of"):
        load_pipeline(str(old_copy))


def test_stable_diffusion_2_folder_and_back_through_diffusers(folder, theirs, ours, tmp_path):
    old = old_layout.copy_folder(folder, tmp_path / "sd2")
    old_layout.age_folder(old, generation=2)
    loaded = load_pipeline(str(old))
    jax.tree.map(np.testing.assert_array_equal, loaded.params, ours.params)
    assert loaded.schedule.prediction_type == "v_prediction"
    save_pipeline(loaded, str(tmp_path / "saved"))
    reopened = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert_same_modules(reopened, theirs)
    assert reopened.scheduler.config.prediction_type == "v_prediction"
    ids = reopened.tokenizer(["red heart!"], padding="max_length", max_length=MAX_LENGTH)["input_ids"]
    assert tokenize(loaded, ["red heart!"]).tolist() == ids
    assert ids[0][-1] == 0


@pytest.mark.parametrize("scheduler", ["PNDM", "DDIM", "DDPM", "LMSDiscrete", "EulerDiscrete", "DPMSolverMultistep"])
def test_any_scheduler_class_gives_the_schedule(copy, scheduler):
    class_ = getattr(diffusers, f"{scheduler}Scheduler")
    class_(beta_start=0.001, beta_end=0.01, beta_schedule="linear").save_pretrained(copy / "scheduler")
    index = old_layout.read(copy / "model_index.json")
    old_layout.write(copy / "model_index.json", index | {"scheduler": ["diffusers", class_.__name__]})
    schedule = load_pipeline(str(copy)).schedule
    expected = np.cumprod(1 - np.linspace(0.001, 0.01, 1000))
    np.testing.assert_allclose(schedule.alphas_cumprod, expected, rtol=1e-5)


@pytest.mark.parametrize("length", [None, int(1e30)])
def test_length_that_the_tokenizer_does_not_tell_is_the_text_encoders(copy, ours, length):
    old_layout.age_tokenizer(copy / "tokenizer", model_max_length=length)
    assert_same_pipeline(load_pipeline(str(copy)), ours)


def test_tokenizer_and_prediction_type_of_choice(copy, folder, old_folder, ours):
    shutil.rmtree(copy / "tokenizer")
    for tokenizer in (f"{folder}/tokenizer", folder, str(old_folder)):
        loaded = load_pipeline(str(copy), tokenizer=tokenizer, prediction_type="v_prediction")
        assert loaded.schedule.prediction_type == "v_prediction"
        assert tokenize(loaded, CAPTIONS).tolist() == tokenize(ours, CAPTIONS).tolist()
    with pytest.raises(ValueError, match="prediction_type is 'noise'"):
        load_pipeline(folder, prediction_type="noise")


def test_safetensors_folders_need_no_torch(old_folder):
    script = (
        "import sys, importlib.machinery as m\n"
        "find = m.PathFinder.find_spec\n"
        "m.PathFinder.find_spec = lambda name, *rest: None if name.split('.')[0] == 'torch' else find(name, *rest)\n"
        "from attrib_jax.convert.load import load_pipeline\n"
        "from attrib_jax.convert.pipeline import tokenize\n"
        "print(tokenize(load_pipeline(sys.argv[1]), ['a red heart']).shape, 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", script, str(old_folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == f"(1, {MAX_LENGTH}) False", result.stderr
