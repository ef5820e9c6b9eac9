"""Values of the config files: a wrong type, or one out of bounds, is named with its file, key and value."""

import json
import math
import shutil

import pytest

from attrib_jax.convert.load import load_pipeline
from attrib_jax.convert.single_file import load_single_file
from attrib_jax.convert.tower import load_tower

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
def copy(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("values") / "model"
    shutil.copytree(folder, path)
    return path


@pytest.mark.parametrize(("file", "key", "values"), CASES)
def test_a_wrong_value_is_named(copy, file, key, values):
    original = (copy / file).read_text()
    try:
        for value in values:
            (copy / file).write_text(json.dumps(json.loads(original) | {key: value}))
            with pytest.raises(ValueError) as error:
                load_pipeline(str(copy))
            message = str(error.value)
            assert f"{copy / file}: {key} is {value!r}; expected " in message, message
    finally:
        (copy / file).write_text(original)


def test_null_where_older_files_have_it(copy):
    original = (copy / UNET).read_text()
    null = dict.fromkeys(("sample_size", "upcast_attention", "use_linear_projection", "num_attention_heads"))
    (copy / UNET).write_text(json.dumps(json.loads(original) | null))
    try:
        assert load_pipeline(str(copy)).unet.config.sample_size is None
    finally:
        (copy / UNET).write_text(original)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("tokenizer_config.json", "model_max_length", None),
        ("tokenizer_config.json", "model_max_length", "16"),
        ("tokenizer_config.json", "model_max_length", True),
        ("tokenizer_config.json", "model_max_length", 0),
        ("tokenizer_config.json", "model_max_length", -77),
        ("tokenizer_config.json", "model_max_length", 16.5),
        ("tokenizer_config.json", "model_max_length", math.nan),
        ("tokenizer_config.json", "pad_token", 3),
        ("tokenizer_config.json", "bos_token", {"content": None}),
        ("tokenizer_config.json", "eos_token", []),
        ("tokenizer_config.json", "added_tokens_decoder", []),
        ("tokenizer_config.json", "added_tokens_decoder", {"x": {"content": "<a>"}}),
        ("tokenizer_config.json", "added_tokens_decoder", {"600": "<a>"}),
        ("tokenizer_config.json", "added_tokens_decoder", {"600": {}}),
        ("special_tokens_map.json", "pad_token", 1),
        ("added_tokens.json", "<a>", "600"),
        ("added_tokens.json", "<a>", None),
    ],
)
def test_a_wrong_value_of_the_tokenizer_is_named(folder, tmp_path, file, key, value):
    shutil.copytree(f"{folder}/tokenizer", tmp_path / "tokenizer")
    path = tmp_path / "tokenizer" / file
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | {key: value}))
    with pytest.raises(ValueError) as error:
        load_pipeline(folder, tokenizer=str(tmp_path / "tokenizer"))
    assert str(path) in str(error.value) and key in str(error.value) and "expected" in str(error.value)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("vae", "scaling_factor", None),
        ("unet", "norm_eps", "x"),
        ("scheduler", "beta_end", 0),
        ("unet", "norm_eps", []),
    ],
)
def test_a_wrong_value_given_for_a_single_file_is_named(sd1, part, key, value):
    with pytest.raises(ValueError, match=f"{part}.*{key} is|{key} is"):
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
