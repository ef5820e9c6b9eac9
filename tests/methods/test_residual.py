"""The residual product through the main job: against a plain loop, its invariances, resume, and what is refused."""

import dataclasses

import jax
import numpy as np
import pytest

from attrib_jax.attribute import attribute_queries
from attrib_jax.attribution.similarity import gaussian_kernel, normalise_caption, text_statistics, token_kernels
from attrib_jax.core.keys import example_noise, loss_key, purpose_key, shared_noise
from attrib_jax.data.sources import ArrayDataset
from attrib_jax.diffusion.losses import predictions
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.query import Query, prepare_query
from attrib_jax.methods import check_method, method_config
from attrib_jax.parallel.mesh import data_mesh
from attrib_jax.storage.stage_root import StageRoot
from tests.failures import interrupt_writes, until_done
from tests.tiny_dataset import make_dataset

PLAIN = method_config("residual", stride=300, text_kernel=("none",))  # timesteps 600 and 900
TIMESTEPS = np.array([600, 900])


@pytest.fixture(scope="module")
def queries(dataset):
    # The second has the third image and its first caption but for case.
    return [Query("a red heart", image=dataset[9].image), Query(dataset.captions(2)[0].upper(), image=dataset[2].image)]


@pytest.fixture(scope="module")
def run(pipeline, dataset, tmp_path_factory):
    return Run(pipeline, dataset, StageRoot(tmp_path_factory.mktemp("residual")))


def scores(run, queries, config):
    return [result.scores for result in attribute_queries(run, queries, config)]


def reference(run, queries, config):
    """Scores (Q, N) by a loop over images, flips and captions; flips by their maximum."""
    pipeline, data = run.pipeline, run.data
    statistics = text_statistics(
        data.text, np.arange(len(data.text)) if config.captions == "all" else data.first_caption[:-1]
    )

    @jax.jit
    def residual(params, latents, text, noise):
        prediction, target = predictions(run.predict, params, pipeline.schedule, latents, text, noise, TIMESTEPS)
        return target - prediction

    def one(latents, text, row_id, flip, caption):
        shape = latents.shape
        if config.shared_noise:
            noise = shared_noise(purpose_key(config.loss_seed, "shared noise"), TIMESTEPS, shape)
        else:
            noise = example_noise(loss_key(config.loss_seed), row_id, flip, caption, TIMESTEPS, shape)
        return np.asarray(residual(pipeline.params["unet"], latents, text, noise), np.float64).ravel()

    prepared = [prepare_query(pipeline, run.predict, query) for query in queries]
    own = [one(each.latents, each.text, 2**31 - 1, 0, 0) for each in prepared]
    found = np.zeros((len(queries), len(data), 2))
    for row in range(len(data)):
        captions = range(data.num_captions[row] if config.captions == "all" else 1)
        for caption in captions:
            for flip in range(2):
                latents, text = (part[0] for part in data.inputs(np.array([row]), flip, caption))
                values = one(latents, text, data.row_ids[row], flip, caption)
                for place, query in enumerate(prepared):
                    kernel = 1.0
                    if "same" in config.text_kernel:
                        texts = query.prompt, run.dataset.captions(row)[caption]
                        kernel *= normalise_caption(texts[0]) == normalise_caption(texts[1])
                    single = statistics._replace(pooled=text.mean(axis=0, dtype=np.float64)[None])
                    if "gaussian" in config.text_kernel:
                        kernel *= gaussian_kernel(query.text, single, config.text_width)[0]
                    if "tokens" in config.text_kernel:
                        state = text[None]
                        kernel *= token_kernels([query.text], state, np.array([0]), single, config.text_damping)[0, 0]
                    found[place, row, flip] += kernel * np.mean(own[place] * values) / len(captions)
    return found.max(axis=2)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"captions": "all", "text_kernel": ("gaussian", "tokens"), "text_width": 0.5, "text_damping": 0.3},
        {"captions": "all", "text_kernel": ("same",)},
        {"shared_noise": False},
    ],
    ids=str,
)
def test_scores_are_kernel_times_inner_product(run, queries, settings):
    config = dataclasses.replace(PLAIN, **settings)
    expected = reference(run, queries, config)
    for each, row in zip(scores(run, queries, config), expected):
        np.testing.assert_array_equal(each.row_id, run.data.row_ids)
        np.testing.assert_allclose(each.score, row, atol=0.01 * row.std())


def test_a_projection_keeps_inner_products(run, queries):
    whole = scores(run, queries, PLAIN)
    projected = scores(run, queries, dataclasses.replace(PLAIN, residual_dim=2048))
    other = scores(run, queries, dataclasses.replace(PLAIN, residual_dim=2048, residual_seed=1))
    for left, right, third in zip(whole, projected, other):
        # The standard deviation of a projected product is at most sqrt(2 / k) times the two lengths.
        bound = 4 * np.sqrt(2 / 2048) * np.abs(left.score).max()
        assert 0 < np.abs(left.score - right.score).max() < bound
        assert np.corrcoef(left.score, right.score)[0, 1] > 0.9
        assert 0 < np.abs(right.score - third.score).max() < 2 * bound


def test_a_score_does_not_depend_on_order_subset_batch_devices_or_other_queries(
    pipeline, dataset, run, queries, tmp_path, monkeypatch
):
    whole = scores(run, queries, PLAIN)
    places = np.array([30, 2, 11, 9, 5])
    subset = ArrayDataset(
        np.stack([dataset[int(place)].image for place in places]),
        [dataset.captions(int(place)) for place in places],
        row_ids=dataset.row_ids[places],
    )
    monkeypatch.setattr("attrib_jax.jobs.losses.data_mesh", lambda: data_mesh(jax.devices()[:1]))
    other = Run(pipeline, subset, StageRoot(tmp_path))
    found = scores(other, queries[1:], dataclasses.replace(PLAIN, batch_size=1))[0]
    np.testing.assert_array_equal(found.row_id, dataset.row_ids[places])
    # Bitwise but for the matrix product of all queries.
    np.testing.assert_allclose(found.score, whole[1].score[places], rtol=1e-12, atol=1e-15)


def test_an_interrupted_run_goes_on_and_queries_share_the_stored_residuals(pipeline, tmp_path, monkeypatch):
    dataset = make_dataset(300)
    config = dataclasses.replace(PLAIN, stride=900, flips="none", text_kernel=("gaussian",))
    query = Query("hat", image=dataset[3].image)
    expected = scores(Run(pipeline, dataset, StageRoot(tmp_path / "whole")), [query], config)[0]
    with monkeypatch.context() as patch:
        interrupt_writes(patch, 2)
        found, interruptions = until_done(
            lambda: scores(Run(pipeline, dataset, StageRoot(tmp_path / "killed")), [query], config)[0]
        )
    assert interruptions >= 3
    np.testing.assert_array_equal(found.score, expected.score)
    again = Run(pipeline, dataset, StageRoot(tmp_path / "killed"))
    result = attribute_queries(again, [Query("polar bear", image=dataset[4].image)], config)[0]
    assert result.timings["residuals"][1] and result.timings["text statistics"][1]  # reused


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"residual_start": 950}, ("residual_start", "950", "900")),
        ({"residual_start": -1}, ("residual_start", "-1")),
        ({"text_kernel": ()}, ("text_kernel", "()")),
        ({"text_kernel": ("same", "none")}, ("text_kernel", "none")),
        ({"text_kernel": ("same", "same")}, ("text_kernel", "same")),
        ({"text_kernel": ("sane",)}, ("text_kernel", "sane", "same")),
        ({"text_width": 0.2}, ("text_width", "0.2", "gaussian")),
        ({"text_kernel": ("gaussian",), "text_width": 0.0}, ("text_width", "0.0")),
        ({"text_damping": 0.2}, ("text_damping", "0.2", "tokens")),
        ({"residual_seed": 3}, ("residual_seed", "3", "residual_dim")),
        ({"residual_dim": -4}, ("residual_dim", "-4")),
    ],
    ids=str,
)
def test_refusals_name_the_setting_and_its_value(run, settings, names):
    with pytest.raises(ValueError) as error:
        check_method(run, dataclasses.replace(PLAIN, **settings))
    assert all(name in str(error.value) for name in names), error.value


def test_a_prompt_that_no_image_has_is_told(run, queries, caplog):
    config = dataclasses.replace(PLAIN, text_kernel=("same",))
    (found,) = scores(run, [dataclasses.replace(queries[0], prompt="a volcano")], config)
    assert not found.score.any() and "text_kernel" in caplog.text
