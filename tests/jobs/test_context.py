"""A run: what its stages are checked against, and that others' are refused and kept."""

import copy
import dataclasses

import jax
import numpy as np
import pytest

from attrib_jax.data.sources import ArrayDataset
from attrib_jax.jobs.context import Run, fewest_parts, load_divisible, model_fingerprint, run_mesh
from attrib_jax.jobs.encode import EncodeConfig
from attrib_jax.jobs.settings import CurvatureSettings, LossSettings
from attrib_jax.storage.stage_root import StageRoot
from attrib_jax.storage.stages import StageMismatchError
from tests.tiny_dataset import make_dataset


def with_weight(pipeline, change):
    """The pipeline with one weight changed by a function."""
    params = jax.tree.map(np.array, pipeline.params)
    bias = params["unet"]["conv_in"]["bias"]
    bias[0] = change(bias[0])
    return dataclasses.replace(pipeline, params=params)


def with_other_captions(dataset):
    images = np.stack([dataset[row].image for row in range(len(dataset))])
    captions = [dataset.captions(row) for row in range(len(dataset))]
    return ArrayDataset(images, [*captions[:-1], ("another caption",)], row_ids=dataset.row_ids)


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        (lambda pipeline, dataset: (with_weight(pipeline, lambda x: x + 1e-3), dataset), "model"),
        (lambda pipeline, dataset: (pipeline, make_dataset(seed=1)), "dataset"),
        (lambda pipeline, dataset: (pipeline, with_other_captions(dataset)), "dataset"),
        (lambda pipeline, dataset: (pipeline, dataset, EncodeConfig(dtype="float16")), "encoding"),
    ],
    ids=["model", "data", "captions", "encoding"],
)
@pytest.mark.parametrize("shipped", [False, True])
def test_a_workdir_of_other_inputs_is_refused_and_kept(pipeline, dataset, tmp_path, change, differs, shipped):
    other, other_dataset, *config = change(pipeline, dataset)
    root = StageRoot(tmp_path / "work", tmp_path / "shipped" if shipped else None)
    Run(pipeline, dataset, root)
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(StageMismatchError, match=rf"inputs\.{differs}: found .*, expected ") as error:
        Run(other, other_dataset, root, *config)
    assert str(tmp_path / "work") in str(error.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == kept
    Run(pipeline, dataset, root)


def test_weights_that_are_not_finite_are_named(pipeline, dataset, tmp_path):
    with pytest.raises(ValueError, match="unet/conv_in/bias"):
        Run(with_weight(pipeline, lambda x: np.nan), dataset, StageRoot(tmp_path))


def test_the_padding_token_is_part_of_the_model(pipeline):
    """As that of Stable Diffusion 2, which pads with another token than it ends with."""
    tokenizer = copy.deepcopy(pipeline.tokenizer)
    tokenizer.pad_token = "!"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model_fingerprint(dataclasses.replace(pipeline, tokenizer=tokenizer)) != model_fingerprint(pipeline)


def test_timings_add_up_and_tell_what_was_reused(pipeline, dataset, tmp_path):
    run = Run(pipeline, dataset, StageRoot(tmp_path))
    assert run.data is run.data and run.timings["encode"][1] is False
    again = Run(pipeline, dataset, StageRoot(tmp_path))
    np.testing.assert_array_equal(again.data.row_ids, run.data.row_ids)
    assert again.timings["encode"][1] is True
    for reused in (True, False, True):
        with again.timed("stage", reused):
            pass
    assert again.timings["stage"][1] is False


@pytest.mark.parametrize(("held", "parts"), [(40, 1), (50, 1), (51, 2), (101, 4), (400, 8), (4000, 8)])
def test_weights_are_divided_by_the_least_divisor_that_leaves_half_of_a_device(held, parts):
    assert fewest_parts(held, 100, 8) == parts


def test_what_will_be_divided_is_read_into_the_hosts_memory_and_the_rest_onto_a_device(pipeline, monkeypatch):
    monkeypatch.setattr("attrib_jax.jobs.context.mesh_platform", lambda mesh: "tpu")
    found = load_divisible(lambda: pipeline, CurvatureSettings(model_parallel=2))
    assert found.params["unet"] is pipeline.params["unet"]
    assert found.params["vae"] is not pipeline.params["vae"]
    jax.tree.map(np.testing.assert_array_equal, found.params["vae"], pipeline.params["vae"])
    # CPUs say nothing of their memory, so that nothing is divided; other methods divide nothing.
    whole = load_divisible(lambda: pipeline, CurvatureSettings())
    assert whole.params["unet"] is not pipeline.params["unet"]
    assert load_divisible(lambda: pipeline, LossSettings()) is pipeline
    assert run_mesh(pipeline, CurvatureSettings()).axis_names == ("data",)
    assert dict(run_mesh(pipeline, CurvatureSettings(model_parallel=2)).shape) == {"data": 2, "model": 2}


def test_an_impossible_division_is_refused_before_the_model_is_read():
    with pytest.raises(ValueError, match="model_parallel is 3 and there are 4 devices"):
        load_divisible(lambda: pytest.fail("read"), CurvatureSettings(model_parallel=3))
