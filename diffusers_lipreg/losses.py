"""The penalty of the paper: weight times the squared drift of the parameters from the pretrained ones."""

import math

from torch import Tensor, nn

from .adapters import AdapterSnapshot
from .drift import Drift
from .snapshot import TeacherSnapshot


class LipschitzDriftLoss(nn.Module):
    """weight * drift(theta, theta_0), as a loss to differentiate or as a gradient to add after backward.

    If eps_theta is Lipschitz in theta, the KL divergence of the fine-tuned from the pretrained model is at most a
    constant times ||theta - theta_0||^2 (Theorem 2), so this term bounds what is forgotten:

        L = || eps - eps_theta(z_t, t, c) ||^2 + weight * drift(theta, theta_0)          (Algorithm 1, line 9)

    Two routes to the same update: as a loss, `(loss + drift_loss(unet)).backward()`; or in place, after backward and
    before clipping, once per optimizer step, `drift_loss.add_gradient_(unet)`, which builds no graph.

    Args:
        snapshot: The teacher theta_0; of a model that is trained by adapters, where they start.
        weight: The paper's lambda: a finite number, 0 or more. It means nothing without its reduction: the published
            500 is for `tensor_mean`; with `sum` it would be about a million times stronger on SD1.5.
        reduction: Of a `TeacherSnapshot`, `sum` (Algorithm 1) or `tensor_mean` (the authors' released code); of an
            `AdapterSnapshot`, `product` (`sum` of the merged weights) or `factors` (the released code).

    Raises:
        ValueError: A weight that is negative or not finite, or a reduction that the snapshot does not have.
    """

    def __init__(self, snapshot: TeacherSnapshot | AdapterSnapshot, weight: float, reduction: str) -> None:
        super().__init__()
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"weight must be a finite number, 0 or more, got {weight}.")
        if reduction not in snapshot.reductions:
            raise ValueError(f"reduction must be one of {', '.join(snapshot.reductions)}, got {reduction!r}.")
        self.snapshot = snapshot
        self.weight = weight
        self.reduction = reduction
        self.last: Drift | None = None  # as last met by a gradient or measured

    def forward(self, module: nn.Module) -> Tensor:
        """The penalty of `module` against the teacher: a scalar, float32 or wider, that carries a gradient."""
        return self.weight * self.snapshot.drift(module, self.reduction)

    def add_gradient_(self, module: nn.Module, *, scale: float = 1.0) -> Drift:
        """Adds the penalty's gradient to those of `module`, complete by now (accumulated, averaged over ranks).

        `scale`: what they still carry, `scaler.get_scale()` under fp16 before unscaling. Returns the drift it met.
        """
        self.last = self.snapshot.add_gradient_(module, self.reduction, self.weight, scale)
        return self.last

    def measure(self, module: nn.Module) -> Drift:
        """The drift of `module` from the teacher, without weight and without gradient."""
        self.last = self.snapshot.add_gradient_(module, self.reduction, weight=0.0)
        return self.last
