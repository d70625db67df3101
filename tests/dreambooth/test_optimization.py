"""The objective by hand, and the arithmetic of steps and learning rates."""

import sys
from argparse import Namespace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from diffusers_lipreg.dreambooth.optimization import (
    create_adamw,
    create_lr_scheduler,
    diffusion_target,
    dreambooth_loss,
    min_snr_weights,
    plan_steps,
    scale_learning_rate,
)
from diffusers_lipreg.dreambooth.setup import can_fuse_adamw
from diffusers_lipreg.errors import RunError


def scheduler(prediction_type: str) -> DDPMScheduler:
    """Three timesteps, where 0.9, 0.5 and 0.2 of the variance is signal: SNR 9, 1 and 1/4."""
    return DDPMScheduler(
        num_train_timesteps=3, trained_betas=[0.1, 1 - 0.5 / 0.9, 1 - 0.2 / 0.5], prediction_type=prediction_type
    )


def samples(*values: float) -> torch.Tensor:
    """A batch of 1x2x1 images, each of one value."""
    return torch.tensor(values).reshape(-1, 1, 1, 1).expand(-1, 1, 2, 1).clone()


# What is predicted


def test_a_first_step_that_overflows_is_refused() -> None:
    args = Namespace(
        learning_rate=3e38, adam_beta1=0.9, adam_beta2=0.9, adam_weight_decay=0, adam_epsilon=1, use_8bit_adam=False
    )
    with pytest.raises(RunError, match=r"--learning_rate 3e\+38 is too large"):
        create_adamw(args, [nn.Parameter(torch.zeros(1))], fused=False)
    args.learning_rate = 3e37
    optimizer = create_adamw(args, [parameter := nn.Parameter(torch.zeros(1))], fused=False)
    parameter.grad = torch.ones(1)
    optimizer.step()


def test_an_epsilon_model_predicts_the_noise() -> None:
    noise = samples(0.5, -2.0)
    target = diffusion_target(scheduler("epsilon"), samples(1.0, 3.0), noise, torch.tensor([0, 1]))
    torch.testing.assert_close(target, noise, rtol=0, atol=0)


def test_a_v_model_predicts_the_velocity() -> None:
    latents, noise = samples(1.0, 3.0), samples(0.5, -2.0)
    target = diffusion_target(scheduler("v_prediction"), latents, noise, torch.tensor([0, 1]))
    by_hand = samples(0.9**0.5 * 0.5 - 0.1**0.5 * 1.0, 0.5**0.5 * -2.0 - 0.5**0.5 * 3.0)
    torch.testing.assert_close(target, by_hand)


# The loss


def test_loss_is_the_mean_squared_error() -> None:
    # (1 + 1 + 9 + 9) / 4
    assert dreambooth_loss(samples(1.0, 5.0), samples(2.0, 2.0)).item() == 5.0


def test_prior_loss_is_weighted_and_added() -> None:
    # Instance errors 1 and 9, class errors 4 and 16: 5 + 0.5 * 10.
    prediction, target = samples(1.0, 5.0, 0.0, 4.0), samples(2.0, 2.0, 2.0, 0.0)
    assert dreambooth_loss(prediction, target, prior_loss_weight=0.5).item() == 10.0
    assert dreambooth_loss(prediction, target, prior_loss_weight=0.0).item() == 5.0


def test_weights_are_each_samples_own() -> None:
    # (0.5 * 1 + 0.25 * 9) / 2
    assert dreambooth_loss(samples(1.0, 5.0), samples(2.0, 2.0), snr_weights=torch.tensor([0.5, 0.25])).item() == 1.375


@pytest.mark.parametrize("class_weights", [[], [0.125, 0.75]], ids=["of the instance half", "of the whole batch"])
def test_weights_do_not_touch_the_class_half(class_weights: list[float]) -> None:
    # (0.5 * 1 + 0.25 * 9) / 2 + 0.5 * (4 + 16) / 2, whatever the class images' timesteps are.
    prediction, target = samples(1.0, 5.0, 0.0, 4.0), samples(2.0, 2.0, 2.0, 0.0)
    weights = torch.tensor([0.5, 0.25, *class_weights])
    assert dreambooth_loss(prediction, target, snr_weights=weights, prior_loss_weight=0.5).item() == 6.375


@pytest.mark.parametrize("prior_weight", [None, 1.0])
def test_the_loss_is_float32_whatever_the_model_computes_in(prior_weight: float | None) -> None:
    prediction, target = samples(300.0, 300.0).half(), samples(0.0, 0.0).half()
    loss = dreambooth_loss(prediction, target, prior_loss_weight=prior_weight)
    assert loss.dtype == torch.float32
    assert loss.item() == 90000.0 * (1 if prior_weight is None else 2)  # 90000 is infinite in half precision


@pytest.mark.parametrize(
    ("prediction_type", "by_hand"),
    [("epsilon", [5 / 9, 1.0, 1.0]), ("v_prediction", [5 / 10, 1 / 2, 0.25 / 1.25])],
)
def test_min_snr_weights(prediction_type: str, by_hand: list[float]) -> None:
    weights = min_snr_weights(scheduler(prediction_type), torch.tensor([0, 1, 2]), gamma=5.0)
    torch.testing.assert_close(weights, torch.tensor(by_hand))


def test_min_snr_with_prior_preservation_end_to_end() -> None:
    # Instance timesteps 0 and 2: weights 5/9 and 1. The class half, at timesteps where they would differ, has none.
    weights = min_snr_weights(scheduler("epsilon"), torch.tensor([0, 2, 0, 0]), gamma=5.0)
    prediction, target = samples(1.0, 5.0, 0.0, 4.0), samples(2.0, 2.0, 2.0, 0.0)
    loss = dreambooth_loss(prediction, target, snr_weights=weights, prior_loss_weight=1.0)
    assert loss.item() == pytest.approx((5 / 9 * 1 + 9) / 2 + (4 + 16) / 2)


# The optimizer


def arguments(**changes: object) -> Namespace:
    defaults = {
        "learning_rate": 1e-4,
        "adam_beta1": 0.8,
        "adam_beta2": 0.95,
        "adam_weight_decay": 0.03,
        "adam_epsilon": 1e-7,
        "use_8bit_adam": False,
        "scale_lr": False,
        "train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "max_train_steps": None,
        "num_train_epochs": 1,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "lr_num_cycles": 1,
        "lr_power": 1.0,
    }
    return Namespace(**{**defaults, **changes})


GIVEN = {"lr": 1e-4, "betas": (0.8, 0.95), "weight_decay": 0.03, "eps": 1e-7}


def test_adamw_gets_what_the_flags_say() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = create_adamw(arguments(), [parameter], fused=False)
    assert type(optimizer) is torch.optim.AdamW
    (group,) = optimizer.param_groups
    assert group["params"] == [parameter]
    assert {name: group[name] for name in GIVEN} == GIVEN


def test_8bit_adam_gets_what_the_flags_say(monkeypatch: pytest.MonkeyPatch) -> None:
    bitsandbytes, optim = ModuleType("bitsandbytes"), ModuleType("bitsandbytes.optim")
    optim.AdamW8bit = lambda parameters, **options: (parameters, options)
    monkeypatch.setitem(sys.modules, "bitsandbytes", bitsandbytes)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", optim)
    assert create_adamw(arguments(use_8bit_adam=True), ["parameter"], fused=False) == (["parameter"], GIVEN)


@pytest.mark.parametrize(
    ("kind", "scaler", "fused"), [("cpu", None, False), ("cuda", None, True), ("cuda", object(), False)]
)
def test_adamw_is_fused_on_a_gpu_without_loss_scale(kind: str, scaler: object, fused: bool) -> None:
    accelerator = SimpleNamespace(device=torch.device(kind), scaler=scaler)
    optimizer = create_adamw(arguments(), [nn.Parameter(torch.zeros(2))], can_fuse_adamw(accelerator))
    assert bool(optimizer.defaults["fused"]) is fused


@pytest.mark.parametrize(("scale_lr", "factor"), [(False, 1), (True, 2 * 3 * 4)])
def test_scale_lr(scale_lr: bool, factor: int) -> None:
    args = arguments(scale_lr=scale_lr, gradient_accumulation_steps=2, train_batch_size=3)
    scale_learning_rate(args, num_processes=4)
    assert args.learning_rate == pytest.approx(1e-4 * factor)


# Steps


@pytest.mark.parametrize(
    ("batches", "accumulation", "max_steps", "epochs", "expected"),
    [
        (4, 1, None, 3, (4, 12, 3)),
        (5, 2, None, 2, (3, 6, 2)),  # the last update of an epoch has one batch
        (3, 8, None, 2, (1, 2, 2)),  # an epoch is at least one update
        (4, 1, 6, 1, (4, 6, 2)),  # max_train_steps overrides the epochs, up ...
        (4, 1, 2, 9, (4, 2, 1)),  # ... and down
        (5, 2, 7, 1, (3, 7, 3)),
    ],
)
def test_plan_steps(batches: int, accumulation: int, max_steps: int | None, epochs: int, expected: tuple) -> None:
    args = arguments(gradient_accumulation_steps=accumulation, max_train_steps=max_steps, num_train_epochs=epochs)
    assert (plan_steps(args, batches), args.max_train_steps, args.num_train_epochs) == expected


@pytest.mark.parametrize("num_processes", [1, 2])
def test_warmup_and_decay_are_counted_in_updates(num_processes: int) -> None:
    args = arguments(lr_scheduler="linear", lr_warmup_steps=2, max_train_steps=6)
    optimizer = create_adamw(args, [nn.Parameter(torch.zeros(1))], fused=False)
    schedule = create_lr_scheduler(args, optimizer, num_processes)
    rates = []
    for _ in range(args.max_train_steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        for _ in range(num_processes):  # as accelerate does at each update
            schedule.step()
    assert rates == pytest.approx([0, 0.5e-4, 1e-4, 0.75e-4, 0.5e-4, 0.25e-4])
    assert schedule.get_last_lr() == [0]


def test_power_and_cycles_reach_the_schedule() -> None:
    rates = {}
    for name, changes in {"polynomial": {"lr_power": 2.0}, "cosine_with_restarts": {"lr_num_cycles": 2}}.items():
        args = arguments(lr_scheduler=name, max_train_steps=4, **changes)
        optimizer = create_adamw(args, [nn.Parameter(torch.zeros(1))], fused=False)
        schedule = create_lr_scheduler(args, optimizer, num_processes=1)
        for _ in range(2):
            optimizer.step()
            schedule.step()
        (rates[name],) = schedule.get_last_lr()
    # Half way: a quarter of the way from 1e-7, where diffusers ends its polynomial, to 1e-4; and a fresh cycle.
    assert rates == pytest.approx({"polynomial": (1e-4 - 1e-7) / 4 + 1e-7, "cosine_with_restarts": 1e-4})
