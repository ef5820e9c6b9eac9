"""Learnt tokens against diffusers' load_textual_inversion: file forms, ids, text states, saving, bad files."""

import dataclasses

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from attrib_jax.convert.adapters.textual_inversion import add_tokens, read_token_file, read_tokens, write_token_file
from attrib_jax.convert.diffusers_folder import save_pipeline
from attrib_jax.convert.load import ModelSource, load_model, load_pipeline
from attrib_jax.convert.pipeline import prompt_report, tokenize
from attrib_jax.jobs.context import model_fingerprint
from tests.convert.files import save
from tests.convert.outputs import relative_error, text_states, torch_text_states
from tests.tiny_pipeline import CAPTIONS, MAX_LENGTH, TEXT_WIDTH

PROMPTS = ["<new1>", "a <new1> heart", "<NEW1>s, x<new1>", "<new2> and <new1>", *CAPTIONS, ""]


def vectors(*names, seed=1):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=TEXT_WIDTH).astype(np.float32) for name in names}


def assert_tokens(actual, expected):
    assert list(actual) == list(expected)
    for name, vector in expected.items():
        assert actual[name].dtype == np.float32
        np.testing.assert_array_equal(actual[name], vector)


def their_ids(theirs, prompts):
    return theirs.tokenizer(prompts, padding="max_length", max_length=MAX_LENGTH, truncation=True)["input_ids"]


def test_tokens_work_as_in_diffusers(ours, theirs, tmp_path):
    extended = ours
    for name, vector in vectors("<new1>", "<new2>").items():
        path = save({name: vector}, tmp_path / f"{name}.bin")
        theirs.load_textual_inversion(str(tmp_path), weight_name=f"{name}.bin")
        extended = add_tokens(extended, read_token_file(path))
    assert tokenize(extended, PROMPTS).tolist() == their_ids(theirs, PROMPTS)
    assert extended.text_encoder.config.vocab_size == theirs.text_encoder.config.vocab_size == len(theirs.tokenizer)
    assert relative_error(text_states(extended, PROMPTS), torch_text_states(theirs, PROMPTS)) < 1e-5
    names = ["<b>", "<a>", "<new3>"]  # several at once get the ids of transformers too
    theirs.tokenizer.add_tokens(names)
    prompts = ["<a> <b>", "a<new3><b>"]
    assert tokenize(add_tokens(extended, vectors(*names)), prompts).tolist() == their_ids(theirs, prompts)


def test_given_pipeline_is_unchanged(ours):
    size, before = len(ours.tokenizer), text_states(ours, ["<new1>"])
    table = ours.params["text_encoder"]["text_model"]["embeddings"]["token_embedding"]["embedding"]
    extended = add_tokens(ours, vectors("<new1>"))
    assert len(ours.tokenizer) == size == ours.text_encoder.config.vocab_size == len(table)
    np.testing.assert_array_equal(text_states(ours, ["<new1>"]), before)
    grown = extended.params["text_encoder"]["text_model"]["embeddings"]["token_embedding"]["embedding"]
    np.testing.assert_array_equal(grown[:size], table)
    assert add_tokens(ours, {}) is ours
    assert model_fingerprint(ours) != model_fingerprint(extended)


def test_room_left_in_the_embedding_is_used(ours):
    config = dataclasses.replace(ours.text_encoder.config, vocab_size=ours.text_encoder.config.vocab_size + 3)
    text = ours.params["text_encoder"]["text_model"]
    table = jnp.concatenate([text["embeddings"]["token_embedding"]["embedding"], jnp.ones((3, TEXT_WIDTH))])
    embeddings = text["embeddings"] | {"token_embedding": {"embedding": table}}
    params = ours.params | {"text_encoder": {"text_model": text | {"embeddings": embeddings}}}
    roomy = dataclasses.replace(ours, text_encoder=ours.text_encoder.clone(config=config), params=params)
    tokens = vectors("<new1>")
    extended = add_tokens(roomy, tokens)
    assert extended.text_encoder.config.vocab_size == config.vocab_size
    assert_tokens(read_tokens(extended, ["<new1>"]), tokens)
    plain = text_states(add_tokens(ours, tokens), PROMPTS)
    np.testing.assert_array_equal(text_states(extended, PROMPTS), plain)


def test_extended_pipeline_survives_saving(ours, tmp_path):
    tokens = vectors("<new1>", "<new2>")
    extended = add_tokens(ours, tokens)
    path = str(tmp_path / "saved")
    save_pipeline(extended, path)
    again, theirs = load_pipeline(path), diffusers.StableDiffusionPipeline.from_pretrained(path)
    expected = tokenize(extended, PROMPTS).tolist()
    assert tokenize(again, PROMPTS).tolist() == expected
    assert their_ids(theirs, PROMPTS) == expected
    np.testing.assert_array_equal(text_states(again, PROMPTS), text_states(extended, PROMPTS))
    assert relative_error(text_states(extended, PROMPTS), torch_text_states(theirs, PROMPTS)) < 1e-5
    assert_tokens(read_tokens(again, tokens), tokens)
    with pytest.raises(ValueError, match="'<new1>' is in the tokenizer already"):
        add_tokens(again, vectors("<new1>"))


TABLE = np.random.default_rng(3).integers(-99, 99, (2, TEXT_WIDTH)).astype(np.float16)  # exact in bfloat16 too
ROWS = torch.from_numpy(TABLE).float()
PARAMETERS = {name: torch.nn.Parameter(x[None]) for name, x in zip(("<cat>", "<dog>"), ROWS, strict=True)}
STAR = {"*": PARAMETERS["<cat>"]}
MODULE = torch.nn.ParameterDict


@pytest.mark.parametrize(
    ("file", "content", "names"),
    [
        ("x.bin", {"<a>": ROWS[0], "<b>": ROWS[1]}, "<a> <b>"),
        ("x.safetensors", {"<a>": TABLE[0], "<b>": TABLE[1]}, "<a> <b>"),
        ("x.pt", {"<a>": ROWS[:1]}, "<a>"),
        ("x.bin", {"<a>": ROWS[0].bfloat16()}, "<a>"),
        ("x.bin", {"unet": {"attn2.to_k.weight": ROWS}, "modifier_token": {"<new.2>": ROWS[0]}}, "<new.2>"),
        ("my-cat.safetensors", {"emb_params": TABLE}, "my-cat my-cat_1"),
        ("my-cat.pt", {"string_to_token": {"*": 265}, "string_to_param": STAR, "name": "sks"}, "sks"),
        ("my-cat.pt", {"string_to_param": STAR, "name": None, "sd_checkpoint": None, "step": 500}, "my-cat"),
        ("my-cat.pt", {"string_to_token": {"*": ROWS[0, 0]}, "string_to_param": MODULE(STAR)}, "my-cat"),
        ("x.pt", {"string_to_param": MODULE(PARAMETERS), "name": "unused"}, "<cat> <dog>"),
        ("x.pt", {"string_to_param": PARAMETERS, "name": "unused"}, "<cat> <dog>"),
        ("x.pt", PARAMETERS, "<cat> <dog>"),
        ("x.pt", MODULE(PARAMETERS), "<cat> <dog>"),
    ],
)
def test_every_form_of_a_token_file(tmp_path, file, content, names):
    tokens = read_token_file(save(content, tmp_path / file))
    assert_tokens(tokens, dict(zip(names.split(), TABLE.astype(np.float32), strict=False)))


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_written_file_is_read_back_and_by_diffusers(theirs, tmp_path, suffix):
    tokens = vectors("<new1>")
    path = tmp_path / f"<new1>{suffix}"
    write_token_file("<new1>", tokens["<new1>"], str(path))
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert_tokens(read_token_file(str(path)), tokens)
    theirs.load_textual_inversion(str(tmp_path), weight_name=path.name)
    row = theirs.text_encoder.get_input_embeddings().weight[theirs.tokenizer.convert_tokens_to_ids("<new1>")]
    np.testing.assert_array_equal(row.detach().numpy(), tokens["<new1>"])


def test_several_vectors_become_numbered_tokens(ours, theirs, tmp_path):
    table = np.random.default_rng(2).normal(size=(3, TEXT_WIDTH)).astype(np.float32)
    path = save({"<new1>": torch.from_numpy(table)}, tmp_path / "<new1>.bin")
    tokens = read_token_file(path)
    assert_tokens(tokens, dict(zip(["<new1>", "<new1>_1", "<new1>_2"], table)))
    theirs.load_textual_inversion(path)
    extended = add_tokens(ours, tokens)
    for prompt in ["a <new1>", "<new1>s, x<new1>", "<NEW1>", "<new1> <new1>_1 <new1>_2", "<new1>_2", *CAPTIONS, ""]:
        assert relative_error(text_states(extended, [prompt]), torch_text_states(theirs, [prompt])) < 1e-5, prompt
    written = tokenize(ours, ["a"])[0].tolist()
    written[2:5] = extended.tokenizer.convert_tokens_to_ids(list(tokens))
    assert tokenize(extended, ["a <new1>"]).tolist() == [written]


def test_report_shows_which_vectors_are_cut(ours):
    extended = add_tokens(ours, vectors("<new1>", "<new1>_1", "<new1>_2"))
    report = prompt_report(extended, "a red <new1> heart <new1>")
    assert (report.kept, report.truncated) == ("a red <new1> <new1>_1 <new1>_2 heart", "<new1> <new1>_1 <new1>_2")


def test_token_paths_that_a_list_of_flags_has_cut(folder, tmp_path):
    files = [tmp_path / name for name in ("a,b.bin", "plain.bin", "x, y,z.bin")]
    names = ["<a>", "<b>", "<c>"]
    for name, file in zip(names, files, strict=True):
        write_token_file(name, vectors(name)[name], str(file))
    cut = tuple(part.strip() for file in files for part in str(file).split(","))
    loaded = load_model(ModelSource(model=folder, tokens=cut))
    assert set(names) <= loaded.tokenizer.get_added_vocab().keys()
    with pytest.raises(FileNotFoundError, match="nothing.bin"):
        load_model(ModelSource(model=folder, tokens=(*cut, str(tmp_path / "nothing.bin"))))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"<new1>": torch.ones(2, 2, 2)}, r"'<new1>' has shape \(2, 2, 2\)"),
        ({"<new1>": torch.ones(0, 4)}, r"'<new1>' has shape \(0, 4\)"),
        ({"<new1>": torch.ones(4, dtype=torch.int64)}, "'<new1>' has the type int64"),
        ({"<new1>": torch.tensor([1.0, torch.nan])}, "'<new1>' holds a NaN"),
        ({"<new1>": torch.tensor([1e300], dtype=torch.float64)}, "'<new1>' .*float32"),
        ({"<a>": torch.ones(2, 4), "<a>_1": torch.ones(4)}, "'<a>_1' twice"),
        ({"clip_l": torch.ones(1, 4), "clip_g": torch.ones(1, 4)}, "Stable Diffusion XL"),
        ({"<new1>": "text"}, "x.bin holds no tensors"),
        (torch.ones(4), "x.bin holds a Tensor"),
    ],
)
def test_bad_token_files(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read_token_file(save(content, tmp_path / "x.bin"))
    with pytest.raises(FileNotFoundError, match="<new1>.bin"):
        read_token_file(str(tmp_path / "<new1>.bin"))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({"a</w>": np.ones(TEXT_WIDTH)}, "'a</w>'"),
        ({"<new1>": np.ones(TEXT_WIDTH + 1)}, r"'<new1>' .*\(33,\).*\(32,\)"),
        ({"<new1>": np.full(TEXT_WIDTH, np.nan)}, "'<new1>' holds a NaN"),
        ({"<new1>": np.full(TEXT_WIDTH, 1e300)}, "'<new1>' holds a NaN or an infinity"),
        ({"  ": np.ones(TEXT_WIDTH)}, "name '  '"),
        ({3: np.ones(TEXT_WIDTH)}, "name 3"),
        (vectors("<new1>", "<NEW1>"), "'<(new1|NEW1)>'"),
    ],
)
def test_bad_tokens_are_refused(ours, tokens, message):
    with pytest.raises(ValueError, match=message):
        add_tokens(ours, tokens)
    assert "<new1>" not in ours.tokenizer.get_vocab()
    with pytest.raises(ValueError, match="'heart'"):
        read_tokens(ours, ["heart"])
    with pytest.raises(TypeError, match="<new1>|list"):
        read_tokens(ours, "<new1>")
