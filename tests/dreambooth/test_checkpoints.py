"""Checkpoints: which one is meant, which are kept, and that a half-written one is never taken for whole."""

from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import PARITY
from diffusers import UNet2DConditionModel
from diffusers.optimization import get_scheduler
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import CLIPTextModel

from diffusers_lipreg.dreambooth import checkpoints
from diffusers_lipreg.dreambooth.data import DreamBoothDataset, PhotoTransform, ResumableDataset, collate
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
    return DreamBoothDataset(photos, [], PhotoTransform(16, center_crop=False))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A run's folder with four checkpoints and other things that are named alike."""
    folder = tmp_path / "out"
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-100", "checkpoint-20", "checkpoint-best", "unet"):
        (folder / name).mkdir(parents=True)
    Path(folder, "checkpoint-500.zip").write_bytes(b"")
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# Which one is meant


def test_no_wish_and_nothing_saved_yet_start_a_new_run(
    output: Path, tmp_path: Path, accelerator: Accelerator, caplog: pytest.LogCaptureFixture
) -> None:
    assert checkpoints.find(str(output), None) is None
    assert not caplog.records
    (tmp_path / "new" / "checkpoint-best").mkdir(parents=True)
    assert checkpoints.find(str(tmp_path / "new"), "latest") is None
    (record,) = caplog.records
    assert str(tmp_path / "new") in record.getMessage()


def test_latest_is_the_highest_number(output: Path) -> None:
    assert checkpoints.find(str(output), "latest") == output / "checkpoint-100"


@pytest.mark.parametrize(
    "wanted",
    ["checkpoint-9", "checkpoint-9/", "{output}/checkpoint-9", "{output}/checkpoint-9/", "somewhere/checkpoint-9"],
)
def test_a_name_or_a_path_means_the_one_in_the_output_folder(output: Path, wanted: str) -> None:
    assert checkpoints.find(str(output), wanted.format(output=output)) == output / "checkpoint-9"


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_path_elsewhere_is_taken_if_only_it_is_there(output: Path, tmp_path: Path, slash: str) -> None:
    elsewhere = tmp_path / "other" / "checkpoint-7"
    elsewhere.mkdir(parents=True)
    assert checkpoints.find(str(output), f"{elsewhere}{slash}") == elsewhere


def test_a_path_that_is_there_is_not_exchanged_for_its_namesake(output: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "other" / "checkpoint-9"
    elsewhere.mkdir(parents=True)
    assert checkpoints.find(str(output), str(elsewhere)) == elsewhere


@pytest.mark.parametrize("wanted", ["checkpoint-7", "checkpoint-best", "unet", "last", "/nowhere/checkpoint-7/"])
def test_a_missing_checkpoint_is_an_error_that_lists_the_others(output: Path, wanted: str) -> None:
    with pytest.raises(RunError) as refused:
        checkpoints.find(str(output), wanted)
    assert f"--resume_from_checkpoint {wanted}: " in str(refused.value)
    assert "checkpoint-9, checkpoint-10, checkpoint-20, checkpoint-100." in str(refused.value)


def test_a_missing_checkpoint_in_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="has none"):
        checkpoints.find(str(tmp_path), "checkpoint-7")


def test_a_file_is_no_checkpoint(output: Path) -> None:
    Path(output, "checkpoint-999").write_bytes(b"")
    assert checkpoints.find(str(output), "latest") == output / "checkpoint-100"


# Which are kept


@pytest.mark.parametrize(
    ("limit", "kept"),
    [
        (None, {"checkpoint-9", "checkpoint-10", "checkpoint-20", "checkpoint-100", "checkpoint-101"}),
        (9, {"checkpoint-9", "checkpoint-10", "checkpoint-20", "checkpoint-100", "checkpoint-101"}),
        (3, {"checkpoint-20", "checkpoint-100", "checkpoint-101"}),
        (1, {"checkpoint-101"}),
        (0, {"checkpoint-101"}),
    ],
)
def test_the_limit_keeps_the_newest_and_what_is_not_a_checkpoint(
    output: Path, accelerator: Accelerator, loader: DataLoader[ResumableDataset], limit: int | None, kept: set[str]
) -> None:
    checkpoints.save(accelerator, loader, str(output), 101, limit)
    assert names(output) == kept | {"checkpoint-best", "unet", "checkpoint-500.zip"}


def test_saving_a_step_again_replaces_it(
    output: Path, accelerator: Accelerator, loader: DataLoader[ResumableDataset]
) -> None:
    Path(output, "checkpoint-20", "old").write_bytes(b"")
    before = names(output)
    checkpoints.save(accelerator, loader, str(output), 20, None)
    assert names(output) == before
    assert "old" not in names(output / "checkpoint-20")


# Half-written ones


def test_a_checkpoint_that_was_cut_off_is_never_found(
    output: Path, accelerator: Accelerator, loader: DataLoader[ResumableDataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = names(output)

    def killed(folder: str) -> None:
        Path(folder).mkdir()
        Path(folder, "optimizer.bin").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(accelerator, "save_state", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(accelerator, loader, str(output), 200, total_limit=1)
    (left,) = names(output) - before
    assert before < names(output)  # the old ones are removed when the new one is whole, not before
    assert checkpoints.find(str(output), "latest") == output / "checkpoint-100"
    for wanted in (left, "checkpoint-200"):
        with pytest.raises(RunError):
            checkpoints.find(str(output), wanted)

    checkpoints.save(accelerator, loader, str(output), 200, None)
    assert names(output) == before | {"checkpoint-200"}
    assert checkpoints.find(str(output), "latest") == output / "checkpoint-200"
    assert Path(output, "checkpoint-200", "random_states_0.pkl").exists()
    assert "optimizer.bin" not in names(output / "checkpoint-200")


# What is in them


def test_models_are_saved_and_loaded_by_name(tmp_path: Path, accelerator: Accelerator) -> None:
    models: dict[str, nn.Module] = {
        "unet": UNet2DConditionModel.from_pretrained(PARITY / "pipeline", subfolder="unet"),
        "text_encoder": CLIPTextModel.from_pretrained(PARITY / "pipeline", subfolder="text_encoder"),
    }
    expected = {name: {k: v.clone() for k, v in model.state_dict().items()} for name, model in models.items()}
    checkpoints.write_models_with(
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
    accelerator.load_state(str(tmp_path))
    for name, model in models.items():
        torch.testing.assert_close(dict(model.state_dict()), expected[name], rtol=0, atol=0)


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
    tmp_path: Path, accelerator: Accelerator, updates: int, batches: int, official: bool
) -> None:
    def resumable() -> DataLoader[ResumableDataset]:
        photos = ResumableDataset(dataset(tmp_path))
        return accelerator.prepare(DataLoader(photos, sampler=photos.sampler, collate_fn=collate))

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    _, schedule = accelerator.prepare(optimizer, get_scheduler("constant", optimizer))

    torch.manual_seed(0)
    loader = resumable()
    whole = train(accelerator, loader, lambda step: checkpoints.save(accelerator, loader, tmp_path, step, None))
    whole += train(accelerator, loader)
    final_state = torch.get_rng_state()

    checkpoint = tmp_path / f"checkpoint-{updates}"
    if official:  # which knows nothing of our data set
        Path(checkpoint, checkpoints.SAMPLER_STATE).unlink()
    torch.manual_seed(1234)
    loader = resumable()
    assert checkpoints.load(accelerator, loader, schedule, checkpoint, updates_per_epoch=3) == updates
    rest = [] if updates == 3 else train(accelerator, loader)
    assert len(rest) == BATCHES - batches
    rest += train(accelerator, loader)
    assert len(rest) == len(whole) - batches
    if not official or updates == 3:
        torch.testing.assert_close(rest, whole[batches:], rtol=0, atol=0)
        assert torch.equal(torch.get_rng_state(), final_state)
