"""Training of LoRA: what moves, resuming to the bit, going without images, and files that diffusers opens."""

import dataclasses

import diffusers
import jax
import numpy as np
import pytest

from attrib_jax.convert.adapters.lora import attach_lora, merge_lora
from attrib_jax.convert.load import load_pipeline
from attrib_jax.core.weights import flatten_names
from attrib_jax.jobs.context import Run
from attrib_jax.storage.checkpoints import TrainingCheckpoints
from attrib_jax.storage.stage_root import StageRoot
from attrib_jax.training import lora
from attrib_jax.training.draws import Training
from attrib_jax.training.lora import LoraConfig, initial_factors, train_factors, train_lora
from tests.convert.outputs import relative_error, text_states, torch_text_states, torch_unet_output, unet_output
from tests.tiny_pipeline import CAPTIONS, make_torch_pipeline

CONFIG = LoraConfig(
    rank=2,
    alpha=3.0,
    target_modules=("to_k", "to_v", "conv2"),
    train_text_encoder=True,
    steps=6,
    batch_size=4,
    learning_rate=1e-2,
    checkpoint_every=3,
    log_every=1,
)
ALL = Training(np.zeros(0, np.int64), 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("models"))
    make_torch_pipeline(path, unet_channels=(32,))
    return path


@pytest.fixture(scope="module")
def run(folder, dataset, tmp_path_factory):
    return Run(load_pipeline(folder), dataset, StageRoot(tmp_path_factory.mktemp("work")))


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained")
    before = jax.tree.map(np.array, run.pipeline.params)
    path = train_lora(workdir, run, CONFIG)
    jax.tree.map(np.testing.assert_array_equal, run.pipeline.params, before)  # the base is not changed in place
    return str(path)


def test_diffusers_opens_the_file_and_computes_the_same(run, trained, folder):
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    theirs.load_lora_weights(trained)
    merged = merge_lora(run.pipeline, trained)
    assert relative_error(unet_output(merged), torch_unet_output(theirs)) < 1e-5
    prompts = list(CAPTIONS)
    assert relative_error(text_states(merged, prompts), torch_text_states(theirs, prompts)) < 1e-5
    for pair in (
        (unet_output(merged), unet_output(run.pipeline)),
        (text_states(merged, prompts), text_states(run.pipeline, prompts)),
    ):
        assert relative_error(*pair) > 1e-3


def test_a_stopped_training_ends_with_the_same_bits(run, trained, tmp_path, monkeypatch):
    save = TrainingCheckpoints.save

    def stop(self, step, state):
        save(self, step, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainingCheckpoints, "save", stop)
        train_lora(tmp_path, run, CONFIG)
    again = attach_lora(run.pipeline, str(train_lora(tmp_path, run, CONFIG)))
    jax.tree.map(np.testing.assert_array_equal, again.params, attach_lora(run.pipeline, trained).params)


def test_factors_start_at_random_and_zero_in_the_layers_that_are_named(run):
    factors = initial_factors(run.pipeline, dataclasses.replace(CONFIG, train_text_encoder=False), 0)["unet"]
    flat = flatten_names(factors)
    assert all(np.any(x) == ("lora_A" in name) for name, x in flat.items())
    kernels = {name for name in flatten_names(run.pipeline.params["unet"]) if name.endswith("/kernel")}
    named = {name.removesuffix("/kernel") for name in kernels if name.split("/")[-2] in ("to_k", "to_v", "conv2")}
    assert {name.rsplit("/lora_", 1)[0] for name in flat} == named and len(flat) == 2 * len(named)
    drawn = np.concatenate([np.ravel(x) for name, x in flat.items() if "lora_A" in name])
    assert np.std(drawn) == pytest.approx(1 / CONFIG.rank, rel=0.03)
    scaled = flatten_names(lora._scaled(factors, CONFIG.strength))
    for name, leaf in flat.items():
        np.testing.assert_array_equal(scaled[name], leaf * (1.5 if "lora_B" in name else 1))


def test_without_images_the_others_are_seen_as_before(run, tmp_path):
    config = dataclasses.replace(CONFIG, train_text_encoder=False, steps=2)
    unseen = np.setdiff1d(np.arange(len(run.data)), lora.draw_batches(run.data, ALL, config, 0, 2).row)[:3]
    full, same, other = (
        train_factors(tmp_path / str(number), run, config, Training(removed, 0))
        for number, removed in enumerate((ALL.removed, unseen, np.arange(20)))
    )
    jax.tree.map(np.testing.assert_array_equal, full, same)
    assert any(np.any(x != y) for x, y in zip(jax.tree.leaves(full), jax.tree.leaves(other)))
    with pytest.raises(ValueError, match="at least one to be left"):
        train_factors(tmp_path / "none", run, config, Training(np.arange(len(run.data)), 0))


def test_a_target_that_is_nowhere_is_named(run, tmp_path):
    with pytest.raises(ValueError, match="target_modules has 'add_k_proj'.*expected ends of names such as '.*attn"):
        train_lora(tmp_path, run, dataclasses.replace(CONFIG, target_modules=("to_k", "add_k_proj")))
