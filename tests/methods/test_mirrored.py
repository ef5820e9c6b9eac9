"""Mirrored unlearning through the main job: its scores from stored weights, its invariances, its stop, and resume."""

import dataclasses

import jax
import numpy as np
import pytest

from attrib_jax.attribute import attribute_queries
from attrib_jax.attribution.mirrored import noisy_timesteps
from attrib_jax.attribution.residual import shared_noise
from attrib_jax.core.keys import purpose_key
from attrib_jax.core.weights import flatten_names, merge_weights, unflatten_names
from attrib_jax.data.sources import ArrayDataset
from attrib_jax.diffusion.losses import denoising_losses
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.query import Query
from attrib_jax.methods import method_config, mirrored, queries_per_pass
from attrib_jax.parallel.mesh import data_mesh
from attrib_jax.storage.files import read_arrays
from attrib_jax.storage.stage_root import StageRoot
from tests.failures import interrupt_states, interrupt_writes, until_done
from tests.methods.faint_model import make_faint_model

CONFIG = method_config("mirrored", max_steps=3, retain_batch=4, query_batch=4, score_draws=3, null_draws=40)


@pytest.fixture(scope="module")
def model(pipeline):
    return make_faint_model(pipeline)


@pytest.fixture(scope="module")
def queries(dataset):
    return [Query("a red heart", image=dataset[9].image), Query("hat", image=dataset[2].image)]


@pytest.fixture(scope="module")
def run(model, dataset, tmp_path_factory):
    return Run(model, dataset, StageRoot(tmp_path_factory.mktemp("mirrored")))


@pytest.fixture(scope="module")
def plain(run, queries):
    return attribute_queries(run, queries, CONFIG)


def weights_of(result):
    return read_arrays(result.folder / "unlearned.safetensors")[0]


def null_loss(run):
    return mirrored.prepare(run, CONFIG).null


def test_scores_are_skews_of_losses_under_stored_weights(run, queries, plain):
    config = dataclasses.replace(CONFIG, captions="all")
    data, schedule = run.data, run.pipeline.schedule
    timesteps = noisy_timesteps(0.7, 3, schedule.num_train_timesteps)
    noise = shared_noise(purpose_key(0, "shared draws"), np.arange(3), data.latent_shape)

    @jax.jit
    def losses(params, latents, text):
        return denoising_losses(run.predict, params, schedule, latents, text, noise, timesteps)

    def skew(row, flip, caption):
        latents, text = (part[0] for part in data.inputs(np.array([row]), flip, caption))
        before, after = (np.asarray(losses(each, latents, text), np.float64) for each in trees)
        return np.mean((after - before) / (after + before + 1e-3))

    selected, rest = run.select("mlp")
    for result in (*plain, *attribute_queries(run, queries[:1], config)):
        moved = weights_of(result)
        assert moved.keys() == flatten_names(selected).keys()
        assert all(np.any(leaf != flatten_names(selected)[name]) for name, leaf in moved.items())
        trees = run.pipeline.params["unet"], merge_weights(unflatten_names(moved), rest)
        for row in (0, 5, 36):
            count = 1 if result in plain else data.num_captions[row]
            flips = [np.mean([skew(row, flip, caption) for caption in range(count)]) for flip in range(2)]
            np.testing.assert_allclose(result.scores.score[row], max(flips), atol=0.02 * plain[0].scores.score.std())
            assert result.scores.flip[row] == np.argmax(flips)


def test_queries_stop_by_themselves_and_those_above_the_stop_take_one_step(run, queries, plain, caplog):
    null = null_loss(run)
    assert all(len(result.query_loss) == 3 for result in plain)
    assert max(max(result.query_loss) for result in plain) < 0.95 * null
    # A stop between what the two queries lose: one has reached it before any step.
    first = [result.query_loss[0] for result in plain]
    low, high = np.argsort(first)
    share = float(np.mean(first) / null)
    caplog.clear()
    found = attribute_queries(run, queries, dataclasses.replace(CONFIG, stop_share=share))
    assert found[high].query_loss == plain[high].query_loss[:1]
    assert found[low].query_loss[0] == first[low]
    assert sum("before any step" in record.message for record in caplog.records) == 1
    assert np.ptp(found[high].scores.score) > 0
    # Far below the model's loss, the clamp alone would leave nothing to unlearn.
    lowest = attribute_queries(run, queries, dataclasses.replace(CONFIG, stop_share=0.01))
    assert all(len(result.query_loss) == 1 for result in lowest)
    for left, right in zip(lowest[high].scores.score, found[high].scores.score):
        assert left == right


def test_a_query_does_not_depend_on_others_devices_batch_or_subset(
    model, dataset, run, queries, plain, tmp_path, monkeypatch
):
    alone = attribute_queries(run, queries[1:], dataclasses.replace(CONFIG, batch_size=1), ["alone"])[0]
    for name, leaf in weights_of(plain[1]).items():
        np.testing.assert_array_equal(weights_of(alone)[name], leaf)
    np.testing.assert_array_equal(alone.scores.score, plain[1].scores.score)
    # Two on one device, under vmap: equal up to rounding, which Adam's first steps make larger.
    monkeypatch.setattr(mirrored, "data_mesh", lambda: data_mesh(jax.devices()[:1]))
    both = attribute_queries(run, queries, dataclasses.replace(CONFIG, queries_per_device=2), ["left", "right"])
    for left, right in zip(both, plain):
        np.testing.assert_allclose(left.query_loss, right.query_loss, rtol=1e-4)
        assert np.corrcoef(left.scores.score, right.scores.score)[0, 1] > 0.99
    # Weights given, a score depends on nothing but its image.
    places = np.array([30, 2, 11])
    images = np.stack([dataset[int(place)].image for place in places])
    captions = [dataset.captions(int(place)) for place in places]
    subset = Run(model, ArrayDataset(images, captions, row_ids=dataset.row_ids[places]), StageRoot(tmp_path))
    shared = mirrored.prepare(subset, CONFIG)
    np.testing.assert_array_equal(shared.losses[:], mirrored.prepare(run, CONFIG).losses[places])


def test_an_interrupted_run_goes_on_to_the_same_bits(run, queries, plain, model, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(mirrored, "_SECONDS_BETWEEN_STATES", -1.0)
    monkeypatch.setattr(mirrored, "_MAX_ROWS_PER_CHUNK", 8)
    other = Run(model, dataset, StageRoot(tmp_path))
    with monkeypatch.context() as patch:
        interrupt_writes(patch, 3)
        interrupt_states(patch, after=(2, 5))
        found, interruptions = until_done(lambda: attribute_queries(other, queries, CONFIG, ["a", "b"]))
    assert interruptions >= 3
    for left, right in zip(found, plain):
        assert left.query_loss == right.query_loss
        np.testing.assert_array_equal(left.scores.score, right.scores.score)
        assert {path.name for path in left.folder.iterdir()} == {path.name for path in right.folder.iterdir()}
    again = attribute_queries(other, queries[:1], dataclasses.replace(CONFIG, flips="mean"))[0]
    assert again.timings["loss of an untrained model"][1] and again.timings["losses of shared draws"][1]


def test_a_rate_that_diverges_names_the_query_and_leaves_nothing(run, queries):
    config = dataclasses.replace(CONFIG, unlearning_rate=1e30, stop_share=1.0)
    with pytest.raises(ValueError, match=r"'far': its loss is .*unlearning_rate than 1e\+30"):
        attribute_queries(run, queries[:1], config, ["far"])
    assert not (run.root.workdir / "attribution" / "far").exists()


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"weights": "mpl"}, ("weights", "mpl", "mlp")),
        ({"query_strength": 0.0}, ("query_strength", "0.0")),
        ({"unlearning_rate": -1e-4}, ("unlearning_rate", "-0.0001")),
        ({"max_steps": 0}, ("max_steps", "0")),
        ({"stop_share": 1.1}, ("stop_share", "1.1")),
        ({"stop_share": 0.0}, ("stop_share", "0.0")),
        ({"retain_batch": 0}, ("retain_batch", "0")),
        ({"query_batch": 2.5}, ("query_batch", "2.5")),
        ({"score_draws": 0}, ("score_draws", "0")),
        ({"noisy_share": 0.0}, ("noisy_share", "0.0")),
        ({"null_draws": -3}, ("null_draws", "-3")),
        ({"stride": 50}, ("stride", "50", "'unlearn'")),
        ({"curvature": "ekfac"}, ("curvature", "ekfac", "'unlearn', 'influence'")),
    ],
    ids=str,
)
def test_refusals_name_the_setting_and_its_value(settings, names):
    with pytest.raises(ValueError) as error:
        method_config("mirrored", **settings)
    assert all(name in str(error.value) for name in names), error.value


def test_queries_of_a_pass_follow_the_weights_that_move(run):
    few = queries_per_pass(run, dataclasses.replace(CONFIG, weights="all"))
    assert (
        few < queries_per_pass(run, CONFIG)
        and queries_per_pass(run, dataclasses.replace(CONFIG, queries_per_pass=2)) == 2
    )
