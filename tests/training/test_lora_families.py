"""LoRA of Stable Diffusion XL, SD 3, FLUX.1 and PixArt: trained, opened by diffusers, and moved by attribution."""

import dataclasses

import diffusers
import numpy as np
import pytest
from safetensors.numpy import load_file

from attrib_jax.attribute import attribute_queries
from attrib_jax.convert import transformer_pipeline
from attrib_jax.convert.adapters.lora import attach_lora, merge_lora
from attrib_jax.convert.load import load_pipeline
from attrib_jax.convert.weights.state_dicts import state_dict_of
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.query import Query
from attrib_jax.methods import method_config
from attrib_jax.storage.stage_root import StageRoot
from attrib_jax.training.lora import LoraConfig, train_lora
from tests.tiny_pipeline import make_torch_xl_pipeline
from tests.tiny_transformers import make_transformer_pipeline

KINDS = {"xl": "diagonal", "sd3": None, "flux": "ekfac", "pixart": None}
CONFIG = LoraConfig(rank=2, alpha=3.0, target_modules=("to_v",), steps=2, batch_size=4, learning_rate=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_is_trained_opened_by_diffusers_and_attributed(dataset, tmp_path, monkeypatch, kind):
    for name, family in transformer_pipeline.FAMILIES.items():  # shorter texts compile faster
        monkeypatch.setitem(transformer_pipeline.FAMILIES, name, dataclasses.replace(family, t5_tokens=16))
    folder = str(tmp_path / "model")
    if kind == "xl":
        make_torch_xl_pipeline(folder, unet_channels=(64,))
    else:
        make_transformer_pipeline(folder, kind)
    base = load_pipeline(folder)
    config = dataclasses.replace(CONFIG, caption_dropout=0.5, random_flips=True)
    lora = str(train_lora(tmp_path / "train", Run(base, dataset, StageRoot(tmp_path / "work")), config))
    part = "unet" if kind == "xl" else "transformer"
    stored = load_file(f"{lora}/pytorch_lora_weights.safetensors")
    assert stored and all(name.startswith(f"{part}.") and np.any(x) for name, x in stored.items())

    merged = merge_lora(base, lora)
    before, after = (
        {name: x.read() for name, x in state_dict_of(each.params["unet"]).items()} for each in (base, merged)
    )
    if kind == "pixart":  # which diffusers has no loader for
        expected = dict(before)
        for name in stored:
            if "lora_A" in name:
                weight = name.removeprefix("transformer.").replace("lora_A.", "")
                expected[weight] = expected[weight] + stored[name.replace("lora_A", "lora_B")] @ stored[name]
    else:
        theirs = diffusers.DiffusionPipeline.from_pretrained(folder)
        theirs.load_lora_weights(lora)
        theirs.fuse_lora()
        state = getattr(theirs, part).state_dict()
        expected = {name.replace(".base_layer", ""): x.numpy() for name, x in state.items() if ".lora_" not in name}
    assert expected.keys() == after.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(after[name], tensor, rtol=1e-5, atol=1e-6, err_msg=name)
        assert np.any(after[name] != before[name]) == name.endswith("to_v.weight")

    if KINDS[kind] is None:
        return
    run = Run(attach_lora(base, lora), dataset, StageRoot(tmp_path / "attributed"))
    query = Query(prompt="red heart", image=dataset[5].image)
    settings = {"weights": "lora", "stride": 500, "flips": "none", "query_draws": 32, "fisher_samples": 32, "steps": 1}
    (result,) = attribute_queries(run, [query], method_config("unlearn", curvature=KINDS[kind], **settings))
    assert np.ptp(result.scores.score) > 0 and np.isfinite(result.scores.score).all()
