"""LipschitzDriftLoss: closed form, the same update by both routes, and what a huge weight does to a real UNet."""

from collections.abc import Iterator

import pytest
import torch
from diffusers import UNet2DConditionModel
from support.runs import PARITY
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.nn.utils import clip_grad_norm_

from diffusers_lipreg import LipschitzDriftLoss, TeacherSnapshot
from diffusers_lipreg.drift import REDUCTIONS

SCALE = 2.0**16


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@torch.no_grad()
def move_(module: nn.Module, distance: float = 0.1) -> None:
    for parameter in module.parameters():
        parameter.add_(distance * torch.randn_like(parameter))


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf"), float("-inf")])
def test_weight_must_be_finite_and_not_negative(weight):
    with pytest.raises(ValueError, match=f"got {weight}"):
        LipschitzDriftLoss(TeacherSnapshot(nn.Linear(1, 1)), weight, "sum")


def test_reduction_must_be_known():
    with pytest.raises(ValueError, match=r"one of sum \(Algorithm 1\), tensor_mean \(.*\), got 'mean'"):
        LipschitzDriftLoss(TeacherSnapshot(nn.Linear(1, 1)), 1.0, "mean")


@pytest.mark.parametrize(("reduction", "value"), [("sum", 16.0), ("tensor_mean", 6.5)])
def test_loss_by_hand(reduction, value):
    """Differences of [[1, -2], [0, 1]] and [3, -1]; see test_drift.py."""
    module = nn.Linear(2, 2)
    for parameter in module.parameters():
        nn.init.ones_(parameter)
    penalty = LipschitzDriftLoss(TeacherSnapshot(module), 10.0, reduction)
    assert penalty(module).item() == 0
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[2.0, -1.0], [1.0, 2.0]]))
        module.bias.copy_(torch.tensor([4.0, 0.0]))
    assert penalty(module).item() == 10 * value
    assert penalty.measure(module) == (value, 16.0) and module.weight.grad is None
    assert penalty.add_gradient_(module, scale=2.0) == (value, 16.0)
    count = 2 if reduction == "tensor_mean" else 1
    assert module.bias.grad.tolist() == [2.0 * 10 * 2 * 3 / count, 2.0 * 10 * 2 * -1 / count]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("in_place", [False, True])
def test_least_squares_descends_to_the_ridge_towards_the_teacher(reduction, in_place):
    """argmin ||X theta - y||^2 + k ||theta - theta_0||^2 = (X'X + k I)^-1 (X'y + k theta_0)."""
    x, y = torch.randn(20, 3, dtype=torch.float64), torch.randn(20, 1, dtype=torch.float64)
    module = nn.Linear(3, 1, bias=False, dtype=torch.float64)
    theta_0 = module.weight.detach().clone().T
    k = 7.0 / 3 if reduction == "tensor_mean" else 7.0
    gram = x.T @ x + k * torch.eye(3, dtype=torch.float64)
    minimizer = torch.linalg.solve(gram, x.T @ y + k * theta_0)

    penalty = LipschitzDriftLoss(TeacherSnapshot(module), 7.0, reduction)
    optimizer = torch.optim.SGD(module.parameters(), lr=1 / (2 * torch.linalg.eigvalsh(gram).max().item()))
    for _ in range(200):
        optimizer.zero_grad()
        loss = (module(x) - y).square().sum()
        (loss if in_place else loss + penalty(module)).backward()
        if in_place:
            penalty.add_gradient_(module)
        optimizer.step()
    torch.testing.assert_close(module.weight.T, minimizer, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("reduction", "autocast", "max_norm", "accumulation", "scaling"),
    [  # each value of one beside each of another
        ("sum", False, None, 1, None),
        ("sum", True, 0.5, 4, None),
        ("tensor_mean", False, 0.5, 4, None),
        ("sum", False, 0.5, 1, "by hand"),
        ("tensor_mean", True, None, 4, "by hand"),
        ("sum", True, None, 4, "GradScaler"),
        ("tensor_mean", True, 0.5, 1, "GradScaler"),
        ("tensor_mean", False, None, 1, "GradScaler"),
    ],
)
def test_both_routes_give_one_gradient(reduction, autocast, max_norm, accumulation, scaling):
    """In place, under loss scaling or not, equals the unscaled loss differentiated by autograd."""
    module = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    penalty = LipschitzDriftLoss(TeacherSnapshot(module), 50.0, reduction)
    move_(module)
    parameters = list(module.parameters())
    batches = [(torch.randn(4, 8), torch.randn(4, 4)) for _ in range(accumulation)]

    def denoising_losses() -> Iterator[Tensor]:
        for x, y in batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = mse_loss(module(x), y) / accumulation
            yield loss

    def take_gradient() -> Tensor:
        """Clips the whole, as a training loop does, and clears it."""
        if max_norm is not None:
            assert clip_grad_norm_(parameters, max_norm) > 2 * max_norm  # so it does clip
        gradient = torch.cat([parameter.grad.flatten() for parameter in parameters])
        module.zero_grad()
        return gradient

    for step, loss in enumerate(denoising_losses()):
        (loss if step else loss + penalty(module)).backward()
    by_autograd = take_gradient()

    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, enabled=scaling == "GradScaler")
    scale = {None: 1.0, "by hand": SCALE, "GradScaler": scaler.get_scale()}[scaling]
    for loss in denoising_losses():
        (scale * loss if scaling == "by hand" else scaler.scale(loss)).backward()
    penalty.add_gradient_(module, scale=scale)
    scaler.unscale_(torch.optim.SGD(parameters))
    for parameter in parameters if scaling == "by hand" else []:
        parameter.grad /= scale
    in_place = take_gradient()

    assert (in_place - by_autograd).norm() <= 1e-6 * by_autograd.norm()


def test_repr_says_weight_reduction_and_tensors():
    penalty = LipschitzDriftLoss(TeacherSnapshot(nn.Linear(1, 1)), 500, "tensor_mean")
    assert (
        repr(penalty) == "LipschitzDriftLoss(weight=500, reduction='tensor_mean', snapshot=TeacherSnapshot(2 tensors))"
    )


def test_the_loss_draws_no_random_numbers():
    """One draw, and weight 0 would not be the official script's run any more."""
    module = nn.Linear(4, 4)
    state = torch.get_rng_state()
    penalty = LipschitzDriftLoss(TeacherSnapshot(module), 1.0, "sum")
    penalty(module).backward()
    penalty.add_gradient_(module)
    assert torch.equal(torch.get_rng_state(), state)


# 1e6 for each element: `tensor_mean` divides by at most the 18432 elements of this UNet's largest tensor
@pytest.mark.parametrize(("reduction", "weight"), [("sum", 1e6), ("tensor_mean", 1e6 * 18432)])
def test_a_huge_weight_holds_a_unet_at_its_start(reduction, weight):
    """The test that would have found a penalty that is computed, logged and never added."""
    learning_rate, steps = 5e-4, 20
    latents, targets = torch.randn(2, 2, 4, 8, 8)
    timesteps, text = torch.tensor([10, 500]), torch.randn(2, 4, 32)

    def train(weight: float) -> tuple[float, float]:
        """The largest change of a weight, and the distance of all of them together."""
        unet = UNet2DConditionModel.from_pretrained(PARITY / "pipeline" / "unet")
        start = torch.cat([parameter.detach().flatten() for parameter in unet.parameters()])
        penalty = LipschitzDriftLoss(TeacherSnapshot(unet), weight, reduction)
        optimizer = torch.optim.AdamW(unet.parameters(), lr=learning_rate, weight_decay=0.0)
        for _ in range(steps):
            optimizer.zero_grad()
            mse_loss(unet(latents, timesteps, text).sample, targets).backward()
            penalty.add_gradient_(unet)
            optimizer.step()
        change = torch.cat([parameter.detach().flatten() for parameter in unet.parameters()]) - start
        return change.abs().max().item(), change.norm().item()

    _, free = train(0.0)
    largest, held = train(weight)
    assert largest < learning_rate
    assert held < 0.05 * free
