"""Training a CLIP tokenizer, its folder, and what it reports about a prompt."""

import json
import os
import pathlib

import hypothesis
import numpy as np
import pytest
import transformers
from hypothesis import strategies as st

from attrib_jax.convert.tokenizer import (
    inspect_prompt,
    load_tokenizer,
    save_tokenizer,
    tokenize_prompts,
    train_tokenizer,
)
from tests.convert import old_layout
from tests.convert.files import altered
from tests.convert.published_configs import later_tokenizer_config, special_tokens_map

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


def test_caption_words_become_single_tokens_framed_and_padded_with_the_end_token(tokenizer):
    assert tokenizer.tokenize("GRINNING polar Heart") == ["grinning</w>", "polar</w>", "heart</w>"]
    ids, vocab, end = tokenize_prompts(tokenizer, ["red heart", ""]), tokenizer.get_vocab(), len(tokenizer) - 1
    assert ids.dtype == np.int32
    assert ids.tolist() == [[end - 1, vocab["red</w>"], vocab["heart</w>"], *[end] * 5], [end - 1, *[end] * 7]]


def test_training_does_not_depend_on_hash_order(tokenizer):
    again = train_tokenizer(CAPTIONS, vocab_size=700, model_max_length=8)
    left, right = (json.loads(side.backend_tokenizer.to_str())["model"] for side in (again, tokenizer))
    assert (left["merges"], left["vocab"]) == (right["merges"], right["vocab"])
    assert len(train_tokenizer(CAPTIONS, vocab_size=540, model_max_length=8)) == 540  # a limit


@pytest.mark.parametrize("files", [("tokenizer.json", "tokenizer_config.json"), ("vocab.json", "merges.txt")])
def test_folder_round_trip_through_either_format(tokenizer, folder, tmp_path, files):
    for name in files:
        os.link(os.path.join(folder, name), tmp_path / name)
    expected = tokenizer(PROMPTS)["input_ids"]
    assert load_tokenizer(str(tmp_path))(PROMPTS)["input_ids"] == expected
    assert transformers.CLIPTokenizer.from_pretrained(str(tmp_path))(PROMPTS)["input_ids"] == expected


def test_folder_keeps_the_length_and_says_nothing_of_how_it_was_loaded(folder, tmp_path):
    loaded = load_tokenizer(folder)
    assert loaded.model_max_length == 8 and tokenize_prompts(loaded, PROMPTS).shape == (len(PROMPTS), 8)
    save_tokenizer(loaded, str(tmp_path))
    for name in os.listdir(folder):
        assert (tmp_path / name).read_bytes() == pathlib.Path(folder, name).read_bytes(), name
    assert "local_files_only" not in old_layout.read(tmp_path / "tokenizer_config.json")


@pytest.mark.parametrize(
    ("prompt", "report"),
    [
        ("A red bear", ("A red bear", "", (), ())),
        ("red red red Red polar heart BEAR, woman", ("red red red Red polar heart", "BEAR, woman", (), ())),
        ("red zebra face zebra 😀", ("red zebra", "face zebra 😀", (), ("zebra", "😀"))),
    ],
)
def test_report_says_what_is_cut_and_spelled_from_pieces(tokenizer, prompt, report):
    assert inspect_prompt(tokenizer, prompt) == report
    assert tokenize_prompts(tokenizer, [report[0]]).tolist() == tokenize_prompts(tokenizer, [prompt]).tolist()


def test_report_says_which_words_the_vocabulary_cannot_write():
    vocab = {t: i for i, t in enumerate(["a</w>", "b", "b</w>", "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=8)
    report = inspect_prompt(tokenizer, "a xa b xa <|endoftext|>")
    assert (report.unknown, report.split) == (("xa",), ())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([" "], 600, 8), "captions"),
        ((CAPTIONS, 513, 8), "vocab_size=513.*514"),
        ((CAPTIONS, 600, 2), "model_max_length=2.*3"),
    ],
)
def test_bad_arguments(tokenizer, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        train_tokenizer(*arguments)
    with pytest.raises(TypeError, match="'red heart'"):
        tokenize_prompts(tokenizer, "red heart")
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}.*tokenizer\.json"):
        load_tokenizer(str(tmp_path))


def test_half_a_surrogate_pair_counts_as_a_question_mark(tokenizer):
    halves, marks = ["red \ud83d heart\udc00", "a\ud83d", "😀 é"], ["red ? heart?", "a?", "😀 é"]
    np.testing.assert_array_equal(tokenize_prompts(tokenizer, halves), tokenize_prompts(tokenizer, marks))
    assert inspect_prompt(tokenizer, halves[0]) == inspect_prompt(tokenizer, marks[0])


@pytest.fixture(scope="module")
def long_folder(tmp_path_factory):
    """A tokenizer with the 77 tokens of CLIP."""
    path = tmp_path_factory.mktemp("long") / "tokenizer"
    save_tokenizer(train_tokenizer(CAPTIONS, vocab_size=700, model_max_length=77), str(path))
    return path


FORMS = (
    "published",
    "published, no config",
    "published beside tokenizer.json",
    "transformers 4.34",
    "tokenizer.json alone",
)


def in_form(form, generation, source, target):
    """A copy of a tokenizer folder with the files of one age."""
    folder = old_layout.copy_folder(source, target)
    if form == "tokenizer.json alone":
        for name in ("vocab.json", "merges.txt"):
            (folder / name).unlink()
        old_layout.write(folder / "special_tokens_map.json", special_tokens_map(generation))
        return folder
    size, content = len(old_layout.read(folder / "vocab.json")), (folder / "tokenizer.json").read_bytes()
    old_layout.age_tokenizer(folder, generation)
    if form == "published, no config":
        (folder / "tokenizer_config.json").unlink()
    elif form == "published beside tokenizer.json":
        (folder / "tokenizer.json").write_bytes(content)
    elif form == "transformers 4.34":
        old_layout.write(folder / "tokenizer_config.json", later_tokenizer_config(generation, size - 2, size - 1))
    return folder


@pytest.mark.parametrize("generation", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_ids_of_both_generations_from_files_of_every_age(long_folder, tmp_path, form, generation):
    """Stable Diffusion 1 pads with <|endoftext|>, 2 with ! (id 0), which then is one token wherever it stands."""
    loaded = load_tokenizer(str(in_form(form, generation, long_folder, tmp_path / "tokenizer")), max_length=77)
    vocab = old_layout.read(long_folder / "vocab.json")
    start, end = len(vocab) - 2, len(vocab) - 1
    assert (vocab["<|startoftext|>"], vocab["<|endoftext|>"], vocab["!"]) == (start, end, 0)
    pad = end if generation == 1 else 0
    red, heart = vocab["red</w>"], vocab["heart</w>"]
    exclamations = [0, vocab["!</w>"]] if generation == 1 else [0, 0]

    ids = tokenize_prompts(loaded, ["Red  HEART", "", "red!! heart", "red " * 200, "<|endoftext|> red"])
    assert ids.shape == (5, 77)
    assert ids[0].tolist() == [start, red, heart, end, *[pad] * 73]
    assert ids[1].tolist() == [start, end, *[pad] * 75]
    assert ids[2].tolist() == [start, red, *exclamations, heart, end, *[pad] * 71]
    assert ids[3].tolist() == [start, *[red] * 75, end]
    assert ids[4].tolist() == [start, end, red, end, *[pad] * 73]


@pytest.mark.parametrize("generation", [1, 2])
def test_saved_again_they_give_the_same_ids_in_either_format(long_folder, tmp_path, generation):
    old = in_form("published", generation, long_folder, tmp_path / "old")
    size = len(old_layout.read(old / "vocab.json"))
    old_layout.write(old / "added_tokens.json", {"<new1>": size, "<new2>": size + 1})
    loaded = load_tokenizer(str(old))
    prompts = [*PROMPTS, "a <new2> heart! <new1>"]
    ids = tokenize_prompts(loaded, prompts)
    assert [i for i in ids[-1] if i >= size] == [size + 1, size]
    save_tokenizer(loaded, str(tmp_path / "new"))
    for _ in range(2):
        np.testing.assert_array_equal(tokenize_prompts(load_tokenizer(str(tmp_path / "new")), prompts), ids)
        (tmp_path / "new/tokenizer.json").unlink(missing_ok=True)
    if generation == 2:  # a pad token in a prompt is no unknown word
        assert inspect_prompt(loaded, "red heart!!! face!") == ("red heart!!! face!", "", (), ())


@pytest.mark.parametrize("length", [None, int(1e30)])
def test_a_length_that_the_files_do_not_tell(long_folder, tmp_path, length):
    folder = old_layout.copy_folder(long_folder, tmp_path / "tokenizer")
    old_layout.age_tokenizer(folder, model_max_length=length)
    loaded = load_tokenizer(str(tmp_path), max_length=12)
    assert tokenize_prompts(loaded, ["red " * 40]).shape == (1, 12)
    save_tokenizer(loaded, str(tmp_path / "saved"))
    assert load_tokenizer(str(tmp_path / "saved"), max_length=99).model_max_length == 12


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("added_tokens.json", {"<new1>": 9999}, "'<new1>' .*9999"),
        ("special_tokens_map.json", {"pad_token": None}, "pad_token"),
        ("special_tokens_map.json", {"vocab_file": "/etc/passwd"}, "'vocab_file'"),
        ("tokenizer_config.json", {"model_max_length": "77"}, "model_max_length is '77'"),
        ("tokenizer_config.json", [], "tokenizer_config.json holds a list"),
        ("vocab.json", {"a": "b"}, "cannot be read"),
        ("merges.txt", {}, "cannot be read"),
    ],
)
def test_damaged_files(long_folder, tmp_path, file, content, message):
    folder = in_form("published", 1, long_folder, tmp_path / "tokenizer")
    old_layout.write(folder / file, content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(str(folder))


FILES = ["vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"]


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(st.sampled_from(FILES), st.data())
def test_a_damaged_tokenizer_loads_or_says_so(long_folder, tmp_path_factory, file, data):
    folder = in_form("published beside tokenizer.json", 2, long_folder, tmp_path_factory.mktemp("fuzz") / "tokenizer")
    (folder / file).write_bytes(altered(data, (folder / file).read_bytes()))
    try:
        ids = tokenize_prompts(load_tokenizer(str(folder), max_length=77), ["red heart"])
    except ValueError as error:
        assert str(folder) in str(error)
    else:
        assert len(ids) == 1
