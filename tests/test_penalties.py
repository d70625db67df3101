"""What a script's penalties refuse, and when they act."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from diffusers_lipreg.penalties import add_gradients, check_rounding, take_teachers


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


@pytest.mark.parametrize("scale", [1.0, 64.0], ids=["", "fp16"])
def test_a_penalty_joins_the_gradients_before_an_update(scale) -> None:
    """theta is 2 above the teacher: the gradient of 10 * drift is 40, that of the loss is 5."""
    model = nn.Linear(1, 1, bias=False)
    penalties = take_teachers({"unet": model}, {"unet": None}, "sum")
    nn.init.constant_(model.weight, model.weight.item() + 2.0)

    def set_weight(loss_scale: float) -> None:
        """As a budget does, by the gradients of the loss alone."""
        assert loss_scale == scale and model.weight.grad.item() == scale * 5.0
        penalties["unet"].loss.weight = 10.0

    monitor = SimpleNamespace(on_pre_optimizer_step=set_weight)
    scaler = SimpleNamespace(get_scale=lambda: scale) if scale > 1 else None
    for _ in range(2):
        model.zero_grad()
        (5.0 * scale * model.weight.sum()).backward()
        add_gradients(SimpleNamespace(scaler=scaler), monitor, penalties, {"unet": model})
        assert model.weight.grad.item() == pytest.approx(45.0 * scale)
        assert penalties["unet"].logs["drift"] == pytest.approx(4.0)
