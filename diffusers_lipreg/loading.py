"""Load what a user of `evaluation` or `interpolate` names: a pipeline, adapters of any tool, a device.

A pipeline may be somebody else's. Its files are checked as training checks its base, and weights are read from
safetensors alone, so that nothing in it runs code or names a file elsewhere. Every error becomes a `RunError`.
"""

from __future__ import annotations

import logging
import math
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
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open
from torch import nn

from .dreambooth.base import check_part, find_classes
from .dreambooth.models import Base, read_json
from .dreambooth.output import INDEX
from .errors import RunError, as_run_error, one_line, read_lines
from .output_drift import OutputDrift
from .outputs import MEASURED_PROMPTS, OutputSnapshot
from .recording import pipeline_networks

# Separates the name of a layer from those of its factors: PEFT's, diffusers' older ones, kohya's and LyCORIS'.
FACTOR = re.compile(r"[._](?:lora[._]|lora_linear_layer\.|hada_|lokr_|alpha$)")
# Matches the one factor of a layer, and the bias, that its change is proportional to.
UP = re.compile(r"(?:[._]up\.weight|\.lora_B\.(?:weight|bias)|\.hada_w1_a|\.lokr_w1(?:_a)?)$")


def one_line_errors(what: str) -> AbstractContextManager[None]:
    """Turn any error in the block into one line that begins with `what`."""
    return as_run_error(lambda error: f"{what} ({one_line(error)})")


def silence_libraries() -> None:
    """Silence the progress bars and warnings of diffusers and transformers, on which a user cannot act."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity(logging.CRITICAL)
        library.utils.logging.disable_progress_bar()


def find_device(name: str | None) -> torch.device:
    """Return the device of that name, or the one that accelerate chooses; refuse a device that holds no numbers."""
    default = PartialState().device  # accelerate's loggers need the state in any case
    with one_line_errors(f"--device {name}: it cannot be used"):
        device = default if name is None else torch.device(name)
        torch.zeros(1, device=device).item()
    return device


def load_pipeline(
    flag: str, model: str, dtype: torch.dtype, revision: str | None = None, variant: str | None = None, **parts: Any
) -> Any:
    """Load a pipeline from a folder or the Hub.

    Args:
        flag: The argument that names it.
        parts: Replacements of its parts, such as `safety_checker=None`: a safety checker would blacken images.

    Raises:
        RunError: It is not a pipeline, cannot be read, or holds settings that run code or name files elsewhere.
    """
    if os.path.isfile(model):
        convert = "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)"
        raise RunError(f"{flag} {model}: expected a folder, not a file. diffusers converts one: {convert}")
    is_folder = os.path.isdir(model)
    if not is_folder and (os.path.isabs(model) or model.count("/") > 1):
        raise RunError(f"{flag} {model}: there is no such folder.")
    with one_line_errors(f"{flag} {model}: it cannot be loaded as a pipeline"):
        source = {"revision": revision, "variant": variant, "use_safetensors": True}
        folder = Path(model if is_folder else DiffusionPipeline.download(model, **source, **parts))
        index = read_json(folder / INDEX)
        pipeline_class, classes = find_classes(index)
        folders = {part: folder / part for part in classes}
        if variant not in {check_part(folders[part], classes[part], variant) for part in classes.keys() - parts}:
            raise RunError(f"{flag} {model}: no part has weight files of the variant {variant}.")
        title = folder.resolve().name if is_folder else model
        pipeline = Base(title, None, variant, index, pipeline_class, classes, folders).pipeline(dtype, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def find_adapters(personalized: str) -> Path | None:
    """Return the file of adapters that `--personalized` names, or `None` if it names a whole pipeline.

    Adapters may be a file, or a folder or Hub repository with diffusers' file or one other `.safetensors`.

    Raises:
        RunError: It names neither.
    """
    if os.path.isfile(personalized):
        return check_adapters(Path(personalized))
    what = f"--personalized {personalized}"
    with one_line_errors(f"{what}: no such file or folder, and not to be had from the Hub"):
        for name in (INDEX, LORA_WEIGHT_NAME_SAFE):
            if file := _get_file(personalized, name):
                return None if name == INDEX else check_adapters(file)
        is_folder = os.path.isdir(personalized)
        names = os.listdir(personalized) if is_folder else HfApi().list_repo_files(personalized)
        files = sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)
        if len(files) > 1:
            raise RunError(f"{what}: it holds {', '.join(files)}: name one of these files.")
        if files and (file := _get_file(personalized, files[0])):
            return check_adapters(file)
        raise RunError(f"{what}: expected a pipeline ({INDEX}) or adapters ({LORA_WEIGHT_NAME_SAFE}).")


def _get_file(source: str, name: str) -> Path | None:
    """Return a file of a folder or of a Hub repository, `None` if it is not there."""
    if os.path.isdir(source):
        return Path(source, name) if Path(source, name).is_file() else None
    try:
        return Path(hf_hub_download(source, name))
    except EntryNotFoundError:
        return None


def check_adapters(file: Path) -> Path:
    """Return `file` if all of its layers are LoRA, LoHa or LoKr, under the names of any tool.

    Raises:
        RunError: It cannot be read as safetensors, or holds anything else.
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
    """Load adapters onto the base with diffusers, which reads PEFT's, its own and kohya's files.

    Args:
        name: What `--personalized` says; errors begin with it.

    Raises:
        RunError: They do not fit the pipeline, or only some of them do.
    """
    if not hasattr(pipeline, "load_lora_weights"):
        raise RunError(f"--personalized {name}: a {type(pipeline).__name__} takes no adapters.")
    versions = f"diffusers {diffusers.__version__}, transformers {transformers.__version__}, PEFT {peft.__version__}"
    with one_line_errors(f"--personalized {name}: these adapters cannot be loaded onto --base with {versions}"):
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name, use_safetensors=True)
    with safe_open(file, "pt") as tensors:
        expected = len({FACTOR.split(key)[0] for key in tensors.keys()})
    modules = [module for network in networks(pipeline).values() for module, _ in network.named_modules()]
    loaded = sum(module.endswith(".lora_B") for module in modules)
    if loaded < expected:  # diffusers only warns of the layers that it leaves out
        raise RunError(f"--personalized {name}: {loaded} of its {expected} layers fit --base: is it the right base?")


def load_personalized(
    personalized: str, base: str, dtype: torch.dtype, revision: str | None = None, variant: str | None = None
) -> Any:
    """Load the personalized pipeline, a whole one or adapters on the base, without a safety checker.

    `revision` and `variant` are the base's.
    """
    file = find_adapters(personalized)
    if file is None:
        return load_pipeline("--personalized", personalized, dtype, safety_checker=None)
    pipeline = load_pipeline("--base", base, dtype, revision, variant, safety_checker=None)
    load_adapters(pipeline, file, personalized)
    return pipeline


def networks(pipeline: Any) -> dict[str, nn.Module]:
    """Return the networks of a pipeline that make images, by part."""
    parts = pipeline_networks(pipeline)
    return {name: part for name, part in parts.items() if name not in ("safety_checker", "image_encoder")}


def check_same_architecture(base: Any, personalized: Any, name: str) -> None:
    """Refuse a personalized pipeline whose networks do not have the shapes of the base's, tensor by tensor."""

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


def read_probe_prompts(file: str | None) -> tuple[str, ...]:
    """Return the lines of `--probe_prompts`, or the default prompts."""
    return MEASURED_PROMPTS if file is None else read_lines(file, "--probe_prompts")


def record_outputs(base: Any, prompts: tuple[str, ...], seed: int = 0) -> OutputSnapshot:
    """Record what the denoiser of the base predicts, to measure output drift on.

    Raises:
        RunError: The base does not make images from a prompt alone.
    """
    denoisers = [part for name, part in networks(base).items() if name in ("unet", "transformer")]
    if not denoisers:
        raise RunError(f"--base: it is a {type(base).__name__}, without a UNet or transformer.")
    with one_line_errors("--base: expected a text-to-image pipeline whose predictions can be recorded"):
        return OutputSnapshot.for_measuring(base, denoisers[0], prompts, seed)


def measure_drift(recorded: OutputSnapshot, personalized: Any, name: str) -> OutputDrift:
    """Return the output drift of a pipeline; refuse predictions that are not numbers."""
    drift = recorded.measure(personalized)
    if not math.isfinite(drift.output_drift_relative):
        raise RunError(f"--personalized {name}: its predictions are not numbers.")
    return drift
