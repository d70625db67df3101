"""Fixtures: both scripts run in this process, what they log, and a Hub on this machine."""

import os
from pathlib import Path

# One thread and one instruction set, before torch is loaded: recorded results are then equal to the last bit. What is
# compiled for that set must not be met by other runs: PyTorch's cache does not tell sets apart, and they would crash.
os.environ.update(OMP_NUM_THREADS="1", ATEN_CPU_CAPABILITY="avx2", ONEDNN_MAX_CPU_ISA="AVX2")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(__file__).parents[1] / ".pytest_cache" / "compiled")

from collections.abc import Iterator

import pytest
from accelerate import Accelerator
from support.hub_client import client_of_loopback_hub
from support.loopback_hub import LoopbackHub
from support.runs import flags, forget_accelerate

import train_dreambooth_lipreg
import train_dreambooth_lora_lipreg_sdxl


@pytest.fixture
def fresh_accelerate():
    """For tests that make accelerate's state themselves."""
    forget_accelerate()
    yield
    forget_accelerate()


@pytest.fixture
def train(fresh_accelerate):
    """Runs the SD script in this process: `train(output_dir, *flags)` returns the output folder."""

    def run(output_dir: Path, *more: str) -> Path:
        forget_accelerate()
        train_dreambooth_lipreg.main(train_dreambooth_lipreg.parse_args(flags(output_dir, *more)))
        return output_dir

    return run


@pytest.fixture
def train_sdxl(fresh_accelerate):
    """Runs the SDXL script in this process, as `train` does the other."""

    def run(output_dir: Path, *more: str) -> Path:
        forget_accelerate()
        script = train_dreambooth_lora_lipreg_sdxl
        arguments = flags(output_dir, *more, pipeline="pipeline_sdxl")
        if "--dataset_name" in more:  # in place of the folder
            at = arguments.index("--instance_data_dir")
            del arguments[at : at + 2]
        script.main(script.parse_args(arguments))
        return output_dir

    return run


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    """A running Hub, and a client in this process that is ready for it."""
    with client_of_loopback_hub() as hub:
        yield hub


@pytest.fixture
def logs(monkeypatch) -> list[tuple[int, dict]]:
    """Everything the runs of a test hand to the trackers, as (step, values)."""
    seen: list[tuple[int, dict]] = []
    monkeypatch.setattr(Accelerator, "log", lambda self, values, step, **_: seen.append((step, dict(values))))
    return seen
