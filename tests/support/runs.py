"""The tiny pipelines, commands that train them, and comparisons of what comes out."""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file

import train_dreambooth_lipreg
import train_dreambooth_lora_lipreg_sdxl
from diffusers_lipreg.dreambooth.data import Photo
from diffusers_lipreg.dreambooth.images import open_image

ROOT = Path(__file__).parents[2]
SAMPLING_STEPS = 3
PARITY = ROOT / "tests" / "parity"
HAS_FSDP2 = hasattr(torch.cpu.Stream, "record_event")  # on CPUs: torch 2.6 has it on GPUs alone


def flags(output_dir: Path | str, *more: str, pipeline: str = "pipeline") -> list[str]:
    """A short run on the tiny pipeline; later flags override earlier ones."""
    return [
        *("--pretrained_model_name_or_path", str(PARITY / pipeline)),
        *("--instance_data_dir", str(PARITY / "instance")),
        *("--instance_prompt", "a photo of sks dog", "--output_dir", str(output_dir)),
        *("--resolution", "64", "--train_batch_size", "1", "--learning_rate", "5e-4", "--lr_warmup_steps", "0"),
        *("--seed", "0", "--max_train_steps", "2", "--probe_steps", "0"),
        *more,
    ]


def as_photos(paths: Iterable[Path]) -> list[Photo]:
    """Photos of files, with the file's name as the prompt."""
    return [Photo(partial(open_image, path), path.name, path) for path in paths]


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the log says, without the rank that newer versions of accelerate put before it."""
    return [message.removeprefix("[RANK 0] ") for message in caplog.messages]


def load(path: Path) -> dict[str, torch.Tensor]:
    """Weights by name. Newer transformers leave out the prefix that CLIP's text encoder has in older checkpoints."""
    return {
        name.removeprefix("text_model.").replace("text_encoder.text_model.", "text_encoder."): tensor
        for name, tensor in load_file(path).items()
    }


def assert_equal_weights(one: Path, other: Path) -> None:
    ours, theirs = load(one), load(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def forget_accelerate() -> None:
    """accelerate keeps its state for the life of a process, and loaders their workers; each run here is to find none."""
    for worker in multiprocessing.active_children():  # the garbage collector would wait five seconds for each
        worker.terminate()
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@contextmanager
def few_sampling_steps() -> Iterator[None]:
    """Draw validation and class images in at most SAMPLING_STEPS steps; the scripts ask for 25 and 50."""
    with pytest.MonkeyPatch.context() as patch:
        for kind in (StableDiffusionPipeline, StableDiffusionXLPipeline):
            patch.setattr(kind, "__call__", _in_few_steps(kind.__call__))
        yield


def _in_few_steps(call: Callable) -> Callable:
    @wraps(call)
    def draw(*args: Any, num_inference_steps: int = SAMPLING_STEPS, **options: Any) -> Any:
        if options.get("output_type") == "latent":  # a recording: others have to find the same
            return call(*args, num_inference_steps=num_inference_steps, **options)
        return call(*args, num_inference_steps=min(num_inference_steps, SAMPLING_STEPS), **options)

    return draw


def train(output_dir: Path, *more: str) -> Path:
    """Run the SD script in this process."""
    return _train(train_dreambooth_lipreg, flags(output_dir, *more), output_dir)


def train_sdxl(output_dir: Path, *more: str) -> Path:
    """Run the SDXL script in this process."""
    arguments = flags(output_dir, *more, pipeline="pipeline_sdxl")
    if "--dataset_name" in more:  # in place of the folder
        at = arguments.index("--instance_data_dir")
        del arguments[at : at + 2]
    return _train(train_dreambooth_lora_lipreg_sdxl, arguments, output_dir)


def _train(script: ModuleType, arguments: list[str], output_dir: Path) -> Path:
    forget_accelerate()
    with few_sampling_steps():
        script.main(script.parse_args(arguments))
    return output_dir


def load_pipeline(name: str = "pipeline") -> DiffusionPipeline:
    pipeline = DiffusionPipeline.from_pretrained(PARITY / name, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(base: Path | str, adapters: Path | str = "", file: str = "pytorch_lora_weights.safetensors") -> bytes:
    """The pixels of one image; `base` and `adapters` are folders or repositories."""
    pipeline = DiffusionPipeline.from_pretrained(base, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    if adapters:
        pipeline.load_lora_weights(adapters, weight_name=file)
    options = {
        "num_inference_steps": SAMPLING_STEPS,
        "height": 64,
        "width": 64,
        "generator": torch.Generator().manual_seed(0),
    }
    return pipeline("a photo of sks dog", **options).images[0].tobytes()


def write_output_to(log: Path) -> None:
    """Let a fork of this process write to a file what it prints."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    sys.stdout = sys.stderr = open(2, "w", closefd=False)


def command(output_dir: Path | str, *more: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """Runs the SD script as a user does, in a process of its own."""
    return execute(str(ROOT / "train_dreambooth_lipreg.py"), *flags(output_dir, *more), env=env)


def execute(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """Runs Python in a process of its own, which finds the package."""
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
        capture_output=True,
        text=True,
        timeout=300,
    )
