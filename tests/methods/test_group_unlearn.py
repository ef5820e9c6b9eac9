"""Unlearning groups through the main job: weights and scores against a plain loop, resume, files and refusals."""

import csv
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from attrib_jax.attribute import attribute_queries, attribute_to_files
from attrib_jax.attribution.groups import GroupShare
from attrib_jax.core.keys import purpose_key
from attrib_jax.core.weights import flatten_names, merge_weights, unflatten_names
from attrib_jax.data.sources import ArrayDataset
from attrib_jax.diffusion.losses import denoising_losses
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.draws import fisher_draws
from attrib_jax.jobs.query import Query
from attrib_jax.methods import group_unlearn, method_config, mirrored
from attrib_jax.storage.files import read_arrays
from attrib_jax.storage.score_files import read_scores
from attrib_jax.storage.stage_root import StageRoot
from tests.failures import interrupt_states, interrupt_writes, until_done
from tests.methods.faint_model import make_faint_model

# Batches as in the tests of mirrored unlearning, whose program it is.
CONFIG = method_config(
    "group-unlearn", max_steps=3, retain_batch=4, query_batch=4, group_draws=10, null_draws=40, stop_share=1.0
)
NAMES = ["Ann", "Bob, B.", "(none)", "Bob, B."]


def grouped(dataset, names=NAMES, count=12, **known):
    images = np.stack([dataset[place].image for place in range(count)])
    captions = [dataset.captions(place) for place in range(count)]
    groups = None if names is None else [names[place % len(names)] for place in range(count)]
    return ArrayDataset(images, captions, group_names=groups, **known)


@pytest.fixture(scope="module")
def model(pipeline):
    return make_faint_model(pipeline)


@pytest.fixture(scope="module")
def queries(dataset):
    return [Query("a red heart", image=dataset[9].image), Query("hat", image=dataset[2].image)]


@pytest.fixture(scope="module")
def run(model, dataset, tmp_path_factory):
    return Run(model, grouped(dataset), StageRoot(tmp_path_factory.mktemp("groups")))


@pytest.fixture(scope="module")
def plain(run, queries):
    return attribute_queries(run, queries, CONFIG)


def weights_of(run, place):
    (file,) = run.root.workdir.glob(f"groups/mlp-*/group-{place:05d}.safetensors")
    return unflatten_names(read_arrays(file)[0])


def test_weights_are_those_of_a_plain_loop_over_the_groups_images_and_the_others(run, plain):
    data, schedule = run.data, run.pipeline.schedule
    selected, rest = run.select("mlp")
    null = group_unlearn.null_loss(run, CONFIG)
    member = np.array([["(none)", "Ann", "Bob, B."].index(NAMES[place % 4]) for place in range(12)])

    def losses(weights, parts):
        latents, text, timesteps, noise = parts
        params = merge_weights(weights, rest)
        return jax.vmap(lambda z, c, t, e: denoising_losses(run.predict, params, schedule, z, c, e[None], t[None])[0])(
            latents, text, timesteps, noise
        )

    @jax.jit
    def gradient(weights, retain, forget):
        def objective(weights):
            clamped = jnp.minimum(losses(weights, forget), null)
            return losses(weights, retain).mean() - CONFIG.query_strength * clamped.mean()

        return jax.grad(objective)(weights)

    for place in range(3):
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(CONFIG.unlearning_rate))
        weights, state = selected, optimizer.init(selected)
        rows = {"retain": np.flatnonzero(member != place), "forget": np.flatnonzero(member == place)}
        assert not {*rows["retain"]} & {*rows["forget"]} and len(rows["retain"]) + len(rows["forget"]) == 12
        for step in range(3):
            parts = {}
            for kind, own in rows.items():
                draws = fisher_draws(0, 12, np.ones(len(own), np.int64), schedule.num_train_timesteps)
                taken = slice(4 * step, 4 * step + 4)
                latents, text = data.inputs(own[draws.row[taken]], draws.flip[taken], 0)
                key = jax.random.fold_in(purpose_key(0, f"mirrored {kind}"), step)
                noise = jnp.stack([jax.random.normal(jax.random.fold_in(key, i), data.latent_shape) for i in range(4)])
                timesteps = mirrored.stratified_timesteps(0, kind, step, 4, schedule.num_train_timesteps)
                parts[kind] = latents, text, timesteps, noise
            updates, state = optimizer.update(gradient(weights, **parts), state, weights)
            weights = optax.apply_updates(weights, updates)
        found = flatten_names(weights_of(run, place))
        # Adam's first steps have the sign of the gradient alone, so rounding may turn a step of a weight without one.
        for name, leaf in flatten_names(weights).items():
            difference = np.abs(found[name] - leaf)
            assert np.quantile(difference, 0.98) < 1e-6 and difference.max() < 7 * CONFIG.unlearning_rate, name


def test_scores_are_even_shares_of_the_change_of_the_querys_loss(run, queries, plain):
    schedule, (selected, rest) = run.pipeline.schedule, run.select("mlp")
    key, timesteps = purpose_key(0, "group draws"), np.arange(50, 1000, 100)
    noise = np.stack([jax.random.normal(jax.random.fold_in(key, i), run.data.latent_shape) for i in range(10)])

    @jax.jit
    def losses(weights, latents, text):
        params = merge_weights(weights, rest)
        return denoising_losses(run.predict, params, schedule, latents, text, noise, timesteps)

    for result in plain:
        inputs = result.query.latents, result.query.text
        before = np.asarray(losses(selected, *inputs), np.float64)
        change = [
            np.mean(np.asarray(losses(weights_of(run, place), *inputs), np.float64) - before) for place in range(3)
        ]
        expected = [change[("(none)", "Ann", "Bob, B.").index(NAMES[row % 4])] / (3, 6)[row % 2] for row in range(12)]
        np.testing.assert_allclose(result.scores.score, expected, atol=1e-6)
        assert np.ptp(change) > 1e-5
    # Another query needs no model again, and is what it would be beside others.
    again = attribute_queries(run, queries[1:], CONFIG, ["alone"])[0]
    assert again.timings["unlearn groups"][1]
    np.testing.assert_array_equal(again.scores.score, plain[1].scores.score)


def test_an_interrupted_run_goes_on_to_the_same_bits(run, queries, plain, model, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(mirrored, "_SECONDS_BETWEEN_STATES", -1.0)
    other = Run(model, grouped(dataset), StageRoot(tmp_path))
    with monkeypatch.context() as patch:
        interrupt_writes(patch, 3)
        interrupt_states(patch, after=(2, 4))
        found, interruptions = until_done(lambda: attribute_queries(other, queries, CONFIG, ["a", "b"]))
    assert interruptions >= 3
    for left, right in zip(found, plain):
        np.testing.assert_array_equal(left.scores.score, right.scores.score)
    names = [{path.name for path in each.root.workdir.glob("groups/*/*")} for each in (run, other)]
    assert names[0] == names[1] and not any("unlearning" in name for name in names[0])
    # Another column of groups has models of its own, and another fingerprint.
    regrouped = Run(model, grouped(dataset, ["Ann", "Bob"]), other.root)
    changed = attribute_queries(regrouped, queries[:1], CONFIG, ["c"])[0]
    assert len(list(tmp_path.glob("groups/*"))) == 2 and len(set(changed.scores.score)) == 2


def test_files_tell_what_each_group_did(model, dataset, queries, tmp_path):
    root = StageRoot(tmp_path)
    config = dataclasses.replace(CONFIG, query_strength=3.0)
    (result,) = attribute_to_files(
        model, grouped(dataset), queries[:1], config, root, names=["q"], model_name="tiny", top_k=5
    )
    scores = read_scores(result.folder)
    arrays, _ = read_arrays(result.folder / "group_losses.safetensors")
    with (result.folder / "groups.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(GroupShare._fields) and {row["group"] for row in rows} == {*NAMES}
    change = dict(zip(("(none)", "Ann", "Bob, B."), (arrays["after"].astype(float) - arrays["before"]).mean(axis=1)))
    for row in rows:
        own = np.array([NAMES[place % 4] == row["group"] for place in scores.row_id])
        assert float(row["total"]) == pytest.approx(change[row["group"]]) == pytest.approx(scores.score[own].sum())
        assert int(row["images"]) == own.sum()
    assert [float(row["share"]) for row in rows] == sorted((float(row["share"]) for row in rows), reverse=True)
    page = (result.folder / "report.html").read_text()
    assert "unlearned the group and retained the rest" in page and "for each image" in page
    settings = json.loads((result.folder / "manifest.json").read_text())
    assert settings["settings"]["method"] == "group-unlearn" and "groups" in settings["fingerprints"]


@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        (None, {}, r"method is 'group-unlearn', and the data set 'arts' has no groups.*column 'group'"),
        (["Ann"], {}, r"all 12 images of the data set 'arts' are in one group, 'Ann'"),
        (NAMES, {"max_groups": 2}, r"max_groups is 2, and .* has 3 groups: a step of 4 of them takes .* s here, so up "
         r"to 3 steps of each take up to \d+ (seconds|minutes).*Raise max_groups"),
    ],
    ids=["none", "all", "many"],
)  # fmt: skip
def test_groups_that_cannot_be_unlearned_are_refused_before_any_work(
    model, dataset, queries, tmp_path, names, settings, message
):
    run = Run(model, grouped(dataset, names, name="arts"), StageRoot(tmp_path))
    with pytest.raises(ValueError, match=message):
        attribute_queries(run, queries[:1], dataclasses.replace(CONFIG, **settings))
    assert {path.name for path in tmp_path.iterdir()} == {"inputs"}


def test_a_rate_that_diverges_names_the_group_and_leaves_nothing(run, queries):
    config = dataclasses.replace(CONFIG, unlearning_rate=1e30)
    before = {path.name for path in run.root.workdir.glob("groups/*")}
    with pytest.raises(ValueError, match=r"group '.*': its loss is .*unlearning_rate than 1e\+30"):
        attribute_queries(run, queries[:1], config, ["far"])
    assert {path.name for path in run.root.workdir.glob("groups/*")} == before
    assert not (run.root.workdir / "attribution" / "far").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_draws": 0}, "group_draws is 0"),
        ({"max_groups": 0}, "max_groups is 0"),
        ({"weights": "mpl"}, "mpl"),
        ({"score_draws": 3}, "score_draws is 3, .*'group-unlearn' does not read it.*'?mirrored"),
        ({"cascade": 0.1}, "cascade is 0.1, .*'group-unlearn' does not read it"),
    ],
    ids=str,
)
def test_refusals_name_the_setting_and_its_value(settings, message):
    with pytest.raises(ValueError, match=message):
        method_config("group-unlearn", **settings)
