"""The output folder is the run's for what it wrote: nothing else is uploaded, deleted or overwritten, and results are whole."""

import errno
import os
import random
import resource
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from safetensors.torch import load_file
from support.loopback_hub import LoopbackHub
from support.runs import PARITY, ROOT, assert_equal_weights, flags

import train_dreambooth_lipreg
import train_dreambooth_lora_lipreg_sdxl
from diffusers_lipreg.dreambooth.output import CONFIG, INDEX, MANIFEST, OutputFolder, remedy
from diffusers_lipreg.errors import RunError
from diffusers_lipreg.loading import find_adapters

UNET = "unet/diffusion_pytorch_model.safetensors"
ADAPTERS = "pytorch_lora_weights.safetensors"
ADAPTER_RUN = ("--rank", "1")
PUSH = ("--push_to_hub", "--hub_token", "hf_alice", "--hub_model_id", "alice/x")
STRANGERS = {
    "id_rsa": b"secret",
    "private/.env": b"secret",
    "old/checkpoint-5/optimizer.bin": b"state",
    "wandb/run-1/files/config.yaml": b"key",
    "pytorch_lora_weights_dog_keep.safetensors": b"of the user",
    "image_2024_family.png": b"of the user",
    "[*].png": b"of the user",
}


def write(folder: Path, contents: dict[str, bytes]) -> None:
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def contents(folder: Path) -> dict[str, bytes]:
    """All files but those of `.lipreg` and the logs."""
    names = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        name.as_posix(): (folder / name).read_bytes() for name in names if name.parts[0] not in (".lipreg", "logs")
    }


# What is uploaded and deleted


def test_nothing_of_the_user_is_uploaded_deleted_or_overwritten(train, hub: LoopbackHub, tmp_path: Path) -> None:
    """Photos and class images inside of the folder, too; and in the repository, by three pushes."""
    out = tmp_path / "out"
    write(out, STRANGERS)
    shutil.copytree(PARITY / "instance", out / "photos")
    shutil.copytree(PARITY / "class_images", out / "class")
    before = contents(out)
    theirs = {"pytorch_lora_weights_portrait.safetensors", "image_2024_family.png", "image_1_album/holiday.png"}
    api = HfApi(endpoint=hub.url, token="hf_alice")
    api.create_repo("alice/x")
    api.create_commit(
        "alice/x", [CommitOperationAdd(name, b"of the user") for name in sorted(theirs)], commit_message="x"
    )
    prior = ("--with_prior_preservation", "--class_prompt", "a dog", "--class_data_dir", str(out / "class"))
    inside = (*PUSH, "--instance_data_dir", str(out / "photos"), *prior, "--num_class_images", "1")
    images = ("--validation_prompt", "a dog", "--validation_steps", "2", "--num_validation_images")
    train(out, *ADAPTER_RUN, *inside, *images, "2")
    ours = {ADAPTERS, "README.md", MANIFEST}
    assert hub.files("alice/x").keys() == theirs | ours | {"image_0.png", "image_1.png"}
    train(out, *ADAPTER_RUN, *inside, *images, "1")
    assert hub.files("alice/x").keys() == theirs | ours | {"image_0.png"}
    train(out, *inside)
    pipeline = set(OutputFolder(out).owned())
    assert {INDEX, UNET, "README.md"} <= pipeline and ADAPTERS not in pipeline
    assert hub.files("alice/x").keys() == theirs | pipeline - {CONFIG} | {MANIFEST}
    assert before.items() <= contents(out).items()
    assert contents(out).keys() == before.keys() | pipeline


def test_the_printed_command_pushes_the_same(train, hub: LoopbackHub, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "out"
    write(out, STRANGERS)
    train(
        out,
        *ADAPTER_RUN,
        *PUSH,
        "--validation_prompt",
        "a dog",
        "--validation_steps",
        "2",
        "--num_validation_images",
        "1",
    )
    hub.fail = {"commit": 403}
    with pytest.raises(RunError) as failed:
        train(out, *ADAPTER_RUN, *PUSH)
    hub.fail = {}
    words = shlex.split(str(failed.value).partition(" push it with: ")[2])
    environment = hub.environment(tmp_path / "home", token="hf_alice")
    subprocess.run(
        [Path(sys.executable).with_name(words[0]), *words[1:]], env=environment, check=True, capture_output=True
    )
    assert hub.files("alice/x").keys() == {ADAPTERS, "README.md", MANIFEST}
    assert contents(out).keys() == STRANGERS.keys() | {ADAPTERS, CONFIG, "README.md"}


def test_a_used_folder_is_announced_and_keeps_what_is_not_ours(train, tmp_path: Path, caplog) -> None:
    """Adapters after a whole pipeline: the folder is the adapters', for the other commands, too."""
    out = tmp_path / "out"
    with caplog.at_level("INFO"):
        train(out, "--checkpointing_steps", "1")
    assert "replaced when" not in caplog.text
    write(out, {"README.md": b"of the user", "image_0.png": b"of the user"})  # which only a push would need
    with caplog.at_level("INFO"):
        train(out, *ADAPTER_RUN)
    assert (
        f"{out} holds a result of an earlier run, which is replaced when the new one is whole; checkpoint-1 to"
        in caplog.text
    )
    assert "2 other files or folders (README.md is one), which are not touched or uploaded." in caplog.text
    assert find_adapters(str(out)) == out / ADAPTERS
    assert not (out / "unet").exists()
    assert (out / "README.md").read_bytes() == b"of the user"


def test_checkpoints_of_other_programs_are_read(train, tmp_path: Path) -> None:
    """As the official script leaves them, or an older version of ours: without a manifest, and without a result yet."""
    whole = train(tmp_path / "whole", "--max_train_steps", "3")
    out = train(tmp_path / "out", "--max_train_steps", "2", "--checkpointing_steps", "2")
    checkpoint = contents(out / "checkpoint-2")
    shutil.rmtree(out / ".lipreg")
    for path in set(out.iterdir()) - {out / "checkpoint-2", out / "logs"}:
        path.unlink() if path.is_file() else shutil.rmtree(path)
    train(out, "--max_train_steps", "3", "--resume_from_checkpoint", "latest")
    assert contents(out / "checkpoint-2") == checkpoint
    assert_equal_weights(out / UNET, whole / UNET)


# Two runs at once


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts the script as a process of its own, which is killed at the end of the test."""
    running = []

    def start(out: Path, *more: str) -> subprocess.Popen:
        with (tmp_path / "log").open("w") as log:
            command = [sys.executable, str(ROOT / "train_dreambooth_lipreg.py"), *flags(out, *more)]
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            running.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.wait()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    while not condition():
        assert process.poll() is None
        time.sleep(0.02)


def test_the_second_of_two_runs_ends_and_the_first_goes_on(start, train, tmp_path: Path) -> None:
    out = tmp_path / "out"
    steps = ("--max_train_steps", "100000", "--checkpointing_steps", "1")
    first = start(out, *ADAPTER_RUN, *steps)
    wait_for((out / "checkpoint-1").is_dir, first)
    with pytest.raises(RunError, match=rf"another run writes there \(process {first.pid} on .*, since 20"):
        train(out, *ADAPTER_RUN)
    reached = len(list(out.glob("checkpoint-*")))
    wait_for(lambda: len(list(out.glob("checkpoint-*"))) > reached, first)
    first.kill()
    first.wait()
    train(out, *ADAPTER_RUN)  # the lock has ended with the process


# Results are whole


def save_result(out: Path, contents: dict[str, bytes]) -> None:
    with OutputFolder(out).result(lambda folder: write(folder, contents)):
        pass


OLD = {INDEX: b"old", "unet/config.json": b"old", "unet/1.safetensors": b"old", "vae/config.json": b"old"}
NEW = {INDEX: b"new", "unet/config.json": b"new", "unet/2.safetensors": b"new", "vae/config.json": b"new"}
OLD_ADAPTERS, NEW_ADAPTERS = {ADAPTERS: b"old"}, {ADAPTERS: b"new"}


class Killed(BaseException):
    pass


moments_left = [10**9]  # until all that is asked of the file system fails, as if the process were killed


def count_down(event: str, _: tuple) -> None:
    if event.startswith(("os.", "open", "shutil.")) and moments_left[0] < 10**8:
        caller = sys._getframe(1)
        while caller is not None:  # a lock that is half taken ends with a process, but not with `Killed`
            if "filelock" in caller.f_code.co_filename:
                return
            caller = caller.f_back
        moments_left[0] -= 1
        if moments_left[0] < 0:
            raise Killed


def killed(moment: int, work: Callable[..., object], *arguments: object) -> bool:
    moments_left[0] = moment
    try:
        work(*arguments)
    except Killed:
        return True
    finally:
        moments_left[0] = 10**9
    return False


@pytest.mark.parametrize(
    ("old", "new", "stride"),
    [(OLD, NEW, 1), (OLD_ADAPTERS, NEW_ADAPTERS, 3), (OLD, NEW_ADAPTERS, 3), (OLD_ADAPTERS, NEW, 3)],
)
def test_a_result_is_the_old_or_the_new_one_whenever_it_is_killed(tmp_path, monkeypatch, old, new, stride) -> None:
    """Killed before each thing that it asks of the file system, and the run after that again."""
    sys.addaudithook(count_down)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # the slowest part, of which a kill shows nothing
    user = {"unet/notes.txt": b"of the user"}
    for moment in range(0, 1000, stride):
        out = tmp_path / str(moment)
        save_result(out, old)
        write(out, user)
        alive = not killed(moment, save_result, out, new)
        found = contents(out)
        assert user.items() <= found.items()
        if INDEX in found:  # what can be loaded is of one run
            assert (old if found[INDEX] == b"old" else new).items() <= found.items()
        else:
            assert ADAPTERS in found or (out / ".lipreg" / "result").is_dir()
        killed(moment % 7, lambda out: OutputFolder(out).claim(), out)  # while it recovers
        OutputFolder(out).claim()
        found = contents(out)
        assert found in ({**old, **user}, {**new, **user})
        assert set(OutputFolder(out).owned()) >= found.keys() - user.keys()
        if alive:
            break
    assert alive and found == {**new, **user} and moment > 20


@pytest.mark.slow
def test_a_run_killed_after_its_last_update_leaves_a_whole_result(start, train, tmp_path: Path) -> None:
    moments = random.Random(0)
    out, old, new = tmp_path / "out", tmp_path / "old", tmp_path / "new"
    train(old, *ADAPTER_RUN, "--seed", "1")
    train(new, *ADAPTER_RUN)
    for _ in range(25):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(old, out)
        process = start(out, *ADAPTER_RUN)
        wait_for(lambda: "2/2" in (tmp_path / "log").read_text(errors="replace"), process)
        time.sleep(moments.random() * 0.03)
        process.kill()
        process.wait()
        assert (out / ADAPTERS).read_bytes() in [(folder / ADAPTERS).read_bytes() for folder in (old, new)]


def test_a_file_that_came_while_training_is_not_overwritten(tmp_path: Path) -> None:
    save_result(tmp_path, OLD_ADAPTERS)
    OutputFolder(tmp_path).discard([ADAPTERS])
    with pytest.raises(RunError, match="was not written by a run, so it is not overwritten") as refused:
        save_result(tmp_path, NEW_ADAPTERS)
    assert (tmp_path / ADAPTERS).read_bytes() == b"old"
    assert str(tmp_path / ".lipreg" / "result") in str(refused.value)
    (tmp_path / ADAPTERS).rename(tmp_path / "mine")
    OutputFolder(tmp_path).claim()
    assert contents(tmp_path) == {ADAPTERS: b"new", "mine": b"old"}


def test_a_card_that_came_while_training_is_not_overwritten(tmp_path: Path) -> None:
    write(tmp_path, {"README.md": b"of the user"})
    with pytest.raises(RunError, match="README.md was not written by a run"):
        OutputFolder(tmp_path).write_result("README.md", lambda path: path.write_bytes(b"card"))
    assert contents(tmp_path) == {"README.md": b"of the user"}


def link_to_users_folder(output: Path, users: Path) -> None:
    """Replace the unet of a result by a link to a folder with files of the same names."""
    write(users, {"config.json": b"of the user", "model.safetensors": b"of the user"})
    save_result(output, {INDEX: b"old", "unet/config.json": b"old", "unet/model.safetensors": b"old"})
    shutil.rmtree(output / "unet")
    (output / "unet").symlink_to(users)


def test_nothing_is_deleted_behind_a_link(tmp_path: Path) -> None:
    link_to_users_folder(tmp_path / "out", tmp_path / "users")
    save_result(tmp_path / "out", NEW_ADAPTERS)
    assert set(contents(tmp_path / "users").values()) == {b"of the user"}
    assert OutputFolder(tmp_path / "out").owned("result") == [ADAPTERS]


def test_nothing_is_overwritten_behind_a_link(tmp_path: Path) -> None:
    link_to_users_folder(tmp_path / "out", tmp_path / "users")
    with pytest.raises(RunError, match="unet/config.json was not written by a run"):
        save_result(tmp_path / "out", {INDEX: b"new", "unet/config.json": b"new"})
    assert set(contents(tmp_path / "users").values()) == {b"of the user"}


@pytest.mark.parametrize("file", [MANIFEST, ".lipreg/result/names.json"])
@pytest.mark.parametrize(
    "names",
    [
        "",
        "[",
        "5",
        "null",
        "[1]",
        '["."]',
        '[""]',
        '["../x"]',
        '["/x"]',
        r'["\u0000"]',
        r'["\ud800"]',
        '[".lipreg/x"]',
    ],
)
def test_a_list_of_names_that_lies_ends_the_run_in_one_line(tmp_path: Path, file: str, names: str) -> None:
    content = f'{{"result": {names}}}' if file == MANIFEST else names
    write(tmp_path, {file: content.encode(), "x": b"of the user"})
    with pytest.raises(RunError, match="cannot be read .*Move .* away"):
        OutputFolder(tmp_path).claim()
    assert (tmp_path / "x").read_bytes() == b"of the user"


def test_the_flags_of_the_run_stay_with_its_result(tmp_path: Path) -> None:
    output = OutputFolder(tmp_path)
    output.add([CONFIG])
    write(tmp_path, {CONFIG: b"seed: 0"})
    save_result(tmp_path, NEW_ADAPTERS)
    assert set(output.owned()) == {CONFIG, ADAPTERS} and (tmp_path / CONFIG).is_file()


def test_trained_weights_outlive_a_base_that_is_gone(train, tmp_path: Path, monkeypatch) -> None:
    """Half of a download, a Hub that is away: all that training needs no longer may be lost by its end."""
    whole = train(tmp_path / "whole")
    base = Path(shutil.copytree(PARITY / "pipeline", tmp_path / "base"))
    save_rest = train_dreambooth_lipreg.save_rest

    def without_base(*arguments):
        shutil.rmtree(base / "vae")
        return save_rest(*arguments)

    monkeypatch.setattr(train_dreambooth_lipreg, "save_rest", without_base)
    with pytest.raises(RunError, match="the result cannot be completed: ") as failed:
        train(tmp_path / "out", "--pretrained_model_name_or_path", str(base))
    (kept,) = (tmp_path / "out").glob("trained-weights-*")
    assert str(kept) in str(failed.value) and "disk" not in str(failed.value)
    assert contents(kept).keys() == {"unet/config.json", UNET}
    assert_equal_weights(kept / UNET, whole / UNET)


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "Make room on the disk"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "Make room on the disk"),
        (OSError(errno.EBADF, "Bad file descriptor"), "Mend that"),
        (OSError("Can't load the model"), "Mend that"),
    ],
)
def test_advice_fits_the_error(error: Exception, advice: str) -> None:
    assert remedy(error) == advice


# A full disk after that


@contextmanager
def full_disk() -> Iterator[None]:
    """A limit on the size of files fails writes as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_at_the_card_loses_no_result(train, hub: LoopbackHub, tmp_path: Path, monkeypatch) -> None:
    save, out = ModelCard.save, tmp_path / "out"

    def on_a_full_disk(card: ModelCard, path: Path) -> None:
        with full_disk():
            save(card, path)

    monkeypatch.setattr(ModelCard, "save", on_a_full_disk)
    with pytest.raises(
        RunError, match=f"File too large.* The result is whole in {out}; push it with: hf upload"
    ) as failed:
        train(out, *ADAPTER_RUN, *PUSH)
    assert "README.md" not in str(failed.value)
    assert contents(out).keys() == {ADAPTERS, CONFIG}
    monkeypatch.undo()
    assert_equal_weights(out / ADAPTERS, train(tmp_path / "plain", *ADAPTER_RUN) / ADAPTERS)


@pytest.mark.parametrize("push", [PUSH, ()], ids=["push", "no push"])
def test_a_full_disk_at_the_log_loses_no_result(train, hub: LoopbackHub, tmp_path: Path, monkeypatch, push) -> None:
    def finish(_: Accelerator) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Accelerator, "end_training", finish)
    out = tmp_path / "out"
    with pytest.raises(RunError, match=f"No space left on device. The result is whole in {out}") as failed:
        train(out, *ADAPTER_RUN, *push)
    assert ("push it with: hf upload alice/x" in str(failed.value)) is bool(push)
    assert load_file(out / ADAPTERS)


def test_a_full_disk_at_the_log_stops_no_upload(
    train_sdxl, hub: LoopbackHub, tmp_path: Path, monkeypatch, caplog
) -> None:
    """At the last images, which the SDXL script logs when the result is saved."""
    script, out = train_dreambooth_lora_lipreg_sdxl, tmp_path / "out"

    def log_on_a_full_disk(accelerator: Accelerator, *_: object, **__: object) -> None:
        (tracker,) = accelerator.trackers
        assert isinstance(tracker.tracker, TensorBoardTracker)
        with full_disk():
            tracker.log({"loss": 1.0}, step=9)

    monkeypatch.setattr(script.validation, "log_images", log_on_a_full_disk)
    monkeypatch.setattr(script.validation, "sample_images", lambda *_, **__: [])
    train_sdxl(out, *PUSH, "--validation_prompt", "a dog", "--validation_epochs", "9")
    assert "tensorboard fails, and may miss what follows: [Errno 27] File too large" in caplog.text
    assert ADAPTERS in hub.files("alice/x")


@pytest.mark.parametrize("name", ["unet", "unet/logs", "checkpoint-1", ".lipreg"])
def test_logs_do_not_go_where_the_run_writes_something_else(train, tmp_path: Path, name: str) -> None:
    with pytest.raises(RunError, match=f"--logging_dir {name}: the run writes .* itself"):
        train(tmp_path / "out", "--logging_dir", name)
