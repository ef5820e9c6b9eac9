"""SD 3 and FLUX.1 in the naming of the original code, against diffusers' conversion of the same files."""

import dataclasses

import diffusers.loaders.single_file_utils as theirs
import jax
import numpy as np
import pytest
import torch

from attrib_jax.convert.ldm.names import UNET, VAE, pack, unpack, vae_table
from attrib_jax.convert.ldm.transformers import transformer_table
from attrib_jax.convert.load import load_pipeline
from attrib_jax.convert.transformer_folder import abstract_module
from attrib_jax.convert.weights.names import name_table, torch_shape
from attrib_jax.convert.weights.state_dicts import state_dict_of
from attrib_jax.convert.weights.tensors import LazyTensor
from attrib_jax.core.weights import flatten_names
from attrib_jax.models.flux import FluxConfig, FluxTransformer2DModel
from attrib_jax.models.sd3 import SD3Config, SD3Transformer2DModel
from tests.convert.files import save
from tests.tiny_transformers import make_transformer_pipeline

ENCODERS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"}
# What shapes do not tell of models as small as these.
CONFIG = {
    "transformer": {"sample_size": 8},
    "vae": {"norm_num_groups": 4, "sample_size": 16, "scaling_factor": 1.5, "shift_factor": 0.1},
    "text_encoder": {"num_attention_heads": 2, "hidden_act": "quick_gelu"},
    "text_encoder_2": {"num_attention_heads": 2, "hidden_act": "quick_gelu"},
}


@pytest.mark.parametrize(
    ("module", "convert"),
    [
        (
            SD3Transformer2DModel(SD3Config(num_layers=2, dual_attention_layers=(0,), qk_norm="rms_norm")),
            theirs.convert_sd3_transformer_checkpoint_to_diffusers,
        ),
        (SD3Transformer2DModel(SD3Config(num_layers=2)), theirs.convert_sd3_transformer_checkpoint_to_diffusers),
        # diffusers knows FLUX's published width alone.
        (
            FluxTransformer2DModel(FluxConfig(num_layers=2, num_single_layers=2, guidance_embeds=True)),
            theirs.convert_flux_transformer_checkpoint_to_diffusers,
        ),
    ],
    ids=["sd3.5", "sd3", "flux"],
)
def test_a_file_is_diffusers_conversion_of_it(module, convert):
    abstract, rng = abstract_module(module), np.random.default_rng(0)
    flat = flatten_names(abstract)
    # At most two columns: the conversion cuts rows alone.
    shapes = {name: torch_shape(path, flat[path].shape)[:2] for name, path in name_table(abstract).items()}
    tensors = {name: rng.normal(size=(size[0], *[2] * (len(size) - 1))) for name, size in shapes.items()}
    table = transformer_table(module.config, tensors)
    stored = pack({name: LazyTensor.of(x) for name, x in tensors.items()}, table)
    converted = convert({f"{UNET}{name}": torch.from_numpy(x.read().copy()) for name, x in stored.items()})
    read = unpack(stored, table, "file")
    assert converted.keys() == tensors.keys() == read.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(converted[name], tensor, err_msg=name)
        np.testing.assert_array_equal(read[name].read(), tensor, err_msg=name)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Kind -> a folder that diffusers wrote, and its pipeline."""
    made = {}
    for kind in ("sd3", "flux"):
        path = str(tmp_path_factory.mktemp("models") / kind)
        make_transformer_pipeline(path, kind)
        made[kind] = path, load_pipeline(path)
    return made


def original(pipeline, prefix=UNET):
    """The transformer's tensors in the naming of the original code."""
    state = state_dict_of(pipeline.params["unet"])
    packed = pack(state, transformer_table(pipeline.unet.config, state))
    return {f"{prefix}{name}": x.read() for name, x in packed.items()}


def whole(pipeline, encoders=tuple(ENCODERS)):
    vae = state_dict_of(pipeline.params["vae"])
    tensors = original(pipeline) | {
        name: x.read() for name, x in pack(vae, vae_table(pipeline.vae.config, vae)).items()
    }
    for part in encoders:
        prefix = f"text_encoders.{ENCODERS[part]}."
        state = state_dict_of(pipeline.params[part])
        tensors |= {f"{prefix}transformer.{name}": x.read() for name, x in state.items()}
        tensors[f"{prefix}logit_scale"] = np.float32(1).reshape(())
    return tensors


def test_a_whole_file_is_the_folder_with_a_first_projection_of_one(folders, tmp_path):
    path, pipeline = folders["sd3"]
    file = save(whole(pipeline), tmp_path / "sd3.safetensors")
    found = load_pipeline(file, tokenizer=path, model_config=CONFIG)
    ours, folders_own = found.configs(), pipeline.configs()
    assert ours.pop("schedule")["shift"] == folders_own.pop("schedule")["shift"] == 3
    assert ours == folders_own
    expected = dict(pipeline.params)
    projection = np.eye(12, dtype=np.float32)
    expected["text_encoder"] = expected["text_encoder"] | {"text_projection": {"kernel": projection}}
    jax.tree.map(np.testing.assert_array_equal, found.params, expected)


def test_t5_may_be_missing_and_says_so(folders, tmp_path, caplog):
    path, pipeline = folders["sd3"]
    file = save(whole(pipeline, ("text_encoder", "text_encoder_2")), tmp_path / "sd3.safetensors")
    found = load_pipeline(file, tokenizer=path, model_config=CONFIG)
    assert found.text_encoder_3 is None and "text_encoder_3" not in found.params
    assert "zeros stand for its text states" in caplog.text


@pytest.mark.parametrize(
    ("kind", "prefix"), [("sd3", UNET), ("flux", UNET), ("flux", ""), ("flux", None)], ids=lambda value: str(value)
)
def test_a_transformer_alone_takes_the_rest_of_a_folder(folders, tmp_path, kind, prefix):
    path, pipeline = folders[kind]
    changed = jax.tree.map(lambda x: 1.5 * x, pipeline.params["unet"])
    moved = dataclasses.replace(pipeline, params=pipeline.params | {"unet": changed})
    if prefix is None:  # diffusers' names
        tensors = {name: x.read() for name, x in state_dict_of(changed).items()}
    else:
        tensors = original(moved, prefix)
    if kind == "sd3":
        tensors[f"{VAE}decoder.conv_in.weight"] = np.zeros((8, 6, 3, 3), np.float32)
    found = load_pipeline(path, unet=save(tensors, tmp_path / "model.safetensors"))
    assert found.configs() == pipeline.configs()
    jax.tree.map(np.testing.assert_array_equal, found.params, moved.params)


def test_what_is_no_such_file_is_refused_with_the_way_out(folders, tmp_path):
    (sd3, sd3_pipeline), (flux, flux_pipeline) = folders["sd3"], folders["flux"]
    alone, complete = original(flux_pipeline, ""), whole(sd3_pipeline)
    without_vae = {name: x for name, x in complete.items() if not name.startswith(VAE)}
    without_text = {name: x for name, x in complete.items() if "clip_g" not in name}
    block = "double_blocks.1.img_attn.qkv.weight"
    no_heads = {"vae": CONFIG["vae"]}
    cases = [
        ("model", alone, {}, r"FLUX.1 without its text encoders and autoencoder: .*base model.*\(--unet\)"),
        ("model", without_vae, {"tokenizer": sd3}, r"without vae \(first_stage_model.\*\): give the folder"),
        ("model", without_text, {"tokenizer": sd3}, r"without text_encoder_2 \(text_encoders.clip_g"),
        ("model", complete, {}, "holds no tokenizers: give tokenizer=FOLDER, a pipeline folder of Stable Diffusion 3"),
        ("model", complete, {"tokenizer": sd3, "model_config": no_heads}, r"\(text_encoder\): shapes cannot"),
        ("model", complete | {"x.bias": np.zeros(2, np.float32)}, {"tokenizer": sd3, "model_config": CONFIG}, "x.bias"),
        ("model", complete, {"prediction_type": "epsilon"}, "prediction_type is given"),
        (sd3, alone, {}, "a transformer of FLUX.1, but model .* is Stable Diffusion 3"),
        (flux, {name: x for name, x in alone.items() if name != block}, {}, f"missing.*{block}"),
        (flux, alone | {"single_blocks.0.extra.weight": np.zeros((2, 2), np.float32)}, {}, "single_blocks.0.extra"),
        (flux, alone | {"img_in.weight": np.zeros((16, 96), np.float32)}, {}, "Fill, Depth or Canny.*96 .*24"),
        (flux, alone | {"double_stream_modulation_img.lin.weight": np.zeros((2, 2), np.float32)}, {}, "is FLUX.2"),
        (flux, {"a.weight": np.zeros((2, 2), np.float32)}, {}, "no transformer of a known family"),
        (flux, alone, {"tokenizer": flux}, "tokenizer is given"),
    ]  # fmt: skip
    for number, (model, tensors, given, message) in enumerate(cases):
        file = save(tensors, tmp_path / f"{number}.safetensors")
        source = {"path": file} if model == "model" else {"path": model, "unet": file}
        with pytest.raises(ValueError, match=f"(?s){message}"):
            load_pipeline(**source, **given)
    with pytest.raises(FileNotFoundError, match="lacks .*tokenizer_3"):
        load_pipeline(save(complete, tmp_path / "last.safetensors"), tokenizer=flux)
