"""Sample images of a prompt from the current weights, and log them."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn

logger = get_logger(__name__)


def set_scheduler(pipeline: DiffusionPipeline, name: str | None = None) -> None:
    """Give the pipeline a new scheduler of the class `name`, or of its own class, with a fixed variance.

    Training updates the mean only, so a learned variance is stale.
    """
    config = pipeline.scheduler.config
    learned = config.get("variance_type") in ("learned", "learned_range")
    fixed = {"variance_type": "fixed_small"} if learned else {}
    scheduler_class = type(pipeline.scheduler) if name is None else getattr(diffusers, name)
    pipeline.scheduler = scheduler_class.from_config(config, **fixed)


@contextmanager
def eval_mode(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Put the pipeline's models in eval mode, and have its VAE decode in its own dtype.

    Samples are taken without the dropout of adapters. The VAE of SDXL is in float32: under autocast it would compute in
    float16 and overflow, and the images would be black.
    """
    in_training = [part for part in pipeline.components.values() if isinstance(part, nn.Module) and part.training]
    vae = pipeline.components.get("vae")

    def decode(latents: Tensor, *args: Any, **options: Any) -> Any:
        with torch.autocast(latents.device.type, enabled=False):
            return type(vae).decode(vae, latents.to(vae.dtype), *args, **options)

    try:
        for part in in_training:
            part.eval()
        if vae is not None:
            vae.decode = decode
        yield
    finally:
        for part in in_training:
            part.train()
        if vae is not None:
            del vae.decode


def sample_images(
    args: Namespace, accelerator: Accelerator, pipeline: DiffusionPipeline, prompt: dict, steps: int
) -> list[Image.Image]:
    """Sample `--num_validation_images` images, or one for each of `--validation_images`.

    `prompt` are the pipeline's arguments: `prompt`, or `prompt_embeds` and `negative_prompt_embeds`.
    """
    logger.info(f"Sampling {args.num_validation_images} images of {args.validation_prompt!r}.")
    pipeline.set_progress_bar_config(disable=True)
    generator = None if args.seed is None else torch.Generator(accelerator.device).manual_seed(args.seed)
    inputs: list[dict[str, Any]] = [{"num_inference_steps": steps}] * args.num_validation_images
    if paths := vars(args).get("validation_images"):  # the SD script's, for pipelines that take an image
        inputs = [{"image": Image.open(path)} for path in paths]
    pipeline = pipeline.to(accelerator.device)
    # Compiled models would be compiled again for these sizes, which does not pay.
    with accelerator.autocast(), torch.compiler.set_stance("force_eager"), eval_mode(pipeline):
        return [pipeline(**prompt, **extra, generator=generator).images[0] for extra in inputs]


def log_images(
    accelerator: Accelerator, images: list[Image.Image], prompt: str, step: int, name: str = "validation"
) -> None:
    """Send images to the trackers under `name`. `step` counts updates, as for scalars: wandb drops steps that go back."""
    for tracker in accelerator.trackers:
        tracker.log_images(name, images, prompt, step)
