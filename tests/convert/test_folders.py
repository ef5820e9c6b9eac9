"""Which weight files of a folder are read: every name that diffusers and transformers have given them."""

import json
import logging

import pytest
from diffusers.utils import constants
from diffusers.utils.hub_utils import _add_variant
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from attrib_jax.convert.config_files import read_json
from attrib_jax.convert.diffusers_folder import check_folder
from attrib_jax.convert.weights.files import choose_weights, find_weights, weight_choices

UNET = "diffusion_pytorch_model"


@pytest.mark.parametrize("variant", [None, "fp16", "non_ema"])
def test_the_libraries_own_names_are_known(variant):
    kinds = ("SAFETENSORS_WEIGHTS_NAME", "SAFE_WEIGHTS_INDEX_NAME", "WEIGHTS_NAME", "WEIGHTS_INDEX_NAME")
    transformers_names = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
    for stem, names in ((UNET, [getattr(constants, kind) for kind in kinds]), ("model", transformers_names)):
        for name in names:
            name = _add_variant(name, variant)
            assert weight_choices([name, "config.json"], stem) == {variant: name}


def test_safetensors_come_before_bin_and_whole_files_before_shards():
    ends = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
    for i, end in enumerate(ends):
        shards = [f"{UNET}-00001-of-00002.bin", f"{UNET}-00001-of-00002.safetensors"]
        assert weight_choices([*shards, *(UNET + x for x in reversed(ends[i:]))], UNET) == {None: UNET + end}


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
    early = f"{UNET}.bin.fp16.index.json"
    assert weight_choices([early], UNET) == {"fp16": early}


@pytest.fixture
def unet(tmp_path):
    for name in ("config.json", f"{UNET}.bin", f"{UNET}.fp16.safetensors", f"{UNET}.non_ema.bin"):
        (tmp_path / name).touch()
    return tmp_path


def test_find_weights(unet, caplog):
    for variant, file in ((None, "bin"), ("fp16", "fp16.safetensors"), ("non_ema", "non_ema.bin")):
        assert find_weights(str(unet), UNET, variant) == str(unet / f"{UNET}.{file}")
    with pytest.raises(FileNotFoundError, match="bf16 .*fp16, full precision, non_ema"):
        find_weights(str(unet), UNET, "bf16")
    assert not caplog.records
    (unet / f"{UNET}.bin").unlink()
    with caplog.at_level(logging.WARNING):
        assert find_weights(str(unet), UNET) == str(unet / f"{UNET}.fp16.safetensors")
    assert "fp16 weights" in caplog.text
    (unet / f"{UNET}.fp16.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="full precision .*non_ema.*variant"):
        find_weights(str(unet), UNET)


def test_find_weights_of_a_text_encoder_by_either_stem(tmp_path):
    (tmp_path / "pytorch_model.bin").touch()
    (tmp_path / f"{UNET}.safetensors").symlink_to(tmp_path / "blob")  # a broken link is no file
    assert find_weights(str(tmp_path), "model") == find_weights(str(tmp_path), "pytorch_model")
    with pytest.raises(FileNotFoundError, match=rf"{UNET}\.safetensors"):
        find_weights(str(tmp_path), UNET)


def test_a_part_without_the_variant_takes_full_precision(caplog):
    names = {"unet": [f"{UNET}.bin", f"{UNET}.non_ema.bin"], "text_encoder": ["pytorch_model.bin"]}
    chosen = {"unet": f"{UNET}.non_ema.bin", "text_encoder": "pytorch_model.bin"}
    assert choose_weights(names, "non_ema", "model") == chosen
    assert "full precision weights of text_encoder" in caplog.text
    with pytest.raises(FileNotFoundError, match="'fp16'.* unet: full precision, non_ema; text_encoder: full precision"):
        choose_weights(names, "fp16", "model")


def test_index_entries_of_another_form_are_refused(tmp_path):
    index = {"_class_name": "StableDiffusionPipeline", "unet": "UNet2DConditionModel", "vae": ["diffusers"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"vae of .* \['diffusers'\]"):
        check_folder(str(tmp_path))


JSON = st.recursive(st.none() | st.booleans() | st.text(max_size=3) | st.integers(), st.lists, max_leaves=5)


@settings(max_examples=25, deadline=None)
@example(b"[" * 100_000)
@given(st.binary(max_size=40) | JSON.map(lambda x: json.dumps(x).encode()))
def test_any_json_file_is_an_object_or_a_clear_error(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("json") / "config.json"
    path.write_bytes(content)
    try:
        assert isinstance(read_json(str(path)), dict)
    except ValueError as error:
        assert str(path) in str(error)
