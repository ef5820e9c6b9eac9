"""A bare UNet state dict with a config, and a pipeline that takes it."""

import dataclasses
import functools
import json
import pathlib
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


@pytest.mark.parametrize("kind", ["safetensors", "bin", "folder"])
def test_a_bare_unet_with_a_config(copy, ours, kind):
    file, config = copy / "unet", None
    if kind != "folder":
        old_layout.store_weights(copy, kind=kind, parts=("unet",))
        config = str(copy / "unet/config.json")
        file = next((copy / "unet").glob(f"*.{kind}")).rename(copy / f"model.{kind}")
        with pytest.raises(ValueError, match=f"model.{kind} .*config"):
            load_unet(str(file))
        with pytest.raises(ValueError, match="missing"):
            load_unet(str(file), "mscoco")
    module, params = load_unet(str(file), config)
    assert module == ours.unet
    jax.tree.map(np.testing.assert_array_equal, params, ours.params["unet"])
    with pytest.raises(FileNotFoundError, match=r"nowhere\.bin"):
        load_unet("nowhere.bin", "mscoco")


def test_a_replaced_unet_brings_its_schedule(folder, ours, tmp_path):
    unet = ours.unet.config.to_dict()
    state = {name: 2 * x for name, x in old_layout.read_weights(pathlib.Path(folder, "unet")).items()}
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
    for model in (folder, str(single)):
        load = functools.partial(load_pipeline, model, tokenizer=folder, unet=f"{folder}/unet", unet_config=config)
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


def test_a_folder_may_lack_what_is_replaced(folder, copy, ours):
    for part in ("unet", "tokenizer", "scheduler"):
        shutil.rmtree(copy / part)
    index = old_layout.read(copy / "model_index.json")
    index |= {"unet": ["diffusers", "UNet3DConditionModel"], "tokenizer": [None, None]}
    old_layout.write(copy / "model_index.json", index)
    unet = {"unet": f"{folder}/unet", "unet_config": {"unet": ours.unet.config.to_dict()}}
    with pytest.raises(ValueError, match="unet of .*'UNet3DConditionModel'"):
        load_pipeline(str(copy), tokenizer=folder)
    with pytest.raises(ValueError, match="tokenizer of .* None"):
        load_pipeline(str(copy), **unet)
    with pytest.raises(FileNotFoundError, match="scheduler/scheduler_config.json$"):
        load_pipeline(str(copy), tokenizer=folder, **unet)
    unet["unet_config"]["scheduler"] = ours.schedule.to_config()
    loaded = load_pipeline(str(copy), tokenizer=folder, **unet)
    assert loaded.unet == ours.unet and loaded.schedule.to_config() == ours.schedule.to_config()
    jax.tree.map(np.testing.assert_array_equal, loaded.params, ours.params)


def test_loading_with_another_unet_reads_only_that_one(copy, ours, tmp_path):
    doubled = {name: 2 * x for name, x in old_layout.read_weights(copy / "unet").items()}
    write_weights(doubled, tmp_path / "other.safetensors")
    config = {"unet": ours.unet.config.to_dict(), "scheduler": {"_class_name": "DDPMScheduler", "beta_end": 0.03}}
    expected = replace_unet(ours, str(tmp_path / "other.safetensors"), config)
    (copy / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"not read")
    loaded = load_pipeline(str(copy), unet=str(tmp_path / "other.safetensors"), unet_config=config)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, expected.params)
    np.testing.assert_array_equal(loaded.schedule.alphas_cumprod, expected.schedule.alphas_cumprod)
