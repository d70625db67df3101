"""What `evaluation` and `interpolate` load for a user: a pipeline, adapters of any tool for it, and a device.

Whatever a loader raises becomes a `RunError` here. Weights are read from safetensors alone: a pickle can run code.
"""

from __future__ import annotations

import logging
import os
import re
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
import transformers
from accelerate import PartialState
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open
from torch import nn

from .errors import RunError, as_run_error, one_line

INDEX = DiffusionPipeline.config_name
# Between the name of a layer and those of its factors: PEFT's, diffusers' before it, kohya's and LyCORIS'.
FACTOR = re.compile(r"[._](?:lora[._]|lora_linear_layer\.|hada_|lokr_|alpha$)")
# The one factor of a layer, or a bias beside it, that its change is proportional to.
UP = re.compile(r"(?:[._]up\.weight|\.lora_B\.(?:weight|bias)|\.hada_w1_a|\.lokr_w1(?:_a)?)$")


def one_line_errors(what: str) -> AbstractContextManager[None]:
    """Turn whatever the block raises into one line that begins with `what`."""
    return as_run_error(lambda error: f"{what} ({one_line(error)})")


def silence_libraries() -> None:
    """Silence the progress bars and warnings of diffusers and transformers, which tell a user nothing to act on."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity(logging.CRITICAL)
        library.utils.logging.disable_progress_bar()


def find_device(name: str | None) -> torch.device:
    """Return the device of that name, or the one that accelerate would choose; refuse one that holds no numbers."""
    default = PartialState().device  # accelerate's loggers need the state, too
    with one_line_errors(f"--device {name}: it cannot be used"):
        device = default if name is None else torch.device(name)
        torch.zeros(1, device=device).item()
    return device


def load_pipeline(
    flag: str, model: str, dtype: torch.dtype, revision: str | None = None, variant: str | None = None, **parts: Any
) -> Any:
    """Load a pipeline from a folder or the Hub.

    Args:
        flag: The argument that named it.
        parts: Parts to use in place of its own, as `safety_checker=None`, which would blacken images.

    Raises:
        RunError: It is no pipeline, or cannot be read.
    """
    if os.path.isfile(model):
        convert = "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)"
        raise RunError(f"{flag} {model}: expected a folder, not a file. diffusers converts one: {convert}")
    if not os.path.isdir(model) and (os.path.isabs(model) or model.count("/") > 1):
        raise RunError(f"{flag} {model}: there is no such folder.")
    with one_line_errors(f"{flag} {model}: it cannot be loaded as a pipeline"):
        index = DiffusionPipeline.load_config(model, revision=revision)
        if "_class_name" not in index:
            raise RunError(f"{flag} {model}: its {INDEX} names no pipeline.")
        source = {"revision": revision, "variant": variant, "use_safetensors": True}
        pipeline = DiffusionPipeline.from_pretrained(
            model, dtype=dtype, **source, **{name: part for name, part in parts.items() if name in index}
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def find_adapters(personalized: str) -> Path | None:
    """Return the file of adapters that `--personalized` names, or `None` if it names a whole pipeline.

    Adapters may be a file, or a folder or repository of the Hub with diffusers' file or one other `.safetensors`.

    Raises:
        RunError: Neither is there.
    """
    what, path = f"--personalized {personalized}", Path(personalized)
    if path.is_file():
        return check_adapters(path)
    if not os.path.isdir(personalized):  # unlike Path, it does not take "" for the current folder
        return _find_on_hub(what, personalized)
    if (path / INDEX).is_file():
        return None
    if (path / LORA_WEIGHT_NAME_SAFE).is_file():
        return check_adapters(path / LORA_WEIGHT_NAME_SAFE)
    return check_adapters(path / _only_adapters(what, [file.name for file in path.iterdir()]))


def _find_on_hub(what: str, repo_id: str) -> Path | None:
    with one_line_errors(f"{what}: no such file or folder, and not to be had from the Hub"):
        for name in (INDEX, LORA_WEIGHT_NAME_SAFE):
            try:
                file = Path(hf_hub_download(repo_id, name))
            except EntryNotFoundError:
                continue
            return None if name == INDEX else check_adapters(file)
        return check_adapters(Path(hf_hub_download(repo_id, _only_adapters(what, HfApi().list_repo_files(repo_id)))))


def _only_adapters(what: str, names: list[str]) -> str:
    files = sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)
    if len(files) > 1:
        raise RunError(f"{what}: it holds {', '.join(files)}: name one of these files.")
    if not files:
        raise RunError(f"{what}: expected a pipeline ({INDEX}) or adapters ({LORA_WEIGHT_NAME_SAFE}).")
    return files[0]


def check_adapters(file: Path) -> Path:
    """Return `file` if all of its layers are LoRA, LoHa or LoKr, in the names of any tool.

    Raises:
        RunError: It cannot be read as safetensors, or holds something else.
    """
    with one_line_errors(f"--personalized {file}: it cannot be read as safetensors"), safe_open(file, "pt") as tensors:
        names = list(tensors.keys())
    layers = {FACTOR.split(name)[0] for name in names if UP.search(name)}
    if strange := [name for name in names if FACTOR.split(name)[0] not in layers]:
        raise RunError(f"--personalized {file}: expected adapters (LoRA, LoHa or LoKr) alone, found {strange[0]}.")
    if not layers:
        raise RunError(f"--personalized {file}: there is nothing in it.")
    return file


def load_adapters(pipeline: Any, file: Path, name: str) -> None:
    """Load adapters onto the base with diffusers, which reads PEFT's, its own and kohya's files; errors say `name`.

    Raises:
        RunError: They do not fit the pipeline, or only a part of them does.
    """
    if not hasattr(pipeline, "load_lora_weights"):
        raise RunError(f"--personalized {name}: a {type(pipeline).__name__} takes no adapters.")
    versions = f"diffusers {diffusers.__version__}, transformers {transformers.__version__}, PEFT {peft.__version__}"
    with one_line_errors(f"--personalized {name}: these adapters cannot be loaded onto --base with {versions}"):
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name, use_safetensors=True)
    with safe_open(file, "pt") as tensors:
        expected = len({FACTOR.split(name)[0] for name in tensors.keys()})
    layers = [
        name for part in networks(pipeline).values() for name, _ in part.named_modules() if name.endswith(".lora_B")
    ]
    if len(layers) < expected:  # diffusers warns of what it leaves out, and goes on
        raise RunError(
            f"--personalized {name}: {len(layers)} of its {expected} layers fit --base: is it the right base?"
        )


def load_personalized(
    personalized: str, base: str, dtype: torch.dtype, revision: str | None = None, variant: str | None = None
) -> Any:
    """Load the personalized pipeline: a whole one, or adapters on the base; without a safety checker.

    `revision` and `variant` are the base's.
    """
    file = find_adapters(personalized)
    if file is None:
        return load_pipeline("--personalized", personalized, dtype, safety_checker=None)
    pipeline = load_pipeline("--base", base, dtype, revision, variant, safety_checker=None)
    load_adapters(pipeline, file, personalized)
    return pipeline


def networks(pipeline: Any) -> dict[str, nn.Module]:
    """Return the networks of a pipeline that make images, by the names of its parts."""
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    return {name: part for name, part in parts.items() if name not in ("safety_checker", "image_encoder")}


def check_same_architecture(base: Any, personalized: Any, name: str) -> None:
    """Refuse a personalized pipeline whose networks are not, tensor for tensor, shaped as the base's.

    Raises:
        RunError: Says which part or tensor is another.
    """

    def shapes(pipeline: Any) -> dict[str, tuple[int, ...]]:
        return {
            f"{part}.{parameter_name.replace('.base_layer', '')}": tuple(tensor.shape)
            for part, model in networks(pipeline).items()
            for parameter_name, tensor in model.named_parameters()
            if ".lora_" not in parameter_name
        }

    kinds = type(base).__name__, type(personalized).__name__
    if kinds[0] != kinds[1]:
        raise RunError(f"--personalized {name}: it is a {kinds[1]}, but --base is a {kinds[0]}.")
    expected, given = shapes(base), shapes(personalized)
    for parameter in sorted(expected.keys() | given.keys()):
        if expected.get(parameter) != given.get(parameter):
            raise RunError(
                f"--personalized {name}: it is of another architecture than --base: {parameter} has shape "
                f"{given.get(parameter)}, in the base {expected.get(parameter)} (None: there is no such tensor)."
            )


def check_text_to_image(base: Any) -> None:
    """Refuse a base that the output probe cannot call: it asks for Stable Diffusion or SDXL, from a prompt alone."""
    plain = isinstance(base, (StableDiffusionPipeline, StableDiffusionXLPipeline))
    if not plain or base.unet.config.in_channels != base.unet.config.out_channels:
        raise RunError(f"--base: it is a {type(base).__name__}; expected a text-to-image Stable Diffusion or SDXL.")
