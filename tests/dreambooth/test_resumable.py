"""The order of batches and the crops in them, and taking them up again in the middle of an epoch."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from support.images import gray, plain, save_photo
from support.runs import as_photos
from torch import Tensor
from torch.utils.data import DataLoader

from diffusers_lipreg.dreambooth.data import DreamBoothDataset, collate
from diffusers_lipreg.dreambooth.images import PhotoTransform
from diffusers_lipreg.dreambooth.resumable import ResumableDataset

BATCHES = 4  # of 2, 2, 2 and 1 photos


@pytest.fixture
def accelerator(fresh_accelerate) -> Accelerator:
    """Also what the package's logger needs."""
    return Accelerator(cpu=True)


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    """Seven photos, one of them square, that no two crops of look alike."""
    sizes = [(40, 16), (16, 40), (16, 16), (48, 16), (16, 24), (30, 16), (16, 60)]
    return [save_photo(tmp_path / f"{seed}.png", size, seed) for seed, size in enumerate(sizes)]


def resumable(
    accelerator: Accelerator, photos: list[Path], size: int = 16, **options: Any
) -> DataLoader[ResumableDataset]:
    """The loader as the script makes it."""
    dataset = DreamBoothDataset(as_photos(photos), [], PhotoTransform(size, center_crop=False))
    resumable = ResumableDataset(dataset, options.get("persistent_workers", False))
    loader = DataLoader(resumable, batch_size=2, sampler=resumable.sampler, collate_fn=collate, **options)
    return accelerator.prepare(loader)


def train(loader: DataLoader, epochs: int) -> list[tuple[Tensor, Tensor]]:
    """The batches, and what the steps on them drew."""
    return [(batch["pixel_values"], torch.randn(3)) for _ in range(epochs) for batch in loader]


def assert_same_run(actual: list[tuple[Tensor, Tensor]], expected: list[tuple[Tensor, Tensor]]) -> None:
    assert len(actual) == len(expected)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("read_ahead", [False, True])
def test_order_crops_and_draws_are_those_of_torchs_shuffle(
    accelerator: Accelerator, photos: list[Path], read_ahead: bool
) -> None:
    dataset = DreamBoothDataset(as_photos(photos), [], PhotoTransform(16, center_crop=False))
    runs = []
    for options in (
        {"batch_size": 2, "shuffle": True},
        {"batch_size": 2, "dataset": (again := ResumableDataset(dataset)), "sampler": again.sampler},
    ):
        loader = DataLoader(**{"dataset": dataset, "collate_fn": collate, **options})
        assert len(loader) == BATCHES
        torch.manual_seed(0)
        seen = train(accelerator.prepare(loader) if read_ahead else loader, epochs=2)
        runs.append((seen, torch.get_rng_state()))
    (expected, expected_state), (actual, state) = runs
    assert_same_run(actual, expected)
    assert torch.equal(state, expected_state)


class Uninterrupted:
    """Two epochs in one go, and after each step what a checkpoint would hold."""

    def __init__(self, accelerator: Accelerator, photos: list[Path], **options: Any) -> None:
        loader = resumable(accelerator, photos, **options)
        torch.manual_seed(0)
        self.seen: list[tuple[Tensor, Tensor]] = []
        self.saved = []
        for _ in range(2):
            for batch in loader:
                self.seen.append((batch["pixel_values"], torch.randn(3)))
                self.saved.append((loader.dataset.state_dict(), torch.get_rng_state()))
        self.final_state = torch.get_rng_state()


def resume(loader: DataLoader[ResumableDataset], step: int, saved: tuple[dict[str, Tensor], Tensor]) -> None:
    """What loading a checkpoint does, in a process that has drawn other numbers."""
    torch.manual_seed(1234)
    state, now = saved
    torch.set_rng_state(now)
    if step % BATCHES:
        loader.dataset.resume(loader, step % BATCHES, state)
    # What is drawn from here to the first batch, such as the loader's seed of its workers, leaves no trace.


@pytest.mark.parametrize("step", range(1, 2 * BATCHES + 1))
def test_a_resumed_run_is_the_uninterrupted_one(accelerator: Accelerator, photos: list[Path], step: int) -> None:
    whole = Uninterrupted(accelerator, photos)
    loader = resumable(accelerator, photos)
    resume(loader, step, whole.saved[step - 1])
    assert_same_run(train(loader, epochs=2 - step // BATCHES), whole.seen[step:])
    assert torch.equal(torch.get_rng_state(), whole.final_state)


def test_a_run_may_be_interrupted_twice_in_an_epoch(accelerator: Accelerator, photos: list[Path]) -> None:
    whole = Uninterrupted(accelerator, photos)
    loader = resumable(accelerator, photos)
    resume(loader, 1, whole.saved[0])
    steps = iter(loader)
    for step in (1, 2):
        seen = next(steps)["pixel_values"], torch.randn(3)
        assert_same_run([seen], [whole.seen[step]])
    saved = loader.dataset.state_dict(), torch.get_rng_state()

    loader = resumable(accelerator, photos)
    resume(loader, 3, saved)
    assert_same_run(train(loader, epochs=2), whole.seen[3:])
    assert torch.equal(torch.get_rng_state(), whole.final_state)


def test_a_state_is_not_changed_by_the_batches_after_it(accelerator: Accelerator, photos: list[Path]) -> None:
    loader = resumable(accelerator, photos)
    steps = iter(loader)
    next(steps)
    state = loader.dataset.state_dict()
    kept = {name: tensor.clone() for name, tensor in state.items()}
    for _ in steps:
        torch.randn(3)
    assert loader.dataset.state_dict().keys() == kept.keys()
    assert not all(torch.equal(tensor, kept[name]) for name, tensor in loader.dataset.state_dict().items())
    torch.testing.assert_close(state, kept, rtol=0, atol=0)


def test_workers_that_stay_draw_as_new_ones(accelerator: Accelerator, photos: list[Path]) -> None:
    """Which is how the official script's loader has them."""
    new, stay = (Uninterrupted(accelerator, photos, num_workers=2, persistent_workers=on) for on in (False, True))
    assert_same_run(stay.seen, new.seen)
    assert torch.equal(stay.final_state, new.final_state)
    assert not torch.equal(new.seen[0][0], new.seen[BATCHES][0])


@pytest.mark.parametrize("step", [1, BATCHES + 1])
def test_with_workers_a_resumed_run_is_the_uninterrupted_one(
    accelerator: Accelerator, photos: list[Path], step: int
) -> None:
    """Their crops, too, which come from random states of their own."""
    workers = {"num_workers": 2, "persistent_workers": True}
    whole = Uninterrupted(accelerator, photos, **workers)
    loader = resumable(accelerator, photos, **workers)
    resume(loader, step, whole.saved[step - 1])
    assert_same_run(train(loader, epochs=2 - step // BATCHES), whole.seen[step:])
    assert torch.equal(torch.get_rng_state(), whole.final_state)


@pytest.mark.parametrize("step", range(1, BATCHES))
def test_an_official_checkpoint_has_the_rest_of_the_epoch_shuffled_again(
    accelerator: Accelerator, tmp_path: Path, step: int
) -> None:
    grays = [10, 20, 30, 40, 50, 60, 70]
    loader = resumable(accelerator, plain(tmp_path, *grays), size=8)
    loader.dataset.resume(loader, step, {})
    torch.manual_seed(0)
    rest, whole = ([gray(image) for batch in loader for image in batch["pixel_values"]] for _ in range(2))
    assert len(rest) == len(grays) - 2 * step
    assert max(Counter(rest).values()) == 1
    assert sorted(whole) == grays
    torch.manual_seed(0)
    assert [gray(image) for batch in loader for image in batch["pixel_values"]][2 * step :] == rest
