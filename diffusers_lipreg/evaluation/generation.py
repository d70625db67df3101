"""Generate images, each from a seed of its own.

Neither an interruption nor the batch size changes an image, except for rounding in batches of another size.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from ..loading import networks, one_line_errors
from .prompts import Subject

CLASS_IMAGES = 16  # images of the class alone


class Sampling(NamedTuple):
    """Settings of the images, the same for every pipeline."""

    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    resolution: int | None = None  # pixels; None: the pipeline's own
    batch_size: int = 4
    seed: int = 0
    dtype: torch.dtype = torch.float32

    @property
    def call(self) -> dict[str, Any]:
        """The pipeline's arguments except for prompts and generators."""
        size = {} if self.resolution is None else {"height": self.resolution, "width": self.resolution}
        return {"num_inference_steps": self.num_inference_steps, "guidance_scale": self.guidance_scale, **size}


class ImageSpec(NamedTuple):
    """An image to generate, the `number`-th of its prompt."""

    prompt: str
    number: int

    def path(self, folder: Path) -> Path:
        """Return its file, whose name has at most 90 characters; a checksum in it tells similar prompts apart."""
        words = re.sub(r"[^a-zA-Z0-9]", "-", self.prompt[:60])
        return folder / f"{words}-{sha256(self.prompt.encode()).hexdigest()[:8]}-{self.number}.png"

    def generator(self, seed: int) -> torch.Generator:
        """Return the source of its noise, which depends on `seed`, prompt and number, but not on pipeline or device."""
        digest = sha256(f"{seed} {self.number} {self.prompt}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:6], "big"))


class ImageSet(NamedTuple):
    """The images of a subject, the same for the base and the personalized pipeline: a row for each prompt."""

    subject: list[list[ImageSpec]]
    of_class: list[list[ImageSpec]]  # one prompt, with the class alone
    unrelated: list[list[ImageSpec]]  # prompts that have nothing to do with the subject


class SubjectFiles(NamedTuple):
    """The photos of a subject, and the images that were generated."""

    photos: Sequence[Path]
    images: ImageSet
    folders: Mapping[str, Path]  # those of the `base` and the `personalized` pipeline


def image_set(subject: Subject, unrelated: Sequence[str], images_per_prompt: int) -> ImageSet:
    def rows(prompts: Sequence[str], count: int) -> list[list[ImageSpec]]:
        return [[ImageSpec(prompt, number) for number in range(count)] for prompt in prompts]

    return ImageSet(
        rows(subject.prompts, images_per_prompt),
        rows([subject.class_prompt], CLASS_IMAGES),
        rows(unrelated, images_per_prompt),
    )


def generate(pipeline: Any, prompts: list[str], generators: list[torch.Generator], **options: Any) -> list[Any]:
    """Return one image for each prompt.

    Raises:
        RunError: The pipeline cannot be called like this, or there is too little memory.
    """
    pipeline.set_progress_bar_config(disable=True)
    with one_line_errors(f"a {type(pipeline).__name__} of --base cannot make {len(prompts)} images with these flags"):
        return pipeline(prompts, generator=generators, **options).images


def image_folder(folder: Path, pipeline: Any, sampling: Sampling) -> Path:
    """Return `folder` with a checksum in its name, which keeps images of other weights or settings apart.

    Take it before adapters are merged: rounding may differ from run to run.
    """
    settings = repr((sampling.call, sampling.seed, sampling.dtype, pipeline.scheduler))
    checksum = zlib.crc32(settings.encode())
    for part in networks(pipeline).values():
        for name, tensor in part.state_dict().items():
            data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            checksum = zlib.crc32(data, zlib.crc32(name.encode(), checksum))
    return folder.with_name(f"{folder.name}-{checksum:08x}")


def generate_images(
    pipeline: Any, folder: Path, sets: Iterable[ImageSet], sampling: Sampling, device: torch.device
) -> None:
    """Generate the images that are not in `folder` yet."""
    folder.mkdir(parents=True, exist_ok=True)
    # Subjects of one class share images of the base.
    images = list(dict.fromkeys(image for image_set in sets for rows in image_set for row in rows for image in row))
    missing = [image for image in images if not image.path(folder).is_file()]
    if missing:
        pipeline.to(device, sampling.dtype)
    done, label = len(images) - len(missing), f"images in {folder.name}"
    with tqdm(total=len(images), initial=done, desc=label, unit="image") as bar:
        for start in range(0, len(missing), sampling.batch_size):
            batch = missing[start : start + sampling.batch_size]
            generators = [image.generator(sampling.seed) for image in batch]
            results = generate(pipeline, [image.prompt for image in batch], generators, **sampling.call)
            for image, result in zip(batch, results, strict=True):
                result.save(folder / ".part", format="PNG")
                os.replace(folder / ".part", image.path(folder))  # an interruption leaves no part of an image
            bar.update(len(batch))
