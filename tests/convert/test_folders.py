"""Which weight files of a folder are read: every name that diffusers and transformers have given them."""

import json
import logging

import pytest
from diffusers.utils import constants
from diffusers.utils.hub_utils import _add_variant
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from attrib_jax.convert.config_files import read_json
from attrib_jax.convert.diffusers_folder import check_folder, choose_weights, find_weights, weight_choices

UNET = "diffusion_pytorch_model"


@pytest.mark.parametrize("variant", [None, "fp16", "non_ema"])
def test_the_libraries_own_names_are_known(variant):
    diffusers_names = (
        constants.SAFETENSORS_WEIGHTS_NAME,
        constants.SAFE_WEIGHTS_INDEX_NAME,
        constants.WEIGHTS_NAME,
        constants.WEIGHTS_INDEX_NAME,
    )
    transformers_names = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
    for stem, names in ((UNET, diffusers_names), ("model", transformers_names)):
        for name in names:
            name = _add_variant(name, variant)
            assert weight_choices([name, "config.json"], stem) == {variant: name}


def test_safetensors_come_before_bin_and_whole_files_before_shards():
    names = [
        f"{UNET}.bin.index.json",
        f"{UNET}-00001-of-00002.bin",
        f"{UNET}.bin",
        f"{UNET}.safetensors.index.json",
        f"{UNET}-00001-of-00002.safetensors",
        f"{UNET}.safetensors",
    ]
    best = []
    while names:
        choice = weight_choices(names, UNET)
        if not choice:
            break
        best.append(choice[None])
        names.remove(choice[None])
    assert best == [f"{UNET}{end}" for end in (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")]


def test_shards_optimizers_and_other_formats_are_no_weights():
    names = [
        f"{UNET}-00001-of-00002.safetensors",
        f"{UNET}.fp16-00001-of-00002.safetensors",
        f"{UNET}-00001-of-00002.fp16.bin",
        "diffusion_flax_model.msgpack",
        f"{UNET}.onnx",
        f"my_{UNET}.safetensors",
        f"{UNET}.safetensors.tmp",
        "model.safetensors",
    ]
    assert weight_choices(names, UNET) == {}
    assert weight_choices(names, "model") == {None: "model.safetensors"}


def test_the_early_place_of_a_variant_in_an_index():
    assert weight_choices([f"{UNET}.bin.fp16.index.json"], UNET) == {"fp16": f"{UNET}.bin.fp16.index.json"}


@pytest.fixture
def unet(tmp_path):
    for name in ("config.json", f"{UNET}.bin", f"{UNET}.fp16.safetensors", f"{UNET}.non_ema.bin"):
        (tmp_path / name).touch()
    return tmp_path


def test_find_weights(unet, caplog):
    assert find_weights(str(unet), UNET) == str(unet / f"{UNET}.bin")
    assert find_weights(str(unet), UNET, "fp16") == str(unet / f"{UNET}.fp16.safetensors")
    assert find_weights(str(unet), UNET, "non_ema") == str(unet / f"{UNET}.non_ema.bin")
    with pytest.raises(FileNotFoundError, match="has no bf16 weights; it holds fp16, full precision, non_ema"):
        find_weights(str(unet), UNET, "bf16")
    assert not caplog.records
    (unet / f"{UNET}.bin").unlink()
    with caplog.at_level(logging.WARNING):
        assert find_weights(str(unet), UNET) == str(unet / f"{UNET}.fp16.safetensors")
    assert "fp16 weights" in caplog.text
    (unet / f"{UNET}.fp16.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no full precision weights; it holds non_ema; name one as variant"):
        find_weights(str(unet), UNET)


def test_find_weights_of_a_text_encoder_by_either_stem(tmp_path):
    (tmp_path / "pytorch_model.bin").touch()
    assert find_weights(str(tmp_path), "model") == find_weights(str(tmp_path), "pytorch_model")
    with pytest.raises(FileNotFoundError, match=r"expected diffusion_pytorch_model\.safetensors, diffusion_pytorch_mo"):
        find_weights(str(tmp_path), UNET)


def test_a_broken_link_is_no_file(tmp_path):
    (tmp_path / f"{UNET}.safetensors").symlink_to(tmp_path / "blob")
    with pytest.raises(FileNotFoundError, match="has no weights"):
        find_weights(str(tmp_path), UNET)


def test_a_part_without_the_variant_takes_full_precision(caplog):
    names = {"unet": [f"{UNET}.non_ema.bin", f"{UNET}.bin"], "text_encoder": ["pytorch_model.bin"]}
    assert choose_weights(names, "non_ema", "model") == {
        "unet": f"{UNET}.non_ema.bin",
        "text_encoder": "pytorch_model.bin",
    }
    assert "full precision weights of text_encoder" in caplog.text
    expected = "model has no variant 'fp16'; it holds unet: full precision, non_ema; text_encoder: full precision"
    with pytest.raises(FileNotFoundError) as error:
        choose_weights({**names, "unet": sorted(names["unet"])}, "fp16", "model")
    assert str(error.value) == expected


def test_index_entries_of_another_form_are_refused(tmp_path):
    index = {"_class_name": "StableDiffusionPipeline", "unet": "UNet2DConditionModel", "vae": ["diffusers"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"vae of .* class \['diffusers'\].*AutoencoderKL"):
        check_folder(str(tmp_path))


@settings(max_examples=25, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=40),
        st.recursive(st.none() | st.booleans() | st.text(max_size=3) | st.integers(), st.lists, max_leaves=5).map(
            lambda x: json.dumps(x).encode()
        ),
    )
)
def test_any_json_file_is_an_object_or_a_clear_error(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("json") / "config.json"
    path.write_bytes(content)
    try:
        assert isinstance(read_json(str(path)), dict)
    except ValueError as error:
        assert str(path) in str(error)


def test_deeply_nested_json_is_an_error(tmp_path):
    (tmp_path / "config.json").write_bytes(b"[" * 100_000)
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        read_json(str(tmp_path / "config.json"))
