"""Find the pipeline to train, fetch it, and refuse one that is not whole, brings code, or does not suit the loss."""

from __future__ import annotations

import math
import os
import shlex
from argparse import Namespace
from collections.abc import Iterator, Sequence
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import diffusers
import diffusers.pipelines.deprecated
import transformers
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME, _maybe_remap_transformers_class
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import RemoteEntryNotFoundError
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import RunError, one_line
from .models import BASE_FLAGS, Base, find_weights, loading_errors, read_json
from .output import INDEX

logger = get_logger(__name__)
ADVICE = "Start from a text-to-image model: Stable Diffusion 1, 2 or XL."
VERY_LARGE = 10**6  # tokens; transformers writes 1e30 if a tokenizer states no longest prompt

TRAINING_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
# Further parts of pipelines that draw from a prompt alone; a controlnet or a motion adapter is not among them.
OTHER_PARTS = ("safety_checker", "feature_extractor", "image_encoder", "watermarker", "image_noising_scheduler")
# Settings for which a loader fetches and runs code: attention kernels from the Hub, and quantizers.
CODE_SETTINGS = ("attn_implementation", "_attn_implementation", "quantization_config")


def open_base(args: Namespace, accelerator: Accelerator, sdxl: bool) -> Base:
    """Find the pipeline to train, fetch what the run needs of it, and check all of that.

    Of models, only configurations and the headers of weight files are read. All files of a repository come from one
    commit, and the run needs the Hub no longer. Every process has to call this.
    """
    others = _check_other_parts(args, accelerator)
    with loading_errors(args, BASE_FLAGS):
        folder, commit = _find_index(args, accelerator)
        index = read_json(folder / INDEX)
        pipeline_class, classes = find_classes(index)
        _check_index(index, pipeline_class, classes, sdxl)
        title = folder.resolve().name if commit is None else args.pretrained_model_name_or_path
        folders = {name: folder / name for name in classes} | others
        base = Base(title, commit, args.variant, index, pipeline_class, classes, folders)
        complete = vars(args).get("rank") is None or args.validation_prompt is not None  # the run saves it or samples
        parts = [name for name in classes if name not in others and (complete or name in TRAINING_PARTS)]
        with accelerator.local_main_process_first():
            files = [] if commit is None else _fetch_configurations(base, parts)
            if missing := [name for name in parts if not folders[name].is_dir()]:
                raise ValueError(f"its {INDEX} names {', '.join(missing)}, which the folder does not hold.")
            check_kind(base, args, sdxl)
            if files:
                _fetch_weights(base, parts, files)
        variants = {check_part(folders[name], classes[name], args.variant) for name in parts}
        if args.variant not in variants:
            raise ValueError("no part has weight files of this variant.")
        for name in parts:
            _load_for_trial(base, name)
        check_settings(base, args, sdxl)
    return base


# Find and fetch


def _check_other_parts(args: Namespace, accelerator: Accelerator) -> dict[str, Path]:
    """Check the parts that flags name outside of the pipeline; return the folder of the VAE if it is one."""
    tokenizer = vars(args).get("tokenizer_name")
    if tokenizer is not None and Path(tokenizer).is_dir():
        with loading_errors(args, ("tokenizer_name",)):
            check_part(Path(tokenizer), PreTrainedTokenizerBase, None)
    vae = vars(args).get("pretrained_vae_model_name_or_path")
    if vae is None:
        return {}
    with loading_errors(args, ("pretrained_vae_model_name_or_path",)), accelerator.local_main_process_first():
        folder = Path(vae)
        if not folder.is_dir():
            weights = f"{Path(SAFETENSORS_WEIGHTS_NAME).stem}*.safetensors*"
            folder = Path(snapshot_download(vae, allow_patterns=["config.json", weights]))
        check_part(folder, AutoencoderKL, args.variant)
    return {"vae": folder}


def _find_index(args: Namespace, accelerator: Accelerator) -> tuple[Path, str | None]:
    """Return the folder that holds the pipeline's index, and the commit if it is of a repository."""
    model = args.pretrained_model_name_or_path
    path = Path(model)
    if path.is_dir():
        if not (path / INDEX).is_file():
            raise ValueError(f"the folder holds no {INDEX}.")
        return path, None
    if path.is_file():
        load = f"from diffusers import DiffusionPipeline as P; P.from_single_file({model!r})"
        code = f"{load}.save_pretrained({path.stem!r})"
        raise RunError(f"{model} is one file, not a folder. Make one of it: python -c {shlex.quote(code)}")
    try:
        commit: list[Any] = [None]
        if accelerator.is_main_process:
            commit = [Path(hf_hub_download(model, INDEX, revision=args.revision)).parent.name]
        broadcast_object_list(commit)  # the repository may change before the other processes ask
        with accelerator.local_main_process_first():
            return Path(hf_hub_download(model, INDEX, revision=commit[0])).parent, commit[0]
    except RemoteEntryNotFoundError as error:
        raise ValueError(f"the repository holds no {INDEX}: it is no pipeline of diffusers.") from error
    except Exception as error:
        raise ValueError(f"no such folder, and not on the Hub: {one_line(error)}") from error


def find_classes(index: dict[str, Any]) -> tuple[type[DiffusionPipeline], dict[str, type]]:
    """Return the class of the pipeline and those of its parts, which diffusers and transformers have to define."""
    name = index.get("_class_name")
    pipeline_class: Any = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(pipeline_class, type) and issubclass(pipeline_class, DiffusionPipeline)):
        raise ValueError(f"its {INDEX} names no pipeline of the installed diffusers (_class_name: {name}).")
    given = {part: index[part] for part in signature(pipeline_class).parameters if isinstance(index.get(part), list)}
    return pipeline_class, {part: _find_class(part, value) for part, value in given.items() if value[:1] != [None]}


def _check_index(index: dict[str, Any], pipeline_class: Any, classes: dict[str, type], sdxl: bool) -> None:
    """Refuse a pipeline without the parts that training needs."""
    name = pipeline_class.__name__
    if "unet" not in classes or "scheduler" not in classes:
        raise ValueError(f"it is a {name}, without a UNet. These scripts train Stable Diffusion 1, 2 and XL.")
    if ("text_encoder_2" in classes) != sdxl:
        script = "train_dreambooth_lipreg.py" if sdxl else "train_dreambooth_lora_lipreg_sdxl.py"
        raise ValueError(f"it is a {name}, with another number of text encoders: use {script}.")
    expected = signature(pipeline_class).parameters
    required = {part for part, value in expected.items() if value.default is Parameter.empty}
    required -= {*pipeline_class._optional_components}
    for part in (*(TRAINING_PARTS if sdxl else ("text_encoder", "tokenizer")), *required):
        if part not in classes and (part in TRAINING_PARTS or part not in index):
            raise ValueError(f"it is a {name} without {part}, which training needs.")


def _find_class(part: str, value: list[Any]) -> type:
    """Return the class of a part, which the index names as [library, class]."""
    library, name = value if len(value) == 2 and all(isinstance(word, str) for word in value) else ("?", "?")
    owner = {"diffusers": diffusers, "transformers": transformers}.get(library)
    for pipelines in (diffusers.pipelines, diffusers.pipelines.deprecated):  # some define parts of their own
        owner = owner or (getattr(pipelines, library, None) if library.isidentifier() else None)
    if library == "transformers":
        name = _maybe_remap_transformers_class(name) or name
    found = getattr(owner, name, None)
    if not (isinstance(found, type) and found.__module__.startswith(("diffusers.", "transformers."))):
        raise ValueError(
            f"its {part} is a {name} of {library}, which the installed diffusers and transformers do not have. "
            "Code that comes with a model is not run."
        )
    return found


def _fetch_configurations(base: Base, parts: Sequence[str]) -> list[str]:
    """Fetch everything but the weights; return the repository's file names, none if the Hub does not answer."""
    try:
        found = HfApi().model_info(base.title, revision=base.commit).siblings
    except Exception as error:
        logger.info(f"The Hub does not answer ({one_line(error)}): {base.title} is looked for in the cache.")
        return []
    patterns = [f"{name}/*{ending}" for name in parts for ending in (".json", ".txt", ".model")]
    snapshot_download(base.title, revision=base.commit, allow_patterns=patterns)
    return [sibling.rfilename for sibling in found or ()]


def _fetch_weights(base: Base, parts: Sequence[str], files: Sequence[str]) -> None:
    """Fetch the weight files that will be read, out of all `files` of the repository."""
    wanted = []
    for name in parts:
        if issubclass(base.classes[name], nn.Module):
            present = {file.removeprefix(f"{name}/") for file in files if file.startswith(f"{name}/")}
            _, weights = find_weights(base.folders[name], base.classes[name], base.variant, present)
            wanted += [f"{name}/{file}" for file in weights]
    snapshot_download(base.title, revision=base.commit, allow_patterns=wanted)


# Check its files


def check_part(folder: Path, part_class: type, variant: str | None) -> str | None:
    """Refuse a part that is not whole, runs code or reads a file elsewhere; return the variant of its weights, if any."""
    name = folder.name
    if (folder / "adapter_config.json").exists():  # transformers would load the adapters and the base they name
        raise ValueError(f"{name} holds adapters beside the model: merge them into it first.")
    for path in sorted(folder.glob("*.json")):
        _check_configuration(path)
    if not issubclass(part_class, nn.Module):
        return None
    read_json(folder / "config.json")
    found, files = find_weights(folder, part_class, variant)
    for file in files:
        try:
            with safe_open(folder / file, "pt"):  # it compares the length of the file with its header
                pass
        except Exception as error:
            raise ValueError(f"{name}/{file} is not there or not whole ({one_line(error)}).") from error
    return found


def _check_configuration(path: Path) -> None:
    """Refuse settings that make a loader run code or read a file outside of the folder."""
    folder, name = os.path.abspath(path.parent), f"{path.parent.name}/{path.name}"
    for key, value in _settings(read_json(path)):
        if key in CODE_SETTINGS and value not in (None, "eager", "sdpa"):
            raise ValueError(f"{name} sets {key}, by which code would be run: take it out.")
        if not isinstance(value, str) or "/" not in value or key in ("_name_or_path", "name_or_path"):
            continue
        target = os.path.normpath(os.path.join(folder, value))
        if not target.startswith(folder + os.sep) and os.path.isfile(target):
            raise ValueError(f"{name} names a file elsewhere, {value}: take it out.")


def _settings(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the keys and values of a JSON value at any depth; items of a list have the list's key."""
    yield key, value
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _settings(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _settings(inner, key)


def _load_for_trial(base: Base, name: str) -> None:
    """Load a part that only saving or sampling needs, models without data, to see that it can be loaded later."""
    part_class = base.classes[name]
    if name in TRAINING_PARTS and issubclass(part_class, nn.Module):
        return  # training loads it at once
    try:
        base.load(name, **({"device_map": "meta"} if issubclass(part_class, PreTrainedModel) else {}))
    except Exception as error:
        raise ValueError(f"its {name} cannot be loaded ({one_line(error)}).") from error


# Check its kind


def check_kind(base: Base, args: Namespace, sdxl: bool) -> None:
    """Refuse a pipeline that is no text-to-image one, judging by its index and its configurations.

    The loss suits a UNet that sees a noisy image or its latents, a timestep and a prompt. SDXL's also sees size and
    crop, and the super-resolution UNet of DeepFloyd IF the image to improve.
    """
    name, unet = base.pipeline_class.__name__, _with_defaults(base, "unet", UNet2DConditionModel)
    if unknown := [part for part in base.classes if part not in TRAINING_PARTS + OTHER_PARTS]:
        raise ValueError(f"it is a {name}, with {', '.join(unknown)}, which DreamBooth does not know. {ADVICE}")
    channels, upscaler = 3, False
    if "vae" in base.classes:
        vae = _with_defaults(base, "vae", AutoencoderKL)
        channels, side = vae["latent_channels"], 2 ** (len(vae["block_out_channels"]) - 1)
        if args.resolution < side:
            raise RunError(f"--resolution {args.resolution}: the VAE makes one latent of {side} x {side} pixels.")
        factor = vae["scaling_factor"]
        if not (isinstance(factor, (int, float)) and 0 < factor < math.inf):
            raise ValueError(f"its VAE has scaling_factor {factor}, not a number above 0.")
    elif unet["class_embed_type"] == "timestep":
        upscaler = unet["in_channels"] == 2 * channels
    text_encoders = [base.text_config(part) for part in base.classes if part.startswith("text_encoder")]
    text_width = sum(getattr(config, "project_dim", config.hidden_size) for config in text_encoders)  # AltDiffusion's
    taken = unet["encoder_hid_dim"] or unet["cross_attention_dim"]  # one number, or one for each block
    unet["text width"] = taken[0] if isinstance(taken, list) and len({*taken}) == 1 else taken
    expected: dict[str, tuple] = {  # possible values of the UNet's settings
        "text width": (text_width,),
        "in_channels": (2 * channels if upscaler else channels,),
        "out_channels": (channels,) if "vae" in base.classes else (3, 6),
        "class_embed_type": ("timestep",) if upscaler else (None,),
        "num_class_embeds": (None,),
        "addition_embed_type": ("text_time",) if sdxl else (None, "text"),
        "encoder_hid_dim_type": (None, "text_proj"),
        "time_cond_proj_dim": (None,),  # consistency models take the guidance scale as an input
    }
    if sdxl:
        width = 6 * unet["addition_time_embed_dim"] + text_encoders[1].projection_dim
        expected["projection_class_embeddings_input_dim"] = (width,)
    for setting, values in expected.items():
        if unet[setting] not in values:
            wanted = " or ".join(map(str, values))
            raise ValueError(f"it is a {name} whose UNet has {setting} {unet[setting]}, not {wanted}. {ADVICE}")
    if "image" in signature(base.pipeline_class.__call__).parameters and not upscaler:
        raise ValueError(f"it is a {name}, which draws from an image, too. {ADVICE}")
    if upscaler and args.class_labels_conditioning != "timesteps":
        raise ValueError(f"it is a {name}: add --class_labels_conditioning timesteps.")


def _with_defaults(base: Base, part: str, part_class: type) -> dict[str, Any]:
    """Return the configuration of a part, which has to be a `part_class`, with the defaults of missing settings."""
    if base.classes[part] is not part_class:
        raise ValueError(f"its {part} is a {base.classes[part].__name__}, not {part_class.__name__}. {ADVICE}")
    defaults = {name: value.default for name, value in signature(part_class).parameters.items()}
    return defaults | read_json(base.folders[part] / "config.json")


def check_settings(base: Base, args: Namespace, sdxl: bool) -> None:
    """Refuse a noise schedule that the loss does not know, and prompts that are too long for the text encoder."""
    scheduler = base.load("scheduler")
    kind = type(scheduler).__name__
    if not (sdxl and "EDM" in kind):
        if "beta_schedule" not in signature(type(scheduler)).parameters:
            raise ValueError(f"its scheduler is a {kind}, without the betas of a diffusion model. {ADVICE}")
        if (prediction := scheduler.config.prediction_type) not in ("epsilon", "v_prediction"):
            raise ValueError(f"The scheduler predicts {prediction}; supported: epsilon, v_prediction.")
        steps, kept = scheduler.config.num_train_timesteps, scheduler.alphas_cumprod
        if len(kept) != steps or not ((kept >= 0) & (kept <= 1)).all():
            raise ValueError(f"its scheduler has no noise schedule of {steps} betas from 0 to 1.")
    length = vars(args).get("tokenizer_max_length")
    limit = getattr(base.text_config("text_encoder"), "max_position_embeddings", math.inf)  # T5 has none
    if (length or 0) > limit:
        raise RunError(f"--tokenizer_max_length {length}: the text encoder takes {limit}.")
    if length is None and base.load("tokenizer").model_max_length > VERY_LARGE:
        raise ValueError(
            "neither its tokenizer nor its text encoder has a longest prompt: add --tokenizer_max_length 77."
        )
