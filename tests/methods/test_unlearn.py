"""Unlearning as a method: what moves, how its variants lie beside each other, and how it resumes."""

import dataclasses
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
from attrib_jax.methods.unlearn import UnlearnConfig
from attrib_jax.storage.files import StorageError, read_arrays, write_arrays
from attrib_jax.storage.stage_root import StageRoot
from attrib_jax.storage.state import StateStore
from tests.failures import interrupt_states

QUERY = Query(prompt="red heart", seed=3, sampler_steps=2)
CONFIG = UnlearnConfig(query_draws=32, fisher_samples=96, stride=300)


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
        ({"step_size": 0}, "step_size is 0"),
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
