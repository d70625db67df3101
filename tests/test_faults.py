"""Broken checkpoints, killed runs and full disks: what was whole stays whole, and the run says how to go on."""

import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import runs
from support.runs import ROOT, assert_equal_weights, flags

from diffusers_lipreg.dreambooth.checkpoint_files import list_checkpoints
from diffusers_lipreg.dreambooth.checkpoints import save_models
from diffusers_lipreg.errors import RunError

UNET = "unet/diffusion_pytorch_model.safetensors"
STEPS = ("--max_train_steps", "3", "--checkpointing_steps", "1")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run of three updates, uninterrupted."""
    return runs.train(tmp_path_factory.mktemp("faults") / "whole", *STEPS)


@pytest.fixture(scope="module")
def two_updates(tmp_path_factory) -> Path:
    return runs.train(tmp_path_factory.mktemp("faults") / "cut", *STEPS[2:], "--max_train_steps", "2")


@pytest.fixture
def cut(two_updates, tmp_path) -> Path:
    """A copy of a run that ended after two updates, to break."""
    return shutil.copytree(two_updates, tmp_path / "cut")


@pytest.mark.parametrize(
    ("file", "damage"), [(UNET, "cut off"), ("sampler_state.pt", "cut off"), ("optimizer.bin", "of the same length")]
)
def test_a_broken_latest_checkpoint_is_named_and_the_one_before_used(train, whole, cut, caplog, file, damage):
    """As by a disk that was full or is old, or a machine that was switched off."""
    broken = cut / "checkpoint-2" / file
    half = broken.read_bytes()[: broken.stat().st_size // 2]
    broken.write_bytes(half if damage == "cut off" else half.ljust(broken.stat().st_size, b"\0"))
    train(cut, *STEPS, "--resume_from_checkpoint", "latest")
    assert f"{cut / 'checkpoint-2'} is not whole" in caplog.text
    assert "Going on from checkpoint-1 instead." in caplog.text
    assert_equal_weights(whole / UNET, cut / UNET)


def test_a_broken_checkpoint_asked_for_by_name_is_an_error(train, cut):
    (cut / "checkpoint-2" / "optimizer.bin").write_bytes(b"")
    with pytest.raises(RunError, match="checkpoint-2 is not whole"):
        train(cut, *STEPS, "--resume_from_checkpoint", "checkpoint-2")


def test_a_full_disk_leaves_the_checkpoint_before(train, whole, tmp_path):
    """A limit on the size of files fails writes as a full disk does."""
    cut = train(tmp_path / "cut", *STEPS[2:], "--max_train_steps", "1")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(RunError, match="checkpoint-2 cannot be written: .*--resume_from_checkpoint checkpoint-1"):
            train(cut, *STEPS, "--resume_from_checkpoint", "latest")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in cut.glob("*checkpoint-*")] == ["checkpoint-1"]
    train(cut, *STEPS, "--resume_from_checkpoint", "latest")
    assert_equal_weights(whole / UNET, cut / UNET)


def test_a_full_disk_at_the_end(train, tmp_path):
    """The result does not fit; the last checkpoint is named, from which the same command writes it."""
    cut = train(tmp_path / "cut", *STEPS[2:], "--max_train_steps", "1")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(RunError, match="cut cannot be written: .*--resume_from_checkpoint checkpoint-1"):
            train(cut, "--max_train_steps", "1", "--resume_from_checkpoint", "latest")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_the_advice_after_a_lost_loss_works(train, cut, logs):
    """The rate of the command line takes effect: pasted with a lower one, the flags that are named train on."""
    with pytest.raises(RunError, match="the loss is (nan|inf) in the step after update 3") as lost:
        train(cut, "--max_train_steps", "5", "--resume_from_checkpoint", "latest", "--learning_rate", "1e30")
    advised = shlex.split(re.search(r"Start (--.*?)\.$", str(lost.value))[1])
    assert advised == ["--resume_from_checkpoint", "checkpoint-2", "--learning_rate", "1e+29"]
    logs.clear()
    train(cut, "--max_train_steps", "5", *advised[:-1], "1e-6")
    assert [(step, values["lr"]) for step, values in logs] == [(3, 1e-6), (4, 1e-6), (5, 1e-6)]


def test_a_drift_that_is_no_number_is_no_success(train, tmp_path):
    """The last update of all is one to weights whose predictions overflow."""
    with pytest.raises(RunError, match="the output drift is (nan|inf) after training"):
        train(tmp_path, "--drift_budget", "0.01", "--learning_rate", "1e30", "--max_train_steps", "1")


def test_a_fault_that_is_not_the_disks_is_not_hidden(train, tmp_path, monkeypatch):
    def broken(*_):
        raise KeyError("unet")

    monkeypatch.setattr(f"{save_models.__module__}.save_models", broken)
    with pytest.raises(KeyError):
        train(tmp_path / "run", *STEPS)


@pytest.mark.slow
def test_a_run_killed_while_saving_leaves_whole_checkpoints(tmp_path):
    """SIGKILL at thirty random moments of a run that does little but save; each time it goes on."""
    moments = random.Random(0)
    command = [sys.executable, str(ROOT / "train_dreambooth_lipreg.py"), *flags(tmp_path / "run")]
    command += ["--max_train_steps", "100000", "--checkpointing_steps", "1", "--checkpoints_total_limit", "3"]
    command += ["--resume_from_checkpoint", "latest"]
    log, reached = tmp_path / "log", 0
    for _ in range(30):
        with log.open("w") as file:
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            process = subprocess.Popen(command, env=environment, stderr=file, stdout=file)
        while _latest(tmp_path / "run") <= reached:
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        time.sleep(moments.random() / 2)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert "is not whole" not in log.read_text()
        reached = _latest(tmp_path / "run")
    assert reached >= 30


def _latest(output_dir: Path) -> int:
    return max((int(path.name.split("-")[1]) for path in list_checkpoints(output_dir)), default=0)
