"""A run that is told to stop loses nothing, whoever is told, and when; and no launcher prints its token."""

import io
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub import HfApi
from support.runs import ROOT, assert_equal_weights, flags, forget_accelerate, write_output_to

import train_dreambooth_lipreg
from diffusers_lipreg import OutputSnapshot
from diffusers_lipreg.dreambooth import interruption
from diffusers_lipreg.dreambooth.checkpoint_files import list_checkpoints
from diffusers_lipreg.dreambooth.interruption import GracefulExit, read_flags, run_script

WEIGHTS = {"train": "unet/diffusion_pytorch_model.safetensors", "train_sdxl": "pytorch_lora_weights.safetensors"}
LONG = ("--max_train_steps", "1000000", "--checkpointing_steps", "2", "--checkpoints_total_limit", "2")
SCRIPT = str(ROOT / "train_dreambooth_lipreg.py")
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.mark.parametrize(("script", "number"), [("train", signal.SIGTERM), ("train_sdxl", signal.SIGINT)])
def test_interrupted_and_resumed_is_uninterrupted(request, tmp_path, monkeypatch, capfd, script, number):
    """The signal comes in the second of four updates, in the middle of an accumulation."""
    train, more = request.getfixturevalue(script), ("--max_train_steps", "4", "--gradient_accumulation_steps", "2")
    whole = train(tmp_path / "whole", *more)
    backward, calls = Accelerator.backward, []

    def interrupted(self, loss, **kwargs):
        calls.append(loss)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return backward(self, loss, **kwargs)

    before = signal.getsignal(number)  # a shell has a job in its background ignore Ctrl-C
    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "backward", interrupted)
        with pytest.raises(SystemExit) as end:
            train(tmp_path / "cut", *more)
    assert end.value.code == 128 + number and len(calls) == 4
    assert [path.name for path in list_checkpoints(tmp_path / "cut")] == ["checkpoint-2"]
    assert "--resume_from_checkpoint checkpoint-2" in capfd.readouterr().err
    assert signal.getsignal(number) == before
    train(tmp_path / "cut", *more, "--resume_from_checkpoint", "latest")
    assert_equal_weights(whole / WEIGHTS[script], tmp_path / "cut" / WEIGHTS[script])


# From another process, in a session of its own as a terminal, Slurm and systemd start one


def run_in_child(words: list[str], log: Path) -> None:
    os.setsid()
    write_output_to(log)
    sys.argv, sys.orig_argv = [SCRIPT, *words], [sys.executable, SCRIPT, *words]
    interruption.find_launcher.cache_clear()
    forget_accelerate()
    run_script(train_dreambooth_lipreg.main, read_flags(lambda: train_dreambooth_lipreg.parse_args(words)))


def start(words: list[str], log: Path) -> multiprocessing.Process:
    """The script in a fork of this process, which has imported everything."""
    process = multiprocessing.get_context("fork").Process(target=run_in_child, args=(words, log))
    process.start()
    return process


def wait_for_checkpoint(output_dir: Path, is_running, log: Path) -> None:
    while not list_checkpoints(output_dir):
        assert is_running(), log.read_text()
        time.sleep(0.1)


def printed_command(log: Path) -> list[str]:
    """The words of the command that a run ended with, which has a line for itself."""
    (line,) = [line for line in re.split("[\r\n]", log.read_text()) if line.startswith(sys.executable)]
    return shlex.split(line)


def test_a_signal_to_the_group_and_the_command_that_goes_on(tmp_path):
    """Workers of the loader get it, too. The folder has a later checkpoint, of another subject."""
    out, log = tmp_path / "it's a run", tmp_path / "log"
    more = ["--dataloader_num_workers", "2", "--hub_token", "a_secret", "--resume_from_checkpoint=latest"]
    process = start([*flags(out, *LONG), *more], log)
    wait_for_checkpoint(out, process.is_alive, log)
    (out / "checkpoint-999999").mkdir()
    os.killpg(process.pid, signal.SIGTERM)
    process.join(60)
    text = log.read_text()
    assert process.exitcode == 143 and "Traceback" not in text and "a_secret" not in text
    assert "SIGTERM: finishing this update" in text
    command = printed_command(log)
    step = int(command[-1].split("-")[-1])
    assert command == [
        *(sys.executable, SCRIPT, *flags(out, *LONG), "--dataloader_num_workers", "2"),
        *("--resume_from_checkpoint", f"checkpoint-{step}"),
    ]
    assert (out / f"checkpoint-{step}" / "optimizer.bin").exists()
    with pytest.raises(ProcessLookupError):  # no worker is left
        os.killpg(process.pid, 0)


def test_a_loader_that_ends_does_not_wait_for_its_workers(tmp_path):
    """They ignore others' SIGTERM, not the main process's: that they end by is multiprocessing's way at exit."""
    process = start(flags(tmp_path / "out", "--dataloader_num_workers", "2"), tmp_path / "log")
    process.join(60)
    assert process.exitcode == 0, (tmp_path / "log").read_text()


def test_a_run_that_nobody_reads_goes_on(train, tmp_path, monkeypatch):
    """`| tee` has gone by the same Ctrl-C, or the terminal: the run goes on to its checkpoint."""
    stream = io.StringIO()
    monkeypatch.setattr(stream, "write", lambda text: os.write(-1, text.encode()), raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        assert (train(tmp_path / "out") / WEIGHTS["train"]).exists()


def test_a_run_under_nohup_hears_no_closed_terminal(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with GracefulExit().guard():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with GracefulExit().guard():
            assert callable(signal.getsignal(signal.SIGHUP))
    finally:
        signal.signal(signal.SIGHUP, before)


# At every stage


def interrupted_at(owner: type, name: str, call: int, words: list[str], log: Path, monkeypatch) -> int:
    """The exit code of a run that gets SIGTERM in the given call of a function."""
    function, calls = getattr(owner, name), []

    def interrupted(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted if name != "from_pretrained" else staticmethod(interrupted))
        process = start(words, log)
        process.join(60)
    assert "Traceback" not in log.read_text()
    return process.exitcode


def test_a_signal_before_the_first_update(tmp_path, monkeypatch):
    log = tmp_path / "log"
    assert interrupted_at(UNet2DConditionModel, "from_pretrained", 1, flags(tmp_path / "out"), log, monkeypatch) == 143
    assert "Interrupted by SIGTERM. Nothing is lost: there was no update yet." in log.read_text().splitlines()
    assert not list_checkpoints(tmp_path / "out")


def test_a_signal_while_class_images_are_sampled(tmp_path, monkeypatch):
    folder = tmp_path / "class"
    prior = ["--with_prior_preservation", "--class_data_dir", str(folder), "--class_prompt", "a dog"]
    words = [*flags(tmp_path / "out", *prior), "--num_class_images", "3", "--sample_batch_size", "1"]
    assert interrupted_at(StableDiffusionPipeline, "__call__", 2, words, tmp_path / "log", monkeypatch) == 143
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (OutputSnapshot, "measure", 1),  # at the end, where a budget is settled
        (UNet2DConditionModel, "save_pretrained", 1),
        (HfApi, "upload_folder", 1),
    ],
)
def test_a_signal_after_the_last_update(tmp_path, monkeypatch, hub, owner, name, call):
    """The result is on disk, and the last line says how to push it."""
    out, log = tmp_path / "out", tmp_path / "log"
    push = ["--push_to_hub", "--hub_token", "hf_alice", "--hub_model_id", "alice/x"]
    words = [*flags(out, *push), "--probe_steps", "100", "--max_train_steps", "1"]
    assert interrupted_at(owner, name, call, words, log, monkeypatch) == 143
    assert torch.is_tensor(StableDiffusionPipeline.from_pretrained(out).unet.conv_in.weight)
    last = log.read_text().strip().splitlines()[-1]
    assert "push it with: hf upload alice/x" in last and "hf_alice" not in log.read_text()
    assert "model_index.json" not in hub.files("alice/x")


def test_the_second_signal_stops_at_once(monkeypatch, fresh_accelerate):
    """One that comes with the first, from terminal and launcher, does not count as a second."""
    codes = []
    graceful_exit = GracefulExit()
    with graceful_exit.guard():
        graceful_exit.defer("finishing")
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert graceful_exit.requested(Accelerator(cpu=True))
        monkeypatch.setattr(interruption, "ECHO_SECONDS", 0)
        monkeypatch.setattr(os, "_exit", codes.append)
        os.kill(os.getpid(), signal.SIGINT)
    assert codes == [130]


# Through launchers


def launch(launcher: list[str], words: list[str], log: Path) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    with log.open("w") as file:
        return subprocess.Popen(
            [*launcher, SCRIPT, *words], env=environment, stderr=file, stdout=file, start_new_session=True
        )


@pytest.mark.parametrize(
    ("launcher", "code"), [(ACCELERATE, -signal.SIGTERM), pytest.param(TORCHRUN, 1, marks=pytest.mark.slow)]
)
def test_a_launcher_that_is_terminated_leaves_no_orphan(tmp_path, launcher, code):
    """One that does not wait is followed by its process, which writes a checkpoint before."""
    out, log = tmp_path / "out", tmp_path / "log"
    process = launch(launcher, flags(out, *LONG, "--hub_token", "hf_SECRET"), log)
    wait_for_checkpoint(out, lambda: process.poll() is None, log)
    process.terminate()
    assert process.wait(60) == code
    for _ in range(600):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(log.read_text())
    command = printed_command(log)
    assert command[:-1] == [*launcher, SCRIPT, *flags(out, *LONG), "--resume_from_checkpoint"]
    assert (out / command[-1] / "optimizer.bin").exists()
    assert "hf_SECRET" not in log.read_text()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        pytest.param(["--hub-token", "hf_SECRET"], "unrecognized arguments: --hub-token", marks=pytest.mark.slow),
        (["--hub_token", "hf_SECRET", "--instance_data_dir", "none"], "none"),
    ],
)
def test_a_launcher_prints_no_token(tmp_path, words, line):
    """accelerate prints the command line of a process that failed, if nothing ends it before."""
    log = tmp_path / "log"
    assert launch(ACCELERATE, [*flags(tmp_path / "out"), *words], log).wait(120) != 0
    assert line in log.read_text() and "hf_SECRET" not in log.read_text()


@pytest.mark.slow
def test_ctrl_c_in_a_pipeline(tmp_path):
    """A shell's foreground group: the run and the `tee` that shows what it prints."""
    out = tmp_path / "out"
    words = shlex.join([sys.executable, SCRIPT, *flags(out, *LONG)])
    shown = tmp_path / "shown"
    line = f"trap : INT; {words} 2>&1 | tee {shown}; exit ${{PIPESTATUS[0]}}"
    process = launch(["bash", "-c", line], [], tmp_path / "log")
    wait_for_checkpoint(out, lambda: process.poll() is None, shown)
    before = list_checkpoints(out)[-1]
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130
    assert list_checkpoints(out)[-1] != before


def test_ctrl_c_ends_the_imports_without_a_traceback(tmp_path: Path) -> None:
    code = f"""
import signal, sys
from train_dreambooth_lipreg import parse_args, read_flags
read_flags(lambda: parse_args({flags(tmp_path / "out")!r}))
signal.raise_signal(signal.SIGINT)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == -signal.SIGINT and "Traceback" not in done.stderr


def test_a_thread_that_fails_is_one_line(capfd, monkeypatch) -> None:
    """tensorboard writes in a thread, which a full disk ends."""

    def fail() -> None:
        raise OSError(28, "No space left on device")

    def main(args: object) -> None:
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()

    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    before = signal.getsignal(signal.SIGINT)
    run_script(main, read_flags(lambda: Namespace(debug=False)))
    signal.signal(signal.SIGINT, before)
    assert capfd.readouterr().err.strip() == (
        "warning: a thread in the background ended ([Errno 28] No space left on device)."
    )
