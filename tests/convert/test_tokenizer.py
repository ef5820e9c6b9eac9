"""Training a CLIP tokenizer, its folder, and what it reports about a prompt."""

import json
import os
import pathlib

import numpy as np
import pytest
import transformers

from attrib_jax.convert.tokenizer import (
    inspect_prompt,
    load_tokenizer,
    save_tokenizer,
    tokenize_prompts,
    train_tokenizer,
)

CAPTIONS = ["Red heart", "grinning face", "a polar bear: white", "woman’s hat", "flag: Côte d'Ivoire", "keycap 10"]
PROMPTS = [*CAPTIONS, "", "A RED   bear, 3 жук 😀", "grinning bear " * 9]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(CAPTIONS, vocab_size=700, model_max_length=8)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    path = str(tmp_path_factory.mktemp("tokenizer"))
    save_tokenizer(tokenizer, path)
    return path


def test_caption_words_become_single_tokens_and_case_is_folded(tokenizer):
    assert tokenizer.tokenize("GRINNING polar Heart") == ["grinning</w>", "polar</w>", "heart</w>"]


def test_ids_are_framed_and_padded_with_the_end_token(tokenizer):
    ids = tokenize_prompts(tokenizer, ["red heart", ""])
    vocab = tokenizer.get_vocab()
    end = len(tokenizer) - 1
    expected = [end - 1, vocab["red</w>"], vocab["heart</w>"], *[end] * 5]
    assert ids.dtype == np.int32
    assert ids.tolist() == [expected, [end - 1, *[end] * 7]]


def test_training_does_not_depend_on_hash_order(tokenizer):
    again = train_tokenizer(CAPTIONS, vocab_size=700, model_max_length=8)
    left, right = (json.loads(side.backend_tokenizer.to_str())["model"] for side in (again, tokenizer))
    assert left["merges"] == right["merges"]
    assert left["vocab"] == right["vocab"]


def test_vocabulary_size_is_a_limit():
    assert len(train_tokenizer(CAPTIONS, vocab_size=540, model_max_length=8)) == 540


@pytest.mark.parametrize("files", [("tokenizer.json", "tokenizer_config.json"), ("vocab.json", "merges.txt")])
def test_folder_round_trip_through_either_format(tokenizer, folder, tmp_path, files):
    for name in files:
        os.link(os.path.join(folder, name), tmp_path / name)
    expected = tokenizer(PROMPTS)["input_ids"]
    assert load_tokenizer(str(tmp_path))(PROMPTS)["input_ids"] == expected
    assert transformers.CLIPTokenizer.from_pretrained(str(tmp_path))(PROMPTS)["input_ids"] == expected


def test_folder_keeps_the_length_and_says_nothing_of_how_it_was_loaded(folder, tmp_path):
    loaded = load_tokenizer(folder)
    assert loaded.model_max_length == 8
    tokenize_prompts(loaded, PROMPTS)
    save_tokenizer(loaded, str(tmp_path))
    for name in os.listdir(folder):
        assert (tmp_path / name).read_bytes() == pathlib.Path(folder, name).read_bytes(), name
    assert "local_files_only" not in json.loads((tmp_path / "tokenizer_config.json").read_text())


def test_report_of_a_prompt_that_fits(tokenizer):
    assert inspect_prompt(tokenizer, "A red bear") == ("A red bear", "", (), ())


def test_report_says_what_is_cut(tokenizer):
    report = inspect_prompt(tokenizer, "red red red Red polar heart BEAR, woman")
    assert (report.kept, report.truncated) == ("red red red Red polar heart", "BEAR, woman")
    assert (
        tokenize_prompts(tokenizer, [report.kept]).tolist()
        == tokenize_prompts(tokenizer, [report.kept + " " + report.truncated]).tolist()
    )


def test_report_says_which_words_are_spelled_from_pieces(tokenizer):
    report = inspect_prompt(tokenizer, "red zebra face zebra 😀")
    assert report.unknown == ()
    assert report.split == ("zebra", "😀")


def test_report_says_which_words_the_vocabulary_cannot_write():
    vocab = ["a</w>", "b", "b</w>", "<|startoftext|>", "<|endoftext|>"]
    tokenizer = transformers.CLIPTokenizer(vocab={t: i for i, t in enumerate(vocab)}, merges=[], model_max_length=8)
    report = inspect_prompt(tokenizer, "a xa b xa <|endoftext|>")
    assert report.unknown == ("xa",)
    assert report.split == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([" "], 600, 8), "captions holds no text"),
        ((CAPTIONS, 513, 8), "vocab_size=513.*at least 514"),
        ((CAPTIONS, 600, 2), "model_max_length=2.*3 or more"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        train_tokenizer(*arguments)


def test_one_string_is_no_list_of_prompts(tokenizer):
    with pytest.raises(TypeError, match="'red heart' is one string"):
        tokenize_prompts(tokenizer, "red heart")


def test_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer: expected tokenizer\.json"):
        load_tokenizer(str(tmp_path))
