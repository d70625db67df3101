"""Fixtures: tiny encoders, and personalized versions of the tiny pipelines, made once."""

from pathlib import Path

import pytest
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from support.runs import PARITY, load_pipeline
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel, ViTConfig, ViTModel

TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
IMAGE = {"image_size": 32, "patch_size": 8}


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders") / "tiny-clip"
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(PARITY / "pipeline" / "tokenizer")
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**TOWER, "vocab_size": len(tokenizer), "max_position_embeddings": 77, **ends}
    CLIPModel(CLIPConfig(text_config=text, vision_config={**TOWER, **IMAGE}, projection_dim=8)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessor(**size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders") / "tiny-dino"
    torch.manual_seed(1)
    ViTModel(ViTConfig(**TOWER, **IMAGE)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole pipeline: UNet and text encoder moved at random, the VAE as it was."""
    folder = tmp_path_factory.mktemp("personalized") / "full"
    pipeline = load_pipeline()
    generator = torch.Generator().manual_seed(2)
    for model in (pipeline.unet, pipeline.text_encoder):
        for parameter in model.parameters():
            parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
    pipeline.save_pretrained(folder)
    return folder


def save_adapters(folder: Path, name: str, **options) -> Path:
    """Adapters of a UNet that change its weights, as the scripts save them."""
    pipeline = load_pipeline(name)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    pipeline.unet.add_adapter(LoraConfig(r=3, lora_alpha=3, target_modules=targets, **options))
    generator = torch.Generator().manual_seed(3)
    for parameter_name, parameter in pipeline.unet.named_parameters():
        if "lora_B" in parameter_name or "magnitude" in parameter_name:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.unet))
    pipeline.save_lora_weights(folder, unet_lora_layers=layers)
    return folder


@pytest.fixture(scope="session")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapters(tmp_path_factory.mktemp("personalized") / "lora", "pipeline")


@pytest.fixture(scope="session")
def dora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapters(tmp_path_factory.mktemp("personalized") / "dora", "pipeline", use_dora=True)


@pytest.fixture(scope="session")
def sdxl_lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapters(tmp_path_factory.mktemp("personalized") / "sdxl", "pipeline_sdxl")
