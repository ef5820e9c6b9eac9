"""Single files in the original naming, both ways, against diffusers' own converters for them."""

import dataclasses
import logging
import pathlib
import shutil

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import attrib_jax
from attrib_jax.convert.load import load_pipeline
from attrib_jax.convert.pipeline import tokenize
from attrib_jax.convert.single_file import load_single_file, save_single_file, uninferable_config
from attrib_jax.convert.weights.files import write_weights
from tests.convert.outputs import assert_same_modules
from tests.convert.shrunken import rewrite
from tests.tiny_pipeline import CAPTIONS, MAX_LENGTH

PARTS = ("unet", "vae", "text_encoder")
RESBLOCKS = "cond_stage_model.model.transformer.resblocks."
# Keys that change no result.
INERT = {"vae": ["sample_size"], "text_encoder": [f"{kind}_id" for kind in ("bos_token", "eos_token", "pad_token")]}
INERT["text_encoder"].append("projection_dim")
UNET = "model.diffusion_model."
TO_K = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


@pytest.fixture(params=["sd1", "sd2"])
def model(request):
    return request.getfixturevalue(request.param)


def assert_same(actual, expected):
    """The same modules, schedule and weights; keys of a config that change no result may differ."""
    for part in PARTS:
        inert = dict.fromkeys(INERT.get(part, ()))
        configs = [dataclasses.replace(getattr(side, part).config, **inert) for side in (actual, expected)]
        assert configs[0] == configs[1]
    left, right = actual.schedule, expected.schedule
    assert left.prediction_type == right.prediction_type
    np.testing.assert_array_equal(left.alphas_cumprod, right.alphas_cumprod)
    jax.tree.map(np.testing.assert_array_equal, actual.params, expected.params)


@pytest.mark.filterwarnings("ignore")
def test_saved_file_opens_in_diffusers_with_the_same_weights(model):
    opened = diffusers.StableDiffusionPipeline.from_single_file(model.file, config=model.folder, local_files_only=True)
    assert_same_modules(opened, model.theirs)


def test_saved_file_loads_to_the_bit(model, caplog):
    caplog.set_level(logging.INFO)
    assert_same(model.load(), model.ours)
    assert uninferable_config(model.ours) == {}
    assert caplog.messages == []


def training_extras(state):
    """What a .ckpt of the original training code holds beside the weights, as in the published files.

    The averaged copies are infinite, which no tensor that is read may be.
    """
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    unet = [name for name in state if name.startswith("model.diffusion_model.")]
    buffers = ("alphas_cumprod_prev", "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod", "betas")
    buffers += ("sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_mean_coef1", "logvar")
    return {
        **{"model_ema." + name.removeprefix("model.").replace(".", ""): state[name] + torch.inf for name in unet},
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(1, dtype=torch.int32),
        **{name: betas.float() for name in buffers},
        "alphas_cumprod": torch.cumprod(1 - betas, 0).float(),
        "first_stage_model.loss.logvar": torch.zeros(()),
        "first_stage_model.loss.discriminator.main.0.weight": torch.zeros(4, 3, 4, 4),
    }


def save_ckpt(state, path, step):
    torch.save({"epoch": 3, "global_step": step, "callbacks": {"best": torch.zeros(3)}, "state_dict": state}, path)
    return path


@pytest.mark.parametrize("has_text_model", [True, False])
def test_ckpt_of_the_first_family(sd1, tmp_path, caplog, has_text_model):
    state = load_file(sd1.file)
    state |= training_extras(state)
    text = "cond_stage_model.transformer.text_model."
    state[f"{text}embeddings.position_ids"] = torch.arange(MAX_LENGTH)[None]
    if not has_text_model:
        state = {name.replace(text, "cond_stage_model.transformer."): x for name, x in state.items()}
    caplog.set_level(logging.INFO)
    assert_same(sd1.load(save_ckpt(state, tmp_path / "model.ckpt", 470_000)), sd1.ours)
    unet_count = sum(name.startswith("model.diffusion_model.") for name in state)
    assert f"left out {unet_count + 2} tensors: averaged copies" in caplog.text
    assert "left out 1 tensors: unused tensors of the text encoder" in caplog.text


@pytest.mark.parametrize(
    ("step", "prediction"), [(110_000, "v_prediction"), (875_000, "epsilon"), (220_000, "epsilon")]
)
def test_ckpt_of_the_second_family_tells_its_prediction_by_its_step(sd2, tmp_path, step, prediction):
    state = load_file(sd2.file)
    state |= training_extras(state)
    text = "cond_stage_model.model."
    state |= {f"{text}text_projection": torch.zeros(64, 64), f"{text}logit_scale": torch.zeros(())}
    state[f"{text}attn_mask"] = torch.full((MAX_LENGTH, MAX_LENGTH), -torch.inf)
    loaded = sd2.load(save_ckpt(state, tmp_path / "model.ckpt", step))
    assert loaded.schedule.prediction_type == prediction
    assert loaded.unet.config.sample_size == (96 if prediction == "v_prediction" else 64)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, sd2.ours.params)


@pytest.mark.parametrize("step", [None, 0, 3000])
def test_second_family_asks_for_the_prediction_type(sd2, tmp_path, step):
    if step is None:
        path = rewrite(sd2.file, tmp_path / "model.safetensors")
    else:
        path = save_ckpt(load_file(sd2.file), tmp_path / "model.ckpt", step)
    with pytest.raises(ValueError, match=rf"step: {step}\b.*--prediction_type"):
        sd2.load(path)
    assert sd2.load(path, prediction_type="epsilon").schedule.prediction_type == "epsilon"
    with pytest.raises(ValueError, match="prediction_type is 'sample'"):
        sd2.load(path, prediction_type="sample")


def test_text_layers_after_the_last_used_are_left_out(sd2, tmp_path):
    def add_layer(state):
        last = {name: x for name, x in state.items() if name.startswith(f"{RESBLOCKS}1.")}
        return state | {name.replace(f"{RESBLOCKS}1.", f"{RESBLOCKS}2."): x + 1 for name, x in last.items()}

    path = rewrite(sd2.file, tmp_path / "long.safetensors", add_layer)
    config = {"text_encoder": {"num_hidden_layers": 2}}
    assert_same(sd2.load(path, prediction_type="v_prediction", config=config), sd2.ours)
    assert sd2.load(path, prediction_type="epsilon").text_encoder.config.num_hidden_layers == 3


def test_what_the_shapes_do_not_tell_is_said_and_taken(folder, ours, tmp_path, caplog):
    path = str(tmp_path / "x.safetensors")
    save_single_file(ours, path)
    config = uninferable_config(ours)
    assert config == {
        "unet": {"sample_size": 8, "norm_num_groups": 8, "attention_head_dim": 4},
        "vae": {"norm_num_groups": 8},
        "text_encoder": {"num_attention_heads": 4},
    }
    assert any(path in message and repr(config) in message for message in caplog.messages)
    with pytest.warns(DeprecationWarning, match="uninferable_config"):
        assert attrib_jax.untold_config(ours) == config
    assert_same(load_single_file(path, folder), ours)
    bare = rewrite(path, tmp_path / "bare.safetensors")
    assert_same(load_single_file(bare, folder, config=config), ours)
    with pytest.raises(ValueError, match="text_encoder .*num_attention_heads.*--model_config"):
        load_single_file(bare, folder)
    with pytest.raises(ValueError, match="config .*parts text"):
        load_single_file(path, folder, config={"text": {}})


@pytest.mark.parametrize("upcast", [True, None])
def test_upcast_attention_is_kept(sd2, tmp_path, upcast):
    unet = sd2.ours.unet.clone(config=dataclasses.replace(sd2.ours.unet.config, upcast_attention=upcast))
    pipeline = dataclasses.replace(sd2.ours, unet=unet)
    # Null is how older files have false, which needs no telling.
    assert uninferable_config(pipeline) == ({"unet": {"upcast_attention": True}} if upcast else {})
    path = str(tmp_path / "x.safetensors")
    save_single_file(pipeline, path)
    assert sd2.load(path).unet.config.upcast_attention is bool(upcast)


def test_a_model_on_pixels_is_refused(tmp_path):
    digits = load_pipeline(str(pathlib.Path(__file__).parents[2] / "models/digits"))
    for export in (uninferable_config, lambda pipeline: save_single_file(pipeline, str(tmp_path / "x.safetensors"))):
        with pytest.raises(ValueError, match="vae is a PixelAutoencoder"):
            export(digits)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stored", ["{", "[]", '{"unet": 1}', "[" * 100_000], ids=["open", "list", "number", "deep"])
def test_a_damaged_config_in_the_header_is_named(sd1, tmp_path, stored):
    path = rewrite(sd1.file, tmp_path / "x.safetensors", metadata={"attrib_jax_config": stored})
    with pytest.raises(ValueError, match="x.safetensors.*attrib_jax_config"):
        sd1.load(path)
    assert_same(sd1.load(path, config={}), sd1.ours)


def test_scale_factor_of_the_file_is_taken(sd1, tmp_path):
    path = rewrite(sd1.file, tmp_path / "x.safetensors", lambda state: state | {"scale_factor": torch.tensor(0.25)})
    assert sd1.load(path).vae.config.scaling_factor == 0.25
    assert sd1.load(path, config={"vae": {"scaling_factor": 0.5}}).vae.config.scaling_factor == 0.5


def test_another_noise_schedule_is_refused(sd1, tmp_path):
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
    path = rewrite(sd1.file, tmp_path / "x.safetensors", lambda state: state | {"alphas_cumprod": alphas})
    with pytest.raises(ValueError, match="alphas_cumprod.*--model_config"):
        sd1.load(path)
    linear = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
    schedule = sd1.load(path, config={"scheduler": linear}).schedule
    np.testing.assert_allclose(schedule.alphas_cumprod, alphas, rtol=1e-4)


def test_half_precision_file(sd2, tmp_path):
    path = str(tmp_path / "half.safetensors")
    save_single_file(sd2.ours, path, dtype=jnp.float16)
    assert {x.dtype for x in load_file(path).values()} == {torch.float16}
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(np.float16).astype(np.float32), sd2.ours.params)
    jax.tree.map(np.testing.assert_array_equal, sd2.load(path).params, rounded)


def test_failed_save_leaves_the_old_file(sd1, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_text("old")
    vae = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), sd1.ours.params["vae"])
    with pytest.raises(ValueError, match=r"tensor first_stage_model\..* holds a NaN"):
        save_single_file(dataclasses.replace(sd1.ours, params=sd1.ours.params | {"vae": vae}), str(path))
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.safetensors"]
    assert path.read_text() == "old"


def test_tokenizer_is_asked_for(sd1, tmp_path):
    with pytest.raises(ValueError, match="tokenizer=FOLDER"):
        load_single_file(sd1.file, None)
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        load_single_file(sd1.file, str(tmp_path))
    for name in ("vocab.json", "merges.txt"):  # which do not tell the length
        shutil.copy(f"{sd1.folder}/tokenizer/{name}", tmp_path)
    for folder in (tmp_path, f"{sd1.folder}/tokenizer"):
        loaded = load_single_file(sd1.file, str(folder))
        assert tokenize(loaded, CAPTIONS).tolist() == tokenize(sd1.ours, CAPTIONS).tolist()


CONV_IN = "first_stage_model.decoder.conv_in.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.update({f"{UNET}x": state.pop(TO_K)}), rf"1 missing:\n  {TO_K}\n1 unexpected:\n  {UNET}x"),
        (
            lambda state: state.update({TO_K: torch.zeros(32, 40)}),
            r"\(unet\)(?s:.)*to_k.weight: file \(32, 40\), model \(32, 64",
        ),
        (lambda state: state.pop(CONV_IN) is None, rf"the tensor {CONV_IN}"),
    ],
    ids=["renamed", "misshaped", "missing"],
)
def test_missing_unexpected_and_misshaped_tensors_are_listed(sd1, tmp_path, change, message):
    path = rewrite(sd1.file, tmp_path / "x.safetensors", change)
    with pytest.raises(ValueError, match=message):
        sd1.load(path)


FAMILIES = {
    "conditioner.embedders.0.transformer.text_model.x.bias": "no second text encoder",
    "conditioner.embedders.0.model.ln_final.weight": "refiner of Stable Diffusion XL",
    f"{UNET}joint_blocks.0.x_block.attn.qkv.weight": "Stable Diffusion 3",
    f"{UNET}double_blocks.0.img_attn.qkv.weight": "FLUX",
    "double_blocks.0.img_attn.qkv.weight": "FLUX",
    "control_model.input_blocks.0.0.weight": "ControlNet",
    f"{UNET}input_blocks.1.0.time_stack.emb_layers.1.weight": "video model",
    "low_scale_model.x": "upscaler",
    f"{UNET}input_blocks.4.1.proj_in.weight.quant_state.nf4": "quantised weights",
    "down_blocks.0.resnets.0.conv1.weight": "UNet alone.*--unet_config",
    "encoder.conv_in.weight": "autoencoder alone",
    f"{UNET}out.2.bias": r"first_stage_model.*no text encoder",
    "lora_unet_mid_block.alpha": "LoRA.*--lora",
    "unet.x.to_k.lora_A.weight": "LoRA.*--lora",
    "emb_params": "learnt token.*--tokens",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_another_family_is_named(sd1, tmp_path, name):
    save_file({name: torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=f"x.safetensors .*{FAMILIES[name]}"):
        sd1.load(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("name", "shape", "what"),
    [
        ("input_blocks.0.0.weight", (32, 9, 3, 3), "an inpainting model"),
        ("input_blocks.0.0.weight", (32, 8, 3, 3), "an image-editing model"),
        ("input_blocks.0.0.weight", (32, 5, 3, 3), "a depth-to-image model"),
        ("input_blocks.0.0.weight", (32, 7, 3, 3), "an upscaler"),
        ("input_blocks.0.0.weight", (32, 13, 3, 3), "in_channels is 13, out_channels 4"),
        ("label_emb.0.0.weight", (8, 2816), "Stable Diffusion XL"),
        ("label_emb.0.0.weight", (8, 2560), "the refiner of Stable Diffusion XL"),
    ],
)
def test_other_inputs_of_the_unet_are_named(sd1, tmp_path, name, shape, what):
    path = rewrite(sd1.file, tmp_path / "x.safetensors", lambda state: state | {UNET + name: torch.zeros(shape)})
    with pytest.raises(ValueError, match=what):
        sd1.load(path)


@pytest.fixture(scope="module")
def tensors(sd1, sd2):
    return [{name: x.numpy() for name, x in load_file(model.file).items()} for model in (sd1, sd2)]


TELLING = ("conv_in.weight", "0.0.weight", "proj_in.weight", "in_proj_weight", "embedding", "c_fc.weight", "fc1.weight")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_state_dicts_never_crash(sd1, tensors, tmp_path, data):
    state = dict(data.draw(st.sampled_from(tensors)))
    telling = [name for name in state if name.endswith(TELLING)]
    for _ in range(data.draw(st.integers(1, 2))):
        name = data.draw(st.sampled_from(telling) | st.sampled_from(sorted(state)))
        shape = tuple(data.draw(st.lists(st.integers(0, 70), max_size=4)))
        kind = data.draw(st.sampled_from(["drop", "reshape", "rename"]))
        array = state.pop(name, np.zeros(1, np.float32))
        if kind == "reshape":
            state[name] = np.zeros(shape, np.float32)
        elif kind == "rename":
            state[name + data.draw(st.sampled_from([".0", "_", ".weight", ".99999999999"]))] = array
    path = str(tmp_path / "x.safetensors")
    write_weights(state, path)
    try:
        assert load_single_file(path, sd1.folder, prediction_type="epsilon").params
    except ValueError as error:
        assert str(error).startswith((path, "the parts do not fit", "the tokenizer"))
