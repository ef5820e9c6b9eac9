"""What a disk can do to a run: damage in every stage, no room or no right to write, and inputs that are others."""

import dataclasses
import errno
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import attrib_jax.jobs.draws
import attrib_jax.jobs.encode_to_store
import attrib_jax.methods.unlearn
from attrib_jax.attribute import attribute_queries
from attrib_jax.data.sources import ArrayDataset
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.draws import samples_per_tile
from attrib_jax.jobs.encode import encode
from attrib_jax.jobs.query import Query
from attrib_jax.methods import method_config
from attrib_jax.parallel.mesh import data_mesh
from attrib_jax.storage import files
from attrib_jax.storage.checkpoints import TrainingCheckpoints
from attrib_jax.storage.chunks import ChunkStore
from attrib_jax.storage.files import StorageError, read_arrays
from attrib_jax.storage.stage_root import StageRoot
from attrib_jax.storage.state import StateStore
from attrib_jax.training.loop import FitConfig, fit
from launch import common
from tests.failures import UnreadableImages
from tests.tiny_dataset import make_dataset

QUERY = Query(prompt="red heart", seed=3, sampler_steps=2)
CONFIG = method_config(query_draws=64, fisher_samples=200, stride=300, steps=4, keep_ewc_gradient=True, step_size=0.003)
# A file of each kind that a run stores, in the order in which it writes them.
STORED = (
    "latents/latents/chunk-000000.safetensors",
    "text/text/chunk-000000.safetensors",
    "fisher/*/fisher.safetensors",
    "attribution/*/unlearned.safetensors",
    "losses/*/losses/chunk-000000.safetensors",
    "attribution/*/losses/chunk-000000.safetensors",
    "attribution/*/scores.npz",
)


def store_after_64_samples(patch):
    patch.setattr(attrib_jax.jobs.draws, "_SAMPLES_PER_CPU", 8)
    mesh = data_mesh()
    tiles = 64 // (samples_per_tile(mesh) * mesh.size)
    patch.setattr(attrib_jax.jobs.draws, "tiles_per_checkpoint", lambda mesh: tiles)


@pytest.fixture(autouse=True)
def _state_after_64_samples_and_every_step(monkeypatch):
    store_after_64_samples(monkeypatch)
    monkeypatch.setattr(attrib_jax.methods.unlearn, "_SECONDS_BETWEEN_STATES", 0.0)
    monkeypatch.setattr(attrib_jax.methods.unlearn, "_STORING_SHARE", np.inf)


@pytest.fixture(scope="module")
def finished(pipeline, dataset, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        store_after_64_samples(patch)
        run(pipeline, dataset, workdir)
    return workdir


def run(pipeline, dataset, workdir, config=CONFIG, **arguments):
    return Run(pipeline, dataset, StageRoot(workdir)).attribute(QUERY, config, **arguments)


def contents(file: Path) -> dict[str, np.ndarray]:
    return dict(np.load(file)) if file.suffix == ".npz" else read_arrays(file)[0]


def assert_same_results(workdir: Path, expected: Path) -> None:
    """Every stored array has the bits that it has in `expected`, and nothing is left of a run that was stopped."""
    for pattern in STORED:
        (file,), (other,) = workdir.glob(pattern), expected.glob(pattern)
        found, wanted = contents(file), contents(other)
        assert found.keys() == wanted.keys()
        for name, array in wanted.items():
            assert found[name].tobytes() == array.tobytes(), (file, name)
    names = [{path.relative_to(root) for path in root.rglob("*")} for root in (workdir, expected)]
    assert names[0] == names[1]


def spoil(file: Path, damage: str, place: int | None = None) -> None:
    content = bytearray(file.read_bytes())
    if place is None:
        # A value: much of a zip file's headers means nothing.
        largest = max(contents(file).values(), key=lambda array: array.nbytes).tobytes()
        place = content.index(largest) + len(largest) // 2
    content[place] ^= 4
    file.write_bytes(content if damage == "flip" else content[:place])


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_damage_in_every_stage_is_detected_and_computed_again(finished, pipeline, dataset, tmp_path, caplog):
    workdir = tmp_path / "work"
    shutil.copytree(finished, workdir)
    attributor = Run(pipeline, dataset, StageRoot(workdir))
    damaged = [next(workdir.glob(pattern)) for pattern in STORED]
    for damage in ("flip", "truncate"):
        for file in damaged:
            spoil(file, damage)
        caplog.clear()
        attributor.prepare()
        attribute_queries(attributor, [QUERY], CONFIG)[0]
        assert [file for file in damaged if str(file) not in caplog.text] == []
        assert_same_results(workdir, finished)


def test_damaged_states_of_interrupted_sums_cost_one_step(finished, pipeline, dataset, tmp_path, monkeypatch, caplog):
    write, done = StateStore.write, []

    def stopped(self, tree, progress):
        write(self, tree, progress)
        done.append(progress)
        if len(done) in (2, 7):
            raise KeyboardInterrupt

    monkeypatch.setattr(StateStore, "write", stopped)
    for pattern in ("fisher/*/partial", "attribution/*/unlearning"):
        with pytest.raises(KeyboardInterrupt):
            run(pipeline, dataset, tmp_path)
        (folder,) = tmp_path.glob(pattern)
        # The second of two.
        spoil(folder / "state-1.safetensors", "flip")
    run(pipeline, dataset, tmp_path)
    assert caplog.text.count("going on from the state before it") >= 2
    # Fisher samples, and four unlearning steps, the last of which needs no state.
    assert done == [64, 128, 128, 192, 200, 1, 2, 2, 3]
    assert_same_results(tmp_path, finished)


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_a_damaged_checkpoint_of_training_is_computed_again(tmp_path, monkeypatch, damage):
    config = FitConfig(steps=12, batch_size=8, learning_rate=0.1, warmup_steps=2, checkpoint_every=4, log_every=1)
    source = np.random.default_rng(0).normal(size=(20, 3000)).astype(np.float32)

    def loss(params, batch, key):
        return jax.numpy.mean(jax.numpy.square(batch + jax.random.normal(key, batch.shape) - params["centre"])), {}

    def train(path):
        path.mkdir(exist_ok=True)
        return fit(path, loss, {"centre": np.full((3000,), 5.0, np.float32)}, source, config, "test")

    saved = []
    save = TrainingCheckpoints.save
    monkeypatch.setattr(TrainingCheckpoints, "save", lambda self, step, *a: (saved.append(step), save(self, step, *a)))
    whole = train(tmp_path)
    largest = max((path.stat().st_size, path) for path in (tmp_path / "12").rglob("*") if path.is_file())
    spoil(largest[1], damage, largest[0] // 2)
    # What a power loss makes of the end of a log.
    with open(tmp_path / "metrics.jsonl", "ab") as log:
        log.write(bytes(20) + b"\n")
    again = train(tmp_path)
    assert saved == [4, 8, 12, 12]
    np.testing.assert_array_equal(again["centre"], whole["centre"])
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 12


def test_a_disk_that_refuses_a_write_stops_the_run_with_a_message_and_loses_nothing(
    finished, pipeline, dataset, tmp_path, monkeypatch, capsys
):
    """One failure in each stage, in the order of a run; every time there is room again, the same command goes on."""
    replace, pending, written = os.replace, [], []
    failures = [
        ("latents/latents/chunk-000000.safetensors", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
        ("text/stage.json", OSError(errno.EROFS, os.strerror(errno.EROFS))),
        ("partial/state-1.safetensors", OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))),
        ("unlearning/state-0.safetensors", KeyboardInterrupt()),
        ("losses/chunk-000000.safetensors", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
        ("attribution/*/stage.json", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
    ]

    def full(temporary, path):
        # The record of a stage is written twice: to open it, and to finish it.
        opens = Path(path).name == "stage.json" and not Path(path).exists()
        if pending and Path(path).match(pending[0][0]) and not opens:
            raise pending.pop(0)[1]
        replace(temporary, path)
        written.append(path)

    monkeypatch.setattr(files.os, "replace", full)
    attributor = Run(pipeline, dataset, StageRoot(tmp_path))

    def command() -> None:
        attribute_queries(attributor, [QUERY], CONFIG)[0]

    for pattern, error in failures:
        pending.append((pattern, error))
        before = snapshot(tmp_path)
        interrupted = isinstance(error, KeyboardInterrupt)
        assert common.execute(command) == (130 if interrupted else 1)
        assert not pending
        message = capsys.readouterr().err
        if not interrupted:
            assert "error: cannot write " in message and f": {error.strerror}. What was stored before" in message
        after = snapshot(tmp_path)
        changed = {name for name in before if after.get(name) != before[name]}
        # Records of stages that have finished meanwhile, and states; those of a finished sum have gone.
        replaceable = {"stage.json", "rows.safetensors", "state-0.safetensors", "state-1.safetensors"}
        assert {Path(name).name for name in changed} <= replaceable
        assert not list(tmp_path.rglob(".partial-*"))
    assert common.execute(command) == 0
    # All but the scores, which are the difference of stored losses.
    results = [path for path in written if any(path.match(pattern) for pattern in STORED[:-1])]
    assert len(results) == len(set(results)) == len(STORED) - 1, "something stored was computed again"
    assert_same_results(tmp_path, finished)


def test_a_reader_that_fails_keeps_the_chunks_before_it(pipeline, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(attrib_jax.jobs.encode_to_store, "_MAX_ROWS_PER_CHUNK", 16)
    root, inputs = StageRoot(tmp_path), {"dataset": dataset.fingerprint()}

    def bad_sector(row):
        return OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.raises(OSError, match="Input/output error"):
        encode(root, pipeline, inputs, UnreadableImages(dataset, {36}, bad_sector))
    kept = snapshot(tmp_path / "latents" / "latents")
    assert len(kept) > 1
    written, write = [], ChunkStore.write
    monkeypatch.setattr(
        ChunkStore, "write", lambda self, index, arrays: (written.append(index), write(self, index, arrays))
    )
    encode(root, pipeline, inputs, dataset)
    # The layout is no chunk.
    assert written[0] == len(kept) - 1
    assert kept.items() <= snapshot(tmp_path / "latents" / "latents").items()


def with_weight_moved(pipeline):
    params = jax.tree.map(np.array, pipeline.params)
    params["unet"]["conv_in"]["bias"][0] += 1e-3
    return dataclasses.replace(pipeline, params=params)


def with_other_captions(dataset):
    pictures = np.stack([dataset[row].image for row in range(len(dataset))])
    captions = [dataset.captions(row) for row in range(len(dataset))]
    return ArrayDataset(pictures, [*captions[:-1], ("another caption",)], row_ids=dataset.row_ids)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (lambda pipeline, dataset: (with_weight_moved(pipeline), dataset), "inputs.model: found "),
        (lambda pipeline, dataset: (pipeline, make_dataset(seed=1)), "inputs.dataset: found "),
        (lambda pipeline, dataset: (pipeline, with_other_captions(dataset)), "inputs.dataset: found "),
    ],
    ids=["model", "data", "captions"],
)
def test_stages_of_other_inputs_are_refused_and_kept(finished, pipeline, dataset, capsys, change, difference):
    before = snapshot(finished)
    pipeline, dataset = change(pipeline, dataset)
    assert common.execute(lambda: run(pipeline, dataset, finished)) == 1
    message = capsys.readouterr().err
    assert f"{finished}" in message and difference in message and ", expected " in message
    assert snapshot(finished) == before


def test_a_query_of_another_seed_is_refused_under_the_same_name(finished, pipeline, dataset, tmp_path, capsys):
    random = dataclasses.replace(CONFIG, method="random", keep_ewc_gradient=False)
    shutil.copytree(finished, tmp_path / "work")
    run(pipeline, dataset, tmp_path / "work", random, name="heart")
    before = snapshot(tmp_path)
    other = dataclasses.replace(random, loss_seed=1)
    assert common.execute(lambda: run(pipeline, dataset, tmp_path / "work", other, name="heart")) == 1
    assert "settings.loss_seed: found 0, expected 1" in capsys.readouterr().err
    assert snapshot(tmp_path) == before


def test_settings_that_diverge_leave_no_states_behind(finished, pipeline, dataset, tmp_path):
    shutil.copytree(finished, tmp_path / "work")
    diverging = dataclasses.replace(CONFIG, step_size=1e8, steps=40)
    with pytest.raises(ValueError, match="is not finite|holds NaN or infinity"):
        run(pipeline, dataset, tmp_path / "work", diverging, name="diverging")
    assert not (tmp_path / "work" / "attribution" / "diverging").exists()


def test_a_state_of_another_query_is_never_taken_up(finished, pipeline, dataset, tmp_path):
    shutil.copytree(finished, tmp_path / "work")
    (folder,) = (tmp_path / "work" / "attribution").iterdir()
    for name in ("scores.npz", "unlearned.safetensors"):
        (folder / name).unlink()
    StateStore(folder, "unlearning").write({"selected": np.zeros(3, np.float32)}, 1)
    with pytest.raises(StorageError, match=r"is the state of another sum:\n.*expected"):
        run(pipeline, dataset, tmp_path / "work")
