"""Custom Diffusion files against PyTorch diffusers, both ways: every form, and files that do not fit."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attrib_jax.convert.adapters.custom_diffusion import apply_custom_diffusion, save_custom_diffusion
from attrib_jax.convert.adapters.lora import merge_lora
from attrib_jax.convert.adapters.textual_inversion import add_tokens, read_token_file
from attrib_jax.convert.load import load_unet
from attrib_jax.convert.pipeline import tokenize
from attrib_jax.core.weights import flatten_names, unflatten_names
from tests.convert.files import altered, as_torch, save
from tests.convert.outputs import relative_error, text_states, torch_text_states, torch_unet_output, unet_output
from tests.tiny_pipeline import TEXT_WIDTH

WEIGHTS = "pytorch_custom_diffusion_weights"
LAYERS = (
    "down_blocks.0.attentions.0.transformer_blocks.0",
    "mid_block.attentions.0.transformer_blocks.0",
    "up_blocks.1.attentions.0.transformer_blocks.0",
    "up_blocks.1.attentions.1.transformer_blocks.0",
)
PROMPTS = ["a <new1> heart", "<new1>", "a red heart"]


def trained_processors(unet, train_q_out=False, seed=1):
    """Custom Diffusion processors with random weights, as diffusers' training script sets them."""
    from diffusers.models.attention_processor import CustomDiffusionAttnProcessor

    torch.manual_seed(seed)
    processors = {}
    for name in unet.attn_processors:
        cross = name.endswith("attn2.processor")
        attention = unet.get_submodule(name.removesuffix(".processor"))
        processors[name] = CustomDiffusionAttnProcessor(
            train_kv=cross,
            train_q_out=cross and train_q_out,
            hidden_size=attention.to_q.weight.shape[0],
            cross_attention_dim=TEXT_WIDTH,
        )
    unet.set_attn_processor(processors)


def module_weights(kinds=("to_k", "to_v"), seed=1):
    """Random replacements under the UNet's own names; to_out is not square with its input here but has a bias."""
    rng = np.random.default_rng(seed)
    sizes = dict(zip(LAYERS, (32, 64, 32, 32), strict=True))
    weights = {}
    for layer, size in sizes.items():
        for kind in kinds:
            columns = TEXT_WIDTH if kind in ("to_k", "to_v") else size
            weights[f"{layer}.attn2.{kind}.weight"] = 0.2 * rng.normal(size=(size, columns)).astype(np.float32)
        if "to_out.0" in kinds:
            weights[f"{layer}.attn2.to_out.0.bias"] = rng.normal(size=size).astype(np.float32)
    return weights


def to_processor_form(weights):
    renamed = {}
    for name, array in weights.items():
        layer, _, leaf = name.partition(".attn2.")
        kind, _, rest = leaf.partition(".")
        renamed[f"{layer}.attn2.processor.{kind}_custom_diffusion.{rest}"] = array
    return renamed


def fine_tuned(pipeline, pattern=(".attn2.to_k", ".attn2.to_v"), tokens=()):
    """`pipeline` with random changes to the UNet weights whose PyTorch names hold one of `pattern`."""
    rng = np.random.default_rng(5)
    flat = flatten_names(pipeline.params["unet"])
    wanted = tuple(part.replace(".", "/") for part in pattern)
    changed = {
        path: leaf + 0.2 * rng.normal(size=leaf.shape).astype(np.float32)
        for path, leaf in flat.items()
        if any(part in f"/{path}" for part in wanted)
    }
    assert changed
    params = pipeline.params | {"unet": unflatten_names({**flat, **changed})}
    tuned = dataclasses.replace(pipeline, params=params)
    return add_tokens(tuned, {token: rng.normal(size=TEXT_WIDTH).astype(np.float32) for token in tokens})


def assert_same_params(left, right):
    jax.tree.map(np.testing.assert_array_equal, left.params, right.params)


@pytest.mark.parametrize("train_q_out", [False, True])
@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_diffusers_files_compute_the_same(ours, theirs, tmp_path, train_q_out, suffix):
    trained_processors(theirs.unet, train_q_out)
    name = WEIGHTS + suffix
    theirs.unet.save_attn_procs(tmp_path, weight_name=name, safe_serialization=suffix == ".safetensors")
    actual = unet_output(apply_custom_diffusion(ours, str(tmp_path / name)))
    assert relative_error(actual, torch_unet_output(theirs)) < 1e-5
    assert relative_error(unet_output(ours), actual) > 1e-3


ALL_KINDS = ("to_q", "to_k", "to_v", "to_out.0")


@pytest.mark.parametrize("kinds", [("to_k", "to_v"), ALL_KINDS])
@pytest.mark.parametrize("prefix", ["", "unet."])
@pytest.mark.parametrize("form", [dict, to_processor_form])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_every_form_of_the_names_replaces_the_same_weights(ours, theirs, tmp_path, kinds, prefix, form, suffix):
    weights, before = module_weights(kinds), jax.tree.map(np.array, ours.params)
    content = {f"{prefix}{name}": array for name, array in form(weights).items()}
    path = tmp_path / f"{WEIGHTS}{suffix}"
    save(content, path)
    changed = apply_custom_diffusion(ours, str(path))
    theirs.unet.load_state_dict(as_torch(weights), strict=False)
    theirs.unet.save_pretrained(tmp_path / "unet")
    jax.tree.map(np.testing.assert_array_equal, changed.params["unet"], load_unet(str(tmp_path / "unet"))[1])
    jax.tree.map(np.testing.assert_array_equal, ours.params, before)


def test_folder_with_tokens_computes_the_same(ours, theirs, tmp_path):
    trained_processors(theirs.unet)
    theirs.unet.save_attn_procs(tmp_path, weight_name=f"{WEIGHTS}.bin", safe_serialization=False)
    for token in ("<new1>", "<new2>"):
        torch.save({token: torch.randn(TEXT_WIDTH)}, tmp_path / f"{token}.bin")
        theirs.load_textual_inversion(str(tmp_path), weight_name=f"{token}.bin")
    (tmp_path / "notes.txt").write_text("not a weight")
    changed = apply_custom_diffusion(ours, str(tmp_path))
    assert relative_error(unet_output(changed), torch_unet_output(theirs)) < 1e-5
    assert relative_error(text_states(changed, PROMPTS), torch_text_states(theirs, PROMPTS)) < 1e-5


@pytest.mark.parametrize("compressed", [False, True])
def test_delta_files_of_the_authors(ours, theirs, tmp_path, compressed):
    """Whole weights replace those of the base, a product u @ v is added to them."""
    torch.manual_seed(0)
    weights, token = as_torch(module_weights(ALL_KINDS)), torch.randn(TEXT_WIDTH)
    if compressed:
        rows = {name: len(x) for name, x in module_weights().items()}
        weights = {name: {"u": torch.randn(n, 3), "v": torch.randn(3, TEXT_WIDTH)} for name, n in rows.items()}
        for name, factors in weights.items():
            theirs.unet.get_parameter(name).data += factors["u"] @ factors["v"]
    else:
        theirs.unet.load_state_dict(weights, strict=False)
    torch.save({"unet": weights, "modifier_token": {"<new1>": token}}, tmp_path / "delta.bin")
    theirs.load_textual_inversion({"<new1>": token})
    changed = apply_custom_diffusion(ours, str(tmp_path / "delta.bin"))
    assert relative_error(unet_output(changed), torch_unet_output(theirs)) < 1e-5
    assert relative_error(text_states(changed, PROMPTS), torch_text_states(theirs, PROMPTS)) < 1e-5


@pytest.mark.parametrize(
    ("suffix", "pattern"),
    [
        (None, (".attn2.to_k", ".attn2.to_v")),
        (".bin", ("mid_block/attentions_0/transformer_blocks_0/attn2/to_out",)),
        (".safetensors", (".attn2.to_v",)),
        (".safetensors", (".attn1", ".attn2")),
    ],
)
def test_saved_files_load_in_diffusers(ours, theirs, tmp_path, suffix, pattern):
    tuned = fine_tuned(ours, pattern, ("<new1>",))
    save_custom_diffusion(tuned, ours, str(tmp_path), ("<new1>",), suffix)
    token_suffix = ".safetensors" if suffix == ".safetensors" else ".bin"
    names = {f"{WEIGHTS}{suffix or '.pt'}", f"<new1>{token_suffix}"}
    assert {entry.name for entry in tmp_path.iterdir()} == names
    theirs.unet.load_attn_procs(str(tmp_path), weight_name=f"{WEIGHTS}{suffix or '.pt'}", _pipeline=theirs)
    theirs.load_textual_inversion(str(tmp_path), weight_name=f"<new1>{token_suffix}")
    assert relative_error(unet_output(tuned), torch_unet_output(theirs)) < 1e-5
    assert relative_error(text_states(tuned, PROMPTS), torch_text_states(theirs, PROMPTS)) < 1e-5
    again = apply_custom_diffusion(ours, str(tmp_path))
    assert_same_params(again, tuned)
    np.testing.assert_array_equal(tokenize(again, PROMPTS), tokenize(tuned, PROMPTS))


def test_saved_names_are_those_of_diffusers(ours, theirs, tmp_path):
    trained_processors(theirs.unet)
    theirs.unet.save_attn_procs(tmp_path, weight_name="theirs.bin", safe_serialization=False)
    save_custom_diffusion(fine_tuned(ours), ours, str(tmp_path))
    theirs_content = torch.load(tmp_path / "theirs.bin", weights_only=True)
    content = torch.load(tmp_path / f"{WEIGHTS}.pt", weights_only=True)
    assert content.keys() == theirs_content.keys()
    for name, value in theirs_content.items():
        assert content[name] == {} if isinstance(value, dict) else content[name].shape == value.shape, name


def test_safetensors_without_torch(ours, tmp_path, monkeypatch):
    tuned = fine_tuned(ours, tokens=("<new1>",))
    torch.save(as_torch(module_weights()), tmp_path / "x.pt")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match=r"suffix='\.pt' needs PyTorch"):
        save_custom_diffusion(tuned, ours, str(tmp_path / "saved"), ("<new1>",), ".pt")
    with pytest.raises(ValueError, match=r"x\.pt needs PyTorch"):
        apply_custom_diffusion(ours, str(tmp_path / "x.pt"))
    save_custom_diffusion(tuned, ours, str(tmp_path / "saved"), ("<new1>",))
    names = {entry.name for entry in (tmp_path / "saved").iterdir()}
    assert names == {f"{WEIGHTS}.safetensors", "<new1>.safetensors"}
    assert_same_params(apply_custom_diffusion(ours, str(tmp_path / "saved")), tuned)


def test_retrained_tokens_of_the_base_are_saved(ours, tmp_path):
    base = add_tokens(ours, {"<new1>": np.ones(TEXT_WIDTH, np.float32)})
    tuned = fine_tuned(ours, tokens=("<new1>",))
    save_custom_diffusion(tuned, base, str(tmp_path), ["<new1>"])
    assert_same_params(apply_custom_diffusion(ours, str(tmp_path)), tuned)


def test_existing_files_are_replaced_only_on_request(ours, tmp_path):
    tuned, one = (fine_tuned(ours, tokens=tokens) for tokens in (("<new1>", "<new2>"), ("<new1>",)))
    save_custom_diffusion(tuned, ours, str(tmp_path), ("<new1>", "<new2>"))
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileExistsError, match="<new1>.bin, <new2>.bin, .*overwrite=True"):
        save_custom_diffusion(one, ours, str(tmp_path), ("<new1>",), ".safetensors")
    save_custom_diffusion(one, ours, str(tmp_path), ("<new1>",), ".safetensors", overwrite=True)
    names = {entry.name for entry in tmp_path.iterdir()}
    assert names == {f"{WEIGHTS}.safetensors", "<new1>.safetensors", "notes.txt"}


@pytest.mark.parametrize(
    ("pattern", "tokens", "arguments", "message"),
    [
        ((".conv_in",), (), {}, r"2 lost:\n  unet/conv_in/bias\n  unet/conv_in/kernel"),
        ((".attn2.to_k",), ("<new1>", "<new2>"), {"tokens": ("<new1>",)}, "1 lost:\n  text_encoder/.*token_embedding"),
        ((".attn2.to_k",), (), {"tokens": ("heart",)}, "'heart'"),
        ((".attn2.to_k",), ("a/b",), {"tokens": ("a/b",)}, "'a/b'"),
        ((".attn2.to_k",), (), {"suffix": ".ckpt"}, r"suffix is '\.ckpt'"),
        (None, (), {}, "base"),
    ],
)
def test_changes_that_the_files_cannot_hold(ours, tmp_path, pattern, tokens, arguments, message):
    tuned = ours if pattern is None else fine_tuned(ours, pattern, tokens)
    with pytest.raises(ValueError, match=message):
        save_custom_diffusion(tuned, ours, str(tmp_path / "new"), **arguments)
    assert not list(tmp_path.iterdir())


KEY = f"{LAYERS[0]}.attn2.to_k.weight"


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


MODULES = module_weights()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({k: x for k, x in MODULES.items() if k != KEY}, f"1 missing:\n  {KEY}"),
        ({KEY: MODULES[KEY]}, "7 missing"),
        (MODULES | {"conv_in.weight": ones(2, 2)}, r"1 unknown:\n  conv_in\.weight"),
        (MODULES | {"x.attn2.to_k.weight": ones(2, 2)}, "1 unknown:\n  x.attn2"),
        (MODULES | {f"unet.{KEY}": MODULES[KEY]}, f"1 repeated:\n  unet.{KEY}"),
        (MODULES | {KEY: ones(32, 31)}, r"1 misshaped:\n  .*file \(32, 31\), model \(32, 32\)"),
        (MODULES | {KEY: np.full((32, 32), np.inf, np.float32)}, "to_k.weight holds a NaN"),
        (MODULES | {KEY: ones(32, 32, dtype=np.int32)}, "to_k.weight has the type int32"),
        ({"a.to_k.lora_A.weight": ones(2, 2)}, "LoRA"),
        ({"unet": {KEY: {"u": ones(32, 2), "v": ones(3, 32)}}}, r"1 misshaped:\n.* u \(32, 2\), v \(3, 32\)"),
        ({"unet": {KEY: {"u": ones(32, 2)}}}, r"1 misshaped:\n.* u \(32, 2\); model"),
        ({"unet": MODULES, "text_encoder": MODULES}, "8 unknown:\n  text_encoder"),
        ({"state_dict": {"model.diffusion_model.x": ones(2)}}, "latent-diffusion"),
        ({"state_dict": {"embed": ones(2)}}, "latent-diffusion"),
        ({"modifier_token": {"<new1>": ones(TEXT_WIDTH)}}, "8 missing"),
        ({"unet": MODULES, "modifier_token": {"<new1>": ones(3)}}, r"'<new1>' .*\(3,\)"),
    ],
)
def test_files_that_do_not_fit(ours, tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        apply_custom_diffusion(ours, save(content, tmp_path / "weights.pt"))


def test_folders_that_do_not_fit(ours, tmp_path):
    for path, name in ((tmp_path, "pytorch_custom_diffusion_weights.pt"), (tmp_path / "x.pt", "x.pt")):
        with pytest.raises(FileNotFoundError, match=name):
            apply_custom_diffusion(ours, str(path))
    torch.save(as_torch(MODULES), tmp_path / f"{WEIGHTS}.pt")
    for suffix in ("bin", "pt"):
        torch.save({"<new1>": torch.ones(TEXT_WIDTH)}, tmp_path / f"<new1>.{suffix}")
    with pytest.raises(ValueError, match=r"'<new1>' twice.*<new1>\.pt"):
        apply_custom_diffusion(ours, str(tmp_path))
    torch.save(as_torch(MODULES), tmp_path / f"{WEIGHTS}.bin")
    with pytest.raises(ValueError, match=r"weights\.pt and .*weights\.bin"):
        apply_custom_diffusion(ours, str(tmp_path))


def test_low_precision_model_rounds_once(ours, tmp_path):
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), ours.params)
    half = dataclasses.replace(ours, params=params)
    weights = module_weights()
    torch.save({name: array.double() / 3 for name, array in as_torch(weights).items()}, tmp_path / f"{WEIGHTS}.pt")
    changed = apply_custom_diffusion(half, str(tmp_path))
    leaf = flatten_names(changed.params["unet"])["mid_block/attentions_0/transformer_blocks_0/attn2/to_k/kernel"]
    expected = weights[f"{LAYERS[1]}.attn2.to_k.weight"].T.astype(np.float64) / 3
    np.testing.assert_array_equal(leaf, expected.astype(jnp.bfloat16))


ADAPTERS = {
    "custom diffusion": (apply_custom_diffusion, module_weights()),
    "lora": (
        merge_lora,
        {KEY.replace("weight", f"lora_{x}.weight"): np.ones((32, 32), np.float32) for x in "AB"},
    ),
    "token": (lambda _, path: read_token_file(path), {"<new1>": np.ones(TEXT_WIDTH, np.float32)}),
}


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_never_crash(ours, tmp_path, kind, suffix, data):
    load, weights = ADAPTERS[kind]
    path = tmp_path / f"weights{suffix}"
    save(weights, path)
    path.write_bytes(altered(data, path.read_bytes(), 2000))  # mostly in the names and sizes, at the start of the file
    try:
        assert load(ours, str(path))
    except ValueError as error:
        assert str(path) in str(error)
