"""Fixtures: a tiny real pipeline, photos, and the script run in this process or through `accelerate launch`."""

import os

# One thread and one instruction set, before torch is loaded: recorded results are then equal to the last bit.
os.environ.update(OMP_NUM_THREADS="1", ATEN_CPU_CAPABILITY="avx2", ONEDNN_MAX_CPU_ISA="AVX2")

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState

import train_dreambooth_lipreg

ROOT = Path(__file__).parent.parent
PARITY = Path(__file__).parent / "parity"


def flags(output_dir: Path | str, *more: str) -> list[str]:
    """A short run on the tiny pipeline; later flags override earlier ones."""
    return [
        *("--pretrained_model_name_or_path", str(PARITY / "pipeline")),
        *("--instance_data_dir", str(PARITY / "instance")),
        *("--instance_prompt", "a photo of sks dog", "--output_dir", str(output_dir)),
        *("--resolution", "64", "--train_batch_size", "1", "--learning_rate", "5e-4", "--lr_warmup_steps", "0"),
        *("--seed", "0", "--max_train_steps", "2"),
        *more,
    ]


@pytest.fixture
def fresh_accelerate():
    """accelerate keeps its state for the life of a process; each run here is to find none."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture
def train(fresh_accelerate) -> Callable[..., Path]:
    """Runs the script in this process: `train(output_dir, *flags)` returns the output folder."""

    def run(output_dir: Path, *more: str) -> Path:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        train_dreambooth_lipreg.main(train_dreambooth_lipreg.parse_args(flags(output_dir, *more)))
        return output_dir

    return run


def command(output_dir: Path | str, *more: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """Runs the script as a user does, in a process of its own."""
    return subprocess.run(
        [sys.executable, str(ROOT / "train_dreambooth_lipreg.py"), *flags(output_dir, *more)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
        capture_output=True,
        text=True,
        timeout=300,
    )
