"""DriftRegularizer: when penalties act, when output drift is measured, and what logs, card and checkpoint get."""

import json
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from support.pipelines import family
from torch import nn

from diffusers_lipreg import LipschitzDriftLoss, TeacherSnapshot
from diffusers_lipreg.errors import RunError
from diffusers_lipreg.output_drift import OutputDrift
from diffusers_lipreg.regularizer import DriftRegularizer, Penalty, Recordings, check_rounding


def test_a_type_may_round_by_a_tenth_of_the_learning_rate() -> None:
    """1 + 1/512 is 1 in bfloat16; tensors are judged one by one, and only those that are trained."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(1, 1), nn.Linear(1, 1).requires_grad_(False))
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    nn.init.constant_(model[1].bias, 1 + 1 / 512)
    nn.init.constant_(model[2].bias, 1 + 1 / 256)
    check_rounding(model, torch.bfloat16, learning_rate=1.01 * 10 / 512)
    check_rounding(model, torch.float32, learning_rate=1e-9)
    with pytest.raises(ValueError, match="1.bias would be rounded by 2.0e-03 .* at a learning rate of 0.0193"):
        check_rounding(model, torch.bfloat16, learning_rate=0.99 * 10 / 512)


@pytest.fixture
def model() -> nn.Linear:
    return nn.Linear(1, 1, bias=False)


def regularizer(model: nn.Module, scale: float = 1.0, yardstick: Any = None, **options: Any) -> DriftRegularizer:
    """One that holds `model` by 10 * drift, in `sum`."""
    scaler = None if scale == 1 else SimpleNamespace(get_scale=lambda: scale)
    penalty = Penalty("unet", model, LipschitzDriftLoss(TeacherSnapshot(model), 10.0, "sum"))
    return DriftRegularizer(SimpleNamespace(scaler=scaler), [penalty], yardstick, model, 2, **options)


class Budget:
    """As a `DriftBudget` that finds the weight 10, from gradients of 5 of the loss alone."""

    weight, limit, can_scale = 0.0, 0.5, True

    def __init__(self, model: nn.Module, scale: float) -> None:
        self.model, self.scale, self.drifts = model, scale, []

    def update(self, drift: float | None, *, scale: float) -> None:
        assert scale == self.scale and self.model.weight.grad.item() == scale * 5.0
        self.drifts.append(drift)

    def due(self, step: int) -> bool:
        return step == 1


@pytest.mark.parametrize("scale", [1.0, 64.0], ids=["", "fp16"])
def test_the_penalty_joins_the_gradients_of_an_update(model: nn.Linear, scale: float) -> None:
    """theta is 2 above the teacher: the gradient of 10 * drift is 40, that of the loss is 5."""
    held = regularizer(model, scale, budget=Budget(model, scale))
    nn.init.constant_(model.weight, model.weight.item() + 2.0)
    for _ in range(2):
        model.zero_grad()
        (5.0 * scale * model.weight.sum()).backward()
        held.add_gradient_()
        assert model.weight.grad.item() == pytest.approx(45.0 * scale)
        assert held.logs["drift"] == pytest.approx(4.0) and held.logs["loss_drift"] == pytest.approx(40.0)


def reading(drift: float) -> OutputDrift:
    """Of two chains of one call each."""
    rows = [[drift] * 2, [1.0] * 2, [0, 1], [0, 0], [7.0] * 2]
    return OutputDrift(*(torch.tensor(row) for row in rows))


@pytest.fixture
def yardstick() -> Any:
    """Measures, one after another, 10, 20 and 30 percent."""
    drifts = iter([0.1, 0.2, 0.3])
    return SimpleNamespace(measure=lambda model: reading(next(drifts)))


def test_output_drift_is_measured_when_due_and_the_last_one_stays_in_the_logs(
    model: nn.Linear, yardstick: Any
) -> None:
    """Every second update, and where the budget asks: after the first."""
    model.weight.grad = torch.full((1, 1), 5.0)
    held = regularizer(model, yardstick=yardstick, budget=Budget(model, 1.0))
    percent = []
    for step in range(1, 4):
        held.after_step(step)
        percent.append(held.logs["output_drift_percent"])
        assert ("output_drift_percent_t7" in held.logs) == (step < 3)
        model.weight.grad.fill_(5.0)
        held.add_gradient_()
    assert percent == pytest.approx([10, 20, 20])
    assert held.budget.drifts == [pytest.approx(0.1), pytest.approx(0.2), None]
    held.finish()
    assert held.card_metadata == {
        "lipreg_weight": "10", "lipreg_reduction": "sum", "drift_relative": "0", "output_drift_percent": "30",
        "drift_budget": "50 percent",
    }  # fmt: skip


def test_its_state_is_json_and_comes_back(model: nn.Linear, yardstick: Any) -> None:
    first, second = regularizer(model, yardstick=yardstick), regularizer(model)
    first.after_step(2)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.state_dict() == first.state_dict() and second.logs == first.logs


def test_a_lost_model_ends_in_one_line(model: nn.Linear) -> None:
    lost = SimpleNamespace(measure=lambda model: reading(float("nan")))
    with pytest.raises(RunError, match="output drift is nan after training, so the model is lost"):
        regularizer(model, yardstick=lost).finish()


@pytest.mark.parametrize("flag", [None, "drift_budget", "keep_best", "lipreg_reduction"])
def test_a_pipeline_that_cannot_be_recorded_is_trained_all_the_same(flag: str | None, caplog: Any) -> None:
    """Unless something else depends on its predictions: here one asks for an image besides the prompt."""
    parts = {**family("SD1.5")[0].components, "requires_safety_checker": False}
    pipeline = StableDiffusionImg2ImgPipeline(**parts)
    args = SimpleNamespace(
        resolution=64, seed=None, drift_budget=None, keep_best=False, lipreg_weight=1.0, lipreg_points=4,
        train_batch_size=1, gradient_accumulation_steps=1,
    )  # fmt: skip
    if flag in ("drift_budget", "keep_best"):
        setattr(args, flag, 0.1)
    accelerator = SimpleNamespace(device=torch.device("cpu"), autocast=nullcontext)
    training = ["a tree"] if flag == "lipreg_reduction" else []
    record = partial(
        Recordings.from_args, args, accelerator, lambda: pipeline, {"unet": pipeline.unet}, training, ["a dog"]
    )
    if flag is None:
        assert record().yardstick is None and "so no output drift is measured" in caplog.text
    else:
        with pytest.raises(RunError, match="StableDiffusionImg2ImgPipeline cannot be recorded .*: leave out"):
            record()
