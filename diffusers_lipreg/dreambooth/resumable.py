"""Take up a shuffled order and random crops in the middle of an epoch, to the last bit."""

from __future__ import annotations

import random
from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, get_worker_info

from .data import MemoryFormats, collate
from .interruption import ignore_signals


class ResumableDataset(Dataset):
    """Wrap a data set so that its shuffled order and random crops can be taken up again in the middle of an epoch.

    Both come from torch's default generator, from which the training steps draw, too. Three of its states are needed to
    go on exactly: at the start of the epoch, before the next batch was loaded (accelerate reads one batch ahead), and
    now. accelerate's checkpoint holds the last one. `state_dict` holds the others, and the state of the generator that
    several processes share for their order. A resumed epoch loads its first batches again and drops them, because that
    restores the random states of workers.

    Workers that stay for all epochs (`persistent_workers`) draw like new ones: the loader's process draws a seed for
    each epoch where the loader would, and they read it from shared memory.
    """

    def __init__(self, dataset: Dataset, persistent_workers: bool = False) -> None:
        self.dataset = dataset
        self.persistent_workers = persistent_workers
        self.sampler = ResumableSampler(self)
        self.loader: Any = None  # the prepared one, of a resumed run
        # 0 lets workers keep the seed that they start with. In a worker, `last_worker_seed` is the one it took last.
        self.worker_seed = torch.zeros((), dtype=torch.int64).share_memory_()
        self.last_worker_seed = 0
        self.epochs = 0
        self.batches_loaded = 0  # in this epoch
        self.epoch_states: dict[str, Tensor] = {}  # what a checkpoint of this epoch needs
        # Of a resumed epoch: how many of its batches were trained on already, and the states to take up after them.
        self.batches_to_skip, self.resumed_states = 0, dict[str, Tensor]()
        self.next_batches_to_skip, self.next_resumed_states = 0, dict[str, Tensor]()

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def resume(self, loader: DataLoader, batches: int, state: dict[str, Tensor]) -> None:
        """Have the next epoch of the prepared loader begin after its first `batches` batches of this process.

        With 0 batches it is the epoch after that of `state`. Call it once the random state is restored. An empty `state`,
        of a checkpoint of the official script, gives a new order.
        """
        self.loader, self.next_batches_to_skip = loader, batches
        if state and batches:
            self.next_resumed_states = {**state, "now": torch.get_rng_state()}
        elif state and self.sampler.generator is not None:
            self.sampler.generator.set_state(state["next_order"])

    def state_dict(self) -> dict[str, Tensor]:
        """Return the states that `resume` needs; call it after a step, before the next batch is loaded."""
        if self.sampler.generator is None:
            return dict(self.epoch_states)
        return {**self.epoch_states, "next_order": self.sampler.generator.get_state()}

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch; accelerate's loader calls this before it draws anything."""
        self.batches_to_skip, self.resumed_states = self.next_batches_to_skip, self.next_resumed_states
        self.next_batches_to_skip, self.next_resumed_states = 0, {}
        self.batches_loaded = 0
        if self.loader is not None:
            self.loader.skip_batches = self.batches_to_skip
        if self.resumed_states:
            torch.set_rng_state(self.resumed_states["epoch_start"])
            if self.sampler.generator is not None:
                self.sampler.generator.set_state(self.resumed_states["order"])
        self.epoch_states = {"epoch_start": torch.get_rng_state()}
        if self.sampler.generator is not None:
            self.epoch_states["order"] = self.sampler.generator.get_state()

    def before_shuffle(self) -> None:
        """Seed the workers for the epoch; the sampler calls this before it draws."""
        if self.persistent_workers and self.epochs > 0:
            self.worker_seed.random_()
        self.epochs += 1

    def after_shuffle(self) -> None:
        """Restore the random state after the sampler has drawn: with workers, this process draws nothing more."""
        if self.resumed_states:
            torch.set_rng_state(self.resumed_states["now"])

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        """Return the items of a batch, drawn from the random state that an uninterrupted run has there."""
        worker = get_worker_info()
        if worker is not None and self.last_worker_seed != self.worker_seed.item():
            self.last_worker_seed = int(self.worker_seed.item())
            random.seed(self.last_worker_seed + worker.id)
            torch.manual_seed(self.last_worker_seed + worker.id)
        is_first_new_batch = self.resumed_states and self.batches_loaded == self.batches_to_skip and worker is None
        if is_first_new_batch and "before_batch" in self.resumed_states:  # workers may have loaded the batches before
            torch.set_rng_state(self.resumed_states["before_batch"])
        self.batches_loaded += 1
        self.epoch_states["before_batch"] = torch.get_rng_state()
        items = [self.dataset[index] for index in indices]
        if is_first_new_batch:
            torch.set_rng_state(self.resumed_states["now"])
        return items


def check_states(states: Any) -> list[dict[str, Tensor]]:
    """Return what the `state_dict` of each process returned.

    Raises:
        Exception: It is something else.
    """
    if not isinstance(states, list) or not states:
        raise ValueError("the states of the data set are no list")
    for state in states:
        for generator_state in state.values():
            torch.Generator().set_state(generator_state)
        if state and "epoch_start" not in state:
            raise ValueError("the states of the data set lack the start of the epoch")
    return states


class ResumableSampler(RandomSampler):
    """Shuffle as `RandomSampler` does, and tell the data set when."""

    def __init__(self, dataset: ResumableDataset) -> None:
        super().__init__(dataset)
        self.dataset = dataset

    def __iter__(self) -> Iterator[int]:
        self.dataset.before_shuffle()
        for number, index in enumerate(super().__iter__()):
            if number == 0:
                self.dataset.after_shuffle()
            yield index


def make_loader(args: Namespace, dataset: Dataset, memory_formats: MemoryFormats | None) -> DataLoader[dict]:
    """Return the loader of a run. With `memory_formats` the images are encoded already, and need no workers."""
    workers = args.dataloader_num_workers if memory_formats is None else 0
    resumable = ResumableDataset(dataset, persistent_workers=workers > 0)
    return DataLoader(
        resumable,
        batch_size=args.train_batch_size,
        sampler=resumable.sampler,
        collate_fn=partial(collate, memory_formats=memory_formats, class_prompt=args.class_prompt),
        num_workers=workers,
        worker_init_fn=ignore_signals,
        persistent_workers=workers > 0,  # an epoch may be five photos, and new workers take longer to start
    )
