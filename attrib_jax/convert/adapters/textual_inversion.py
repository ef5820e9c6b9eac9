"""Learnt tokens (textual inversion): reading and writing their files, and adding them to a pipeline."""

import copy
import dataclasses
import functools
import os
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attrib_jax.convert.adapters.files import check_finite_as, open_adapter, read_floats, write_adapter
from attrib_jax.convert.pipeline import Pipeline, require_one_text_encoder
from attrib_jax.convert.weights.tensors import LazyTensor
from attrib_jax.core.weights import flatten_names, unflatten_names

_EMBEDDING = "text_model/embeddings/token_embedding/embedding"
_A1111 = "string_to_param."
_DELTA = "modifier_token."


def read_token_file(path: str) -> dict[str, np.ndarray]:
    """Reads a textual-inversion file -> {token: vector (d,) float32}.

    Forms, those of diffusers' TextualInversionLoaderMixin and one more:
      diffusers: `{"<new1>": tensor}`, with one entry or several, as PyTorch or safetensors file;
      the original code and AUTOMATIC1111: `{"string_to_param": {"*": tensor}, "name": token, ...}`, the inner one a
        dict or an `nn.ParameterDict`, whose other keys are tokens themselves; or safetensors `{"emb_params": tensor}`.
        A token without a name takes the file's;
      Custom Diffusion's delta file: the tokens of its `modifier_token`.
    A tensor (n, d) with n > 1 becomes n tokens, `token`, `token_1` and so on, as in diffusers; in a prompt `token`
    stands for all of them.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged, of another form, or holds a tensor that is no float vector.
    """
    path = os.fspath(path)
    tensors, plain = open_adapter(path)
    stem = os.path.splitext(os.path.basename(path))[0]
    if any(name.startswith(_A1111) for name in tensors):
        own = plain.get("name")
        anonymous = own if isinstance(own, str) and own else stem
        inner = {name.removeprefix(_A1111): x for name, x in tensors.items() if name.startswith(_A1111)}
        tensors = {anonymous if name == "*" else name: tensor for name, tensor in inner.items()}
    elif "emb_params" in tensors:
        tensors = {stem: tensors["emb_params"]}
    elif any(name.startswith(_DELTA) for name in tensors):
        tensors = split_tokens(tensors)[0]
    elif tensors.keys() & {"clip_l", "clip_g"}:
        raise ValueError(
            f"{path} is an embedding for Stable Diffusion XL ({', '.join(tensors)}); supported: SD 1 and 2"
        )
    return token_vectors(tensors, path)


def split_tokens(tensors: Mapping[str, LazyTensor]) -> tuple[dict[str, LazyTensor], dict[str, LazyTensor]]:
    """The tensors under `modifier_token` in a Custom Diffusion delta file, by token, and all others."""
    tokens = {name.removeprefix(_DELTA): tensor for name, tensor in tensors.items() if name.startswith(_DELTA)}
    return tokens, {name: tensor for name, tensor in tensors.items() if not name.startswith(_DELTA)}


def token_vectors(tensors: Mapping[str, LazyTensor], source: str) -> dict[str, np.ndarray]:
    """{token: tensor (d,) or (n, d)} -> {token: vector (d,) float32}, several vectors as `token`, `token_1`, ...

    Raises ValueError, naming the file `source`, for a tensor of another kind or a token that comes twice.
    """
    if not tensors:
        raise ValueError(f"{source} holds no learnt token; expected {{token: tensor}}")
    vectors = {}
    for token, tensor in tensors.items():
        if tensor.ndim not in (1, 2) or 0 in tensor.shape:
            raise ValueError(
                f"{source}: {token!r} has shape {tensor.shape}; expected a learnt token (d,), or n vectors (n, d)"
            )
        for i, row in enumerate(np.atleast_2d(read_floats(tensor, source, repr(token)))):
            name = f"{token}_{i}" if i else token
            if name in vectors:
                raise ValueError(f"{source} holds the token {name!r} twice, once among the vectors of another one")
            vectors[name] = row.astype(np.float32)
    return vectors


def add_tokens(pipeline: Pipeline, tokens: Mapping[str, Any]) -> Pipeline:
    """A pipeline whose prompts may hold new tokens, each with its own row of the text encoder's embedding.

    The tokenizer is a copy that got `tokenizer.add_tokens(list(tokens))`, so the ids are those of transformers and
    diffusers; the given pipeline stays as it is.

    Args:
      pipeline: the pipeline to extend.
      tokens: token -> vector (d,), d the text encoder's hidden size; see `read_token_file`.

    Raises:
      ValueError: a token is known already, would not be found in a prompt, or its vector has another width or holds a
        NaN or an infinity.
    """
    if not tokens:
        return pipeline
    require_one_text_encoder(pipeline, "a learnt token (textual inversion)", "leave it out (--tokens)")
    config = pipeline.text_encoder.config
    flat = flatten_names(pipeline.params["text_encoder"])
    table = flat[_EMBEDDING]
    vocabulary = pipeline.tokenizer.get_vocab()
    for token, vector in tokens.items():
        if not isinstance(token, str) or not token.strip():
            raise ValueError(f"tokens holds the name {token!r}; expected a text such as '<new1>'")
        if token in vocabulary:
            raise ValueError(f"token {token!r} is in the tokenizer already; add it once only, or rename it")
        if np.shape(vector) != (config.hidden_size,):
            raise ValueError(
                f"token {token!r} has a vector of shape {np.shape(vector)}, and this text encoder takes "
                f"({config.hidden_size},); give a token that was learnt with the same text encoder"
            )
        check_finite_as(np.asarray(vector), table.dtype, "tokens", repr(token))
    tokenizer = copy.deepcopy(pipeline.tokenizer)
    tokenizer.add_tokens(list(tokens))
    _check_found(tokenizer)
    ids = tokenizer.convert_tokens_to_ids(list(tokens))
    size = max(config.vocab_size, max(ids) + 1)
    vectors = np.stack([np.asarray(vector) for vector in tokens.values()]).astype(table.dtype)
    grown = _with_rows(table, np.array(ids), vectors, size)
    return dataclasses.replace(
        pipeline,
        tokenizer=tokenizer,
        text_encoder=pipeline.text_encoder.clone(config=dataclasses.replace(config, vocab_size=size)),
        params=pipeline.params | {"text_encoder": unflatten_names({**flat, _EMBEDDING: grown})},
    )


@functools.partial(jax.jit, static_argnames="size")
def _with_rows(table, ids, vectors, size: int) -> jax.Array:
    """The table (n, d) grown to `size` rows, with `vectors` at the rows `ids`; compiled, so that it is copied once."""
    grown = jnp.pad(table, ((0, size - len(table)), (0, 0)))
    return grown.at[ids].set(vectors)


def _check_found(tokenizer: Any) -> None:
    # Tokens that differ only in case or in blanks hide each other, those of before too: the tokenizer normalises both.
    for token, index in tokenizer.get_added_vocab().items():
        if token in tokenizer.all_special_tokens:
            continue
        found = list(tokenizer(token, add_special_tokens=False)["input_ids"])
        if found != [index]:
            raise ValueError(
                f"the tokenizer would not find the token {token!r} in a prompt, it reads "
                f"{tokenizer.convert_ids_to_tokens(found)}; choose names that differ in more than case and blanks"
            )


def read_tokens(pipeline: Pipeline, tokens: Iterable[str]) -> dict[str, np.ndarray]:
    """The text encoder's rows of tokens that were added to the pipeline -> {token: (d,) float32}.

    Raises ValueError for a token that was not.
    """
    if isinstance(tokens, str):
        raise TypeError(f"tokens={tokens!r} is one string; give a list of tokens")
    table = flatten_names(pipeline.params["text_encoder"])[_EMBEDDING]
    added = pipeline.tokenizer.get_added_vocab()
    vectors = {}
    for token in tokens:
        if token not in added:
            raise ValueError(f"token {token!r} was not added to the pipeline; added tokens: {', '.join(sorted(added))}")
        vectors[token] = np.asarray(table[added[token]], np.float32)
    return vectors


def write_token_file(token: str, vector: np.ndarray, path: str) -> None:
    """Writes `{token: vector}`, which `read_token_file` and diffusers' `load_textual_inversion` read.

    A path that ends in `.safetensors` gives that format, any other a PyTorch file.
    """
    write_adapter({token: np.asarray(vector, np.float32)}, path)
