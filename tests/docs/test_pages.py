"""The pages that programs write are up to date, and what pages refer to is there."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "models/*/README.md", "configs/*.cfg")
    for path in ROOT.glob(pattern)
)
# Folders that are made by running commands, or named for the user to replace.
MADE = ("runs/", "data/", "stages/", "latents/", "losses/", "json/", "models/mine")


def load_generator():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_flags_page_is_what_the_commands_define():
    line = [sys.executable, "-m", "launch.flag_docs"]
    result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True)
    assert (ROOT / "docs" / "FLAGS.md").read_text() == result.stdout, f"run {' '.join(line[1:])} > docs/FLAGS.md"


@pytest.mark.parametrize("name", ["API.md", "COMPATIBILITY.md"])
def test_generated_pages_are_up_to_date(name):
    page = load_generator().PAGES[name]
    assert (ROOT / "docs" / name).read_text() == page(), "run PYTHONPATH=. python docs/generate.py"


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_of_a_page_exist(page):
    text = (ROOT / page).read_text()
    links = {link for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text) if "://" not in link}
    missing = {link for link in links if not (ROOT / page).parent.joinpath(link).exists()}
    known = "attrib_jax|benchmarks|configs|docs|launch|models|tests|stages|runtime|baselines"
    paths = {path.rstrip("./") for path in re.findall(rf"(?<![\w./<>-])(?:{known})/[\w./*-]+", text)}
    for path in paths:
        if "..." not in path and not path.startswith(MADE) and not list(ROOT.glob(path)):
            missing.add(path)
    assert not missing


def test_modules_that_pages_run_exist():
    for page in PAGES:
        for module in re.findall(r"python -m ((?:launch|benchmarks)\.\w+)", (ROOT / page).read_text()):
            assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), f"{page}: {module}"
