"""Add LoRA adapters to a pipeline's models, save them under the names that other tools read, and load them back."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from accelerate.logging import get_logger
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers, convert_unet_state_dict_to_peft
from diffusers.utils.state_dict_utils import convert_state_dict_to_peft
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from ..errors import one_line

logger = get_logger(__name__)
Weights = dict[str, dict[str, Tensor]]  # by model and by name in it
UNSCALED_WEIGHTS = "unscaled_lora_weights.safetensors"
KOHYA_WEIGHTS = "pytorch_lora_weights_kohya.safetensors"
MAGNITUDE = ".lora_magnitude_vector"
LORA_TARGET_MODULES = {
    "unet": ["to_k", "to_q", "to_v", "to_out.0"],
    "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj"],
    "text_encoder_2": ["q_proj", "k_proj", "v_proj", "out_proj"],
}
EXTRACT_MODULES = {
    "unet": r"(to_q|to_k|to_v|to_out\.0|ff\.net\.0\.proj|ff\.net\.2)\.weight$",
    "text_encoder": r"(q_proj|k_proj|v_proj|out_proj|fc1|fc2)\.weight$",
}
KOHYA_PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
KOHYA_KINDS = {"down": "lora_down.weight", "up": "lora_up.weight", "magnitude_vector": "dora_scale"}


def scale(args: Namespace) -> float:
    """Return alpha / rank, the factor of the adapters' output."""
    return (vars(args).get("lora_alpha") or args.rank) / args.rank


def add_adapters(args: Namespace, models: Mapping[str, nn.Module]) -> None:
    """Freeze the models and add trainable adapters in float32. PEFT alone does it, without the libraries' mixins."""
    for name, model in models.items():
        model.requires_grad_(False)
        config = LoraConfig(
            r=args.rank,
            lora_alpha=vars(args).get("lora_alpha") or args.rank,  # type: ignore[arg-type]  # PEFT divides any number
            lora_dropout=args.lora_dropout,
            init_lora_weights="gaussian",
            target_modules=LORA_TARGET_MODULES[name],
            use_dora=args.use_dora,
        )
        inject_adapter_in_model(config, model)
        cast_training_params(model, dtype=torch.float32)  # half precision would round small updates away
        model.train(model.training)  # new layers are in training mode, even in a model that is not
    if models.keys() != {"unet"}:
        _warn_unless_loadable()


def _warn_unless_loadable() -> None:
    """Warn if `pipe.load_lora_weights` cannot load a text encoder's adapters with the installed releases.

    It calls transformers, which works with some releases of PEFT only. A tiny text encoder shows whether it does.
    """
    config = CLIPTextConfig(hidden_size=1, intermediate_size=1, num_hidden_layers=1, num_attention_heads=1)
    with torch.random.fork_rng(devices=[]):  # keeps the run's random numbers those of the official scripts
        trained, loaded = CLIPTextModel(config), CLIPTextModel(config)
        inject_adapter_in_model(LoraConfig(r=1, target_modules=LORA_TARGET_MODULES["text_encoder"]), trained)
        weights = _with_prefix(adapter_weights({"text_encoder": trained}))
        try:
            StableDiffusionPipeline.load_lora_into_text_encoder(weights, None, loaded)
        except Exception as error:  # releases that do not fit may raise anything
            logger.warning_once(
                f"transformers {transformers.__version__} cannot load adapters of text encoders with PEFT "
                f"{peft.__version__} ({one_line(error)}). The training is not affected; before "
                "`pipe.load_lora_weights`: pip install --upgrade diffusers transformers peft"
            )


def adapter_weights(models: Mapping[str, nn.Module], scale: float = 1.0) -> Weights:
    """Return the adapters of unwrapped models in float32, under diffusers' names.

    `scale` is alpha / rank. It is multiplied into the up projections, since some tools ignore a separate alpha.
    """
    weights: Weights = {}
    for model_name, model in models.items():
        layers = weights[model_name] = {}
        for name, tensor in convert_state_dict_to_diffusers(get_peft_model_state_dict(model)).items():
            name = _released_name(model_name, name)
            if model_name != "unet" and name.endswith(MAGNITUDE):
                name = f"{name}.weight"  # PEFT adds this ending when it loads a UNet, transformers does not
            tensor = tensor.detach().float().cpu().contiguous()
            layers[name] = tensor * scale if name.endswith(".up.weight") and scale != 1.0 else tensor
    return weights


def _released_name(model_name: str, name: str) -> str:
    # Newer releases of transformers drop a prefix of CLIP's names, which released checkpoints and other tools have.
    return name if model_name == "unet" or name.startswith("text_model.") else f"text_model.{name}"


def _with_prefix(weights: Weights) -> dict[str, Tensor]:
    """Return the weights of all models in one dictionary."""
    return {f"{model}.{name}": tensor for model, layers in weights.items() for name, tensor in layers.items()}


def save_adapters(pipeline_class: type[DiffusionPipeline], folder: str | Path, weights: Weights) -> None:
    """Write the file that `pipe.load_lora_weights(folder)` loads."""
    pipeline_class.save_lora_weights(folder, **{f"{name}_lora_layers": layers for name, layers in weights.items()})


def load_adapters(models: Mapping[str, nn.Module], folder: str | Path) -> None:
    """Load the adapters of a checkpoint into unwrapped models to which `add_adapters` has added theirs."""
    unscaled = Path(folder, UNSCALED_WEIGHTS)
    weights = load_file(unscaled if unscaled.exists() else Path(folder, LORA_WEIGHT_NAME_SAFE))
    for model_name, model in models.items():
        prefix = f"{model_name}."
        own = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
        if model_name == "unet":
            own = convert_unet_state_dict_to_peft(own)
        else:
            own = convert_state_dict_to_peft(own)
            if not hasattr(model, "text_model"):
                own = {name.removeprefix("text_model."): tensor for name, tensor in own.items()}
        loaded: Any = set_peft_model_state_dict(model, own)  # PEFT's annotation names no fields
        if loaded.unexpected_keys:
            raise ValueError(f"{folder}: {model_name} has no adapter {loaded.unexpected_keys[0]}.")


def save_checkpoint(
    pipeline_class: type[DiffusionPipeline], models: Mapping[str, nn.Module], scale: float, folder: str
) -> None:
    """Write the file that other tools load, with `scale` multiplied in, and the exact adapters if that rounds them."""
    save_adapters(pipeline_class, folder, adapter_weights(models, scale))
    if scale != 1.0:
        save_file(_with_prefix(adapter_weights(models)), Path(folder, UNSCALED_WEIGHTS))


def to_kohya(weights: Weights) -> dict[str, Tensor]:
    """Return the adapters under the names of kohya's tools and of web UIs, with alpha = rank."""
    renamed = {}
    for model_name, layers in weights.items():
        for name, tensor in layers.items():
            layer, _, kind = re.split(r"\.lora(_linear_layer)?[._]", name.removesuffix(".weight"))
            module = f"{KOHYA_PREFIXES[model_name]}_{layer.replace('.', '_')}"
            # kohya stores DoRA's magnitudes, one for each output, as a column.
            renamed[f"{module}.{KOHYA_KINDS[kind]}"] = tensor[:, None] if tensor.ndim == 1 else tensor
            if kind == "down":
                renamed[f"{module}.alpha"] = torch.tensor(float(len(tensor)))
    return renamed


@torch.no_grad()
def extract_adapters(
    models: Mapping[str, nn.Module], pretrained: Mapping[str, nn.Module], rank: int
) -> tuple[Weights, float]:
    """Extract LoRA from a full fine-tune: the truncated SVD of each layer's weight change.

    It is the best approximation of that rank (Eckart and Young, 1936). Only linear layers in attention and feed-forward
    blocks take part. Returns the adapters, and the share of the models' squared drift that they keep.
    """
    weights: Weights = {}
    kept = total = 0.0
    for model_name, model in models.items():
        layers = weights[model_name] = {}
        kind = "lora" if model_name == "unet" else "lora_linear_layer"
        before = dict(pretrained[model_name].named_parameters())
        for name, parameter in model.named_parameters():
            change = parameter.float() - before[name].to(parameter.device, torch.float32)
            total += change.square().sum().item()
            if not re.search(EXTRACT_MODULES[model_name], name):
                continue
            u, s, vh = torch.linalg.svd(change, full_matrices=False)
            u, s, vh = u[:, :rank], s[:rank], vh[:rank]
            kept += s.square().sum().item()
            module = f"{_released_name(model_name, name.removesuffix('.weight'))}.{kind}"
            layers[f"{module}.down.weight"] = (s.sqrt()[:, None] * vh).cpu().contiguous()
            layers[f"{module}.up.weight"] = (u * s.sqrt()).cpu().contiguous()
    return weights, kept / total if total else 1.0
