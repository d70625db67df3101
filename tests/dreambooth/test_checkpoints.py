"""Checkpoints: which one is meant, which are kept, and that a half-written one is never taken for whole."""

import errno
import json
import os
import pickle
import shutil
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from diffusers.optimization import get_scheduler
from PIL import Image
from support.runs import PARITY, as_photos
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import CLIPTextModel

from diffusers_lipreg.dreambooth import checkpoints
from diffusers_lipreg.dreambooth.checkpoint_files import OFFICIAL_FILES, find_checkpoint
from diffusers_lipreg.dreambooth.checkpoints import Checkpoints
from diffusers_lipreg.dreambooth.data import DreamBoothDataset, collate
from diffusers_lipreg.dreambooth.images import PhotoTransform
from diffusers_lipreg.dreambooth.output import CONFIG, OutputFolder
from diffusers_lipreg.dreambooth.resumable import ResumableDataset
from diffusers_lipreg.errors import RunError

BATCHES = 5


@pytest.fixture
def accelerator(fresh_accelerate) -> Accelerator:
    return Accelerator(cpu=True, gradient_accumulation_steps=2)


@pytest.fixture
def loader(tmp_path: Path) -> DataLoader[ResumableDataset]:
    """Of five photos, one a batch."""
    resumable = ResumableDataset(dataset(tmp_path))
    return DataLoader(resumable, sampler=resumable.sampler, collate_fn=collate)


def dataset(folder: Path) -> DreamBoothDataset:
    photos = [folder / f"photo-{number}.png" for number in range(BATCHES)]
    for number, photo in enumerate(photos):
        Image.linear_gradient("L").rotate(30 * number).resize((40, 16)).save(photo)
    return DreamBoothDataset(as_photos(photos), [], PhotoTransform(16, center_crop=False))


class Regularizer:
    """One that has measured something."""

    state: dict[str, Any] = {"measured": 0.25}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


Begin = Callable[..., Checkpoints]


@pytest.fixture
def begin(output: Path, accelerator: Accelerator, loader: DataLoader[ResumableDataset]) -> Begin:
    """Starts a run in the output folder: `begin("id", total_limit)`."""

    def begin(name: str, limit: int | None = None, loader: DataLoader = loader, **optimizer: Any) -> Checkpoints:
        accelerator.free_memory()  # of the run before
        adam = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], **optimizer)
        _, schedule = accelerator.prepare(adam, get_scheduler("linear", adam, None, 0, 100))
        args = Namespace(
            checkpoints_total_limit=limit, resume_from_checkpoint=None, drift_budget=None, keep_best=False
        )
        config = {"learning_rate": 1.0, "train_text_encoder": False}
        config["run"] = {"id": name, "base": "", "photos": {}}
        return Checkpoints(args, accelerator, OutputFolder(output), config, loader, schedule)

    return begin


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A folder with four checkpoints of the official script and other things that are named alike."""
    folder = tmp_path / "out"
    for number in (9, 10, 100, 20):
        official(folder / f"checkpoint-{number}")
    for name in ("checkpoint-best", "unet"):
        (folder / name).mkdir()
    for name in ("checkpoint-500.zip", "checkpoint-999"):  # files
        Path(folder, name).write_bytes(b"")
    return folder


def official(checkpoint: Path) -> Path:
    (checkpoint / "unet").mkdir(parents=True)
    for name in (*OFFICIAL_FILES, "unet/diffusion_pytorch_model.safetensors"):
        (checkpoint / name).write_bytes(b"")
    return checkpoint


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# Which one is meant


def test_no_wish_and_nothing_saved_yet_start_a_new_run(
    output: Path, tmp_path: Path, accelerator: Accelerator, caplog: pytest.LogCaptureFixture
) -> None:
    assert find_checkpoint(str(output), None) is None
    assert not caplog.records
    (tmp_path / "new" / "checkpoint-best").mkdir(parents=True)
    assert find_checkpoint(str(tmp_path / "new"), "latest") is None
    (record,) = caplog.records
    assert str(tmp_path / "new") in record.getMessage()


def test_latest_of_the_official_script_is_the_highest_number(output: Path) -> None:
    assert find_checkpoint(str(output), "latest") == output / "checkpoint-100"


@pytest.mark.parametrize(
    "wanted",
    ["checkpoint-9", "checkpoint-9/", "{output}/checkpoint-9", "{output}/checkpoint-9/", "somewhere/checkpoint-9"],
)
def test_a_name_or_a_path_means_the_one_in_the_output_folder(output: Path, wanted: str) -> None:
    assert find_checkpoint(str(output), wanted.format(output=output)) == output / "checkpoint-9"


@pytest.mark.parametrize("name", ["checkpoint-7/", "checkpoint-9"])
def test_a_path_that_is_there_is_taken_even_if_the_output_folder_has_its_namesake(
    output: Path, tmp_path: Path, name: str
) -> None:
    elsewhere = official(tmp_path / "other" / name)
    assert find_checkpoint(str(output), f"{tmp_path}/other/{name}") == elsewhere


@pytest.mark.parametrize(
    "wanted", ["checkpoint-7", "checkpoint-best", "unet", "checkpoint-999", "/nowhere/checkpoint-7/"]
)
def test_a_missing_checkpoint_is_an_error_that_lists_the_others(output: Path, wanted: str) -> None:
    with pytest.raises(RunError) as refused:
        find_checkpoint(str(output), wanted)
    assert f"--resume_from_checkpoint {wanted}: " in str(refused.value)
    assert "checkpoint-9, checkpoint-10, checkpoint-20, checkpoint-100." in str(refused.value)
    with pytest.raises(RunError, match="there is no such checkpoint; .* has none"):
        find_checkpoint(str(output / "new"), wanted)


def test_latest_is_of_the_run_that_wrote_last(output: Path, begin: Begin) -> None:
    """Not of an earlier one that went on for longer, nor what the run that wrote last made before it was resumed."""
    begin("earlier").save(300, Regularizer())
    later = begin("later")
    for step in (7, 8, 7):
        assert (
            later.save(step, Regularizer()) == find_checkpoint(str(output), "latest") == output / f"checkpoint-{step}"
        )
    assert [path.name for path in later.of_this_run()] == ["checkpoint-8", "checkpoint-7"]
    newer = official(output / "checkpoint-200")  # the official script went on
    os.utime(newer, times=(2e9, 2e9))
    assert find_checkpoint(str(output), "latest") == newer


# Whole or not


@pytest.mark.parametrize("file", [OFFICIAL_FILES[0], "unet/diffusion_pytorch_model.safetensors"])
def test_an_official_checkpoint_that_lacks_a_file_is_not_whole(
    output: Path, accelerator: Accelerator, file: str, caplog: pytest.LogCaptureFixture
) -> None:
    (output / "checkpoint-100" / file).unlink()
    assert find_checkpoint(str(output), "latest") == output / "checkpoint-20"
    assert f"{output / 'checkpoint-100'} is not whole" in caplog.text and "checkpoint-20 instead" in caplog.text
    with pytest.raises(RunError, match="checkpoint-100 is not whole: .* missing"):
        find_checkpoint(str(output), "checkpoint-100")


def test_ours_knows_its_files_and_their_sizes(output: Path, begin: Begin) -> None:
    saved = begin("run").save(300, Regularizer())
    for file in sorted(path for path in saved.rglob("*") if path.is_file() and path.name != CONFIG):
        content = file.read_bytes()
        for left in (content[: len(content) // 2], None):
            file.unlink() if left is None else file.write_bytes(left)
            with pytest.raises(RunError, match=f"checkpoint-300 is not whole: {file.name} missing or cut off"):
                find_checkpoint(str(output), "checkpoint-300")
        file.write_bytes(content)
    assert find_checkpoint(str(output), "checkpoint-300") == saved


def test_where_none_is_whole_no_new_run_is_started(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(RunError, match="checkpoint-3 is not whole"):
        find_checkpoint(str(tmp_path), "latest")


# Which are kept


@pytest.mark.parametrize(
    ("limit", "kept"), [(None, {5, 6, 7, 8}), (9, {5, 6, 7, 8}), (3, {6, 7, 8}), (1, {8}), (0, {8})]
)
def test_the_limit_counts_the_checkpoints_of_the_run_alone(
    output: Path, begin: Begin, limit: int | None, kept: set[int]
) -> None:
    begin("earlier").save(300, Regularizer())
    before = names(output)
    run = begin("run", limit)
    for step in (5, 6, 7):
        run.save(step, Regularizer())
    begin("run", limit).save(8, Regularizer())  # resumed, it is the same run
    assert names(output) == before | {f"checkpoint-{step}" for step in kept}
    assert set(OutputFolder(output).owned("checkpoint")) == {
        "checkpoint-300",
        *(f"checkpoint-{step}" for step in kept),
    }


def test_one_that_the_user_moved_and_linked_is_let_go(output: Path, tmp_path: Path, begin: Begin) -> None:
    run = begin("run", limit=1)
    moved = run.save(5, Regularizer()).rename(tmp_path / "moved")
    (output / "checkpoint-5").symlink_to(moved)
    before = names(moved)
    for step in (6, 7, 8):
        run.save(step, Regularizer())
    assert names(moved) == before
    assert {"checkpoint-5", "checkpoint-7"}.isdisjoint(names(output)) and "checkpoint-8" in names(output)


def test_one_of_an_earlier_run_of_ours_is_replaced_and_one_of_somebody_else_kept(output: Path, begin: Begin) -> None:
    before = names(output)
    begin("earlier").save(300, Regularizer())
    Path(output, "checkpoint-300", "old").write_bytes(b"")
    Path(output, "checkpoint-20", "old").write_bytes(b"")
    Path(output, "checkpoint-best", "mine").write_bytes(b"")
    run = begin("run")
    for step in (300, 20, 20):
        run.save(step, Regularizer())
    run.save_best({}, lambda models, folder: Path(folder, "unet").write_bytes(b""))
    kept = {"checkpoint-20.kept-1", "checkpoint-best.kept-1"}
    assert names(output) == before | kept | {"checkpoint-300", ".lipreg"}
    assert "old" not in names(output / "checkpoint-300")
    assert "old" in names(output / "checkpoint-20.kept-1") and "mine" in names(output / "checkpoint-best.kept-1")


def test_one_of_ours_that_the_user_brought_here_is_kept(output: Path, begin: Begin) -> None:
    """It names its run in config.yaml, but the manifest of this folder does not list it."""
    run = begin("run", limit=1)
    run.save(5, Regularizer())
    shutil.copytree(output / "checkpoint-5", output / "checkpoint-7")
    run.save(6, Regularizer())
    assert {"checkpoint-6", "checkpoint-7"} <= names(output)
    run.save(7, Regularizer())
    assert names(output) >= {"checkpoint-7", "checkpoint-7.kept-1"}


# Half-written and half-removed ones


def test_a_checkpoint_that_was_cut_off_is_never_found(
    output: Path, accelerator: Accelerator, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begin("run", limit=1)
    run.save(150, Regularizer())
    before = names(output)

    def killed(folder: str) -> None:
        Path(folder).mkdir()
        Path(folder, "optimizer.bin").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(accelerator, "save_state", killed)
        with pytest.raises(KeyboardInterrupt):
            run.save(200, Regularizer())
    # The old ones are removed when the new one is whole, not before.
    assert names(output) == before and find_checkpoint(str(output), "latest") == output / "checkpoint-150"
    with pytest.raises(RunError):
        find_checkpoint(str(output), "checkpoint-200")

    begin("run").save(200, Regularizer())
    assert names(output) == before | {"checkpoint-200"}
    assert find_checkpoint(str(output), "latest") == output / "checkpoint-200"


def test_a_checkpoint_that_was_half_removed_has_lost_its_name(
    output: Path, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, before = begin("run", limit=1), names(output)
    run.save(150, Regularizer())

    def killed(folder: Path, **_: Any) -> None:
        if Path(folder).exists():
            next(path for path in Path(folder).rglob("*") if path.is_file()).unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            run.save(200, Regularizer())
    assert [path.name for path in run.of_this_run()] == ["checkpoint-200"]
    with pytest.raises(RunError, match="no such checkpoint"):
        find_checkpoint(str(output), "checkpoint-150")
    begin("run", limit=1).save(201, Regularizer())
    assert names(output) == before | {"checkpoint-201", ".lipreg"}
    assert not list((output / ".lipreg").glob("checkpoint*"))


def test_a_system_that_flushes_only_what_may_be_written_to(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Windows, whose `os.fsync` calls such a descriptor bad."""
    import fcntl

    def fsync(descriptor: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flushed.append(descriptor)

    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", fsync)
    begin("run").save(300, Regularizer())
    assert flushed


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "Make room on the disk, then start again"),
        (OSError(errno.EROFS, "Read-only file system"), "Mend that, then start again"),
        (RuntimeError("iostream error"), "See whether the disk is full, then start again"),
    ],
)
def test_the_advice_fits_the_error(
    accelerator: Accelerator, begin: Begin, monkeypatch: pytest.MonkeyPatch, error: Exception, advice: str
) -> None:
    def fails(folder: str) -> None:
        raise error

    monkeypatch.setattr(accelerator, "save_state", fails)
    with pytest.raises(RunError, match=advice):
        begin("run").save(300, Regularizer())


# What is in them


def test_models_are_saved_and_loaded_by_name(tmp_path: Path, accelerator: Accelerator) -> None:
    models: dict[str, nn.Module] = {
        "unet": UNet2DConditionModel.from_pretrained(PARITY / "pipeline", subfolder="unet"),
        "text_encoder": CLIPTextModel.from_pretrained(PARITY / "pipeline", subfolder="text_encoder"),
    }
    expected = {name: {k: v.clone() for k, v in model.state_dict().items()} for name, model in models.items()}
    checkpoints.register_hooks(
        accelerator, partial(checkpoints.save_models, models), partial(checkpoints.load_models, models)
    )
    accelerator.prepare(models["text_encoder"], models["unet"])  # in another order
    accelerator.save_state(str(tmp_path))
    # The official layout, and nothing a second time.
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()} == {
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "random_states_0.pkl",
    }
    with torch.no_grad():
        for model in models.values():
            for parameter in model.parameters():
                parameter.zero_()
    for name in models:  # of these nothing is read
        Path(tmp_path, name, "config.json").write_text('{"auto_map": "elsewhere", "_class_name": "os.system"}')
        Path(tmp_path, name, "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
        Path(tmp_path, name, "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../elsewhere"}}')
    accelerator.load_state(str(tmp_path))
    for name, model in models.items():
        torch.testing.assert_close(dict(model.state_dict()), expected[name], rtol=0, atol=0)


def test_weights_that_are_not_there_are_named(tmp_path: Path) -> None:
    model = UNet2DConditionModel.from_pretrained(PARITY / "pipeline", subfolder="unet")
    (tmp_path / "unet").mkdir()
    with pytest.raises(ValueError, match="unet lacks .* weights"):
        checkpoints.load_models({"unet": model}, str(tmp_path))


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return Path.touch, (self.target,)


def test_nothing_that_is_loaded_as_a_checkpoint_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where a library asks for it, nor where the user's environment does."""
    torch.save(Malicious(tmp_path / "marker"), tmp_path / "file")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with checkpoints.tensors_only():
        for options in ({}, {"weights_only": False}):
            with pytest.raises(pickle.UnpicklingError):
                torch.load(tmp_path / "file", **options)
    assert not (tmp_path / "marker").exists()
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"


def test_hyperparameters_of_the_command_line_take_effect(begin: Begin) -> None:
    before = begin("run", lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2)
    for _ in range(10):
        before.schedule.optimizer.step()
        before.schedule.step()
    saved = before.save(10, Regularizer())
    assert before.schedule.get_last_lr() == [1e-3 * 0.9]
    same = begin("run", lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2)
    same.load(saved, 100, Regularizer())
    assert (
        same.schedule.optimizer.state_dict()["param_groups"] == before.schedule.optimizer.state_dict()["param_groups"]
    )
    after = begin("run", lr=1e-6, betas=(0.5, 0.6), eps=1e-4, weight_decay=0.5)
    after.load(saved, 100, Regularizer())
    assert after.schedule.get_last_lr() == [1e-6 * 0.9] and after.schedule.base_lrs == [1e-6]
    (group,) = after.schedule.optimizer.param_groups
    values = {name: group[name] for name in ("lr", "initial_lr", "betas", "eps", "weight_decay")}
    assert values == {"lr": 1e-6 * 0.9, "initial_lr": 1e-6, "betas": (0.5, 0.6), "eps": 1e-4, "weight_decay": 0.5}


def test_the_regularizers_state_is_json_and_comes_back(begin: Begin) -> None:
    run, regularizer = begin("run"), Regularizer()
    saved = run.save(10, regularizer)
    assert json.loads((saved / checkpoints.REGULARIZER_STATE).read_text()) == regularizer.state
    assert not list(saved.glob("custom_checkpoint*"))
    other = Regularizer()
    other.state = {}
    run.load(saved, 100, other)
    assert other.state == regularizer.state


@pytest.mark.parametrize(
    ("checkpoint", "advice"),
    [
        (7, "Start --resume_from_checkpoint checkpoint-7 --learning_rate 0.1."),
        (10, "Start anew --learning_rate 0.1."),
    ],
)
def test_a_lost_loss_names_a_checkpoint_whose_weights_are_not_lost_yet(
    begin: Begin, checkpoint: int, advice: str
) -> None:
    begin("earlier").save(3, Regularizer())
    run = begin("run", lr=1.0)
    run.save(checkpoint, Regularizer())
    run.check_finite(10, loss=torch.tensor(1.0))
    with pytest.raises(RunError) as lost:
        run.check_finite(10, loss=torch.tensor(float("nan")))
    assert str(lost.value) == f"the loss is nan in the step after update 10, at a learning rate of 1. {advice}"


def train(accelerator: Accelerator, loader: DataLoader, save=None) -> list[tuple[Tensor, Tensor]]:
    """An epoch of updates from two batches each, 5 batches in all; `save` is called after each."""
    seen, update = [], 0
    for batch in loader:
        with accelerator.accumulate():
            seen.append((batch["pixel_values"], torch.randn(3)))
        if accelerator.sync_gradients:
            update += 1
            if save is not None:
                save(update)
    return seen


@pytest.mark.parametrize(
    ("updates", "batches"), [(1, 2), (2, 4), (3, 5)], ids=["early", "before the last batch", "end of the epoch"]
)
@pytest.mark.parametrize("official", [False, True])
def test_a_checkpoint_brings_back_the_place_in_the_epoch(
    tmp_path: Path, accelerator: Accelerator, begin: Begin, updates: int, batches: int, official: bool
) -> None:
    def resumable() -> DataLoader[ResumableDataset]:
        photos = ResumableDataset(dataset(tmp_path))
        return accelerator.prepare(DataLoader(photos, sampler=photos.sampler, collate_fn=collate))

    torch.manual_seed(0)
    loader = resumable()
    run = begin("run", loader=loader)
    whole = train(accelerator, loader, lambda step: run.save(step, Regularizer()))
    whole += train(accelerator, loader)
    final_state = torch.get_rng_state()

    checkpoint = run.output.path / f"checkpoint-{updates}"
    if official:  # which knows nothing of our data set
        Path(checkpoint, checkpoints.SAMPLER_STATE).unlink()
    torch.manual_seed(1234)
    loader = resumable()
    begin("run", loader=loader).load(checkpoint, 3, Regularizer())
    rest = [] if updates == 3 else train(accelerator, loader)
    assert len(rest) == BATCHES - batches
    rest += train(accelerator, loader)
    assert len(rest) == len(whole) - batches
    if not official or updates == 3:
        torch.testing.assert_close(rest, whole[batches:], rtol=0, atol=0)
        assert torch.equal(torch.get_rng_state(), final_state)


EPOCH_START = {"epoch_start": torch.get_rng_state()}


@pytest.mark.parametrize(
    "states",
    [5, None, "abc", [], {}, [5], [{"x": EPOCH_START["epoch_start"]}], [{"epoch_start": torch.zeros(3)}], [[{}]]],
)
def test_states_of_the_data_set_that_are_something_else_are_refused(begin: Begin, states: object) -> None:
    run = begin("run")
    saved = run.save(5, Regularizer())
    torch.save([EPOCH_START], saved / checkpoints.SAMPLER_STATE)
    run.load(saved, 100, Regularizer())
    torch.save(states, saved / checkpoints.SAMPLER_STATE)
    with pytest.raises(RunError, match="checkpoint-5 is not whole, or not of a run with these flags"):
        run.load(saved, 100, Regularizer())


def test_random_states_that_accelerate_would_pass_over_are_refused(begin: Begin) -> None:
    run = begin("run")
    saved = run.save(5, Regularizer())
    shutil.copy(saved / "scheduler.bin", saved / "random_states_0.pkl")
    with pytest.raises(RunError, match="checkpoint-5 is not whole, or not of a run with these flags"):
        run.load(saved, 100, Regularizer())
