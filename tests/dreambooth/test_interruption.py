"""A run that is told to stop loses nothing: it ends after the update it is in, with a checkpoint to go on from."""

import os
import signal
import subprocess
import sys
import time

import pytest
from accelerate import Accelerator
from conftest import ROOT, assert_equal_weights, flags

from diffusers_lipreg.dreambooth.checkpoints import checkpoints
from diffusers_lipreg.dreambooth.interruption import Interruption, resume_command

WEIGHTS = {"train": "unet/diffusion_pytorch_model.safetensors", "train_sdxl": "pytorch_lora_weights.safetensors"}


@pytest.mark.parametrize(("script", "number"), [("train", signal.SIGTERM), ("train_sdxl", signal.SIGINT)])
def test_interrupted_and_resumed_is_uninterrupted(request, tmp_path, monkeypatch, capsys, script, number):
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
        patch.setattr(sys, "argv", ["train.py", "--hub_token", "secret", "--seed", "0"])
        with pytest.raises(SystemExit) as end:
            train(tmp_path / "cut", *more)
    assert end.value.code == 128 + number and len(calls) == 4
    assert [path.name for path in checkpoints(tmp_path / "cut")] == ["checkpoint-2"]
    assert "accelerate launch train.py --seed 0 --resume_from_checkpoint latest" in capsys.readouterr().err
    assert signal.getsignal(number) == before
    train(tmp_path / "cut", *more, "--resume_from_checkpoint", "latest")
    assert_equal_weights(whole / WEIGHTS[script], tmp_path / "cut" / WEIGHTS[script])


def start(tmp_path):
    """A run that would take hours, once it has made an update."""
    command = [sys.executable, str(ROOT / "train_dreambooth_lipreg.py"), *flags(tmp_path / "run")]
    command += ["--max_train_steps", "1000000", "--checkpointing_steps", "1", "--checkpoints_total_limit", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    while not checkpoints(tmp_path / "run"):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    return process


def test_a_process_that_is_terminated(tmp_path):
    process = start(tmp_path)
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 143
    assert "SIGTERM: finishing this update" in error and "--resume_from_checkpoint latest" in error
    assert "Traceback" not in error


def test_the_second_signal_stops_at_once(monkeypatch, fresh_accelerate):
    """One that comes with the first, from terminal and launcher, does not count as a second."""
    killed = []
    interruption = Interruption(Accelerator(cpu=True))
    epochs = iter(interruption.during(range(1)))
    next(epochs)
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    assert interruption.agreed()
    interruption.received_at -= 2
    monkeypatch.setattr(os, "kill", lambda *what: killed.append(what))
    interruption._note(signal.SIGTERM, None)
    assert killed == [(os.getpid(), signal.SIGTERM)] and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert list(epochs) == []


@pytest.mark.parametrize("token", [["--hub_token", "secret"], ["--hub_token=secret"], ["--hub_tok", "secret"]])
def test_the_resume_command_leaves_the_token_out(token):
    command = resume_command(["train.py", "--instance_prompt", "a sks dog", *token, "--push_to_hub"])
    assert command == (
        "accelerate launch train.py --instance_prompt 'a sks dog' --push_to_hub --resume_from_checkpoint latest"
    )
