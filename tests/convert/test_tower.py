"""Tower folders: the round trip through transformers, and what is refused."""

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from attrib_jax.convert.hub import resolve_tower
from attrib_jax.convert.tower import load_tower, save_tower, tower_fingerprint
from tests.convert import old_layout
from tests.towers import save_torch_tower


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("towers")
    for family in ("clip", "dino", "dinov2"):
        save_torch_tower(family, path / family)
    return path


def copy_of(folders, tmp_path, family, **config):
    target = old_layout.copy_folder(folders / family, tmp_path / family)
    if config:
        old_layout.write(target / "config.json", old_layout.read(target / "config.json") | config)
    return target


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_a_saved_clip_opens_in_transformers(folders, tmp_path, dtype):
    tower = load_tower(folders / "clip")
    save_tower(tower, tmp_path / "saved", dtype)
    save_tower(tower, tmp_path / "saved", dtype)  # over the one that is there
    original = load_file(folders / "clip" / "model.safetensors")
    model = transformers.CLIPModel.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    assert state.keys() == original.keys()
    for name, array in original.items():
        assert state[name].shape == array.shape, name  # the () of logit_scale too
        np.testing.assert_array_equal(state[name], array if dtype is None else array.astype(dtype).astype(np.float32))
    again = load_tower(tmp_path / "saved")
    assert again.module == tower.module and again.processor == tower.processor
    assert transformers.CLIPTokenizer.from_pretrained(tmp_path / "saved")("hat") == tower.tokenizer("hat")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]


def test_the_fingerprint_is_of_the_contents(folders, tmp_path):
    copied = copy_of(folders, tmp_path, "dino")
    assert tower_fingerprint(copied) == tower_fingerprint(folders / "dino") != tower_fingerprint(folders / "dinov2")
    tensors = load_file(copied / "model.safetensors")
    tensors["layernorm.bias"] = tensors["layernorm.bias"] + 1
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    assert tower_fingerprint(copied) != tower_fingerprint(folders / "dino")


def test_missing_extra_and_misshaped_tensors_are_listed(folders, tmp_path):
    copied = copy_of(folders, tmp_path, "dinov2")
    tensors = load_file(copied / "model.safetensors")
    del tensors["embeddings.register_tokens"]
    tensors["embeddings.extra"] = np.zeros(3, np.float32)
    tensors["layernorm.bias"] = np.zeros(5, np.float32)
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError) as error:
        load_tower(copied)
    for part in ("missing", "embeddings.register_tokens", "unexpected", "embeddings.extra", "misshaped", "(5,)"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("dino", {"model_type": "swin"}, "model_type='swin'"),
        ("dino", {"num_channels": 1}, "num_channels=1"),
        ("dino", {"hidden_act": "gelu_new"}, "hidden_act='gelu_new'"),
        ("dino", {"num_attention_heads": 5}, "hidden_size=24.*num_attention_heads=5"),
        ("dino", {"image_size": 64}, "32 .*image_size=64|misshaped"),
        ("clip", {"model_type": "clip_vision_model", "architectures": ["CLIPVisionModel"]}, "CLIPVisionModel"),
    ],
)
def test_other_models_are_refused(folders, tmp_path, family, config, message):
    with pytest.raises(ValueError, match=message):
        load_tower(copy_of(folders, tmp_path, family, **config))


def test_another_family_than_asked_for(folders):
    with pytest.raises(ValueError, match="family 'dinov2'.*'clip'"):
        load_tower(folders / "dinov2", "clip")
    with pytest.raises(ValueError, match="'clipp'.*'clip'"):
        load_tower(folders / "clip", "clipp")


CASES = [("dino", "config"), ("dino", "model"), ("dino", "preprocessor_config"), ("clip", "tokenizer")]


@pytest.mark.parametrize(("family", "file"), CASES)
def test_missing_files_are_named(folders, tmp_path, family, file):
    copied = copy_of(folders, tmp_path, family)
    for path in copied.glob("*"):
        if path.stem == file or (file == "tokenizer" and path.name in ("vocab.json", "merges.txt")):
            path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{file}\.(json|safetensors)"):
        load_tower(copied)


def test_an_image_processor_of_another_size(folders, tmp_path):
    copied = copy_of(folders, tmp_path, "clip")
    processor = old_layout.read(copied / "preprocessor_config.json")
    processor |= {"size": {"shortest_edge": 20}, "crop_size": {"height": 20, "width": 20}}
    old_layout.write(copied / "preprocessor_config.json", processor)
    with pytest.raises(ValueError, match="20 .*image_size=16"):
        load_tower(copied)


def test_folders_and_ids_that_are_not_there(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="nothing"):
        load_tower(tmp_path / "nothing")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="'owner/tower'"):
        resolve_tower("owner/tower", cache_dir=str(tmp_path))
