"""The diffusers folder, both ways: outputs and weights against PyTorch diffusers, and damaged folders."""

import dataclasses
import functools
import json
import shutil

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from attrib_jax.convert.diffusers_folder import save_pipeline
from attrib_jax.convert.load import load_pipeline, load_unet
from attrib_jax.convert.pipeline import encode_text, tokenize
from tests.tiny_pipeline import CAPTIONS, MAX_LENGTH, make_torch_pipeline

PARTS = ("unet", "vae", "text_encoder")
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("models") / "torch")


@pytest.fixture(scope="module")
def theirs(folder):
    return make_torch_pipeline(folder)


@pytest.fixture(scope="module")
def ours(folder, theirs):
    return load_pipeline(folder)


@pytest.fixture
def copy(folder, theirs, tmp_path):
    path = tmp_path / "copy"
    shutil.copytree(folder, path)
    return path


def edit_json(path, **changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(content))


def assert_close(actual, expected):
    expected = expected.detach().numpy()
    assert np.abs(np.asarray(actual) - expected).max() < 1e-4 * np.abs(expected).max()


def assert_same_weights(left, right):
    for part in PARTS:
        left_state, right_state = (getattr(side, part).state_dict() for side in (left, right))
        assert left_state.keys() == right_state.keys()
        for name, tensor in left_state.items():
            assert torch.equal(tensor, right_state[name]), f"{part}: {name}"


def test_loaded_unet_computes_the_same(ours, theirs):
    rng = np.random.default_rng(0)
    latents, text = rng.normal(size=(2, 8, 8, 4)), rng.normal(size=(2, MAX_LENGTH, 32))
    latents, text, timesteps = latents.astype(np.float32), text.astype(np.float32), np.array([10, 900], np.int32)
    actual = jax.jit(ours.unet.apply)({"params": ours.params["unet"]}, latents, timesteps, text)
    nchw = torch.from_numpy(latents.transpose(0, 3, 1, 2))
    with torch.no_grad():
        expected = theirs.unet(nchw, torch.from_numpy(timesteps), torch.from_numpy(text)).sample
    assert_close(actual, expected.permute(0, 2, 3, 1))


def test_loaded_vae_computes_the_same(ours, theirs):
    images = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    actual = jax.jit(ours.vae.apply)({"params": ours.params["vae"]}, images)
    with torch.no_grad():
        expected = theirs.vae(torch.from_numpy(images.transpose(0, 3, 1, 2))).sample
    assert_close(actual, expected.permute(0, 2, 3, 1))


def test_loaded_tokenizer_and_text_encoder_compute_the_same(ours, theirs):
    prompts = [*CAPTIONS, "", "an unknown word"]
    ids = tokenize(ours, prompts)
    padded = theirs.tokenizer(prompts, padding="max_length", max_length=MAX_LENGTH, truncation=True)["input_ids"]
    assert ids.dtype == np.int32
    assert ids.tolist() == padded
    encode = jax.jit(functools.partial(encode_text, ours.text_encoder))
    with torch.no_grad():
        expected = theirs.text_encoder(torch.tensor(padded)).last_hidden_state
    assert_close(encode(ours.params["text_encoder"], ids), expected)


def test_loaded_schedule_is_theirs(ours, theirs):
    np.testing.assert_array_equal(ours.schedule.alphas_cumprod, theirs.scheduler.alphas_cumprod.numpy())


def test_saved_folder_opens_in_diffusers_with_the_same_weights(ours, theirs, tmp_path):
    path = str(tmp_path / "saved")
    save_pipeline(ours, path)
    reopened = diffusers.StableDiffusionPipeline.from_pretrained(path)
    assert_same_weights(reopened, theirs)
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


def test_text_encoder_is_saved_under_the_published_names(ours, tmp_path):
    save_pipeline(ours, str(tmp_path / "saved"))
    names = load_file(str(tmp_path / "saved/text_encoder/model.safetensors"))
    assert all(name.startswith("text_model.") for name in names)


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


def test_half_precision_export_is_rounded_once_and_read_as_float32(ours, tmp_path):
    path = str(tmp_path / "half")
    save_pipeline(ours, path, dtype=jnp.float16)
    assert {x.dtype.name for x in load_file(f"{path}/{UNET_FILE}").values()} == {"float16"}
    half = load_pipeline(path)
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(np.float16).astype(np.float32), ours.params)
    jax.tree.map(np.testing.assert_array_equal, half.params, rounded)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half.params)} == {"float32"}
    assert diffusers.StableDiffusionPipeline.from_pretrained(path).unet.conv_in.weight.isfinite().all()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_saved_folder_draws_in_diffusers_with_nothing_but_its_path(ours, tmp_path, dtype):
    save_pipeline(ours, str(tmp_path / "saved"), dtype=jnp.dtype(dtype))
    draw_in_diffusers(str(tmp_path / "saved"))


def test_the_shipped_model_draws_in_diffusers_with_nothing_but_its_path():
    draw_in_diffusers("models/openmoji")


def draw_in_diffusers(path):
    opened = diffusers.StableDiffusionPipeline.from_pretrained(path)
    assert {opened.unet.dtype, opened.vae.dtype, opened.text_encoder.dtype} == {torch.float32}
    opened.set_progress_bar_config(disable=True)
    image = opened("a red heart", num_inference_steps=1, output_type="np").images[0]
    assert np.isfinite(image).all()


def test_load_unet_reads_one_folder(ours, folder):
    module, params = load_unet(f"{folder}/unet")
    assert module == ours.unet
    jax.tree.map(np.testing.assert_array_equal, params, ours.params["unet"])


def test_existing_folder_is_replaced_only_on_request(ours, tmp_path):
    path = tmp_path / "saved"
    save_pipeline(ours, str(path))
    (path / "stale").touch()
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        save_pipeline(ours, str(path))
    assert (path / "stale").exists()
    save_pipeline(ours, str(path), overwrite=True)
    assert not (path / "stale").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["saved"]
    with pytest.raises(FileExistsError, match="is no pipeline folder"):
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


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="'.*nowhere' does not exist"):
        load_pipeline(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"has no model_index\.json"):
        load_pipeline(str(tmp_path))


def test_half_written_folder_lists_what_it_lacks(copy):
    (copy / UNET_FILE).unlink()
    shutil.rmtree(copy / "tokenizer")
    (copy / "scheduler/scheduler_config.json").unlink()
    expected = "it lacks: unet/diffusion_pytorch_model.safetensors, scheduler/scheduler_config.json, tokenizer/"
    with pytest.raises(FileNotFoundError, match=expected):
        load_pipeline(str(copy))


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("model_index.json", {"_class_name": "FluxPipeline"}, "'FluxPipeline'.* FLUX"),
        ("model_index.json", {"unet": ["diffusers", "UNet3D"]}, "unet of .* 'UNet3D'.* video .*UNet2DConditionModel"),
        ("model_index.json", {"vae": ["diffusers", "VQModel"]}, "vae of .* 'VQModel'.*AutoencoderKL"),
        ("unet/config.json", {"_class_name": "UNet2DModel"}, "unet/config.json, of class 'UNet2DModel'"),
        ("vae/config.json", {"_class_name": "VQModel"}, "'VQModel' is not supported, expected 'AutoencoderKL'"),
        ("text_encoder/config.json", {"model_type": "t5"}, "model_type='t5'; supported: 'clip_text_model'"),
        (
            "unet/config.json",
            {"cross_attention_dim": 40},
            "cross_attention_dim is 40 and .* is 32",
        ),
        ("unet/config.json", {"layers_per_block": 2}, r"[0-9]+ missing:\n"),
    ],
)
def test_unsupported_model(copy, file, changes, message):
    edit_json(copy / file, **changes)
    with pytest.raises(ValueError, match=message):
        load_pipeline(str(copy))


@pytest.mark.parametrize("file", [UNET_FILE, "vae/config.json", "model_index.json"])
def test_truncated_file_is_named(copy, file):
    content = (copy / file).read_bytes()
    (copy / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{file} is (truncated|damaged)"):
        load_pipeline(str(copy))


def test_nan_in_the_weights_is_named(copy):
    state = load_file(str(copy / UNET_FILE))
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    state[name] = np.where(np.arange(32) == 5, np.nan, state[name]).astype(np.float32)
    save_file(state, str(copy / UNET_FILE))
    with pytest.raises(ValueError, match=f"{UNET_FILE}: tensor {name} holds a NaN"):
        load_pipeline(str(copy))


def test_missing_and_extra_tensors_are_listed(copy):
    state = load_file(str(copy / UNET_FILE))
    state["other.weight"] = state.pop("conv_in.weight")
    save_file(state, str(copy / UNET_FILE))
    with pytest.raises(ValueError, match=r"1 missing:\n  conv_in\.weight (?s:.)*1 unexpected:\n  other\.weight"):
        load_pipeline(str(copy))


def test_an_autoencoder_trained_on_two_sides_loads_and_keeps_them(copy, ours, tmp_path):
    edit_json(copy / "vae/config.json", sample_size=[16, 24])
    loaded = load_pipeline(str(copy))
    jax.tree.map(np.testing.assert_array_equal, loaded.params["vae"], ours.params["vae"])
    save_pipeline(loaded, str(tmp_path / "saved"))
    assert json.loads((tmp_path / "saved/vae/config.json").read_text())["sample_size"] == [16, 24]


def test_old_autoencoder_names_load(copy, ours):
    path = str(copy / "vae/diffusion_pytorch_model.safetensors")
    renames = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    state = {}
    for name, array in load_file(path).items():
        for new, old in renames.items():
            name = name.replace(new, old)
        state[name] = array
    assert any("proj_attn" in name for name in state)
    save_file(state, path)
    jax.tree.map(np.testing.assert_array_equal, load_pipeline(str(copy)).params["vae"], ours.params["vae"])
