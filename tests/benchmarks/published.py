"""The UNets of Stable Diffusion by their published sizes, without weights; and the machine that a figure is from."""

import platform
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

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
PARAMETERS = {"sd15": 859_520_964, "sdxl": 2_567_463_684}


def make_unet(name: str) -> UNet2DConditionModel:
    """On the meta device: shapes only."""
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(UNETS[name])


def conditions(device: torch.device | str | None = None) -> str:
    """Machine, threads and torch, for the line above a table."""
    if device is not None and torch.device(device).type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    processor = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())
    return f"{processor}, {torch.get_num_threads()} threads, torch {torch.__version__}"
