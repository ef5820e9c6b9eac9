"""Folders that take the place of others."""

import errno
import os

import pytest

from attrib_jax.core.durable import new_folder


def test_a_new_folder_takes_the_place_of_an_old_one_or_leaves_it(tmp_path, monkeypatch):
    path = tmp_path / "model"
    for content in ("first", "second"):
        with new_folder(path) as fresh:
            fresh.mkdir()
            (fresh / "a").write_text(content)
        assert (path / "a").read_text() == content
    rename = os.rename

    def refuse(source, target):
        if os.path.basename(source) == "new":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OSError, match="No space left"), new_folder(path) as fresh:
        fresh.mkdir()
    with pytest.raises(ValueError), new_folder(path) as fresh:
        fresh.mkdir()
        raise ValueError
    assert (path / "a").read_text() == "second" and [entry.name for entry in tmp_path.iterdir()] == ["model"]
