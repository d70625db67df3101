"""A budget for output drift in place of a weight: the weight is found while training runs.

The weight lambda is 0 until the measured drift r comes near the budget b. It starts where the penalty's gradient is a
fixed share of the loss's, which needs no knowledge of the model, its size or the reduction. From then on, at every
update, a proportional and integral controller of its logarithm takes over: with e = log(r / b) - s, T updates in all,

    I <- I + INTEGRAL e / T        log lambda <- I + e        (e at most 1 in I, log lambda moves by at most RATE)

Between two measurements r grows as ||theta - theta_0||^2 does, which the penalty knows anyway. What is above the budget at
the end is taken off by `settle`, which scales theta - theta_0 (as WiSE-FT does, arXiv 2109.01903). What is below it would be
lost to the subject, so the aim is above the budget by s, the scatter of log r: its mean change between measurements.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from .adapters import AdapterSnapshot
from .losses import LipschitzDriftLoss
from .peft_layers import trained_adapters
from .sharding import all_reduce_sum, to_local
from .snapshot import TeacherSnapshot

# All are pure numbers: nothing here depends on the model.
NEAR = 0.25  # share of the budget at which the weight starts
SHARE = 0.3  # of the loss's gradient, that the penalty's has to start with
INTEGRAL = 40.0  # e-folds of the weight in a whole run, at one e-fold off the budget
MEMORY = 4  # measurements that the scatter remembers
RATE = 0.5  # e-folds of the weight in an update
MEASUREMENTS = 20  # in a run, evenly, beside those at its beginning
TOLERANCE = 0.02  # how far below the budget `settle` may end


def starts(snapshot: TeacherSnapshot | AdapterSnapshot, module: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Parameters of `module` with what they started from; interpolating them scales the change of the weights.

    The change that an adapter makes is a product, so where it started at zero one factor is enough, and exact for LoRA,
    LoHa and LoKr. DoRA's magnitudes, OFT and adapters that did not start at zero are interpolated by their tensors.
    """
    if isinstance(snapshot, TeacherSnapshot):
        yield from snapshot.pairs(module)
        return
    for adapter in (adapter for layer in trained_adapters(module) for adapter in layer):
        kept = snapshot._starts[adapter.layer, adapter.name]
        yield from ((adapter.tensors[name], start) for name, start in kept.tensors.items())
        if not kept.factors:
            factor = adapter.factors[-1]
            yield factor, torch.zeros_like(factor)


class ScaledChange:
    """theta_0 + alpha (theta - theta_0), put into parameters for any alpha; theta is what they hold when it is built."""

    def __init__(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        parts = ((to_local(parameter.detach()), to_local(start)) for parameter, start in pairs)
        self._parameters = [(parameter, start, parameter.clone()) for parameter, start in parts]

    @torch.no_grad()
    def apply(self, alpha: float) -> None:
        """Puts in the weights for `alpha`: theta_0 for 0, theta for 1, both exactly."""
        for parameter, start, end in self._parameters:
            wide = torch.promote_types(parameter.dtype, torch.float32)
            parameter.copy_(torch.lerp(start.to(parameter.device, wide), end.to(wide), alpha))


def find_alpha(measure: Callable[[float], float], budget: float, tolerance: float = TOLERANCE, steps: int = 30) -> float:
    """The alpha in [0, 1] at which a growing `measure(alpha)` is at the budget, or below it by `tolerance` at most.

    Bisection, begun where a quadratic through the last point has the budget. 1 if that is within the budget already;
    the largest alpha within it that was met, if `steps` are not enough.
    """
    low, high = 0.0, 1.0
    drift = measure(high)
    if drift <= budget:
        return high
    for _ in range(steps):
        guess = high * math.sqrt((1 - tolerance / 2) * budget / drift)
        alpha = guess if low < guess else (low + high) / 2
        found = measure(alpha)
        if (1 - tolerance) * budget <= found <= budget:
            return alpha
        if found > budget:
            high, drift = alpha, found
        else:
            low = alpha
    return low


class DriftBudget:
    """Adapts the weight of penalties so that a run ends at or just below a budget for its output drift.

    In a loop, after backward, by whose gradients it starts, and before the penalty adds its own, with `step` updates made:

        budget.update(probe.measure(denoiser).output_drift_relative if budget.due(step) else None)
        drift_loss.add_gradient_(unet)

    and after the last one `budget.settle(lambda: probe.measure(denoiser).output_drift_relative)`. Training that stays
    below a quarter of the budget is left alone. Keep `state_dict()` in checkpoints. On several processes every one has
    to call it, with the same measurements, which `OutputProbe` gives.

    Args:
        budget: Of relative output drift (`OutputDrift.output_drift_relative`), above 0.
        steps: Updates in the run.
        penalties: The module that each penalty holds. They all get the same weight, from 0.

    Raises:
        ValueError: A budget that is not above 0 and finite, no penalty, or one with `factors`, which is large where
            nothing has changed and so says nothing of output drift.
    """

    def __init__(self, budget: float, steps: int, penalties: Mapping[LipschitzDriftLoss, nn.Module]) -> None:
        if not (math.isfinite(budget) and budget > 0):
            raise ValueError(f"budget must be a finite number above 0, got {budget}.")
        if not penalties:
            raise ValueError("A budget needs at least one penalty whose weight it can adapt, got none.")
        if any(penalty.reduction == "factors" for penalty in penalties):
            raise ValueError("The reduction factors does not measure a change, so no budget can steer it: use product.")
        self.budget = budget
        self.steps = steps
        self.penalties = dict(penalties)
        self.alpha = 1.0
        self._due = measurement_steps(steps)
        self._integral: float | None = None
        self._per_distance = 0.0  # relative output drift over ||theta - theta_0||^2, as last measured
        self._measured = 0.0  # relative output drift, the last time
        self._scatter = 0.0  # of its logarithm
        self._distance = 0.0  # ||theta - theta_0||^2 that a checkpoint knew
        self._set_weight(0.0)

    @property
    def weight(self) -> float:
        """The weight that all penalties have now."""
        return next(iter(self.penalties)).weight

    @property
    def started(self) -> bool:
        """Whether it has a weight to adapt: from then on `update` needs no gradients, and may come before backward."""
        return self._integral is not None

    def _set_weight(self, weight: float) -> None:
        for penalty in self.penalties:
            penalty.weight = weight

    def due(self, step: int) -> bool:
        """Whether the drift has to be measured after `step` updates: often at first, then evenly."""
        return step in self._due

    def update(self, drift: float | None, *, scale: float = 1.0) -> None:
        """Adapts the weights, once for each update.

        Args:
            drift: Relative output drift as measured now, where `due` asks for it; else `None`.
            scale: The loss scale that the gradients in place carry under fp16; they are those of the loss alone.
        """
        if drift is not None:
            distance = sum(penalty.measure(module).squared_distance.item() for penalty, module in self.penalties.items())
            self._per_distance = drift / distance if distance > 0 else 0.0
            if self._integral is not None:
                self._scatter += (abs(self._excess(drift) - self._excess(self._measured)) - self._scatter) / MEMORY
            self._measured = drift
        else:
            drift = self._per_distance * self._last_distance()
        error = self._excess(drift) - self._scatter
        if self._integral is None:
            share = balance(self.penalties, scale) if drift >= NEAR * self.budget else None
            if share is not None:
                # at the budget the penalty's gradient is larger as the distance is: as the root of the drift
                self._integral = math.log(SHARE * share) + error / 2
                self._set_weight(math.exp(self._integral + min(0.0, error)))
        else:
            self._integral += INTEGRAL * max(-1.0, min(1.0, error)) / self.steps
            change = self._integral + error - math.log(self.weight)
            self._set_weight(self.weight * math.exp(max(-RATE, min(RATE, change))))

    def _excess(self, drift: float) -> float:
        """log(r / b), of a drift that may be zero."""
        return math.log(max(drift, 1e-6 * self.budget) / self.budget)

    def _last_distance(self) -> float:
        """||theta - theta_0||^2 as the penalties last met it, or the checkpoint before them."""
        met = [penalty.last.squared_distance.item() for penalty in self.penalties if penalty.last is not None]
        return sum(met) if met else self._distance

    def settle(self, measure: Callable[[], float]) -> float:
        """Ends the run within the budget: scales theta - theta_0 of all penalised modules by alpha, which it returns."""
        change = ScaledChange(pair for loss, module in self.penalties.items() for pair in starts(loss.snapshot, module))

        def drift(alpha: float) -> float:
            change.apply(alpha)
            return measure()

        self.alpha = find_alpha(drift, self.budget)
        change.apply(self.alpha)
        return self.alpha

    def state_dict(self) -> dict[str, float | None]:
        """What a resumed run needs to go on as if nothing had happened, beside the weights."""
        return {
            "integral": self._integral,
            "per_distance": self._per_distance,
            "measured": self._measured,
            "scatter": self._scatter,
            "weight": self.weight,
            "distance": self._last_distance(),
        }

    def load_state_dict(self, state: Mapping[str, float | None]) -> None:
        """Takes up what `state_dict` gave."""
        self._integral = state["integral"]
        self._per_distance = state["per_distance"] or 0.0
        self._measured = state["measured"] or 0.0
        self._scatter = state["scatter"] or 0.0
        self._distance = state["distance"] or 0.0
        self._set_weight(state["weight"] or 0.0)


def measurement_steps(steps: int) -> set[int]:
    """1, 2, 3, 4, 6, 9, ... and every twentieth of the run: a first step of Adam alone may spend a tight budget."""
    every = max(1, steps // MEASUREMENTS)
    due, step = set(range(every, steps, every)), 1
    while step < every:
        due.add(step)
        step = max(step + 1, step * 3 // 2)
    return due


def _norm(tensor: Tensor) -> Tensor:
    return all_reduce_sum(to_local(tensor).float().norm().square(), tensor).sqrt()


@torch.no_grad()
def balance(penalties: Mapping[LipschitzDriftLoss, nn.Module], scale: float = 1.0) -> float | None:
    """The weight at which the penalty's gradient is as large as the one in place: the median over parameters.

    `None` where there is nothing to compare. Gradients are left as they are; one more set of them is in memory meanwhile.
    """
    ratios, sizes = [], []
    for penalty, module in penalties.items():
        parameters = [parameter for parameter in module.parameters() if parameter.grad is not None]
        gradients = [parameter.grad for parameter in parameters]
        before, penalty.weight = penalty.weight, 1.0
        for parameter in parameters:
            parameter.grad = None
        penalty.add_gradient_(module)
        penalty.weight = before
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if parameter.grad is not None and gradient is not None:
                ratios.append(_norm(gradient) / scale / _norm(parameter.grad))
                sizes.append(parameter.numel())
            parameter.grad = gradient
    ratio, size = (torch.stack(ratios).cpu(), torch.tensor(sizes)) if ratios else (torch.empty(0), torch.empty(0))
    known = ratio.isfinite() & (ratio > 0)
    if not known.any():
        return None
    ratio, order = ratio[known].sort()
    passed = size[known][order].cumsum(0)
    return ratio[passed >= passed[-1] / 2][0].item()
