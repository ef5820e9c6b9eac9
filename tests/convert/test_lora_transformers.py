"""LoRA of SD 3 and FLUX.1 in every naming, with matrices that the original code has as one."""

import numpy as np
import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

from attrib_jax.convert.adapters.lora import attach_lora, merge_lora
from attrib_jax.convert.ldm.names import pack
from attrib_jax.convert.ldm.transformers import transformer_table
from attrib_jax.convert.load import ModelSource, load_model, load_pipeline
from attrib_jax.convert.weights.state_dicts import state_dict_of
from attrib_jax.core.weights import flatten_names
from tests.convert.files import save
from tests.tiny_transformers import make_transformer_pipeline

RANK = 6
FUSED = {
    "flux": (
        "double_blocks.0.img_attn.qkv",
        "double_blocks.1.txt_attn.qkv",
        "double_blocks.1.img_attn.proj",
        "double_blocks.0.txt_mlp.2",
        "single_blocks.0.linear1",
        "single_blocks.0.linear2",
        "img_in",
        "final_layer.adaLN_modulation.1",
        "final_layer.linear",
    ),
    "sd3": (
        "joint_blocks.0.x_block.attn2.qkv",
        "joint_blocks.1.context_block.attn.qkv",
        "joint_blocks.0.x_block.mlp.fc1",
        "joint_blocks.1.context_block.adaLN_modulation.1",
        "final_layer.adaLN_modulation.1",
        "y_embedder.mlp.0",
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = {}
    for kind in FUSED:
        path = str(tmp_path_factory.mktemp("models") / kind)
        make_transformer_pipeline(path, kind)
        made[kind] = path, load_pipeline(path)
    return made


def packed(pipeline):
    """The transformer's weights in the naming of the original code."""
    state = state_dict_of(pipeline.params["unet"])
    return {name: x.read() for name, x in pack(state, transformer_table(pipeline.unet.config, state)).items()}


def factors(pipeline, modules, seed=0):
    """Module of the original code -> (down, up)."""
    rng, weights = np.random.default_rng(seed), packed(pipeline)
    shapes = {module: weights[f"{module}.weight"].shape for module in modules}
    return {
        module: tuple(0.3 * rng.normal(size=size).astype(np.float32) for size in ((RANK, columns), (rows, RANK)))
        for module, (rows, columns) in shapes.items()
    }


def kohya(pairs, alpha=None):
    content = {}
    for module, (down, up) in pairs.items():
        name = f"lora_unet_{module.replace('.', '_')}"
        content |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        if alpha is not None:
            content[f"{name}.alpha"] = np.float32(alpha)
    return content


def dotted(pairs, prefix):
    content = {}
    for module, (down, up) in pairs.items():
        content |= {f"{prefix}{module}.lora_A.weight": down, f"{prefix}{module}.lora_B.weight": up}
    return content


@pytest.mark.parametrize("kind", FUSED)
@pytest.mark.parametrize("naming", ["kohya", "diffusion_model.", "transformer.", ""])
def test_a_matrix_of_several_weights_changes_each(models, tmp_path, kind, naming):
    pipeline = models[kind][1]
    pairs = factors(pipeline, FUSED[kind])
    content, strength = (kohya(pairs, 3.0), 0.5) if naming == "kohya" else (dotted(pairs, naming), 1)
    file = save(content, tmp_path / "lora.safetensors")
    before, after = packed(pipeline), packed(merge_lora(pipeline, file, 0.7))
    for name, weight in before.items():
        module = name.removesuffix(".weight")
        down, up = pairs.get(module, (np.zeros(1), np.zeros(1)))
        change = 0.7 * strength * (up.astype(np.float64) @ down) if module in pairs and name != module else 0
        np.testing.assert_allclose(after[name], weight + change, rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("is_sparse", [False, True])
def test_flux_files_of_kohya_are_what_diffusers_converts_them_to(models, tmp_path, is_sparse):
    path, pipeline = models["flux"]
    qkv = FUSED["flux"][0]
    # diffusers knows the published width alone in linear1, and leaves alphas of the final layer out.
    converted = [name for name in FUSED["flux"] if not name.startswith(("single_blocks.0.linear1", "final_layer"))]
    pairs = factors(pipeline, converted)
    if is_sparse:
        down, up = pairs[qkv]
        mask = np.kron(np.eye(3), np.ones((len(up) // 3, RANK // 3)))
        pairs[qkv] = down, (up * mask).astype(np.float32)
    last = factors(pipeline, [name for name in FUSED["flux"] if name.startswith("final_layer")])
    content = kohya(pairs, 2.0) | kohya(last)
    theirs = _convert_kohya_flux_lora_to_diffusers({k: torch.tensor(x) for k, x in content.items()})
    ours = save(content, tmp_path / "kohya.safetensors")
    other = save({name: x.contiguous().numpy() for name, x in theirs.items()}, tmp_path / "theirs.safetensors")
    merged = [flatten_names(merge_lora(pipeline, file).params["unet"]) for file in (ours, other)]
    for name, leaf in merged[0].items():
        np.testing.assert_allclose(leaf, merged[1][name], rtol=1e-6, atol=1e-6, err_msg=name)
    apart = [flatten_names(attach_lora(pipeline, file).params["unet"]) for file in (ours, other)]
    assert {name: x.shape for name, x in apart[0].items()} == {name: x.shape for name, x in apart[1].items()}
    assert apart[0]["transformer_blocks_0/attn/to_k/lora_A/kernel"].shape[1] == (RANK // 3 if is_sparse else RANK)
    for name, leaf in merged[0].items():
        layer = name.removesuffix("/kernel")
        if f"{layer}/lora_A/kernel" in apart[0]:
            change = apart[0][f"{layer}/lora_A/kernel"] @ apart[0][f"{layer}/lora_B/kernel"]
            np.testing.assert_allclose(apart[0][name] + change, leaf, rtol=1e-5, atol=1e-5, err_msg=name)
    loaded = load_model(ModelSource(model=path, lora=(ours,)), weights=("lora",))
    assert flatten_names(loaded.params["unet"]).keys() == apart[0].keys()


def test_what_does_not_fit_is_named(models, tmp_path):
    pipeline = models["flux"][1]
    qkv = FUSED["flux"][0]
    pairs = factors(pipeline, [qkv])
    down, up = pairs[qkv]
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    loha = {f"{name}.hada_w{i}_{side}": x for i in (1, 2) for side, x in (("a", up), ("b", down))}
    twice = dotted({"transformer_blocks.0.attn.to_k": (down, up[:16])}, "transformer.")
    absent = "lora_unet_double_blocks_7_img_mlp_0"
    cases = [
        (kohya(pairs) | {f"{absent}.alpha": np.float32(1)}, f"1 unknown:\n  {absent}"),
        (kohya({qkv: (down, up[:-1])}), "factors of double_blocks.0.img_attn.qkv have 47 rows"),
        (kohya({qkv: (down[:, 1:], up)}), "misshaped"),
        (loha, "of another form:\n  lora_unet_double_blocks_0_img_attn_qkv.hada_w1"),
        (kohya(pairs) | twice, "repeated:\n  "),
        ({"double_blocks.0.processor.qkv_lora1.down.weight": down}, "XLabs' naming"),
        ({"unet.mid_block.attentions.0.proj_in.lora_A.weight": down}, "unknown:\n  unet.mid_block"),
    ]  # fmt: skip
    for number, (content, message) in enumerate(cases):
        with pytest.raises(ValueError, match=f"(?s){message}"):
            merge_lora(pipeline, save(content, tmp_path / f"{number}.safetensors"))
