"""The place of a run in its data: a shuffled order and random crops that can be taken up again inside an epoch."""

from __future__ import annotations

import random
from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, get_worker_info

from .data import Layouts, collate
from .interruption import ignore_signals


class ResumableDataset(Dataset):
    """A data set whose shuffled order and random crops can be taken up again in the middle of an epoch.

    Both come from torch's default generator, which the steps between draw from, too. So three of its states are needed
    to go on as if nothing had happened: at the start of the epoch, before the batch that comes next was loaded
    (accelerate reads one batch ahead), and now. The last is in accelerate's checkpoint, the others are `state_dict()`,
    with that of the generator that several processes share for their order. What was seen is loaded once more and
    dropped, for that is what brings back the random states that workers have of their own.

    Workers that stay for all epochs (`persistent_workers`) draw as new ones would: each epoch has a seed for them, drawn
    where the loader would draw it, which reaches them in shared memory.
    """

    def __init__(self, dataset: Dataset, persistent_workers: bool = False) -> None:
        self.dataset = dataset
        self.persistent_workers = persistent_workers
        self.worker_seed = torch.zeros((), dtype=torch.int64).share_memory_()  # 0: the one that workers began with
        self.seeded = 0
        self.epochs = 0
        self.sampler = _Order(self)
        self.loader: Any = None
        self.skip = self.first = self.batch = 0
        self.resume_from: dict[str, Tensor] = {}
        self.saved: dict[str, Tensor] = {}
        self.state: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def resume(self, loader: DataLoader, batches: int, state: dict[str, Tensor]) -> None:
        """Makes the next epoch of the prepared loader begin behind its first `batches` batches (of this process).

        With 0 batches it is the epoch after the one that `state` was taken in. Call it when the random state is
        restored. `state` is what `state_dict` gave, or empty (a checkpoint of the official script): then the order is
        a new one.
        """
        self.loader, self.skip = loader, batches
        if state and batches:
            self.resume_from = {**state, "now": torch.get_rng_state()}
        elif state and self.sampler.generator is not None:
            self.sampler.generator.set_state(state["next_order"])

    def state_dict(self) -> dict[str, Tensor]:
        """The states to hand to `resume`, as they are after a step and before the next batch is asked for."""
        if self.sampler.generator is None:
            return dict(self.state)
        return {**self.state, "next_order": self.sampler.generator.get_state()}

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's loader before it draws anything for an epoch."""
        self.first, self.saved, self.batch = self.skip, self.resume_from, 0
        self.skip, self.resume_from = 0, {}
        if self.loader is not None:
            self.loader.skip_batches = self.first
        if self.saved:
            torch.set_rng_state(self.saved["epoch_start"])
            if self.sampler.generator is not None:
                self.sampler.generator.set_state(self.saved["order"])
        self.state = {"epoch_start": torch.get_rng_state()}
        if self.sampler.generator is not None:
            self.state["order"] = self.sampler.generator.get_state()

    def order_begins(self) -> None:
        """Called by the sampler before it draws."""
        if self.persistent_workers and self.epochs > 0:
            self.worker_seed.random_()
        self.epochs += 1

    def order_is_drawn(self) -> None:
        """Called by the sampler: with workers, this process draws nothing more for the epoch."""
        if self.saved:
            torch.set_rng_state(self.saved["now"])

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        """The items of a batch."""
        worker = get_worker_info()
        if worker is not None and self.seeded != self.worker_seed.item():
            self.seeded = int(self.worker_seed.item())
            random.seed(self.seeded + worker.id)
            torch.manual_seed(self.seeded + worker.id)
        resumed = self.saved and self.batch == self.first and worker is None
        if resumed:
            torch.set_rng_state(self.saved["before_batch"])
        self.batch += 1
        self.state["before_batch"] = torch.get_rng_state()
        items = [self.dataset[index] for index in indices]
        if resumed:
            torch.set_rng_state(self.saved["now"])
        return items


class _Order(RandomSampler):
    """A shuffle that says when it is drawn."""

    def __iter__(self) -> Iterator[int]:
        self.data_source.order_begins()
        for number, index in enumerate(super().__iter__()):
            if number == 0:
                self.data_source.order_is_drawn()
            yield index


def make_loader(args: Namespace, dataset: Dataset, layouts: Layouts | None) -> DataLoader[ResumableDataset]:
    """The loader of a run, whose data set knows the place in the epoch, which checkpoints need.

    With `layouts` the images are encoded already, and workers have nothing to do.
    """
    workers = args.dataloader_num_workers if layouts is None else 0
    resumable = ResumableDataset(dataset, persistent_workers=workers > 0)
    return DataLoader(
        resumable,
        batch_size=args.train_batch_size,
        sampler=resumable.sampler,
        collate_fn=partial(collate, layouts=layouts, class_prompt=args.class_prompt),
        num_workers=workers,
        worker_init_fn=ignore_signals,
        persistent_workers=workers > 0,  # an epoch is five photos: starting new ones takes longer
    )
