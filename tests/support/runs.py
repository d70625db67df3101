"""The tiny pipelines, commands that train them, and comparisons of what comes out."""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from diffusers_lipreg.dreambooth.data import Photo, open_image

ROOT = Path(__file__).parents[2]
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
    options = {"num_inference_steps": 3, "height": 64, "width": 64, "generator": torch.Generator().manual_seed(0)}
    return pipeline("a photo of sks dog", **options).images[0].tobytes()


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
