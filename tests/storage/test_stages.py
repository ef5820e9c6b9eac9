"""Stage directories and the workdir's lock: reuse only of what was made in the same way."""

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap

import pytest

from attrib_jax.storage.files import StorageError
from attrib_jax.storage.stages import LockedError, StageMismatchError, load_stage, lock, open_stage

SETTINGS = {"samples": 2048, "seed": 7, "weights": "cross-attn-kv", "flips": (0, 1), "sampler": {"steps": 50}}
INPUTS = {"model": "ab12", "data": "cd34"}


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


def test_nested_name(tmp_path):
    assert open_stage(tmp_path, "attribution/cat", {}, {}).path == tmp_path / "attribution" / "cat"
    for name in ("", "/etc", "../other", "a//b", "a/"):
        with pytest.raises(ValueError, match="stage name is"):
            open_stage(tmp_path, name, {}, {})


def test_mismatch_names_both_sides_and_the_way_out(tmp_path):
    stage = open_stage(tmp_path, "fisher", SETTINGS, INPUTS)
    asked = {**SETTINGS, "samples": 4096, "sampler": {"steps": 25}, "damping": 0.5}
    del asked["seed"]
    record = (stage.path / "stage.json").read_bytes()
    with pytest.raises(StageMismatchError) as caught:
        open_stage(tmp_path, "fisher", asked, {**INPUTS, "model": "ef56"})
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"stage 'fisher' in {stage.path} ")
    assert lines[1:-1] == [
        "  settings.damping: found absent, expected 0.5",
        "  settings.sampler.steps: found 50, expected 25",
        "  settings.samples: found 2048, expected 4096",
        "  settings.seed: found 7, expected absent",
        '  inputs.model: found "ab12", expected "ef56"',
    ]
    assert lines[-1] == f"Give another --workdir, or delete {stage.path} to compute it anew."
    assert (stage.path / "stage.json").read_bytes() == record


@pytest.mark.parametrize(("stored", "asked"), [(None, "null"), ({}, None), (1e-3, 1.0000001e-3), (1, "1")])
def test_values_that_look_alike_differ(tmp_path, stored, asked):
    open_stage(tmp_path, "losses", {"value": stored}, {})
    with pytest.raises(StageMismatchError, match=r"settings\.value: found .*, expected "):
        open_stage(tmp_path, "losses", {"value": asked}, {})


def test_settings_must_be_json(tmp_path):
    for value in (object(), float("nan")):
        with pytest.raises(ValueError, match="settings cannot be stored as JSON"):
            open_stage(tmp_path, "fisher", {"value": value}, {})
    assert os.listdir(tmp_path) == []


def test_damaged_record(tmp_path):
    stage = open_stage(tmp_path, "fisher", SETTINGS, INPUTS)
    file = stage.path / "stage.json"
    content = file.read_text()
    whole = json.loads(content)
    for bad in (content[: len(content) // 2], "", "[]", json.dumps({**whole, "finished": "no"}), "{}"):
        file.write_text(bad)
        with pytest.raises(StorageError, match=r"stage\.json is damaged or half-written .*Delete"):
            open_stage(tmp_path, "fisher", SETTINGS, INPUTS)
    file.write_text(json.dumps({"format": 99}))
    with pytest.raises(StorageError, match="format 99, this version reads up to 1"):
        open_stage(tmp_path, "fisher", SETTINGS, INPUTS)
    file.write_text(content)
    (tmp_path / "losses").mkdir()
    file.rename(tmp_path / "losses" / "stage.json")
    with pytest.raises(StorageError, match="belongs to stage 'fisher', not 'losses'"):
        open_stage(tmp_path, "losses", SETTINGS, INPUTS)
    with pytest.raises(StorageError, match="cannot read .*stage.json: No such file"):
        load_stage(tmp_path, "encode")


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


def test_a_finished_stage_opens_in_a_read_only_folder(tmp_path, monkeypatch):
    open_stage(tmp_path, "fisher", SETTINGS, INPUTS).finish()
    stage = open_stage(tmp_path, "losses", SETTINGS, INPUTS)

    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    assert open_stage(tmp_path, "fisher", SETTINGS, INPUTS).finished
    with pytest.raises(StorageError, match="cannot write .*: Read-only file system"):
        stage.finish()
    with pytest.raises(StorageError, match="cannot write .*: Read-only file system"):
        open_stage(tmp_path, "encode", SETTINGS, INPUTS)
    monkeypatch.undo()
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
        message = rf"in use by another run \(pid {holder.pid} on .*, started 2.*--workdir"
        with pytest.raises(LockedError, match=message), lock(tmp_path):
            pytest.fail("two runs hold the lock")
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with lock(tmp_path), pytest.raises(LockedError, match=f"pid {os.getpid()} "), lock(tmp_path):
        pytest.fail("the lock was taken twice")
    with lock(tmp_path):
        pass


def test_lock_on_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    refused = pytest.raises(StorageError, match="cannot create the folder .*: Not a directory")
    with refused, lock(tmp_path / "file" / "work"):
        pytest.fail("locked a folder that is not there")
