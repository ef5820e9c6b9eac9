"""Shrunken Stable Diffusion 1 and 2 pipelines whose config the tensor shapes determine, and their single files."""

import diffusers
import torch
import transformers
from safetensors.torch import load_file, save_file

from attrib_jax.convert.load import load_pipeline
from attrib_jax.convert.single_file import load_single_file, save_single_file
from attrib_jax.convert.tokenizer import save_tokenizer, train_tokenizer
from tests.tiny_pipeline import CAPTIONS, MAX_LENGTH, make_scheduler, randomise

PREDICTIONS = {"sd1": "epsilon", "sd2": "v_prediction"}


def make_shrunken_pipeline(path, family: str) -> diffusers.StableDiffusionPipeline:
    """Saves a pipeline whose config the shapes tell: as published, with narrow and few blocks."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(CAPTIONS, vocab_size=600, model_max_length=MAX_LENGTH)
    is_second = family == "sd2"
    text = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=1,
        max_position_embeddings=MAX_LENGTH,
        hidden_act="gelu" if is_second else "quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    pipeline = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(
            block_out_channels=(32, 64, 64),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            sample_size=4 * (96 if is_second else 64),
        ),
        text_encoder=transformers.CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=diffusers.UNet2DConditionModel(
            sample_size=96 if is_second else 64,
            block_out_channels=(64, 128) if is_second else (32, 64, 64),
            layers_per_block=2 if is_second else 1,
            down_block_types=("CrossAttnDownBlock2D",) * (1 if is_second else 2) + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (1 if is_second else 2),
            cross_attention_dim=64,
            attention_head_dim=[1, 2] if is_second else 8,
            use_linear_projection=is_second,
        ),
        scheduler=make_scheduler(PREDICTIONS[family]),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        randomise(module)
    pipeline.save_pretrained(path)
    save_tokenizer(tokenizer, f"{path}/tokenizer")
    return pipeline


class Model:
    """One family's pipeline in PyTorch, the same in ours, its folder, and the single file that we write of it."""

    def __init__(self, root, family):
        self.folder, self.file = str(root / family), str(root / f"{family}.safetensors")
        self.theirs = make_shrunken_pipeline(self.folder, family)
        self.ours = load_pipeline(self.folder)
        save_single_file(self.ours, self.file)

    def load(self, path=None, **arguments):
        return load_single_file(str(path or self.file), self.folder, **arguments)


def rewrite(source, path, change=lambda state: state, metadata=None):
    """Writes the tensors of the file `source`, changed by `change(state) -> state`, to `path`."""
    state = load_file(source)
    save_file({name: x.contiguous() for name, x in (change(state) or state).items()}, str(path), metadata)
    return path
