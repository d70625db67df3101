"""The checks that come before any model is loaded."""

from __future__ import annotations

import math
import os
import shlex
import shutil
from argparse import Namespace
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from inspect import Parameter, signature
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import diffusers
import diffusers.pipelines.deprecated
import torch
import transformers
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, DynamoBackend, broadcast_object_list
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME, _maybe_remap_transformers_class
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import RemoteEntryNotFoundError
from safetensors import safe_open
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import RunError, one_line, read_lines
from . import checkpoints, hub, optimization, output
from .data import open_image
from .models import BASE_FLAGS, Base, find_weights, list_files, loading, parse_json, read_json
from .output import INDEX

logger = get_logger(__name__)
FITTING = "Start from a text-to-image model: Stable Diffusion 1, 2 or XL."
VERY_LARGE = 10**6  # tokens: transformers writes 1e30 where a tokenizer says nothing


def check_processes(args: Namespace, accelerator: Accelerator) -> None:
    """Refuses ways of running many processes that the loop is not made for, or that nobody has tried."""
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):  # which update the weights inside backward
        raise RunError(f"accelerate's configuration asks for {kind.value}: choose DDP (MULTI_GPU) or FSDP version 2.")
    if kind != DistributedType.FSDP:
        return
    plugin = vars(accelerator.state.fsdp_plugin)
    wrong = {
        "fsdp_version: 2": plugin.get("fsdp_version") != 2,  # accelerate 1.3 knows version 1 alone
        "fsdp_state_dict_type: FULL_STATE_DICT": plugin["state_dict_type"].name != "FULL_STATE_DICT",
        "fsdp_cpu_ram_efficient_loading: false": plugin["cpu_ram_efficient_loading"],  # empties the text encoder
        "fsdp_offload_params: false": isinstance(plugin["cpu_offload"], CPUOffloadPolicy),
        "fsdp_activation_checkpointing: false (and --gradient_checkpointing)": plugin["activation_checkpointing"],
        "mixed_precision: bf16 or no": accelerator.mixed_precision == "fp16",
        "dynamo_backend: no": accelerator.state.dynamo_plugin.backend != DynamoBackend.NO,
    }
    for setting in (setting for setting, found in wrong.items() if found):
        raise RunError(f"under FSDP accelerate's configuration has to say {setting}.")
    flags = {
        "adapters": args.rank is not None,
        "--train_text_encoder": vars(args).get("train_text_encoder"),
        "--use_8bit_adam": args.use_8bit_adam,
        "--lipreg_teacher_device": vars(args).get("lipreg_teacher_device") is not None,
    }
    for flag in (flag for flag, given in flags.items() if given):
        raise RunError(
            f"FSDP divides the UNet in full fine-tuning, not with {flag}: leave that out, or choose DDP (MULTI_GPU)."
        )


def check_precision(accelerator: Accelerator) -> None:
    """Refuse a mixed precision that the device is not for, whether a flag, accelerate or its environment asks for it."""
    if accelerator.device.type == "cpu" and accelerator.mixed_precision not in ("no", "bf16"):
        raise RunError(
            f"mixed precision {accelerator.mixed_precision} is for GPUs, and this run is on a CPU: add --mixed_precision "
            "no or bf16, which goes before what `accelerate config` says."
        )


def check_folder(folder: str, flag: str) -> None:
    """Refuses a folder that cannot be written to, or not be made; leaves no trace."""
    try:
        TemporaryFile(dir=_nearest(Path(folder))).close()
    except OSError as error:
        raise RunError(f"{flag} {folder}: cannot be written to ({error.strerror}).") from error


def _nearest(path: Path) -> Path:
    """The path, or the first above it that is there."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return _nearest(path.parent)
    return path


def check_surroundings(args: Namespace) -> None:
    """Refuses folders that overlap, and flags that ask for a package, a device or an image that is not there."""
    output.check_folders(args)
    needed = {
        "bitsandbytes": ("--use_8bit_adam", args.use_8bit_adam),
        "xformers": ("--enable_xformers_memory_efficient_attention", args.enable_xformers_memory_efficient_attention),
        "prodigyopt": ("--optimizer prodigy", vars(args).get("optimizer", "").lower() == "prodigy"),
        args.report_to: (f"--report_to {args.report_to}", args.report_to not in ("all", "tensorboard")),
    }
    for package, (flag, wanted) in needed.items():
        if wanted and find_spec(package) is None:
            raise RunError(f"{flag} needs {package}: pip install {package}")
    if args.lipreg_teacher_device not in (None, "disk"):
        try:
            torch.empty(0, device=args.lipreg_teacher_device)
        except (RuntimeError, AssertionError) as error:
            raise RunError(f"--lipreg_teacher_device {args.lipreg_teacher_device}: {one_line(error)}") from error
    for path in vars(args).get("validation_images") or ():
        try:
            open_image(path)
        except RunError as error:
            raise RunError(f"--validation_images {error}") from error


def probe_prompts(args: Namespace, default: Sequence[str]) -> Sequence[str]:
    """The lines of `--probe_prompts`, or the default; none where nothing is measured."""
    if args.probe_steps == 0 and args.drift_budget is None:
        return ()
    return default if args.probe_prompts is None else read_lines(args.probe_prompts, "--probe_prompts")


TRAINING_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
# What pipelines have beside these that draw from a prompt alone. A controlnet or a motion adapter is none of it.
OTHER_PARTS = ("safety_checker", "feature_extractor", "image_encoder", "watermarker", "image_noising_scheduler")
# Settings for which a loader fetches and runs code: attention kernels from the Hub, and quantizers.
CODE_SETTINGS = ("attn_implementation", "_attn_implementation", "quantization_config")


def open_base(args: Namespace, accelerator: Accelerator, sdxl: bool) -> Base:
    """Find the pipeline to train, fetch what the run needs of it, and look at all of that.

    Of models, only configurations and the headers of weight files are read. A repository is taken at one commit, and
    whole, so that the Hub may be away from here on. Every process has to call this.

    Raises:
        RunError: The pipeline is not there, not whole, brings code, or is of a kind that the loss is not for.
    """
    vae, others = vars(args).get("pretrained_vae_model_name_or_path"), {}
    if vae is not None:
        with loading(args, ("pretrained_vae_model_name_or_path",)), accelerator.local_main_process_first():
            others["vae"] = _fetch_vae(vae)
            check_part(others["vae"], AutoencoderKL, args.variant)
    with loading(args, BASE_FLAGS):
        folder, commit = _find_index(args, accelerator)
        index = read_json(folder / INDEX)
        pipeline_class, classes = find_classes(index)
        _check_index(index, pipeline_class, classes, sdxl)
        title = folder.resolve().name if commit is None else args.pretrained_model_name_or_path
        folders = {name: folder / name for name in classes} | others
        base = Base(title, commit, args.variant, index, pipeline_class, classes, folders)
        whole = vars(args).get("rank") is None or args.validation_prompt is not None  # it is saved, or draws
        parts = [name for name in classes if name not in others and (whole or name in TRAINING_PARTS)]
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


def _find_index(args: Namespace, accelerator: Accelerator) -> tuple[Path, str | None]:
    """Return the folder that holds the pipeline's index, and the commit if that is of a repository."""
    model = args.pretrained_model_name_or_path
    path = Path(model)
    if path.is_dir():
        if not Path(model, INDEX).is_file():
            raise ValueError(f"the folder holds no {INDEX}.")
        return path, None
    if path.is_file():
        code = f"from diffusers import DiffusionPipeline as P; P.from_single_file({model!r}).save_pretrained({path.stem!r})"
        raise RunError(f"{model} is one file, not a folder. Make one of it: python -c {shlex.quote(code)}")
    if path.is_absolute() or model.count("/") > 1:
        raise ValueError("no such folder.")
    try:
        commit: list[Any] = [None]
        if accelerator.is_main_process:
            commit = [Path(hf_hub_download(model, INDEX, revision=args.revision)).parent.name]
        broadcast_object_list(commit)  # the repository may change before the others ask
        with accelerator.local_main_process_first():
            return Path(hf_hub_download(model, INDEX, revision=commit[0])).parent, commit[0]
    except RemoteEntryNotFoundError as error:
        raise ValueError(f"the repository holds no {INDEX}: it is no pipeline of diffusers.") from error
    except Exception as error:
        raise ValueError(f"no such folder, and not on the Hub: {one_line(error)}") from error


def find_classes(index: dict[str, Any]) -> tuple[type[DiffusionPipeline], dict[str, type]]:
    """Return the class of a pipeline and of each of its parts, all from diffusers or transformers.

    Raises:
        ValueError: The index names a class that the installed libraries do not have, such as one in the pipeline's files.
    """
    name = index.get("_class_name")
    pipeline_class = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(pipeline_class, type) and issubclass(pipeline_class, DiffusionPipeline)):
        raise ValueError(f"its {INDEX} names no pipeline of the installed diffusers (_class_name: {name}).")
    given = {part: index[part] for part in signature(pipeline_class).parameters if isinstance(index.get(part), list)}
    return pipeline_class, {part: _find_class(part, value) for part, value in given.items() if value[:1] != [None]}


def _check_index(
    index: dict[str, Any], pipeline_class: type[DiffusionPipeline], classes: dict[str, type], sdxl: bool
) -> None:
    """Refuse a pipeline without the parts that training needs."""
    name = pipeline_class.__name__
    if "unet" not in classes or "scheduler" not in classes:
        raise ValueError(f"it is a {name}, without a UNet. These scripts train Stable Diffusion 1, 2 and XL.")
    if ("text_encoder_2" in classes) != sdxl:
        script = "train_dreambooth_lipreg.py" if sdxl else "train_dreambooth_lora_lipreg_sdxl.py"
        raise ValueError(f"it is a {name}, with another number of text encoders: use {script}.")
    required = {
        part for part, value in signature(pipeline_class).parameters.items() if value.default is Parameter.empty
    }
    for part in (
        *(TRAINING_PARTS if sdxl else ("text_encoder", "tokenizer")),
        *required - {*pipeline_class._optional_components},
    ):
        if part not in classes and (part in TRAINING_PARTS or part not in index):
            raise ValueError(f"it is a {name} without {part}, which training needs.")


def _find_class(part: str, value: Any) -> type:
    """Return the class that the index names for a part as [library, class]."""
    library, name = value if len(value) == 2 and all(isinstance(word, str) for word in value) else ("?", "?")
    owner = {"diffusers": diffusers, "transformers": transformers}.get(library)
    for pipelines in (diffusers.pipelines, diffusers.pipelines.deprecated):  # which hold parts of their own
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
    """Fetch all but the weights; return the names of the repository's files, none where the Hub does not answer."""
    try:
        found = HfApi().model_info(base.title, revision=base.commit).siblings
    except Exception as error:
        logger.info(f"The Hub does not answer ({one_line(error)}): {base.title} is looked for in the cache.")
        return []
    patterns = [f"{name}/*{ending}" for name in parts for ending in (".json", ".txt", ".model")]
    snapshot_download(base.title, revision=base.commit, allow_patterns=patterns)
    return [sibling.rfilename for sibling in found or ()]


def _fetch_weights(base: Base, parts: Sequence[str], files: Sequence[str]) -> None:
    """Fetch the weight files of the parts: those that will be read, and no others."""
    wanted = []
    for name in parts:
        if issubclass(base.classes[name], nn.Module):
            present = {file.removeprefix(f"{name}/") for file in files if file.startswith(f"{name}/")}
            _, weights = find_weights(base.folders[name], present, base.classes[name], base.variant)
            wanted += [f"{name}/{file}" for file in weights]
    snapshot_download(base.title, revision=base.commit, allow_patterns=wanted)


def _fetch_vae(model: str) -> Path:
    """Return the folder of a VAE on its own."""
    if Path(model).is_dir():
        return Path(model)
    weights = f"{Path(SAFETENSORS_WEIGHTS_NAME).stem}*.safetensors*"
    return Path(snapshot_download(model, allow_patterns=["config.json", weights]))


def check_part(folder: Path, part_class: type, variant: str | None) -> str | None:
    """Refuse a part that is not whole, runs code, or reads files elsewhere; return the variant of its weights.

    Args:
        variant: The variant to prefer.
    """
    name = folder.name
    if (folder / "adapter_config.json").exists():  # transformers would load them, and what they name
        raise ValueError(f"{name} holds adapters beside the model: merge them into it first.")
    for path in sorted(folder.glob("*.json")):
        _check_configuration(path)
    if not issubclass(part_class, nn.Module):
        return None
    read_json(folder / "config.json")
    found, files = find_weights(folder, list_files(folder), part_class, variant)
    for file in files:
        try:
            with safe_open(folder / file, "pt"):  # which compares the length of the file with its header, too
                pass
        except Exception as error:
            raise ValueError(f"{name}/{file} is not there or not whole ({one_line(error)}).") from error
    return found


def _check_configuration(path: Path) -> None:
    """Refuse settings by which a file makes the loader run code, or read a file outside of its folder."""
    folder = os.path.abspath(path.parent)
    for key, value in _settings(parse_json(path)):
        if key in CODE_SETTINGS and value not in (None, "eager", "sdpa"):
            raise ValueError(f"{path.parent.name}/{path.name} sets {key}, by which code would be run: take it out.")
        if not isinstance(value, str) or "/" not in value or key in ("_name_or_path", "name_or_path"):
            continue
        target = os.path.normpath(os.path.join(folder, value))
        if not target.startswith(folder + os.sep) and os.path.isfile(target):
            raise ValueError(f"{path.parent.name}/{path.name} names a file elsewhere, {value}: take it out.")


def _settings(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """All keys and values of a JSON value, at any depth."""
    yield key, value
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _settings(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _settings(inner, key)


def _load_for_trial(base: Base, name: str) -> None:
    """Load what training does not load, to see that saving can: models without their data, all else wholly."""
    if name in TRAINING_PARTS and issubclass(base.classes[name], nn.Module):
        return
    without_data = {"device_map": "meta"} if issubclass(base.classes[name], PreTrainedModel) else {}
    try:
        base.load(name, **without_data)
    except Exception as error:
        raise ValueError(f"its {name} cannot be loaded ({one_line(error)}).") from error


def check_kind(base: Base, args: Namespace, sdxl: bool) -> None:
    """Refuse a pipeline that is not a text-to-image one, by what its index and its configurations say of it.

    The loss is that of a UNet which sees a noisy image (or its latents), a timestep and a prompt: nothing else, but for
    SDXL's size and crop, and the image to improve that a super-resolution UNet of DeepFloyd IF sees.
    """
    name, unet = base.pipeline_class.__name__, _with_defaults(base, "unet", UNet2DConditionModel)
    if unknown := [part for part in base.classes if part not in TRAINING_PARTS + OTHER_PARTS]:
        raise ValueError(f"it is a {name}, with {', '.join(unknown)}, which DreamBooth does not know. {FITTING}")
    channels, upscaler = 3, False
    if "vae" in base.classes:
        vae = _with_defaults(base, "vae", AutoencoderKL)
        channels, side = vae["latent_channels"], 2 ** (len(vae["block_out_channels"]) - 1)
        if args.resolution < side:
            raise RunError(f"--resolution {args.resolution}: the VAE makes one latent of {side} x {side} pixels.")
    elif unet["class_embed_type"] == "timestep":
        upscaler = unet["in_channels"] == 2 * channels
    widths = [_width(base.text_config(part)) for part in base.classes if part.startswith("text_encoder")]
    across = unet["encoder_hid_dim"] or unet["cross_attention_dim"]
    expected: dict[str, tuple] = {  # what the UNet's configuration has to say
        "in_channels": (2 * channels if upscaler else channels,),
        "out_channels": (channels,) if "vae" in base.classes else (3, 6),
        "class_embed_type": ("timestep",) if upscaler else (None,),
        "num_class_embeds": (None,),
        "addition_embed_type": ("text_time",) if sdxl else (None, "text"),
        "encoder_hid_dim_type": (None, "text_proj"),
        "time_cond_proj_dim": (None,),  # the guidance scale as an input: a consistency model
    }
    if sdxl:
        pooled = base.text_config("text_encoder_2").projection_dim
        expected["projection_class_embeddings_input_dim"] = (6 * unet["addition_time_embed_dim"] + pooled,)
    for setting, values in expected.items():
        if unet[setting] not in values:
            wanted = " or ".join(map(str, values))
            raise ValueError(f"it is a {name} whose UNet has {setting} {unet[setting]}, not {wanted}. {FITTING}")
    if across not in (sum(widths), [sum(widths)] * len(unet["block_out_channels"])):
        raise ValueError(
            f"its UNet takes text of width {across}, its text encoders make {sum(widths)}: they do not belong together."
        )
    if "image" in signature(base.pipeline_class.__call__).parameters and not upscaler:
        raise ValueError(f"it is a {name}, which draws from an image, too. {FITTING}")
    if upscaler and args.class_labels_conditioning != "timesteps":
        raise ValueError(f"it is a {name}: add --class_labels_conditioning timesteps.")


def _with_defaults(base: Base, part: str, part_class: type) -> dict[str, Any]:
    """Return the configuration of a part that has to be of one class, with the defaults of what it does not say."""
    if base.classes[part] is not part_class:
        raise ValueError(f"its {part} is a {base.classes[part].__name__}, not {part_class.__name__}. {FITTING}")
    defaults = {name: value.default for name, value in signature(part_class.__init__).parameters.items()}
    return defaults | read_json(base.folders[part] / "config.json")


def _width(config: PretrainedConfig) -> int:
    """Return the width of the states that a text encoder gives to the UNet."""
    return getattr(config, "project_dim", config.hidden_size)  # the first is AltDiffusion's


def check_settings(base: Base, args: Namespace, sdxl: bool) -> None:
    """Refuse a schedule of noise that the loss does not know, and prompts that the text encoder cannot read."""
    scheduler = base.load("scheduler")
    kind = type(scheduler).__name__
    if not (sdxl and "EDM" in kind):
        if "beta_schedule" not in signature(type(scheduler)).parameters:
            raise ValueError(f"its scheduler is a {kind}, without the betas of a diffusion model. {FITTING}")
        optimization.check_prediction_type(scheduler)
    length = vars(args).get("tokenizer_max_length")
    limit = getattr(base.text_config("text_encoder"), "max_position_embeddings", math.inf)  # T5 has none
    if (length or 0) > limit:
        raise RunError(f"--tokenizer_max_length {length}: the text encoder takes {limit}.")
    if length is None and base.load("tokenizer").model_max_length > VERY_LARGE:
        raise ValueError(
            "neither its tokenizer nor its text encoder has a longest prompt: add --tokenizer_max_length 77."
        )


def check_disk(args: Namespace, parameters: Sequence[torch.nn.Parameter]) -> None:
    """Refuses to train where the weights, or one checkpoint of them and Adam's two moments of each, do not fit."""
    elements = sum(parameter.numel() for parameter in parameters)
    size = elements * 4
    if args.checkpointing_steps <= args.max_train_steps:
        size += elements * (2 if args.use_8bit_adam else 8)
    free = shutil.disk_usage(_nearest(Path(args.output_dir))).free
    if size > free:
        raise RunError(f"--output_dir {args.output_dir}: a checkpoint takes {size:,} bytes, there are {free:,} free.")


def open_output(
    args: Namespace, accelerator: Accelerator, base: Base
) -> tuple[output.OutputFolder, Path | None, str | None]:
    """The output folder, its checkpoint to resume from, and the repository to push to, if any."""
    check_folder(args.output_dir, "--output_dir")
    check_folder(str(Path(args.output_dir, args.logging_dir)), "--logging_dir")
    if args.with_prior_preservation:
        check_folder(args.class_data_dir, "--class_data_dir")
    folder = output.OutputFolder(args.output_dir)
    checkpoint = checkpoints.find(args.output_dir, args.resume_from_checkpoint)
    if not accelerator.is_main_process:
        return folder, checkpoint, None
    folder.open(output.result_names(args, list(base.classes)))
    if contents := folder.contents(args.logging_dir):
        logger.info(contents)
    return folder, checkpoint, hub.create_repository(args) if args.push_to_hub else None
