"""Folders of SD 3, FLUX.1 and PixArt that diffusers writes: conditioning, images, and what goes back to diffusers."""

import json
import shutil

import diffusers
import jax
import numpy as np
import pytest
import torch

from attrib_jax.convert.diffusers_folder import save_pipeline
from attrib_jax.convert.families import TRANSFORMER_PIPELINES
from attrib_jax.convert.load import ModelSource, load_model, load_pipeline
from attrib_jax.convert.pipeline import encode_text, prompt_report, tokenize
from attrib_jax.convert.transformer_folder import DENOISERS
from attrib_jax.convert.transformer_pipeline import FAMILIES, TRAINING_GUIDANCE
from attrib_jax.jobs.query import Query, decode, generate, initial_noise
from attrib_jax.models.predictor import predictor
from tests.tiny_transformers import make_transformer_pipeline

KINDS = ("sd3", "sd3_without_t5", "flux", "schnell", "pixart", "alpha")
PROMPTS = ["A red heart", "polar bear"]


def test_the_classes_that_are_recognised_are_those_that_are_read():
    assert {*TRANSFORMER_PIPELINES} == {*FAMILIES} == {*DENOISERS}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Kind -> the folder that diffusers wrote, and its pipeline."""
    made = {}
    for kind in KINDS:
        path = tmp_path_factory.mktemp("transformers") / kind
        theirs = make_transformer_pipeline(str(path), kind.split("_")[0], with_t5=kind != "sd3_without_t5")
        theirs.set_progress_bar_config(disable=True)
        made[kind] = str(path), theirs
    return made


def theirs_conditioning(kind, pipe):
    """What diffusers' pipeline makes of the prompts, by our names."""
    if kind.startswith("sd3"):
        text, _, pooled, _ = pipe.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False)
        return {"text": text, "pooled": pooled}
    if kind in ("pixart", "alpha"):
        text, mask, _, _ = pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
        return {"text": text, "mask": mask}
    text, pooled, _ = pipe.encode_prompt(PROMPTS)
    guidance = {"guidance": torch.full((2,), TRAINING_GUIDANCE)} if kind == "flux" else {}
    return {"text": text, "pooled": pooled, **guidance}


@pytest.mark.parametrize("kind", KINDS)
def test_conditioning_is_diffusers(folders, kind):
    path, pipe = folders[kind]
    pipeline = load_pipeline(path)
    encode = jax.jit(encode_text, static_argnums=0)
    found = encode(pipeline.conditioner, pipeline.conditioner_params, tokenize(pipeline, PROMPTS))
    with torch.no_grad():
        expected = theirs_conditioning(kind, pipe)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array.numpy(), atol=2e-4, err_msg=name)


@pytest.mark.parametrize("kind", ["sd3", "flux", "schnell", "pixart", "alpha"])
def test_images_are_diffusers(folders, kind):
    path, pipe = folders[kind]
    pipeline = load_pipeline(path)
    query = Query(PROMPTS[0], sampler_steps=2, guidance_scale=2.5)
    latents = generate(pipeline, predictor(pipeline.unet), PROMPTS[:1], [3], query)
    noise = torch.tensor(initial_noise(pipeline, 3)).permute(2, 0, 1)[None]
    common = {"num_inference_steps": 2, "guidance_scale": 2.5, "height": 16, "width": 16, "output_type": "pt"}
    if kind in ("flux", "schnell"):
        noise = pipe._pack_latents(noise, 1, 6, 8, 8)
    if kind in ("pixart", "alpha"):
        common |= {"use_resolution_binning": False, "clean_caption": False}
    with torch.no_grad():
        image = pipe(PROMPTS[0], latents=noise, **common).images[0]
    expected = np.round(image.permute(1, 2, 0).numpy() * 255)
    assert np.abs(decode(pipeline, latents)[0] - expected).max() <= 1
    assert np.ptp(expected) > 50


def test_a_model_without_t5_says_so(folders, caplog):
    load_pipeline(folders["sd3_without_t5"][0])
    assert "no text_encoder_3; zeros stand for its text states" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_opens_in_diffusers_and_here(folders, kind, tmp_path):
    path, pipe = folders[kind]
    pipeline = load_pipeline(path)
    save_pipeline(pipeline, tmp_path / "written")
    without = {"text_encoder_3": None, "tokenizer_3": None} if kind == "sd3_without_t5" else {}
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "written", **without)
    assert type(again) is type(pipe)
    for name, module in pipe.components.items():
        if isinstance(module, torch.nn.Module):
            theirs, ours = module.state_dict(), getattr(again, name).state_dict()
            assert theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) for key in theirs), name
    back = load_pipeline(str(tmp_path / "written"))
    assert back.configs() == pipeline.configs()
    jax.tree.map(np.testing.assert_array_equal, back.params, pipeline.params)


def test_a_prompt_longer_than_t5_reads_is_reported(folders):
    pipeline = load_pipeline(folders["pixart"][0])
    report = prompt_report(pipeline, "A hat, " * 100 + "END ß")
    assert report.kept.startswith("a hat") and report.truncated.endswith("end ß") and report.unknown == (",", "ß")


CHANGES = {
    "model_index.json": [
        ({"transformer": ["diffusers", "Other"]}, "transformer is of class 'Other'; expected 'SD3Transformer2DModel'"),
        ({"text_encoder_2": [None, None]}, "text_encoder_2 is null in model_index.json; Stable Diffusion 3 needs it"),
    ],
    "transformer/config.json": [
        ({"qk_norm": "layer_norm"}, "transformer/config.json.*qk_norm='layer_norm'"),
        ({"num_layers": 3}, "missing"),
        ({"pooled_projection_dim": 27}, "pooled_projection_dim is 27 .* 28|misshaped"),
    ],
    "vae/config.json": [({"latent_channels": 4}, "latent channels is 6 and vae latent_channels is 4|misshaped")],
    "scheduler/scheduler_config.json": [
        ({"_class_name": "DDIMScheduler"}, "Stable Diffusion 3, but its scheduler's prediction is 'epsilon'"),
        ({"use_karras_sigmas": True}, "scheduler_config.json: .*use_karras_sigmas is True"),
        ({"shift": "3"}, "shift is '3'"),
    ],
}


@pytest.mark.parametrize(
    ("file", "change", "named"), [(file, *case) for file, cases in CHANGES.items() for case in cases]
)
def test_a_folder_that_does_not_fit_is_named(folders, tmp_path, file, change, named):
    path = shutil.copytree(folders["sd3"][0], tmp_path / "model")
    content = json.loads((path / file).read_text())
    (path / file).write_text(json.dumps(content | change))
    with pytest.raises(ValueError, match=named):
        load_pipeline(str(path))


def test_missing_parts_are_listed(folders, tmp_path):
    path = shutil.copytree(folders["sd3"][0], tmp_path / "model")
    shutil.rmtree(path / "tokenizer_3")
    (path / "vae" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="lacks: vae/config.json, tokenizer_3"):
        load_pipeline(str(path))


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"custom_diffusion": "weights.bin"}, "custom_diffusion is .*weights.bin.*transformer"),
        ({"tokens": ("a.pt",)}, "tokens is"),
        ({"prediction_type": "epsilon"}, "prediction_type is given"),
    ],
)
def test_what_transformers_do_not_support_is_refused(folders, given, named):
    with pytest.raises(ValueError, match=named):
        load_model(ModelSource(model=folders["sd3"][0], **given))
