"""The attribute command on a tiny model: its files, and what it says to wrong input."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from PIL import Image

from launch import attribute, common
from tests.tiny_dataset import make_dataset
from tests.tiny_pipeline import make_torch_pipeline

SETTINGS = ("--prompt=red heart", "--sampler_steps=2", "--query_draws=32", "--fisher_samples=32", "--stride=500")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("cli-workdir")


@pytest.fixture
def command(model, workdir, monkeypatch, capsys):
    real = common.open_dataset
    monkeypatch.setattr(
        common, "open_dataset", lambda name, *a, **k: make_dataset() if name == "openmoji" else real(name, *a, **k)
    )

    def run(*arguments, settings=SETTINGS):
        with flagsaver.flagsaver():
            flags.FLAGS(["attribute", f"--model={model}", f"--workdir={workdir}", *settings, *arguments])
            code = common.execute(attribute.main)
        return code, capsys.readouterr()

    return run


def test_writes_every_file_and_saves_its_flags(command, workdir):
    code, output = command("--query_name=heart", "--top_k=3")
    assert code == 0, output.err
    folder = workdir / "attribution" / "heart"
    names = {"scores.npz", "top.csv", "query.png", "report.html", "sheet.png", "manifest.json"}
    assert names <= {path.name for path in folder.iterdir()}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["flags"]["stride"] == 500 and manifest["flags"]["prompt"] == "red heart"
    assert str(folder / "report.html") in output.out
    assert len((folder / "top.csv").read_text().splitlines()) == 4


def test_own_picture(command, workdir, tmp_path):
    picture = tmp_path / "picture.png"
    Image.fromarray(np.full((40, 30, 4), 90, np.uint8)).save(picture)
    code, output = command(f"--query={picture}", "--query_name=own")
    assert code == 0, output.err
    assert Image.open(workdir / "attribution" / "own" / "query.png").size == (16, 16)


def _results(workdir):
    """Stored files but for the lock and the note of whose workdir it is, which any command may write first."""
    files = (path.relative_to(workdir) for path in workdir.rglob("*") if path.is_file())
    return sorted(file for file in files if file.parts[0] not in (".lock", "inputs"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method=unlern"], "did you mean 'unlearn'"),
        (["--weights=cross-atn"], "did you mean 'cross-attn'"),
        (["--dataset=openmojo"], "did you mean 'openmoji'"),
        (["--stride=-1"], "stride is -1"),
        (["--stride=5000"], "stride is 5000"),
        (["--sampler_steps=5000"], "5000"),
        (["--region=0,0,99,99"], "outside"),
        (["--region=1,2,x"], "four whole numbers"),
        (["--region_mask=nowhere.png"], "nowhere.png"),
        (["--region_mask=nowhere.png", "--region=0,0,8,8"], "give one of them"),
        (["--curvature=kfac"], "did you mean 'ekfac'"),
        (["--curvature=ekfac", "--fisher=fisher.pt"], "holds a diagonal F"),
        (["--method=influence", "--update=sgd"], "one Newton step"),
        (["--model=nowhere"], "nowhere"),
        (["--query=nowhere.png"], "nowhere.png"),
        (["--flips=both"], "flips"),
        (["--query_draws=0"], "query_draws"),
        (["--score=exakt"], "did you mean 'exact'"),
        (["--precision=half"], "unknown precision 'half'"),
        (["--cascade=1.5"], "cascade is 1.5"),
        (["--cascade=-1"], "cascade is -1"),
        (["--cascade=0.1", "--cascade_stride=499"], "cascade_stride is 499, finer than stride 500"),
        (["--cascade=0.1", "--cascade_stride=2000"], "cascade_stride is 2000"),
        (["--cascade_min=0"], "cascade_min is 0"),
        (["--projection_dim=64"], "--projection_dim given with --method=unlearn"),
        (["--method=trak", "--projection_dim=10"], "projection_dim is 10: expected a multiple of 4"),
        (["--method=d-trak", "--regularisation=0"], "regularisation is 0"),
        (["--method=das", "--region=0,0,8,8"], "region is (0, 0, 8, 8), but method='das' has no use for it"),
        (["--method=trak", "--ensemble=nowhere"], "ensemble holds 'nowhere'"),
        (["--method=journey-trak", "--journey_timestep=1000"], "journey_timestep is 1000"),
        (["--prompt="], "prompt is empty, and there is no picture; give --prompt, --query"),
        (["--query_index=1"], "query_index is 1, but there are no --query_latents"),
        (["--method=pixel", "--curvature=ekfac"], "curvature is 'ekfac', but method='pixel' has no use for it"),
        (["--method=random", "--update=sgd"], "update is 'sgd', but method='random' has no use for it"),
        (["--workdir="], "--workdir not given"),
    ],
)
def test_wrong_input_is_one_clear_line_and_costs_nothing(command, workdir, arguments, message):
    before = _results(workdir)
    code, output = command(*arguments)
    assert code == 1 and message in output.err and output.err.startswith("error:")
    assert _results(workdir) == before


def test_a_name_that_another_query_has_is_refused_with_what_to_do(command):
    command("--method=random", "--query_name=taken")
    code, output = command("--method=random", "--query_name=taken", "--prompt=hat")
    assert code == 1 and "Give another --query_name than 'taken'" in output.err


def test_missing_flags_are_named(command):
    code, output = command(settings=())
    assert code == 1 and "--prompt" in output.err


def test_picture_that_is_no_image(command, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    code, output = command(f"--query={tmp_path / 'text.png'}")
    assert code == 1 and "text.png" in output.err


def test_half_written_and_foreign_models(command, model, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(model, half)
    (half / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    code, output = command(f"--model={half}")
    assert code == 1 and "unet/diffusion_pytorch_model.safetensors" in output.err
    config = half / "vae" / "config.json"
    shutil.copytree(model / "unet", half / "unet", dirs_exist_ok=True)
    config.write_text(config.read_text().replace('"AutoencoderKL"', '"VQModel"'))
    code, output = command(f"--model={half}")
    assert code == 1 and "VQModel" in output.err


def test_workdir_of_another_model_is_refused(command, tmp_path):
    make_torch_pipeline(str(tmp_path / "other"), seed=1, unet_channels=(32,))
    assert command()[0] == 0
    code, output = command(f"--model={tmp_path / 'other'}")
    assert code == 1 and "model: stored" in output.err and "--workdir" in output.err
    assert command()[0] == 0


@pytest.fixture
def queries(tmp_path):
    def write(*lines):
        file = tmp_path / "queries.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return f"--queries={file}"

    return write


def test_a_file_of_queries_gives_a_report_for_each(command, workdir, queries, tmp_path):
    Image.fromarray(np.full((40, 30, 3), 90, np.uint8)).save(tmp_path / "picture.png")
    several = queries(
        {"prompt": "red heart", "name": "line-1"}, {"prompt": "hat", "image": "picture.png", "name": "line-2"}
    )
    code, output = command(several, settings=SETTINGS[1:])
    assert code == 0, output.err
    for name, prompt in (("line-1", "red heart"), ("line-2", "hat")):
        folder = workdir / "attribution" / name
        assert f"{prompt} ({name})" in output.out and str(folder / "report.html") in output.out
        assert prompt in (folder / "report.html").read_text()
        assert json.loads((folder / "manifest.json").read_text())["queries_together"] == 2
    code, output = command("--query_name=line-1-alone")
    assert code == 0, output.err
    one, many = (np.load(workdir / "attribution" / name / "scores.npz") for name in ("line-1-alone", "line-1"))
    np.testing.assert_array_equal(one["score"], many["score"])


def test_linear_scores_and_a_cascade(command, workdir):
    code, output = command(
        "--query_name=fast", "--score=linear", "--cascade=0.1", "--cascade_stride=500", "--cascade_min=4", "--top_k=9"
    )
    assert code == 0, output.err
    folder = workdir / "attribution" / "fast"
    # No picture is shown that has no full score.
    assert len(np.load(folder / "scores.npz")["score"]) == 9
    assert "9 of 37 pictures scored at the full setting" in (folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("lines", "arguments", "message"),
    [
        ([], (), "has no queries"),
        ([{"prompt": "hat", "name": "a"}, {"prompt": "flag", "name": "a"}], (), "line 2: name 'a' is that of line 1"),
        ([{"prompt": "hat"}, {"prompt": "hat"}], (), "number 1, 2 have one name"),
        ([{"prompt": "hat", "image": "nowhere.png"}], (), "line 1: picture"),
        ([{"prompt": "hat"}], ("--prompt=hat",), "--prompt given beside --queries"),
        ([{"prompt": "hat"}], ("--query=x.png", "--query_name=x"), "--query, --query_name given beside --queries"),
    ],
)
def test_wrong_files_of_queries_cost_nothing(command, workdir, queries, lines, arguments, message):
    before = _results(workdir)
    code, output = command(queries(*lines), *arguments, settings=SETTINGS[1:])
    assert code == 1 and message in output.err and output.err.startswith("error:")
    assert _results(workdir) == before


def test_region_and_its_mask_give_the_same_scores(command, workdir, tmp_path):
    mask = np.zeros((16, 16), np.uint8)
    mask[:, :8] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    regions = {"left": "--region=0,0,8,16", "mask": f"--region_mask={tmp_path / 'mask.png'}"}
    scores = {}
    for name, argument in regions.items():
        code, output = command(f"--query_name={name}", argument)
        assert code == 0, output.err
        scores[name] = np.load(workdir / "attribution" / name / "scores.npz")["score"]
    np.testing.assert_array_equal(scores["mask"], scores["left"])
    settings = json.loads((workdir / "attribution" / "mask" / "manifest.json").read_text())["settings"]
    assert len(settings["region_mask"]) == 64
    assert "region-mask" in (workdir / "attribution" / "mask" / "report.html").read_text()


def test_prompt_too_long_and_of_unknown_words_says_so(command, caplog):
    code, _ = command("--prompt=zebra quagga okapi gnu eland kudu nyala", "--method=random")
    assert code == 0 and "cut off" in caplog.text and "zebra" in caplog.text


def test_the_program_itself_ends_with_one_line_and_code_1(tmp_path):
    arguments = [sys.executable, "-m", "launch.attribute", "--model=nowhere", f"--workdir={tmp_path}", "--prompt=hat"]
    result = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith("error: model 'nowhere' does not exist")
    assert "Traceback" not in result.stderr
