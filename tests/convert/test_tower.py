"""Tower folders: the round trip through transformers, and what is refused."""

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from attrib_jax.convert.hub import resolve_tower
from attrib_jax.convert.tower import load_tower, save_tower, tower_fingerprint
from tests.towers import save_torch_tower


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("towers")
    for family in ("clip", "dino", "dinov2"):
        save_torch_tower(family, path / family)
    return path


def copy_of(folders, tmp_path, family, **config):
    target = tmp_path / family
    target.mkdir()
    for file in (folders / family).iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    content = json.loads((target / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(content))
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
    (copied / "config.json").write_bytes((folders / "dino" / "config.json").read_bytes())
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
        ("dino", {"model_type": "swin"}, "model_type='swin' in its config.json; supported: clip"),
        ("dino", {"num_channels": 1}, "num_channels=1; supported: 3"),
        ("dino", {"hidden_act": "gelu_new"}, "hidden_act='gelu_new'"),
        ("dino", {"num_attention_heads": 5}, "hidden_size=24, which num_attention_heads=5 does not divide"),
        ("dino", {"image_size": 64}, "pictures of 32 pixels, its model has image_size=64|misshaped"),
        (
            "clip",
            {"model_type": "clip_vision_model", "architectures": ["CLIPVisionModel"]},
            "VisionModelWithProjection",
        ),
    ],
)
def test_other_models_are_refused(folders, tmp_path, family, config, message):
    with pytest.raises(ValueError, match=message):
        load_tower(copy_of(folders, tmp_path, family, **config))


def test_another_family_than_asked_for(folders):
    with pytest.raises(ValueError, match="family 'dinov2'.*expected 'clip'.*openai/clip-vit-base-patch32"):
        load_tower(folders / "dinov2", "clip")
    with pytest.raises(ValueError, match="unknown family 'clipp': did you mean 'clip'"):
        load_tower(folders / "clip", "clipp")


@pytest.mark.parametrize(
    ("family", "file"),
    [("dino", "config.json"), ("dino", "model.safetensors"), ("dino", "preprocessor_config.json"),
     ("clip", "tokenizer.json")],
)  # fmt: skip
def test_missing_files_are_named(folders, tmp_path, family, file):
    copied = copy_of(folders, tmp_path, family)
    for path in copied.glob("*"):
        if path.name == file or (file == "tokenizer.json" and path.name in ("vocab.json", "merges.txt")):
            path.unlink()
    with pytest.raises(FileNotFoundError, match=file.replace(".", r"\.")):
        load_tower(copied)


def test_an_image_processor_of_another_size(folders, tmp_path):
    copied = copy_of(folders, tmp_path, "clip")
    processor = json.loads((copied / "preprocessor_config.json").read_text())
    processor |= {"size": {"shortest_edge": 20}, "crop_size": {"height": 20, "width": 20}}
    (copied / "preprocessor_config.json").write_text(json.dumps(processor))
    with pytest.raises(ValueError, match="images of 20 pixels, its model has image_size=16"):
        load_tower(copied)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="does not exist; give a folder in the transformers layout or a Hugging"
    ):
        load_tower(tmp_path / "nothing")


def test_a_hugging_face_id_that_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="'owner/tower' is no path here, not in the Hugging Face cache"):
        resolve_tower("owner/tower", cache_dir=str(tmp_path))
