"""When the penalty acts in a training run: teacher before the first step, gradient before each, drift in the logs."""

# Events require their model or logs by keyword, and the Trainer passes both:
# mypy: disable-error-code="override"
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState

from .adapters import AdapterSnapshot
from .losses import LipschitzDriftLoss
from .snapshot import TeacherSnapshot


class TeacherSnapshotCallback(TrainerCallback):
    """Holds a model near its pretrained weights, in `transformers.Trainer` or in a loop that calls it by hand.

    In a loop of your own, call `on_train_begin(model=unet)` before a checkpoint is loaded;
    `on_pre_optimizer_step(model=unet)` on each step that updates, after backward and before clipping;
    `on_log(logs=logs)` on what will be logged; and `on_train_end(model=unet)` last.

    In `transformers.Trainer(callbacks=[...])` nothing else is needed; the teacher is taken when the Trainer is built,
    for it loads a checkpoint before `on_train_begin`. It clips **before** it calls `on_pre_optimizer_step`, so the
    penalty's gradient is not clipped there; the scripts of this package add first, then clip the whole. It hands the
    logs to its reporting integrations before other callbacks see them: the drift is in `state.log_history` and on the
    console, not in TensorBoard. Under fp16 give it a `max_grad_norm`: old ones unscale gradients only when they clip.

    The logs get `drift` (as the reduction defines it), `drift_relative` (||theta - theta_0|| / ||theta_0||, of adapters
    that of the merged weights) and `loss_drift` (weight * drift), all before the last update; `on_train_end` measures.

    Args:
        weight, reduction: As for `LipschitzDriftLoss`.
        names, dtype, device, stored: As for `TeacherSnapshot`; an adapter's teacher has no use for them.
        prefix: Put before each key in the logs, to tell two models apart.

    Raises ValueError as the two classes do, for a step without a teacher, and for a run that resumes without one.
    """

    def __init__(
        self,
        weight: float,
        reduction: str,
        *,
        names: Iterable[str] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        stored: Mapping[str, Tensor] | None = None,
        prefix: str = "",
    ) -> None:
        self.weight, self.reduction = weight, reduction
        self.prefix = prefix
        self._options: dict[str, Any] = {
            "names": names and list(names), "dtype": dtype, "device": device, "stored": stored
        }  # fmt: skip
        self._loss: LipschitzDriftLoss | None = None

    @property
    def loss(self) -> LipschitzDriftLoss:
        """The penalty, with its teacher."""
        if self._loss is None:
            raise ValueError("There is no teacher yet: call on_train_begin(model=...) before the first step.")
        return self._loss

    @property
    def logs(self) -> dict[str, float]:
        """`loss_drift`, `drift` and `drift_relative` as last met, under the prefix; empty before the first step."""
        if self._loss is None or self._loss.last is None:
            return {}
        value, squared_distance = (float(tensor) for tensor in self._loss.last)
        relative = (squared_distance / max(self.loss.snapshot.squared_norm, sys.float_info.min)) ** 0.5
        values = {"loss_drift": self.loss.weight * value, "drift": value, "drift_relative": relative}
        return {self.prefix + key: number for key, number in values.items()}

    def on_init_end(self, *_: Any, model: nn.Module, **__: Any) -> None:
        """The Trainer is built, its model still pretrained: take the teacher."""
        of_adapters = self.reduction in AdapterSnapshot.reductions
        snapshot = AdapterSnapshot(model) if of_adapters else TeacherSnapshot(model, **self._options)
        self._loss = LipschitzDriftLoss(snapshot, self.weight, self.reduction)

    def on_train_begin(
        self, args: Any = None, state: TrainerState | None = None, control: Any = None, *, model: nn.Module, **_: Any
    ) -> None:
        """Take the teacher, unless it was taken when the Trainer was built."""
        if self._loss is None and state is not None and state.global_step > 0:
            raise ValueError(
                f"The run resumes at step {state.global_step}, where the pretrained weights are gone: pass the callback "
                "in Trainer(callbacks=[...]), not to add_callback."
            )
        if self._loss is None:
            self.on_init_end(model=model)

    def on_pre_optimizer_step(self, *_: Any, model: nn.Module, loss_scale: float = 1.0, **__: Any) -> None:
        """Add the penalty's gradient. `loss_scale`: the factor the gradients still carry (in the Trainer, none)."""
        self.loss.add_gradient_(model, scale=loss_scale)

    def on_log(self, args: Any = None, state: TrainerState | None = None, *_: Any, logs: dict, **__: Any) -> None:
        """Add the drift to `logs`, and to the Trainer's history, which has copied them already."""
        logs.update(self.logs)
        if state is not None:
            state.log_history[-1].update(self.logs)

    def on_train_end(self, *_: Any, model: nn.Module, **__: Any) -> None:
        """Measure what the run ended with."""
        self.loss.measure(model)
