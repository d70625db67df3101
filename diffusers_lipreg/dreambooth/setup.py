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
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LRScheduler

from ..errors import RunError, one_line
from . import checkpoints, preflight

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
        library.utils.logging.set_verbosity(
            logging.WARNING if accelerator.is_local_main_process else logging.ERROR
        )
    if args.seed is not None:
        set_seed(args.seed)
    return accelerator


def prepare(accelerator: Accelerator, holder: Any, names: Sequence[str], *others: Any) -> Sequence[Any]:
    """Hands the models that `holder` has under `names`, and the others, to the accelerator; returns the others."""
    prepared = accelerator.prepare(*(getattr(holder, name) for name in names), *others)
    for name, model in zip(names, prepared, strict=False):
        setattr(holder, name, model)
    return prepared[len(names) :]


def check_finite(
    args: Namespace, accelerator: Accelerator, lr_scheduler: LRScheduler, step: int, **quantities: torch.Tensor
) -> None:
    """Stops a run whose loss or gradient is lost, before it reaches the weights.

    Gradients that overflow under fp16's loss scale are not lost: the scaler leaves that update out.
    """
    rate = lr_scheduler.get_last_lr()[0]
    if accelerator.scaler is not None:
        quantities.pop("gradient", None)
    for name, value in quantities.items():
        value = value.full_tensor() if isinstance(value, DTensor) else value
        if not torch.as_tensor(value).isfinite():
            saved = checkpoints.checkpoints(args.output_dir)
            again = f"--resume_from_checkpoint {saved[-1].name}" if saved else "anew, for there is no checkpoint yet"
            raise RunError(
                f"the {name} is {torch.as_tensor(value).item()} in the step after update {step}, at a learning rate of {rate:g}. "
                f"Start {again}, with a lower --learning_rate, or with --mixed_precision bf16 in place of fp16."
            )


def fuses_adamw(accelerator: Accelerator) -> bool:
    """Whether AdamW is fused: on a GPU, for on the CPU that rounds otherwise than the official scripts do.

    Not where gradients are scaled: accelerate takes a fused step that overflowed for one that was made, and goes on
    with the learning rate's schedule.
    """
    return accelerator.device.type == "cuda" and accelerator.scaler is None


def weight_dtype(accelerator: Accelerator) -> torch.dtype:
    """The type of the weights that are not trained."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
