"""Start a run: its accelerator, logs and seed, and the settings that follow from the device."""

from __future__ import annotations

import logging
from argparse import Namespace
from pathlib import Path

import datasets
import diffusers
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import KwargsHandler, ProjectConfiguration, set_seed

from ..errors import RunError, as_run_error, one_line
from . import preflight

DTYPES: dict[str | None, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def start_accelerator(args: Namespace, *handlers: KwargsHandler) -> Accelerator:
    """Create the accelerator of a run, set up the logs and seed the random generators."""
    preflight.check_environment(args)
    # Its configuration, its environment variables, the device and the other processes may each cause any error.
    with as_run_error(lambda error: f"accelerate cannot start: {one_line(error)}"):
        accelerator = Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            mixed_precision=args.mixed_precision,
            log_with=args.report_to,
            kwargs_handlers=list(handlers),
            project_config=ProjectConfiguration(
                project_dir=args.output_dir, logging_dir=str(Path(args.output_dir, args.logging_dir))
            ),
        )
    # accelerate reads these two from its own environment or configuration as well, and follows that.
    args.mixed_precision, steps = str(accelerator.mixed_precision), accelerator.gradient_accumulation_steps
    if steps < 1:
        raise RunError(f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS in the environment is {steps}: it must be at least 1.")
    if args.gradient_accumulation_steps not in (1, steps):
        raise RunError(
            f"--gradient_accumulation_steps is {args.gradient_accumulation_steps}, but ACCELERATE_GRADIENT_ACCUMULATION_STEPS "
            f"in the environment is {steps}, and accelerate follows that: leave one of them out."
        )
    args.gradient_accumulation_steps = steps
    preflight.check_accelerator(args, accelerator)
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    if torch.backends.mps.is_available():
        accelerator.native_amp = False
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%Y-%m-%d %H:%M:%S", level=logging.INFO
    )
    for chatty in ("accelerate", "httpx", "httpx2"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    for library in (datasets, transformers, diffusers):
        library.utils.logging.set_verbosity(logging.WARNING if accelerator.is_local_main_process else logging.ERROR)
    if args.seed is not None:
        set_seed(args.seed)
    return accelerator


def can_fuse_adamw(accelerator: Accelerator) -> bool:
    """Tell whether to use the fused AdamW: on a GPU without a gradient scaler.

    On the CPU it rounds differently from the official scripts. With a scaler, accelerate mistakes a fused step that
    overflowed for an update, and advances the learning rate.
    """
    return accelerator.device.type == "cuda" and accelerator.scaler is None


def weight_dtype(accelerator: Accelerator) -> torch.dtype:
    """Return the dtype of the weights that are not trained."""
    return DTYPES.get(accelerator.mixed_precision, torch.float32)
