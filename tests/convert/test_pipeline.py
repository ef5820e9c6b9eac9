"""The diffusers folder, both ways: outputs and weights against PyTorch diffusers, and damaged folders."""

import dataclasses
import shutil

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from attrib_jax.convert.diffusers_folder import save_pipeline
from attrib_jax.convert.load import load_pipeline
from attrib_jax.convert.pipeline import tokenize
from tests.convert import old_layout
from tests.convert.outputs import (
    assert_same_modules,
    relative_error,
    text_states,
    torch_text_states,
    torch_unet_output,
    unet_output,
)
from tests.tiny_pipeline import CAPTIONS, MAX_LENGTH

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


def test_loaded_parts_compute_the_same(ours, theirs):
    assert relative_error(unet_output(ours), torch_unet_output(theirs)) < 1e-5
    images = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    decoded = np.asarray(jax.jit(ours.vae.apply)({"params": ours.params["vae"]}, images))
    with torch.no_grad():
        expected = theirs.vae(torch.from_numpy(images.transpose(0, 3, 1, 2))).sample
    assert relative_error(decoded, expected.permute(0, 2, 3, 1).numpy()) < 1e-4
    prompts = [*CAPTIONS, "", "an unknown word"]
    padded = theirs.tokenizer(prompts, padding="max_length", max_length=MAX_LENGTH, truncation=True)["input_ids"]
    assert tokenize(ours, prompts).dtype == np.int32 and tokenize(ours, prompts).tolist() == padded
    assert relative_error(text_states(ours, prompts), torch_text_states(theirs, prompts)) < 1e-5
    np.testing.assert_array_equal(ours.schedule.alphas_cumprod, theirs.scheduler.alphas_cumprod.numpy())


def test_saved_folder_opens_in_diffusers_with_the_same_weights(ours, theirs, tmp_path):
    path = str(tmp_path / "saved")
    save_pipeline(ours, path)
    reopened = diffusers.StableDiffusionPipeline.from_pretrained(path)
    assert_same_modules(reopened, theirs)
    assert reopened.safety_checker is None
    settings = [dict(side.scheduler.config) for side in (reopened, theirs)]
    for setting in settings:
        setting.pop("_use_default_values", None)
    assert settings[0] == settings[1]
    assert reopened.tokenizer(list(CAPTIONS))["input_ids"] == theirs.tokenizer(list(CAPTIONS))["input_ids"]
    for part in ("unet", "vae"):
        written = getattr(ours, part).config.to_dict()
        theirs_config = getattr(theirs, part).config
        for key, value in written.items():
            if key != "_class_name":
                assert theirs_config[key] == value or list(theirs_config[key]) == value, f"{part}: {key}"
    assert all(name.startswith("text_model.") for name in load_file(f"{path}/text_encoder/model.safetensors"))


def test_round_trip_is_exact(ours, tmp_path):
    save_pipeline(ours, str(tmp_path / "one"))
    again = load_pipeline(str(tmp_path / "one"))
    for field in ("unet", "vae", "text_encoder"):
        assert getattr(again, field) == getattr(ours, field)
    assert again.schedule.to_config() == ours.schedule.to_config()
    jax.tree.map(np.testing.assert_array_equal, again.params, ours.params)
    save_pipeline(again, str(tmp_path / "two"))
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len(files) >= 10
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "shipped"])
def test_a_saved_folder_draws_in_diffusers_with_nothing_but_its_path(ours, tmp_path, dtype):
    path = "models/openmoji" if dtype == "shipped" else str(tmp_path / "saved")
    if dtype != "shipped":
        save_pipeline(ours, path, dtype=jnp.dtype(dtype))
        assert {x.dtype.name for x in load_file(f"{path}/{UNET_FILE}").values()} == {dtype}
        rounded = jax.tree.map(lambda x: np.asarray(x).astype(jnp.dtype(dtype)).astype(np.float32), ours.params)
        jax.tree.map(np.testing.assert_array_equal, load_pipeline(path).params, rounded)
    opened = diffusers.StableDiffusionPipeline.from_pretrained(path)
    assert {opened.unet.dtype, opened.vae.dtype, opened.text_encoder.dtype} == {torch.float32}
    opened.set_progress_bar_config(disable=True)
    image = opened("a red heart", num_inference_steps=1, output_type="np").images[0]
    assert np.isfinite(image).all()


def test_existing_folder_is_replaced_only_on_request(ours, tmp_path):
    path = tmp_path / "saved"
    save_pipeline(ours, str(path))
    (path / "stale").touch()
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_pipeline(ours, str(path))
    assert (path / "stale").exists()
    save_pipeline(ours, str(path), overwrite=True)
    assert not (path / "stale").exists() and [entry.name for entry in tmp_path.iterdir()] == ["saved"]
    with pytest.raises(FileExistsError, match=str(tmp_path)):
        save_pipeline(ours, str(tmp_path), overwrite=True)


def test_failed_save_leaves_nothing_behind(ours, tmp_path):
    vae = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), ours.params["vae"])
    broken = dataclasses.replace(ours, params=ours.params | {"vae": vae})
    with pytest.raises(ValueError, match="holds a NaN"):
        save_pipeline(broken, str(tmp_path / "saved"))
    assert list(tmp_path.iterdir()) == []


def test_parts_that_do_not_fit_are_refused(ours):
    wide = dataclasses.replace(ours.unet.config, cross_attention_dim=48)
    with pytest.raises(ValueError, match="cross_attention_dim is 48 and text_encoder hidden_size is 32"):
        dataclasses.replace(ours, unet=ours.unet.clone(config=wide))
    short = dataclasses.replace(ours.text_encoder.config, max_position_embeddings=4)
    with pytest.raises(ValueError, match="model_max_length is 8.*only 4 positions"):
        dataclasses.replace(ours, text_encoder=ours.text_encoder.clone(config=short))


def test_absent_and_half_written_folders_list_what_they_lack(copy, tmp_path):
    (copy / UNET_FILE).unlink()
    shutil.rmtree(copy / "tokenizer")
    (copy / "scheduler/scheduler_config.json").unlink()
    lacking = "unet/diffusion_pytorch_model.safetensors, scheduler/scheduler_config.json, tokenizer/"
    for path, message in ((tmp_path / "nowhere", "nowhere"), (tmp_path, "model_index.json"), (copy, lacking)):
        with pytest.raises(FileNotFoundError, match=message):
            load_pipeline(str(path))


TO_K = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("model_index.json", {"_class_name": "FluxFillPipeline"}, "'FluxFillPipeline'.* FLUX"),
        ("model_index.json", {"unet": ["diffusers", "UNet3D"]}, "unet of .* 'UNet3D'"),
        ("model_index.json", {"vae": ["diffusers", "VQModel"]}, "vae of .* 'VQModel'"),
        ("unet/config.json", {"_class_name": "UNet2DModel"}, "unet/config.json, .*'UNet2DModel'"),
        ("vae/config.json", {"_class_name": "VQModel"}, "'VQModel'"),
        ("text_encoder/config.json", {"model_type": "t5"}, "model_type='t5'"),
        ("unet/config.json", {"cross_attention_dim": 40}, "cross_attention_dim is 40 and .* is 32"),
        ("unet/config.json", {"layers_per_block": 2}, r"[0-9]+ missing:\n"),
        *[
            (file, None, f"{file} is (truncated|damaged)")
            for file in (UNET_FILE, "vae/config.json", "model_index.json")
        ],
        (UNET_FILE, lambda state: {TO_K: state[TO_K] * np.nan}, f"{UNET_FILE}: tensor {TO_K} holds a NaN"),
        (
            UNET_FILE,
            lambda state: {"other.weight": state.pop("conv_in.weight")},
            r"1 missing:\n  conv_in\.weight (?s:.)*1 unexpected:\n  other\.weight",
        ),
    ],
)
def test_unsupported_and_damaged_models_are_named(copy, file, change, message):
    path = copy / file
    if change is None:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif callable(change):
        state = load_file(path)
        new = change(state)
        save_file(state | new, path)
    else:
        old_layout.write(path, old_layout.read(path) | change)
    with pytest.raises(ValueError, match=message):
        load_pipeline(str(copy))


def test_an_autoencoder_trained_on_two_sides_loads_and_keeps_them(copy, ours, tmp_path):
    config = copy / "vae/config.json"
    old_layout.write(config, old_layout.read(config) | {"sample_size": [16, 24]})
    loaded = load_pipeline(str(copy))
    jax.tree.map(np.testing.assert_array_equal, loaded.params["vae"], ours.params["vae"])
    save_pipeline(loaded, str(tmp_path / "saved"))
    assert old_layout.read(tmp_path / "saved/vae/config.json")["sample_size"] == [16, 24]
