"""Models by their Hugging Face id. The only library code that touches the network, and only when it is called."""

import logging
import os
import posixpath
import re
from collections.abc import Callable, Collection
from typing import Any

from attrib_jax.convert.diffusers_folder import INDEX, SCHEDULER_CONFIG, STEMS, check_configs
from attrib_jax.convert.weights.files import choose_weights

_log = logging.getLogger(__name__)

_CONFIG = "config.json"
_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*)(@(?P<revision>[^@\s]+))?")
_TIMEOUT = 10.0  # seconds that the hub has to answer before the cache is used


def resolve_model(
    name: str | os.PathLike,
    variant: str | None = None,
    cache_dir: str | None = None,
    replaced: Collection[str] = (),
) -> str:
    """The local path of a model: a path as it is, a Hugging Face id downloaded or taken from the cache.

    Of a repository only the files that `load_pipeline` reads are downloaded: the jsons, the tokenizer, and of the
    weights of each part one variant, safetensors where they are there. The jsons come first: of a model that they show
    to be of another family nothing else is downloaded. Where the hub cannot be reached (or
    HF_HUB_OFFLINE is set), what huggingface_hub's cache holds is taken.

    Args:
      name: a folder or file that exists, or `owner/name`, or `owner/name@revision`.
      variant: variant of the weight files, such as "fp16".
      cache_dir: huggingface_hub's cache, if it is not where HF_HOME says.
      replaced: parts, as the folder calls them, that another one stands in for: they are not downloaded.

    Raises:
      FileNotFoundError: there is no such path, and no such model on the hub or in the cache.
      ValueError: the repository holds no pipeline in the diffusers layout, one that is not supported (see
        `check_configs`), or huggingface_hub is not installed.
    """
    return _resolve(
        name,
        "a folder in the diffusers layout, a single-file checkpoint",
        INDEX,
        lambda names: _wanted_configs(names, os.fspath(name), replaced),
        lambda folder: check_configs(folder, replaced),
        lambda names: _wanted_weights(names, variant, os.fspath(name), replaced),
        cache_dir,
    )


def resolve_tower(
    name: str | os.PathLike, cache_dir: str | None = None, check: Callable[[str], Any] = lambda folder: None
) -> str:
    """The local path of a feature tower in the transformers layout; as `resolve_model`, whose errors it raises.

    `check` gets the folder once the jsons have arrived, and raises where nothing else is to be downloaded.
    """
    return _resolve(
        name,
        "a folder in the transformers layout",
        _CONFIG,
        lambda names: _wanted_tower_configs(names, os.fspath(name)),
        check,
        lambda names: _wanted_tower_weights(names, os.fspath(name)),
        cache_dir,
    )


def _resolve(
    name: str | os.PathLike,
    forms: str,
    index: str,
    configs_of: Callable[[Collection[str]], list[str]],
    check: Callable[[str], Any],
    weights_of: Callable[[Collection[str]], list[str]],
    cache_dir: str | None,
) -> str:
    name = os.fspath(name)
    if os.path.exists(name):
        return name
    match = _ID.fullmatch(name)
    if match is None:
        raise FileNotFoundError(f"model {name!r} does not exist; give {forms} or a Hugging Face id (owner/name)")
    try:
        import huggingface_hub
        from huggingface_hub.errors import HTTPError  # of its HTTP library, which differs between versions
    except ImportError as error:
        raise ValueError(f"model {name!r} is no path here; to download one: pip install huggingface_hub") from error
    repo, revision = match["repo"], match["revision"]
    try:
        info = huggingface_hub.HfApi().model_info(repo, revision=revision, timeout=_TIMEOUT)
    except (OSError, HTTPError) as error:
        return _cached(name, repo, revision, cache_dir, index, error)
    names = {sibling.rfilename for sibling in info.siblings or ()}

    def download(patterns: list[str]) -> str:
        try:
            return huggingface_hub.snapshot_download(
                repo, revision=revision, cache_dir=cache_dir, allow_patterns=patterns, etag_timeout=_TIMEOUT
            )
        except (OSError, HTTPError) as error:
            raise ConnectionError(
                f"the download of model {name!r} broke off ({_reason(error)}); try again, what has arrived is kept"
            ) from error

    configs = configs_of(names)
    check(download(configs))
    return download([*configs, *weights_of(names)])


def _cached(name: str, repo: str, revision: str | None, cache_dir: str | None, index: str, error: Exception) -> str:
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(
            repo, revision=revision, cache_dir=cache_dir, allow_patterns=[index], local_files_only=True
        )
    except OSError:
        raise FileNotFoundError(
            f"model {name!r} is no path here, not in the Hugging Face cache, and cannot be downloaded "
            f"({_reason(error)}); download it on a machine with network access, or give a folder"
        ) from error
    _log.warning("model %s: using the cached copy, the hub does not give it (%s)", name, _reason(error))
    return folder


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _wanted_configs(names: Collection[str], source: str, replaced: Collection[str]) -> list[str]:
    """The small files of a pipeline among the files `names`, as names and glob patterns."""
    if INDEX not in names:
        if _CONFIG in names:  # a part of a pipeline, or another library's model: its config says which
            return [_CONFIG]
        raise ValueError(
            f"Hugging Face model {source!r} has no {INDEX}: it is no pipeline in the diffusers layout. Download "
            "the file that you want, and give its path"
        )
    wanted = [INDEX]
    wanted += [] if "scheduler" in replaced else [f"scheduler/{SCHEDULER_CONFIG}"]
    folders = {posixpath.dirname(file) for file in names}
    kept = [part for part in (*STEMS, "tokenizer", "tokenizer_2") if part not in replaced]
    # Not every model has second ones.
    kept = [part for part in kept if not part.endswith("_2") or part in folders]
    for part in kept:
        wanted += [f"{part}/*.json", f"{part}/*.txt"] if part.startswith("tokenizer") else [f"{part}/{_CONFIG}"]
    return wanted


def _wanted_weights(names: Collection[str], variant: str | None, source: str, replaced: Collection[str]) -> list[str]:
    """The weight files of a pipeline to download, as names and glob patterns."""
    kept = [part for part in STEMS if part not in replaced]
    parts = {part: [posixpath.basename(n) for n in names if posixpath.dirname(n) == part] for part in kept}
    if not parts.get("text_encoder_2"):
        parts.pop("text_encoder_2", None)
    chosen = choose_weights(parts, variant, f"Hugging Face model {source!r}")
    wanted = []
    for part, weights in chosen.items():
        if weights is not None:
            wanted += [f"{part}/{file}" for file in (weights, *_shards(weights))]
    return wanted


def _wanted_tower_configs(names: Collection[str], source: str) -> list[str]:
    if _CONFIG not in names:
        raise ValueError(f"Hugging Face model {source!r} has no {_CONFIG}: it is no transformers model")
    return ["*.json", "*.txt"]


def _wanted_tower_weights(names: Collection[str], source: str) -> list[str]:
    top = [name for name in names if "/" not in name]
    # Weight files of transformers are named alike for every model.
    (weights,) = choose_weights({"text_encoder": top}, None, f"Hugging Face model {source!r}").values()
    return [] if weights is None else [weights, *_shards(weights)]


def _shards(index: str) -> tuple[str, ...]:
    """Glob patterns of the shards of an index, with the variant at either of the places that have been in use.

    None for a file that is no index.
    """
    if not index.endswith(".json"):
        return ()
    stem, suffix, *rest = index.removesuffix(".json").split(".")
    number = "-?????-of-?????"
    variants = [word for word in rest if word != "index"]
    if not variants:
        return (f"{stem}{number}.{suffix}",)
    return (f"{stem}.{variants[0]}{number}.{suffix}", f"{stem}{number}.{variants[0]}.{suffix}")
