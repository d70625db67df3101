"""The penalties of a script: one callback for each model that is trained."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from .adapters import AdapterSnapshot
from .callbacks import TeacherSnapshotCallback
from .monitor import DriftMonitor
from .snapshot import TeacherSnapshot, named_parameters, rounding_error

ROUNDING = 0.1  # of the learning rate, that rounding a teacher may be off by


def take_teachers(
    models: Mapping[str, nn.Module],
    weights: Mapping[str, float | None],
    reduction: str,
    options: Callable[[str], Mapping[str, Any]] = lambda name: {},
) -> dict[str, TeacherSnapshotCallback]:
    """A callback for each model whose weight is above 0, with its teacher: call it before a checkpoint is loaded.

    `None` is a weight that a budget will set. All but "unet" put their name before their log keys. `options`
    gives those of `TeacherSnapshot` for the model of a name.
    """
    callbacks = {}
    for name, model in models.items():
        weight = weights[name]
        if weight is None or weight > 0:
            prefix = "" if name == "unet" else f"{name}_"
            of_adapters = reduction in AdapterSnapshot.reductions
            snapshot = AdapterSnapshot(model) if of_adapters else TeacherSnapshot(model, **options(name))
            callbacks[name] = TeacherSnapshotCallback(weight or 0.0, reduction, snapshot=snapshot, prefix=prefix)
    return callbacks


def add_gradients(
    accelerator: Any, monitor: DriftMonitor, penalties: Mapping[str, TeacherSnapshotCallback], models: Mapping[str, nn.Module]
) -> None:
    """Add the gradient of weight * drift: call it after the backward that an update follows, before clipping."""
    scale = 1.0 if accelerator.scaler is None else accelerator.scaler.get_scale()  # of gradients, until they are clipped
    monitor.on_pre_optimizer_step(scale)
    for name, penalty in penalties.items():
        penalty.on_pre_optimizer_step(model=models[name], loss_scale=scale)


def check_rounding(model: nn.Module, dtype: torch.dtype, learning_rate: float) -> None:
    """Refuses a type that would round the teacher of a model more than the steps of its training can bear.

    An update of AdamW moves each parameter by about the learning rate. A teacher that is off by a tenth of that adds 1%
    to the squared drift after one update, and less later. What counts is the root mean square, for drift is a mean or
    sum of squares; that of the worst tensor, for in `tensor_mean` each tensor has a mean of its own.

    Raises:
        ValueError: The rounding error is above `ROUNDING` times the learning rate.
    """
    trained = {name: parameter for name, parameter in named_parameters(model).items() if parameter.requires_grad}
    error, name = max((rounding_error(parameter, dtype), name) for name, parameter in trained.items())
    if error > ROUNDING * learning_rate:
        raise ValueError(
            f"{name} would be rounded by {error:.1e} (root mean square), more than {ROUNDING:g} of an update's step at a "
            f"learning rate of {learning_rate:g}, and the model pulled to rounded weights: leave the type out."
        )


def card_facts(callbacks: Iterable[TeacherSnapshotCallback]) -> dict[str, str]:
    """What a model card says of the penalties, under the names of flags and log keys."""
    facts = {}
    for callback in callbacks:
        relative = f"{callback.prefix}drift_relative"
        facts[f"lipreg_{callback.prefix}weight"] = f"{callback.loss.weight:g}"
        facts["lipreg_reduction"] = callback.reduction
        facts[relative] = f"{callback.logs[relative]:.3g}"
    return facts
