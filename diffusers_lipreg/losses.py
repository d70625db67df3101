"""The penalty of the paper: weight times the squared drift from the pretrained model."""

import math
from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from .drift import Drift


class Snapshot(Protocol):
    """The pretrained model, as the penalty uses it."""

    @property
    def reductions(self) -> Mapping[str, str]: ...  # the purpose of each, by name

    def drift(self, module: nn.Module, reduction: str) -> Tensor: ...

    def add_gradient_(self, module: nn.Module, reduction: str, weight: float, scale: float = 1.0) -> Drift: ...

    def relative(self, drift: Drift) -> dict[str, float]: ...  # to what is pretrained, under its log key


class LipschitzDriftLoss(nn.Module):
    """Penalize weight * drift(theta, theta_0), as a loss to differentiate or as a gradient to add after backward.

    If eps_theta is Lipschitz in theta, the KL divergence of the fine-tuned from the pretrained model is at most a
    constant times ||theta - theta_0||^2 (Theorem 2), so this term bounds what is forgotten:

        L = || eps - eps_theta(z_t, t, c) ||^2 + weight * drift(theta, theta_0)          (Algorithm 1, line 9)

    Two routes lead to the same update: `(loss + drift_loss(unet)).backward()`, or `drift_loss.add_gradient_(unet)` once per
    optimizer step, after backward and before clipping. The second builds no graph.

    Args:
        snapshot: The pretrained model: a `TeacherSnapshot`, an `AdapterSnapshot` of a model with adapters, or for either an
            `OutputSnapshot`.
        weight: The paper's lambda: a finite number, 0 or more. Its scale depends on the reduction: the published 500 is
            for `tensor_mean`; with `sum` it would be about a million times stronger on SD1.5.
        reduction: One of `snapshot.reductions`: `sum` or `tensor_mean` of a teacher, `product` or `factors` of adapters,
            `output` of recorded predictions.

    Raises:
        ValueError: A weight that is negative or not finite, or a reduction that the snapshot does not have.
    """

    def __init__(self, snapshot: Snapshot, weight: float, reduction: str) -> None:
        super().__init__()
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"weight must be a finite number, 0 or more, got {weight}.")
        if reduction not in snapshot.reductions:
            choices = ", ".join(f"{name} ({purpose})" for name, purpose in snapshot.reductions.items())
            raise ValueError(f"reduction must be one of {choices}, got {reduction!r}.")
        self.snapshot = snapshot
        self.weight = weight
        self.reduction = reduction
        self.last_drift: Drift | None = None  # at the most recent `add_gradient_` or `measure`

    @property
    def logs(self) -> dict[str, float]:
        """Return the most recent drift for a tracker; nothing before the first.

        `drift` is as the reduction defines it, and `loss_drift` is weight * drift. Where weights are held, `drift_relative`
        is the ratio of norms ||theta - theta_0|| / ||theta_0||, taken of the merged weights if there are adapters. Where
        outputs are held, `drift_percent` is `drift` in percent of the mean square of the pretrained predictions.
        """
        if self.last_drift is None:
            return {}
        value = float(self.last_drift.value)
        return {"loss_drift": self.weight * value, "drift": value, **self.snapshot.relative(self.last_drift)}

    def extra_repr(self) -> str:
        return f"weight={self.weight:g}, reduction={self.reduction!r}, snapshot={self.snapshot!r}"

    def forward(self, module: nn.Module) -> Tensor:
        """Compute the penalty of `module`: a scalar to differentiate, float32 or wider."""
        return self.weight * self.snapshot.drift(module, self.reduction)

    def add_gradient_(self, module: nn.Module, *, scale: float = 1.0) -> Drift:
        """Add the penalty's gradient to those of `module` and return the drift, not multiplied by the weight.

        Call it after the last backward of an update and before clipping. `scale` is the loss scale that the gradients
        still carry: `scaler.get_scale()` under fp16 before unscaling.
        """
        self.last_drift = self.snapshot.add_gradient_(module, self.reduction, self.weight, scale)
        return self.last_drift

    def measure(self, module: nn.Module) -> Drift:
        """Return the drift of `module`, not multiplied by the weight, and leave gradients alone."""
        self.last_drift = self.snapshot.add_gradient_(module, self.reduction, weight=0.0)
        return self.last_drift
