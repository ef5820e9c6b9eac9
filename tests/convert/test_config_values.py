"""Values of the config files: a wrong type, or one out of bounds, is named with its file, key and value."""

import json
import math
import re

import pytest

from attrib_jax.convert.load import load_pipeline
from attrib_jax.convert.single_file import load_single_file
from attrib_jax.convert.tower import load_tower
from tests.convert import old_layout

SCHEDULER, UNET, VAE, TEXT = (
    f"{part}.json" for part in ("scheduler/scheduler_config", "unet/config", "vae/config", "text_encoder/config")
)
WRONG = [None, "x", True, [], {}, -1, math.nan, math.inf]
COUNTS = {
    SCHEDULER: ["num_train_timesteps"],
    UNET: ["in_channels", "out_channels", "norm_num_groups", "cross_attention_dim"],
    VAE: ["latent_channels", "norm_num_groups", "layers_per_block", "in_channels"],
    TEXT: ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    + ["max_position_embeddings"],
}
NUMBERS = {
    SCHEDULER: ["beta_start", "beta_end", "clip_sample_range"],
    UNET: ["norm_eps"],
    VAE: ["scaling_factor"],
    TEXT: ["layer_norm_eps"],
}
LISTS = {
    UNET: ["down_block_types", "up_block_types", "block_out_channels"],
    VAE: ["block_out_channels"],
}
MORE = [
    (SCHEDULER, "steps_offset", [None, "1", True, [1], -1, 0.5]),
    (SCHEDULER, "trained_betas", [0.1, "x", [], ["x"], [None], [-0.1], [math.nan]]),
    (SCHEDULER, "beta_schedule", [None, 1, ["linear"]]),
    (SCHEDULER, "prediction_type", [None, 1, {}]),
    (SCHEDULER, "timestep_spacing", [None, 1, []]),
    (SCHEDULER, "clip_sample", ["x", 1, []]),
    (SCHEDULER, "_class_name", [None, 1, []]),
    (SCHEDULER, "num_train_timesteps", [10**12]),
    (UNET, "layers_per_block", [None, "x", True, 0, [], [0], [1, "x"], {}, 10**6]),
    (UNET, "attention_head_dim", [None, "x", 0, [], [None, 1], [[1], 1]]),
    (UNET, "num_attention_heads", ["x", 0, [], ["x"], True]),
    (UNET, "transformer_layers_per_block", [None, 0, [1, [1, 1]]]),
    (UNET, "sample_size", ["x", 0, -1, True, [8], [8, 8, 8], [8, 0]]),
    (UNET, "time_embedding_dim", ["x", 0, True, []]),
    (UNET, "freq_shift", [None, "x", -1, math.nan]),
    (UNET, "use_linear_projection", ["x", 2, []]),
    (VAE, "shift_factor", ["x", math.nan, [], True]),
    (VAE, "down_block_types", ["DownEncoderBlock2D", 1, [1], []]),
    (VAE, "sample_size", [None, "x", 0, []]),
    (TEXT, "hidden_act", [None, 1, []]),
    (TEXT, "pad_token_id", ["x", -1, True, 0.5]),
    (TEXT, "architectures", ["CLIPTextModel", 1]),
]
CASES = [(file, key, WRONG + [0, 0.5, 2**40]) for file, keys in COUNTS.items() for key in keys]
CASES += [(file, key, WRONG + [0]) for file, keys in NUMBERS.items() for key in keys]
CASES += [(file, key, [None, "x", 3, True, [], [None], [[]]]) for file, keys in LISTS.items() for key in keys]
CASES += MORE


@pytest.fixture(scope="module")
def model(folder, tmp_path_factory):
    return old_layout.copy_folder(folder, tmp_path_factory.mktemp("values") / "model")


@pytest.mark.parametrize(("file", "key", "values"), CASES)
def test_a_wrong_value_is_named(model, file, key, values):
    original = old_layout.read(model / file)
    try:
        for value in values:
            old_layout.write(model / file, original | {key: value})
            with pytest.raises(ValueError) as error:
                load_pipeline(str(model))
            message = str(error.value)
            assert f"{model / file}: {key} is {value!r}; expected " in message, message
    finally:
        old_layout.write(model / file, original)


def test_null_where_older_files_have_it(folder, tmp_path):
    copied = old_layout.copy_folder(folder, tmp_path / "model")
    null = dict.fromkeys(("sample_size", "upcast_attention", "use_linear_projection", "num_attention_heads"))
    old_layout.write(copied / UNET, old_layout.read(copied / UNET) | null)
    assert load_pipeline(str(copied)).unet.config.sample_size is None


TOKENIZER = {
    "tokenizer_config.json": {
        "model_max_length": [None, "16", True, 0, -77, 16.5, math.nan],
        "pad_token": [3],
        "bos_token": [{"content": None}],
        "eos_token": [[]],
        "added_tokens_decoder": [[], {"x": {"content": "<a>"}}, {"600": "<a>"}, {"600": {}}],
    },
    "special_tokens_map.json": {"pad_token": [1]},
    "added_tokens.json": {"<a>": ["600", None]},
}


@pytest.mark.parametrize(("file", "key"), [(file, key) for file, keys in TOKENIZER.items() for key in keys])
def test_a_wrong_value_of_the_tokenizer_is_named(folder, tmp_path, file, key):
    tokenizer = old_layout.copy_folder(f"{folder}/tokenizer", tmp_path / "tokenizer")
    content = old_layout.read(tokenizer / file) if (tokenizer / file).exists() else {}
    for value in TOKENIZER[file][key]:
        old_layout.write(tokenizer / file, content | {key: value})
        with pytest.raises(ValueError) as error:
            load_pipeline(folder, tokenizer=str(tokenizer))
        assert all(part in str(error.value) for part in (str(tokenizer / file), key, "expected"))


GIVEN = [
    ("vae", "scaling_factor", None),
    ("unet", "norm_eps", "x"),
    ("unet", "norm_eps", []),
    ("scheduler", "beta_end", 0),
]


@pytest.mark.parametrize(("part", "key", "value"), GIVEN)
def test_a_wrong_value_given_for_a_single_file_is_named(sd1, part, key, value):
    with pytest.raises(ValueError, match=re.escape(f"{key} is {value!r}")):
        load_single_file(sd1.file, sd1.folder, config={part: {key: value}})


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("text_config", "hidden_size", None),
        ("vision_config", "patch_size", "x"),
        ("vision_config", "layer_norm_eps", 0),
        (None, "projection_dim", []),
        (None, "vision_config", []),
        (None, "text_config", 3),
    ],
)
def test_a_wrong_value_of_a_tower_is_named(tmp_path, section, key, value):
    path = tmp_path / "config.json"
    content = {"model_type": "clip", "text_config": {}, "vision_config": {}}
    (content if section is None else content[section])[key] = value
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError) as error:
        load_tower(tmp_path)
    assert str(path) in str(error.value) and key in str(error.value)
