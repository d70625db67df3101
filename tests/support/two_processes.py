"""What test_two_processes.py has two processes do, in one launch."""

import multiprocessing
import os
import socket
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import mse_loss

import train_dreambooth_lipreg
import train_dreambooth_lora_lipreg_sdxl
from diffusers_lipreg.errors import run_cli
from support.runs import HAS_FSDP2, ROOT, few_sampling_steps, flags, forget_accelerate, write_output_to

RUNS_FSDP2 = HAS_FSDP2 and hasattr(FullyShardedDataParallelPlugin, "fsdp_version")
FULL = ("--learning_rate", "1e-3", "--lr_scheduler", "cosine", "--max_train_steps", "4", "--checkpointing_steps", "1")
# Accumulation that does not divide the epoch: five photos on two processes are three batches each, one of them twice.
MANY = (
    *FULL,
    "--max_train_steps",
    "3",
    "--gradient_accumulation_steps",
    "2",
    "--train_text_encoder",
    "--drift_budget",
    "1e-3",
    "--keep_best",
)
# Adam divides by the root of its second moment, which for gradients near zero turns a rounding error into a step of
# full size; with a large epsilon an update is as smooth as the gradient.
FIXED = (*FULL[:-1], "100", "--max_train_steps", "2", "--adam_epsilon", "1e-2")
# On shards every process has to take part in what the main process does alone elsewhere.
SHARDED = (
    *FULL,
    "--max_train_steps",
    "2",
    "--gradient_accumulation_steps",
    "2",
    "--drift_budget",
    "1e-3",
    "--keep_best",
)
SHARDED += ("--validation_prompt", "a dog", "--validation_steps", "2", "--num_validation_images", "1")
HELD = (*FIXED, "--checkpointing_steps", "1", "--lipreg_reduction", "output", "--lipreg_weight", "1000")
HELD += ("--lipreg_points", "5", "--lipreg_prompts")  # and a file
ADAPTERS = (*FULL, "--max_train_steps", "2", "--train_text_encoder", "--lipreg_weight", "1", "--probe_steps", "2")


def fixed_loss(
    args: Namespace, models: train_dreambooth_lipreg.Models, batch: dict, embed_prompts: Callable
) -> Tensor:
    """The script's loss, of noise and timesteps that belong to a photo and not to a process."""
    latents = batch["moments"].chunk(2, dim=1)[0]  # the photos are squares
    noise = latents.flip(-1)
    timesteps = torch.full((len(latents),), 500)
    noisy = models.noise_scheduler.add_noise(latents, noise, timesteps)
    return mse_loss(models.unet(noisy, timesteps, embed_prompts(batch["prompts"]), return_dict=False)[0], noise)


class Run:
    """One training in this process: the models it ended with, and its logs as (step, values)."""

    def __init__(self, output_dir: Path, *more: str, loss: Callable | None = None, sdxl: bool = False) -> None:
        script = train_dreambooth_lora_lipreg_sdxl if sdxl else train_dreambooth_lipreg
        pipeline = "pipeline_sdxl" if sdxl else "pipeline"
        self.logs: list[tuple[int, dict[str, float]]] = []
        forget_accelerate()
        models, original = script.Models, (script.Models, script.denoising_loss, Accelerator.log)

        def build(*args: object) -> object:
            built = models(*args)
            self.models = dict(built.unwrapped)  # bare, before they are wrapped
            return built

        script.Models, script.denoising_loss = build, loss or script.denoising_loss
        Accelerator.log = lambda accelerator, values, step, **_: self.logs.append((step, dict(values)))
        try:
            with few_sampling_steps():
                script.main(script.parse_args(flags(output_dir, *more, pipeline=pipeline)))
        finally:
            script.Models, script.denoising_loss, Accelerator.log = original

    def save(self, file: Path) -> None:
        weights = {name: {k: _full(v) for k, v in model.state_dict().items()} for name, model in self.models.items()}
        held = sum(_local(p).numel() for model in self.models.values() for p in model.parameters())
        torch.save({"weights": weights, "logs": self.logs, "held": held}, file)


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def configuration(name: str) -> dict[str, str]:
    """What `accelerate launch` puts into the environment for one of the configuration files."""
    file = ROOT / "tests" / "accelerate" / name
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(file), "script.py"]))
    return prepare_multi_gpu_env(args)


@contextmanager
def fsdp2() -> Iterator[None]:
    """accelerate's FSDP2, with the configuration file. It is turned on for GPUs alone: here its state is told to."""
    start = AcceleratorState.__init__

    def start_sharded(state: AcceleratorState, *args: object, fsdp_plugin: object = None, **options: object) -> None:
        start(state, *args, fsdp_plugin=fsdp_plugin, **options)
        if state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            if state.mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(state.mixed_precision)
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    with pytest.MonkeyPatch.context() as patch:
        for name, value in configuration("fsdp2.yaml").items():
            if name.startswith(("ACCELERATE_USE_FSDP", "FSDP_")):
                patch.setenv(name, value)
        patch.setattr(AcceleratorState, "__init__", start_sharded)
        yield


def lost_loss(*args: object, **named: object) -> Tensor:
    """The script's loss, and in the second process not a number."""
    return denoising_loss(*args, **named) * (float("nan") if PartialState().process_index == 1 else 1)


denoising_loss = train_dreambooth_lipreg.denoising_loss


def photos(folder: Path, name: str = "photos") -> tuple[str, ...]:
    return ("--instance_data_dir", str(folder / name), "--probe_prompts", str(folder / "probes.txt"))


def train(folder: Path, name: str, *more: str, resume: str = "", **options: Any) -> None:
    """Train in a folder of that name; a run that goes on from another's checkpoint has its own folder, too."""
    if resume:
        more += ("--resume_from_checkpoint", str(folder / resume))
    Run(folder / name, *photos(folder), *more, **options).save(folder / f"{name}-{PartialState().process_index}.pt")


def main(folder: Path, thorough: bool) -> None:
    """Train everything that test_two_processes.py looks at; `thorough` goes on from what the first launch left."""
    # accelerate ends torch's process group with a run; here there are several runs.
    PartialState.destroy_process_group = lambda self, group=None: None
    Accelerator(cpu=True)
    squares = photos(folder, "squares")
    prior = ("--with_prior_preservation", "--class_data_dir", str(folder / "class"), "--class_prompt", "a dog")
    prior += ("--num_class_images", "3", "--sample_batch_size", "1")
    push = ("--push_to_hub", "--hub_model_id", "alice/dog", "--hub_token", "hf_alice")

    if thorough:
        train(folder, "whole-from-2", *MANY, *prior, resume="whole/checkpoint-2")
        train(folder, "sdxl-from-1", *ADAPTERS, resume="sdxl/checkpoint-1", sdxl=True)
        if RUNS_FSDP2:
            with fsdp2():
                train(folder, "sharded-from-1", *SHARDED, resume="sharded/checkpoint-1")
        return

    train(folder, "whole", *MANY, *prior, *push)
    train(folder, "whole-from-1", *MANY, *prior, resume="whole/checkpoint-1")
    train(folder, "fixed", *FIXED, *squares, loss=fixed_loss)
    held = (*HELD, str(folder / "held.txt"), *squares)
    train(folder, "held", *held, loss=fixed_loss)
    train(folder, "held-from-1", *held, resume="held/checkpoint-1", loss=fixed_loss)
    train(folder, "two-after-one", *FULL, resume="one/checkpoint-2")
    train(folder, "sdxl", *ADAPTERS, sdxl=True)
    if RUNS_FSDP2:
        with fsdp2():
            train(folder, "shards", *FIXED, *squares, loss=fixed_loss)
            train(folder, "held-shards", *held, loss=fixed_loss)
            train(folder, "sharded", *SHARDED)
    sys.argv = ["train_dreambooth_lipreg.py"]
    run_cli(lambda _: Run(folder / "lost", *photos(folder), loss=lost_loss), Namespace(debug=False))


def work(rank: int, folder: Path, thorough: bool, environment: dict[str, str]) -> None:
    """Be one of two processes, as torchrun tells it by variables; what this one prints goes to a file."""
    write_output_to(folder / f"log-{rank}")
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    forget_accelerate()
    main(folder, thorough)


def launch(folder: Path, thorough: bool = False) -> list[int]:
    """Fork this process, which has imported everything, and return the exit codes of the two that train."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    environment["ACCELERATE_USE_CPU"] = "true"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(rank, folder, thorough, environment)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        process.kill()
    return [process.exitcode for process in processes]
