"""Checkpoints in the official scripts' layout, each whole or not there."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import accelerate.utils
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.scheduler import AcceleratedScheduler
from accelerate.utils import DistributedType
from accelerate.utils.constants import OPTIMIZER_NAME, RNG_STATE_NAME, SCHEDULER_NAME
from diffusers.utils.torch_utils import is_compiled_module
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from ..errors import RunError, one_line
from . import run_config
from .output import CONFIG, OutputFolder, files, fsync_folder, remedy

logger = get_logger(__name__)
SAMPLER_STATE = "sampler_state.pt"
MONITOR_STATE = "monitor_state.json"
OFFICIAL_FILES = (f"{OPTIMIZER_NAME}.bin", f"{SCHEDULER_NAME}.bin", f"{RNG_STATE_NAME}_0.pkl")
# Items of an optimizer's groups that the command line sets; the rest, such as Prodigy's estimates, are state.
HYPERPARAMETERS = (
    "initial_lr", "betas", "beta3", "eps", "weight_decay", "decouple", "use_bias_correction", "safeguard_warmup"
)  # fmt: skip


class Stateful(Protocol):
    """What a checkpoint keeps as JSON."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the checkpoints in a folder by their number: others, such as checkpoint-best, are not among them."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if is_checkpoint(path)]
    return sorted(found, key=step_of)


def is_checkpoint(path: Path) -> bool:
    """Return whether a path is a folder named checkpoint-NUMBER."""
    return re.fullmatch(r"checkpoint-\d+", path.name) is not None and path.is_dir()


def step_of(checkpoint: Path) -> int:
    """Return the number of updates behind a checkpoint."""
    return int(checkpoint.name.split("-")[1])


def latest_run(output_dir: str | Path) -> list[Path]:
    """Return the checkpoints of the run that wrote the last one, in the order of writing.

    Those without a config.yaml, as the official scripts write them, follow where they are newer; by number if all are so.
    """
    found = {path: _run(path) for path in checkpoints(output_dir)}
    ours = sorted((path for path, run in found.items() if run), key=lambda path: found[path]["time"])
    foreign = [path for path, run in found.items() if not run]
    if not ours:
        return foreign
    last = found[ours[-1]]
    same_run = [path for path in ours if found[path]["id"] == last["id"]]
    return same_run + [path for path in foreign if path.stat().st_mtime > last["time"]]


def _run(checkpoint: Path) -> dict[str, Any]:
    """Return the "run" of a checkpoint's config.yaml; nothing of one that has none that can be read."""
    try:
        return (run_config.read(checkpoint) or {"run": {}})["run"]
    except RunError:
        return {}


def fault_of(checkpoint: Path) -> str:
    """Return what a checkpoint lacks to be whole, or nothing."""
    try:
        config = run_config.read(checkpoint)
    except RunError as error:
        return str(error)
    if config is not None:
        sizes = {Path(checkpoint, name): size for name, size in config["run"]["files"].items()}
        wrong = [path.name for path, size in sizes.items() if not path.is_file() or path.stat().st_size != size]
        return f"{', '.join(wrong)} missing or cut off" if wrong else ""
    missing = [name for name in OFFICIAL_FILES if not Path(checkpoint, name).is_file()]
    if not [*checkpoint.rglob("*.safetensors"), *checkpoint.glob("pytorch_model*")]:
        missing.append("the model")
    return f"{', '.join(missing)} missing" if missing else ""


def unwrap(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """The bare model behind what `accelerator.prepare` and `torch.compile` put around it."""
    model = accelerator.unwrap_model(model)
    return model._orig_mod if is_compiled_module(model) else model


def gather_full_models(accelerator: Accelerator, models: Mapping[str, nn.Module]) -> Mapping[str, nn.Module]:
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


def register_hooks(
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
    """Write each bare model to a sub-folder of its name."""
    for name, model in models.items():
        model.save_pretrained(os.path.join(folder, name))


def load_models(models: Mapping[str, nn.Module], folder: str) -> None:
    """Put what `save_models` wrote into the bare models.

    The tensors alone are read, and no configuration or index, which could name files elsewhere, adapters or code.

    Raises:
        ValueError: A model has weights that are not there.
    """
    for name, model in models.items():
        stored = {
            key: tensor
            for file in sorted(Path(folder, name).glob("*.safetensors"))
            for key, tensor in load_file(file).items()
        }
        own = model.state_dict()
        # Newer transformers call CLIP's parts without the prefix that they have in files.
        stored = {key if key in own else key.removeprefix("text_model."): tensor for key, tensor in stored.items()}
        tied = {own[key].data_ptr() for key in stored.keys() & own.keys()}
        if missing := [key for key in own.keys() - stored.keys() if own[key].data_ptr() not in tied]:
            raise ValueError(f"{name} lacks {len(missing)} weights, {min(missing)} first")
        model.load_state_dict(stored, strict=False)


@contextmanager
def tensors_only() -> Iterator[None]:
    """Have `torch.load` refuse in the block, whoever calls it and how, pickles that would run code."""
    forced, opposite = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"  # torch takes one alone
    before = {name: os.environ.pop(name) for name in (forced, opposite) if name in os.environ}
    os.environ[forced] = "1"
    try:
        yield
    finally:
        del os.environ[forced]
        os.environ.update(before)


def find_checkpoint(output_dir: str, wanted: str | None) -> Path | None:
    """Return the checkpoint that `--resume_from_checkpoint` means: the latest, a name or a path; `None` to start anew.

    Raises:
        RunError: There is no such checkpoint, or it is not whole.
    """
    if wanted is None:
        return None
    if wanted == "latest":
        found = latest_run(output_dir)
        if not found:
            logger.warning(f"There is no checkpoint in {output_dir} yet: starting a new run.")
            return None
        return _whole_one(found)
    # A name in the output folder; a path elsewhere; as in the official script, the last part of a path that is gone.
    for checkpoint in (Path(output_dir, wanted), Path(wanted), Path(output_dir, Path(wanted).name)):
        if is_checkpoint(checkpoint):
            return _whole_one([checkpoint])
    names = ", ".join(path.name for path in checkpoints(output_dir)) or "none"
    raise RunError(f"--resume_from_checkpoint {wanted}: there is no such checkpoint; {output_dir} has {names}.")


def _whole_one(found: list[Path]) -> Path:
    """Return the last of the checkpoints that is whole, with a warning for those passed over."""
    *before, checkpoint = found
    fault = fault_of(checkpoint)
    if not fault:
        return checkpoint
    if not before:
        raise RunError(
            f"{checkpoint} is not whole: {fault}. Choose another one, or start anew without --resume_from_checkpoint."
        )
    logger.warning(f"{checkpoint} is not whole: {fault}. Going on from {before[-1].name} instead.")
    return _whole_one(before)


class Checkpoints:
    """Write, count, remove and load the checkpoints of one run.

    Args:
        args: Of them `checkpoints_total_limit`, `resume_from_checkpoint`, `max_train_steps` and `num_train_epochs` are
            used.
        output: The folder they are in.
        config: What `run_config.start` gave.
        loader: The prepared loader of a `ResumableDataset`.
        lr_scheduler: As it is before a checkpoint is loaded, with the rates of the command line; so is its optimizer.
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
        self.schedule = lr_scheduler.scheduler  # it is stepped once for each process
        self.base_lrs = list(self.schedule.base_lrs)
        self.hyperparameters = [
            {name: group[name] for name in HYPERPARAMETERS if name in group}
            for group in self.schedule.optimizer.param_groups
        ]
        self.resumed_from: list[Path] = []

    def of_this_run(self) -> list[Path]:
        """Return the checkpoints of this run and of those it goes on from, in the order of writing."""
        found = {path: _run(path) for path in checkpoints(self.output.path)}
        mine = [path for path, run in found.items() if run and run["id"] == self.config["run"]["id"]]
        mine.sort(key=lambda path: found[path]["time"])
        return [path for path in self.resumed_from if path not in mine and path.is_dir()] + mine

    def save(self, step: int, monitor: Stateful) -> Path:
        """Write checkpoint-`step`, hidden until it is whole, then remove the oldest of this run beyond the limit.

        Every process has to call it. Returns the checkpoint.
        """
        final = self.output.path / f"checkpoint-{step}"
        with self.disk_errors(final):
            partial = self._begin(final)
            self.accelerator.wait_for_everyone()
            self.accelerator.save_state(str(partial))
            states = accelerate.utils.gather_object([self.loader.dataset.state_dict()])
            if self.accelerator.is_main_process:
                torch.save(states, partial / SAMPLER_STATE)
                (partial / MONITOR_STATE).write_text(json.dumps(monitor.state_dict()), encoding="utf-8")
                self._finish(partial, final)
                if self.args.checkpoints_total_limit is not None:
                    owned = self.output.owned("checkpoint")
                    older = [path for path in self.of_this_run() if path.name in owned and path != final]
                    for old in older[: max(0, len(older) + 1 - max(1, self.args.checkpoints_total_limit))]:
                        self._remove(old)
        self.accelerator.wait_for_everyone()
        logger.info(f"Saved {final}.")
        return final

    def save_best(
        self, models: Mapping[str, nn.Module], save_models: Callable[[Mapping[str, nn.Module], str], None]
    ) -> None:
        """Write what `save_models(models, folder)` does to checkpoint-best, hidden until it is whole."""
        models = gather_full_models(self.accelerator, models)
        if self.accelerator.is_main_process:
            final = self.output.path / "checkpoint-best"
            with self.disk_errors(final):
                partial = self._begin(final)
                partial.mkdir()
                save_models(models, str(partial))
                self._finish(partial, final)

    def _begin(self, final: Path) -> Path:
        """Return the hidden name to write a checkpoint under. What no run of ours wrote under its own is renamed."""
        if self.accelerator.is_main_process:
            self._clear()
            if final.exists() and final.name not in self.output.owned("checkpoint"):
                kept = next(path for number in count(1) if not (path := Path(f"{final}.kept-{number}")).exists())
                final.replace(kept)
                logger.warning(f"{final} was not written by a run of ours: it is kept as {kept}.")
            self.output.add("checkpoint", [final.name])
        return _hidden(final)[0]

    def _finish(self, partial: Path, final: Path) -> None:
        """Give a checkpoint its name, when all of it is on the disk."""
        sizes = {name: (partial / name).stat().st_size for name in files(partial)}
        run_config.write(self.config, partial / CONFIG, files=sizes)
        fsync_folder(partial)
        if final.exists():
            final.replace(_hidden(final)[1])
        partial.replace(final)
        self._clear()

    def _remove(self, checkpoint: Path) -> None:
        """Remove a checkpoint, which has another name before the first of its files is gone."""
        checkpoint.replace(_hidden(checkpoint)[1])
        self._clear()
        self.output.discard("checkpoint", [checkpoint.name])

    def _clear(self) -> None:
        """Remove what is hidden of checkpoints that are half written or half removed."""
        for name in self.output.owned("checkpoint"):
            for hidden in _hidden(self.output.path / name):
                shutil.rmtree(hidden, ignore_errors=True)

    @contextmanager
    def disk_errors(self, target: str | Path) -> Iterator[None]:
        """Turn what a full or broken disk raises in the block into one line, and remove the checkpoint in the making."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            self._clear()
            saved = self.of_this_run()
            go_on = f"go on with {self._flag(saved[-1])}" if saved else "start again"
            advice = "See whether the disk is full" if isinstance(error, RuntimeError) else remedy(error)  # PyTorch's
            raise RunError(f"{target} cannot be written: {one_line(error)}. {advice}, then {go_on}.") from error

    def _flag(self, checkpoint: Path) -> str:
        name = checkpoint.name if checkpoint.parent == self.output.path else str(checkpoint)
        return f"--resume_from_checkpoint {shlex.quote(name)}"

    def check_finite(self, step: int, **quantities: Tensor) -> None:
        """Stop a run whose loss or gradient is lost, before it reaches the weights; say how to go on.

        Gradients that overflow under fp16's loss scale are not lost: the scaler leaves that update out.

        Args:
            step: Number of updates made so far.
            quantities: Scalars, by what the message calls them.
        """
        if self.accelerator.scaler is not None:
            quantities.pop("gradient", None)
        for name, value in quantities.items():
            value = value.full_tensor() if isinstance(value, DTensor) else torch.as_tensor(value)
            if not value.isfinite():
                # The weights of the checkpoint at this very step would give the same again, whatever the rate.
                earlier = [path for path in self.of_this_run() if step_of(path) < step]
                rates = ["learning_rate", *(["text_encoder_lr"] if self.config["train_text_encoder"] else [])]
                lower = [f"--{rate} {self.config[rate] / 10:g}" for rate in rates if self.config.get(rate)]
                words = [self._flag(earlier[-1])] if earlier else ["anew"]
                precision = ", or in bf16 in place of fp16" if self.accelerator.mixed_precision == "fp16" else ""
                raise RunError(
                    f"the {name} is {value.item()} in the step after update {step}, at a learning rate of "
                    f"{self.schedule.get_last_lr()[0]:g}. Start {' '.join([*words, *lower])}{precision}."
                )

    def resume(self, checkpoint: Path | None, updates_per_epoch: int, monitor: Stateful) -> tuple[int, range]:
        """Return the number of updates made and the epochs left: of a new run, or of one that is put where it was.

        Where the latest checkpoint is asked for and cannot be read, the one before it is used.
        """
        step = 0
        if checkpoint is not None:
            checkpoint = self._load_or_before(checkpoint, updates_per_epoch, monitor)
            step, self.resumed_from = step_of(checkpoint), [checkpoint]
        if self.accelerator.is_main_process:
            with self.disk_errors(self.output.path / CONFIG):
                self.output.claim()
                self.output.write_result(CONFIG, lambda path: run_config.write(self.config, path))
        mine = self.of_this_run()
        if others := [path.name for path in checkpoints(self.output.path) if path not in mine]:
            logger.warning(
                f"{self.output.path} holds {', '.join(others)} of other runs, which --checkpoints_total_limit neither counts "
                "nor removes. A checkpoint of the same number replaces one that a run of ours wrote; others are renamed."
            )
        if step >= self.args.max_train_steps:
            logger.info(f"{checkpoint} has all {self.args.max_train_steps} updates: nothing is left to train.")
            return step, range(0)
        return step, range(step // updates_per_epoch, self.args.num_train_epochs)

    def _load_or_before(self, checkpoint: Path, updates_per_epoch: int, monitor: Stateful) -> Path:
        """Load a checkpoint, or, where it is the latest and cannot be read, the one before; return which."""
        found = [checkpoint]
        # Under FSDP the other processes would still be loading the broken one.
        if self.args.resume_from_checkpoint == "latest" and self.accelerator.distributed_type != DistributedType.FSDP:
            found = latest_run(self.output.path)
            found = found[: found.index(checkpoint) + 1]
        while True:
            try:
                self.load(found[-1], updates_per_epoch, monitor)
                return found[-1]
            except RunError as error:
                found = [path for path in found[:-1] if not fault_of(path)]
                if not found:
                    raise
                logger.warning(f"{error} Going on from {found[-1].name} instead.")

    def load(self, checkpoint: Path, updates_per_epoch: int, monitor: Stateful) -> None:
        """Put the run where it was, also inside an epoch, with the hyperparameters of the command line.

        A checkpoint of the official script, or of another number of processes, has no states of the data set that fit:
        the rest of an epoch is then another shuffle.

        Raises:
            RunError: The checkpoint cannot be read, or is not of a run with these flags.
        """
        processes = self.accelerator.num_processes
        sampler_state, monitor_state = Path(checkpoint, SAMPLER_STATE), Path(checkpoint, MONITOR_STATE)
        random_state = Path(checkpoint, f"{RNG_STATE_NAME}_{self.accelerator.process_index}.pkl")
        try:
            with tensors_only():
                if random_state.exists():
                    accelerate.utils.load(random_state)  # load_state passes over one that it cannot read
                self.accelerator.load_state(str(checkpoint))
                states = torch.load(sampler_state, weights_only=True) if sampler_state.exists() else [{}] * processes
            if monitor_state.exists():
                monitor.load_state_dict(json.loads(monitor_state.read_text(encoding="utf-8")))
            elif self.args.drift_budget is not None or self.args.keep_best:
                logger.warning(f"{checkpoint} has no {MONITOR_STATE}: the budget and the best so far begin anew.")
        except UnpicklingError as error:  # whose message says how to run it
            raise RunError(f"{checkpoint} is not whole: a file in it is damaged, or would run code.") from error
        except Exception as error:  # each library has its own way to fail at a damaged file
            raise RunError(
                f"{checkpoint} is not whole, or not of a run with these flags: {one_line(error)}"
            ) from error
        exact = len(states) == processes
        if not exact:
            logger.warning(
                f"{checkpoint} is of {len(states)} processes, not {processes}: the photos are shuffled anew."
            )
        for group, hyperparameters in zip(self.schedule.optimizer.param_groups, self.hyperparameters, strict=True):
            group.update(hyperparameters)
        self.schedule.base_lrs = list(self.base_lrs)
        self.schedule.last_epoch = self.schedule.last_epoch * processes // len(states) - 1
        self.schedule.step()  # works the rates out anew
        batches = step_of(checkpoint) % updates_per_epoch * self.accelerator.gradient_accumulation_steps
        self.loader.dataset.resume(self.loader, batches, states[self.accelerator.process_index] if exact else {})


def _hidden(checkpoint: Path) -> tuple[Path, Path]:
    """Return the names that a checkpoint has while it is written and while it is removed."""
    return checkpoint.with_name(f".{checkpoint.name}.partial"), checkpoint.with_name(f".{checkpoint.name}.removed")
