"""Stages that come with a model: copied whole or not at all, from a folder that may be read-only."""

import errno
import os
import shutil
from unittest import mock

import pytest

from attrib_jax.storage.files import StorageError
from attrib_jax.storage.stage_root import StageRoot
from attrib_jax.storage.stages import lock


@pytest.fixture
def shipped(tmp_path):
    with StageRoot(tmp_path / "shipped").stage("losses/a", {"strides": [1, 2]}, {"model": "m"}) as stage:
        (stage.path / "parts").mkdir()
        for name in ("one", "parts/two"):
            (stage.path / name).write_text(name)
    return tmp_path / "shipped"


def open_stage(root, settings=None):
    with root.stage("losses/a", settings or {"strides": [1, 2]}, {"model": "m"}) as stage:
        return stage


def test_a_copy_can_be_written_where_what_came_with_the_model_cannot(shipped, tmp_path):
    places = [shipped, *shipped.rglob("*")]
    for place in places:
        os.chmod(place, 0o555 if place.is_dir() else 0o444)
    try:
        stage = open_stage(StageRoot(tmp_path / "work", shipped))
        assert stage.finished and (stage.path / "parts" / "two").read_text() == "parts/two"
        for place in (stage.path, *stage.path.rglob("*")):
            assert place.stat().st_mode & 0o200
    finally:
        for place in places:
            os.chmod(place, 0o755)


def test_a_full_disk_is_told_and_keeps_no_half_copy(shipped, tmp_path):
    copy = shutil.copyfile

    def failing(source, target, **options):
        if os.path.basename(target) == "two":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return copy(source, target, **options)

    root = StageRoot(tmp_path / "work", shipped)
    with mock.patch.object(shutil, "copyfile", failing):
        with pytest.raises(StorageError, match="losses/a: No space left on device"):
            open_stage(root)
    assert list((tmp_path / "work" / "losses").iterdir()) == []
    assert open_stage(root).finished


def test_settings_fit_as_json_has_them(shipped, tmp_path):
    assert StageRoot(tmp_path / "a", shipped).is_finished("losses/a", {"strides": (1, 2)}, {"model": "m"})
    assert not StageRoot(tmp_path / "b", shipped).is_finished("losses/a", {"strides": (1, 3)}, {"model": "m"})


def test_what_a_killed_writer_left_in_a_finished_stage_is_removed(shipped):
    leftover = shipped / "losses" / "a" / ".partial-x"
    leftover.write_text("half")
    open_stage(StageRoot(shipped))
    assert not leftover.exists()


def test_a_workdir_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    root = StageRoot("~/run")
    with lock("~/run"):
        open_stage(root)
    assert (tmp_path / "run" / "losses" / "a" / "stage.json").is_file() and not (tmp_path / "~").exists()
