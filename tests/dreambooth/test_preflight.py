"""Flags, environment and folders are checked before any model is loaded."""

from argparse import Namespace

import pytest
from accelerate import Accelerator

from diffusers_lipreg.dreambooth.preflight import check_accelerator, prompts_to_record
from diffusers_lipreg.errors import RunError


@pytest.mark.parametrize("script", ["train", "train_sdxl"])
@pytest.mark.parametrize(
    ("more", "name", "value", "says"),
    [
        (
            ("--mixed_precision", "fp16"),
            "MIXED_PRECISION",
            "no",
            "mixed precision fp16 is for GPUs, and this run is on",
        ),
        ((), "MIXED_PRECISION", "fp16", "mixed precision fp16 is for GPUs, and this run is on a CPU"),
        ((), "DYNAMO_BACKEND", "nonsense", "accelerate cannot start: .*NONSENSE"),
    ],
)
def test_what_accelerate_is_told_is_looked_at(script, more, name, value, says, request, tmp_path, monkeypatch) -> None:
    """Whichever way a precision is chosen, one that is not for a CPU is refused; so is nonsense."""
    monkeypatch.setenv(f"ACCELERATE_{name}", value)  # as `accelerate launch` does
    with pytest.raises(RunError, match=says):
        request.getfixturevalue(script)(tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()


def test_the_instance_prompt_is_never_held() -> None:
    args = Namespace(
        lipreg_reduction="output", lipreg_prompts=None, instance_prompt="a dog", class_prompt=None, probe_steps=0,
        drift_budget=None,
    )  # fmt: skip
    assert prompts_to_record(args, ["a dog", "a tree"], ["a bird"]) == (["a tree"], ())


def test_processes_that_know_nothing_of_each_other_are_refused(monkeypatch) -> None:
    """torchrun starts two on a machine without a GPU, and accelerate takes each for a run of one process."""
    accelerator = Accelerator(cpu=True)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="2 processes were started, .* set ACCELERATE_USE_CPU=true"):
        check_accelerator(Namespace(), accelerator)
