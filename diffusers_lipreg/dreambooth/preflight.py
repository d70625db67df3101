"""Check flags, environment and folders before any model is loaded."""

from __future__ import annotations

import os
import shutil
from argparse import Namespace
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, DynamoBackend
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy

from ..errors import RunError, as_run_error, one_line, read_lines
from . import checkpoint_files, hub, output
from .images import open_image
from .models import Base

logger = get_logger(__name__)
CLASS_PROMPT_EVERY = 32


def check_accelerator(args: Namespace, accelerator: Accelerator) -> None:
    """Refuse a precision that the device lacks, and several processes in a way that loses the penalty or is untested."""
    started = os.environ.get("WORLD_SIZE", "1") if "LOCAL_RANK" in os.environ else "1"
    if started != str(accelerator.num_processes):
        raise RunError(
            f"{started} processes were started, but accelerate would make a run of its own of each: without a GPU, set "
            "ACCELERATE_USE_CPU=true."
        )
    if accelerator.device.type == "cpu" and accelerator.mixed_precision not in ("no", "bf16"):
        raise RunError(
            f"mixed precision {accelerator.mixed_precision} is for GPUs, and this run is on a CPU: add "
            "--mixed_precision no or bf16, which goes before what `accelerate config` says."
        )
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):  # they update inside backward
        raise RunError(f"accelerate's configuration asks for {kind.value}: choose DDP (MULTI_GPU) or FSDP version 2.")
    if kind != DistributedType.FSDP:
        return
    plugin = vars(accelerator.state.fsdp_plugin)
    wrong = {
        "fsdp_version: 2": plugin.get("fsdp_version") != 2,  # accelerate 1.3 only knows version 1
        "fsdp_state_dict_type: FULL_STATE_DICT": plugin["state_dict_type"].name != "FULL_STATE_DICT",
        "fsdp_cpu_ram_efficient_loading: false": plugin["cpu_ram_efficient_loading"],  # empties the text encoder
        "fsdp_offload_params: false": isinstance(plugin["cpu_offload"], CPUOffloadPolicy),
        "fsdp_activation_checkpointing: false (and --gradient_checkpointing)": plugin["activation_checkpointing"],
        "mixed_precision: bf16 or no": accelerator.mixed_precision == "fp16",
        "dynamo_backend: no": accelerator.state.dynamo_plugin.backend != DynamoBackend.NO,
    }
    if setting := next((setting for setting, found in wrong.items() if found), None):
        raise RunError(f"under FSDP accelerate's configuration has to say {setting}.")
    flags = {
        "adapters": args.rank is not None,
        "--train_text_encoder": args.train_text_encoder,
        "--use_8bit_adam": args.use_8bit_adam,
        "--lipreg_teacher_device": args.lipreg_teacher_device is not None,
    }
    if flag := next((flag for flag, given in flags.items() if given), None):
        raise RunError(
            f"FSDP divides the UNet in full fine-tuning, not with {flag}: leave that out, or choose DDP (MULTI_GPU)."
        )


def check_folder(folder: str, flag: str) -> None:
    """Refuse a folder that cannot be made or written to, and leave no trace in it. `flag` named it."""
    try:
        TemporaryFile(dir=_nearest(Path(folder))).close()
    except OSError as error:
        raise RunError(f"{flag} {folder}: cannot be written to ({error.strerror}).") from error


def _nearest(path: Path) -> Path:
    """Return the path, or the first of the folders above it that exists."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return _nearest(path.parent)
    return path


def check_environment(args: Namespace) -> None:
    """Refuse folders that overlap, and flags that need a package, a device or an image that is missing."""
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
        with as_run_error(lambda error: f"--lipreg_teacher_device {args.lipreg_teacher_device}: {one_line(error)}"):
            torch.empty(0, device=args.lipreg_teacher_device)
    for path in vars(args).get("validation_images") or ():
        open_image(path, f"--validation_images {path}")


def prompts_to_record(
    args: Namespace, generic: Sequence[str], measured: Sequence[str]
) -> tuple[Sequence[str], Sequence[str]]:
    """Return the prompts that outputs are held on and those that drift is measured on; none that no flag asks for.

    The two share none: what is trained on is no measure. The first are the lines of `--lipreg_prompts`, with
    `--class_prompt` in front and again and again.

    Args:
        generic, measured: The prompts where no file is given.
    """
    training: Sequence[str] = ()
    if args.lipreg_reduction == "output":
        if args.lipreg_prompts is None:
            training = [prompt for prompt in generic if prompt != args.instance_prompt]
        else:
            training = read_lines(args.lipreg_prompts, "--lipreg_prompts")
        if args.instance_prompt in training:
            raise RunError(
                f"--lipreg_prompts {args.lipreg_prompts} holds the --instance_prompt, whose outputs are to change: "
                "leave it out."
            )
        if args.class_prompt is not None and args.class_prompt != args.instance_prompt:
            parts = [training[i : i + CLASS_PROMPT_EVERY] for i in range(0, len(training), CLASS_PROMPT_EVERY)]
            training = [prompt for part in parts for prompt in (args.class_prompt, *part)]
    if args.probe_steps == 0 and args.drift_budget is None:
        return training, ()
    found = measured if args.probe_prompts is None else read_lines(args.probe_prompts, "--probe_prompts")
    if not (left := [prompt for prompt in found if prompt not in training]):
        raise RunError(
            "--lipreg_prompts holds all prompts that drift is measured on, so nothing is left to measure on: name others "
            "with --probe_prompts."
        )
    return training, left


def check_disk(args: Namespace, parameters: Sequence[nn.Parameter]) -> None:
    """Refuse to train if the disk has no room for the weights and, with checkpoints, the optimizer's state of one."""
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
    """Return the output folder, the checkpoint to resume from and, on the main process, the repository to push to."""
    check_folder(args.output_dir, "--output_dir")
    check_folder(str(Path(args.output_dir, args.logging_dir)), "--logging_dir")
    if args.with_prior_preservation:
        check_folder(args.class_data_dir, "--class_data_dir")
    folder = output.OutputFolder(args.output_dir)
    checkpoint = checkpoint_files.find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    if not accelerator.is_main_process:
        return folder, checkpoint, None
    names = output.result_names(args, list(base.classes))
    if (logs := Path(args.logging_dir).parts[:1]) and (logs[0] in (output.OWN, *names) or "checkpoint-" in logs[0]):
        raise RunError(f"--logging_dir {args.logging_dir}: the run writes {logs[0]} itself, so name another folder.")
    folder.open(names)
    if contents := folder.contents(args.logging_dir):
        logger.info(contents)
    return folder, checkpoint, hub.create_repository(args) if args.push_to_hub else None
