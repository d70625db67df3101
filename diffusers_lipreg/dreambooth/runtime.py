"""Starting a run: accelerator, logs, seed, and the checks that come before any model is loaded."""

from __future__ import annotations

import logging
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryFile

import datasets
import diffusers
import torch
import transformers
from accelerate import Accelerator
from accelerate.tracking import is_wandb_available
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers import DiffusionPipeline

from .arguments import RunError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, None: None}


def run(main: Callable[[Namespace], None], args: Namespace) -> None:
    """Calls `main`; what the user can mend ends in one line on standard error and exit code 1."""
    try:
        main(args)
    except RunError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")


def start_accelerator(args: Namespace) -> Accelerator:
    """The accelerator of a run, with logs set up and random generators seeded."""
    if args.report_to == "wandb" and not is_wandb_available():
        raise RunError("--report_to wandb needs wandb: pip install wandb")
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=args.report_to,
        project_config=ProjectConfiguration(
            project_dir=args.output_dir, logging_dir=str(Path(args.output_dir, args.logging_dir))
        ),
    )
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


def check_output_dir(folder: str) -> None:
    """Makes the output folder and refuses one that cannot be written to."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise RunError(f"--output_dir {folder}: cannot be written to ({error.strerror}).") from error


def check_pipeline(model: str, revision: str | None) -> None:
    """Refuses a model that is no pipeline, by its index alone."""
    if Path(model).is_dir() and not Path(model, "model_index.json").is_file():
        raise RunError(f"--pretrained_model_name_or_path {model}: the folder holds no model_index.json.")
    try:
        DiffusionPipeline.load_config(model, revision=revision)
    except OSError as error:
        reason = " ".join(str(error).split())
        raise RunError(f"--pretrained_model_name_or_path {model}: no such folder, and not on the Hub: {reason}") from error


def tracker_config(args: Namespace) -> dict:
    """The flags that go into the logs: not the token, and not lists, which trackers do not take."""
    return {name: value for name, value in vars(args).items() if name not in ("hub_token", "validation_images")}


def check_finite(loss: torch.Tensor, step: int) -> None:
    """Stops a run whose loss is lost, before it reaches the weights."""
    if not torch.isfinite(loss):
        raise RunError(
            f"the loss is {loss.item()} in the step after update {step}; the last checkpoint is whole. Resume from it "
            "with a lower --learning_rate, or with --mixed_precision bf16 in place of fp16."
        )


def loss_scale(accelerator: Accelerator) -> float:
    """The factor on gradients between backward and unscaling; 1 without fp16."""
    return 1.0 if accelerator.scaler is None else accelerator.scaler.get_scale()


def weight_dtype(accelerator: Accelerator) -> torch.dtype:
    """The type of the weights that are not trained."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
