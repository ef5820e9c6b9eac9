"""The main job on a tiny pipeline: files, reuse, invariance to the bit, and refusals."""

import csv
import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest

import attrib_jax.jobs.losses as losses_stage
from attrib_jax.attribute import attribute_queries
from attrib_jax.attribution.unlearn import query_gradient
from attrib_jax.core.keys import purpose_key
from attrib_jax.core.weights import select_weights
from attrib_jax.data.sources import ArrayDataset
from attrib_jax.jobs.context import Run, attribute, query_name
from attrib_jax.jobs.losses import LossProgram
from attrib_jax.jobs.query import Query, generate
from attrib_jax.jobs.query_gradient import GradientProgram
from attrib_jax.methods import method_config
from attrib_jax.models.predictor import predictor
from attrib_jax.parallel.mesh import data_mesh
from attrib_jax.report.outputs import write_outputs
from attrib_jax.storage.chunks import ChunkStore
from attrib_jax.storage.stage_root import StageRoot
from attrib_jax.storage.stages import StageMismatchError
from tests.failures import interrupt_writes, until_done
from tests.tiny_dataset import make_dataset

QUERY = Query(prompt="red heart", seed=3, sampler_steps=3)
CONFIG = method_config(query_draws=32, fisher_samples=96, stride=300)


@pytest.fixture(scope="module")
def finished(pipeline, dataset, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("workdir")
    attributor = Run(pipeline, dataset, StageRoot(workdir))
    return workdir, attributor, attribute_queries(attributor, [QUERY], CONFIG)[0]


def test_scores_are_the_largest_loss_change_of_the_two_flips(finished, dataset):
    _, _, result = finished
    scores = result.scores
    assert scores.loss_before.shape == scores.loss_after.shape == (len(dataset), 2)
    difference = scores.loss_after - scores.loss_before
    np.testing.assert_array_equal(scores.score, difference.max(axis=1))
    np.testing.assert_array_equal(scores.flip, difference.argmax(axis=1))
    np.testing.assert_array_equal(scores.row_id, dataset.row_ids)
    assert np.abs(scores.score).min() > 0


def test_outputs(finished, dataset):
    _, _, result = finished
    write_outputs(result, dataset, QUERY, CONFIG, model_name="tiny", top_k=5, record={"flags": {"top_k": 5}})
    stored = np.load(result.folder / "scores.npz")
    np.testing.assert_array_equal(stored["score"], result.scores.score)
    assert {"row_id", "score", "loss_before", "loss_after"} <= set(stored.files)
    rows = list(csv.DictReader((result.folder / "top.csv").open()))
    top = result.scores.top(5)
    assert [int(row["row_id"]) for row in rows] == top.row_id.tolist()
    assert [float(row["score"]) for row in rows] == top.score.tolist()
    assert rows[0]["caption"] == dataset.captions(int(np.searchsorted(dataset.row_ids, top.row_id[0])))[0]
    manifest = json.loads((result.folder / "manifest.json").read_text())
    assert manifest["settings"]["stride"] == 300 and manifest["flags"] == {"top_k": 5}
    assert set(manifest["fingerprints"]) == {"model", "dataset", "encoding"}
    for name in ("report.html", "sheet.png", "query.png"):
        assert (result.folder / name).stat().st_size > 500


def test_pictures_that_have_no_score_are_told_of(finished, dataset, tmp_path):
    workdir, _, result = finished
    shutil.copytree(workdir, tmp_path / "copy")
    scores = result.scores.top(len(dataset) - 2)
    partial = dataclasses.replace(result, scores=scores, folder=tmp_path / "copy" / result.folder.relative_to(workdir))
    write_outputs(partial, dataset, QUERY, CONFIG, model_name="tiny", top_k=5)
    note = "2 of 37 training pictures could not be read and have no score."
    assert json.loads((partial.folder / "manifest.json").read_text())["notes"] == [note]
    assert note in (partial.folder / "report.html").read_text()


def test_second_query_reuses_what_does_not_depend_on_it(finished, pipeline, dataset, monkeypatch):
    workdir, _, first = finished
    again = Run(pipeline, dataset, StageRoot(workdir)).attribute(QUERY, CONFIG)
    np.testing.assert_array_equal(again.scores.score, first.scores.score)
    written = []
    write = ChunkStore.write
    monkeypatch.setattr(ChunkStore, "write", lambda self, *args: (written.append(self.path), write(self, *args)))
    other = Run(pipeline, dataset, StageRoot(workdir)).attribute(Query(prompt="hat", sampler_steps=3), CONFIG)
    assert {path.parent.parent.name for path in written} == {"attribution"}
    assert all(other.timings[stage][1] for stage in ("encode", "fisher", "base losses"))
    np.testing.assert_array_equal(other.scores.loss_before, first.scores.loss_before)
    assert not np.array_equal(other.scores.loss_after, first.scores.loss_after)


def test_a_region_gives_other_scores(finished):
    _, attributor, result = finished
    left = attributor.attribute(QUERY, dataclasses.replace(CONFIG, region=(0, 0, 8, 16)), "left").scores
    np.testing.assert_array_equal(left.loss_before, result.scores.loss_before)
    assert not np.array_equal(left.loss_after, result.scores.loss_after)


def test_models_of_one_architecture_share_a_program(pipeline):
    unet = pipeline.unet
    again = type(unet)(type(unet.config).from_dict(unet.config.to_dict()))
    programs = [LossProgram(predictor(model), pipeline.schedule, seed, 300) for model, seed in ((unet, 0), (again, 1))]
    assert programs[0]._run is programs[1]._run
    wider = type(unet)(dataclasses.replace(unet.config, norm_eps=1e-3))
    assert LossProgram(predictor(wider), pipeline.schedule, 0, 300)._run is not programs[0]._run


@pytest.mark.parametrize("devices", [1, 3, 4])
@pytest.mark.parametrize("batch_size", [1, 1000])
def test_losses_depend_on_neither_batch_order_subset_nor_devices(finished, pipeline, devices, batch_size):
    _, attributor, result = finished
    mesh = data_mesh(jax.devices()[:devices])
    program = LossProgram(predictor(pipeline.unet), pipeline.schedule, 0, 300, batch_size, mesh)
    params = program.place(pipeline.params["unet"])
    rows = np.random.default_rng(devices).permutation(len(attributor.data))[:23]
    losses = program(params, attributor.data, rows, 2, "first", lambda count: None)
    np.testing.assert_array_equal(losses, result.scores.loss_before[rows])


def test_a_subset_of_the_data_set_has_the_scores_of_the_whole(finished, pipeline, dataset, tmp_path):
    _, attributor, result = finished
    rows = [1, 2, 5, 8, 13, 21, 34]
    subset = ArrayDataset(
        np.stack([dataset[row].image for row in rows]),
        [dataset.captions(row) for row in rows],
        row_ids=dataset.row_ids[rows],
    )
    part = Run(pipeline, subset, StageRoot(tmp_path))
    # The Fisher information is the whole set's in both, and N the whole set's size.
    part.fisher = lambda *args: attributor.fisher(*args)
    config = method_config(query_draws=32, fisher_samples=96, stride=300, num_examples=len(dataset))
    scores = part.attribute(QUERY, config).scores
    np.testing.assert_array_equal(scores.score, result.scores.score[rows])


def test_interrupted_run_resumes_to_the_same_bits(finished, pipeline, dataset, tmp_path, monkeypatch):
    _, _, result = finished
    monkeypatch.setattr(losses_stage, "_ROWS_PER_CHUNK", 8)
    monkeypatch.setattr(losses_stage, "_TILES_PER_CHUNK", 0)
    interrupt_writes(monkeypatch, every=4)
    scores, interruptions = until_done(lambda: attribute(pipeline, dataset, QUERY, CONFIG, workdir=tmp_path))
    assert interruptions >= 2
    np.testing.assert_array_equal(scores.score, result.scores.score)


def test_fisher_resumes_to_the_same_bits_and_is_close_on_other_devices(finished, pipeline, tmp_path, monkeypatch):
    import attrib_jax.jobs.fisher as fisher_stage

    import attrib_jax.jobs.draws as draws_stage
    from attrib_jax.storage.state import StateStore

    _, attributor, _ = finished
    selected, rest = select_weights(pipeline.params["unet"], "cross-attn-kv")
    monkeypatch.setattr(draws_stage, "tiles_per_checkpoint", lambda mesh: 1)
    write, count = StateStore.write, 0

    def failing(self, tree, progress):
        nonlocal count
        count += 1
        write(self, tree, progress)
        if count == 1:
            raise KeyboardInterrupt

    def fit(path, devices):
        mesh = data_mesh(jax.devices()[:devices])
        predict = predictor(pipeline.unet)
        data = attributor.data
        return fisher_stage.fit_fisher(path, predict, pipeline.schedule, selected, rest, data, 90, 0, mesh)

    whole, others = fit(tmp_path / "whole", 2), fit(tmp_path / "others", 4)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), whole.tree, others.tree)
    monkeypatch.setattr(StateStore, "write", failing)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "resumed", 2)
    resumed = fit(tmp_path / "resumed", 2)
    jax.tree.map(np.testing.assert_array_equal, whole.tree, resumed.tree)


@pytest.mark.parametrize("devices", [1, 3, 4])
def test_gradients_on_all_devices_are_the_gradient_of_one(finished, pipeline, devices):
    _, _, result = finished
    selected, rest = select_weights(pipeline.params["unet"], "cross-attn-kv")
    predict, key = predictor(pipeline.unet), purpose_key(0, "query")
    program = GradientProgram(predict, pipeline.schedule, data_mesh(jax.devices()[:devices]))
    done = []
    # 40 draws fill no whole number of tiles: the rest of the last one must count zero.
    total = program.bind(rest, result.query.latents, result.query.text, 40)(selected, key, done.append)
    run = jax.jit(query_gradient, static_argnames=("predict", "draws"))
    query = result.query
    expected = run(predict, pipeline.schedule, selected, rest, query.latents, query.text, key, draws=40)
    assert done[-1] == 40
    np.testing.assert_allclose(total.loss / 40, expected.loss, rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(total.gradient), jax.tree.leaves(expected.gradient)):
        np.testing.assert_allclose(ours / 40, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())


def test_finished_scores_are_read_and_damaged_ones_computed_again(finished, pipeline, dataset, tmp_path, monkeypatch):
    workdir, _, first = finished
    shutil.copytree(workdir, tmp_path / "copy")
    attributor = Run(pipeline, dataset, StageRoot(tmp_path / "copy"))
    again = attribute_queries(attributor, [QUERY], CONFIG)[0]
    assert set(again.timings) == {"query", "scores"} and again.timings["scores"][1]
    assert again.query_loss == first.query_loss
    np.testing.assert_array_equal(again.scores.loss_after, first.scores.loss_after)
    file = again.folder / "scores.npz"
    file.write_bytes(file.read_bytes()[:-100])
    repaired = attribute_queries(attributor, [QUERY], CONFIG)[0]
    assert "losses after" in repaired.timings
    np.testing.assert_array_equal(repaired.scores.score, first.scores.score)
    np.load(file)


def test_a_ddpm_picture_depends_on_its_own_seed_alone(pipeline):
    settings = Query(prompt="", sampler="ddpm", sampler_steps=3, guidance_scale=2.0)
    predict = predictor(pipeline.unet)
    together = generate(pipeline, predict, ["hat", "flag"], [3, 4], settings)
    alone = generate(pipeline, predict, ["flag"], [4], settings)
    np.testing.assert_allclose(together[1], alone[0], rtol=1e-5, atol=1e-6)
    assert np.abs(together[0] - together[1]).max() > 0.1


def test_unlearning_moves_the_selected_weights_and_raises_the_query_loss_most(finished, pipeline, dataset, tmp_path):
    from attrib_jax.attribution.scores import dataset_losses as losses_in_memory
    from attrib_jax.core.keys import loss_key
    from attrib_jax.core.weights import flatten_names, merge_weights

    _, attributor, result = finished
    config = method_config(query_draws=256, fisher_samples=96, stride=300, step_size=1e-4)
    selected, rest = select_weights(pipeline.params["unet"], config.weights)
    moved, _ = attributor.unlearned(tmp_path, result.query, config)
    assert all(np.any(leaf != flatten_names(selected)[name]) for name, leaf in flatten_names(moved).items())

    def query_loss(params):
        latents, text = result.query.latents[None, None], result.query.text[None, None]
        timesteps = np.arange(0, 1000, 5, dtype=np.int32)
        arguments = (loss_key(9), np.array([0]), latents, text, timesteps)
        return losses_in_memory(predictor(pipeline.unet), pipeline.schedule, params, *arguments)[0, 0]

    program = attributor.loss_program(config)
    rows, before = np.arange(len(dataset)), attributor.base_losses(config)
    params = merge_weights(moved, rest)
    after = program(program.place(params), attributor.data, rows, 2, "first", lambda count: None)
    rise = query_loss(params) - query_loss(pipeline.params["unet"])
    assert rise > 0 and rise > (after - before).mean()


@pytest.mark.parametrize("with_shipped", [False, True])
def test_another_data_set_in_the_same_workdir_is_refused_and_spoils_nothing(
    finished, pipeline, dataset, tmp_path, with_shipped
):
    workdir, _, first = finished
    root = StageRoot(tmp_path, shipped=workdir) if with_shipped else StageRoot(workdir)
    Run(pipeline, dataset, root)
    with pytest.raises(StageMismatchError, match="dataset"):
        Run(pipeline, make_dataset(seed=1), root)
    again = Run(pipeline, dataset, root).attribute(QUERY, CONFIG)
    np.testing.assert_array_equal(again.scores.score, first.scores.score)


def test_a_failed_query_gives_its_name_back(finished, monkeypatch):
    _, attributor, _ = finished
    diverging = method_config(query_draws=32, fisher_samples=96, stride=300, step_size=1e38, steps=2)
    with pytest.raises(ValueError, match="step_size"):
        attribute_queries(attributor, [QUERY], diverging, "again")[0]
    assert attributor.attribute(QUERY, CONFIG, "again").name == "again"


def test_base_losses_of_another_kind_of_device_are_computed_anew(finished, pipeline, dataset, tmp_path):
    workdir, attributor, first = finished
    other = tmp_path / "other"
    shutil.copytree(workdir, other)
    (stage,) = (other / "losses").glob("stride300-first-flips2-seed0")
    store = ChunkStore(stage, {"loss": ((2,), np.float64)}, len(dataset), 512, name="losses")
    store.write(0, {"loss": store.read(0)["loss"] * (1 + 1e-4)})
    again = Run(pipeline, dataset, StageRoot(other)).base_losses(CONFIG)
    np.testing.assert_array_equal(again, first.scores.loss_before)


def test_a_whole_pass_of_another_kind_of_device_is_computed_anew_where_its_scores_are_lost(
    finished, pipeline, dataset, tmp_path
):
    """The losses that it would be subtracted from may since have been computed on this one."""
    workdir, _, first = finished
    attributor = Run(pipeline, dataset, StageRoot(tmp_path, shipped=workdir))
    attribute_queries(attributor, [QUERY], CONFIG, "one")[0]
    folder = tmp_path / "attribution" / "one"
    store = ChunkStore(folder, {"loss": ((2,), np.float64)}, len(dataset), 512, name="losses")
    store.write(0, {"loss": store.read(0)["loss"] * (1 + 1e-4)})
    (folder / "scores.npz").unlink()
    np.testing.assert_array_equal(
        attribute_queries(attributor, [QUERY], CONFIG, "one").scores.score, first.scores.score
    )[0]


def test_a_pass_that_another_kind_of_device_began_is_computed_anew(finished, pipeline, dataset, tmp_path, monkeypatch):
    workdir, _, first = finished
    monkeypatch.setattr(losses_stage, "_ROWS_PER_CHUNK", 16)
    monkeypatch.setattr(losses_stage, "_TILES_PER_CHUNK", 0)
    attributor = Run(pipeline, dataset, StageRoot(tmp_path, shipped=workdir))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_writes(patch, every=3)
        attribute_queries(attributor, [QUERY], CONFIG, "one")[0]
    store = ChunkStore(tmp_path / "attribution" / "one", {"loss": ((2,), np.float64)}, len(dataset), 16, name="losses")
    assert store.pending_chunks() == [2]
    for index in (0, 1):
        store.write(index, {"loss": store.read(index)["loss"] * (1 + 1e-4)})
    np.testing.assert_array_equal(
        attribute_queries(attributor, [QUERY], CONFIG, "one").scores.score, first.scores.score
    )[0]


def test_shipped_stages_are_used_when_they_match_and_computed_anew_when_not(finished, pipeline, dataset, tmp_path):
    workdir, _, first = finished
    result = Run(pipeline, dataset, StageRoot(tmp_path / "a", shipped=workdir)).attribute(
        Query(prompt="flag", sampler_steps=3), CONFIG
    )
    assert all(result.timings[stage][1] for stage in ("encode", "fisher", "base losses"))
    np.testing.assert_array_equal(result.scores.loss_before, first.scores.loss_before)
    other = Run(pipeline, make_dataset(seed=1), StageRoot(tmp_path / "b", shipped=workdir))
    assert not np.array_equal(other.base_losses(CONFIG), first.scores.loss_before)


@pytest.mark.parametrize(
    "change", [{"flips": "none"}, {"flips": "mean"}, {"captions": "all"}, {"update": "sgd"}, {"steps": 2}]
)
def test_variants_run_beside_each_other_in_one_workdir(finished, change):
    _, attributor, first = finished
    config = method_config(**{"query_draws": 32, "fisher_samples": 96, "stride": 300, **change})
    scores = attributor.attribute(QUERY, config).scores
    assert scores.loss_before.shape[1] == (1 if change.get("flips") == "none" else 2)
    assert not np.array_equal(scores.score, first.scores.score)
    if change.get("flips") == "none":
        np.testing.assert_array_equal(scores.loss_after[:, 0], first.scores.loss_after[:, 0])


def test_fisher_from_elsewhere_is_used_and_checked(finished, tmp_path):
    workdir, attributor, first = finished
    settings = {"query_draws": 32, "fisher_samples": 96, "stride": 300}
    folder = workdir / "fisher" / "cross-attn-kv-96-seed0"
    result = attribute_queries(attributor, [QUERY], method_config(fisher=str(folder), **settings))[0]
    np.testing.assert_array_equal(result.scores.score, first.scores.score)
    with pytest.raises(ValueError, match="does not fit the selected weights"):
        attribute_queries(attributor, [QUERY], method_config(fisher=str(folder), weights="attn", **settings))[0]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        attribute_queries(attributor, [QUERY], method_config(fisher="nowhere", **settings))[0]


def test_random_method_needs_no_model_run(finished):
    _, attributor, _ = finished
    config = method_config(method="random")
    result = attribute_queries(attributor, [QUERY], config)[0]
    assert "losses after" not in result.timings and len(np.unique(result.scores.score)) == len(result.scores)
    other = attribute_queries(attributor, [Query(prompt="hat", seed=3, sampler_steps=3)], config)[0]
    assert abs(np.corrcoef(result.scores.score, other.scores.score)[0, 1]) < 0.6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "unlern"}, "did you mean 'unlearn'"),
        ({"weights": "cross-attn-kw"}, "did you mean 'cross-attn-kv'"),
        ({"stride": -5}, "stride"),
        ({"step_size": float("nan")}, "step_size"),
        ({"update": "sgd", "damping": 1.0}, "sgd"),
        ({"flips": "both"}, "flips"),
    ],
)
def test_bad_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        method_config(**arguments)


def test_bad_values_cost_no_stored_result(finished):
    workdir, attributor, _ = finished
    before = sorted(path for path in workdir.rglob("*") if path.is_file())
    with pytest.raises(ValueError, match="stride is 2000"):
        attribute_queries(attributor, [QUERY], method_config(stride=2000))[0]
    with pytest.raises(FileNotFoundError, match="nothing.png"):
        attribute_queries(attributor, [Query(prompt="hat", image="nothing.png")], CONFIG)[0]
    assert sorted(path for path in workdir.rglob("*") if path.is_file()) == before


def test_nan_in_the_weights_is_named(pipeline, dataset, tmp_path):
    import dataclasses

    params = jax.tree.map(np.array, pipeline.params)
    params["unet"]["conv_in"]["kernel"][0, 0, 0, 0] = np.nan
    broken = dataclasses.replace(pipeline, params=params)
    with pytest.raises(ValueError, match="unet/conv_in/kernel"):
        Run(broken, dataset, StageRoot(tmp_path))


def test_query_names_tell_settings_apart():
    names = {
        query_name(QUERY, CONFIG.settings()),
        query_name(QUERY, method_config(step_size=0.02).settings()),
        query_name(Query(prompt="Red  heart!", seed=4), CONFIG.settings()),
    }
    assert len(names) == 3 and all(name.startswith("red-heart-seed") for name in names)
