"""The command that draws images: its sheet, and that wrong flags are refused before anything is drawn."""

import pytest
from PIL import Image

from tests.launch.calls import call_elsewhere

WRONG = {
    "--prompts=": "--prompts",
    "--model=nowhere": "nowhere",
    "--output=nowhere/sheet.png": "output is 'nowhere/sheet.png'",
    "--output=sheet.foo": "output is 'sheet.foo'",
    "--output=~nobody/sheet.png": "nobody",
    "--rows=2 --seed=4294967295": "seed is 4294967295",
    "--rows=0": "rows",
    "--sampler=dim": "'ddim'",
    "--sampler_steps=0": "sampler_steps",
    "--sampler_steps=1001": "sampler_steps is 1001",
    "--guidance_scale=inf": "guidance_scale is inf",
    "--guidance_scale=nan": "guidance_scale is nan",
}


@pytest.fixture(scope="module")
def outcomes(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sheets")
    shared = [f"--model={model}", "--prompts=red heart,hat", "--sampler_steps=2", f"--output={folder / 'wrong.png'}"]
    right = [*shared, "--rows=3", f"--output={folder / 'sheet.png'}"]
    calls = [[*shared, *arguments.split(" ")] for arguments in WRONG]
    return folder, *call_elsewhere("launch.sample", right, *calls)


def test_a_row_for_each_seed_and_a_column_for_each_prompt(outcomes):
    folder, (code, out, err), *_ = outcomes
    assert code == 0, err
    assert Image.open(folder / "sheet.png").size == (2 * 16, 3 * 16) and str(folder / "sheet.png") in out


@pytest.mark.parametrize("place", range(len(WRONG)), ids=WRONG)
def test_wrong_flags_are_refused_before_anything_is_drawn(outcomes, place):
    folder, code, out, err = outcomes[0], *outcomes[2 + place]
    assert code == 1 and out == "" and not (folder / "wrong.png").exists()
    assert err.count("error: ") == 1 and list(WRONG.values())[place] in err
