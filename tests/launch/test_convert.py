"""The convert command on a tiny model: round trips to the bit, and what it says to wrong input.

It runs in a process of its own, for its flags have the names of other commands' flags.
"""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet
import pytest
import safetensors.numpy
import torch

from attrib_jax.convert.load import load_pipeline
from attrib_jax.convert.single_file import load_single_file, uninferable_config
from attrib_jax.core.types import Scores
from attrib_jax.core.weights import select_weights
from attrib_jax.curvature import Diagonal
from attrib_jax.curvature.diagonal import GRADIENT_SCALE
from attrib_jax.jobs.curvature import load_fisher
from attrib_jax.storage.files import write_arrays
from attrib_jax.storage.score_files import read_scores
from tests.tiny_pipeline import CAPTIONS, make_torch_pipeline

# Reads one command's arguments a line, and answers with its exit code and what it printed.
SERVER = f"""
import contextlib, io, json, sys
from types import SimpleNamespace
from absl import flags
from absl.testing import flagsaver
from launch import common, convert, process
process.restart_with_huge_pages = lambda: None
common.load_dataset = lambda: SimpleNamespace(
    name="tiny", row_ids=range(6), captions=lambda index: ({CAPTIONS!r}[index], "another"))
for line in sys.stdin:
    out, err = io.StringIO(), io.StringIO()
    with flagsaver.flagsaver(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        flags.FLAGS(["convert", *json.loads(line)])
        code = 0
        try:
            with common.command(["convert"]):
                convert.main()
        except SystemExit as error:
            code = error.code
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""


@pytest.fixture(scope="module")
def convert():
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
    )

    def run(*arguments):
        process.stdin.write(json.dumps([str(argument) for argument in arguments]) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield run
    process.stdin.close()
    assert process.wait(60) == 0


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("convert") / "model"
    make_torch_pipeline(str(path))
    return path


@pytest.fixture
def fisher(model, tmp_path):
    """A finished Fisher stage of the model's key and value weights."""
    selected, _ = select_weights(load_pipeline(str(model)).params["unet"], "cross-attn-kv")
    rng = np.random.default_rng(0)
    tree = jax.tree.map(lambda x: (10.0 ** rng.uniform(-20, 5, x.shape)).astype(np.float32), selected)
    (tmp_path / "stage").mkdir()
    diagonal = Diagonal(tree, GRADIENT_SCALE)
    write_arrays(tmp_path / "stage" / "fisher.safetensors", diagonal.to_flat(), {})
    return diagonal


@pytest.fixture
def attribution(tmp_path):
    """A query's folder as launch.attribute leaves it."""
    folder = tmp_path / "red-heart"
    folder.mkdir()
    rng = np.random.default_rng(0)
    before, after = rng.normal(size=(2, 6, 2))
    scores = Scores(np.arange(6), (after - before).max(axis=1), before, after, (after - before).argmax(axis=1))
    np.savez(folder / "scores.npz", query_loss=np.ones(1), **vars(scores))
    settings = {"method": "unlearn", "query": {"prompt": "red heart"}}
    (folder / "manifest.json").write_text(json.dumps({"query": "red-heart", "settings": settings}))
    return folder, scores


def assert_same_params(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_model_to_a_folder_to_the_bit(convert, model, tmp_path):
    code, out, err = convert(f"--model={model}", f"--output={tmp_path / 'out'}")
    assert code == 0, err
    count = len(jax.tree.leaves(load_pipeline(str(model)).params))
    assert f"out: a model of {count} tensors as float32, " in out and out.count("\n") == 1
    for part in ("unet", "vae"):
        name = f"{part}/diffusion_pytorch_model.safetensors"
        expected = safetensors.numpy.load_file(model / name)
        found = safetensors.numpy.load_file(tmp_path / "out" / name)
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[key], x) and found[key].dtype == x.dtype for key, x in expected.items())
    assert_same_params(load_pipeline(str(tmp_path / "out")).params, load_pipeline(str(model)).params)


def test_model_to_a_single_file_and_back(convert, model, tmp_path):
    single = tmp_path / "model.safetensors"
    code, out, err = convert(f"--model={model}", f"--output={single}")
    assert code == 0, err
    assert f"{single}: " in out and out.count("\n") == 1
    names = safetensors.numpy.load_file(single).keys()
    assert any(name.startswith("model.diffusion_model.") for name in names)
    expected = load_pipeline(str(model))
    found = load_single_file(str(single), str(model), config=uninferable_config(expected))
    assert_same_params(found.params, expected.params)


def test_a_single_file_that_says_its_target(convert, model, tmp_path):
    single = tmp_path / "model.safetensors"
    assert convert(f"--model={model}", f"--output={single}")[0] == 0
    config = tmp_path / "config.json"
    config.write_text(json.dumps(uninferable_config(load_pipeline(str(model)))))
    # The same without our own header, and with another program's.
    state = safetensors.numpy.load_file(single)
    safetensors.numpy.save_file(state, single, {"modelspec.prediction_type": "v"})
    arguments = [f"--model={single}", f"--tokenizer={model}"]
    code, _, err = convert(*arguments, f"--output={tmp_path / 'a'}")
    assert code == 1 and "--model_config" in err
    arguments.append(f"--model_config={config}")
    code, _, err = convert(*arguments, f"--output={tmp_path / 'a'}")
    assert code == 0, err
    assert load_pipeline(str(tmp_path / "a")).schedule.prediction_type == "v_prediction"
    code, _, err = convert(*arguments, "--prediction_type=epsilon", f"--output={tmp_path / 'b'}")
    assert code == 1 and "modelspec.prediction_type" in err and "--prediction_type" in err


@pytest.mark.parametrize("output", ["folder", "x.safetensors"])
def test_a_full_disk_names_the_output(model, tmp_path, output):
    code = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
from launch import common, convert
common.run(convert.main, one_host=True)
"""
    command = [sys.executable, "-c", code, f"--model={model}", f"--output={tmp_path / output}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1
    assert str(tmp_path) in result.stderr and output in result.stderr and "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_weights_dtype(convert, model, tmp_path):
    for dtype in ("float16", "bfloat16"):
        code, _, err = convert(f"--model={model}", f"--output={tmp_path / dtype}", f"--weights_dtype={dtype}")
        assert code == 0, err
        expected = load_pipeline(str(model)).params
        rounded = jax.tree.map(lambda x, dtype=dtype: np.asarray(x).astype(dtype).astype(np.float32), expected)
        assert_same_params(load_pipeline(str(tmp_path / dtype)).params, rounded)


def test_fisher_to_torch_and_safetensors(convert, model, fisher, tmp_path):
    for source, name in (("stage", "fisher_info.pt"), ("fisher_info.pt", "again.safetensors")):
        code, out, err = convert(f"--fisher={tmp_path / source}", f"--output={tmp_path / name}")
        assert code == 0, err
        assert f"{name}: {len(jax.tree.leaves(fisher.tree))} tensors as float64" in out
        found = load_fisher(tmp_path / name, fisher.tree)
        assert_same_params(found.tree, fisher.tree)
    stored = torch.load(tmp_path / "fisher_info.pt")
    unet = safetensors.numpy.load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    names = {name for name in unet if ".attn2.to_k." in name or ".attn2.to_v." in name}
    assert {name: tuple(x.shape) for name, x in stored.items()} == {name: unet[name].shape for name in names}


def test_scores_to_tables(convert, attribution, tmp_path):
    folder, scores = attribution
    for source in (folder, folder / "scores.npz"):
        for suffix in (".csv", ".parquet", ".npz"):
            output = tmp_path / f"x{suffix}"
            code, out, err = convert(f"--scores={source}", f"--output={output}", "--overwrite")
            assert code == 0, err
            assert f"x{suffix}: 6 scores" in out
            found = read_scores(output).top()
            np.testing.assert_array_equal(found.row_id, scores.top().row_id)
            np.testing.assert_array_equal(found.score, scores.top().score)
            np.testing.assert_array_equal(found.loss_after, scores.top().loss_after)
    metadata = json.loads(pyarrow.parquet.read_schema(tmp_path / "x.parquet").metadata[b"attrib_jax"])
    assert metadata == {"source": "red-heart", "method": "unlearn", "query": {"prompt": "red heart"}}


def test_published_result_with_captions(convert, tmp_path):
    influence = np.float32([0, 0.5, -1, 2, 3, 0.25])
    rank = np.argsort(-influence)
    (tmp_path / "influence.pkl").write_bytes(pickle.dumps({"influence": influence, "rank": rank}))
    output = tmp_path / "x.csv"
    code, _, err = convert(f"--scores={tmp_path / 'influence.pkl'}", f"--output={output}", "--dataset=openmoji")
    assert code == 0, err
    lines = output.read_text().splitlines()
    assert lines[:2] == ["rank,row_id,score,caption", f"1,4,3.0,{CAPTIONS[4]}"]
    more = np.arange(7.0)
    (tmp_path / "more.pkl").write_bytes(pickle.dumps({"influence": more, "rank": np.argsort(-more)}))
    code, _, err = convert(f"--scores={tmp_path / 'more.pkl'}", f"--output={tmp_path / 'y.csv'}", "--dataset=openmoji")
    assert code == 1 and "row 6 of --scores is not in --dataset 'tiny'" in err and not (tmp_path / "y.csv").exists()


def test_existing_outputs_are_kept_without_overwrite(convert, model, attribution, fisher, tmp_path):
    (tmp_path / "folder").mkdir()
    for source, output in (
        (f"--model={model}", "x.safetensors"),
        (f"--fisher={tmp_path / 'stage'}", "x.pt"),
        (f"--scores={attribution[0]}", "x.csv"),
    ):
        path = tmp_path / output
        path.write_text("mine")
        code, _, err = convert(source, f"--output={path}")
        assert code == 1 and "exists; give --overwrite" in err and path.read_text() == "mine"
        code, _, err = convert(source, f"--output={path}", "--overwrite")
        assert code == 0 and path.read_bytes() != b"mine", err
    code, _, err = convert(f"--model={model}", f"--output={tmp_path / 'folder'}")
    assert code == 1 and "--overwrite" in err
    # A folder that is no pipeline is never replaced.
    code, _, err = convert(f"--model={model}", f"--output={tmp_path / 'folder'}", "--overwrite")
    assert code == 1 and "no pipeline folder" in err and list((tmp_path / "folder").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output=x.csv"], "give one of --model, --fisher and --scores"),
        (["--model=a", "--scores=b", "--output=x.csv"], "--model and --scores given; give one of"),
        (["--model=a"], "--output not given"),
        (["--model=a", "--output=x.ckpt"], "'x.ckpt'; a model is written as a folder or a .safetensors file"),
        (["--fisher=a", "--output=x.npz"], "'x.npz'; expected a name that ends in .safetensors, .pt"),
        (["--scores=a", "--output=x"], "'x'; expected a name that ends in .csv, .npz, .parquet"),
        (["--scores=a", "--output=nowhere/x.csv"], "the folder nowhere does not exist"),
        (["--scores=nowhere.npz", "--output=x.csv"], "nowhere.npz"),
        (["--fisher=nowhere", "--output=x.pt"], "nowhere"),
        (["--scores=a", "--dataset=openmoji", "--output=x.npz"], "which has no captions"),
    ],
)
def test_wrong_input_is_one_clear_line(convert, arguments, message):
    before = sorted(Path.cwd().iterdir())
    code, _, err = convert(*arguments)
    assert code == 1 and message in err and err.startswith("error:") and err.count("\n") == 1
    assert sorted(Path.cwd().iterdir()) == before
