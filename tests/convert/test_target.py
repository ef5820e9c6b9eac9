"""What a weight file says of its target: header, marks, yaml and argument, each alone and against each other."""

import logging
import shutil

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from attrib_jax.convert.load import load_pipeline
from attrib_jax.convert.single_file import save_single_file
from attrib_jax.diffusion.samplers import ddim_timesteps
from tests.convert.shrunken import rewrite

YAML = """
model:
  base_learning_rate: 1.0e-4
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    linear_start: 0.00085
    linear_end: 0.0120
    timesteps: 1000
    {parameterization}
    unet_config: {{target: ldm.modules.diffusionmodules.openaimodel.UNetModel}}
"""
V, EPSILON = "v_prediction", "epsilon"


def write(model, folder, header=None, marks=(), yaml=None, name="model.safetensors"):
    """The model's single file with what is said of the target, and nothing of ours."""
    empty = {mark: torch.zeros(0) for mark in marks}
    path = rewrite(model.file, folder / name, lambda state: state | empty, header)
    if yaml is not None:
        path.with_suffix(".yaml").write_text(yaml)
    return path


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"header": {"modelspec.prediction_type": "v"}}, V),
        ({"header": {"modelspec.prediction_type": "V-Prediction"}}, V),
        ({"header": {"prediction_type": "v_prediction"}}, V),
        ({"header": {"modelspec.prediction_type": "epsilon"}}, EPSILON),
        ({"header": {"modelspec.prediction_type": "eps"}}, EPSILON),
        ({"header": {"modelspec.architecture": "stable-diffusion-v2-768-v"}}, V),
        ({"header": {"modelspec.architecture": "stable-diffusion-v2-512"}}, EPSILON),
        ({"header": {"ss_v_parameterization": "True"}}, V),
        ({"header": {"ss_v_parameterization": "False"}}, EPSILON),
        ({"header": {"ss_base_model_version": "sd_v2_v"}}, V),
        ({"marks": ["v_pred"]}, V),
        ({"marks": ["model.diffusion_model.v_pred"]}, V),
        ({"yaml": YAML.format(parameterization='parameterization: "v"')}, V),
        ({"yaml": YAML.format(parameterization="")}, EPSILON),
        ({"yaml": "parameterization: v"}, V),
        ({"yaml": "model: {parameterization: eps}"}, EPSILON),
    ],
)
@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_the_prediction_type_is_read(request, tmp_path, family, said, expected):
    model = request.getfixturevalue(family)
    loaded = load_pipeline(str(write(model, tmp_path, **said)), tokenizer=model.folder)
    assert loaded.schedule.prediction_type == expected
    assert not loaded.schedule.to_config().get("rescale_betas_zero_snr")


@pytest.mark.parametrize(
    "said",
    [
        {"marks": ["v_pred", "ztsnr"]},
        {"marks": ["model.v_pred", "model.ztsnr"]},
        {"header": {"modelspec.prediction_type": "v", "ss_zero_terminal_snr": "True"}},
        {"marks": ["ztsnr"], "header": {"modelspec.prediction_type": "v"}},
        {"yaml": YAML.format(parameterization="parameterization: v\n    zero_terminal_snr: true")},
    ],
)
def test_zero_terminal_snr_is_read(sd1, tmp_path, said):
    loaded = load_pipeline(str(write(sd1, tmp_path, **said)), tokenizer=sd1.folder)
    config = loaded.schedule.to_config()
    assert (config["prediction_type"], config["rescale_betas_zero_snr"]) == (V, True)
    theirs = diffusers.DDIMScheduler.from_config(config)
    np.testing.assert_allclose(loaded.schedule.alphas_cumprod, theirs.alphas_cumprod.numpy(), rtol=0, atol=5e-7)
    assert float(loaded.schedule.alphas_cumprod[-1]) == 0
    theirs.set_timesteps(7)
    assert ddim_timesteps(loaded.schedule, 7).tolist() == theirs.timesteps.tolist()
    assert theirs.timesteps[0] == 999
    # And again from what we write of it.
    save_single_file(loaded, tmp_path / "again.safetensors")
    again = load_pipeline(str(tmp_path / "again.safetensors"), tokenizer=sd1.folder)
    np.testing.assert_array_equal(again.schedule.alphas_cumprod, loaded.schedule.alphas_cumprod)
    assert again.schedule.prediction_type == V


def test_a_rescaled_buffer_is_zero_terminal_snr(sd1, tmp_path):
    scheduler = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    alphas = diffusers.DDIMScheduler(**scheduler, rescale_betas_zero_snr=True).alphas_cumprod
    path = str(rewrite(sd1.file, tmp_path / "x.safetensors", lambda state: state | {"alphas_cumprod": alphas}))
    with pytest.raises(ValueError, match="zero terminal SNR.*--prediction_type"):
        load_pipeline(path, tokenizer=sd1.folder)
    loaded = load_pipeline(path, tokenizer=sd1.folder, prediction_type=V)
    np.testing.assert_allclose(loaded.schedule.alphas_cumprod, alphas.numpy(), rtol=0, atol=5e-7)


PREDICTION, ARCHITECTURE = "modelspec.prediction_type", "modelspec.architecture"
YAML_V, YAML_EPSILON = (YAML.format(parameterization=f"parameterization: {kind}") for kind in ("v", "eps"))


@pytest.mark.parametrize("said", [{"header": {PREDICTION: "v"}}, {"marks": ["v_pred"]}, {"yaml": YAML_V}])
def test_what_disagrees_with_the_argument_is_named(sd1, tmp_path, said):
    path = str(write(sd1, tmp_path, **said))
    with pytest.raises(ValueError, match="prediction_type is .*(modelspec|v_pred|yaml).*--prediction_type"):
        load_pipeline(path, tokenizer=sd1.folder, prediction_type=EPSILON)
    assert load_pipeline(path, tokenizer=sd1.folder, prediction_type=V).schedule.prediction_type == V


@pytest.mark.parametrize(
    ("said", "both"),
    [
        ({"header": {PREDICTION: "epsilon"}, "marks": ["v_pred"]}, [PREDICTION, "v_pred"]),
        ({"header": {PREDICTION: "v"}, "yaml": YAML_EPSILON}, [PREDICTION, "model.yaml"]),
        ({"marks": ["v_pred"], "yaml": YAML.format(parameterization="")}, ["v_pred", "model.yaml"]),
        (
            {"header": {"ss_zero_terminal_snr": "False"}, "marks": ["v_pred", "ztsnr"]},
            ["ss_zero_", "ztsnr"],
        ),
        ({"header": {PREDICTION: "v", ARCHITECTURE: "stable-diffusion-v2-512"}}, [PREDICTION, ARCHITECTURE]),
    ],
)
def test_two_places_that_disagree_are_both_named(sd2, tmp_path, said, both):
    with pytest.raises(ValueError) as error:
        load_pipeline(str(write(sd2, tmp_path, **said)), tokenizer=sd2.folder)
    assert all(name in str(error.value) for name in both)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"header": {PREDICTION: "x0"}}, f"{PREDICTION}='x0'"),
        ({"header": {ARCHITECTURE: "stable-diffusion-xl-v1-refiner"}}, "the refiner of Stable Diffusion XL"),
        ({"header": {ARCHITECTURE: "stable-diffusion-v1-inpainting"}}, "an inpainting model"),
        ({"header": {ARCHITECTURE: "stable-diffusion-v1/lora"}}, "a LoRA"),
        ({"header": {ARCHITECTURE: "flux-1-dev"}}, "FLUX"),
        ({"marks": ["ztsnr"]}, "zero terminal SNR.*--prediction_type"),
        ({"marks": ["edm_vpred.sigma_max"]}, "EDM"),
        ({"yaml": YAML.format(parameterization="parameterization: x0")}, "parameterization: 'x0'"),
        ({"yaml": YAML.format(parameterization="").replace("0.0120", "high")}, "linear_end: 'high'"),
    ],
)
def test_other_targets_are_refused(sd1, tmp_path, said, message):
    with pytest.raises(ValueError, match=message):
        load_pipeline(str(write(sd1, tmp_path, **said)), tokenizer=sd1.folder)


def test_a_yaml_brings_its_noise_levels_and_scale(sd1, tmp_path):
    text = YAML.format(parameterization="scale_factor: 0.5").replace("0.0120", "2e-2")
    loaded = load_pipeline(str(write(sd1, tmp_path, yaml=text)), tokenizer=sd1.folder)
    assert loaded.schedule.to_config()["beta_end"] == 0.02
    assert loaded.vae.config.scaling_factor == 0.5


@pytest.mark.parametrize("content", ["[1, 2", "- a\n- b", "\t- x", ""])
def test_a_yaml_that_cannot_be_read_is_warned_of(sd1, tmp_path, caplog, content):
    with caplog.at_level(logging.WARNING):
        loaded = load_pipeline(str(write(sd1, tmp_path, yaml=content)), tokenizer=sd1.folder)
    assert loaded.schedule.prediction_type == EPSILON
    assert "model.yaml" in caplog.text


def test_a_ckpt_with_a_yaml_beside_it(sd2, tmp_path):
    torch.save({"state_dict": load_file(sd2.file), "global_step": 0}, tmp_path / "model.ckpt")
    (tmp_path / "model.yaml").write_text(YAML.format(parameterization='parameterization: "v"'))
    assert load_pipeline(str(tmp_path / "model.ckpt"), tokenizer=sd2.folder).schedule.prediction_type == V


def test_a_unet_file_says_its_target_too(sd1, tmp_path):
    shutil.copytree(sd1.folder, tmp_path / "folder")
    unet = tmp_path / "folder/unet/diffusion_pytorch_model.safetensors"
    rewrite(f"{sd1.folder}/unet/{unet.name}", unet, lambda state: state | {"v_pred": torch.zeros(0)})
    with pytest.raises(ValueError, match=r"v_pred.*scheduler_config\.json"):
        load_pipeline(str(tmp_path / "folder"))
    assert load_pipeline(str(tmp_path / "folder"), prediction_type=V).schedule.prediction_type == V
    # The same file without its folder.
    config = {"unet": sd1.ours.unet.config.to_dict()}
    assert load_pipeline(sd1.folder, unet=str(unet), unet_config=config).schedule.prediction_type == V
    config["scheduler"] = sd1.ours.schedule.to_config()
    with pytest.raises(ValueError, match="v_pred.*prediction_type in unet_config"):
        load_pipeline(sd1.folder, unet=str(unet), unet_config=config)


def test_noise_in_merged_checkpoints_is_left_out(sd1, tmp_path):
    names = (
        "embedding_manager.embedder.transformer.text_model.embeddings.position_ids",
        "embedding_manager.string_to_param_dict.*",
        "denoiser.sigmas",
        "first_stage_model.model_ema.decay",
        "first_stage_model.model_ema.encoderconv_inweight",
        "model.model_ema.num_updates",
    )
    path = rewrite(sd1.file, tmp_path / "x.safetensors", lambda state: state | {name: torch.zeros(3) for name in names})
    loaded = load_pipeline(str(path), tokenizer=sd1.folder)
    assert loaded.schedule.prediction_type == EPSILON
