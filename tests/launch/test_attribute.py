"""The attribute command on a tiny model: its files, and what it refuses."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from launch import attribute
from tests.launch.calls import call
from tests.tiny_dataset import make_dataset
from tests.tiny_pipeline import make_torch_pipeline
from tests.towers import save_torch_tower

FAST = "--sampler_steps=2\n--query_draws=32\n--fisher_samples=32\n--stride=500\n"
FILES = {"scores.npz", "top.csv", "query.png", "report.html", "sheet.png", "manifest.json", "stage.json"}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("attributed")


@pytest.fixture
def command(model, images, workdir, tmp_path):
    def run(*arguments, prompt="--prompt=red heart", flagfile=tmp_path / "fast.cfg"):
        (tmp_path / "fast.cfg").write_text(FAST)
        given = [f"--flagfile={flagfile}", f"--model={model}", f"--dataset=folder:{images}"]
        return call(attribute.main, *given, f"--workdir={workdir}", *([prompt] if prompt else []), *arguments)

    return run


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    path = tmp_path_factory.mktemp("tower") / "tiny-clip"
    save_torch_tower("clip", path)
    return path


def results(workdir):
    """Stored files but for the lock and the record of whose workdir it is, which any command may write first."""
    files = (path.relative_to(workdir) for path in workdir.rglob("*") if path.is_file())
    return sorted(file for file in files if file.parts[0] not in (".lock", "inputs"))


def test_writes_every_file_and_saves_its_flags(command, workdir):
    code, out, err = command("--query_name=heart", "--top_k=3")
    assert code == 0, err
    folder = workdir / "attribution" / "heart"
    assert {path.name for path in folder.iterdir()} >= FILES
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["flags"]["stride"] == 500 and manifest["flags"]["prompt"] == "red heart"
    assert str(folder / "report.html") in out
    assert len((folder / "top.csv").read_text().splitlines()) == 4


# The letters of any script name the folder; what is no letter is spelled out; half of an emoji is no text.
@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("红心 在盒子里", "红心-在盒子里-seed0-"),
        ("❤️🐻‍❄️", "heavy-black-heart-"),
        (b"caf\xe9 \xff".decode("utf-8", "surrogateescape"), "caf-seed0-"),
        ("½ \ud83d", "1-fraction-slash-2-seed0-"),
        ("a\nred\theart", "a-red-heart-seed0-"),
    ],
)
def test_prompts_of_any_characters_have_complete_results(command, workdir, prompt, name):
    code, out, err = command("--method=random", prompt=f"--prompt={prompt}")
    assert code == 0, err
    (folder,) = [path for path in (workdir / "attribution").iterdir() if path.name.startswith(name)]
    assert {path.name for path in folder.iterdir()} >= FILES and str(folder) in out
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    page = (folder / "report.html").read_text(encoding="utf-8")
    shown = prompt.encode("utf-8", "replace").decode()
    assert manifest["settings"]["query"]["prompt"] == shown and shown.split("\n")[0] in page


NAMED = [
    # Choices suggest the near name.
    ("--method=unlern", "'unlearn'"),
    ("--method=clap", "'clip'"),
    ("--weights=cross-atn", "'cross-attn'"),
    ("--curvature=kfac", "'ekfac'"),
    ("--update=newtn", "'newton'"),
    ("--flips=maximum", "'max'"),
    ("--captions=al", "'all'"),
    ("--score=exakt", "'exact'"),
    ("--precision=floa32", "'float32'"),
    ("--sampler=dim", "'ddim'"),
    ("--projection=sparce", "'sparse'"),
    ("--dataset=openmojo", "'openmoji'"),
    # Numbers out of range, of settings that are read.
    *(f"--{name}={value}" for name in ("stride", "query_draws", "fisher_samples", "top_k") for value in (0, 1.5)),
    *(f"--{name}={value}" for name in ("step_size", "guidance_scale", "damping") for value in ("inf", "nan", -1, "x")),
    *(f"--cascade={value}" for value in (1.5, -1, "nan")),
    *(f"--{name}={value}" for name in ("seed", "loss_seed") for value in (-1, 2**32)),
    "--steps=0",
    "--stride=5000",
    "--sampler_steps=5000",
    "--num_examples=0",
    "--batch_size=-1",
    "--queries_per_pass=-1",
    "--workers=-1",
    "--lora=nowhere --lora_scale=inf",
    ("--weights=lora", "weights is 'lora', but lora is not given"),
    "--curvature=ekfac --ekfac_damping=inf",
    "--cascade=0.1 --cascade_stride=499",
    "--cascade=0.1 --cascade_stride=2000",
    "--cascade=0.1 --cascade_min=0",
    "--method=trak --projection_dim=10",
    "--method=d-trak --regularisation=0",
    "--method=das --regularisation=inf",
    "--method=trak --projection_seed=-1",
    "--method=journey-trak --journey_timestep=1000",
    "--model_parallel=-1",
    ("--model_parallel=97", "model_parallel is 97 and there are .*divisor"),
    "--region=0,0,99,99",
    "--region=1,2,x",
    "--region=1,2,3",
    "--query_index=1",
    # Files that do not exist, or are something else.
    ("--region_mask=nowhere.png", "nowhere.png"),
    ("--model=nowhere", "nowhere"),
    ("--query=nowhere.png", "nowhere.png"),
    ("--query=setup.py", "setup.py"),
    ("--fisher=nowhere", "nowhere"),
    ("--method=trak --ensemble=nowhere", "nowhere"),
    ("--method=clip --tower=nowhere", "nowhere"),
    ("--queries=nowhere.jsonl --prompt=", "nowhere.jsonl"),
    # What is missing.
    ("--prompt=", "--prompt"),
    ("--workdir=", "--workdir"),
    ("--method=dinov2", "facebook/dinov2-with-registers-large"),
    ("--method=clip-abc --tower=x", "feature_head"),
    ("--query_text=x.npy", "query_latents"),
    # What excludes another flag.
    ("--region=0,0,8,8 --region_mask=mask.png", "region, region_mask"),
    ("--query=a.png --queries=b.jsonl", "query, query_latents, queries"),
    ("--query=a.png --query_latents=b.npy", "query, query_latents, queries"),
    ("--curvature=ekfac --fisher=setup.py", "fisher"),
    ("--curvature=ekfac --model_parallel=2", "model_parallel is 2 and curvature is 'ekfac'"),
    ("--ekfac_damping=0.2", "ekfac_damping"),
    ("--cascade_stride=300", "cascade_stride"),
    ("--update=sgd --damping=1", "damping"),
    ("--update=sgd --keep_ewc_gradient", "keep_ewc_gradient"),
    ("--method=trak --journey_timestep=3", "journey_timestep"),
    ("--method=trak --das_leverage", "das_leverage"),
    # What the method does not read, with the methods that do.
    ("--projection_dim=64", "projection_dim is 64.*'trak', 'journey-trak', 'd-trak', 'das'"),
    ("--method=influence --update=sgd", "update is 'sgd'.*'unlearn'"),
    ("--method=das --region=0,0,8,8", "region is .*'unlearn', 'influence'"),
    ("--method=pixel --region_mask=mask.png", "region_mask is 'mask.png'.*'unlearn', 'influence'"),
    ("--method=trak --model_parallel=2", "model_parallel is 2.*'unlearn', 'influence'"),
    ("--method=pixel --tower=x", "tower is 'x'.*'clip'"),
    ("--method=clip --tower=x --feature_head=y", "feature_head is 'y'.*'clip-abc', 'dino-abc'"),
    ("--method=random --nokeep_ewc_gradient --steps=3", "steps is 3.*'unlearn'"),
    # Names of folders.
    (f"--query_name={'x' * 300}", "query_name"),
    ("--query_name=a/b", "query_name"),
    ("--query_name=..", "query_name"),
    ("stray", "stray"),
]


@pytest.mark.parametrize(("arguments", "named"), [case if isinstance(case, tuple) else (case, None) for case in NAMED])
def test_wrong_input_is_refused_by_name_and_costs_nothing(command, workdir, arguments, named):
    before, given = results(workdir), arguments.split(" ")
    code, out, err = command(*given)
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    # Else the error names the last flag.
    assert re.search(named or given[-1].lstrip("-").partition("=")[0], line), line
    assert code == 1 and out == "" and results(workdir) == before


def test_flags_of_a_flagfile_that_the_method_does_not_read_are_a_warning(command, workdir, tmp_path, caplog):
    (tmp_path / "all.cfg").write_text("--region=0,0,8,8\n--steps=3\n--loss_seed=4\n")
    code, out, err = command(f"--flagfile={tmp_path / 'all.cfg'}", "--method=random", "--query_name=flagfile")
    assert code == 0 and "--region, --steps" in caplog.text and "--loss_seed" not in caplog.text
    manifest = json.loads((workdir / "attribution" / "flagfile" / "manifest.json").read_text())
    assert manifest["settings"]["loss_seed"] == 4 and "steps" not in manifest["settings"]


def test_a_home_folder_is_found_in_every_path(command, model, images, tower, tmp_path, monkeypatch):
    for name, target in (("model", model), ("images", images), ("tower", tower)):
        (tmp_path / name).symlink_to(target)
    image, mask = make_dataset()[0].image, np.zeros((16, 16), np.uint8)
    mask[:, :8] = 255
    Image.fromarray(image).save(tmp_path / "query.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    save_file({"weight": np.eye(10, dtype=np.float32)}, tmp_path / "head.safetensors")
    (tmp_path / "queries.jsonl").write_text('{"prompt": "hat", "image": "~/query.png", "name": "line"}\n')
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shared = ("--model=~/model", "--dataset=folder:~/images", "--workdir=~/work", "--data_dir=~/data", "--query_name=q")
    for number, own in enumerate(
        (
            ("--query=~/query.png", "--region_mask=~/mask.png"),
            ("--query=~/query.png", "--fisher=~/work/fisher/cross-attn-kv-32-seed0"),
            ("--method=clip", "--tower=~/tower"),
            ("--method=clip-abc", "--tower=~/tower", "--feature_head=~/head.safetensors"),
            ("--method=trak", "--projection_dim=8", "--ensemble=~/model/unet"),
        )
    ):
        code, _, err = command(*shared, *own, f"--query_name=q{number}")
        assert code == 0, err
        assert (tmp_path / "work" / "attribution" / f"q{number}" / "manifest.json").is_file()
    code, _, err = command(*shared[:-1], "--queries=~/queries.jsonl", "--method=pixel", prompt=None)
    assert code == 0, err
    assert not (tmp_path / "~").exists()


def test_a_name_that_another_query_has_is_refused_with_what_to_do(command):
    command("--method=random", "--query_name=taken")
    code, _, err = command("--method=random", "--query_name=taken", prompt="--prompt=hat")
    assert code == 1 and "Give another --query_name than 'taken'" in err


def test_half_written_and_foreign_models(command, model, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(model, half)
    (half / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    code, _, err = command(f"--model={half}")
    assert code == 1 and "unet/diffusion_pytorch_model.safetensors" in err
    config = half / "vae" / "config.json"
    shutil.copytree(model / "unet", half / "unet", dirs_exist_ok=True)
    config.write_text(config.read_text().replace('"AutoencoderKL"', '"VQModel"'))
    code, _, err = command(f"--model={half}")
    assert code == 1 and "VQModel" in err


def test_a_workdir_of_another_model_is_refused(command, tmp_path):
    make_torch_pipeline(str(tmp_path / "other"), seed=1, unet_channels=(32,))
    assert command("--method=random")[0] == 0
    code, _, err = command("--method=random", f"--model={tmp_path / 'other'}")
    assert code == 1 and "inputs.model" in err and "--workdir" in err
    assert command("--method=random")[0] == 0


@pytest.fixture
def queries(tmp_path):
    def write(*lines):
        file = tmp_path / "queries.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return f"--queries={file}"

    return write


def test_a_file_of_queries_gives_a_report_for_each(command, workdir, queries, tmp_path):
    Image.fromarray(np.full((40, 30, 4), 90, np.uint8)).save(tmp_path / "image.png")
    file = queries({"prompt": "red heart", "name": "line-1"}, {"prompt": "hat", "image": "image.png", "name": "line-2"})
    code, out, err = command(file, prompt=None)
    assert code == 0, err
    for name, prompt in (("line-1", "red heart"), ("line-2", "hat")):
        folder = workdir / "attribution" / name
        assert f"{prompt} ({name})" in out and str(folder / "report.html") in out
        assert prompt in (folder / "report.html").read_text()
        assert json.loads((folder / "manifest.json").read_text())["queries_together"] == 2
    assert Image.open(workdir / "attribution" / "line-2" / "query.png").size == (16, 16)
    assert command("--query_name=line-1-alone").code == 0
    one, many = (np.load(workdir / "attribution" / name / "scores.npz") for name in ("line-1-alone", "line-1"))
    np.testing.assert_array_equal(one["score"], many["score"])


@pytest.mark.parametrize(
    ("lines", "arguments", "named"),
    [
        ([], (), "queries.jsonl"),
        ([{"prompt": "hat", "name": "a"}, {"prompt": "flag", "name": "a"}], (), "line 2: name 'a'"),
        ([{"prompt": "hat"}, {"prompt": "hat"}], (), "number 1, 2 have one name"),
        ([{"prompt": "hat", "image": "nowhere.png"}], (), "line 1: .*nowhere.png"),
        ([{"prompt": "hat", "guidance_scale": -1}], (), "line 1: guidance_scale is -1"),
        ([{"prompt": "hat", "name": "x" * 300}], (), "line 1: query_name"),
        ([{"prompt": "hat"}], ("--prompt=hat",), "--prompt"),
        ([{"prompt": "hat"}], ("--query_text=x.npy", "--query_name=x"), "--query_text, --query_name"),
    ],
)
def test_wrong_files_of_queries_cost_nothing(command, workdir, queries, lines, arguments, named):
    before = results(workdir)
    code, out, err = command(queries(*lines), *arguments, prompt=None)
    assert code == 1 and out == "" and re.search(named, err) and err.count("error: ") == 1
    assert results(workdir) == before


def test_linear_scores_and_a_cascade(command, workdir):
    code, _, err = command(
        "--query_name=fast", "--score=linear", "--cascade=0.1", "--cascade_stride=500", "--cascade_min=4", "--top_k=9"
    )
    assert code == 0, err
    folder = workdir / "attribution" / "fast"
    # No image is shown that has no full score.
    assert len(np.load(folder / "scores.npz")["score"]) == 9
    assert "9 of 37" in (folder / "report.html").read_text()


def test_a_region_and_its_mask_give_the_same_scores(command, workdir, tmp_path):
    mask = np.zeros((16, 16), np.uint8)
    mask[:, :8] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    scores = {}
    for name, argument in {"left": "--region=0,0,8,16", "mask": f"--region_mask={tmp_path / 'mask.png'}"}.items():
        code, _, err = command(f"--query_name={name}", argument)
        assert code == 0, err
        scores[name] = np.load(workdir / "attribution" / name / "scores.npz")["score"]
    np.testing.assert_array_equal(scores["mask"], scores["left"])
    settings = json.loads((workdir / "attribution" / "mask" / "manifest.json").read_text())["settings"]
    assert len(settings["region_mask"]) == 64
    assert "region-mask" in (workdir / "attribution" / "mask" / "report.html").read_text()


def test_features_and_pixels_find_the_image_itself(command, images, workdir, tower):
    query = f"--query={images / '04.png'}"
    for name, arguments in {"clip": (f"--tower={tower}",), "pixel": ()}.items():
        code, out, err = command(query, f"--method={name}", f"--query_name={name}", "--top_k=3", *arguments)
        assert code == 0, err
        assert out.lstrip().startswith("1  row     4")
    folder = workdir / "attribution"
    manifest = json.loads((folder / "clip" / "manifest.json").read_text())
    assert "tiny-clip" in (folder / "clip" / "report.html").read_text()
    assert len(manifest["settings"]["tower"]) == 64 and "features" in manifest["timings_seconds"]
    assert "tower" not in json.loads((folder / "pixel" / "manifest.json").read_text())["settings"]
    with np.load(folder / "clip" / "scores.npz") as stored:
        assert stored["score"].max() == pytest.approx(1, abs=1e-5)


def test_prompts_that_the_tokenizer_cuts_off_are_a_warning(command, caplog):
    code, _, err = command("--method=random", prompt="--prompt=zebra quagga okapi gnu eland kudu nyala")
    assert code == 0 and "cut off" in caplog.text and "zebra" in caplog.text


def test_the_program_itself_ends_with_one_line_and_code_1(tmp_path):
    arguments = [sys.executable, "-m", "launch.attribute", "--model=nowhere", f"--workdir={tmp_path}", "--prompt=hat"]
    result = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("error: model 'nowhere'")


def test_groups_in_folders_are_unlearned_and_images_without_groups_are_refused(command, images, tmp_path):
    folders = tmp_path / "artists"
    for number, file in enumerate(sorted(images.glob("0*.png"))):
        folder = folders / ("Ann" if number < 4 else "Bob")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder)
        shutil.copy(file.with_suffix(".txt"), folder)
    method = ["--method=group-unlearn", "--query_name=who", f"--workdir={tmp_path / 'run'}"]
    fast = ["--max_steps=2", "--retain_batch=4", "--query_batch=4", "--group_draws=10", "--null_draws=40"]
    settings = tmp_path / "groups.cfg"
    settings.write_text("--sampler_steps=2\n")
    code, _, err = command(f"--dataset=folder:{folders}", *method, *fast, flagfile=settings)
    assert code == 0, err
    folder = tmp_path / "run" / "attribution" / "who"
    assert {path.name for path in folder.iterdir()} >= FILES | {"groups.csv"}
    assert {line.split(",")[0] for line in (folder / "groups.csv").read_text().splitlines()} == {"group", "Ann", "Bob"}
    code, _, err = command(*method[:-1], f"--workdir={tmp_path / 'none'}", flagfile=settings)
    assert code == 1 and "has no groups: expected a column 'group'" in err
