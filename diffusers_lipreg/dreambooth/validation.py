"""Images of a prompt along the way, from the weights as they are."""

from __future__ import annotations

from argparse import Namespace

import diffusers
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn

logger = get_logger(__name__)


def set_scheduler(pipeline: DiffusionPipeline, name: str | None = None) -> None:
    """Gives the pipeline the scheduler class `name`, or its own anew, with a variance that our UNets do not predict.

    The loss trains the mean only, so what a model with learned variance says of it is no longer to be used.
    """
    fixed = {}
    if pipeline.scheduler.config.get("variance_type") in ("learned", "learned_range"):
        fixed["variance_type"] = "fixed_small"
    scheduler_class = type(pipeline.scheduler) if name is None else getattr(diffusers, name)
    pipeline.scheduler = scheduler_class.from_config(pipeline.scheduler.config, **fixed)


def sample_images(
    args: Namespace, accelerator: Accelerator, pipeline: DiffusionPipeline, prompt: dict, steps: int
) -> list[Image.Image]:
    """`--num_validation_images` images, or one for each of `--validation_images`; seeded by `--seed` if there is one.

    Args:
        prompt: The pipeline's arguments for the prompt: `prompt`, or `prompt_embeds` and `negative_prompt_embeds`.
    """
    logger.info(f"Sampling {args.num_validation_images} images of {args.validation_prompt!r}.")
    pipeline = pipeline.to(accelerator.device)
    pipeline.set_progress_bar_config(disable=True)
    generator = None if args.seed is None else torch.Generator(device=accelerator.device).manual_seed(args.seed)
    inputs = [{"num_inference_steps": steps}] * args.num_validation_images
    if paths := vars(args).get("validation_images"):  # the SD script's, for pipelines that take an image
        inputs = [{"image": Image.open(path)} for path in paths]
    in_training = [part for part in pipeline.components.values() if isinstance(part, nn.Module) and part.training]
    for part in in_training:  # an adapter's dropout is not for samples
        part.eval()
    with accelerator.autocast(), torch.compiler.set_stance("force_eager"):  # compiled for training, not for this
        images = [pipeline(**prompt, **extra, generator=generator).images[0] for extra in inputs]
    for part in in_training:
        part.train()
    return images


def log_images(
    accelerator: Accelerator, images: list[Image.Image], prompt: str, step: int, name: str = "validation"
) -> None:
    """Hands images to the trackers that take them, under `name`."""
    for tracker in accelerator.trackers if images else ():
        if tracker.name == "tensorboard":
            pixels = np.stack([np.asarray(image) for image in images])
            tracker.writer.add_images(name, pixels, step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({name: images}, step=step, caption=[prompt] * len(images))
