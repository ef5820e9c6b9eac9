"""LoHa, LoKr, DoRA and Tucker factors against PEFT's own layers; several adapters against diffusers' set_adapters."""

import numpy as np
import peft
import pytest
import safetensors.numpy
import torch

from attrib_jax.convert.adapters.lora import merge_lora
from attrib_jax.convert.weights.names import name_table
from attrib_jax.core.weights import flatten_names
from tests.convert.files import save
from tests.convert.outputs import relative_error, text_states, torch_text_states, torch_unet_output, unet_output
from tests.tiny_pipeline import CAPTIONS

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
LINEAR, WIDE = f"{BLOCK}.attn2.to_k", f"{BLOCK}.ff.net.2"
CONV, POINTWISE = "down_blocks.1.resnets.0.conv1", "down_blocks.0.attentions.0.proj_in"
MODULES = [LINEAR, WIDE, f"{BLOCK}.attn1.to_out.0", CONV, POINTWISE]

CONFIGS = {
    "lora, rank-stabilised": peft.LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=MODULES),
    "dora": peft.LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=MODULES),
    "loha": peft.LoHaConfig(r=3, alpha=5, target_modules=MODULES),
    "loha with cores": peft.LoHaConfig(r=3, alpha=5, use_effective_conv2d=True, target_modules=MODULES),
    "lokr": peft.LoKrConfig(r=3, alpha=5, decompose_factor=4, target_modules=MODULES),
    "lokr with cores": peft.LoKrConfig(
        r=2, alpha=5, decompose_both=True, decompose_factor=8, use_effective_conv2d=True, target_modules=MODULES
    ),
    "lokr of whole factors": peft.LoKrConfig(r=64, alpha=48, decompose_factor=8, target_modules=MODULES),
}


def save_with_peft(theirs, config, folder):
    """A random adapter of the UNet as PEFT writes it; `theirs` computes with it from now on."""
    model = peft.get_peft_model(theirs.unet, config)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # Magnitudes keep their size, as training leaves them near the norms that they start from.
            scale = 0.1 * parameter.data.abs().mean() if "magnitude" in name else 0.3
            parameter.data += scale * torch.randn_like(parameter)
    model.eval().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_form_computes_the_same_as_peft(ours, theirs, tmp_path, name):
    base = unet_output(ours)
    changed = merge_lora(ours, save_with_peft(theirs, CONFIGS[name], tmp_path))
    assert relative_error(unet_output(changed), torch_unet_output(theirs)) < 1e-5
    assert relative_error(unet_output(changed), base) > 1e-3


@pytest.mark.parametrize("name", ["dora", "loha with cores", "lokr with cores"])
def test_kohya_names_with_alphas_are_the_same(ours, theirs, tmp_path, name):
    folder = save_with_peft(theirs, CONFIGS[name], tmp_path)
    content = {}
    for key, array in safetensors.numpy.load_file(f"{folder}/adapter_model.safetensors").items():
        module = next(module for module in MODULES if f".{module}." in key)
        role = key.split(f"{module}.")[1].replace("lora_A", "lora_down").replace("lora_B", "lora_up")
        if role.startswith("lora_magnitude"):
            role, array = "dora_scale", array.reshape(-1, *[1] * (3 if module in (CONV, POINTWISE) else 1))
        kohya = f"lora_unet_{module.replace('.', '_')}"
        content |= {f"{kohya}.{role}": array, f"{kohya}.alpha": 5.0}
    changed = merge_lora(ours, save(content, tmp_path / "kohya.safetensors"))
    assert relative_error(unet_output(changed), torch_unet_output(theirs)) < 1e-5


def weight(pipeline, module):
    path = name_table(pipeline.params["unet"])[f"{module}.weight"]
    axes = (3, 2, 0, 1) if module in (CONV, POINTWISE) else (1, 0)
    return np.asarray(flatten_names(pipeline.params["unet"])[path], np.float64).transpose(axes)


def kohya_file(tmp_path, module, **tensors):
    name = f"lora_unet_{module.replace('.', '_')}"
    rng = np.random.default_rng(0)
    arrays = {role: rng.normal(size=x).astype(np.float32) if isinstance(x, tuple) else x for role, x in tensors.items()}
    return save(
        {f"{name}.{role.replace('__', '.')}": x for role, x in arrays.items()}, tmp_path / "x.safetensors"
    ), arrays


def test_a_tucker_core_is_three_convolutions_in_a_row(ours, tmp_path):
    path, arrays = kohya_file(
        tmp_path,
        CONV,
        lora_down__weight=(3, 32, 1, 1),
        lora_mid__weight=(3, 3, 3, 3),
        lora_up__weight=(64, 3, 1, 1),
        alpha=6.0,
    )
    change = weight(merge_lora(ours, path), CONV) - weight(ours, CONV)
    x = torch.randn(1, 32, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    down, mid, up = (torch.from_numpy(arrays[f"lora_{role}__weight"]).double() for role in ("down", "mid", "up"))
    conv = torch.nn.functional.conv2d
    expected = 2 * conv(conv(conv(x, down), mid, padding=1), up)
    torch.testing.assert_close(conv(x, torch.from_numpy(change), padding=1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("module", [LINEAR, CONV])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_magnitude_goes_with_outputs_or_inputs_by_its_shape(ours, tmp_path, module, axis, scale):
    base = weight(ours, module)
    shape = base.shape
    magnitude = tuple(size if i == axis else 1 for i, size in enumerate(shape))
    path, arrays = kohya_file(
        tmp_path,
        module,
        lora_down__weight=(2, *shape[1:]),
        lora_up__weight=(shape[0], 2, *[1] * (len(shape) - 2)),
        dora_scale=magnitude,
    )
    product = np.einsum(
        "or,r...->o...", arrays["lora_up__weight"].reshape(shape[0], 2), arrays["lora_down__weight"].astype(np.float64)
    )
    moved = base + scale * product
    norm = np.linalg.norm(np.moveaxis(moved, axis, 0).reshape(shape[axis], -1), axis=1).reshape(magnitude)
    np.testing.assert_allclose(
        weight(merge_lora(ours, path, scale), module), arrays["dora_scale"] * moved / norm, rtol=1e-5, atol=1e-6
    )


def test_names_of_the_original_code_are_the_same_weights(ours, tmp_path):
    pair = {"lora_down.weight": np.ones((2, 32), np.float32), "lora_up.weight": np.full((32, 2), 0.1, np.float32)}
    own, original = LINEAR.replace(".", "_"), "input_blocks_1_1_transformer_blocks_0_attn2_to_k"
    one, other = (
        merge_lora(
            ours, save({f"lora_unet_{name}.{role}": x for role, x in pair.items()}, tmp_path / f"{name}.safetensors")
        )
        for name in (own, original)
    )
    np.testing.assert_array_equal(weight(one, LINEAR), weight(other, LINEAR))
    assert not np.array_equal(weight(one, LINEAR), weight(ours, LINEAR))


def test_several_files_are_those_of_set_adapters(ours, theirs, tmp_path):
    scales = {"first": 0.8, "second": -0.5}
    targets = {"first": ["to_q", "to_k"], "second": ["to_k", "to_v"]}
    paths = []
    for seed, name in enumerate(scales):
        content = {}
        for part, width in (("unet", 32), ("text_encoder", 32)):
            modules = [f"{BLOCK}.attn2.{x}" for x in targets[name]]
            if part == "text_encoder":
                modules = [f"text_model.encoder.layers.0.self_attn.{x[3:]}_proj" for x in targets[name]]
            rng = np.random.default_rng(seed)
            for module in modules:
                shapes = {"lora_A": (3, width), "lora_B": (width, 3)}
                content |= {
                    f"{part}.{module}.{x}.weight": rng.normal(size=s).astype(np.float32) for x, s in shapes.items()
                }
        paths.append(save(content, tmp_path / f"{name}.safetensors", {"format": "pt"}))
        theirs.load_lora_weights(paths[-1], adapter_name=name)
    theirs.set_adapters(list(scales), list(scales.values()))
    changed = merge_lora(ours, paths, list(scales.values()))
    assert relative_error(unet_output(changed), torch_unet_output(theirs)) < 1e-5
    prompts = list(CAPTIONS)
    assert relative_error(text_states(changed, prompts), torch_text_states(theirs, prompts)) < 1e-5
    other_order = merge_lora(ours, paths[::-1], list(scales.values())[::-1])
    np.testing.assert_allclose(weight(other_order, LINEAR), weight(changed, LINEAR), atol=1e-7)
    with pytest.raises(ValueError, match="scale has 3 numbers for 2 LoRA files"):
        merge_lora(ours, paths, [1.0, 2.0, 3.0])


HALF = {"hada_w1_a": (32, 2), "hada_w1_b": (2, 32)}
WHOLE = {"lokr_w1": (4, 4), "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 8)}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (HALF, "without their other half"),
        (HALF | {"hada_w2_a": (32, 2), "hada_w2_b": (2, 31)}, "1 misshaped"),
        (HALF | {"hada_w2_a": (32, 2), "hada_w2_b": (2, 32), "hada_t1": (2, 2, 1, 1)}, "without their other half"),
        ({"lokr_w1": (4, 4)}, "without their other half"),
        (WHOLE | {"lokr_w2": (8, 8)}, "without their other half"),
        (WHOLE | {"lokr_w1": (4, 5)}, r"1 misshaped:\n  .*lokr_w1 \(4, 5\).*model \(32, 32\)"),
        ({"dora_scale": (32, 1)}, "without their other half"),
        (WHOLE | {"dora_scale": (31, 1)}, "1 misshaped"),
        (WHOLE | {"dora_scale": (32, 32)}, "1 misshaped"),
    ],
)
def test_parts_that_do_not_fit(ours, tmp_path, tensors, message):
    path, _ = kohya_file(tmp_path, LINEAR, **tensors)
    with pytest.raises(ValueError, match=message):
        merge_lora(ours, path)


def test_the_base_is_named_by_any_form(ours, tmp_path):
    tensors = {"hada_w1_a": (32, 2), "hada_w1_b": (2, 768), "hada_w2_a": (32, 2), "hada_w2_b": (2, 768)}
    with pytest.raises(ValueError, match=r"Stable Diffusion 1 \(text of width 768; this model's is 32\)"):
        merge_lora(ours, kohya_file(tmp_path, LINEAR, **tensors)[0])


def test_files_of_peft_need_their_config(ours, theirs, tmp_path):
    folder = save_with_peft(theirs, CONFIGS["dora"], tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="adapter_config.json"):
        merge_lora(ours, folder)
