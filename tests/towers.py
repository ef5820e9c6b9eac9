"""Tiny random feature towers in the transformers folder layout, made by PyTorch transformers."""

import os
from typing import Any

import transformers

from attrib_jax.convert.tokenizer import save_tokenizer, train_tokenizer
from tests.parity.torch_weights import randomise
from tests.tiny_pipeline import CAPTIONS, MAX_LENGTH

_SMALL = {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2}
CLIP = {
    "projection_dim": 10,
    "text_config": _SMALL | {"intermediate_size": 40, "vocab_size": 600, "max_position_embeddings": MAX_LENGTH},
    "vision_config": _SMALL | {"intermediate_size": 48, "image_size": 16, "patch_size": 4},
}
DINO = _SMALL | {"intermediate_size": 40, "image_size": 32, "patch_size": 8}
DINOV2 = _SMALL | {"image_size": 40, "patch_size": 8, "num_register_tokens": 3}


def save_torch_tower(family: str, path: str | os.PathLike, **changes: Any) -> transformers.PreTrainedModel:
    """Saves a random tower with its image processor (and CLIP's tokenizer) at `path`, and returns the PyTorch model.

    `changes` are of the config; of CLIP's `hidden_act` goes to both halves, and `text_config` adds to that half's.
    """
    path = os.fspath(path)
    if family == "clip":
        tokenizer = train_tokenizer(CAPTIONS, vocab_size=600, model_max_length=MAX_LENGTH)
        halves = {name: CLIP[name] | changes.get(name, {}) for name in ("text_config", "vision_config")}
        halves["text_config"] = {"eos_token_id": tokenizer.eos_token_id} | halves["text_config"]
        for half in halves.values():
            half["hidden_act"] = changes.get("hidden_act", "quick_gelu")
        model = transformers.CLIPModel(transformers.CLIPConfig(**halves, projection_dim=CLIP["projection_dim"]))
        side = CLIP["vision_config"]["image_size"]
        processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=side)
        os.makedirs(path, exist_ok=True)
        save_tokenizer(tokenizer, path)
    elif family == "dino":
        model = transformers.ViTModel(transformers.ViTConfig(**DINO | changes))
        side = DINO["image_size"]
        processor = transformers.ViTImageProcessorPil(size={"height": side, "width": side}, resample=3)
    else:
        model = transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**DINOV2 | changes))
        processor = transformers.BitImageProcessorPil(size={"shortest_edge": 36}, crop_size=32)
    randomise(model, seed=3)
    model.eval().save_pretrained(path)
    processor.save_pretrained(path)
    return model
