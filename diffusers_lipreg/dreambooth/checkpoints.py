"""Checkpoints in the official scripts' layout, each whole or not there."""

from __future__ import annotations

import os
import re
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import accelerate.utils
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.scheduler import AcceleratedScheduler
from accelerate.utils import DistributedType
from accelerate.utils.constants import RNG_STATE_NAME
from diffusers.utils.torch_utils import is_compiled_module
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import DataLoader

from ..errors import RunError, one_line

logger = get_logger(__name__)
SAMPLER_STATE = "sampler_state.pt"


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(filter(is_checkpoint, Path(output_dir).glob("checkpoint-*")), key=step_of)


def is_checkpoint(path: Path) -> bool:
    """Whether a path is named checkpoint-NUMBER: others, such as checkpoint-best, are the user's own."""
    return re.fullmatch(r"checkpoint-\d+", path.name) is not None and path.is_dir()


def step_of(checkpoint: Path) -> int:
    """The number of updates behind a checkpoint."""
    return int(checkpoint.name.split("-")[1])


def unwrap(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """The bare model behind what `accelerator.prepare` and `torch.compile` put around it."""
    model = accelerator.unwrap_model(model)
    return model._orig_mod if is_compiled_module(model) else model


def whole(accelerator: Accelerator, models: Mapping[str, nn.Module]) -> Mapping[str, nn.Module]:
    """The bare models; in place of those that FSDP2 has divided whole copies in host memory, on the main process.

    Every process has to call it.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        return models
    copies = {}
    for name, model in models.items():
        weights = accelerator.get_state_dict(model)
        if accelerator.is_main_process:
            with torch.device("meta"):  # which draws no random numbers
                copies[name] = type(model).from_config(model.config)
            copies[name].load_state_dict(weights, assign=True)
    return copies


def write_models_with(
    accelerator: Accelerator, save_models: Callable[[str], None], load_models: Callable[[str], None]
) -> None:
    """Makes accelerate's checkpoints hold what `save_models(folder)` writes in place of its own dump of the models.

    Not those of models that FSDP divides: accelerate gathers and divides them by itself.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        return

    def save(models: list[nn.Module], weights: list[dict], folder: str) -> None:
        if accelerator.is_main_process:
            save_models(folder)
        weights.clear()  # accelerate writes what is left here

    def load(models: list[nn.Module], folder: str) -> None:
        load_models(folder)
        models.clear()

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def save_models(models: Mapping[str, nn.Module], folder: str) -> None:
    """Writes each bare model to a sub-folder of its name."""
    for name, model in models.items():
        model.save_pretrained(os.path.join(folder, name))


def load_models(models: Mapping[str, nn.Module], folder: str) -> None:
    """Puts what `save_models` wrote into the bare models."""
    for name, model in models.items():
        model.load_state_dict(type(model).from_pretrained(folder, subfolder=name, use_safetensors=True).state_dict())


def save(
    accelerator: Accelerator, loader: DataLoader, output_dir: str, step: int, total_limit: int | None
) -> None:
    """Writes checkpoint-`step`, hidden until it is whole, then removes the oldest beyond the limit (at least 1)."""
    final = Path(output_dir, f"checkpoint-{step}")
    partial = final.with_name(f".{final.name}.partial")
    if accelerator.is_main_process:
        for left_over in Path(output_dir).glob(".checkpoint-*.partial"):  # of a run that was killed while saving
            shutil.rmtree(left_over)
    accelerator.wait_for_everyone()
    with writing(output_dir, final):
        accelerator.save_state(str(partial))
        states = accelerate.utils.gather_object([loader.dataset.state_dict()])
        if accelerator.is_main_process:
            torch.save(states, partial / SAMPLER_STATE)
            flush(partial)
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return
    shutil.rmtree(final, ignore_errors=True)
    partial.replace(final)
    logger.info(f"Saved {final}.")
    if total_limit is not None:
        for old in checkpoints(output_dir)[: -max(1, total_limit)]:
            shutil.rmtree(old)


def save_best(
    accelerator: Accelerator,
    output_dir: str,
    models: Mapping[str, nn.Module],
    save_models: Callable[[Mapping[str, nn.Module], str], None],
) -> None:
    """Writes what `save_models(models, folder)` does to checkpoint-best, hidden until it is whole."""
    models = whole(accelerator, models)
    if not accelerator.is_main_process:
        return
    final = Path(output_dir, "checkpoint-best")
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with writing(output_dir, final):
        partial.mkdir()
        save_models(models, str(partial))
        flush(partial)
    shutil.rmtree(final, ignore_errors=True)
    partial.replace(final)


@contextmanager
def writing(output_dir: str, target: str | Path) -> Iterator[None]:
    """Turns what a full or broken disk raises in the block into one line, and removes the checkpoint in the making."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        for partial in Path(output_dir).glob(".checkpoint-*.partial"):
            shutil.rmtree(partial)
        whole = checkpoints(output_dir)
        go_on = f"go on with --resume_from_checkpoint {whole[-1].name}" if whole else "start again"
        raise RunError(f"{target} cannot be written: {one_line(error)}. Make room on the disk, then {go_on}.") from error


def flush(folder: Path) -> None:
    """Has the system write the folder's files to the disk, so that its new name never stands for less than all."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def find(output_dir: str, wanted: str | None) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` means: the latest, a name or a path; `None` to start anew."""
    if wanted is None:
        return None
    found = checkpoints(output_dir)
    if wanted == "latest":
        if not found:
            logger.warning(f"There is no checkpoint in {output_dir} yet: starting a new run.")
        return found[-1] if found else None
    # A name in the output folder; a path elsewhere; as in the official script, the last part of a path that is gone.
    for checkpoint in (Path(output_dir, wanted), Path(wanted), Path(output_dir, Path(wanted).name)):
        if is_checkpoint(checkpoint):
            return checkpoint
    names = ", ".join(path.name for path in found) or "none"
    raise RunError(f"--resume_from_checkpoint {wanted}: there is no such checkpoint; {output_dir} has {names}.")


def resume(
    args: Namespace,
    accelerator: Accelerator,
    loader: DataLoader,
    lr_scheduler: AcceleratedScheduler,
    checkpoint: Path | None,
    updates_per_epoch: int,
) -> tuple[int, range]:
    """The number of updates made and the epochs left: of a new run, or of one that is put where it was.

    Where the latest checkpoint is asked for and cannot be read, the one before it is used.
    """
    step = 0
    while checkpoint is not None:
        try:
            step = load(accelerator, loader, lr_scheduler, checkpoint, updates_per_epoch)
            break
        except RunError as error:
            before = [path for path in checkpoints(args.output_dir) if step_of(path) < step_of(checkpoint)]
            sharded = accelerator.distributed_type == DistributedType.FSDP  # other processes are in the midst of loading
            if args.resume_from_checkpoint != "latest" or not before or sharded:
                raise
            logger.warning(f"{error} Going on from {before[-1].name} instead.")
            checkpoint = before[-1]
    if step >= args.max_train_steps:
        logger.info(f"{checkpoint} has all {args.max_train_steps} updates: nothing is left to train.")
        return step, range(0)
    return step, range(step // updates_per_epoch, args.num_train_epochs)


def load(
    accelerator: Accelerator,
    loader: DataLoader,
    lr_scheduler: AcceleratedScheduler,
    checkpoint: Path,
    updates_per_epoch: int,
) -> int:
    """Puts the run where it was, also inside an epoch; returns the number of updates made.

    A checkpoint of the official script, or of another number of processes, has no states of the data set that fit:
    the rest of an epoch is then another shuffle.
    """
    step = step_of(checkpoint)
    batches = step % updates_per_epoch * accelerator.gradient_accumulation_steps
    processes = accelerator.num_processes
    state = Path(checkpoint, SAMPLER_STATE)
    random_state = Path(checkpoint, f"{RNG_STATE_NAME}_{accelerator.process_index}.pkl")
    try:
        if random_state.exists():
            accelerate.utils.load(random_state)  # load_state passes over one that it cannot read
        accelerator.load_state(str(checkpoint))
        states = torch.load(state, weights_only=True) if state.exists() else [{}] * processes
    except (OSError, RuntimeError, ValueError, EOFError, UnpicklingError, SafetensorError) as error:
        raise RunError(f"{checkpoint} is not whole, or not of a run with these flags: {one_line(error)}") from error
    if len(states) != processes:
        logger.warning(f"{checkpoint} is of {len(states)} processes, not {processes}: the photos are shuffled anew.")
        schedule = lr_scheduler.scheduler  # it is stepped once for each process
        schedule.last_epoch = schedule.last_epoch * processes // len(states) - 1
        schedule.step()
    exact = len(states) == processes
    loader.dataset.resume(loader, batches, states[accelerator.process_index] if exact else {})
    return step
