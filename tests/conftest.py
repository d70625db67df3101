"""Fixtures: both scripts run in this process, what they log, and a Hub on this machine."""

import gc
import os
from pathlib import Path

# One thread and one instruction set, before torch is loaded: recorded results are then equal to the last bit. What is
# compiled for that set must not be met by other runs: PyTorch's cache does not tell sets apart, and they would crash.
os.environ.update(OMP_NUM_THREADS="1", ATEN_CPU_CAPABILITY="avx2", ONEDNN_MAX_CPU_ISA="AVX2")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(__file__).parents[1] / ".pytest_cache" / "compiled")

from collections.abc import Callable, Iterator

import pytest
from accelerate import Accelerator
from support import runs
from support.hub_client import client_of_loopback_hub
from support.loopback_hub import LoopbackHub
from support.runs import forget_accelerate


def pytest_collection_finish() -> None:
    """Keep the garbage collector from what is imported by now: each `gc.collect()` of a run would take half a second."""
    gc.freeze()


@pytest.fixture
def fresh_accelerate():
    """For tests that make accelerate's state themselves."""
    forget_accelerate()
    yield
    forget_accelerate()


@pytest.fixture
def train(fresh_accelerate) -> Callable[..., Path]:
    """The SD script in this process: `train(output_dir, *flags)` returns the output folder."""
    return runs.train


@pytest.fixture
def train_sdxl(fresh_accelerate) -> Callable[..., Path]:
    """The SDXL script in this process, as `train` is the other."""
    return runs.train_sdxl


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
