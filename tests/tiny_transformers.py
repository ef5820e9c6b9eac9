"""Tiny random pipelines with a diffusion transformer, made and saved by PyTorch diffusers."""

import diffusers
import torch
import transformers

from attrib_jax.convert.tokenizer import save_tokenizer, train_tokenizer
from tests.tiny_pipeline import CAPTIONS, MAX_LENGTH, randomise

T5_WIDTH = 32


def t5_tokenizer() -> transformers.T5TokenizerFast:
    """A Unigram tokenizer that spells words in letters."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    letters = sorted({letter for caption in CAPTIONS for letter in caption.lower()} - {" "})
    pieces = [("▁", -2.0), ("▁a", -2.5), *((letter, -3.0) for letter in letters)]
    return transformers.T5TokenizerFast(vocab=special + pieces, extra_ids=0)


def _clip(tokenizer, with_projection: bool, width: int):
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_LENGTH,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (transformers.CLIPTextModelWithProjection if with_projection else transformers.CLIPTextModel)(config)


def _t5(tokenizer):
    sizes = {"d_model": T5_WIDTH, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    return transformers.T5EncoderModel(
        transformers.T5Config(vocab_size=len(tokenizer), feed_forward_proj="gated-gelu", **sizes)
    )


def _vae(channels: int, shift: float | None):
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=16,
        latent_channels=channels,
        scaling_factor=1.5,
        shift_factor=shift,
        use_quant_conv=shift is None,
        use_post_quant_conv=shift is None,
    )


def make_transformer_pipeline(path, kind: str, with_t5: bool = True):
    """Saves a pipeline for 16-pixel images as a diffusers folder at `path`, and returns it.

    `kind` is "sd3", "flux" (dev), "schnell", "pixart" (Sigma) or "alpha"; `with_t5` counts for "sd3" alone.
    """
    torch.manual_seed(0)
    clip, t5 = train_tokenizer(CAPTIONS, vocab_size=600, model_max_length=MAX_LENGTH), t5_tokenizer()
    heads = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}
    if kind == "sd3":
        texts = {"text_encoder": _clip(clip, True, 12), "text_encoder_2": _clip(clip, True, 16)}
        pipeline = diffusers.StableDiffusion3Pipeline(
            transformer=diffusers.SD3Transformer2DModel(
                sample_size=8,
                in_channels=6,
                out_channels=6,
                joint_attention_dim=T5_WIDTH,
                caption_projection_dim=16,
                pooled_projection_dim=28,
                pos_embed_max_size=4,
                dual_attention_layers=(0,),
                qk_norm="rms_norm",
                **heads,
            ),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_vae(6, 0.1),
            **texts,
            text_encoder_3=_t5(t5) if with_t5 else None,
            tokenizer=clip,
            tokenizer_2=clip,
            tokenizer_3=t5 if with_t5 else None,
        )
    elif kind in ("flux", "schnell"):
        pipeline = diffusers.FluxPipeline(
            transformer=diffusers.FluxTransformer2DModel(
                in_channels=24,
                num_single_layers=1,
                joint_attention_dim=T5_WIDTH,
                pooled_projection_dim=12,
                guidance_embeds=kind == "flux",
                axes_dims_rope=(2, 2, 4),
                **heads,
            ),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=kind == "flux"),
            vae=_vae(6, 0.1),
            text_encoder=_clip(clip, False, 12),
            text_encoder_2=_t5(t5),
            tokenizer=clip,
            tokenizer_2=t5,
        )
    else:
        pipeline_class = diffusers.PixArtAlphaPipeline if kind == "alpha" else diffusers.PixArtSigmaPipeline
        pipeline = pipeline_class(
            transformer=diffusers.PixArtTransformer2DModel(
                num_attention_heads=2,
                attention_head_dim=12,
                num_layers=2,
                cross_attention_dim=24,
                caption_channels=T5_WIDTH,
                sample_size=8,
            ),
            scheduler=diffusers.DDIMScheduler(clip_sample=False),
            vae=_vae(4, None),
            text_encoder=_t5(t5),
            tokenizer=t5,
        )
    parts = {name: module for name, module in pipeline.components.items() if isinstance(module, torch.nn.Module)}
    for module in parts.values():
        randomise(module)
    pipeline.save_pretrained(path)
    for name in ("tokenizer", "tokenizer_2"):
        if getattr(pipeline, name, None) is clip:
            save_tokenizer(clip, f"{path}/{name}")
    return pipeline
