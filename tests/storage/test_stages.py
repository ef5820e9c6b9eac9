"""Stage directories and the workdir's lock: reuse only of what was made in the same way."""

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from unittest import mock

import pytest

from attrib_jax.storage.files import StorageError
from attrib_jax.storage.stages import LockedError, StageMismatchError, load_stage, lock, open_stage

SETTINGS = {"samples": 2048, "seed": 7, "weights": "cross-attn-kv", "flips": (0, 1), "sampler": {"steps": 50}}
INPUTS = {"model": "ab12", "data": "cd34"}
_OTHERS = ("", "/etc", "../other", "a//b", "a/")  # Not names of a folder in the workdir.


def test_created_then_reused_until_finished(tmp_path):
    stage = open_stage(tmp_path, "fisher", SETTINGS, INPUTS)
    assert stage.path == tmp_path / "fisher"
    assert not stage.finished
    (stage.path / "sum.bin").write_bytes(b"data")
    again = open_stage(tmp_path, "fisher", {**SETTINGS, "flips": [0, 1]}, dict(reversed(INPUTS.items())))
    assert not again.finished
    again.finish()
    assert stage.finished
    reopened = open_stage(tmp_path, "fisher", SETTINGS, INPUTS)
    assert reopened.finished
    assert (reopened.path / "sum.bin").read_bytes() == b"data"
    assert reopened.settings == json.loads(json.dumps(SETTINGS))
    assert load_stage(tmp_path, "fisher") == reopened
    assert reopened.versions["numpy"]


def test_mismatch_names_both_sides_and_the_way_out(tmp_path):
    stage = open_stage(tmp_path, "fisher", SETTINGS, INPUTS)
    expected = {**SETTINGS, "samples": 4096, "sampler": {"steps": 25}, "damping": 0.5}
    del expected["seed"]
    record = (stage.path / "stage.json").read_bytes()
    with pytest.raises(StageMismatchError) as caught:
        open_stage(tmp_path, "fisher", expected, {**INPUTS, "model": "ef56"})
    assert str(stage.path) in str(caught.value)
    assert str(caught.value).splitlines()[1:-1] == [
        "  settings.damping: found absent, expected 0.5",
        "  settings.sampler.steps: found 50, expected 25",
        "  settings.samples: found 2048, expected 4096",
        "  settings.seed: found 7, expected absent",
        '  inputs.model: found "ab12", expected "ef56"',
    ]
    assert (stage.path / "stage.json").read_bytes() == record
    # Values that look alike differ.
    for stored, other in ((None, "null"), ({}, None), (1e-3, 1.0000001e-3), (1, "1")):
        name = f"losses-{stored}"
        open_stage(tmp_path, name, {"value": stored}, {})
        with pytest.raises(StageMismatchError, match=r"settings\.value"):
            open_stage(tmp_path, name, {"value": other}, {})


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        *((lambda path, x=x: open_stage(path, x, {}, {}), ValueError, f"name is {x!r}") for x in _OTHERS),
        (lambda path: open_stage(path, "fisher", {"value": object()}, {}), ValueError, "settings"),
        (lambda path: open_stage(path, "fisher", {"value": float("nan")}, {}), ValueError, "settings"),
        (lambda path: load_stage(path, "encode"), StorageError, "encode/stage.json: No such file"),
        (lambda path: lock("/dev/null/work").__enter__(), StorageError, "/dev/null/work: Not a directory"),
    ],
)
def test_refused(tmp_path, call, error, named):
    with pytest.raises(error, match=named):
        call(tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda record: json.dumps(record)[:100], "damaged"),
        (lambda record: "", "damaged"),
        (lambda record: "[]", "damaged"),
        (lambda record: "{}", "damaged"),
        (lambda record: json.dumps({**record, "finished": "no"}), "damaged .*finished"),
        (lambda record: json.dumps({"format": 99}), "format 99"),
        (lambda record: json.dumps({**record, "stage": "losses"}), "'losses', not 'fisher'"),
    ],
)
def test_a_record_that_is_not_the_stages_own_is_refused(tmp_path, change, named):
    file = open_stage(tmp_path, "fisher", SETTINGS, INPUTS).path / "stage.json"
    file.write_text(change(json.loads(file.read_text())))
    with pytest.raises(StorageError, match=f"fisher.*{named}"):
        open_stage(tmp_path, "fisher", SETTINGS, INPUTS)


def test_a_folder_of_unknown_origin_is_refused(tmp_path):
    (tmp_path / "fisher").mkdir()
    (tmp_path / "fisher" / ".partial-x-stage.json").write_bytes(b"{")
    open_stage(tmp_path, "fisher", {}, {})
    assert os.listdir(tmp_path / "fisher") == ["stage.json"]
    (tmp_path / "losses").mkdir()
    (tmp_path / "losses" / "precious").write_bytes(b"data")
    with pytest.raises(StorageError, match=r"holds files but no stage\.json"):
        open_stage(tmp_path, "losses", {}, {})
    assert os.listdir(tmp_path / "losses") == ["precious"]


def test_a_finished_stage_opens_in_a_read_only_folder(tmp_path):
    open_stage(tmp_path, "fisher", SETTINGS, INPUTS).finish()
    stage = open_stage(tmp_path, "losses", SETTINGS, INPUTS)
    with mock.patch.object(tempfile, "mkstemp", side_effect=OSError(errno.EROFS, "Read-only file system")):
        assert open_stage(tmp_path, "fisher", SETTINGS, INPUTS).finished
        for write in (stage.finish, lambda: open_stage(tmp_path, "encode", SETTINGS, INPUTS)):
            with pytest.raises(StorageError, match="stage.json: Read-only file system"):
                write()
    assert not stage.finished


def test_a_second_run_is_refused_until_the_first_is_gone(tmp_path):
    script = textwrap.dedent(
        f"""
        import time
        from attrib_jax.storage.stages import lock
        with lock({str(tmp_path)!r}):
            print("held", flush=True)
            time.sleep(60)
        """
    )
    holder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(LockedError, match=f"pid {holder.pid} "), lock(tmp_path):
            pytest.fail("two runs hold the lock")
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with lock(tmp_path), pytest.raises(LockedError, match=f"pid {os.getpid()} "), lock(tmp_path):
        pytest.fail("the lock was taken twice")
    with lock(tmp_path):
        pass
