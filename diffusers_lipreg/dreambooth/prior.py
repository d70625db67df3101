"""Prior preservation: sampled images of the class, kept in a folder."""

from __future__ import annotations

from argparse import Namespace
from hashlib import sha1
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.logging import get_logger
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from .data import list_images
from .models import Base

logger = get_logger(__name__)


def prior_dtype(precision: str | None, device: torch.device) -> torch.dtype:
    """What `--prior_generation_precision` means on this device: by default half precision on a GPU."""
    if precision in (None, "no"):
        return torch.float16 if device.type == "cuda" else torch.float32
    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]


def ensure_class_images(args: Namespace, accelerator: Accelerator, base: Base) -> list[Path]:
    """The class images to train on, at most `--num_class_images`; those missing from the folder are sampled first.

    Sampling draws from the default generators, so a run that samples and a later one that finds the images differ, as
    with the official script.
    """
    folder = Path(args.class_data_dir)
    images = list_images(folder) if folder.is_dir() else []
    accelerator.wait_for_everyone()  # all have counted before the first writes
    if len(images) < args.num_class_images:
        sample_class_images(args, accelerator, folder, len(images), base)
        accelerator.wait_for_everyone()
        images = list_images(folder)
    return images[: args.num_class_images]


def sample_class_images(
    args: Namespace, accelerator: Accelerator, folder: Path, present: int, base: Base
) -> None:
    """Samples class images number `present` and up, shared out among the processes."""
    missing = args.num_class_images - present
    logger.info(f"Sampling {missing} class images into {folder}.")
    dtype = prior_dtype(args.prior_generation_precision, accelerator.device)
    pipeline = base.pipeline(dtype, safety_checker=None).to(accelerator.device)
    folder.mkdir(parents=True, exist_ok=True)
    pipeline.set_progress_bar_config(disable=True)
    # Not accelerator.prepare: that would sample the last images twice, to give each process as many.
    numbers = prepare_data_loader(
        DataLoader(range(missing), batch_size=args.sample_batch_size),
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
        even_batches=False,
    )
    for batch in tqdm(numbers, desc="Class images", disable=not accelerator.is_local_main_process):
        images = pipeline([args.class_prompt] * len(batch)).images
        for number, image in zip(batch.tolist(), images, strict=True):
            image.save(folder / f"{present + number}-{sha1(image.tobytes()).hexdigest()}.jpg")
    del pipeline
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
