"""Starting a run: accelerator, logs and seed; and what the loop asks of them."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import diffusers
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import KwargsHandler, ProjectConfiguration, set_seed

from ..errors import RunError, one_line
from . import preflight

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, None: None}


def start_accelerator(args: Namespace, *handlers: KwargsHandler) -> Accelerator:
    """The accelerator of a run, with logs set up and random generators seeded."""
    preflight.check_surroundings(args)
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            mixed_precision=args.mixed_precision,
            log_with=args.report_to,
            kwargs_handlers=list(handlers),
            project_config=ProjectConfiguration(
                project_dir=args.output_dir, logging_dir=str(Path(args.output_dir, args.logging_dir))
            ),
        )
    except Exception as error:  # of its configuration, its environment variables, the device, the other processes
        raise RunError(f"accelerate cannot start: {one_line(error)}") from error
    settle_flags(args, accelerator)
    preflight.check_processes(args, accelerator)
    preflight.check_precision(accelerator)
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


def settle_flags(args: Namespace, accelerator: Accelerator) -> None:
    """Fill in the flags that accelerate takes from its own environment or configuration where they are not given.

    Raises:
        RunError: The environment says something else than a flag.
    """
    args.mixed_precision = str(accelerator.mixed_precision)
    steps = accelerator.gradient_accumulation_steps
    if args.gradient_accumulation_steps not in (1, steps):
        raise RunError(
            f"--gradient_accumulation_steps is {args.gradient_accumulation_steps}, but ACCELERATE_GRADIENT_ACCUMULATION_STEPS "
            f"in the environment is {steps}, and accelerate follows that: leave one of them out."
        )
    args.gradient_accumulation_steps = steps


def prepare(accelerator: Accelerator, holder: Any, names: Sequence[str], *others: Any) -> Sequence[Any]:
    """Hands the models that `holder` has under `names`, and the others, to the accelerator; returns the others."""
    prepared = accelerator.prepare(*(getattr(holder, name) for name in names), *others)
    for name, model in zip(names, prepared, strict=False):
        setattr(holder, name, model)
    return prepared[len(names) :]


def fuses_adamw(accelerator: Accelerator) -> bool:
    """Whether AdamW is fused: on a GPU, for on the CPU that rounds otherwise than the official scripts do.

    Not where gradients are scaled: accelerate takes a fused step that overflowed for one that was made, and goes on
    with the learning rate's schedule.
    """
    return accelerator.device.type == "cuda" and accelerator.scaler is None


def weight_dtype(accelerator: Accelerator) -> torch.dtype:
    """The type of the weights that are not trained."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
