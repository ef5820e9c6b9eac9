"""Turns a pipeline folder that today's libraries wrote into the form of the published Stable Diffusion folders."""

import json
import pathlib
import shutil
from collections.abc import Iterable
from typing import Any

import numpy as np
import safetensors.numpy

from tests.convert.files import save
from tests.convert.published_configs import PUBLISHED, TOKENIZER_CONFIG, special_tokens_map

PARTS = ("unet", "vae", "text_encoder")
_EXAMPLES = {1: "CompVis/stable-diffusion-v1-4", 2: "stabilityai/stable-diffusion-2-1"}
FORMAT = {"format": "pt"}
_STEMS = {"safetensors": "model", "bin": "pytorch_model"}  # of a part of transformers
_VAE_NAMES = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


def age_folder(path: pathlib.Path, generation: int = 1) -> None:
    """Gives a folder the configs, tensor names and tokenizer files of Stable Diffusion 1.4 or 2.1; the sizes stay.

    The index names a safety checker that is not there, the weights are left as one safetensors file a part.
    """
    published = PUBLISHED[_EXAMPLES[generation]]
    write(path / "model_index.json", published["index"])
    write(path / "scheduler/scheduler_config.json", published["scheduler"])
    for part in PARTS:
        today = read(path / part / "config.json")
        values = {key: today.get(key, value) for key, value in published[part].items()}
        if part == "vae":  # not in the first folders, whose value is the default
            values["norm_num_groups"] = today["norm_num_groups"]
        if part == "text_encoder":
            values |= {key: published[part][key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
            length = values["max_position_embeddings"]
        write(path / part / "config.json", values)
    vae, text = read_weights(path / "vae"), read_weights(path / "text_encoder")
    for new, old in _VAE_NAMES.items():
        vae = {name.replace(new, old): tensor for name, tensor in vae.items()}
    assert any("proj_attn" in name for name in vae)
    text = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in text.items()}
    text["text_model.embeddings.position_ids"] = np.arange(length)[None]
    write_weights(path, {"vae": vae, "text_encoder": text})
    age_tokenizer(path / "tokenizer", generation)


def age_tokenizer(folder: pathlib.Path, generation: int = 1, **changes: Any) -> None:
    """Leaves vocab.json and merges.txt, with the published settings beside them; a change to None drops its key."""
    length = read(folder / "tokenizer_config.json")["model_max_length"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    config = TOKENIZER_CONFIG | {"model_max_length": length} | changes
    write(folder / "tokenizer_config.json", {key: value for key, value in config.items() if value is not None})
    write(folder / "special_tokens_map.json", special_tokens_map(generation))


def store_weights(
    path: pathlib.Path,
    kind: str = "safetensors",
    shards: int = 1,
    variant: str | None = None,
    early_index: bool = False,
    dtype: str = "float32",
    parts: Iterable[str] = PARTS,
    keep: bool = False,
) -> None:
    """Stores the weights of a folder as `kind` ("safetensors" or "bin"), in place of what is there unless `keep`.

    More than one of the `shards` has an index. With `early_index` the variant stands before `index` in the index's
    name, and after the number in those of its shards.
    """
    states = {part: read_weights(path / part) for part in parts}
    for part in parts if not keep else ():
        for file in (path / part).iterdir():
            if file.name != "config.json":
                file.unlink()
    for part, state in states.items():
        state = {name: x.astype(dtype) if x.dtype.kind == "f" else x for name, x in state.items()}
        stem = _STEMS[kind] if part == "text_encoder" else "diffusion_pytorch_model"
        middle = f".{variant}" if variant else ""
        if shards == 1:
            save(state, path / part / f"{stem}{middle}.{kind}", FORMAT)
            continue
        weight_map = {}
        for i in range(shards):
            number = f"-{i + 1:05d}-of-{shards:05d}"
            file = f"{stem}{number}{middle}.{kind}" if early_index else f"{stem}{middle}{number}.{kind}"
            shard = {name: state[name] for name in sorted(state)[i::shards]}
            save(shard, path / part / file, FORMAT)
            weight_map |= dict.fromkeys(shard, file)
        index = f"{stem}.{kind}{middle}.index.json" if early_index else f"{stem}.{kind}.index{middle}.json"
        write(path / part / index, {"metadata": {"total_size": 0}, "weight_map": weight_map})


def read_weights(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a part's one safetensors file in full precision."""
    return safetensors.numpy.load_file(next(p for p in folder.glob("*model.safetensors") if p.is_file()))


def write_weights(path: pathlib.Path, states: dict[str, dict[str, np.ndarray]]) -> None:
    for part, state in states.items():
        save(state, next((path / part).glob("*model.safetensors")), FORMAT)


def read(path: pathlib.Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: pathlib.Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def copy_folder(source: str | pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    shutil.copytree(source, target)
    return target
