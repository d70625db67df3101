"""The checks that come before any model is loaded."""

from __future__ import annotations

import shutil
import sys
from argparse import Namespace
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, DynamoBackend
from diffusers import DiffusionPipeline, EDMEulerScheduler
from torch.distributed.fsdp import CPUOffloadPolicy

from ..errors import RunError, one_line, read_lines
from . import checkpoints, hub, optimization, output
from .data import open_image

logger = get_logger(__name__)

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
        raise RunError(f"FSDP divides the UNet in full fine-tuning, not with {flag}: leave that out, or choose DDP (MULTI_GPU).")


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
        "wandb": ("--report_to wandb", args.report_to == "wandb"),
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


def check_pipeline(model: str, revision: str | None, sdxl: bool) -> None:
    """Refuses a model that is no pipeline, or not one for this script, by its index alone."""
    flag = f"--pretrained_model_name_or_path {model}"
    if Path(model).is_dir():
        if not Path(model, "model_index.json").is_file():
            raise RunError(f"{flag}: the folder holds no model_index.json.")
    elif Path(model).is_absolute() or model.count("/") > 1:
        raise RunError(f"{flag}: no such folder.")
    try:
        index = DiffusionPipeline.load_config(model, revision=revision)
    except OSError as error:
        where = "cannot be read" if Path(model).is_dir() else "no such folder, and not on the Hub"
        raise RunError(f"{flag}: {where}: {one_line(error)}") from error
    if "_class_name" not in index:
        raise RunError(f"{flag}: its model_index.json names no pipeline.")
    if ("text_encoder_2" in index) != sdxl:
        script = "train_dreambooth_lipreg.py" if sdxl else "train_dreambooth_lora_lipreg_sdxl.py"
        raise RunError(f"{flag}: it is a {index['_class_name']}, with another number of text encoders: use {script}.")
    parts = [name for name, value in index.items() if isinstance(value, (list, tuple)) and value[0] is not None]
    if Path(model).is_dir() and (missing := [name for name in parts if not Path(model, name).is_dir()]):
        raise RunError(f"{flag}: its model_index.json names {', '.join(missing)}, which the folder does not hold.")
    for name in parts:
        library, class_name = index[name]
        if library in ("diffusers", "transformers") and not hasattr(sys.modules[library], class_name):
            raise RunError(f"{flag}: its {name} is a {class_name}, which the installed {library} does not have.")
        if Path(model).is_dir():
            _check_weights(Path(model, name), flag)


def _check_weights(part: Path, flag: str) -> None:
    """Refuses a part whose weights are pickles: reading them may run code, and could fail as late as when saving."""
    pickled = [path.name for path in part.iterdir() if path.suffix in (".bin", ".ckpt", ".pt", ".pth")]
    if pickled and not list(part.glob("*.safetensors")):
        raise RunError(f"{flag}: {part.name} has no safetensors, but {pickled[0]}, a pickle, which can run code: convert it.")


def check_models(args: Namespace, noise_scheduler: Any, vae: Any) -> None:
    """Refuses models that cannot be trained with these flags."""
    if not isinstance(noise_scheduler, EDMEulerScheduler):
        optimization.check_prediction_type(noise_scheduler)
    side = 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
    if args.resolution < side:
        raise RunError(f"--resolution {args.resolution}: the VAE makes one latent of {side} x {side} pixels.")


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
    args: Namespace, accelerator: Accelerator
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
    index = DiffusionPipeline.load_config(args.pretrained_model_name_or_path, revision=args.revision)
    folder.open(output.result_names(args, [name for name, value in index.items() if isinstance(value, (list, tuple))]))
    if contents := folder.contents(args.logging_dir):
        logger.info(contents)
    return folder, checkpoint, hub.create_repository(args) if args.push_to_hub else None
