"""Writes a diffusers folder of benchmarks/torch_models.py in the formats that users hold, with PyTorch's own writers.

Every writer takes the folder (`base`), the place to write to and the model's `Spec`, and holds one part in memory. The
reader of the original single-file naming that checks ours is diffusers' `from_single_file`.
"""

import contextlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import diffusers
import huggingface_hub
import numpy as np
import safetensors
import torch
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor
from diffusers.utils import convert_state_dict_to_diffusers

from benchmarks.torch_models import (
    PARTS,
    PROMPTS,
    Spec,
    copy_small_files,
    load_parts,
    load_torch_tokenizer,
    new_part,
    outputs,
    save_reference,
    spec,
    write_json,
)
from tests.convert.old_layout import age_folder, copy_folder, store_weights

TOKEN = "<new1>"
LORA_RANK, LORA_SCALE = 4, 0.7
_STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "pytorch_model"}
_SHARDS = 4  # that the largest part is cut into, at least


def write_folder(base: Path, target: Path, model: Spec, sharded: bool = False, half: bool = False) -> None:
    """A folder with safetensors; `half` adds the fp16 variant's file names, `sharded` an index."""
    copy_small_files(base, target)
    size = _shard_size(base) if sharded else "100GB"
    for part, module in load_parts(base):
        module = module.half() if half else module
        module.save_pretrained(target / part, max_shard_size=size, variant="fp16" if half else None)


def write_bin_folder(base: Path, target: Path, model: Spec, sharded: bool = False) -> None:
    """A folder with `.bin` files, which transformers no longer writes itself."""
    copy_small_files(base, target)
    for part, module in load_parts(base):
        huggingface_hub.save_torch_state_dict(
            module.state_dict(),
            target / part,
            filename_pattern=f"{_STEMS[part]}{{suffix}}.bin",
            max_shard_size=_shard_size(base) if sharded else "100GB",
            safe_serialization=False,
        )


def write_old_folder(base: Path, target: Path, model: Spec) -> None:
    """A `.bin` folder with the names, configs and files of the published ones, see `age_folder`; the schedule stays."""
    copy_folder(base, target)
    age_folder(target, generation=1 if model.name == "sd14" else 2)
    write_json({**model.scheduler}, target / "scheduler" / "scheduler_config.json")
    store_weights(target, kind="bin")


def write_bare_unet(base: Path, target: Path, model: Spec, kind: str = "bin", sharded: bool = False) -> None:
    """`model.bin` or `model.safetensors`, or shards with an index: nothing but the UNet's state dict."""
    target.mkdir(parents=True)
    huggingface_hub.save_torch_state_dict(
        PARTS["unet"].from_pretrained(base / "unet").state_dict(),
        target,
        filename_pattern=f"model{{suffix}}.{kind}",
        max_shard_size=_shard_size(base, "unet") if sharded else "100GB",
        safe_serialization=kind == "safetensors",
    )


def write_unet_and_base(base: Path, target: Path, model: Spec) -> None:
    """`model.bin`, its config in unet.json, and a Stable Diffusion 2 folder with the other parts of `base`."""
    write_bare_unet(base, target, model)
    write_json({"unet": {**model.unet}, "scheduler": {**model.scheduler}}, target / "unet.json")
    copy_small_files(base, target / "base")
    for part in ("vae", "text_encoder"):
        for file in (base / part).glob("*.safetensors"):
            (target / "base" / part / file.name).hardlink_to(file)
    other = spec("sd21base", model.scale)
    new_part(other, "unet", seed=99).save_pretrained(target / "base" / "unet")
    write_json({**other.scheduler}, target / "base" / "scheduler" / "scheduler_config.json")


def write_checkpoint(single: Path, target: Path, model: Spec) -> None:
    """A `.ckpt` as training wrote it: our single file's tensors, buffers, unused tensors and foreign objects."""
    target.mkdir(parents=True)
    with safetensors.safe_open(single, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    tensors = _schedule_buffers() | tensors | _unused_text_tensors(tensors)
    callback = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks.model_checkpoint"})
    content = {
        "epoch": 3,
        "global_step": {"sd21": 110000, "sd21base": 220000}.get(model.name, 470000),
        "pytorch-lightning_version": "1.4.2",
        "state_dict": tensors,
        "callbacks": {callback: {"monitor": "val/loss", "best_model_score": torch.tensor(0.1)}},
        "optimizer_states": [],
        "lr_schedulers": [],
    }
    with _modules_of(callback):
        torch.save(content, target / "model.ckpt")


@contextlib.contextmanager
def _modules_of(cls: type) -> Iterator[None]:
    """Makes a class importable where it says that it lives, as pickling it asks for."""
    parts = cls.__module__.split(".")
    names = [".".join(parts[: count + 1]) for count in range(len(parts))]
    sys.modules.update({name: types.ModuleType(name) for name in names})
    setattr(sys.modules[cls.__module__], cls.__name__, cls)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def _schedule_buffers() -> dict[str, torch.Tensor]:
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    levels = np.cumprod(1 - betas)
    buffers = {"betas": betas, "alphas_cumprod": levels, "sqrt_alphas_cumprod": levels**0.5}
    buffers["alphas_cumprod_prev"] = np.append(1.0, levels[:-1])
    buffers["sqrt_one_minus_alphas_cumprod"] = (1 - levels) ** 0.5
    found = {name: torch.from_numpy(values.astype(np.float32)) for name, values in buffers.items()}
    return found | {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(470000)}


def _unused_text_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The position ids of CLIP in a Stable Diffusion 1 file; the last layer and the projection in one of version 2."""
    prefix = "cond_stage_model.model."
    last = f"{prefix}transformer.resblocks.22."
    layer = {name.replace(".22.", ".23."): -value for name, value in tensors.items() if name.startswith(last)}
    if not layer:
        return {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}
    width = tensors[f"{prefix}ln_final.weight"].shape[0]
    projection = {f"{prefix}text_projection": torch.eye(width), f"{prefix}logit_scale": torch.tensor(4.6)}
    return layer | projection


@torch.no_grad()
def write_custom_diffusion(base: Path, target: Path, model: Spec, reference: Path) -> None:
    """Key and value projections of the cross-attention and the vector of `TOKEN`; diffusers applies the first."""
    target.mkdir(parents=True)
    generator = torch.Generator().manual_seed(5)
    tokenizer = load_torch_tokenizer(base)
    tokenizer.add_tokens(TOKEN)
    found = {}
    for part, module in load_parts(base):
        if part == "unet":
            module.set_attn_processor(_custom_processors(module, generator))
            weights = {"weight_name": "pytorch_custom_diffusion_weights.pt", "safe_serialization": False}
            module.save_attn_procs(target, **weights)
        elif part == "text_encoder":
            vector = 0.05 * torch.randn(module.config.hidden_size, generator=generator)
            torch.save({TOKEN: vector}, target / f"{TOKEN}.bin")
            module.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(TOKEN)] = vector
        prompts = [*PROMPTS, f"photo of a {TOKEN} cat", TOKEN]
        found |= outputs(model, part, module, tokenizer, prompts)
    save_reference(base, reference, found)


def _custom_processors(unet: torch.nn.Module, generator: torch.Generator) -> dict[str, torch.nn.Module]:
    processors = {}
    for name, attention in _attentions(unet):
        if not name.endswith("attn2"):
            processors[f"{name}.processor"] = CustomDiffusionAttnProcessor(train_kv=False, train_q_out=False)
            continue
        width, text_width = attention.to_k.weight.shape
        processor = CustomDiffusionAttnProcessor(True, False, hidden_size=width, cross_attention_dim=text_width)
        for leaf in ("to_k", "to_v"):
            weight = getattr(attention, leaf).weight
            moved = weight + torch.randn(weight.shape, generator=generator) * 0.3 / text_width**0.5
            getattr(processor, f"{leaf}_custom_diffusion").weight.copy_(moved)
        processors[f"{name}.processor"] = processor
    return processors


@torch.no_grad()
def write_lora(base: Path, target: Path, model: Spec, reference: Path) -> None:
    """A diffusers LoRA file on every attention projection of the UNet; the reference adds scale * up @ down itself."""
    generator = torch.Generator().manual_seed(6)
    tokenizer, found, layers = load_torch_tokenizer(base), {}, {}
    for part, module in load_parts(base):
        if part == "unet":
            for name, attention in _attentions(module):
                projections = {"to_q": attention.to_q, "to_k": attention.to_k, "to_v": attention.to_v}
                for leaf, linear in {**projections, "to_out.0": attention.to_out[0]}.items():
                    wide, narrow = linear.weight.shape
                    down = torch.randn((LORA_RANK, narrow), generator=generator) / narrow**0.5
                    up = 0.1 * torch.randn((wide, LORA_RANK), generator=generator)
                    linear.weight += LORA_SCALE * (up @ down)
                    layers |= {f"{name}.{leaf}.lora_A.weight": down, f"{name}.{leaf}.lora_B.weight": up}
        found |= outputs(model, part, module, tokenizer)
    # The training scripts of diffusers turn peft's names into these before they save.
    diffusers.StableDiffusionPipeline.save_lora_weights(
        target, unet_lora_layers=convert_state_dict_to_diffusers(layers)
    )
    save_reference(base, reference, found)


def _attentions(unet: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    for name, module in unet.named_modules():
        if name.endswith(("attn1", "attn2")):
            yield name, module


def same_folder(base: Path, target: Path) -> int:
    """The number of tensors of a folder, as PyTorch reads it; ValueError if one differs from `base`'s in a bit."""
    return sum(
        _same(part, *(PARTS[part].from_pretrained(folder / part) for folder in (base, target))) for part in PARTS
    )


def same_single_file(base: Path, file: Path) -> int:
    """`same_folder` for a file in the original naming, read by diffusers' own converter."""
    pipeline = diffusers.StableDiffusionPipeline.from_single_file(str(file), config=str(base), local_files_only=True)
    return sum(_same(part, module, getattr(pipeline, part)) for part, module in load_parts(base))


def _same(part: str, expected: torch.nn.Module, actual: torch.nn.Module) -> int:
    expected, actual = expected.state_dict(), actual.state_dict()
    differing = [name for name in expected if name not in actual or not torch.equal(expected[name], actual[name])]
    if differing or len(expected) != len(actual):
        raise ValueError(f"{part}: {len(differing)} of {len(expected)} tensors differ or are missing: {differing[:5]}")
    return len(expected)


def _shard_size(base: Path, part: str = "*") -> int:
    return max(file.stat().st_size for file in base.glob(f"{part}/*.safetensors")) // _SHARDS
