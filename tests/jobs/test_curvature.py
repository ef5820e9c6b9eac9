"""The diagonal Fisher information over a data set: resumed, on other devices, and its place among the stages."""

import functools

import jax
import numpy as np
import pytest

from attrib_jax.core.keys import purpose_key
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.curvature import fit_curvature, fit_fisher
from attrib_jax.jobs.draws import Sample, fisher_draws, sample_loss
from attrib_jax.jobs.settings import CurvatureSettings
from attrib_jax.parallel.mesh import data_mesh
from attrib_jax.storage.stage_root import StageRoot
from tests.failures import interrupt_states
from tests.jobs.tiny_problem import SCHEDULE, predict, tiny_problem

# More than two states apart on one device.
SAMPLES = 1100
CONFIG = CurvatureSettings(fisher_samples=40)


@pytest.fixture
def problem():
    with tiny_problem() as problem:
        yield problem


def fit(problem, path, devices, samples=SAMPLES):
    path.mkdir(exist_ok=True)
    return fit_fisher(path, predict, SCHEDULE, *problem, samples, 0, data_mesh(jax.devices()[:devices]))


def test_fits_are_means_of_squares_resume_to_the_same_bits_and_are_close_on_other_devices(
    problem, tmp_path, monkeypatch
):
    whole, others = fit(problem, tmp_path / "whole", 1), fit(problem, tmp_path / "others", 3)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), whole.tree, others.tree)
    interrupt_states(monkeypatch, after=(1, 2))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            fit(problem, tmp_path / "resumed", 1)
    jax.tree.map(np.testing.assert_array_equal, whole.tree, fit(problem, tmp_path / "resumed", 1).tree)
    assert [path.name for path in (tmp_path / "resumed").iterdir()] == ["fisher.safetensors"]

    selected, rest, data = problem
    draws = fisher_draws(0, SAMPLES, data.num_captions, SCHEDULE.num_train_timesteps)
    batch = Sample(*data.inputs(draws.row, draws.flip, draws.caption), draws.index, draws.timestep, np.ones(SAMPLES))
    gradient = jax.grad(sample_loss(predict, SCHEDULE, purpose_key(0, "fisher")))
    gradients = jax.jit(jax.vmap(gradient, (None, None, 0)))(selected, rest, batch)
    scale = whole.gradient_scale**2
    for found, each in zip(jax.tree.leaves(whole.tree), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(found, scale * np.square(each).mean(axis=0), rtol=1e-5)


@pytest.fixture(scope="module")
def run(pipeline, dataset, tmp_path_factory):
    return Run(pipeline, dataset, StageRoot(tmp_path_factory.mktemp("curvature")))


@pytest.fixture(scope="module")
def fitted(run):
    return fit_curvature(run, CONFIG)


def folder(run):
    return run.root.workdir / "fisher" / "cross-attn-kv-40-seed0"


def test_a_fit_is_reused_and_a_damaged_one_fitted_again(run, fitted, pipeline, dataset):
    file = folder(run) / "fisher.safetensors"
    again = Run(pipeline, dataset, run.root)
    jax.tree.map(np.testing.assert_array_equal, fit_curvature(again, CONFIG).tree, fitted.tree)
    assert again.timings["fisher"][1]
    file.write_bytes(file.read_bytes()[:-9])
    jax.tree.map(np.testing.assert_array_equal, fit_curvature(again, CONFIG).tree, fitted.tree)


def test_a_fit_from_elsewhere_is_taken_and_checked(run, fitted):
    elsewhere = fit_curvature(run, CurvatureSettings(fisher=str(folder(run))))
    jax.tree.map(np.testing.assert_array_equal, elsewhere.tree, fitted.tree)
    with pytest.raises(ValueError, match="does not fit the selected weights"):
        fit_curvature(run, CurvatureSettings(fisher=str(folder(run)), weights="attn"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        fit_curvature(run, CurvatureSettings(fisher="nowhere"))


def test_settings_hold_the_content_of_a_file_and_what_is_in_use(run, fitted, tmp_path):
    stage, file = folder(run), tmp_path / "copy.safetensors"
    file.write_bytes((stage / "fisher.safetensors").read_bytes())
    assert CurvatureSettings(fisher=str(stage)).describe() == CurvatureSettings(fisher=str(file)).describe()
    plain = CONFIG.describe()
    assert plain["curvature"] == "diagonal" and "ekfac_damping" not in plain
    ekfac = CurvatureSettings(curvature="ekfac").describe()
    assert ekfac["ekfac_damping"] == 0.1 and "fisher" not in ekfac


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"curvature": "kfac"}, "curvature 'kfac': did you mean 'ekfac'"),
        ({"curvature": "ekfac", "fisher": "a.pt"}, "fisher is 'a.pt'.*curvature is 'ekfac'"),
        ({"ekfac_damping": 0.2}, "ekfac_damping is 0.2.*curvature is 'diagonal'"),
        ({"curvature": "ekfac", "ekfac_damping": -1.0}, "ekfac_damping is -1"),
        ({"damping": -1.0}, "damping is -1"),
        ({"fisher_samples": 0}, "fisher_samples is 0"),
        ({"weights": "cross-attn-kw"}, "did you mean 'cross-attn-kv'"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CurvatureSettings(**settings)
