"""Stable Diffusion by its published sizes: UNets without weights, pipelines with random ones; and the machine of a figure."""

import platform
from pathlib import Path

import accelerate
import diffusers
import peft
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

# unet/config.json of stable-diffusion-v1-5 and stabilityai/stable-diffusion-xl-base-1.0: what differs from the class's
# defaults.
UNETS = {
    "sd15": {"cross_attention_dim": 768, "sample_size": 64},
    "sdxl": {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "cross_attention_dim": 2048,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "projection_class_embeddings_input_dim": 2816,
        "sample_size": 128,
        "transformer_layers_per_block": [1, 2, 10],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "use_linear_projection": True,
    },
}
# vae/config.json of both; the scaling factors differ.
VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "layers_per_block": 2,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
SCALING = {"sd15": 0.18215, "sdxl": 0.13025}
# text_encoder/config.json of both (CLIP ViT-L/14), and text_encoder_2/config.json of SDXL (OpenCLIP ViT-bigG/14).
CLIP_L = {
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
}
CLIP_BIG_G = {
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}
TOKENIZER = Path(__file__).resolve().parents[1] / "parity" / "pipeline" / "tokenizer"  # few words, 77 tokens a prompt
PARAMETERS = {"sd15": 859_520_964, "sdxl": 2_567_463_684}


def make_unet(name: str) -> UNet2DConditionModel:
    """On the meta device: shapes only."""
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(UNETS[name])


def save_pipeline(name: str, folder: Path) -> None:
    """A pipeline of the published sizes with random weights, in half precision on the disk (SD1.5 2 GiB, SDXL 6.5 GiB)."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    parts = {
        "unet": UNet2DConditionModel.from_config(UNETS[name]),
        "vae": AutoencoderKL.from_config({**VAE, "scaling_factor": SCALING[name]}),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**CLIP_L, **ends)),
    }
    if name == "sdxl":
        parts["text_encoder_2"] = CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_BIG_G, **ends))
    parts = {part: model.half() for part, model in parts.items()}
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    if name == "sdxl":
        pipeline = StableDiffusionXLPipeline(tokenizer=tokenizer, tokenizer_2=tokenizer, scheduler=scheduler, **parts)
    else:
        checkers = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = StableDiffusionPipeline(tokenizer=tokenizer, scheduler=scheduler, **parts, **checkers)
    pipeline.save_pretrained(folder)


def versions() -> str:
    """Of the libraries beside torch."""
    libraries = (diffusers, transformers, accelerate, peft)
    return ", ".join(f"{library.__name__} {library.__version__}" for library in libraries)


def conditions(device: torch.device | str | None = None) -> str:
    """Machine, threads and torch, for the line above a table."""
    if device is not None and torch.device(device).type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    processor = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())
    return f"{processor}, {torch.get_num_threads()} threads, torch {torch.__version__}"
