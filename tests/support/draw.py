"""What a pipeline draws, with adapters to it: `python draw.py BASE [ADAPTERS FILE]` prints the pixels from a new process."""

import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline


def draw(base: Path | str, adapters: Path | str = "", file: str = "pytorch_lora_weights.safetensors") -> bytes:
    """The pixels of one image; `base` and `adapters` are folders or repositories."""
    pipeline = DiffusionPipeline.from_pretrained(base, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    if adapters:
        pipeline.load_lora_weights(adapters, weight_name=file)
    options = {"num_inference_steps": 3, "height": 64, "width": 64, "generator": torch.Generator().manual_seed(0)}
    return pipeline("a photo of sks dog", **options).images[0].tobytes()


if __name__ == "__main__":
    print(draw(*sys.argv[1:]).hex())
