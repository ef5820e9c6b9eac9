"""Models of other families: refused by their right name from the config files alone, before any weights."""

import json
import shutil

import pytest

from attrib_jax.convert.diffusers_folder import check_configs, find_unet
from attrib_jax.convert.load import load_pipeline

CLASSES = {
    "StableDiffusionInpaintPipeline": "an inpainting model",
    "StableDiffusionInstructPix2PixPipeline": "an image-editing model",
    "StableDiffusionDepth2ImgPipeline": "a depth-to-image model",
    "StableDiffusionUpscalePipeline": "an upscaler",
    "StableDiffusionLatentUpscalePipeline": "an upscaler",
    "StableDiffusionXLControlNetPipeline": "a ControlNet pipeline of Stable Diffusion XL",
    "StableDiffusionXLImg2ImgPipeline": "the refiner of Stable Diffusion XL",
    "StableDiffusionXLInpaintPipeline": "an inpainting model of Stable Diffusion XL",
    "StableDiffusion3Img2ImgPipeline": "Stable Diffusion 3",
    "FluxFillPipeline": "FLUX,",
    "Flux2Pipeline": "FLUX.2,",
    "KandinskyPipeline": "Kandinsky 2.1",
    "KandinskyV22Pipeline": "Kandinsky 2.2",
    "Kandinsky3Pipeline": "Kandinsky 3",
    "PixArtSigmaPAGPipeline": "PixArt",
    "SanaPipeline": "Sana",
    "StableCascadeDecoderPipeline": "Stable Cascade",
    "IFPipeline": "DeepFloyd IF",
    "StableUnCLIPImg2ImgPipeline": "an unCLIP model",
    "StableVideoDiffusionPipeline": "a video model",
    "StableDiffusionControlNetPipeline": "a ControlNet",
    "LatentConsistencyModelPipeline": "a latent consistency model",
    "StableDiffusionImg2ImgPipeline": "_class_name",
    "DDPMPipeline": "an unconditional model",
    "SomethingNewPipeline": "'SomethingNewPipeline'",
    "AltDiffusionPipeline": "'AltDiffusionPipeline'",
    "FlaxStableDiffusionPipeline": "'FlaxStableDiffusionPipeline'",
    None: "None",
}
UNETS = [
    ({"in_channels": 9}, "an inpainting model"),
    ({"in_channels": 8}, "an image-editing model"),
    ({"in_channels": 5}, "a depth-to-image model"),
    ({"in_channels": 7, "num_class_embeds": 1000}, "an upscaler"),
    ({"in_channels": 6}, "in_channels is 6, out_channels 4"),
    ({"out_channels": 8}, "predicts a variance"),
    ({"addition_embed_type": "text_time", "in_channels": 9}, "an inpainting model of Stable Diffusion XL"),
    ({"addition_embed_type": "text_time", "in_channels": 8}, "an image-editing model of Stable Diffusion XL"),
    ({"addition_embed_type": "text_time", "cross_attention_dim": 1280}, "the refiner of Stable Diffusion XL"),
    ({"addition_embed_type": "image", "encoder_hid_dim_type": "image_proj"}, "Kandinsky 2.2"),
    ({"addition_embed_type": "text_image", "encoder_hid_dim_type": "text_image_proj"}, "Kandinsky 2"),
    ({"addition_embed_type": "text", "encoder_hid_dim_type": "text_proj"}, "DeepFloyd IF"),
    ({"class_embed_type": "projection"}, "an unCLIP model"),
    ({"time_cond_proj_dim": 256}, "a latent consistency model"),
    ({"_class_name": "ControlNetModel"}, "a ControlNet"),
    ({"_class_name": "UNet3DConditionModel"}, "a video model"),
    ({"_class_name": "SD3Transformer2DModel"}, "Stable Diffusion 3"),
    ({"_class_name": "Something"}, "'Something'"),
]


@pytest.fixture
def configs(folder, tmp_path):
    """A folder without a single weight file."""
    path = tmp_path / "model"
    shutil.copytree(folder, path, ignore=shutil.ignore_patterns("*.safetensors", "*.bin"))
    return path


def edit(path, changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", CLASSES)
def test_a_pipeline_is_named_by_its_index(configs, name):
    changes = {"_class_name": name}
    if name == "StableDiffusionXLImg2ImgPipeline":
        changes["text_encoder"] = [None, None]
    edit(configs / "model_index.json", changes)
    for load in (load_pipeline, check_configs):
        with pytest.raises(ValueError, match=f"{configs}.*{CLASSES[name]}.*StableDiffusion|refiner"):
            load(str(configs))


@pytest.mark.parametrize(("changes", "what"), UNETS)
def test_a_unet_is_named_by_its_config(configs, changes, what):
    edit(configs / "unet/config.json", changes)
    for load, path in ((load_pipeline, configs), (find_unet, configs / "unet")):
        with pytest.raises(ValueError, match=f"unet/config.json.*{what}.*: give "):
            load(str(path))


def test_latents_of_other_widths_are_no_other_family(configs):
    edit(configs / "unet/config.json", {"in_channels": 8, "out_channels": 8})
    with pytest.raises(ValueError, match="in_channels is 8 .*latent_channels is 4"):
        load_pipeline(str(configs))
    edit(configs / "vae/config.json", {"latent_channels": 8})
    with pytest.raises(FileNotFoundError, match="no weights|lacks"):
        load_pipeline(str(configs))


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ({"_class_name": "ControlNetModel"}, "a ControlNet.*that it steers"),
        ({"_class_name": "FluxTransformer2DModel"}, "FLUX"),
        ({"_class_name": "UNet2DConditionModel"}, "a UNet alone.*--unet"),
        ({"model_type": "t5"}, "'t5'"),
    ],
)
def test_a_part_is_no_model(tmp_path, content, what):
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=what):
        load_pipeline(str(tmp_path))


@pytest.mark.parametrize(("family", "token"), [("sd2", "<|endoftext|>"), ("sd1", "!")])
def test_the_other_familys_padding_is_warned_of(request, tmp_path, caplog, family, token):
    model = request.getfixturevalue(family)
    tokenizer = shutil.copytree(f"{model.folder}/tokenizer", tmp_path / "tokenizer")
    edit(tokenizer / "tokenizer_config.json", {"pad_token": token})
    assert load_pipeline(model.folder, tokenizer=str(tokenizer)).tokenizer.pad_token == token
    assert str(tokenizer) in caplog.text and f"the tokenizer of Stable Diffusion {family[-1]}" in caplog.text
