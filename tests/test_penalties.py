"""What a script's penalties refuse."""

import pytest
import torch
from torch import nn

from diffusers_lipreg.penalties import check_rounding


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
