"""The penalties of a script: one callback for each model that is trained."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from .callbacks import TeacherSnapshotCallback


def take_teachers(
    models: Mapping[str, nn.Module], weights: Mapping[str, float | None], reduction: str, **options: Any
) -> dict[str, TeacherSnapshotCallback]:
    """A callback for each model whose weight is above 0, with its teacher: call it before a checkpoint is loaded.

    `None` is a weight that a budget will set. All but "unet" put their name before their log keys. `options` are those
    of `TeacherSnapshotCallback`.
    """
    callbacks = {}
    for name, model in models.items():
        weight = weights[name]
        if weight is None or weight > 0:
            prefix = "" if name == "unet" else f"{name}_"
            callbacks[name] = TeacherSnapshotCallback(weight or 0.0, reduction, prefix=prefix, **options)
            callbacks[name].on_train_begin(model=model)
    return callbacks


def card_facts(callbacks: Iterable[TeacherSnapshotCallback]) -> dict[str, str]:
    """What a model card says of the penalties, under the names of flags and log keys."""
    facts = {}
    for callback in callbacks:
        relative = f"{callback.prefix}drift_relative"
        facts[f"lipreg_{callback.prefix}weight"] = f"{callback.loss.weight:g}"
        facts["lipreg_reduction"] = callback.reduction
        facts[relative] = f"{callback.logs[relative]:.3g}"
    return facts
