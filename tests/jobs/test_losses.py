"""Passes over the data set: values depend on neither batches nor devices, and resume whatever comes with them."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attrib_jax.attribution.scores import strided_losses
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.encoded_dataset import EncodedDataset
from attrib_jax.jobs.losses import ExampleProgram, base_losses, dataset_pass, loss_program
from attrib_jax.jobs.settings import LossSettings, PassSettings
from attrib_jax.models.predictor import predictor
from attrib_jax.parallel.mesh import data_mesh
from attrib_jax.storage.chunks import ChunkStore
from attrib_jax.storage.stage_root import StageRoot
from tests.attribution.tiny_denoiser import SCHEDULE
from tests.failures import interrupt_writes, until_done

CONFIG = LossSettings(stride=300)
# More than two chunks.
COUNT = 1100


@pytest.fixture(scope="module")
def run(pipeline, dataset, tmp_path_factory):
    return Run(pipeline, dataset, StageRoot(tmp_path_factory.mktemp("losses")))


@pytest.fixture(scope="module")
def losses(run):
    return base_losses(run, CONFIG)


def test_shared_noise_has_a_stage_of_its_own_and_is_off_by_default(run, losses):
    np.testing.assert_array_equal(base_losses(run, PassSettings(stride=300)), losses)
    common = base_losses(run, PassSettings(stride=300, shared_noise=True))
    assert run.root.is_finished("losses/stride300-first-flips2-seed0-shared-noise", *_shared_stage(run))
    assert (np.abs(common - losses) > 1e-4).mean() > 0.9
    # The same image has the same noise in any row: these losses differ by the images alone.
    data = dataclasses.replace(run.data, row_ids=run.data.row_ids[::-1].copy())
    program = loss_program(run, PassSettings(stride=300, shared_noise=True))
    found = program(program.place(run.pipeline.params["unet"]), data, np.arange(9))
    np.testing.assert_array_equal(found, common[:9])


def test_another_noise_seed_gives_the_losses_of_that_loss_seed(run, losses):
    other = base_losses(run, PassSettings(stride=300, noise_seed=3))
    np.testing.assert_array_equal(other, base_losses(run, LossSettings(stride=300, loss_seed=3)))
    assert not np.allclose(other, losses)


def _shared_stage(run):
    return {"loss_seed": 0, "stride": 300, "captions": "first", "num_flips": 2, "shared_noise": True}, run.inputs


def tile_losses(predict, shared, batch):
    schedule, key, timesteps, params = shared
    return strided_losses(predict, schedule, params, key, batch, timesteps)


@pytest.mark.parametrize(("devices", "batch_size"), [(1, 1), (3, 0), (4, 1000)])
def test_losses_depend_on_neither_batch_order_subset_nor_devices(run, losses, devices, batch_size):
    config = LossSettings(stride=300, batch_size=batch_size)
    static, mesh = (predictor(run.pipeline.unet),), data_mesh(jax.devices()[:devices])
    program = ExampleProgram(tile_losses, run.pipeline.schedule, config, mesh, static=static)
    rows = np.random.default_rng(devices).permutation(len(run.data))[:23]
    found = program(program.place(run.pipeline.params["unet"]), run.data, rows)
    np.testing.assert_array_equal(found, losses[rows])


@pytest.mark.parametrize("changes", [{"flips": "none"}, {"flips": "mean"}, {"captions": "all"}, {"batch_size": 7}])
def test_losses_of_other_settings_lie_beside_and_agree(run, losses, changes):
    found = base_losses(run, LossSettings(stride=300, **changes))
    assert found.shape == (37, 1 if changes.get("flips") == "none" else 2)
    same = run.data.num_captions == 1 if "captions" in changes else slice(None)
    np.testing.assert_array_equal(found[same], losses[same, : found.shape[1]])
    assert np.array_equal(found, losses[:, : found.shape[1]]) == ("captions" not in changes)


def test_precisions_keep_their_losses_apart(run, losses):
    rounded = base_losses(run, LossSettings(stride=300, precision="bfloat16"))
    assert 0 < np.abs(rounded - losses).max() < 0.1 * np.abs(losses).max()
    np.testing.assert_array_equal(base_losses(run, CONFIG), losses)


def test_losses_of_some_rows_are_those_of_all(run, losses, pipeline, dataset, tmp_path):
    rows = np.array([3, 30, 36])
    np.testing.assert_array_equal(base_losses(run, CONFIG, rows, tmp_path / "unused"), losses[rows])
    assert not (tmp_path / "unused").exists()
    # Computed for these alone where there are no others yet, unless as many calls would cost more than all rows.
    other = Run(pipeline, dataset, StageRoot(tmp_path / "other"))
    np.testing.assert_array_equal(base_losses(other, CONFIG, rows, tmp_path / "some"), losses[rows])
    assert (tmp_path / "some").exists() and not (tmp_path / "other" / "losses").exists()
    np.testing.assert_array_equal(base_losses(other, CONFIG, rows, tmp_path / "many", passes=13), losses[rows])
    assert (tmp_path / "other" / "losses").exists() and not (tmp_path / "many").exists()


# A program that costs nothing, over more rows than a chunk holds.


def tile_values(shared, batch):
    _, key, timesteps, weight = shared
    del key, timesteps
    return jnp.sin(weight * batch.latents.sum((1, 2, 3)) + batch.flip) + batch.row_id


def tile_values_of_two(shared, batch):
    *rest, weights = shared
    return jnp.stack([tile_values((*rest, weight), batch) for weight in weights], axis=1)


@pytest.fixture(scope="module")
def many():
    """What a pass takes of a run, and the program."""
    latents = np.random.default_rng(0).normal(size=(COUNT, 2, 1, 1, 1)).astype(np.float32)
    data = EncodedDataset(np.arange(COUNT), latents, np.zeros((COUNT, 1, 1), np.float32), np.arange(COUNT + 1))
    return types.SimpleNamespace(data=data), ExampleProgram(tile_values, SCHEDULE, LossSettings(stride=50))


def values(many, paths, weights=(0.5, 2.0, 3.0), **options):
    run, program = many
    return dataset_pass(run, paths, program, [program.place(np.float32(weight)) for weight in weights], "", **options)


def store_of(path):
    return ChunkStore(path, {"loss": ((2,), np.float64)}, COUNT, 512, name="losses")


def assert_same(found, expected):
    for each, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(each, other)


@pytest.fixture
def whole(many, tmp_path):
    return values(many, [tmp_path / name for name in "abc"])


def test_an_interrupted_pass_resumes_with_other_queries_beside(many, whole, tmp_path, monkeypatch):
    assert len({each.tobytes() for each in whole}) == 3
    paths = [tmp_path / "x", tmp_path / "y", tmp_path / "z"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_writes(patch, every=5)
        values(many, paths[:2], (0.5, 2.0))
    assert store_of(paths[0]).pending_chunks() == store_of(paths[1]).pending_chunks() == [2]
    kept = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("[xy]/losses/chunk-*")}
    assert len(kept) == 4
    assert_same(values(many, paths[::-1], (3.0, 2.0, 0.5)), whole[::-1])
    assert {file: file.stat().st_mtime_ns for file in kept} == kept


def test_a_pass_interrupted_again_and_again_ends_with_the_same_bits(many, whole, tmp_path, monkeypatch):
    interrupt_writes(monkeypatch, every=2)
    found, interruptions = until_done(lambda: values(many, [tmp_path / name for name in "xyz"]))
    assert interruptions >= 4
    assert_same(found, whole)


@pytest.mark.parametrize("missing", [[], [1]])
def test_values_of_another_kind_of_device_are_computed_anew(many, whole, tmp_path, missing):
    """All of them, even of a whole pass: what they are subtracted from may since have been computed on this one."""
    store = store_of(tmp_path / "a")
    for chunk in (0, 1, 2):
        store.write(chunk, {"loss": store.read(chunk)["loss"] * (1 + 1e-4)})
    for chunk in missing:
        next((tmp_path / "a").rglob(f"chunk-{chunk:06d}*")).unlink()
    assert_same(values(many, [tmp_path / "a"], (0.5,)), whole[:1])


def test_values_that_nothing_is_subtracted_from_are_kept(many, whole, tmp_path):
    store = store_of(tmp_path / "a")
    store.write(0, {"loss": store.read(0)["loss"] + 1})
    (found,) = values(many, [tmp_path / "a"], (0.5,), check_device=False)
    np.testing.assert_array_equal(found[512:], whole[0][512:])
    np.testing.assert_array_equal(found[:512], whole[0][:512] + 1)


def test_a_program_with_all_queries_in_it_gives_each_its_own(many, whole, tmp_path):
    run, _ = many
    program = ExampleProgram(tile_values_of_two, SCHEDULE, LossSettings(stride=50), result_shape=(2,))
    weights = [program.place(np.array([0.5, 2.0], np.float32))]
    paths = [tmp_path / "x", tmp_path / "y"]
    found = dataset_pass(run, paths, program, weights, "", check_device=False)
    for each, expected in zip(found, whole):
        np.testing.assert_allclose(each, expected, rtol=1e-6)
    rows = np.array([1099, 5])
    (some,) = values(many, [tmp_path / "rows"], (0.5,), rows=rows)
    np.testing.assert_array_equal(some, whole[0][rows])
