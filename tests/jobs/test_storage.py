"""What a disk can do to a run: damage in every stage, and no room or no right to write."""

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from attrib_jax.attribute import attribute_queries
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.encode import encode
from attrib_jax.jobs.query import Query
from attrib_jax.methods.unlearn import UnlearnConfig
from attrib_jax.storage.files import StorageError, read_arrays
from attrib_jax.storage.stage_root import StageRoot
from tests.failures import UnreadableImages

QUERY = Query(prompt="red heart", seed=3, sampler_steps=2)
CONFIG = UnlearnConfig(query_draws=32, fisher_samples=96, stride=300, step_size=0.01)
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


def attributed(pipeline, dataset, workdir):
    return attribute_queries(Run(pipeline, dataset, StageRoot(workdir)), [QUERY], CONFIG)


@pytest.fixture(scope="module")
def finished(pipeline, dataset, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished")
    attributed(pipeline, dataset, workdir)
    return workdir


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


def spoil(file: Path, damage: str) -> None:
    content = bytearray(file.read_bytes())
    # A value: much of a zip file's headers means nothing.
    largest = max(contents(file).values(), key=lambda array: array.nbytes).tobytes()
    place = content.index(largest) + len(largest) // 2
    content[place] ^= 4
    file.write_bytes(content if damage == "flip" else content[:place])


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_damage_in_every_stage_is_detected_and_computed_again(finished, pipeline, dataset, tmp_path, caplog, damage):
    workdir = shutil.copytree(finished, tmp_path / "work")
    damaged = [next(workdir.glob(pattern)) for pattern in STORED]
    for file in damaged:
        spoil(file, damage)
    attributed(pipeline, dataset, workdir)
    assert [file for file in damaged if str(file) not in caplog.text] == []
    assert_same_results(workdir, finished)


def test_a_disk_that_refuses_a_write_loses_nothing(finished, pipeline, dataset, tmp_path, monkeypatch):
    """One failure in each stage, in the order of a run; every time there is room again, the same run goes on."""
    replace, pending = os.replace, []

    def full(temporary, path):
        if pending and Path(path).match(pending[0]):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(temporary, path)

    monkeypatch.setattr(os, "replace", full)
    written = {}
    for pattern in STORED:
        pending[:] = [pattern]
        with pytest.raises(StorageError, match=rf"cannot write .*{Path(pattern).name}.*{os.strerror(errno.ENOSPC)}"):
            attributed(pipeline, dataset, tmp_path)
        files = [path for path in tmp_path.rglob("*.safetensors") if not path.name.startswith("state-")]
        kept = {path: path.stat().st_mtime_ns for path in files}
        assert written.items() <= kept.items(), "something stored was computed again"
        assert not list(tmp_path.rglob(".partial-*"))
        written = kept
    pending.clear()
    attributed(pipeline, dataset, tmp_path)
    assert_same_results(tmp_path, finished)


def test_a_reader_that_fails_is_reported_and_the_run_goes_on_later(finished, pipeline, dataset, tmp_path):
    broken = UnreadableImages(dataset, {36}, lambda row: OSError(errno.EIO, os.strerror(errno.EIO)))
    root, inputs = StageRoot(tmp_path), {"dataset": dataset.fingerprint()}
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        encode(root, pipeline, inputs, broken)
    data = encode(root, pipeline, inputs, dataset)
    expected = read_arrays(finished / STORED[0])[0]["latents"]
    np.testing.assert_array_equal(np.asarray(data.latents), expected)
