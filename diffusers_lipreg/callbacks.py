"""TeacherSnapshotCallback: the penalty in `transformers.Trainer`, or in a loop that calls the same events."""

# The events require their model or logs by keyword, which the Trainer passes:
# mypy: disable-error-code="override"
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerState

from .adapters import AdapterSnapshot
from .losses import LipschitzDriftLoss, Snapshot
from .snapshot import TeacherSnapshot


class TeacherSnapshotCallback(TrainerCallback):
    """Hold a model near its pretrained weights, in `transformers.Trainer` or in a loop that calls it by hand.

    In a loop of your own, call `on_train_begin(model=unet)` before a checkpoint is loaded;
    `on_pre_optimizer_step(model=unet)` on each step that updates, after backward and before clipping;
    `on_log(logs=logs)` before the logs are written; and `on_train_end(model=unet)` last.

    In `transformers.Trainer(callbacks=[...])` nothing else is needed. The snapshot is taken when the Trainer is built,
    since the Trainer loads a checkpoint before `on_train_begin`. The Trainer clips **before** it calls
    `on_pre_optimizer_step`, so the penalty's gradient is not clipped there; the scripts of this package clip the sum. Its
    reporting integrations get the logs before other callbacks do: the drift is in `state.log_history` and on the console,
    not in TensorBoard. Under fp16 set `max_grad_norm`: old versions unscale gradients only when they clip.

    The logs get the keys of `LipschitzDriftLoss.logs`, measured before the last update; `on_train_end` measures again.

    Args:
        weight, reduction: The arguments of `LipschitzDriftLoss`.
        snapshot: The pretrained model. Default: an `AdapterSnapshot` for one of its reductions, else a `TeacherSnapshot`,
            taken of the model when the run begins.
        prefix: Prefix of each key in the logs, to tell two models apart.

    Raises:
        ValueError: An argument that `LipschitzDriftLoss` or the snapshot refuses, a step without a snapshot, or a run that
            resumes before one was taken.
    """

    def __init__(self, weight: float, reduction: str, *, snapshot: Snapshot | None = None, prefix: str = "") -> None:
        self.weight, self.reduction, self.prefix = weight, reduction, prefix
        self._loss = None if snapshot is None else LipschitzDriftLoss(snapshot, weight, reduction)

    @property
    def loss(self) -> LipschitzDriftLoss:
        """Return the penalty, with its snapshot."""
        if self._loss is None:
            raise ValueError("There is no teacher yet: call on_train_begin(model=...) before the first step.")
        return self._loss

    @property
    def logs(self) -> dict[str, float]:
        """Return the penalty's logs under the prefix; nothing before the first step."""
        logs = {} if self._loss is None else self._loss.logs
        return {self.prefix + key: value for key, value in logs.items()}

    def on_init_end(self, *_: Any, model: nn.Module, **__: Any) -> None:
        """Take the snapshot when the Trainer is built, its model still pretrained."""
        if self._loss is None:
            snapshot_class = AdapterSnapshot if self.reduction in AdapterSnapshot.reductions else TeacherSnapshot
            self._loss = LipschitzDriftLoss(snapshot_class(model), self.weight, self.reduction)

    def on_train_begin(
        self, args: Any = None, state: TrainerState | None = None, control: Any = None, *, model: nn.Module, **_: Any
    ) -> None:
        """Take the snapshot, unless it was taken when the Trainer was built."""
        if self._loss is None and state is not None and state.global_step > 0:
            raise ValueError(
                f"The run resumes at step {state.global_step}, where the pretrained weights are gone: pass the callback "
                "in Trainer(callbacks=[...]), not to add_callback."
            )
        self.on_init_end(model=model)

    def on_pre_optimizer_step(self, *_: Any, model: nn.Module, loss_scale: float = 1.0, **__: Any) -> None:
        """Add the penalty's gradient. `loss_scale` is the loss scale that gradients still carry; in the Trainer it is 1."""
        self.loss.add_gradient_(model, scale=loss_scale)

    def on_log(self, args: Any = None, state: TrainerState | None = None, *_: Any, logs: dict, **__: Any) -> None:
        """Add the drift to `logs`, and to the Trainer's history, which already holds a copy of them."""
        logs.update(self.logs)
        if state is not None:
            state.log_history[-1].update(self.logs)

    def on_train_end(self, *_: Any, model: nn.Module, **__: Any) -> None:
        """Measure the drift at the end of the run."""
        self.loss.measure(model)
