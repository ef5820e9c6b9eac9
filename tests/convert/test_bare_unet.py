"""A bare UNet state dict with a config, and a pipeline that takes it."""

import dataclasses
import functools
import json
import shutil

import diffusers
import jax
import numpy as np
import pytest

from attrib_jax.convert.configs import MSCOCO
from attrib_jax.convert.diffusers_folder import save_pipeline
from attrib_jax.convert.load import load_pipeline, load_unet, replace_unet
from attrib_jax.convert.parts import abstract_unet_params
from attrib_jax.convert.single_file import save_single_file
from attrib_jax.convert.weights.files import write_weights
from attrib_jax.convert.weights.state_dicts import state_dict_of
from tests.convert import old_layout
from tests.tiny_pipeline import make_torch_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "torch"
    make_torch_pipeline(str(path))
    return path


@pytest.fixture(scope="module")
def ours(folder):
    return load_pipeline(str(folder))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_bare_unet_with_a_config(folder, ours, tmp_path, kind):
    source = old_layout.copy_folder(folder / "unet", tmp_path / "models" / "unet").parent
    old_layout.store_weights(source, kind=kind, parts=("unet",))
    file = next((source / "unet").glob(f"*.{kind}")).rename(tmp_path / f"model.{kind}")
    config = str(source / "unet/config.json")
    module, params = load_unet(str(file), config)
    assert module == ours.unet
    jax.tree.map(np.testing.assert_array_equal, params, ours.params["unet"])
    with pytest.raises(ValueError, match=f"model.{kind} is a bare weight file; give its config"):
        load_unet(str(file))
    with pytest.raises(ValueError, match="does not fit the model that its config describes"):
        load_unet(str(file), "mscoco")
    with pytest.raises(FileNotFoundError, match="'nowhere.bin' does not exist"):
        load_unet("nowhere.bin", "mscoco")


def test_a_replaced_unet_brings_its_schedule(folder, ours, tmp_path):
    unet = old_layout.read(folder / "unet/config.json")
    state = {name: 2 * x for name, x in old_layout.read_weights(folder / "unet").items()}
    write_weights(state, tmp_path / "model.safetensors")
    config = tmp_path / "model.json"
    config.write_text(json.dumps({"unet": unet, "scheduler": MSCOCO.scheduler}))
    replaced = replace_unet(ours, str(tmp_path / "model.safetensors"), str(config))
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, 2 * y), replaced.params["unet"], ours.params["unet"])
    assert replaced.params["vae"] is ours.params["vae"]
    np.testing.assert_allclose(
        replaced.schedule.alphas_cumprod, np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)), rtol=1e-5
    )
    assert replaced.schedule.clip_sample
    same = replace_unet(ours, f"{folder}/unet")
    assert same.schedule is ours.schedule
    save_pipeline(replaced, str(tmp_path / "saved"))
    scheduler = diffusers.DDPMScheduler.from_pretrained(tmp_path / "saved/scheduler")
    np.testing.assert_array_equal(scheduler.alphas_cumprod.numpy(), replaced.schedule.alphas_cumprod)
    assert scheduler.config.clip_sample
    again = load_pipeline(str(tmp_path / "saved"))
    assert (again.unet, again.schedule.to_config()) == (replaced.unet, replaced.schedule.to_config())


def test_a_prediction_type_of_choice_holds_for_the_schedule_of_a_replaced_unet(folder, ours, tmp_path):
    config = {"unet": ours.unet.config.to_dict(), "scheduler": MSCOCO.scheduler}
    single = tmp_path / "model.safetensors"
    save_single_file(ours, str(single))
    for model in (folder, single):
        load = functools.partial(
            load_pipeline, str(model), tokenizer=str(folder), unet=f"{folder}/unet", unet_config=config
        )
        assert load().schedule.prediction_type == "epsilon"
        chosen = load(prediction_type="v_prediction").schedule
        assert chosen.to_config() == MSCOCO.scheduler | {"prediction_type": "v_prediction"}
        assert chosen.prediction_type == "v_prediction"
    same = replace_unet(ours, f"{folder}/unet", prediction_type="v_prediction")
    assert same.schedule.to_config() == ours.schedule.to_config() | {"prediction_type": "v_prediction"}
    assert MSCOCO.scheduler["prediction_type"] == "epsilon"


def test_a_unet_of_other_widths_is_refused(ours, tmp_path):
    wide = dataclasses.replace(ours.unet.config, cross_attention_dim=48)
    abstract = abstract_unet_params(ours.unet.clone(config=wide))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), abstract)
    write_weights(state_dict_of(zeros), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="the parts do not fit: unet cross_attention_dim is 48"):
        replace_unet(ours, str(tmp_path / "model.safetensors"), wide.to_dict())


def test_a_folder_may_lack_what_is_replaced(folder, ours, tmp_path):
    base = old_layout.copy_folder(folder, tmp_path / "base")
    for part in ("unet", "tokenizer", "scheduler"):
        shutil.rmtree(base / part)
    index = old_layout.read(base / "model_index.json")
    index |= {"unet": ["diffusers", "UNet3DConditionModel"], "tokenizer": [None, None]}
    old_layout.write(base / "model_index.json", index)
    unet = {"unet": f"{folder}/unet", "unet_config": {"unet": ours.unet.config.to_dict()}}
    with pytest.raises(ValueError, match="unet of .*'UNet3DConditionModel'.* a video model"):
        load_pipeline(str(base), tokenizer=str(folder))
    with pytest.raises(ValueError, match="tokenizer of .* class None"):
        load_pipeline(str(base), **unet)
    with pytest.raises(FileNotFoundError, match="it lacks: scheduler/scheduler_config.json$"):
        load_pipeline(str(base), tokenizer=str(folder), **unet)
    unet["unet_config"]["scheduler"] = ours.schedule.to_config()
    loaded = load_pipeline(str(base), tokenizer=str(folder), **unet)
    assert loaded.unet == ours.unet
    assert loaded.schedule.to_config() == ours.schedule.to_config()
    jax.tree.map(np.testing.assert_array_equal, loaded.params, ours.params)


def test_loading_with_another_unet_reads_only_that_one(tmp_path):
    folder = tmp_path / "base"
    make_torch_pipeline(str(folder))
    other = tmp_path / "other"
    make_torch_pipeline(str(other), seed=1)
    base = load_pipeline(str(folder))
    unet = str(other / "unet" / "diffusion_pytorch_model.safetensors")
    config = {"unet": base.unet.config.to_dict(), "scheduler": {"_class_name": "DDPMScheduler", "beta_end": 0.03}}
    expected = replace_unet(base, unet, config)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"not read")
    loaded = load_pipeline(str(folder), unet=unet, unet_config=config)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, expected.params)
    np.testing.assert_array_equal(loaded.schedule.alphas_cumprod, expected.schedule.alphas_cumprod)
