"""Learnt tokens against diffusers' load_textual_inversion: file forms, ids, text states, saving, bad files."""

import dataclasses

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attrib_jax.convert.adapters.textual_inversion import add_tokens, read_token_file, read_tokens, write_token_file
from attrib_jax.convert.diffusers_folder import save_pipeline
from attrib_jax.convert.load import ModelSource, load_model, load_pipeline
from attrib_jax.convert.pipeline import prompt_report, tokenize
from attrib_jax.jobs.context import model_fingerprint
from tests.convert.outputs import relative_error, text_states, torch_text_states
from tests.tiny_pipeline import CAPTIONS, MAX_LENGTH, TEXT_WIDTH

PROMPTS = ["<new1>", "a <new1> heart", "<NEW1>s, x<new1>", "<new2> and <new1>", *CAPTIONS, ""]


def vectors(*names, seed=1):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=TEXT_WIDTH).astype(np.float32) for name in names}


def save(content, path):
    if path.suffix == ".safetensors":
        safetensors.numpy.save_file(content, path)
    else:
        torch.save(content, path)
    return str(path)


def as_torch(tokens):
    return {name: torch.from_numpy(vector) for name, vector in tokens.items()}


def assert_tokens(actual, expected):
    assert list(actual) == list(expected)
    for name, vector in expected.items():
        assert actual[name].dtype == np.float32
        np.testing.assert_array_equal(actual[name], vector)


def test_tokens_work_as_in_diffusers(ours, theirs, tmp_path):
    extended = ours
    for name, vector in vectors("<new1>", "<new2>").items():
        path = save(as_torch({name: vector}), tmp_path / f"{name}.bin")
        theirs.load_textual_inversion(str(tmp_path), weight_name=f"{name}.bin")
        extended = add_tokens(extended, read_token_file(path))
    expected = theirs.tokenizer(PROMPTS, padding="max_length", max_length=MAX_LENGTH, truncation=True)["input_ids"]
    assert tokenize(extended, PROMPTS).tolist() == expected
    assert extended.text_encoder.config.vocab_size == theirs.text_encoder.config.vocab_size == len(theirs.tokenizer)
    assert relative_error(text_states(extended, PROMPTS), torch_text_states(theirs, PROMPTS)) < 1e-5


def test_tokens_added_together_get_the_ids_of_transformers(ours, theirs):
    names = ["<b>", "<a>", "<new1>"]
    extended = add_tokens(ours, vectors(*names))
    theirs.tokenizer.add_tokens(names)
    prompts = ["<a> <b>", "a<new1><b>"]
    expected = theirs.tokenizer(prompts, padding="max_length", max_length=MAX_LENGTH, truncation=True)["input_ids"]
    assert tokenize(extended, prompts).tolist() == expected


def test_given_pipeline_is_unchanged(ours):
    size, before = len(ours.tokenizer), text_states(ours, ["<new1>"])
    table = ours.params["text_encoder"]["text_model"]["embeddings"]["token_embedding"]["embedding"]
    extended = add_tokens(ours, vectors("<new1>"))
    assert len(ours.tokenizer) == size == ours.text_encoder.config.vocab_size == len(table)
    np.testing.assert_array_equal(text_states(ours, ["<new1>"]), before)
    grown = extended.params["text_encoder"]["text_model"]["embeddings"]["token_embedding"]["embedding"]
    np.testing.assert_array_equal(grown[:size], table)
    assert add_tokens(ours, {}) is ours


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
    assert (
        theirs.tokenizer(PROMPTS, padding="max_length", max_length=MAX_LENGTH, truncation=True)["input_ids"] == expected
    )
    np.testing.assert_array_equal(text_states(again, PROMPTS), text_states(extended, PROMPTS))
    assert relative_error(text_states(extended, PROMPTS), torch_text_states(theirs, PROMPTS)) < 1e-5
    assert_tokens(read_tokens(again, tokens), tokens)
    with pytest.raises(ValueError, match="'<new1>' is in the tokenizer already"):
        add_tokens(again, vectors("<new1>"))


def test_fingerprint_changes_with_a_token(ours):
    assert model_fingerprint(ours) != model_fingerprint(add_tokens(ours, vectors("<new1>")))


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".safetensors"])
def test_diffusers_form(tmp_path, suffix):
    tokens = vectors("<new1>", "<new2>")
    content = tokens if suffix == ".safetensors" else as_torch(tokens)
    assert_tokens(read_token_file(save(content, tmp_path / f"x{suffix}")), tokens)


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


def test_one_row_is_one_token(tmp_path):
    tokens = vectors("<new1>")
    assert_tokens(
        read_token_file(save({"<new1>": torch.from_numpy(tokens["<new1>"])[None]}, tmp_path / "x.pt")), tokens
    )


@pytest.mark.parametrize("name", ["sks", None])
def test_automatic1111_form(tmp_path, name):
    vector = torch.randn(1, TEXT_WIDTH)
    content = {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": vector.clone().requires_grad_()},
        "name": name,
        "step": 500,
        "sd_checkpoint": None,
    }
    tokens = read_token_file(save(content, tmp_path / "my-cat.pt"))
    assert_tokens(tokens, {name or "my-cat": vector[0].numpy()})


@pytest.mark.parametrize("make", [dict, torch.nn.ParameterDict])
def test_the_original_form_with_parameters(tmp_path, make):
    one, two = (torch.nn.Parameter(torch.randn(1, TEXT_WIDTH)) for _ in range(2))
    first, second = (x.detach()[0].numpy() for x in (one, two))
    anonymous = {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": make({"*": one})}
    assert_tokens(read_token_file(save(anonymous, tmp_path / "my-cat.pt")), {"my-cat": first})
    named = {"string_to_param": make({"<cat>": one, "<dog>": two}), "name": "unused"}
    assert_tokens(read_token_file(save(named, tmp_path / "x.pt")), {"<cat>": first, "<dog>": second})
    assert_tokens(read_token_file(save(make({"<cat>": one}), tmp_path / "x.pt")), {"<cat>": first})


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


def test_automatic1111_safetensors_take_the_name_of_the_file(tmp_path):
    table = np.random.default_rng(3).normal(size=(2, TEXT_WIDTH)).astype(np.float16)
    tokens = read_token_file(save({"emb_params": table}, tmp_path / "my-cat.safetensors"))
    assert_tokens(tokens, {"my-cat": table[0].astype(np.float32), "my-cat_1": table[1].astype(np.float32)})


def test_tokens_of_a_delta_file(tmp_path):
    tokens = vectors("<new1>", "<new.2>")
    content = {"unet": {"attn2.to_k.weight": torch.ones(2, 2)}, "modifier_token": as_torch(tokens)}
    assert_tokens(read_token_file(save(content, tmp_path / "delta.bin")), tokens)


def test_bfloat16_is_widened(tmp_path):
    vector = torch.randn(TEXT_WIDTH).bfloat16()
    tokens = read_token_file(save({"<new1>": vector}, tmp_path / "x.bin"))
    assert_tokens(tokens, {"<new1>": vector.float().numpy()})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"<new1>": torch.ones(2, 2, 2)}, r"'<new1>' has shape \(2, 2, 2\); expected a learnt token"),
        ({"<new1>": torch.ones(0, 4)}, r"'<new1>' has shape \(0, 4\)"),
        ({"<new1>": torch.ones(4, dtype=torch.int64)}, "'<new1>' has the type int64; expected floating-point"),
        ({"<new1>": torch.tensor([1.0, torch.nan])}, "'<new1>' holds a NaN"),
        ({"<new1>": torch.tensor([1e300], dtype=torch.float64)}, r"an infinity \(as float32\)"),
        ({"<a>": torch.ones(2, 4), "<a>_1": torch.ones(4)}, "the token '<a>_1' twice"),
        ({"clip_l": torch.ones(1, 4), "clip_g": torch.ones(1, 4)}, "for Stable Diffusion XL"),
        ({"<new1>": "text"}, "x.bin holds no tensors by name"),
        (torch.ones(4), "x.bin holds a Tensor, expected a dict"),
    ],
)
def test_bad_token_files(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read_token_file(save(content, tmp_path / "x.bin"))


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="<new1>.bin does not exist"):
        read_token_file(str(tmp_path / "<new1>.bin"))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({"a</w>": np.ones(TEXT_WIDTH)}, "'a</w>' is in the tokenizer already"),
        (
            {"<new1>": np.ones(TEXT_WIDTH + 1)},
            r"'<new1>' has a vector of shape \(33,\), and this text encoder takes \(32,\)",
        ),
        ({"<new1>": np.full(TEXT_WIDTH, np.nan)}, "'<new1>' holds a NaN"),
        ({"<new1>": np.full(TEXT_WIDTH, 1e300)}, "'<new1>' holds a NaN or an infinity"),
        ({"  ": np.ones(TEXT_WIDTH)}, "the name '  '; expected a text"),
        ({3: np.ones(TEXT_WIDTH)}, "the name 3; expected a text"),
        (vectors("<new1>", "<NEW1>"), "would not find the token '<(new1|NEW1)>' in a prompt"),
    ],
)
def test_bad_tokens_are_refused(ours, tokens, message):
    with pytest.raises(ValueError, match=message):
        add_tokens(ours, tokens)
    assert "<new1>" not in ours.tokenizer.get_vocab()


def test_reading_an_unknown_token(ours):
    with pytest.raises(ValueError, match="'heart' was not added"):
        read_tokens(ours, ["heart"])
    with pytest.raises(TypeError, match="give a list of tokens"):
        read_tokens(ours, "<new1>")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damaged_files_never_crash(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    suffix = data.draw(st.sampled_from([".bin", ".safetensors"]))
    tokens = vectors("<new1>")
    path = folder / f"x{suffix}"
    save(tokens if suffix == ".safetensors" else as_torch(tokens), path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content[: data.draw(st.integers(1, len(content)))]))
    try:
        tokens = read_token_file(str(path))
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert all(vector.dtype == np.float32 and np.isfinite(vector).all() for vector in tokens.values())
