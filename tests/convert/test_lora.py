"""LoRA merging against merging in PyTorch, module by module: every key form, alphas, and files that do not fit."""

import json
import logging
import math
import re

import jax
import numpy as np
import pytest
import torch

from attrib_jax.convert.adapters.lora import merge_lora
from attrib_jax.convert.weights.names import name_table
from attrib_jax.core.weights import flatten_names
from tests.convert.files import save
from tests.convert.outputs import relative_error, text_states, torch_text_states, torch_unet_output, unet_output
from tests.tiny_pipeline import CAPTIONS

RANK = 3
BLOCKS = ("down_blocks.0.attentions.0.transformer_blocks.0", "mid_block.attentions.0.transformer_blocks.0")
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
UNET = tuple(f"{block}.{attn}.{x}" for block in BLOCKS for attn in ("attn1", "attn2") for x in PROJECTIONS)
TEXT = tuple(
    f"text_model.encoder.layers.{i}.self_attn.{x}" for i in (0, 1) for x in ("q_proj", "k_proj", "v_proj", "out_proj")
)
OLD_TEXT = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


def torch_module(theirs, part, name):
    model = getattr(theirs, part)
    return model.get_submodule(name if part == "unet" or hasattr(model, "text_model") else name.split(".", 1)[1])


def draw_factors(theirs, names, rank=RANK, seed=1):
    """(part, module name) -> (down, up), in the shape of the module's own weight."""
    rng = np.random.default_rng(seed)
    factors = {}
    for part, name in names:
        rows, *rest = torch_module(theirs, part, name).weight.shape
        ones = [1] * (len(rest) - 1)
        down = rng.normal(size=(rank, *rest)).astype(np.float32)
        factors[part, name] = down, (0.1 * rng.normal(size=(rows, rank, *ones))).astype(np.float32)
    return factors


ALL = tuple(("unet", name) for name in UNET) + tuple(("text_encoder", name) for name in TEXT)


def merge_in_torch(theirs, factors, factor):
    """W + factor * up @ down, layer by layer; `factor` a number or a function of part and name."""
    for (part, name), (down, up) in factors.items():
        number = factor(part, name) if callable(factor) else factor
        weight = torch_module(theirs, part, name).weight
        down, up = (torch.from_numpy(x).double() for x in (down, up))
        # A kernel composed with 1x1 channels is the matrix product over the rank.
        product = torch.einsum("or,r...->o...", up.flatten(1), down)
        weight.data = (weight.data.double() + number * product.reshape(weight.shape)).float()


def assert_same_outputs(changed, theirs, base=None):
    assert relative_error(unet_output(changed), torch_unet_output(theirs)) < 1e-5
    prompts = list(CAPTIONS)
    assert relative_error(text_states(changed, prompts), torch_text_states(theirs, prompts)) < 1e-5
    if base is not None:
        assert relative_error(unet_output(base), unet_output(changed)) > 1e-3
        assert relative_error(text_states(base, prompts), text_states(changed, prompts)) > 1e-3


def peft(part, name):
    return f"{part}.{name}.lora_A.weight", f"{part}.{name}.lora_B.weight"


def diffusers_form(part, name):
    kind = "lora" if part == "unet" else "lora_linear_layer"
    return tuple(f"{part}.{name}.{kind}.{side}.weight" for side in ("down", "up"))


def processor_form(part, name):
    stem, _, projection = name.removesuffix(".0").rpartition(".")
    stem = f"unet.{stem}.processor" if part == "unet" else f"{part}.{stem}"
    return tuple(f"{stem}.{OLD_TEXT.get(projection, projection)}_lora.{side}.weight" for side in ("down", "up"))


def unprefixed(part, name):
    if part == "unet":
        return tuple(key.removeprefix("unet.") for key in processor_form(part, name))
    return tuple(key.replace("text_model.", "") for key in peft(part, name))


def kohya(part, name):
    prefix = "lora_unet_" if part == "unet" else "lora_te_"
    return tuple(f"{prefix}{name.replace('.', '_')}.lora_{side}.weight" for side in ("down", "up"))


def file_content(factors, form):
    return {key: array for entry, pair in factors.items() for key, array in zip(form(*entry), pair, strict=True)}


FORMS = [
    (peft, ".safetensors"),
    (diffusers_form, ".safetensors"),
    (processor_form, ".bin"),
    (unprefixed, ".bin"),
    (kohya, ".safetensors"),
]


@pytest.mark.parametrize(("form", "suffix"), FORMS)
def test_every_form_computes_the_same_as_torch(ours, theirs, tmp_path, form, suffix):
    factors = draw_factors(theirs, ALL)
    changed = merge_lora(ours, save(file_content(factors, form), tmp_path / f"lora{suffix}"), scale=0.7)
    merge_in_torch(theirs, factors, 0.7)
    assert_same_outputs(changed, theirs, base=ours)


def test_merge_is_rounded_once(ours, theirs, tmp_path):
    factors = draw_factors(theirs, ALL)
    changed = merge_lora(ours, save(file_content(factors, peft), tmp_path / "x.safetensors"), scale=1 / 3)
    part, name = "unet", UNET[4]
    down, up = factors[part, name]
    path = name_table(ours.params["unet"])[f"{name}.weight"]
    weight = np.asarray(flatten_names(ours.params[part])[path]).astype(np.float64)
    expected = (weight + (1 / 3) * (up.astype(np.float64) @ down.astype(np.float64)).T).astype(np.float32)
    np.testing.assert_array_equal(flatten_names(changed.params[part])[path], expected)


def test_only_named_weights_change_and_scale_0_changes_none(ours, theirs, tmp_path):
    factors = draw_factors(theirs, ALL)
    path = save(file_content(factors, peft), tmp_path / "x.safetensors")
    before = jax.tree.map(np.array, ours.params)
    changed = merge_lora(ours, path)
    count = sum(
        not np.array_equal(leaf, flatten_names(ours.params[part])[name])
        for part in ours.params
        for name, leaf in flatten_names(changed.params[part]).items()
    )
    assert count == len(ALL)
    jax.tree.map(np.testing.assert_array_equal, ours.params, before)
    jax.tree.map(np.testing.assert_array_equal, merge_lora(ours, path, scale=0).params, before)
    back = save(file_content(draw_factors(theirs, ALL), peft), tmp_path / "y.safetensors")
    again = merge_lora(changed, back, scale=-1)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), again.params, before)


@pytest.mark.parametrize("form", [kohya, diffusers_form, processor_form])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_alpha_entries_scale_each_weight(ours, theirs, tmp_path, form, suffix):
    factors = draw_factors(theirs, ALL)
    alphas = {entry: 0.5 + i for i, entry in enumerate(factors) if i % 5}
    content = file_content(factors, form)
    for entry, alpha in alphas.items():
        down = form(*entry)[0]
        content[f"{down}.alpha" if form is processor_form else f"{down.rsplit('.lora', 1)[0]}.alpha"] = alpha
    changed = merge_lora(ours, save(content, tmp_path / f"lora{suffix}"), scale=0.3)
    merge_in_torch(theirs, factors, lambda *entry: 0.3 * alphas.get(entry, RANK) / RANK)
    assert_same_outputs(changed, theirs)


@pytest.mark.parametrize("rslora", [False, True])
def test_adapter_metadata_of_diffusers(ours, theirs, tmp_path, rslora):
    factors, special = draw_factors(theirs, ALL), f"{BLOCKS[1]}.attn2.to_k"
    unet = {"r": RANK, "lora_alpha": 12, "use_rslora": rslora, "alpha_pattern": {f"^{special}": 7, "attn1.to_q": 5}}
    text = {"lora_alpha": 2.0, "use_rslora": rslora, "alpha_pattern": {}}
    options = {f"{part}.{key}": x for part, keys in (("unet", unet), ("text_encoder", text)) for key, x in keys.items()}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(options)}
    path = save(file_content(factors, peft), tmp_path / "lora.safetensors", metadata)

    def factor(part, name):
        alpha = 2 if part == "text_encoder" else 7 if name == special else 5 if name.endswith("attn1.to_q") else 12
        return 0.1 * alpha / (math.sqrt(RANK) if rslora else RANK)

    changed = merge_lora(ours, path, scale=0.1)
    merge_in_torch(theirs, factors, factor)
    assert_same_outputs(changed, theirs)


def test_convolutions_and_feed_forwards_merge_too(ours, theirs, tmp_path):
    names = (
        "down_blocks.0.resnets.0.conv1",
        "down_blocks.0.downsamplers.0.conv",
        "down_blocks.1.resnets.0.conv_shortcut",
        "down_blocks.0.attentions.0.proj_in",
        f"{BLOCKS[0]}.ff.net.0.proj",
        f"{BLOCKS[0]}.ff.net.2",
        "time_embedding.linear_1",
    )
    text = ("text_encoder", "text_model.encoder.layers.1.mlp.fc1")
    factors = draw_factors(theirs, [*(("unet", name) for name in names), text])
    merge_in_torch(theirs, factors, 1.0)
    for form in (peft, kohya):
        changed = merge_lora(ours, save(file_content(factors, form), tmp_path / f"{form.__name__}.safetensors"))
        assert_same_outputs(changed, theirs, base=ours)
    # The reference multiplies: the product is what the two convolutions in a row compute.
    down, up = (torch.from_numpy(x) for x in factors["unet", names[0]])
    conv, x = torch.nn.functional.conv2d, torch.randn(1, 32, 6, 6, generator=torch.Generator().manual_seed(0))
    product = torch.einsum("or,r...->o...", up.flatten(1), down)
    torch.testing.assert_close(conv(conv(x, down, padding=1), up), conv(x, product, padding=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["down_blocks.0.attentions.0.proj_in", UNET[0]])
def test_factors_of_1x1_convolutions_and_linear_layers_are_interchangeable(ours, theirs, tmp_path, name):
    pair = draw_factors(theirs, [("unet", name)])["unet", name]
    other = tuple(x.reshape(x.shape[:2] if x.ndim == 4 else (*x.shape, 1, 1)) for x in pair)
    path = save(file_content({("unet", name): other}, peft), tmp_path / "x.safetensors")
    merge_in_torch(theirs, {("unet", name): pair}, 1.0)
    assert_same_outputs(merge_lora(ours, path), theirs)


def test_folder_and_mixed_ranks(ours, theirs, tmp_path, caplog):
    factors = draw_factors(theirs, ALL[:4], rank=2) | draw_factors(theirs, ALL[4:], rank=5)
    save(file_content(factors, peft), tmp_path / "pytorch_lora_weights.safetensors")
    with caplog.at_level(logging.INFO):
        changed = merge_lora(ours, str(tmp_path))
    assert "24 weights" in caplog.text and "[2, 5]" in caplog.text
    merge_in_torch(theirs, factors, 1.0)
    assert_same_outputs(changed, theirs)


DOWN, UP = (f"unet.{UNET[0]}.lora_{side}.weight" for side in "AB")
PAIR = {DOWN: np.ones((2, 32), np.float32), UP: np.ones((32, 2), np.float32)}


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


ALPHA = f"unet.{UNET[0]}.alpha"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "lora.safetensors holds no tensors"),
        ({DOWN: PAIR[DOWN]}, f"1 without their other half:\n  {DOWN}"),
        (PAIR | {"unet.x.to_q.lora_A.weight": PAIR[DOWN]}, r"1 unknown:\n  unet\.x\.to_q\.lora_A"),
        (PAIR | {f"unet.{UNET[0]}.lora_B.bias": PAIR[DOWN]}, r"1 unknown:\n  .*lora_B\.bias"),
        (PAIR | {"conv_in.weight": PAIR[DOWN]}, r"1 unknown:\n  conv_in\.weight"),
        (PAIR | {f"{UNET[0]}.lora.down.weight": PAIR[DOWN]}, "1 repeated:"),
        (PAIR | {f"unet.{UNET[1]}.alpha": ones()}, "1 without their other half:\n  .*alpha"),
        (PAIR | {ALPHA: ones(2)}, "alpha is "),
        (PAIR | {ALPHA: np.asarray(np.nan)}, "alpha is nan"),
        (PAIR | {DOWN: ones(3, 32)}, r"1 misshaped:\n  .*down \(3, 32\), up \(32, 2\), model \(32, 32\)"),
        (PAIR | {DOWN: ones(2, 31)}, r"1 misshaped:\n  .*down \(2, 31\)"),
        (PAIR | {UP: ones(31, 2)}, r"1 misshaped:\n  .*up \(31, 2\)"),
        (PAIR | {DOWN: ones(2, 32, 3, 3)}, r"1 misshaped:\n  .*down \(2, 32, 3, 3\)"),
        ({DOWN: ones(0, 32), UP: ones(32, 0)}, "1 misshaped"),
        ({DOWN: ones(2), UP: ones(2)}, "1 misshaped"),
        (PAIR | {UP: np.full((32, 2), np.inf, np.float32)}, "to_q up holds a NaN"),
        (PAIR | {UP: ones(32, 2, dtype=np.int32)}, "to_q up has the type int32"),
    ],
)
def test_files_that_do_not_fit(ours, tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        merge_lora(ours, save(content, tmp_path / "lora.safetensors"))


KOHYA = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
XL, FLUX = "Stable Diffusion XL", "FLUX"
KINDS = {
    f"{KOHYA}.oft_blocks": "is an OFT",
    f"{KOHYA}.on_input": "is an IA3",
    f"{KOHYA}.b1.weight": "is a GLoRA",
    f"{KOHYA}.diff": "full differences",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k_ip.weight": "IP-Adapter",
    f"{UNET[4]}.processor.to_k_custom_diffusion.weight": "--custom_diffusion",
    "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": XL,
    "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": XL,
    "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_k.alpha": XL,
    "lora_unet_label_emb_0_0.lora_down.weight": XL,
    "lora_unet_label_emb_0_0.dora_scale": f"DoRA made for {XL}",
    "unet.down_blocks.2.attentions.0.transformer_blocks.7.attn2.to_k.lora_A.weight": XL,
    "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_k.hada_w1_a": f"LoHa made for {XL}",
    "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": FLUX,
    "transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight": FLUX,
    "double_blocks.0.processor.qkv_lora1.down.weight": FLUX,
    "transformer.transformer_blocks.0.attn.add_k_proj.lora_A.weight": "Stable Diffusion 3",
    "lora_unet_joint_blocks_0_context_block_attn_qkv.lora_down.weight": "Stable Diffusion 3",
    "down_blocks.0.motion_modules.0.temporal_transformer.x.lora_A.weight": "a video model",
}


@pytest.mark.parametrize("key", KINDS)
def test_other_adapters_and_families_are_named(ours, tmp_path, key):
    path = save(PAIR | {key: PAIR[DOWN]}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=f"lora.safetensors .*{KINDS[key]}(?s:.)*1 unknown:\n  {re.escape(key)}"):
        merge_lora(ours, path)


def test_the_width_of_the_text_names_the_family(ours, tmp_path):
    key = f"unet.{BLOCKS[0]}.attn2.to_k"
    content = {f"{key}.lora_A.weight": ones(2, 2048), f"{key}.lora_B.weight": PAIR[UP]}
    with pytest.raises(ValueError, match=f"{XL} .*2048.*32"):
        merge_lora(ours, save(content, tmp_path / "lora.safetensors"))


@pytest.mark.parametrize(
    ("content", "text", "message"),
    [
        (PAIR, "{", "lora_adapter_metadata"),
        (PAIR, "[" * 100_000, "lora_adapter_metadata"),
        (PAIR, "[1]", "lora_adapter_metadata"),
        (PAIR, '{"unet.use_dora": true}', "DoRA"),
        (PAIR, '{"unet.lora_alpha": "x"}', "unet.lora_alpha is 'x'"),
        (PAIR, '{"unet.lora_alpha": null}', "unet.lora_alpha is None"),
        (PAIR, '{"unet.alpha_pattern": [1]}', r"alpha_pattern .* is \[1\]"),
        (PAIR | {ALPHA: ones()}, '{"unet.lora_alpha": 2}', "alpha of unet.* twice"),
    ],
    ids=["cut", "deep", "list", "dora", "text", "null", "pattern", "twice"],
)
def test_bad_metadata(ours, tmp_path, content, text, message):
    path = save(content, tmp_path / "lora.safetensors", {"lora_adapter_metadata": text})
    with pytest.raises(ValueError, match=message):
        merge_lora(ours, path)


@pytest.mark.parametrize("scale", [math.nan, math.inf, "1", True, None])
def test_bad_scale(ours, tmp_path, scale):
    with pytest.raises(ValueError, match=f"scale is {scale!r}"):
        merge_lora(ours, save(PAIR, tmp_path / "x.safetensors"), scale)


def test_overflow_and_missing_files(ours, tmp_path):
    path = save(PAIR | {UP: np.full((32, 2), 1e38, np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="to_q .*scale=1000 "):
        merge_lora(ours, path, 1000)
    for absent, name in ((tmp_path, "pytorch_lora_weights.safetensors"), (tmp_path / "y.bin", "y.bin")):
        with pytest.raises(FileNotFoundError, match=name):
            merge_lora(ours, str(absent))
