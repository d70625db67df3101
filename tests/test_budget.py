"""DriftBudget: it keeps to the budget whatever the scale of the problem; the pieces it is made of, by hand."""

import math

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from diffusers_lipreg import AdapterSnapshot, DriftBudget, LipschitzDriftLoss, TeacherSnapshot
from diffusers_lipreg.budget import WeightInterpolation, bisect_alpha, gradient_norm_ratio, measurement_steps

STEPS = 150


class Task:
    """A small network that learns other targets than it was made with; its output drift on fixed inputs."""

    def __init__(self, kind: str, reduction: str, scale: float = 1.0) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 8))
        if kind == "lora":
            self.model = inject_adapter_in_model(LoraConfig(r=4, target_modules=["0", "2"]), self.model)
        snapshot = AdapterSnapshot(self.model) if kind == "lora" else TeacherSnapshot(self.model)
        self.penalty = LipschitzDriftLoss(snapshot, 0.0, reduction)
        self.scale = scale
        self.probes = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
        self.base = self.model(self.probes).detach()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3, weight_decay=0.0)
        self.data = torch.Generator().manual_seed(2)

    @torch.no_grad()
    def drift(self) -> float:
        return ((self.model(self.probes) - self.base).square().mean() / self.base.square().mean()).item()

    def backward(self) -> None:
        x = torch.randn(4, 16, generator=self.data)
        (self.scale * (self.model(x) - 2 * x[:, :8].roll(1, 1)).square().mean()).backward()

    def train(self, budget: DriftBudget | None, first: int = 0, last: int = STEPS) -> None:
        for step in range(first, last):
            self.backward()
            if budget is not None:
                budget.update(self.drift() if budget.due(step) else None)
            self.penalty.add_gradient_(self.model)
            self.optimizer.step()
            self.optimizer.zero_grad()


@pytest.mark.parametrize(("kind", "reduction"), [("full", "sum"), ("full", "tensor_mean"), ("lora", "product")])
@pytest.mark.parametrize("budget", [0.003, 0.3])
def test_it_ends_at_the_budget(kind, reduction, budget):
    task = Task(kind, reduction)
    steering = DriftBudget(budget, 300, {task.penalty: task.model})
    task.train(steering, last=300)
    assert 0.5 * budget < task.drift() < 3 * budget  # the loop alone
    steering.scale_to_budget(task.drift)
    assert 0.5 * budget < task.drift() <= budget


def test_the_scale_of_the_loss_is_of_no_importance():
    """Adam does not see it, the weight has to follow it: a thousand times the loss, a thousand times the weight."""
    weights = []
    for scale in (1.0, 1000.0):
        task = Task("full", "sum", scale)
        steering = DriftBudget(0.03, STEPS, {task.penalty: task.model})
        task.train(steering)
        assert task.drift() == pytest.approx(0.03, rel=0.5)
        weights.append(steering.weight)
    assert weights[1] == pytest.approx(1000 * weights[0], rel=0.5)


def test_a_budget_that_is_never_met_changes_nothing():
    free, task = Task("full", "sum"), Task("full", "sum")
    free.train(None)
    steering = DriftBudget(1e3, STEPS, {task.penalty: task.model})
    task.train(steering)
    assert steering.weight == 0 and steering.scale_to_budget(task.drift) == 1
    assert all(torch.equal(a, b) for a, b in zip(free.model.parameters(), task.model.parameters(), strict=True))


@pytest.mark.parametrize("stop", [2, 79], ids=["before the weight", "between measurements"])
def test_a_resumed_run_is_the_same_to_the_last_bit(stop):
    whole = Task("full", "sum")
    whole.train(DriftBudget(0.1, STEPS, {whole.penalty: whole.model}))
    first, second = Task("full", "sum"), Task("full", "sum")
    steering = DriftBudget(0.1, STEPS, {first.penalty: first.model})
    first.train(steering, last=stop)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.data.set_state(first.data.get_state())
    resumed = DriftBudget(0.1, STEPS, {second.penalty: second.model})
    resumed.load_state_dict(steering.state_dict())
    second.train(resumed, first=stop)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True))


def test_where_the_weight_starts():
    """Gradients 3, of one element, and 8, of three; the penalty's are 2 and 4: the median element has 8 / 4."""
    module = nn.ParameterDict({"a": nn.Parameter(torch.zeros(1)), "b": nn.Parameter(torch.zeros(3))})
    penalty = LipschitzDriftLoss(TeacherSnapshot(module), 0.0, "sum")
    module["a"].data += 1
    module["b"].data += torch.tensor([2.0, 0.0, 0.0])
    gradients = torch.tensor([3.0]), torch.tensor([0.0, 8.0, 0.0])
    module["a"].grad, module["b"].grad = gradients
    assert gradient_norm_ratio({penalty: module}) == 2
    assert gradient_norm_ratio({penalty: module}, scale=4.0) == 0.5
    assert module["a"].grad is gradients[0] and module["b"].grad is gradients[1] and penalty.weight == 0
    module["b"].grad = torch.full((3,), math.inf)  # an overflow of fp16: that tensor does not count
    assert gradient_norm_ratio({penalty: module}) == 1.5
    module["a"].grad = module["b"].grad = None
    assert gradient_norm_ratio({penalty: module}) is None


def test_it_is_measured_often_at_first_then_evenly():
    due = measurement_steps(400)
    assert sorted(due)[:9] == [1, 2, 3, 4, 6, 9, 13, 19, 20]
    assert {*range(20, 400, 20)} <= due and len(due) == 8 + 19
    assert measurement_steps(5) == {1, 2, 3, 4}


@pytest.mark.parametrize("power", [1, 2, 3, 6])
def test_alpha_is_found(power):
    alpha = bisect_alpha(lambda alpha: alpha**power, 0.1)
    assert 0.098 <= alpha**power <= 0.1
    assert bisect_alpha(lambda alpha: alpha**power, 2.0) == 1


def test_alpha_of_a_drift_that_jumps_is_on_the_safe_side():
    assert bisect_alpha(lambda alpha: float(alpha > 0.3), 0.5) == pytest.approx(0.3, abs=1e-6)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"init_lora_weights": False}])
def test_interpolating_adapters(options):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 5))
    model = inject_adapter_in_model(LoraConfig(r=2, lora_alpha=6, target_modules=["0"], **options), module)
    snapshot = AdapterSnapshot(model)
    merged = []

    def weight() -> Tensor:
        return (model(torch.eye(6)) - model[0].base_layer.bias).detach()

    merged.append(weight())
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter) * parameter.requires_grad
    merged.append(weight())
    change = WeightInterpolation(snapshot.pairs(model))
    for alpha in (0.0, 0.5, 1.0):
        change.set_alpha(alpha)
        if alpha != 0.5 or not options:  # LoRA that starts at zero is exact everywhere
            torch.testing.assert_close(weight(), torch.lerp(merged[0], merged[1], alpha))


@pytest.mark.parametrize("budget", [0.0, -1.0, math.nan, math.inf])
def test_a_budget_has_to_be_a_number_above_zero(budget):
    task = Task("full", "sum")
    with pytest.raises(ValueError, match="limit must be"):
        DriftBudget(budget, STEPS, {task.penalty: task.model})


def test_a_budget_needs_a_penalty():
    with pytest.raises(ValueError, match="at least one penalty"):
        DriftBudget(0.1, STEPS, {})
    task = Task("lora", "factors")
    with pytest.raises(ValueError, match="use product"):
        DriftBudget(0.1, STEPS, {task.penalty: task.model})
