"""Sample class images for prior preservation from the pretrained pipeline, and keep them in a folder."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Sequence
from hashlib import sha1
from itertools import count, islice
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import release_memory
from numpy import uint64
from numpy.random import SeedSequence
from tqdm.auto import tqdm

from ..errors import as_run_error, one_line
from .images import list_images
from .models import Base
from .setup import DTYPES

logger = get_logger(__name__)


def prior_dtype(precision: str | None, device: torch.device) -> torch.dtype:
    """Return the type that `--prior_generation_precision` means: by default half precision on a CUDA device."""
    return DTYPES.get(precision, torch.float16 if device.type == "cuda" else torch.float32)


def ensure_class_images(args: Namespace, accelerator: Accelerator, base: Base) -> list[Path]:
    """Return the class images to train on, if `--with_prior_preservation` asks for any; sample those that are missing.

    Sampling draws nothing from the default generators. A run that samples and a later one that finds the images are
    therefore the same if both have the same `--seed`.
    """
    if not args.with_prior_preservation:
        return []
    folder = Path(args.class_data_dir)
    images = list_images(folder) if folder.is_dir() else []
    accelerator.wait_for_everyone()  # every process counts before the first one writes
    if len(images) < args.num_class_images:
        taken = {int(found[1]) for path in images if (found := re.match(r"(\d+)-", path.name))}
        missing = islice((number for number in count() if number not in taken), args.num_class_images - len(images))
        sample_class_images(args, accelerator, folder, list(missing), base)
        accelerator.wait_for_everyone()
        images = list_images(folder)
    return images[: args.num_class_images]


def sample_class_images(
    args: Namespace, accelerator: Accelerator, folder: Path, numbers: Sequence[int], base: Base
) -> None:
    """Sample this process's share of the class images of these numbers, each with a generator of its own."""
    logger.info(f"Sampling {len(numbers):,} class images into {folder}.")
    dtype = prior_dtype(args.prior_generation_precision, accelerator.device)
    pipeline = base.pipeline(dtype, safety_checker=None).to(accelerator.device)
    pipeline.set_progress_bar_config(disable=True)
    folder.mkdir(parents=True, exist_ok=True)
    size = args.sample_batch_size
    batches = [numbers[first : first + size] for first in range(0, len(numbers), size)]
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    for batch in tqdm(mine, desc="Class images", disable=not accelerator.is_local_main_process):
        generators = [create_generator(args.seed, number) for number in batch]
        images = pipeline([args.class_prompt] * len(batch), generator=generators).images
        for number, image in zip(batch, images, strict=True):
            partial = folder / f".{number}.partial"  # hidden, so that a killed run leaves no half of a class image
            with as_run_error(lambda error: f"--class_data_dir {folder}: cannot be written ({one_line(error)})."):
                image.save(partial, format="JPEG")
                partial.replace(folder / f"{number}-{sha1(image.tobytes()).hexdigest()}.jpg")
    del pipeline
    release_memory()


def create_generator(seed: int | None, number: int) -> torch.Generator:
    """Create the generator of a class image from `--seed` and its number, or from fresh entropy without a seed."""
    state = SeedSequence(None if seed is None else (seed, number)).generate_state(1, uint64)
    return torch.Generator().manual_seed(int(state[0]))
