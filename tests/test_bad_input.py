"""What the user gets wrong ends in one line that says so, before any model is loaded; what can go on goes on."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from shutil import copytree, ignore_patterns
from tempfile import TemporaryDirectory

import pytest
import torch
from accelerate import Accelerator
from conftest import PARITY, command, flags, forget_accelerate
from huggingface_hub import HfApi, close_session, constants
from huggingface_hub.utils import disable_progress_bars
from loopback_hub import Account, LoopbackHub

import train_dreambooth_lipreg
from diffusers_lipreg.dreambooth import prior, runtime

SCRIPT = "train_dreambooth_lipreg.py"
CLASS_IMAGES = ["--with_prior_preservation", "--class_prompt", "a photo of dog", "--class_data_dir"]
VALIDATION = ["--validation_prompt", "a dog", "--validation_steps", "1"]
Run = Callable[..., str]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def run(fresh_accelerate, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], out: Path) -> Run:
    """Runs the script in this process to the error that has to stop it; returns the error's one line."""

    def run(*more: str) -> str:
        forget_accelerate()
        monkeypatch.setattr(sys, "argv", [f"/somewhere/{SCRIPT}"])
        with pytest.raises(SystemExit) as stopped:
            runtime.run(train_dreambooth_lipreg.main, train_dreambooth_lipreg.parse_args(flags(out, *more)))
        code = stopped.value.code
        # Python prints an exit code that is a text, and exits with 1; argparse prints by itself and exits with 2.
        lines = code if isinstance(code, str) else capsys.readouterr().err
        assert code not in (0, None)
        (line,) = lines.splitlines()
        assert line.startswith(f"{SCRIPT}: error: ")
        return line

    return run


@pytest.fixture
def refuse(run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """As `run`, and no model may be loaded before."""

    def load(*_: object) -> None:
        raise AssertionError("a model was loaded first")

    monkeypatch.setattr(train_dreambooth_lipreg, "Models", load)
    monkeypatch.setattr(prior, "sample_class_images", load)
    return run


def error_lines(done: subprocess.CompletedProcess) -> list[str]:
    assert "Traceback" not in done.stderr
    return [line for line in done.stderr.splitlines() if "error: " in line]


# Photos


def photo_folder(folder: Path, kind: str) -> Path:
    """A folder of photos with something wrong."""
    if kind != "missing":
        folder.mkdir()
    if kind == "broken":
        Path(folder, "empty.png").write_bytes(b"")
        Path(folder, "text.jpg").write_text("not a photo")
        Path(folder, "cut.png").write_bytes(Path(PARITY, "instance", "00.png").read_bytes()[:3000])
    return folder


@pytest.mark.parametrize("kind", ["missing", "empty", "broken"])
def test_no_photos(refuse: Run, tmp_path: Path, out: Path, kind: str) -> None:
    photos = photo_folder(tmp_path / "photos", kind)
    line = refuse("--instance_data_dir", str(photos))
    assert f"--instance_data_dir {photos}: there is no " in line
    assert not out.exists()


def test_a_missing_photo_folder_as_the_user_sees_it(tmp_path: Path, out: Path) -> None:
    done = command(out, "--instance_data_dir", str(tmp_path / "photos"))
    assert done.returncode == 1
    assert error_lines(done) == [
        f"{SCRIPT}: error: --instance_data_dir {tmp_path / 'photos'}: there is no such folder."
    ]
    assert not out.exists()


def test_a_broken_photo_among_good_ones_is_named_and_passed_over(tmp_path: Path, out: Path) -> None:
    photos = Path(copytree(PARITY / "instance", tmp_path / "photos"))
    Path(photos, "00-broken.png").write_bytes(b"\x89PNG and no more")
    done = command(out, "--instance_data_dir", str(photos), "--max_train_steps", "5")
    assert done.returncode == 0, done.stderr
    (warning,) = [line for line in done.stderr.splitlines() if "00-broken.png" in line]
    assert "WARNING" in warning
    assert str(photos / "00-broken.png") in warning
    assert error_lines(done) == []
    assert Path(out, "unet", "diffusion_pytorch_model.safetensors").is_file()


# Flags that do not fit: tests/dreambooth/test_arguments.py has the whole list


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ("--lipreg_weight -1", "--lipreg_weight must be a finite number, 0 or more, got -1.0"),
        ("--lipreg_weight nan", "--lipreg_weight must be a finite number, 0 or more, got nan"),
        ("--lipreg_reduction mean", "--lipreg_reduction: invalid choice: 'mean'"),
        ("--with_prior_preservation --class_prompt dog", "needs --class_data_dir"),
        ("--train_text_encoder --pre_compute_text_embeddings", "exclude each other"),
    ],
)
def test_flags_that_do_not_fit(refuse: Run, out: Path, more: str, named: str) -> None:
    assert named in refuse(*more.split())
    assert not out.exists()


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--seed", "-1"], "--seed"),
        (["--seed", "4294967296"], "--seed"),
        (["--adam_beta1", "1"], "--adam_beta1"),
        (["--dataloader_num_workers", "-1"], "--dataloader_num_workers"),
        (["--num_validation_images", "0", *VALIDATION], "--num_validation_images"),
        (["--validation_images", "/no/such.png", *VALIDATION], "--validation_images"),
        (["--logging_dir", "/dev/null"], "--logging_dir"),
        (["--lipreg_teacher_device", "attic"], "--lipreg_teacher_device"),
        pytest.param(
            ["--lipreg_teacher_device", "cuda"],
            "--lipreg_teacher_device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        pytest.param(
            ["--use_8bit_adam"],
            "bitsandbytes",
            marks=pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="it is installed"),
        ),
        pytest.param(
            ["--enable_xformers_memory_efficient_attention"],
            "xformers",
            marks=pytest.mark.skipif(find_spec("xformers") is not None, reason="it is installed"),
        ),
        ([*CLASS_IMAGES, "/dev/null"], "--class_data_dir"),
        ([*CLASS_IMAGES, "/dev/null/dogs"], "--class_data_dir"),
        ([*CLASS_IMAGES, str(PARITY / "class_images"), "--num_class_images", "-1"], "--num_class_images must be"),
        ([*CLASS_IMAGES, str(PARITY / "class_images"), "--num_class_images", "0"], "--num_class_images must be"),
    ],
)
def test_mistakes_are_found_at_the_start(refuse: Run, more: list[str], named: str) -> None:
    assert named in refuse(*more)


# The model


def test_a_model_folder_that_is_not_there(refuse: Run, tmp_path: Path, out: Path) -> None:
    model = tmp_path / "no" / "model"
    assert f"--pretrained_model_name_or_path {model}: no such folder" in refuse(
        "--pretrained_model_name_or_path", str(model)
    )
    assert not out.exists()


def test_a_folder_that_is_no_pipeline(refuse: Run, tmp_path: Path, out: Path) -> None:
    model = copytree(PARITY / "pipeline", tmp_path / "model", ignore=ignore_patterns("model_index.json"))
    line = refuse("--pretrained_model_name_or_path", str(model))
    assert f"--pretrained_model_name_or_path {model}: the folder holds no model_index.json" in line
    assert not out.exists()


def test_a_damaged_index(refuse: Run, tmp_path: Path) -> None:
    model = Path(copytree(PARITY / "pipeline", tmp_path / "model"))
    Path(model, "model_index.json").write_text('{"_class_name": "Stable')
    assert "model_index.json' is not a valid JSON file" in refuse("--pretrained_model_name_or_path", str(model))


def test_a_pipeline_for_the_other_script(refuse: Run) -> None:
    line = refuse("--pretrained_model_name_or_path", str(PARITY / "pipeline_sdxl"))
    assert "use train_dreambooth_lora_lipreg_sdxl.py" in line


@pytest.mark.parametrize("more", [("--rank", "3"), ("--train_text_encoder",)])
def test_a_checkpoint_of_other_flags(run: Run, train: Callable[..., Path], out: Path, more: tuple[str, ...]) -> None:
    train(out, "--rank", "2", "--checkpointing_steps", "2")
    line = run("--rank", "2", *more, "--max_train_steps", "4", "--resume_from_checkpoint", "latest")
    assert "checkpoint-2 is not whole, or not of a run with these flags" in line


@pytest.mark.parametrize("part", ["scheduler", "text_encoder", "tokenizer", "unet"])
def test_a_pipeline_that_lacks_a_part(run: Run, tmp_path: Path, part: str) -> None:
    model = copytree(PARITY / "pipeline", tmp_path / "model", ignore=ignore_patterns(part))
    line = run("--pretrained_model_name_or_path", str(model))
    assert str(model) in line


@pytest.mark.parametrize(
    ("flag", "value"), [("--variant", "fp16"), ("--tokenizer_name", "/no/such"), ("--tokenizer_max_length", "500")]
)
def test_what_the_pipeline_does_not_have_is_named(run: Run, flag: str, value: str) -> None:
    assert f"{flag} {value}" in run(flag, value)


# The output folder


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_an_output_folder_that_is_a_file_or_below_one(refuse: Run, tmp_path: Path, below: str) -> None:
    occupied = tmp_path / "occupied"
    occupied.write_text("precious")
    line = refuse("--output_dir", str(occupied / below))
    assert f"--output_dir {occupied / below}: cannot be written to" in line
    assert occupied.read_text() == "precious"


@contextmanager
def nobodys_rights() -> Iterator[None]:
    """For what root may do and others may not."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("folder", ["locked", "locked/new"])
def test_an_output_folder_that_may_not_be_written_to(folder: str) -> None:
    with TemporaryDirectory() as parent:  # pytest's own folders are root's alone
        os.chmod(parent, 0o755)
        Path(parent, "locked").mkdir(mode=0o555)
        with nobodys_rights(), pytest.raises(runtime.RunError) as refused:
            runtime.check_folder(str(Path(parent, folder)), "--output_dir")
    assert f"--output_dir {Path(parent, folder)}: cannot be written to (Permission denied)" in str(refused.value)


def test_a_checkpoint_that_is_not_there(refuse: Run, out: Path) -> None:
    (out / "checkpoint-4").mkdir(parents=True)
    line = refuse("--resume_from_checkpoint", "checkpoint-5")
    assert "--resume_from_checkpoint checkpoint-5: there is no such checkpoint" in line
    assert "checkpoint-4" in line


# The Hub

TOKEN, READER = "hf_alice_secret", "hf_reader_secret"
PUSH = ["--push_to_hub", "--hub_model_id", "alice/dog", "--hub_token"]


@pytest.fixture
def no_hub_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the caller's own settings out of the environment, so that subprocesses do not inherit them."""
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGING", "TRANSFORMERS_")):
            monkeypatch.delenv(name)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, no_hub_variables: None) -> Iterator[LoopbackHub]:
    """A running Hub, which the client in this process talks to."""
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    close_session()
    disable_progress_bars()
    with LoopbackHub({TOKEN: Account("alice"), READER: Account("alice", role="read")}) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub
    close_session()


@pytest.mark.parametrize("offline", [False, True])
def test_a_model_that_the_hub_does_not_have(
    refuse: Run, out: Path, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, offline: bool
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    close_session()
    line = refuse("--pretrained_model_name_or_path", "nobody/nothing")
    assert "--pretrained_model_name_or_path nobody/nothing: no such folder, and not on the Hub" in line
    assert bool(hub.requests) is not offline
    assert not out.exists()


@pytest.mark.parametrize(
    ("token", "fail", "reason"),
    [
        ("hf_unknown_secret", {}, "401"),
        (READER, {}, "403"),
        (TOKEN, {"create": 401}, "401"),
        (TOKEN, {"create": 403}, "403"),
        (TOKEN, {"create": 500}, "500"),
        (TOKEN, {"auth_check": 403}, "403"),
    ],
)
def test_a_hub_that_refuses_at_the_start(
    refuse: Run, hub: LoopbackHub, token: str, fail: dict[str, int], reason: str
) -> None:
    hub.fail = fail
    line = refuse(*PUSH, token)
    assert f"--push_to_hub: cannot write to alice/dog on {hub.url}" in line
    assert reason in line
    assert "--hub_token" in line
    assert token not in line


def test_a_reader_finds_out_at_the_start_though_the_repository_is_there(refuse: Run, hub: LoopbackHub) -> None:
    HfApi(endpoint=hub.url, token=TOKEN).create_repo("alice/dog")
    line = refuse(*PUSH, READER)
    assert "--push_to_hub: cannot write to alice/dog" in line
    assert "403" in line


def test_a_hub_that_is_not_there(refuse: Run, hub: LoopbackHub) -> None:
    hub.stop()
    line = refuse(*PUSH, TOKEN)
    assert f"--push_to_hub: cannot write to alice/dog on {hub.url}" in line
    assert "Connection refused" in line


def test_a_name_that_no_repository_can_have(refuse: Run, hub: LoopbackHub) -> None:
    line = refuse("--push_to_hub", "--hub_model_id", "alice/my dog")
    assert "--push_to_hub: cannot write to alice/my dog" in line
    assert "--hub_model_id" in line
    assert not hub.requests


def test_a_refused_commit_loses_nothing(hub: LoopbackHub, tmp_path: Path, out: Path) -> None:
    hub.fail = {"commit": 403}
    environment = hub.environment(tmp_path / "home")
    done = command(out, *PUSH, TOKEN, "--checkpointing_steps", "2", env=environment)
    assert done.returncode == 1
    (line,) = error_lines(done)
    assert line.startswith(f"{SCRIPT}: error: the upload to alice/dog failed (403 Forbidden")
    assert hub.files("alice/dog") == {}

    # Nothing else is lost, and the token is nowhere.
    plain = command(tmp_path / "plain", "--checkpointing_steps", "2")
    assert plain.returncode == 0
    kept = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert kept.keys() >= {Path("README.md"), Path("checkpoint-2", "optimizer.bin")}
    weights = Path("unet", "diffusion_pytorch_model.safetensors")
    assert kept[weights] == Path(tmp_path, "plain", weights).read_bytes()
    assert TOKEN not in done.stderr + done.stdout
    assert [path for path, content in kept.items() if TOKEN.encode() in content] == []

    # The command in the message finishes the job.
    hub.fail = {}
    push = shlex.split(line.partition(" push it with: ")[2])
    assert push[:2] == ["hf", "upload"]
    binaries = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment |= {"HF_TOKEN": TOKEN, "PATH": binaries}
    subprocess.run(push, env=environment, check=True, capture_output=True)
    expected = {
        path.as_posix(): content for path, content in kept.items() if path.parts[0] not in ("checkpoint-2", "logs")
    }
    assert hub.files("alice/dog") == expected


def test_the_command_in_the_message_is_short(run: Run, hub: LoopbackHub, out: Path) -> None:
    hub.fail = {"commit": 403}
    command = run(*PUSH, TOKEN).partition(" push it with: ")[2]
    assert shlex.split(command) == [
        *("hf", "upload", "alice/dog", str(out), "."),
        *("--exclude", "checkpoint-*", "--exclude", ".*", "--exclude", "*.tfevents.*", "--exclude", "*hparams.yml"),
        *("--exclude", "logs/*"),
    ]


def test_the_command_in_the_message_survives_any_folder_name(run: Run, hub: LoopbackHub, tmp_path: Path) -> None:
    hub.fail = {"commit": 403}
    folder = tmp_path / "alice's dog"
    command = run(*PUSH, TOKEN, "--output_dir", str(folder)).partition(" push it with: ")[2]
    assert shlex.split(command)[3] == str(folder)


def test_a_cached_model_trains_offline(hub: LoopbackHub, tmp_path: Path, out: Path) -> None:
    api = HfApi(endpoint=hub.url, token=TOKEN)
    api.create_repo("alice/model")
    api.upload_folder(repo_id="alice/model", folder_path=PARITY / "pipeline")
    for offline in ("0", "1"):  # the first run fills the cache
        environment = hub.environment(tmp_path / "home") | {"HF_HUB_OFFLINE": offline}
        done = command(out, "--pretrained_model_name_or_path", "alice/model", env=environment)
        assert done.returncode == 0, done.stderr


# In the middle of a run


def test_a_loss_that_is_not_a_number_stops_the_run(run: Run, out: Path) -> None:
    line = run("--learning_rate", "1e30", "--max_train_steps", "5")
    assert "the loss is nan in the step after update 1, at a learning rate of 1e+30" in line
    assert "Start anew, for there is no checkpoint yet, with a lower --learning_rate" in line
    assert not (out / "unet").exists()


@pytest.mark.parametrize("gradient", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_a_number_stops_the_run(
    run: Run, out: Path, monkeypatch: pytest.MonkeyPatch, gradient: float
) -> None:
    """In the second update, before the weights change: the checkpoint of the first is named."""
    backward, calls = Accelerator.backward, []

    def lost(self: Accelerator, loss: torch.Tensor) -> None:
        calls.append(loss)
        backward(self, loss * (gradient if len(calls) == 2 else 1))

    monkeypatch.setattr(Accelerator, "backward", lost)
    line = run("--max_train_steps", "5", "--checkpointing_steps", "1")
    assert re.search(r"the gradient is (nan|inf) in the step after update 1", line)
    assert "Start --resume_from_checkpoint checkpoint-1, with a lower --learning_rate" in line
    assert len(calls) == 2 and not (out / "unet").exists()
