"""Fixtures: a tiny real pipeline, photos, and the script run in this process or through `accelerate launch`."""

import os
from pathlib import Path

# One thread and one instruction set, before torch is loaded: recorded results are then equal to the last bit. What is
# compiled for that set must not be met by other runs: PyTorch's cache does not tell sets apart, and they would crash.
os.environ.update(OMP_NUM_THREADS="1", ATEN_CPU_CAPABILITY="avx2", ONEDNN_MAX_CPU_ISA="AVX2")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(__file__).parents[1] / ".pytest_cache" / "compiled")

import multiprocessing
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from huggingface_hub import close_session, constants
from huggingface_hub.utils import disable_progress_bars
from loopback_hub import Account, LoopbackHub
from safetensors.torch import load_file

import train_dreambooth_lipreg
import train_dreambooth_lora_lipreg_sdxl
from diffusers_lipreg.dreambooth.data import Photo, open_image

ROOT = Path(__file__).parent.parent
PARITY = Path(__file__).parent / "parity"
HAS_FSDP2 = hasattr(torch.cpu.Stream, "record_event")  # on CPUs: torch 2.6 has it on GPUs alone
ACCOUNTS = {"hf_alice": Account("alice"), "hf_reader": Account("alice", role="read"), "hf_bob": Account("bob")}


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
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A running Hub, and a client in this process that is ready for it."""
    for name in list(os.environ):  # the caller's own settings, which subprocesses would inherit
        if name.startswith(("HF_", "HUGGING", "TRANSFORMERS_")):
            monkeypatch.delenv(name)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    close_session()  # the next one reads the proxies anew
    disable_progress_bars()
    with LoopbackHub(ACCOUNTS) as hub:
        # The client asks some things outside HfApi(endpoint=...); the two constants have to agree.
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub
    close_session()


@pytest.fixture
def logs(monkeypatch) -> list[tuple[int, dict]]:
    """Everything the runs of a test hand to the trackers, as (step, values)."""
    seen: list[tuple[int, dict]] = []
    monkeypatch.setattr(Accelerator, "log", lambda self, values, step, **_: seen.append((step, dict(values))))
    return seen


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


def draw_elsewhere(*parts: Path | str, env: dict[str, str]) -> bytes:
    """What `draw` returns in a new process, which has nothing but the environment."""
    ran = execute(str(Path(__file__).parent / "draw.py"), *map(str, parts), env=env)
    assert ran.returncode == 0, ran.stderr
    return bytes.fromhex(ran.stdout.split()[-1])
