"""Custom Diffusion: what moves and what does not, resuming to the bit, and what is refused."""

import dataclasses
import json
from unittest import mock

import jax
import numpy as np
import pytest

from attrib_jax.convert.adapters.custom_diffusion import apply_custom_diffusion
from attrib_jax.convert.adapters.textual_inversion import add_tokens, read_tokens
from attrib_jax.core.weights import flatten_names, select_weights
from attrib_jax.data.sources import ArrayDataset
from attrib_jax.storage.checkpoints import TrainingCheckpoints
from attrib_jax.storage.stages import StageMismatchError
from attrib_jax.training.customize import Customization, CustomizeConfig, customize
from attrib_jax.training.draws import Training
from tests.tiny_dataset import make_dataset

CONFIG = CustomizeConfig(
    initializer_token="heart", steps=8, batch_size=4, learning_rate=1e-2, checkpoint_every=4, log_every=1
)
EMBEDDING = "text_model/embeddings/token_embedding/embedding"


def _exemplars(captions=("a <new1>", "red <new1> hat"), size=16):
    images = np.random.default_rng(5).integers(0, 256, (len(captions), size, size, 3), dtype=np.uint8)
    return ArrayDataset(images, [[caption] for caption in captions])


def _metrics(workdir):
    """The logged lines, but for their speed."""
    lines = [json.loads(line) for line in (workdir / "customize" / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "examples_per_second"} for line in lines]


@pytest.fixture(scope="module")
def tuned(pipeline, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("tuned")
    before = jax.tree.map(np.array, pipeline.params)
    folder = customize(workdir, pipeline, _exemplars(), CONFIG)
    jax.tree.map(np.testing.assert_array_equal, pipeline.params, before)  # the base is not changed in place
    return workdir, folder, apply_custom_diffusion(pipeline, str(folder))


def test_only_keys_values_and_the_token_move(pipeline, tuned):
    _, folder, result = tuned
    assert {path.name for path in folder.iterdir()} == {"pytorch_custom_diffusion_weights.pt", "<new1>.bin"}
    moved, rest = select_weights(result.params["unet"], "cross-attn-kv")
    base_moved, base_rest = select_weights(pipeline.params["unet"], "cross-attn-kv")
    jax.tree.map(np.testing.assert_array_equal, rest, base_rest)
    jax.tree.map(np.testing.assert_array_equal, result.params["vae"], pipeline.params["vae"])
    for name, leaf in flatten_names(moved).items():
        assert np.all(leaf != flatten_names(base_moved)[name]), name
    text, base_text = (flatten_names(side.params["text_encoder"]) for side in (result, pipeline))
    table = np.asarray(text.pop(EMBEDDING))
    base_table = np.asarray(base_text.pop(EMBEDDING))
    jax.tree.map(np.testing.assert_array_equal, text, base_text)
    np.testing.assert_array_equal(table[: len(base_table)], base_table)
    start = base_table[pipeline.tokenizer.convert_tokens_to_ids("heart</w>")]
    assert len(table) == len(base_table) + 1 and np.all(table[-1] != start)
    assert np.abs(table[-1] - start).max() <= 1.5 * CONFIG.steps * CONFIG.learning_rate


def test_the_first_step_is_adamw_on_the_denoising_loss(pipeline, tmp_path):
    # Adam's first step is the rate times the sign of the gradient; decay takes rate x decay x weight.
    config = dataclasses.replace(CONFIG, steps=1, learning_rate=1e-3, weight_decay=0.5)
    result = apply_custom_diffusion(pipeline, str(customize(tmp_path, pipeline, _exemplars(), config)))
    before, _ = select_weights(pipeline.params["unet"], "cross-attn-kv")
    after, _ = select_weights(result.params["unet"], "cross-attn-kv")
    steps = jax.tree.map(lambda new, old: np.asarray(new) - (1 - 1e-3 * 0.5) * np.asarray(old), after, before)
    sizes = np.abs(np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(steps)]))
    np.testing.assert_allclose(np.median(sizes), 1e-3, rtol=1e-2)


def test_the_loss_falls(pipeline, tmp_path):
    config = dataclasses.replace(CONFIG, steps=60, checkpoint_every=60)
    customize(tmp_path, pipeline, _exemplars(), config)
    losses = [line["exemplar_loss"] for line in _metrics(tmp_path)]
    assert len(losses) == 60 and np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])


def test_an_interrupted_run_resumes_to_the_same_bits(pipeline, tuned, tmp_path):
    workdir, _, whole = tuned
    save = TrainingCheckpoints.save

    def failing(self, step, state):
        save(self, step, state)
        raise KeyboardInterrupt

    with mock.patch.object(TrainingCheckpoints, "save", failing), pytest.raises(KeyboardInterrupt):
        customize(tmp_path, pipeline, _exemplars(), CONFIG)
    resumed = apply_custom_diffusion(pipeline, str(customize(tmp_path, pipeline, _exemplars(), CONFIG)))
    jax.tree.map(np.testing.assert_array_equal, resumed.params, whole.params)
    assert _metrics(tmp_path) == _metrics(workdir)


def test_a_finished_run_is_written_again_and_other_settings_are_refused(pipeline, tuned):
    workdir, folder, whole = tuned
    for file in folder.iterdir():
        file.unlink()
    assert customize(workdir, pipeline, _exemplars(), CONFIG) == folder
    again = apply_custom_diffusion(pipeline, str(folder))
    jax.tree.map(np.testing.assert_array_equal, again.params, whole.params)
    with pytest.raises(StageMismatchError, match="learning_rate"):
        customize(workdir, pipeline, _exemplars(), dataclasses.replace(CONFIG, learning_rate=0.5))
    with pytest.raises(StageMismatchError, match="exemplars"):
        customize(workdir, pipeline, _exemplars(("<new1>",)), CONFIG)


def test_one_caption_for_all_and_prior_images(pipeline, tmp_path):
    config = dataclasses.replace(CONFIG, steps=2, caption="<new1>", prior_weight=0.5)
    folder = customize(tmp_path, pipeline, _exemplars(("hat", "flag")), config, prior=make_dataset())
    assert read_tokens(apply_custom_diffusion(pipeline, str(folder)), ["<new1>"])["<new1>"].shape == (32,)
    for line in _metrics(tmp_path):
        np.testing.assert_allclose(line["loss"], line["exemplar_loss"] + 0.5 * line["prior_loss"], rtol=1e-6)


def test_mirror_images_are_drawn_on_demand_only(pipeline, tmp_path):
    # To symmetric pictures flips make no difference, to others they do.
    pictures = np.stack([_exemplars()[i].image for i in range(2)])
    captions = [_exemplars().captions(i) for i in range(2)]
    losses = {}
    for kind, images in (("any", pictures), ("symmetric", pictures | pictures[:, :, ::-1])):
        for flips in (False, True):
            workdir = tmp_path / f"{kind}{flips}"
            config = dataclasses.replace(CONFIG, steps=1, random_flips=flips)
            customize(workdir, pipeline, ArrayDataset(images, captions), config)
            losses[kind, flips] = _metrics(workdir)[0]["loss"]
    assert losses["symmetric", True] == losses["symmetric", False]
    assert losses["any", True] != losses["any", False]


@pytest.mark.parametrize(
    ("changes", "exemplars", "named"),
    [
        ({}, _exemplars(("a <new1>", "a hat")), "caption 'a hat' .*'<new1>'"),
        ({}, _exemplars(("a hat grinning polar bear white woman <new1>",)), "caption 'a hat .*'<new1>'"),
        ({"initializer_token": "zebra"}, _exemplars(("<new1>",)), "initializer_token 'zebra'"),
        ({"learning_rate": 1e30, "steps": 4}, _exemplars(("<new1>", "<new1>")), "learning_rate=1e"),
        ({}, _exemplars(size=8), r"exemplars 'arrays' .*\(8, 8\)"),
    ],
    ids=["no token", "cut off", "initializer", "diverged", "size"],
)
def test_refused(pipeline, tmp_path, changes, exemplars, named):
    with pytest.raises(ValueError, match=named):
        customize(tmp_path, pipeline, exemplars, dataclasses.replace(CONFIG, **changes))
    assert not list(tmp_path.rglob("*.bin"))


def test_a_token_that_exists_is_refused(pipeline, tmp_path):
    known = add_tokens(pipeline, {"<new1>": np.ones(32, np.float32)})
    with pytest.raises(ValueError, match="'<new1>'"):
        customize(tmp_path, known, _exemplars(), CONFIG)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"token": "new1"}, "token is 'new1'"),
        ({"token": "<a/b>"}, "token is '<a/b>'"),
        ({"caption": "a hat"}, "exemplar_caption is 'a hat'"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"steps": 0}, "steps is 0"),
        ({"prior_weight": -1.0}, "prior_weight is -1.0"),
    ],
)
def test_config_is_checked(changes, named):
    with pytest.raises(ValueError, match=named):
        dataclasses.replace(CONFIG, **changes)


def test_without_exemplars_the_others_are_seen_as_before(pipeline, tuned, tmp_path):
    exemplars = _exemplars(("a <new1>", "red <new1> hat", "<new1>"))
    customization = Customization(pipeline, exemplars, CONFIG, data=tmp_path / "images")

    def trained(folder, removed):
        return customization.train(tmp_path / folder, Training(np.array(removed, np.int64), 0)).params["unet"]

    # Without two of three, only the third is seen.
    only = Customization(pipeline, exemplars, CONFIG)
    batch = customization._encoded(None)["exemplars"]
    only._batches = {"exemplars": jax.tree.map(lambda leaf: np.asarray(leaf)[[2, 2, 2]], batch)}
    expected = only.train(tmp_path / "third", Training(np.zeros(0, np.int64), 0)).params["unet"]
    jax.tree.map(np.testing.assert_array_equal, trained("without", [0, 1]), expected)
    full = trained("full", [])
    assert any(np.any(x != y) for x, y in zip(jax.tree.leaves(full), jax.tree.leaves(expected)))
    with pytest.raises(ValueError, match="3 of 3 images removed"):
        trained("none", [0, 1, 2])
