"""The feature towers at full size against PyTorch transformers, with random weights.

    python -m benchmarks.towers --output=runs/towers          # 3 GB of memory and of disk, some minutes on two cores

CLIP ViT-B/32 (both halves), DINO ViT-B/16 and DINOv2 ViT-L/14 with registers (518-pixel position embeddings, read at
224 pixels): each is built and saved by transformers, read by `load_tower`, and its features of two random images (and
of two random texts) are compared. Writes results.md to --output and exits with 1 where an error exceeds 1e-4.
"""

import shutil
import time
from pathlib import Path

import jax
import numpy as np
import torch
import transformers
from absl import flags

from attrib_jax.convert.tokenizer import save_tokenizer, train_tokenizer
from attrib_jax.convert.tower import load_tower
from attrib_jax.core.checks import check_choice
from launch import common

_OUTPUT = flags.DEFINE_string(
    "output", "runs/towers", "Folder of the results, and of the weights while they are needed."
)
_TOWERS = flags.DEFINE_list("towers", ["clip", "dino", "dinov2"], "Towers to build.")

ERROR_LIMIT = 1e-4
_SIDE = 224
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
_NAMES = {"clip": "CLIP ViT-B/32", "dino": "DINO ViT-B/16", "dinov2": "DINOv2 ViT-L/14, registers"}


def main():
    for family in _TOWERS.value:
        check_choice("tower", family, _NAMES)
    rows = []
    for family in _TOWERS.value:
        folder = Path(_OUTPUT.value) / family
        try:
            rows.append(_measure(family, folder))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        print(_table(rows), flush=True)
        (Path(_OUTPUT.value) / "results.md").write_text(_table(rows))
    if any(max(row["image"], row["text"] or 0) > ERROR_LIMIT for row in rows):
        raise ValueError(f"an error exceeds {ERROR_LIMIT}")


def _measure(family: str, folder: Path) -> dict:
    folder.mkdir(parents=True, exist_ok=True)
    model = _build(family, folder)
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(2, _SIDE, _SIDE, 3)).astype(np.float32)
    inputs = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
    ids = rng.integers(0, 49000, (2, 77)).astype(np.int32)
    ids[:, 20:] = 49407
    with torch.no_grad():
        if family == "clip":
            image = model.get_image_features(inputs).pooler_output.numpy()
            text = model.get_text_features(torch.from_numpy(ids).long()).pooler_output.numpy()
        else:
            image, text = model(inputs).last_hidden_state[:, 0].numpy(), None
    weights = sum(parameter.numel() for parameter in model.parameters())
    del model
    began = time.monotonic()
    tower = load_tower(folder, family)
    seconds = time.monotonic() - began

    def error(expected: np.ndarray, batch: np.ndarray, method: str) -> float:
        with jax.default_matmul_precision("highest"):
            apply = jax.jit(lambda params, batch: tower.module.apply({"params": params}, batch, method=method))
            actual = np.asarray(apply(tower.params, batch))
        return float(np.abs(actual - expected).max() / np.abs(expected).max())

    return {
        "name": _NAMES[family],
        "weights": weights,
        "image": error(image, pixels, "image_features"),
        "text": None if text is None else error(text, ids, "text_features"),
        "seconds": seconds,
    }


def _build(family: str, folder: Path) -> torch.nn.Module:
    """A model of the published size with random weights, saved with its processor (and a tokenizer) at `folder`."""
    if family == "clip":
        text, vision = {"eos_token_id": 49407}, {"patch_size": 32}
        model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))
        processor = transformers.CLIPImageProcessorPil()
        save_tokenizer(train_tokenizer(["a photo"], vocab_size=520, model_max_length=77), str(folder))
    elif family == "dino":
        model = transformers.ViTModel(transformers.ViTConfig())
        processor = transformers.ViTImageProcessorPil(resample=3)
    else:
        config = transformers.Dinov2WithRegistersConfig(**_LARGE, image_size=518, patch_size=14)
        model = transformers.Dinov2WithRegistersModel(config)
        processor = transformers.BitImageProcessorPil(size={"shortest_edge": 256})
    _randomise(model)
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return model


def _randomise(model: torch.nn.Module) -> None:
    """Draws every weight anew, norms and biases included, so that none hides behind a default of 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.2
            parameter.normal_(std=scale, generator=generator)
            if parameter.ndim == 1 and name.endswith(("weight", "lambda1")):
                parameter.add_(1.0)


def _table(rows: list[dict]) -> str:
    lines = ["| tower | weights | images | texts | load |", "|---|---|---|---|---|"]
    for row in rows:
        text = "-" if row["text"] is None else f"{row['text']:.1e}"
        lines.append(
            f"| {row['name']} | {row['weights'] / 1e6:.1f} M | {row['image']:.1e} | {text} | {row['seconds']:.0f} s |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    common.run(main, one_host=True)
