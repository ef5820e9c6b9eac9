"""CLIP tokenizers: training a small one on captions, reading and writing its folder, and saying what a prompt loses.

`transformers` and `tokenizers` are imported inside the functions: importing the library stays light.
"""

import itertools
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from attrib_jax.convert.config_files import read_json, write_json
from attrib_jax.core.fingerprint import json_digest
from attrib_jax.core.text import replace_surrogates
from attrib_jax.models.clip import CLIPTextConfig, CLIPTextProjectionConfig

_log = logging.getLogger(__name__)

START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
# What Stable Diffusion 2, and the second text encoder of Stable Diffusion XL, were trained to see after a text.
SECOND_PADDING = "!"
_CONFIG, _SPECIAL, _ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
_CLIP_END = 49407  # id of the end token in CLIP's own vocabulary
_LONGEST = 10**6  # a `model_max_length` beyond this is transformers' way to say that none was given


class PromptReport(NamedTuple):
    """What a tokenizer makes of one prompt, in which a learnt token of several vectors is written out.

    Attributes:
      kept: the part of the prompt that the text encoder sees.
      truncated: the rest, cut off because it lies beyond `model_max_length` tokens; empty when all of it fits.
      unknown: the words that hold a character missing from the vocabulary, in their order.
      split: the words that are spelled from two or more vocabulary pieces, so rare or absent in the training captions.
    """

    kept: str
    truncated: str
    unknown: tuple[str, ...]
    split: tuple[str, ...]


def train_tokenizer(captions: Iterable[str], vocab_size: int, model_max_length: int) -> Any:
    """Trains a lower-case byte-level BPE `transformers.CLIPTokenizer` on captions.

    The vocabulary is laid out as CLIP's: 256 bytes, the same with the word-end suffix, the learnt merges, then
    `<|startoftext|>` and `<|endoftext|>` (which also pads). Every byte is in it, so any prompt can be written.

    Args:
      captions: the training texts.
      vocab_size: the largest vocabulary, at least 514; smaller when the captions hold fewer merges.
      model_max_length: tokens in an encoded prompt, both special tokens counted.

    Raises:
      ValueError: `vocab_size` is under 514, `model_max_length` under 3, or there are no captions.
    """
    from tokenizers import pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    captions = list(captions)
    if not any(caption.strip() for caption in captions):
        raise ValueError("captions holds no text; give at least one caption to train the tokenizer on")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = letters + [letter + WORD_END for letter in letters]
    if vocab_size < len(base) + 2:
        raise ValueError(f"vocab_size={vocab_size} leaves no room for the bytes; give at least {len(base) + 2}")
    if model_max_length < 3:
        raise ValueError(
            f"model_max_length={model_max_length} holds no word between the special tokens; give 3 or more"
        )

    blank = CLIPTokenizer(vocab={token: i for i, token in enumerate([*base, START, END])}, merges=[])
    # The word-end forms go in as special tokens because the trainer otherwise numbers them in a hash table's order, and
    # that number breaks ties between merges.
    trainer = trainers.BpeTrainer(
        vocab_size=len(base) + vocab_size,
        min_frequency=1,
        show_progress=False,
        special_tokens=base[len(letters) :],
        initial_alphabet=letters,
        end_of_word_suffix=WORD_END,
    )
    blank.backend_tokenizer.train_from_iterator(captions, trainer)
    learnt = json.loads(blank.backend_tokenizer.to_str())["model"]["merges"]

    tokens = dict.fromkeys(base)
    merges: list[Any] = []
    for left, right in learnt:
        if left + right not in tokens and len(tokens) + 2 >= vocab_size:
            break
        tokens[left + right] = None
        merges.append((left, right))
    vocab = {token: i for i, token in enumerate([*tokens, START, END])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=model_max_length)


def save_tokenizer(tokenizer: Any, path: str) -> None:
    """Writes `tokenizer` to a folder, the files of older transformers included (vocab.json and others)."""
    try:
        tokenizer.save_pretrained(path)
    except OSError:
        raise
    except Exception as error:  # of the tokenizers library, which also reports a full disk so
        raise OSError(f"{path} cannot be written: {error}") from error
    # transformers also saves how the tokenizer was loaded, and the padding and truncation of its last call.
    _rewrite_json(os.path.join(path, _CONFIG), drop=("is_local", "local_files_only"))
    _rewrite_json(os.path.join(path, "tokenizer.json"), drop=("padding", "truncation"))
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    with open(os.path.join(path, "vocab.json"), "w", encoding="utf-8") as file:
        json.dump(model["vocab"], file, ensure_ascii=False)
    merges = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
    with open(os.path.join(path, "merges.txt"), "w", encoding="utf-8") as file:
        file.write("#version: 0.2\n" + "".join(f"{pair}\n" for pair in merges))
    added = {token: index for token, index in tokenizer.get_added_vocab().items() if token not in model["vocab"]}
    if added:
        write_json(added, os.path.join(path, _ADDED))


def _rewrite_json(path: str, drop: tuple[str, ...]) -> None:
    with open(path, encoding="utf-8") as file:
        content = json.load(file)
    with open(path, "w", encoding="utf-8") as file:
        kept = {key: value for key, value in content.items() if key not in drop}
        json.dump(kept, file, ensure_ascii=False, indent=2)


def load_tokenizer(path: str, max_length: int | None = None) -> Any:
    """Reads a `transformers.CLIPTokenizer` from a folder; touches no network.

    Args:
      path: a folder with tokenizer.json, or with vocab.json and merges.txt; or a pipeline folder, with such a
        tokenizer/ in it. tokenizer_config.json, special_tokens_map.json (whose padding token has the last word, as
        Stable Diffusion 2 needs it) and added_tokens.json are read where they are there.
      max_length: the text encoder's number of positions, taken where the folder does not say `model_max_length`.

    Raises:
      FileNotFoundError: the folder holds no tokenizer.
      ValueError: a file of it is damaged, it has no start, end or padding token, or an added token would not get the id
        that the files give it.
    """
    from transformers import CLIPTokenizer

    inner = os.path.join(path, "tokenizer")
    path = inner if os.path.isdir(inner) else path
    present = set(os.listdir(path)) if os.path.isdir(path) else set()
    if "tokenizer.json" not in present and not {"vocab.json", "merges.txt"} <= present:
        raise FileNotFoundError(f"{path} holds no tokenizer: expected tokenizer.json, or vocab.json and merges.txt")
    files = {name: read_json(os.path.join(path, name)) for name in (_CONFIG, _SPECIAL, _ADDED) if name in present}
    _check_files(path, files)
    # transformers would take any argument of the tokenizer from here, the paths of files included.
    foreign = sorted(key for key in files.get(_SPECIAL, ()) if not key.endswith(("_token", "_tokens")))
    if foreign:
        raise ValueError(f"{path}/{_SPECIAL} has the entries {foreign}; expected special tokens only")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # among other kinds, the tokenizers library raises Exception itself
        raise ValueError(
            f"tokenizer {path} cannot be read ({type(error).__name__}: {error}); copy or download it again"
        ) from error
    for name in ("bos_token", "eos_token", "pad_token"):
        if getattr(tokenizer, name) is None:
            raise ValueError(f"tokenizer {path} has no {name}; set it in {_CONFIG}")
    # transformers numbers added tokens without a gap, whatever the files say: another number is another embedding.
    decoder = files.get(_CONFIG, {}).get("added_tokens_decoder") or {}
    stated = {entry["content"]: int(index) for index, entry in decoder.items()} or files.get(_ADDED, {})
    for token, index in stated.items():
        actual = tokenizer.convert_tokens_to_ids(token)
        if actual != index:
            raise ValueError(
                f"tokenizer {path}: its files give {token!r} the id {index!r}, but it comes out as {actual}"
            )
    if max_length is not None and tokenizer.model_max_length > _LONGEST:
        tokenizer.model_max_length = max_length
    return tokenizer


def _check_files(path: str, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises ValueError, naming file, key and value, where an entry of the tokenizer's json files has a wrong type."""
    for name in files.keys() & {_CONFIG, _SPECIAL}:
        # A special token is its text, or an object that holds it.
        for key, value in files[name].items():
            text = value.get("content") if isinstance(value, dict) else value
            if key in _TOKENS and value is not None and not (isinstance(text, str) and text):
                raise ValueError(f"{path}/{name}: {key} is {value!r}; expected the text of a token")
    config = files.get(_CONFIG, {})
    length = config.get("model_max_length", 3)
    # transformers writes int(1e30) where there is no limit.
    if isinstance(length, bool) or not isinstance(length, int | float) or not length >= 3 or length % 1:
        raise ValueError(
            f"{path}/{_CONFIG}: model_max_length is {length!r}; expected a whole number of at least 3 tokens"
        )
    added = config.get("added_tokens_decoder")
    if added is not None:
        entries = added.items() if isinstance(added, dict) else [("", None)]
        for index, entry in entries:
            content = entry.get("content") if isinstance(entry, dict) else None
            if not index.isdecimal() or not isinstance(content, str):
                raise ValueError(
                    f"{path}/{_CONFIG}: added_tokens_decoder is {added!r}; expected an id, and an object with the "
                    "content, for each token"
                )
    for token, index in files.get(_ADDED, {}).items():
        if isinstance(index, bool) or not isinstance(index, int) or index < 0:
            raise ValueError(f"{path}/{_ADDED}: the id of {token!r} is {index!r}; expected a whole number")


def check_padding(tokenizer: Any, config: CLIPTextConfig, source: str, expected: str | None = None) -> None:
    """Checks that a tokenizer which does not come with its text encoder pads as the text encoder was trained.

    Stable Diffusion 2 (whose encoder has the exact GELU) pads with `!`, Stable Diffusion 1 with `<|endoftext|>`; the
    text states of one padded as the other differ by up to 2.4.

    Args:
      tokenizer: the tokenizer.
      config: config of the text encoder.
      source: folder of the tokenizer, for the message.
      expected: the padding token that the model was trained with; None where it is known by the family alone. Then a
        mismatch is an error with CLIP's own vocabulary, and is logged with another one.

    Raises ValueError that names the tokenizer that belongs.
    """
    is_second = config.hidden_act == "gelu"
    usual, other = (SECOND_PADDING, END) if is_second else (END, SECOND_PADDING)
    found = tokenizer.pad_token
    if found == expected or (expected is None and found != other):
        return
    if expected is not None:
        raise ValueError(
            f"tokenizer {source} pads with {found!r}, but the model was written with one that pads with {expected!r}; "
            "give that one (--tokenizer)"
        )
    family = "Stable Diffusion 2" if is_second else "Stable Diffusion 1"
    folder = "stabilityai/stable-diffusion-2-1" if is_second else "CompVis/stable-diffusion-v1-4"
    if isinstance(config, CLIPTextProjectionConfig):
        family, folder = "Stable Diffusion XL (tokenizer_2)", "stabilityai/stable-diffusion-xl-base-1.0"
    message = (
        f"tokenizer {source} pads with {found!r}, but the text encoder is that of {family}, which pads with {usual!r}: "
        f"give the tokenizer of {family} (--tokenizer; tokenizer/ of {folder}), or set pad_token in its {_SPECIAL}"
    )
    if tokenizer.convert_tokens_to_ids(END) == _CLIP_END:
        raise ValueError(message)
    _log.warning("%s", message)


def tokenize_prompts(tokenizer: Any, prompts: Sequence[str]) -> np.ndarray:
    """Prompts -> input_ids (B, model_max_length) int32, cut and padded as Stable Diffusion does.

    A learnt token of several vectors, `<a>` with `<a>_1` and so on, stands for all of them, as in diffusers. Half a
    surrogate pair, which JSON can escape, counts as '?'.
    """
    if isinstance(prompts, str):
        raise TypeError(f"prompts={prompts!r} is one string; give a list of prompts")
    prompts = _with_all_vectors(tokenizer, [replace_surrogates(prompt) for prompt in prompts])
    encoded = tokenizer(
        prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="np"
    )
    return np.asarray(encoded["input_ids"], np.int32)


def _with_all_vectors(tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """Prompts in which each added token `<a>` of several vectors is written out as `<a> <a>_1 <a>_2 ...`.

    Follows diffusers' TextualInversionLoaderMixin.maybe_convert_prompt, which replaces text wherever it stands: in a
    prompt that spells all of them out too. Where the name of one such token is part of another's, diffusers' result
    depends on the order of a set; here the token that comes first in the prompt is replaced first.
    """
    added = tokenizer.get_added_vocab()
    several = {token for token in added if f"{token}_1" in added}
    written = list(prompts)
    if not several:
        return written
    for position, prompt in enumerate(prompts):
        # The length is set only because transformers warns about a long prompt where there is none.
        for token in dict.fromkeys(tokenizer.tokenize(prompt, max_length=2**30)):
            if token in several:
                further = itertools.takewhile(added.__contains__, (f"{token}_{i}" for i in itertools.count(1)))
                written[position] = written[position].replace(token, " ".join([token, *further]))
    return written


def tokenize_captions(tokenizer: Any, captions: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
    """The captions of N images, each with one or more -> input_ids (N, most captions, L) int32 and their number (N,).

    An image with fewer captions repeats its first one.
    """
    most = max(map(len, captions))
    padded = [text for row in captions for text in [*row, *[row[0]] * (most - len(row))]]
    input_ids = tokenize_prompts(tokenizer, padded).reshape(len(captions), most, -1)
    return input_ids, np.array([len(row) for row in captions], np.int32)


def inspect_prompt(tokenizer: Any, prompt: str) -> PromptReport:
    """Says what `tokenizer` keeps of `prompt`, what it cuts, and which words it does not know whole."""
    (prompt,) = _with_all_vectors(tokenizer, [replace_surrogates(prompt)])
    # The length is set only because transformers warns about a long prompt where there is none.
    encoded = tokenizer(
        prompt, add_special_tokens=False, truncation=False, max_length=2**30, return_offsets_mapping=True
    )
    ids, spans = encoded["input_ids"], encoded["offset_mapping"]
    starts = [start for start, _ in spans[tokenizer.model_max_length - 2 :]]
    cut = starts[0] if starts else len(prompt)
    unknown, split = [], []
    for _, group in itertools.groupby(zip(encoded.word_ids(0), ids, spans, strict=True), key=lambda item: item[0]):
        _, word_ids, word_spans = zip(*group, strict=True)
        word = prompt[word_spans[0][0] : word_spans[-1][1]]
        if word in (START, END):
            continue
        if tokenizer.unk_token_id in word_ids:
            unknown.append(word)
        elif len(word_ids) > 1:
            split.append(word)
    return PromptReport(prompt[:cut].rstrip(), prompt[cut:], tuple(dict.fromkeys(unknown)), tuple(dict.fromkeys(split)))


def tokenizer_fingerprint(tokenizer: Any, added: bool = True) -> str:
    """sha256 of what decides a text's tokens, but for their number; without the `added` tokens, those of its base."""
    parts = tokenizer_parts(tokenizer)
    if not added:
        parts.pop("added_tokens", None)
    return json_digest(parts)


def tokenizer_parts(tokenizer: Any) -> dict[str, Any]:
    """What decides a text's tokens, but for their number, as JSON values."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    parts = {"tokenizer": {part: backend[part] for part in ("model", "normalizer", "pre_tokenizer", "post_processor")}}
    # Added tokens have no place in the vocabulary, and Stable Diffusion 2 pads with another token than the last. Where
    # there are none, and one is both, a fingerprint is what it was before these were in it.
    added = {token["content"]: token["id"] for token in backend["added_tokens"] if not token["special"]}
    if added:
        parts["added_tokens"] = added
    if tokenizer.pad_token_id != tokenizer.eos_token_id:
        parts["pad_token"] = tokenizer.pad_token_id
    return parts
