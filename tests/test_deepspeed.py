"""DeepSpeed updates inside backward: there the penalty is a loss, and two processes take the steps of one.

Slow, and only where DeepSpeed is installed; it compiles a part of itself the first time. `torchrun` runs this file, too.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import InitProcessGroupKwargs
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from support.runs import ROOT
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from diffusers_lipreg import LipschitzDriftLoss, TeacherSnapshot

STEPS = 5


def start() -> tuple[nn.Module, torch.optim.Optimizer, LipschitzDriftLoss]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return model, optimizer, LipschitzDriftLoss(TeacherSnapshot(model), 5.0, "tensor_mean")


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 4, generator=generator), torch.randn(8, 2, generator=generator)


def train_alone() -> list[Tensor]:
    """As the scripts do: the penalty's gradient in place, then clipping and the update."""
    model, optimizer, penalty = start()
    for step in range(STEPS):
        x, y = batch(step)
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        penalty.add_gradient_(model)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


def train_with_deepspeed(folder: Path) -> None:
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
    accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 4
    model, optimizer, penalty = start()
    engine, optimizer = accelerator.prepare(model, optimizer)
    rank, world = accelerator.process_index, accelerator.num_processes
    for step in range(STEPS):
        x, y = batch(step)
        accelerator.backward(mse_loss(engine(x[rank::world]), y[rank::world]) + penalty(model))
    parameters = [parameter.detach() for parameter in model.parameters()]
    torch.save(
        {"kind": accelerator.distributed_type.value, "world": world, "parameters": parameters}, folder / f"{rank}.pt"
    )


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_the_penalty_as_a_loss_takes_the_steps_of_one_process(tmp_path: Path) -> None:
    """But for the order of sums. With stage 2 every process has the whole parameters, so the loss is whole, too."""
    file = str(ROOT / "tests" / "accelerate" / "zero2.yaml")
    args, chosen, _ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", file, "script.py"])
    )
    args.deepspeed_fields_from_accelerate_config = ",".join(chosen.deepspeed_config)
    environment = {**os.environ, **prepare_deepspeed_cmd_env(args)[1], "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    ran = subprocess.run(
        [*command, __file__, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=900
    )
    assert ran.returncode == 0, ran.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert (first["kind"], first["world"]) == ("DEEPSPEED", 2)
    assert all(torch.equal(one, other) for one, other in zip(first["parameters"], second["parameters"], strict=True))
    torch.testing.assert_close(first["parameters"], train_alone(), rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    train_with_deepspeed(Path(sys.argv[1]))
