"""Images to latents by the VAE: at each step, or once for the whole run where no image ever changes.

The VAE answers an image with the mean and log variance of its latents; training draws anew from these at each step. So
the moments may be kept, and the same random numbers give the same latents.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import release_memory
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import RunError
from .data import DreamBoothDataset, Layouts, PhotoTransform, PreparedPhotos, first_random_crop


def encode(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Moments (B, 2C, h, w), means before log variances, of pixels (B, 3, H, W); on the VAE's device, in its type."""
    return vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.parameters


def draw(vae: AutoencoderKL, batch: dict) -> Tensor:
    """Latents (B, C, h, w) of a batch, not yet scaled; its "moments" are made of its "pixel_values" where it has none."""
    return DiagonalGaussianDistribution(
        batch["moments"] if "moments" in batch else encode(vae, batch["pixel_values"])
    ).sample()


def of_crops(vae: AutoencoderKL | None, pixels: Tensor, device: torch.device) -> dict[str, Tensor]:
    """Pixels (B, 3, H, W) as a batch that needs no VAE any more."""
    if vae is None:
        return {"pixel_values": pixels.to(device)}
    with torch.no_grad():
        return {"moments": encode(vae, pixels)}


def cache(
    args: Namespace, accelerator: Accelerator, vae: AutoencoderKL, dataset: DreamBoothDataset | PreparedPhotos
) -> Layouts:
    """Puts moments in place of the pixels in the data set, and frees the VAE's weights; its configuration stays.

    Moments are kept in host memory: class images may be a thousand, and a batch of them is small. Returns the layouts
    of the batches that the VAE would have made.
    """
    last = len(dataset) % args.train_batch_size * halves(args)  # the images of an epoch's last batch, 0: as in others
    layouts = {size: layout(vae, size, args.resolution) for size in {rows(args), last} - {0}}
    hidden = not accelerator.is_local_main_process
    with tqdm(desc="Encoding images", disable=hidden) as progress:
        dataset.encode(lambda images: encode_all(vae, images, rows(args), progress))
    vae.to("meta")
    release_memory()
    return layouts


@torch.no_grad()
def layout(vae: AutoencoderKL, batch_size: int, size: int) -> torch.memory_format:
    """The order in memory of the moments of a batch, which on the CPU depends on its size."""
    empty = torch.zeros(batch_size, 3, size, size)
    last = encode(vae, empty).is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def dropped(vae: AutoencoderKL) -> bool:
    """Whether `cache` has freed the weights."""
    return vae.device.type == "meta"


@torch.no_grad()
def encode_all(vae: AutoencoderKL, images: Iterable[Tensor], batch_size: int, progress: tqdm) -> Iterator[Tensor]:
    """Moments (2C, h, w), in host memory, of each of the pixels (3, H, W).

    They are encoded in batches of the size that training has, the last one filled up: other shapes may round otherwise.
    """
    images = iter(images)
    while group := list(islice(images, batch_size)):
        filled = torch.stack(group + group[-1:] * (batch_size - len(group)))
        yield from encode(vae, filled).cpu()[: len(group)].unbind()
        progress.update(len(group))


def cacheable(args: Namespace, images: int, cropped: Sequence[Path], transform: PhotoTransform, has_vae: bool) -> bool:
    """Whether moments are kept: by default where nothing but time changes, and where there are fewer images than visits.

    Args:
        images: How many there are to encode.
        cropped: Those that `transform` is applied to at each visit.

    Raises:
        RunError: `--cache_latents` asks for what would change the run.
    """
    if args.cache_latents is False or (args.cache_latents is None and not has_vae):
        return False
    if not has_vae:
        raise RunError("--cache_latents: this pipeline diffuses pixels, it has no latents. Leave the flag out.")
    moving = first_random_crop(cropped, transform)
    if args.cache_latents and moving is not None:
        raise RunError(
            f"--cache_latents: {moving} is no square, and cropped at random whenever it is seen. Add --center_crop, or "
            "leave the flag out: what can be kept without changing the run is kept anyway."
        )
    return moving is None and (args.cache_latents is True or images <= visits(args))


def visits(args: Namespace) -> float:
    """How many images a process would encode in the run without a cache."""
    if args.max_train_steps is None:
        return float("inf")  # whole epochs
    return args.max_train_steps * args.gradient_accumulation_steps * rows(args)


def rows(args: Namespace) -> int:
    """Images in a full batch."""
    return args.train_batch_size * halves(args)


def halves(args: Namespace) -> int:
    """2 where a batch has class images beside the photos."""
    return 2 if args.with_prior_preservation else 1
