"""A tiny random Stable Diffusion pipeline, made and saved by PyTorch diffusers: the tests' model folder."""

import diffusers
import torch
import transformers

from attrib_jax.convert.tokenizer import save_tokenizer, train_tokenizer

CAPTIONS = ("a red heart", "grinning face", "a polar bear: white", "woman’s hat", "flag: Côte d'Ivoire", "keycap 10")
TEXT_WIDTH = 32
MAX_LENGTH = 8


def make_torch_pipeline(
    path, seed: int = 0, prediction_type: str = "epsilon", unet_channels: tuple[int, ...] = (32, 64)
) -> diffusers.StableDiffusionPipeline:
    """Saves a pipeline for 16-pixel images (8x8x4 latents) as a diffusers folder at `path`, and returns it.

    Every weight is random, those included that PyTorch starts at 0 or 1, so that a swapped or forgotten one shows.
    `unet_channels` are those of the UNet's levels. One level compiles in a fraction of the time of two, having
    cross-attention on the way down and in the middle alone, and takes Winograd's convolutions from 32 channels on.
    """
    deeper = len(unet_channels) - 1
    last_up = "CrossAttnUpBlock2D" if deeper else "UpBlock2D"
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(CAPTIONS, vocab_size=600, model_max_length=MAX_LENGTH)
    pipeline = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(
            block_out_channels=(32, 64),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            norm_num_groups=8,
            sample_size=16,
        ),
        text_encoder=transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=TEXT_WIDTH,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=MAX_LENGTH,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        ),
        tokenizer=tokenizer,
        unet=diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=unet_channels,
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D",) + ("DownBlock2D",) * deeper,
            up_block_types=("UpBlock2D",) * deeper + (last_up,),
            cross_attention_dim=TEXT_WIDTH,
            attention_head_dim=4,
            norm_num_groups=8,
        ),
        scheduler=make_scheduler(prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        randomise(module)
    pipeline.save_pretrained(path)
    save_tokenizer(tokenizer, f"{path}/tokenizer")
    return pipeline


def make_torch_xl_pipeline(
    path, seed: int = 0, prediction_type: str = "epsilon", unet_channels: tuple[int, ...] = (64, 64)
) -> diffusers.StableDiffusionXLPipeline:
    """The same of Stable Diffusion XL: two text encoders, pooled text, size ids, and depths of the transformers.

    With two levels, a single file's config is inferred from its shapes.
    """
    deeper = len(unet_channels) - 1
    torch.manual_seed(seed)
    tokenizers = [train_tokenizer(CAPTIONS, vocab_size=600, model_max_length=MAX_LENGTH) for _ in range(2)]
    tokenizers[1].pad_token = "!"
    encoders = [
        encoder(
            transformers.CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=64 * number,  # diffusers tells them apart by it in a single file
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=number,
                max_position_embeddings=MAX_LENGTH,
                hidden_act=activation,
                projection_dim=40,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        for number, encoder, activation, tokenizer in zip(
            (1, 2),
            (transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection),
            ("quick_gelu", "gelu"),
            tokenizers,
        )
    ]
    pipeline = diffusers.StableDiffusionXLPipeline(
        vae=diffusers.AutoencoderKL(
            block_out_channels=(32, 64),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            sample_size=16,
            scaling_factor=0.13025,
        ),
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=unet_channels,
            layers_per_block=1,
            down_block_types=("DownBlock2D",) * deeper + ("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",) * deeper + ("UpBlock2D",),
            transformer_layers_per_block=(1,) * deeper + (1 + deeper,),
            attention_head_dim=(1,) * (1 + deeper),
            cross_attention_dim=192,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=40 + 6 * 8,
        ),
        scheduler=make_scheduler(prediction_type),
        add_watermarker=False,
    )
    for module in (pipeline.unet, pipeline.vae, *encoders):
        randomise(module)
    pipeline.save_pretrained(path)
    save_tokenizer(tokenizers[0], f"{path}/tokenizer")
    save_tokenizer(tokenizers[1], f"{path}/tokenizer_2")
    return pipeline


def make_scheduler(prediction_type: str) -> diffusers.DDIMScheduler:
    """The noise schedule of Stable Diffusion."""
    return diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def randomise(module: torch.nn.Module) -> None:
    """Adds noise to every parameter in place, and puts the module in evaluation mode."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    module.eval()
