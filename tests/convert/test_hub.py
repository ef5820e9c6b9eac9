"""Models by Hugging Face id: from the cache, from a server on this machine, and neither."""

import contextlib
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import time

import pytest

from attrib_jax.convert.hub import resolve_model
from attrib_jax.convert.load import load_pipeline
from tests.convert.published_configs import PUBLISHED

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "model_index.json": json.dumps(PUBLISHED["stabilityai/stable-diffusion-2"]["index"]).encode(),
    "README.md": b"# A model",
    "v1-5-pruned.ckpt": b"all in one",
    "scheduler/scheduler_config.json": b"{}",
    "tokenizer/vocab.json": b"{}",
    "tokenizer/merges.txt": b"#version: 0.2\n",
    "unet/config.json": b'{"cross_attention_dim": 512}',
    "unet/diffusion_pytorch_model.bin.index.json": b'{"weight_map": {}}',
    "unet/diffusion_pytorch_model-00001-of-00001.bin": b"full",
    "unet/diffusion_pytorch_model.fp16.safetensors": b"half",
    "unet/diffusion_flax_model.msgpack": b"flax",
    "vae/config.json": b"{}",
    "vae/diffusion_pytorch_model.bin": b"bin",
    "vae/diffusion_pytorch_model.safetensors": b"safe",
    "text_encoder/config.json": b"{}",
    "text_encoder/model.safetensors.index.fp16.json": b'{"weight_map": {}}',
    "text_encoder/model.fp16-00001-of-00001.safetensors": b"half",
    "text_encoder/pytorch_model.bin": b"bin",
    "safety_checker/pytorch_model.bin": b"never read",
}
CONFIGS = {name for name in FILES if name.endswith(("config.json", "model_index.json", "merges.txt", "vocab.json"))}


# Repository -> the files in which it differs from `FILES`, and the reason of its refusal.
REFUSED = {
    "owner/sdxl": ({"model_index.json": b'{"_class_name": "StableDiffusionXLPipeline"}'}, "Stable Diffusion XL"),
    "owner/inpainting": ({"unet/config.json": b'{"cross_attention_dim": 512, "in_channels": 9}'}, "inpainting model"),
    "owner/damaged": ({"vae/config.json": b'{"scaling_factor": null}'}, "scaling_factor is None"),
    "owner/unfit": ({"text_encoder/config.json": b'{"hidden_size": 1024}'}, "hidden_size is 1024"),
}
WITHOUT_INDEX = {
    "owner/controlnet": ({"config.json": b'{"_class_name": "ControlNetModel"}', "x.safetensors": b""}, "ControlNet"),
    "owner/t5": ({"config.json": b'{"model_type": "t5"}', "model.safetensors": b"weights"}, "'t5'"),
}
REPOSITORIES = {"owner/model": FILES, **{name: files for name, (files, _) in WITHOUT_INDEX.items()}}
REPOSITORIES |= {name: FILES | files for name, (files, _) in REFUSED.items()}


class _Hub(http.server.BaseHTTPRequestHandler):
    """The paths of the hub's web API that a download asks for; notes which weight files are."""

    def do_GET(self):
        path = self.path.partition("?")[0]
        repo = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        if repo not in REPOSITORIES:
            return self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        files = REPOSITORIES[repo]
        if "/tree/" in path:
            entries = [{"type": "file", "path": n, "size": len(x), "oid": _etag(x)} for n, x in files.items()]
            return self._answer(200, json.dumps(entries).encode())
        if path.startswith("/api/"):
            siblings = [{"rfilename": name} for name in files]
            info = {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings}
            return self._answer(200, json.dumps(info).encode())
        name = path.split("/", 5)[5]
        if not name.endswith((".json", ".txt")):
            self.server.weights.append(f"{repo}/{name}")
        content = files[name]
        return self._answer(200, content, {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET

    def _answer(self, status, content, headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *arguments):
        pass


def _etag(content):
    return hashlib.sha1(content).hexdigest()


@contextlib.contextmanager
def _server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.weights = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", server.weights
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


_SCRIPT = """
import json, pathlib, sys
from attrib_jax.convert.hub import resolve_model
for name, variant, *replaced in json.loads(sys.argv[1]):
    try:
        answer = resolve_model(name, variant, replaced=replaced)
        files = [str(p.relative_to(answer)) for p in pathlib.Path(answer).rglob("*") if p.is_file()]
    except (OSError, ValueError) as error:
        answer, files = f"{type(error).__name__} {error}", []
    print(json.dumps([answer, files]))
"""


def resolve(models, home, endpoint, **environment):
    """The path or error of each (name, variant, *replaced) and the files under it, then the log.

    In a process of its own, because huggingface_hub reads the environment when it is imported.
    """
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", **environment}
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGINGFACE_"))}
    command = [sys.executable, "-c", _SCRIPT, json.dumps(models)]
    result = subprocess.run(command, capture_output=True, text=True, env=kept | settings, timeout=120)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()], result.stderr


def test_an_existing_path_stays_as_it_is(tmp_path, monkeypatch):
    assert resolve_model(str(tmp_path)) == resolve_model(tmp_path) == str(tmp_path)
    (tmp_path / "owner/model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("owner/model") == "owner/model"


@pytest.mark.parametrize("name", ["nowhere", "/no/where", "../no/where", "a/b/c", "owner/model@", "-x/y", "a b/c", ""])
def test_what_is_no_path_and_no_id(name):
    with pytest.raises(FileNotFoundError, match=f"model {re.escape(repr(name))}"):
        resolve_model(name)


def test_only_the_files_that_are_read_are_downloaded_and_then_cached(tmp_path):
    vae, text = "vae/diffusion_pytorch_model.safetensors", "text_encoder/pytorch_model.bin"
    unet = "unet/diffusion_pytorch_model"
    full = {f"{unet}.bin.index.json", f"{unet}-00001-of-00001.bin", vae, text}
    half = {"text_encoder/model.safetensors.index.fp16.json", "text_encoder/model.fp16-00001-of-00001.safetensors"}
    half |= {f"{unet}.fp16.safetensors", vae}
    parts = {"model_index.json", "vae/config.json", vae, "text_encoder/config.json", text}
    asked = [("owner/model", None), ("owner/model", "fp16"), ("owner/model", "bf16"), ("owner/other", None)]
    with _server() as (endpoint, _):
        (first, second, no_variant, no_model), log = resolve(asked, tmp_path / "all", endpoint)
        [(_, files)], _ = resolve(
            [("owner/model", None, "unet", "tokenizer", "scheduler")], tmp_path / "some", endpoint
        )
    assert set(first[1]) == CONFIGS | full, log
    assert set(second[1]) == CONFIGS | full | half, log
    assert set(files) == parts  # what is replaced is not downloaded
    for message, names in ((no_variant[0], ("owner/model", "'bf16'")), (no_model[0], ("owner/other", "Repository"))):
        assert message.startswith("FileNotFoundError") and all(name in message for name in names)
    # Where the hub is out of reach, by chance or by choice, a cached model is taken, by its commit too.
    asked = [("owner/model", None), (f"owner/model@{COMMIT}", None), ("owner/model@v2", None)]
    for choice in ({}, {"HF_HUB_OFFLINE": "1"}):
        start = time.monotonic()
        answers, log = resolve(asked, tmp_path / "all", endpoint, **choice)
        assert time.monotonic() - start < 60
        assert [path for path, _ in answers[:2]] == [first[0]] * 2 and "cached copy" in log
        message = answers[2][0]
        assert message.startswith("FileNotFoundError") and "'owner/model@v2'" in message and "\n" not in message


@pytest.mark.parametrize("argument", ["path", "unet", "tokenizer"])
def test_paths_in_the_home_folder_are_expanded(tmp_path, monkeypatch, argument):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/"):
        load_pipeline(**{"path": "~/model", argument: "~/nothing"})


def test_of_a_model_that_is_refused_no_weights_are_downloaded(tmp_path):
    reasons = {name: what for name, (_, what) in (REFUSED | WITHOUT_INDEX).items()}
    with _server() as (endpoint, weights):
        answers, log = resolve([(name, None) for name in reasons], tmp_path, endpoint)
    for (message, _), what in zip(answers, reasons.values(), strict=True):
        assert message.startswith("ValueError") and what in message, log
    assert weights == []
