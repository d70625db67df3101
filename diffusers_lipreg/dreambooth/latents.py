"""Encode images to latents, at each step, or once for the whole run where no image ever changes.

The VAE gives the mean and the log variance of an image's latents, its moments. Training samples new latents from them at
each step, so kept moments and the same random numbers give the same latents.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import release_memory
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import RunError
from . import data, images


def encode_moments(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Return moments (B, 2C, h, w), means before log variances, of pixels (B, 3, H, W), on the VAE's device."""
    return vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.parameters


def sample_latents(vae: AutoencoderKL, batch: dict) -> Tensor:
    """Sample latents (B, C, h, w), not yet scaled, from a batch's "moments", or from those of its "pixel_values"."""
    moments = batch["moments"] if "moments" in batch else encode_moments(vae, batch["pixel_values"])
    return DiagonalGaussianDistribution(moments).sample()


@torch.no_grad()
def held_out_batch(
    vae: AutoencoderKL | None, photos: Sequence[data.Photo], size: int, device: torch.device
) -> dict[str, Any]:
    """Return a batch of the middle four fifths of up to four photos, which needs no VAE from here on.

    Training sees the photos, but never so close. Call it before `cache_latents`, which frees the VAE.
    """
    photos, crops = photos[:4], []
    transform = images.PhotoTransform(size, center_crop=True)
    for photo in photos:
        image = photo.open()
        left, top = image.width // 10, image.height // 10
        crops.append(transform(image.crop((left, top, image.width - left, image.height - top))))
        del image  # one original at a time is in memory
    pixels = torch.stack(crops)
    batch = {"pixel_values": pixels.to(device)} if vae is None else {"moments": encode_moments(vae, pixels)}
    time_ids = torch.tensor([[size, size, 0, 0, size, size]] * len(photos))
    prompts = [photo.prompt for photo in photos]
    return batch | {"prompts": prompts, "time_ids": time_ids, "has_class_images": False}


def should_cache_latents(
    args: Namespace, number: int, cropped: Sequence[Path], transform: images.PhotoTransform, has_vae: bool
) -> bool:
    """Tell whether to encode images once: by default only if that cannot change the result and saves encodings.

    `number` is that of all images, of which `transform` crops those of `cropped` again each time.
    """
    if args.cache_latents is False:
        return False
    obstacle = None
    if not has_vae:
        obstacle = "this pipeline diffuses pixels, it has no latents. Leave the flag out."
    elif random_crop := images.first_random_crop(cropped, transform):
        obstacle = (
            f"{random_crop} is no square, and cropped at random whenever it is seen. Add --center_crop, or leave the "
            "flag out: what can be kept without changing the run is kept anyway."
        )
    if args.cache_latents and obstacle is not None:
        raise RunError(f"--cache_latents: {obstacle}")
    if obstacle is not None:
        return False
    if args.cache_latents or args.max_train_steps is None:  # whole epochs see every image
        return True
    return number <= args.max_train_steps * args.gradient_accumulation_steps * images_per_batch(args)


def cache_latents(
    args: Namespace,
    accelerator: Accelerator,
    vae: AutoencoderKL,
    dataset: data.DreamBoothDataset | data.SDXLDreamBoothDataset,
) -> data.MemoryFormats:
    """Replace the data set's pixels by moments in host memory, and free the VAE's weights; its configuration stays.

    Returns the memory format of the moments that the VAE makes of a full batch and of the last batch of an epoch.
    """
    full, photos_left = images_per_batch(args), len(dataset) % args.train_batch_size
    sizes = {full, photos_left * full // args.train_batch_size} - {0}
    memory_formats = {size: _memory_format(vae, size, args.resolution) for size in sizes}
    with tqdm(desc="Encoding images", disable=not accelerator.is_local_main_process) as progress:
        dataset.encode(lambda pixels: _encode_all(vae, pixels, full, progress))
    vae.to("meta")
    release_memory()
    return memory_formats


def is_freed(vae: AutoencoderKL) -> bool:
    """Tell whether `cache_latents` has freed the weights."""
    return vae.device.type == "meta"


def images_per_batch(args: Namespace) -> int:
    """Return the number of images in a full batch, class images included."""
    return args.train_batch_size * (2 if args.with_prior_preservation else 1)


@torch.no_grad()
def _memory_format(vae: AutoencoderKL, batch_size: int, size: int) -> torch.memory_format:
    """Return the memory format of the moments of a batch, which depends on its size on the CPU."""
    moments = encode_moments(vae, torch.zeros(batch_size, 3, size, size))
    last = moments.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


@torch.no_grad()
def _encode_all(vae: AutoencoderKL, pixels: Iterable[Tensor], batch_size: int, progress: tqdm) -> Iterator[Tensor]:
    """Yield the moments (2C, h, w), in host memory, of each of the pixels (3, H, W).

    Every batch is filled up to the size that training has: the VAE rounds differently in other shapes.
    """
    pixels_left = iter(pixels)
    while group := list(islice(pixels_left, batch_size)):
        filled = torch.stack(group + group[-1:] * (batch_size - len(group)))
        yield from encode_moments(vae, filled).cpu()[: len(group)].unbind()
        progress.update(len(group))
