"""DriftBudget: a limit for output drift, for which training finds the weight of the penalty.

The weight lambda is 0 until the measured drift r comes near the limit b. It starts where the norm of the penalty's gradient
is a fixed fraction of that of the loss. From then on a controller with a proportional and an integral part sets its
logarithm at every update. With e = log(r / b) - s and T updates in all,

    I <- I + INTEGRAL e / T        log lambda <- I + e        (e at most 1 in I, log lambda moves by at most MAX_LOG_STEP)

Between two measurements r is assumed to grow as ||theta - theta_0||^2, or where outputs are held as the drift on the points
that hold them; the penalty computes it at every update. Overshoot is removed at the end by `scale_to_budget`, which shrinks
theta - theta_0 (WiSE-FT, arXiv 2109.01903). Undershoot cannot be recovered, so the controller aims above the limit by the
noise s of log r: its mean change between measurements. Where outputs are held nothing is shrunk, and s = log(OUTPUT_AIM).
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .losses import LipschitzDriftLoss
from .sharding import all_reduce_sum, to_local

# All are pure numbers: nothing here depends on the model.
START_FRACTION = 0.25  # fraction of the limit at which the weight starts
INITIAL_GRAD_RATIO = 0.3  # norm of the penalty's gradient at the start, relative to the loss's
INTEGRAL = 40.0  # e-folds of the weight in a whole run if the drift is one e-fold off the limit
EMA_WINDOW = 4  # measurements over which the noise is averaged
MAX_LOG_STEP = 0.5  # largest change of the weight in an update, in e-folds
MEASUREMENTS = 20  # evenly spaced measurements in a run, in addition to those at its beginning
OUTPUT_AIM = 0.9  # fraction of the limit to aim at where outputs are held, as nothing corrects the end
TOLERANCE = 0.02  # fraction of the limit that `scale_to_budget` may leave unused


class WeightInterpolation:
    """Put theta_0 + alpha (theta - theta_0) into parameters; theta is copied from them when this is built.

    Args:
        pairs: Parameters with their values in theta_0.
    """

    def __init__(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        parts = ((to_local(parameter.detach()), to_local(start)) for parameter, start in pairs)
        self._parameters = [(parameter, start, parameter.clone()) for parameter, start in parts]

    @torch.no_grad()
    def set_alpha(self, alpha: float) -> None:
        """Put in the weights for `alpha`: theta_0 for 0 and theta for 1, both exactly."""
        for parameter, start, end in self._parameters:
            wide = torch.promote_types(parameter.dtype, torch.float32)
            parameter.copy_(torch.lerp(start.to(parameter.device, wide), end.to(wide), alpha))


def bisect_alpha(
    measure: Callable[[float], float], limit: float, tolerance: float = TOLERANCE, steps: int = 30
) -> float:
    """Return the alpha in [0, 1] at which a growing `measure(alpha)` is at the limit, or below by a fraction `tolerance`.

    Each guess is where a quadratic through zero and the last point above the limit meets the limit; without progress it is
    the middle. Returns 1 if `measure(1)` is within the limit, and the largest known alpha within it after `steps`.
    """
    low, high = 0.0, 1.0
    drift = measure(high)
    if drift <= limit:
        return high
    for _ in range(steps):
        guess = high * math.sqrt((1 - tolerance / 2) * limit / drift)
        alpha = guess if low < guess else (low + high) / 2
        found = measure(alpha)
        if (1 - tolerance) * limit <= found <= limit:
            return alpha
        if found > limit:
            high, drift = alpha, found
        else:
            low = alpha
    return low


class DriftBudget:
    """Adapt the weight of penalties so that a run ends at or just below a limit for its output drift.

    Call `update` between backward and the penalty's gradient, because the loss's gradients decide where the weight starts:

        budget.update(yardstick.measure(unet).output_drift_relative if budget.due(global_step) else None)
        drift_loss.add_gradient_(unet)

    After the last update call `budget.scale_to_budget(lambda: yardstick.measure(unet).output_drift_relative)` if
    `can_scale`. Training that stays below a quarter of the limit is left alone. Keep `state_dict()` in checkpoints.
    Every process makes the same calls with the same measurements, as `OutputSnapshot.measure` returns them.

    Args:
        limit: Largest relative output drift (`OutputDrift.output_drift_relative`), above 0.
        steps: Updates in the run.
        penalties: The module that each penalty holds. All penalties get the same weight, 0 at first.

    Raises:
        ValueError: A limit that is not above 0 and finite, no penalty, or one with `factors`, which is large even where
            nothing has changed.
    """

    def __init__(self, limit: float, steps: int, penalties: Mapping[LipschitzDriftLoss, nn.Module]) -> None:
        if not (math.isfinite(limit) and limit > 0):
            raise ValueError(f"limit must be a finite number above 0, got {limit}.")
        if not penalties:
            raise ValueError("A budget needs at least one penalty whose weight it can adapt, got none.")
        if any(penalty.reduction == "factors" for penalty in penalties):
            raise ValueError(
                "The reduction factors does not measure a change, so no budget can steer it: use product."
            )
        self.limit = limit
        self.steps = steps
        self.penalties = dict(penalties)
        self.alpha = 1.0
        self._due = measurement_steps(steps)
        self._integral: float | None = None  # None until the weight starts
        self._drift_per_sq_distance = 0.0  # at the last measurement
        self._measured = 0.0  # relative output drift at the last measurement
        self._noise = 0.0  # mean change of its logarithm between measurements
        self._sq_distance = 0.0  # ||theta - theta_0||^2 in the checkpoint that was loaded
        self._set_weight(0.0)

    @property
    def can_scale(self) -> bool:
        """Whether `scale_to_budget` knows pretrained weights to scale towards: not where outputs are held."""
        return all(penalty.reduction != "output" for penalty in self.penalties)

    @property
    def weight(self) -> float:
        """The weight that all penalties have now."""
        return next(iter(self.penalties)).weight

    def _set_weight(self, weight: float) -> None:
        for penalty in self.penalties:
            penalty.weight = weight

    def due(self, global_step: int) -> bool:
        """Say whether the drift has to be measured after `global_step` updates: often at first, then evenly."""
        return global_step in self._due

    def update(self, drift: float | None, *, scale: float = 1.0) -> None:
        """Adapt the weights, once for each update.

        Args:
            drift: Relative output drift of the current weights if `due` asks for it, else `None`.
            scale: Loss scale that the loss's gradients still carry (fp16).
        """
        if drift is None:
            drift = self._drift_per_sq_distance * self._last_sq_distance()
        else:
            self._measure(drift)
        error = self._log_ratio(drift) - (self._noise if self.can_scale else math.log(OUTPUT_AIM))
        if self._integral is not None:
            self._step(self._integral, error)
        elif drift >= START_FRACTION * self.limit:
            self._start(error, scale)

    def _measure(self, drift: float) -> None:
        """Learn from a measurement how drift depends on distance, and how noisy it is."""
        sq_distance = sum(
            penalty.measure(module).squared_distance.item() for penalty, module in self.penalties.items()
        )
        self._drift_per_sq_distance = drift / sq_distance if sq_distance > 0 else 0.0
        if self._integral is not None:
            change = abs(self._log_ratio(drift) - self._log_ratio(self._measured))
            self._noise += (change - self._noise) / EMA_WINDOW
        self._measured = drift

    def _start(self, error: float, scale: float) -> None:
        """Set the first weight, if there are gradients to compare."""
        ratio = gradient_norm_ratio(self.penalties, scale)
        if ratio is not None:
            # The penalty's gradient grows with the distance, and so with the root of the drift, until the limit is reached.
            self._integral = math.log(INITIAL_GRAD_RATIO * ratio) + error / 2
            self._set_weight(math.exp(self._integral + min(0.0, error)))

    def _step(self, integral: float, error: float) -> None:
        """Move the weight by the controller."""
        self._integral = integral + INTEGRAL * max(-1.0, min(1.0, error)) / self.steps
        change = self._integral + error - math.log(self.weight)
        self._set_weight(self.weight * math.exp(max(-MAX_LOG_STEP, min(MAX_LOG_STEP, change))))

    def _log_ratio(self, drift: float) -> float:
        """Compute log(r / b) of a drift that may be zero."""
        return math.log(max(drift, 1e-6 * self.limit) / self.limit)

    def _last_sq_distance(self) -> float:
        """Return ||theta - theta_0||^2 at the last gradient or measurement, or in the checkpoint before any."""
        drifts = [penalty.last_drift for penalty in self.penalties if penalty.last_drift is not None]
        return sum(drift.squared_distance.item() for drift in drifts) if drifts else self._sq_distance

    def scale_to_budget(self, measure: Callable[[], float]) -> float:
        """Scale theta - theta_0 of all modules by an alpha that brings the drift within the limit; return alpha.

        Args:
            measure: Returns the relative output drift of the current weights.
        """
        snapshots: list[tuple[Any, nn.Module]] = [(loss.snapshot, module) for loss, module in self.penalties.items()]
        interpolation = WeightInterpolation(pair for snapshot, module in snapshots for pair in snapshot.pairs(module))

        def drift(alpha: float) -> float:
            interpolation.set_alpha(alpha)
            return measure()

        self.alpha = bisect_alpha(drift, self.limit)
        interpolation.set_alpha(self.alpha)
        return self.alpha

    def state_dict(self) -> dict[str, float | None]:
        """Return the state that a resumed run needs besides the weights, as JSON can hold it."""
        return {
            "integral": self._integral,
            "drift_per_sq_distance": self._drift_per_sq_distance,
            "measured": self._measured,
            "noise": self._noise,
            "weight": self.weight,
            "sq_distance": self._last_sq_distance(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self._integral = state_dict["integral"]
        self._drift_per_sq_distance = state_dict["drift_per_sq_distance"]
        self._measured = state_dict["measured"]
        self._noise = state_dict["noise"]
        self._sq_distance = state_dict["sq_distance"]
        self._set_weight(state_dict["weight"])


def measurement_steps(steps: int) -> set[int]:
    """Return 1, 2, 3, 4, 6, 9, ... up to a twentieth of the run, and then every twentieth."""
    # The first measurements come early because the first step of Adam alone may use up a small limit.
    every = max(1, steps // MEASUREMENTS)
    due, step = set(range(every, steps, every)), 1
    while step < every:
        due.add(step)
        step = max(step + 1, step * 3 // 2)
    return due


@torch.no_grad()
def gradient_norm_ratio(penalties: Mapping[LipschitzDriftLoss, nn.Module], scale: float = 1.0) -> float | None:
    """Return the weight at which the penalty's gradient is as large as the present one: the median over parameters.

    A parameter counts by its elements. Returns `None` if there is nothing to compare. Gradients are left as they are; a
    second set of them is in memory meanwhile.
    """
    ratios, sizes = [], []
    for penalty, module in penalties.items():
        gradients = [(parameter, parameter.grad) for parameter in module.parameters() if parameter.grad is not None]
        for parameter, _ in gradients:
            parameter.grad = None
        before, penalty.weight = penalty.weight, 1.0
        penalty.add_gradient_(module)
        penalty.weight = before
        for parameter, gradient in gradients:
            if parameter.grad is not None:
                ratios.append(_norm(gradient) / scale / _norm(parameter.grad))
                sizes.append(parameter.numel())
            parameter.grad = gradient
    if not ratios:
        return None
    ratio, size = torch.stack(ratios).cpu(), torch.tensor(sizes)
    known = ratio.isfinite() & (ratio > 0)
    if not known.any():
        return None
    ratio, order = ratio[known].sort()
    elements = size[known][order].cumsum(0)
    return ratio[elements >= elements[-1] / 2][0].item()


def _norm(tensor: Tensor) -> Tensor:
    return all_reduce_sum(to_local(tensor).float().norm().square(), tensor).sqrt()
