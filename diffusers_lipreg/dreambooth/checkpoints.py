"""Write and load checkpoints in the official scripts' layout. Each is whole or not there."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from itertools import count
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import accelerate.utils
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.scheduler import AcceleratedScheduler
from accelerate.utils import DistributedType, patch_environment
from accelerate.utils.constants import RNG_STATE_NAME
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from ..errors import RunError, as_run_error, one_line
from . import run_config
from .checkpoint_files import last_whole, latest_run, run_of, runs_of_checkpoints, step_of
from .models import map_weights
from .output import CONFIG, OWN, OutputFolder, files, fsync_folder, remedy
from .resumable import ResumableDataset, check_states

logger = get_logger(__name__)
SAMPLER_STATE = "sampler_state.pt"
RANDOM_STATES = {"random_state", "numpy_random_seed", "torch_manual_seed"}  # that accelerate restores on any device
REGULARIZER_STATE = "regularizer_state.json"
# The command line sets these items of an optimizer's groups. All others, such as Prodigy's estimates, are state.
HYPERPARAMETERS = "initial_lr betas beta3 eps weight_decay decouple use_bias_correction safeguard_warmup".split()


class Stateful(Protocol):
    """An object whose state a checkpoint keeps as JSON."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def gather_full_models(accelerator: Accelerator, models: Mapping[str, nn.Module]) -> Mapping[str, nn.Module]:
    """Return the unwrapped models; of models that FSDP2 divides, full copies in host memory on the main process.

    Every process has to call it.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        return models
    copies = {}
    for name, model in models.items():
        weights = accelerator.get_state_dict(model)
        if accelerator.is_main_process:
            with torch.device("meta"):  # where initial weights draw no random numbers
                copies[name] = type(model).from_config(model.config)  # type: ignore[attr-defined]
            copies[name].load_state_dict(weights, assign=True)
    return copies


def register_hooks(
    accelerator: Accelerator, save_models: Callable[[str], None], load_models: Callable[[str], None]
) -> None:
    """Have accelerate call `save_models(folder)` and `load_models(folder)` instead of its own dump of the models."""
    if accelerator.distributed_type == DistributedType.FSDP:  # then accelerate gathers and divides them by itself
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
    """Write each unwrapped model to a subfolder of its name."""
    for name, model in models.items():
        model.save_pretrained(os.path.join(folder, name))  # type: ignore[operator]


def load_models(models: Mapping[str, nn.Module], folder: str) -> None:
    """Load what `save_models` wrote into the unwrapped models: tensors alone, not files that may name others or code."""
    for name, model in models.items():
        files = sorted(file.name for file in Path(folder, name).glob("*.safetensors"))
        model.load_state_dict(map_weights(Path(folder, name), model, files), strict=False)


def tensors_only() -> AbstractContextManager[None]:
    """Return a context in which `torch.load` refuses pickles that would run code, whatever its caller asks for."""
    return patch_environment(torch_force_weights_only_load="1", torch_force_no_weights_only_load="0")


class Checkpoints:
    """Write, count, remove and load the checkpoints of one run, whose `run_config` is `config`.

    `loader` (of a `ResumableDataset`) and `lr_scheduler` are prepared by accelerate, and no checkpoint is loaded yet.
    """

    def __init__(
        self,
        args: Namespace,
        accelerator: Accelerator,
        output: OutputFolder,
        config: Mapping[str, Any],
        loader: DataLoader,
        lr_scheduler: AcceleratedScheduler,
    ) -> None:
        self.args = args
        self.accelerator = accelerator
        self.output = output
        self.config = config
        self.loader = loader
        self.dataset: ResumableDataset = loader.dataset  # type: ignore[assignment]
        self.schedule = lr_scheduler.scheduler  # accelerate steps it once for each process
        self.base_lrs = list(self.schedule.base_lrs)
        groups = self.schedule.optimizer.param_groups
        self.hyperparameters = [{name: group[name] for name in HYPERPARAMETERS if name in group} for group in groups]
        self.resumed_from: list[Path] = []
        # Both are hidden, so that no half-written and no half-removed checkpoint has the name of one.
        self.partial = output.path / OWN / "checkpoint.partial"
        self.removed = output.path / OWN / "checkpoint.removed"

    def written(self) -> list[Path]:
        """Return the checkpoints in the output folder that this run wrote, in the order of writing."""
        run_id = self.config["run"]["id"]
        return [path for path, run in runs_of_checkpoints(self.output.path).items() if run["id"] == run_id]

    def of_this_run(self) -> list[Path]:
        """Return the checkpoint that this run was resumed from and those that it wrote, in the order of writing."""
        written = self.written()
        return [path for path in self.resumed_from if path not in written and path.is_dir()] + written

    def save(self, step: int, regularizer: Stateful) -> Path:
        """Write checkpoint-`step` and return it; remove the oldest beyond the limit. Every process has to call it."""
        final = self.output.path / f"checkpoint-{step}"
        with self._writing(final):
            self.accelerator.wait_for_everyone()
            self.accelerator.save_state(str(self.partial))
            states = accelerate.utils.gather_object([self.dataset.state_dict()])
            if self.accelerator.is_main_process:
                torch.save(states, self.partial / SAMPLER_STATE)
                (self.partial / REGULARIZER_STATE).write_text(json.dumps(regularizer.state_dict()), encoding="utf-8")
        if self.accelerator.is_main_process and self.args.checkpoints_total_limit is not None:
            owned = self.output.owned("checkpoint")
            older = [path for path in self.written() if path.name in owned and path != final]
            spared = max(1, self.args.checkpoints_total_limit) - 1
            for checkpoint in older[: max(0, len(older) - spared)]:
                checkpoint.replace(self.removed)
                self._clear()
                self.output.discard([checkpoint.name], "checkpoint")
        self.accelerator.wait_for_everyone()
        logger.info(f"Saved {final}.")
        return final

    def save_best(
        self, models: Mapping[str, nn.Module], save_models: Callable[[Mapping[str, nn.Module], str], None]
    ) -> None:
        """Write checkpoint-best by `save_models(models, folder)`. Every process has to call it."""
        models = gather_full_models(self.accelerator, models)
        with self._writing(self.output.path / "checkpoint-best"):
            if self.accelerator.is_main_process:
                self.partial.mkdir()
                save_models(models, str(self.partial))

    @contextmanager
    def _writing(self, final: Path) -> Iterator[None]:
        """Have the block write to the folder `partial`, which gets the name of the checkpoint when all is on the disk.

        What stands under that name is replaced, or renamed if no run of ours wrote it.
        """
        with self.disk_errors(final):
            if self.accelerator.is_main_process:
                self.output.claim()
                self._clear()
                if final.exists() and (final.name not in self.output.owned("checkpoint") or run_of(final) is None):
                    kept = next(path for number in count(1) if not (path := Path(f"{final}.kept-{number}")).exists())
                    final.replace(kept)
                    logger.warning(f"{final} was not written by a run of ours: it is kept as {kept}.")
                self.output.add([final.name], "checkpoint")
            yield
            if self.accelerator.is_main_process:
                sizes = {name: (self.partial / name).stat().st_size for name in files(self.partial)}
                run_config.write(self.config, self.partial / CONFIG, files=sizes)
                fsync_folder(self.partial)
                if final.exists():
                    final.replace(self.removed)
                self.partial.replace(final)
                self._clear()

    def _clear(self) -> None:
        """Remove what is left of half-written and half-removed checkpoints; of a link, the link alone."""
        for path in (self.partial, self.removed):
            shutil.rmtree(path, ignore_errors=True)
            if path.is_symlink():
                path.unlink()

    @contextmanager
    def disk_errors(self, target: str | Path) -> Iterator[None]:
        """Turn errors of a full or broken disk into one line, and remove the half-written checkpoint."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            self._clear()
            saved = self.of_this_run()
            go_on = f"go on with {self._flag(saved[-1])}" if saved else "start again"
            # PyTorch raises a RuntimeError that does not say why.
            advice = "See whether the disk is full" if isinstance(error, RuntimeError) else remedy(error)
            raise RunError(f"{target} cannot be written: {one_line(error)}. {advice}, then {go_on}.") from error

    def _flag(self, checkpoint: Path) -> str:
        name = checkpoint.name if checkpoint.parent == self.output.path else str(checkpoint)
        return f"--resume_from_checkpoint {shlex.quote(name)}"

    def check_finite(self, step: int, **quantities: Tensor) -> None:
        """Stop the run after `step` updates if one of the named scalars is not finite; say how to go on.

        A gradient that overflows under the loss scale of fp16 stops nothing, since the scaler skips that update.
        """
        if self.accelerator.scaler is not None:
            quantities.pop("gradient", None)
        for name, value in quantities.items():
            value = value.full_tensor() if isinstance(value, DTensor) else torch.as_tensor(value)
            if value.isfinite():
                continue
            # A checkpoint of this very step holds the weights that have just failed, so it is left out.
            earlier = [path for path in self.of_this_run() if step_of(path) < step]
            words = [self._flag(earlier[-1]) if earlier else "anew"]
            rates = ["learning_rate", "text_encoder_lr"] if self.config["train_text_encoder"] else ["learning_rate"]
            words += [f"--{rate} {self.config[rate] / 10:g}" for rate in rates if self.config.get(rate)]
            precision = ", or in bf16 in place of fp16" if self.accelerator.mixed_precision == "fp16" else ""
            raise RunError(
                f"the {name} is {value.item()} in the step after update {step}, at a learning rate of "
                f"{self.schedule.get_last_lr()[0]:g}. Start {' '.join(words)}{precision}."
            )

    def resume(
        self, checkpoint: Path | None, num_update_steps_per_epoch: int, regularizer: Stateful
    ) -> tuple[int, range]:
        """Load a checkpoint, if there is one; return the number of updates made and the epochs that are left.

        If "latest" was asked for and its files are whole, but damaged, the one before is loaded.
        """
        step = 0
        while checkpoint is not None and not self.resumed_from:
            try:
                self.load(checkpoint, num_update_steps_per_epoch, regularizer)
                step, self.resumed_from = step_of(checkpoint), [checkpoint]
            except RunError as error:
                earlier = [] if self.args.resume_from_checkpoint != "latest" else latest_run(self.output.path)
                earlier = earlier[: earlier.index(checkpoint)] if earlier else []
                # Under FSDP the other processes would still be loading the damaged one.
                if not earlier or self.accelerator.distributed_type == DistributedType.FSDP:
                    raise
                logger.warning(f"{error} Going on from {earlier[-1].name} instead.")
                checkpoint = last_whole(earlier)
        if self.accelerator.is_main_process:
            with self.disk_errors(self.output.path / CONFIG):
                self.output.write_result(CONFIG, lambda path: run_config.write(self.config, path))
        if step >= self.args.max_train_steps:
            logger.info(f"{checkpoint} has all {self.args.max_train_steps} updates: nothing is left to train.")
            return step, range(0)
        return step, range(step // num_update_steps_per_epoch, self.args.num_train_epochs)

    def load(self, checkpoint: Path, num_update_steps_per_epoch: int, regularizer: Stateful) -> None:
        """Restore the run, also in the middle of an epoch, with the hyperparameters of the command line."""

        def describe(error: Exception) -> str:  # each library fails in its own way at a damaged file
            # The message of an UnpicklingError would say how to run the code.
            reason = "a file in it would run code" if isinstance(error, UnpicklingError) else one_line(error)
            return f"{checkpoint} is not whole, or not of a run with these flags: {reason}"

        with as_run_error(describe):
            states = self._load_states(checkpoint, regularizer)
        state, processes = {}, self.accelerator.num_processes
        if len(states) == processes:
            state = states[self.accelerator.process_index]
        else:
            reason = f"is of {len(states)} processes, not {processes}"
            logger.warning(f"{checkpoint} {reason}: the photos are shuffled anew.")
        for group, hyperparameters in zip(self.schedule.optimizer.param_groups, self.hyperparameters, strict=True):
            group.update(hyperparameters)
        self.schedule.base_lrs = list(self.base_lrs)
        self.schedule.last_epoch = self.schedule.last_epoch * processes // len(states) - 1
        self.schedule.step()  # computes the learning rates of this update from the base rates
        batches = step_of(checkpoint) % num_update_steps_per_epoch * self.accelerator.gradient_accumulation_steps
        self.dataset.resume(self.loader, batches, state)

    def _load_states(self, checkpoint: Path, regularizer: Stateful) -> list[dict[str, Any]]:
        """Load what a checkpoint holds, and return the states of the data set, one for each process."""
        sampler_state, regularizer_state = checkpoint / SAMPLER_STATE, checkpoint / REGULARIZER_STATE
        random_state = checkpoint / f"{RNG_STATE_NAME}_{self.accelerator.process_index}.pkl"
        states: list[dict[str, Any]] = [{}] * self.accelerator.num_processes
        with tensors_only():
            if random_state.exists():
                # load_state would ignore a file that it cannot read, or that lacks one of these.
                if not RANDOM_STATES <= accelerate.utils.load(random_state).keys():
                    raise ValueError(f"{random_state.name} is not whole")
            self.accelerator.load_state(str(checkpoint))
            if sampler_state.exists():
                states = check_states(torch.load(sampler_state, weights_only=True))
        if regularizer_state.exists():
            regularizer.load_state_dict(json.loads(regularizer_state.read_text(encoding="utf-8")))
        elif self.args.drift_budget is not None or self.args.keep_best:
            logger.warning(f"{checkpoint} has no {REGULARIZER_STATE}: the budget and the best so far start again.")
        return states
