"""Tiny random pipelines of the families, all with the CLIP tokenizer of the SD pipeline in tests/parity."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import nn
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
)

from support.runs import PARITY, load_pipeline


def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(PARITY / "pipeline" / "tokenizer")


def clip(kind: type[nn.Module] = CLIPTextModel) -> nn.Module:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer()), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=77, projection_dim=16,
    )  # fmt: skip
    return kind(config)


def t5() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=len(tokenizer()), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )


def vae(channels: int) -> AutoencoderKL:
    return AutoencoderKL(block_out_channels=(4, 4), norm_num_groups=2, latent_channels=channels, sample_size=16,
                         down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                         shift_factor=0.1)  # fmt: skip


def sd3() -> DiffusionPipeline:
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32, out_channels=4,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer, vae=vae(4), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=clip(CLIPTextModelWithProjection), text_encoder_2=clip(CLIPTextModelWithProjection),
        text_encoder_3=None, tokenizer=tokenizer(), tokenizer_2=tokenizer(), tokenizer_3=None,
    )  # fmt: skip


def flux() -> DiffusionPipeline:
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    return FluxPipeline(
        transformer=transformer, vae=vae(4), scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        text_encoder=clip(), text_encoder_2=t5(), tokenizer=tokenizer(), tokenizer_2=tokenizer(),
    )  # fmt: skip


def qwen() -> DiffusionPipeline:
    transformer = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    autoencoder = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
    config = Qwen2_5_VLConfig(
        text_config={**sizes, "num_hidden_layers": 1, "vocab_size": len(tokenizer()), "rope_parameters": rope},
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16},
    )
    return QwenImagePipeline(
        transformer=transformer, vae=autoencoder, scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(config), tokenizer=tokenizer(),
    )  # fmt: skip


def sana() -> DiffusionPipeline:
    transformer = SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=8,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16,
        sample_size=32,
    )  # fmt: skip
    autoencoder = AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types="ResBlock",
        decoder_block_types="ResBlock", encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()), encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1), downsample_block_type="conv", upsample_block_type="interpolate",
    )  # fmt: skip
    config = Gemma2Config(
        vocab_size=len(tokenizer()), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    return SanaPipeline(
        transformer=transformer, vae=autoencoder, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=Gemma2Model(config), tokenizer=tokenizer(),
    )  # fmt: skip


FAMILIES: dict[str, Callable[[], DiffusionPipeline]] = {
    "SD1.5": load_pipeline,
    "SDXL": lambda: load_pipeline("pipeline_sdxl"),
    "SD3": sd3,
    "FLUX": flux,
    "Qwen-Image": qwen,
    "Sana": sana,
}
SIZE = {"height": 16, "width": 16}
OPTIONS = {"FLUX": SIZE, "Qwen-Image": SIZE, "Sana": {"height": 32, "width": 32, "use_resolution_binning": False}}


def family(name: str) -> tuple[DiffusionPipeline, nn.Module, dict[str, Any]]:
    """Return a pipeline, always the same, its denoiser, and what its call has to be told."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        pipeline = FAMILIES[name]()
    pipeline.set_progress_bar_config(disable=True)
    denoiser = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    return pipeline, denoiser, dict(OPTIONS.get(name, {}))  # by default some pipelines make large images
