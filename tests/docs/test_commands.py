"""What README and the tutorials tell people to run works: their text, on a tiny model and with smaller settings."""

import json
import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from PIL import Image

from launch import attribute
from tests.docs.markdown import ROOT, blocks, python_of
from tests.tiny_pipeline import make_torch_pipeline

FEW = 12
# Flags put after those of the text, which win, and flags of the text to leave out (None).
SMALL = {
    "sampler_steps": 2,
    "query_draws": 16,
    "fisher_samples": 16,
    "stride": 500,
    "flips": "none",
    "dataset": "folder:few",
}


@pytest.fixture(scope="module")
def top_folder(tmp_path_factory):
    """A folder like the repository's top in which commands may write, with few images and a tiny model in `models`."""
    folder = tmp_path_factory.mktemp("top")
    for name in ("attrib_jax", "configs", "launch"):
        (folder / name).symlink_to(ROOT / name)
    make_torch_pipeline(str(folder / "models" / "openmoji"), unet_channels=(32,))
    (folder / "few").mkdir()
    rng = np.random.default_rng(0)
    for number in range(FEW):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / "few" / f"{number}.png")
        (folder / "few" / f"{number}.txt").write_text(f"red heart {number}")
    Image.new("RGB", (80, 60), "red").save(folder / "my_image.png")
    (folder / "queries.jsonl").write_text('{"prompt": "red apple", "seed": 1}\n{"prompt": "woman astronaut"}\n')
    return folder


def commands(script):
    """(module, arguments) of every `python -m` in a block of commands."""
    lines = script.replace("\\\n", " ").splitlines()
    split = [
        shlex.split(line.partition("python -m ")[2], comments=True) for line in lines if "python -m launch" in line
    ]
    return [(module, arguments) for module, *arguments in split]


def smaller(arguments, changes):
    kept = [argument for argument in arguments if argument.partition("=")[0].lstrip("-") not in changes]
    return kept + [f"--{name}={value}" for name, value in changes.items() if value is not None]


def run(module, arguments, folder):
    line = [sys.executable, "-m", module, *arguments]
    environment = {**os.environ, "ATTRIB_JAX_TRACEBACK": "1"}
    result = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{shlex.join(line)}\n{result.stdout}\n{result.stderr[-3000:]}"
    return result.stdout


def run_python(source, name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    namespace = {"__name__": "page"}
    exec(compile(source, name, "exec"), namespace)
    return namespace


def test_readme_is_short_and_names_the_command_of_ci():
    assert len((ROOT / "README.md").read_text().split()) <= 900
    _, tests, *_ = (content for _, content in blocks("README.md", "bash"))
    suite = tests.rpartition("&& ")[2].strip()
    assert suite.startswith("pytest") and suite in (ROOT / ".ci" / "run").read_text().splitlines()


def test_readme_attributes(top_folder, monkeypatch, capsys):
    """In this process, where programs are compiled once for all queries."""
    monkeypatch.chdir(top_folder)
    start, _, recipes = (content for _, content in blocks("README.md", "bash"))
    lines = [arguments for module, arguments in commands(start + recipes) if module == "launch.attribute"]
    assert len(lines) == 6
    for arguments in lines:
        changes = {**SMALL, "model": "models/openmoji", "workdir": "runs/few"}
        if any(argument.startswith("--region") for argument in arguments):
            changes["region"] = "0,0,8,16"
        with flagsaver.flagsaver():
            # As many devices as the tests have: the number is fixed once a device is used.
            flags.FLAGS(["attribute", "--cpu_devices=4", *smaller(arguments, changes)])
            attribute.main(["attribute"])
    reports = re.findall(r"report: (\S+)", capsys.readouterr().out)
    assert len(set(reports)) == 7
    promised = {"report.html", "scores.npz", "top.csv", "query.png", "sheet.png", "manifest.json"}
    assert promised <= {path.name for path in (top_folder / reports[0]).parent.iterdir()}


def test_readme_trains_with_flags_that_exist():
    _, _, recipes = (content for _, content in blocks("README.md", "bash"))
    (arguments,) = [arguments for module, arguments in commands(recipes) if module == "launch.train"]
    script = "import sys, launch.train; from absl import flags; flags.FLAGS(sys.argv)"
    subprocess.run([sys.executable, "-c", script, *arguments], cwd=ROOT, check=True)


def test_readme_python(top_folder, monkeypatch, capsys):
    # The text scores all of OpenMoji with the default settings, which takes a minute.
    changes = {
        '"openmoji")': '"folder:few", resolution=16)',
        ', shipped="models/openmoji/stages")': ", config=config)",
        "scores = aj": "config = aj.UnlearnConfig(query_draws=16, fisher_samples=16, stride=500)\nscores = aj",
    }
    source = python_of("README.md")
    for text, smaller_text in changes.items():
        assert text in source
        source = source.replace(text, smaller_text)
    run_python(source, "README.md", top_folder, monkeypatch)
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_tutorial_from_folder_to_report(top_folder, monkeypatch):
    page = "docs/tutorials/from_folder_to_report.md"
    changes = {
        "launch.train": {"train_steps": 2, "initializer_token": "hat"},
        "launch.sample": {"sampler_steps": 2},
        "launch.attribute": {**SMALL, "fisher": None},
        "launch.convert": {},
    }
    seen = []
    for language, content in blocks(page, "bash", "python"):
        if language == "python":
            namespace = run_python(content, page, top_folder, monkeypatch)
            continue
        for module, arguments in commands(content):
            smaller_ones = changes[module]
            if "--method=pixel" in arguments:  # which has fewer settings, and refuses those of others
                smaller_ones = {name: SMALL[name] for name in ("sampler_steps", "flips", "dataset")}
            run(module, smaller(arguments, smaller_ones), top_folder)
            seen.append(module)
    assert seen == ["launch.train", "launch.sample", "launch.attribute", "launch.convert", "launch.attribute"]
    assert len(namespace["ranking"]) == 4 + FEW and len(namespace["ranks"]) == 4
    manifest = top_folder / "runs/tutorial/attribute/attribution/vessel/manifest.json"
    assert json.loads(manifest.read_text())["unlearning"]["step_size"][0] > 0
    assert len((top_folder / "runs/tutorial/scores.csv").read_text().splitlines()) > 4 + FEW


def test_tutorial_in_own_jax_code(tmp_path, monkeypatch):
    page = "docs/tutorials/own_jax_code.md"
    namespace = run_python(python_of(page), page, tmp_path, monkeypatch)
    assert (namespace["labels"][namespace["top"]] == 3).mean() > 0.8
    assert (namespace["labels"][namespace["best"]] == namespace["held_out"][1]).mean() > 0.8
    assert namespace["agreement"] > 0.95
