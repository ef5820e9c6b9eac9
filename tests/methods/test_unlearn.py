"""Unlearning as a method: what moves, how its variants lie beside each other, and how it resumes."""

import dataclasses
import json
import types

import numpy as np
import pytest

from attrib_jax.attribute import attribute_queries
from attrib_jax.attribution.scores import dataset_losses
from attrib_jax.core.keys import loss_key
from attrib_jax.core.weights import flatten_names, merge_weights, unflatten_names
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.losses import base_losses
from attrib_jax.jobs.query import Query
from attrib_jax.methods import unlearn
from attrib_jax.methods.unlearn import UnlearnConfig, read_unlearning
from attrib_jax.report.outputs import write_outputs
from attrib_jax.storage.files import StorageError, read_arrays, write_arrays
from attrib_jax.storage.stage_root import StageRoot
from attrib_jax.storage.state import StateStore
from tests.failures import interrupt_states

QUERY = Query(prompt="red heart", seed=3, sampler_steps=2)
CONFIG = UnlearnConfig(query_draws=32, fisher_samples=96, stride=300, step_size=0.01)


@pytest.fixture(scope="module")
def run(pipeline, dataset, tmp_path_factory):
    return Run(pipeline, dataset, StageRoot(tmp_path_factory.mktemp("unlearn")))


@pytest.fixture(scope="module")
def plain(run):
    return attribute_queries(run, [QUERY], CONFIG)[0]


def attributed(run, name=None, **changes):
    return attribute_queries(run, [QUERY], dataclasses.replace(CONFIG, **changes), [name])[0]


def moved_weights(result):
    return read_arrays(result.folder / "unlearned.safetensors")[0]


def test_unlearning_moves_the_selected_weights_and_raises_the_query_loss_most(run):
    result = attributed(run, query_draws=256, step_size=1e-4)
    selected, rest = run.select(CONFIG.weights)
    moved = moved_weights(result)
    assert moved.keys() == flatten_names(selected).keys()
    assert all(np.any(leaf != flatten_names(selected)[name]) for name, leaf in moved.items())

    def query_loss(params):
        latents, text = result.query.latents[None, None], result.query.text[None, None]
        timesteps = np.arange(0, 1000, 5, dtype=np.int32)
        arguments = (loss_key(9), np.array([0]), latents, text, timesteps)
        return dataset_losses(run.predict, run.pipeline.schedule, params, *arguments)[0, 0]

    rise = query_loss(merge_weights(unflatten_names(moved), rest)) - query_loss(run.pipeline.params["unet"])
    assert rise > 0 and rise > (result.scores.loss_after - result.scores.loss_before).mean()


@pytest.mark.parametrize(
    "change",
    [
        {"flips": "none"},
        {"flips": "mean"},
        {"captions": "all"},
        {"update": "sgd"},
        {"steps": 2},
        {"region": (0, 0, 8, 16)},
        {"precision": "bfloat16"},
    ],
)
def test_variants_run_beside_each_other_in_one_workdir(run, plain, change):
    scores = attributed(run, **change).scores
    assert not np.array_equal(scores.score, plain.scores.score)
    assert np.array_equal(scores.loss_before, base_losses(run, dataclasses.replace(CONFIG, **change)))
    if change.keys() & {"update", "steps", "region"}:
        np.testing.assert_array_equal(scores.loss_before, plain.scores.loss_before)
    if change.get("flips") == "none":
        np.testing.assert_array_equal(scores.loss_after[:, 0], plain.scores.loss_after[:, 0])
    if "precision" in change:
        assert np.corrcoef(scores.score, plain.scores.score)[0, 1] > 0.95


def test_linear_scores_take_the_same_weights_and_no_base_losses(run, plain):
    linear = attributed(run, score="linear")
    assert linear.scores.loss_before is None and not {"base losses", "losses after"} & linear.timings.keys()
    for name, leaf in moved_weights(plain).items():
        np.testing.assert_array_equal(moved_weights(linear)[name], leaf)
    small, exact = attributed(run, score="linear", step_size=1e-4), attributed(run, step_size=1e-4)
    assert np.corrcoef(small.scores.score, exact.scores.score)[0, 1] > 0.999


def test_the_automatic_step_raises_random_images_as_asked_and_is_told(run):
    # Nearly all weights of a model that was not trained fit nothing: a small rise, so that the query's is larger.
    config = {"step_size": 0.0, "loss_rise": 0.001, "rise_images": 20}
    found = attributed(run, **config)
    record = read_unlearning(found.folder)
    assert record.num_images == 20 and not record.went_too_far
    rise = record.after.images / record.before.images - 1
    assert 0.0008 < rise <= 0.00102
    # The step by itself gives the same scores.
    by_hand = attributed(run, step_size=record.step_size[0], rise_images=20)
    np.testing.assert_array_equal(by_hand.scores.score, found.scores.score)
    # N is no part of it.
    smaller = attributed(run, num_examples=5, **config)
    np.testing.assert_allclose(smaller.scores.score, found.scores.score, rtol=0.3, atol=1e-5)
    both = attributed(run, steps=2, **config)
    sizes = read_unlearning(both.folder).step_size
    assert len(sizes) == 2 and read_unlearning(both.folder).after.images / record.before.images - 1 <= 0.00102


def test_a_step_that_goes_too_far_is_told_in_report_and_manifest(run, dataset):
    found = attributed(run, step_size=100.0)
    assert read_unlearning(found.folder).went_too_far
    write_outputs(found, dataset, QUERY, dataclasses.replace(CONFIG, step_size=100.0), model_name="tiny")
    manifest = json.loads((found.folder / "manifest.json").read_text())
    assert "Unlearning went too far" in manifest["notes"][0] and manifest["unlearning"]["step_size"] == [100.0]
    assert "rise of the loss of 37 random training images" in (found.folder / "report.html").read_text()


STEPS = {"steps": 4, "keep_ewc_gradient": True, "step_size": 0.003}


@pytest.fixture
def slow_clock(monkeypatch):
    """A clock by which a state is due after every step."""
    times = (30.0**number for number in range(200))
    monkeypatch.setattr(unlearn, "time", types.SimpleNamespace(monotonic=lambda: next(times)))


def test_steps_resume_to_the_same_bits_and_leave_no_state(run, monkeypatch, slow_clock):
    whole = attributed(run, "whole", **STEPS)
    interrupt_states(monkeypatch, after=(1, 3))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            attributed(run, "stopped", **STEPS)
    assert len(list((run.root.workdir / "attribution" / "stopped").glob("unlearning/state-*"))) == 2
    resumed = attributed(run, "stopped", **STEPS)
    assert resumed.query_loss == whole.query_loss and len(whole.query_loss) == 4
    for name, leaf in moved_weights(whole).items():
        np.testing.assert_array_equal(moved_weights(resumed)[name], leaf)
    np.testing.assert_array_equal(resumed.scores.score, whole.scores.score)
    assert {path.name for path in resumed.folder.iterdir()} == {path.name for path in whole.folder.iterdir()}


def test_steps_that_diverge_leave_nothing(run, slow_clock):
    with pytest.raises(ValueError, match="'diverging': "):
        attributed(run, "diverging", step_size=1e8, steps=40, keep_ewc_gradient=True)
    assert not (run.root.workdir / "attribution" / "diverging").exists()


def test_a_state_of_another_query_is_never_taken_up(run):
    folder = attributed(run, "stranger", steps=2).folder
    for name in ("scores.npz", "unlearned.safetensors"):
        (folder / name).unlink()
    StateStore(folder, "unlearning").write({"selected": np.zeros(3, np.float32)}, 1)
    with pytest.raises(StorageError, match="state of another sum"):
        attributed(run, "stranger", steps=2)


def test_f_that_is_zero_where_the_gradient_is_not_is_named(run, tmp_path):
    flat = read_arrays(next(run.root.workdir.glob("fisher/*/fisher.safetensors")))[0]
    name = next(iter(flat))
    write_arrays(tmp_path / "fisher.safetensors", {**flat, name: flat[name] * 0}, {"samples": 96})
    with pytest.raises(ValueError, match=f"'zero': .*{name}"):
        attributed(run, "zero", fisher=str(tmp_path / "fisher.safetensors"))
    damped = attributed(run, "zero", fisher=str(tmp_path / "fisher.safetensors"), damping=1e-3)
    assert np.isfinite(damped.scores.score).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"step_size": float("nan")}, "step_size is nan"),
        ({"step_size": -0.1}, "step_size is -0.1"),
        ({"loss_rise": 0}, "loss_rise is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"num_examples": 0}, "num_examples is 0"),
        ({"update": "sgd", "damping": 1.0}, "damping is 1.0.* 'sgd'"),
        ({"update": "sgd", "curvature": "ekfac"}, "curvature is 'ekfac'.* 'sgd'"),
        ({"update": "sgd", "fisher": "file"}, "fisher is 'file'.* 'sgd'"),
        ({"update": "sgd", "keep_ewc_gradient": True}, "keep_ewc_gradient is True.* 'sgd'"),
        ({"score": "exakt"}, "did you mean 'exact'"),
        ({"precision": "float16"}, "unknown precision 'float16'"),
        ({"flips": "both"}, "unknown flips 'both'"),
        ({"stride": -5}, "stride is -5"),
        ({"loss_seed": 2**32}, f"loss_seed is {2**32}"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        UnlearnConfig(**settings)
