"""What a model and a query are: fingerprints that stages compare, and the names of queries' folders."""

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from attrib_jax.convert.pipeline import Pipeline
from attrib_jax.convert.tokenizer import tokenizer_parts
from attrib_jax.core.fingerprint import params_fingerprint
from attrib_jax.jobs.query import Query


def model_fingerprint(pipeline: Pipeline) -> str:
    """sha256 of all that decides what a model computes: weights, configs, schedule and tokenizer."""
    configs = {
        "unet": pipeline.unet.config.to_dict(),
        "vae": pipeline.vae.config.to_dict(),
        "text_encoder": pipeline.text_encoder.config.to_dict(),
        "schedule": pipeline.schedule.to_config(),
        "max_tokens": pipeline.tokenizer.model_max_length,
        **tokenizer_parts(pipeline.tokenizer),
    }
    text = params_fingerprint(pipeline.params) + json.dumps(configs, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def check_query_name(name: str) -> None:
    """Raises ValueError unless `name` can name a query's folder."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]*\w[\w.-]*", name):
        raise ValueError(f"query_name is {name!r}; expected letters, digits, '.', '_' and '-', as in a file name")


def query_name(query: Query, settings: dict[str, Any]) -> str:
    """Folder name of a query: its prompt, its seed if generated, and a digest of every setting."""
    slug = re.sub(r"[^a-z0-9]+", "-", query.prompt.lower()).strip("-")[:40] or "empty-prompt"
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    origin = "latents" if query.latents is not None else f"seed{query.seed}" if query.image is None else "picture"
    return f"{slug}-{origin}-{digest}"


def query_settings(query: Query) -> dict[str, Any]:
    """What decides a query as JSON values; of pictures and arrays their content.

    Raises FileNotFoundError where its picture does not exist.
    """
    settings = {field.name: getattr(query, field.name) for field in dataclasses.fields(query)}
    given = {name: value for name in ("image", "latents", "text") if (value := settings.pop(name)) is not None}
    if not {"image", "latents"} & given.keys():
        return settings
    content = {
        name: np.ascontiguousarray(value).tobytes() if isinstance(value, np.ndarray) else Path(value).read_bytes()
        for name, value in given.items()
    }
    return {"prompt": query.prompt} | {name: hashlib.sha256(value).hexdigest() for name, value in content.items()}
