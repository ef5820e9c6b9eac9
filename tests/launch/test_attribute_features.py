"""The attribute command with the similarity methods: what it writes, and flags that do not fit."""

import json

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from PIL import Image

from launch import attribute, common
from tests.tiny_dataset import make_dataset
from tests.towers import save_torch_tower


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    path = tmp_path_factory.mktemp("tower") / "tiny-clip"
    save_torch_tower("clip", path)
    return path


@pytest.fixture
def command(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "open_dataset", lambda name, *a, **k: make_dataset())
    picture = tmp_path / "query.png"
    Image.fromarray(make_dataset()[4].image).save(picture)

    def run(*arguments):
        with flagsaver.flagsaver():
            settings = [f"--model={model}", f"--workdir={tmp_path / 'work'}", f"--query={picture}", "--query_name=q"]
            flags.FLAGS(["attribute", *settings, "--prompt=a red heart", *arguments])
            code = common.execute(attribute.main)
        return code, capsys.readouterr()

    return run


def test_clip_and_pixel_find_the_picture_itself(command, tower, tmp_path):
    for arguments in (("--method=clip", f"--tower={tower}"), ("--method=pixel", "--query_name=p")):
        code, output = command("--top_k=3", *arguments)
        assert code == 0, output.err
        assert output.out.lstrip().startswith(f"1  row {make_dataset().row_ids[4]:5d}")
    folder = tmp_path / "work" / "attribution"
    page = (folder / "q" / "report.html").read_text()
    assert "tiny-clip" in page and "clip" in page
    manifest = json.loads((folder / "q" / "manifest.json").read_text())
    assert manifest["settings"]["features"].keys() == {"tower"} and "features" in manifest["timings_seconds"]
    assert "features" not in json.loads((folder / "p" / "manifest.json").read_text())["settings"]
    with np.load(folder / "q" / "scores.npz") as stored:
        assert stored["score"].max() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method=clip", "--dataset=folder:x"], "method 'clip' needs a tower: give --tower"),
        (["--method=dinov2"], "facebook/dinov2-with-registers-large"),
        (["--method=pixel", "--tower=x"], "--tower given, which method 'pixel' does not use"),
        (["--method=clip", "--tower=x", "--feature_head=y"], "--feature_head given, which method 'clip' does not use"),
        (["--method=clip-abc", "--tower=x"], "give --feature_head"),
        (["--method=clip", "--tower=nowhere"], "'nowhere' does not exist"),
        (["--method=pixel", "--region=0,0,8,8"], "region is (0, 0, 8, 8), but method='pixel' has no use for it"),
        (["--method=clap"], "unknown method 'clap': did you mean 'clip'?"),
    ],
)
def test_flags_that_do_not_fit_are_one_clear_line(command, tmp_path, arguments, message):
    code, output = command(*arguments)
    assert code == 1 and output.err.startswith("error:") and message in output.err
    assert not (tmp_path / "work" / "attribution").exists()
