"""`launch.encode`: the stage that it leaves is the one that other commands reuse, and images that cannot be read."""

import shutil

from tests.launch.calls import call_elsewhere


def test_images_are_encoded_once_and_unreadable_ones_are_counted(model, images, tmp_path):
    data, work = tmp_path / "data", tmp_path / "work"
    shutil.copytree(images, data)
    (data / "02.png").write_bytes((data / "02.png").read_bytes()[:60])
    line = [f"--model={model}", f"--dataset=folder:{data}", f"--workdir={work}"]
    first, again, wrong = call_elsewhere("launch.encode", line, line, [*line, "--store_dtype=float17"])
    assert first.code == 0, first.err
    assert first.out == again.out and "36 images" in first.out and "1 images skipped" in first.out
    assert "encode" in first.err and "encode" not in again.err
    assert wrong.code == 1 and wrong.out == "" and "float17" in wrong.err
