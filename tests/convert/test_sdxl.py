"""Stable Diffusion XL in folders and single files, both ways, and prompts and samples beside diffusers' pipeline."""

import json
import shutil

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from attrib_jax.convert.diffusers_folder import save_pipeline
from attrib_jax.convert.load import load_pipeline, load_unet
from attrib_jax.convert.pipeline import encode_text, tokenize, unconditional, with_size_ids
from attrib_jax.convert.single_file import load_single_file, save_single_file, uninferable_config
from attrib_jax.diffusion.samplers import sample
from attrib_jax.models.predictor import predictor
from tests.convert.outputs import relative_error
from tests.tiny_pipeline import CAPTIONS, make_torch_xl_pipeline

pytestmark = pytest.mark.filterwarnings("ignore")
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
PROJECTION = "conditioner.embedders.1.model.text_projection"


@pytest.fixture(scope="module")
def xl_folder(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("models") / "two levels")
    make_torch_xl_pipeline(path)
    return path


@pytest.fixture(scope="module")
def xl_pipeline(xl_folder):
    return load_pipeline(xl_folder)


@pytest.fixture(scope="module")
def theirs(xl_folder):
    return diffusers.StableDiffusionXLPipeline.from_pretrained(xl_folder, add_watermarker=False)


@pytest.fixture(scope="module")
def file(xl_pipeline, tmp_path_factory):
    path = str(tmp_path_factory.mktemp("single") / "xl.safetensors")
    save_single_file(xl_pipeline, path)
    return path


def assert_same_modules(left, right):
    for part in PARTS:
        states = [getattr(side, part).state_dict() for side in (left, right)]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_prompts_give_the_states_and_pooled_text_of_diffusers(xl_pipeline, theirs):
    prompts = list(CAPTIONS)
    with torch.no_grad():
        states, negative, pooled, _ = theirs.encode_prompt(prompts, device="cpu")
    ids = tokenize(xl_pipeline, prompts)
    assert (ids["text_encoder"] != ids["text_encoder_2"]).any()  # they pad differently
    found = jax.jit(encode_text, static_argnums=0)(xl_pipeline.conditioner, xl_pipeline.conditioner_params, ids)
    assert relative_error(found["text"], states.numpy()) < 1e-5
    assert relative_error(found["pooled"], pooled.numpy()) < 1e-5
    assert xl_pipeline.zeros_for_empty_prompt and not negative.any() and not unconditional(xl_pipeline)["text"].any()


def test_a_guided_sample_is_that_of_diffusers_from_the_same_noise(xl_pipeline, theirs):
    prompt, steps, guidance = CAPTIONS[0], 3, 5.0
    noise = np.random.default_rng(0).normal(size=(1, 8, 8, 4)).astype(np.float32)
    expected = theirs(
        prompt,
        num_inference_steps=steps,
        guidance_scale=guidance,
        latents=torch.from_numpy(noise.transpose(0, 3, 1, 2)),
        output_type="latent",
    ).images.permute(0, 2, 3, 1)
    text = encode_text(xl_pipeline.conditioner, xl_pipeline.conditioner_params, tokenize(xl_pipeline, [prompt]))
    found = sample(
        predictor(xl_pipeline.unet),
        xl_pipeline.params["unet"],
        xl_pipeline.schedule,
        with_size_ids(xl_pipeline, text),
        with_size_ids(xl_pipeline, unconditional(xl_pipeline)),
        noise,
        steps,
        guidance,
    )
    assert relative_error(found, expected.numpy()) < 1e-4


def test_a_saved_folder_opens_in_diffusers_with_only_its_path(xl_pipeline, theirs, tmp_path):
    save_pipeline(xl_pipeline, str(tmp_path / "saved"))
    opened = diffusers.DiffusionPipeline.from_pretrained(str(tmp_path / "saved"))
    assert type(opened) is diffusers.StableDiffusionXLPipeline and opened.config.force_zeros_for_empty_prompt
    assert_same_modules(opened, theirs)
    assert [each.pad_token for each in (opened.tokenizer, opened.tokenizer_2)] == ["<|endoftext|>", "!"]


def test_a_single_file_is_read_back_to_the_bit_and_by_diffusers(xl_pipeline, theirs, xl_folder, file):
    assert uninferable_config(xl_pipeline) == {"unet": {"sample_size": 8}}
    again = load_pipeline(file, tokenizer=xl_folder)
    jax.tree.map(np.testing.assert_array_equal, again.params, xl_pipeline.params)
    assert again.unet.config == xl_pipeline.unet.config
    assert again.text_encoder_2.config == xl_pipeline.text_encoder_2.config
    assert again.vae.config.scaling_factor == 0.13025
    assert again.tokenizer_2.pad_token == "!" and again.zeros_for_empty_prompt
    opened = diffusers.StableDiffusionXLPipeline.from_single_file(file, config=xl_folder, local_files_only=True)
    assert_same_modules(opened, theirs)


def test_one_tokenizer_gives_both_and_a_file_of_others_needs_no_header(xl_folder, file, tmp_path):
    state = {name: tensor.contiguous() for name, tensor in load_file(file).items()}
    state["conditioner.embedders.1.model.logit_scale"] = torch.ones(())
    save_file(state, tmp_path / "other.safetensors")
    loaded = load_single_file(str(tmp_path / "other.safetensors"), f"{xl_folder}/tokenizer", "v_prediction")
    assert loaded.unet.config.sample_size == 128 and loaded.schedule.prediction_type == "v_prediction"
    assert (loaded.tokenizer.pad_token, loaded.tokenizer_2.pad_token) == ("<|endoftext|>", "!")
    assert loaded.params["text_encoder_2"]["text_projection"]["kernel"].shape == state[PROJECTION].shape


def edit(path, changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("model_index.json", {"text_encoder": [None, None]}, "without its first text encoder"),
        ("model_index.json", {"text_encoder_2": [None, None]}, "text_encoder_2 .* of class None"),
        ("model_index.json", {"_class_name": "StableDiffusionPipeline"}, "takes pooled text .* no text_encoder_2"),
        ("model_index.json", {"_class_name": "StableDiffusionXLInpaintPipeline"}, "an inpainting model .*XL"),
        ("unet/config.json", {"in_channels": 9}, "in_channels|an inpainting model"),
        ("unet/config.json", {"cross_attention_dim": 64}, "cross_attention_dim is 64 and .* is 192"),
        (
            "unet/config.json",
            {"projection_class_embeddings_input_dim": 80},
            "is 32 and text_encoder_2 projection_dim is 40",
        ),
        ("unet/config.json", {"addition_embed_type": None}, "text states alone .* second text encoder"),
        ("unet/config.json", {"encoder_hid_dim_type": "image_proj"}, "Kandinsky 2.2|not supported"),
        ("text_encoder_2/config.json", {"architectures": ["CLIPTextModel"]}, "architectures=.*WithProjection"),
        ("text_encoder_2/config.json", {"projection_dim": 0}, "projection_dim"),
        (
            "unet/config.json",
            {"quantization_config": {"quant_method": "nf4"}},
            "quantization_config .*'nf4'.*half precision",
        ),
    ],
)
def test_what_is_no_base_model_is_refused_before_a_weight_is_read(xl_folder, tmp_path, file, changes, message):
    copy = tmp_path / "model"
    shutil.copytree(xl_folder, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    edit(copy / file, changes)
    with pytest.raises(ValueError, match=message):
        load_pipeline(str(copy))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: [n for n in state if n.startswith("conditioner.embedders.1.")], "no second text encoder"),
        (lambda state: [n for n in state if n.startswith("conditioner.")], "label_emb|class embeddings|text encoder"),
        (lambda state: [PROJECTION], f"the tensor {PROJECTION}"),
    ],
)
def test_a_single_file_without_a_text_encoder_is_refused(xl_folder, file, tmp_path, change, message):
    state = load_file(file)
    for name in change(state):
        del state[name]
    save_file(state, tmp_path / "broken.safetensors")
    with pytest.raises(ValueError, match=message):
        load_single_file(str(tmp_path / "broken.safetensors"), xl_folder)


def test_its_unet_alone_does_not_fit_another_model(xl_folder, pipeline):
    module, params = load_unet(f"{xl_folder}/unet")
    assert module.config.pooled_width == 40 and jnp.shape(params["add_embedding"]["linear_1"]["kernel"])[0] == 88
    with pytest.raises(ValueError, match="takes pooled text"):
        type(pipeline)(
            module, *(getattr(pipeline, name) for name in ("vae", "text_encoder", "tokenizer", "schedule", "params"))
        )
