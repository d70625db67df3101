"""Generate images, each from a seed of its own.

Neither an interruption nor the batch size changes an image, except for rounding in batches of another size.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import SchedulerMixin
from PIL import Image
from tqdm.auto import tqdm

from ..dreambooth.validation import set_scheduler
from ..errors import RunError
from ..loading import networks, one_line_errors

SETTINGS = "settings.json"


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
    """An image to generate, the `number`-th of its prompt, and its file."""

    prompt: str
    number: int
    path: Path

    def seed(self, seed: int) -> int:
        """Return the seed of its noise, which depends on prompt, number and `--seed`, but not on the pipeline."""
        return int.from_bytes(sha256(f"{seed} {self.number} {self.prompt}".encode()).digest()[:6], "big")


def image_specs(folder: Path, prompts: Sequence[str], images: int) -> list[list[ImageSpec]]:
    """Return `images` specs for each prompt, with files in `folder` that are named after prompt and number."""
    return [
        [ImageSpec(prompt, number, folder / f"{file_name(prompt)}-{number}.png") for number in range(images)]
        for prompt in prompts
    ]


def file_name(text: str) -> str:
    """Return a file name of at most 69 characters for any text: its letters, digits and checksum."""
    words = "".join(letter if letter.isalnum() and letter.isascii() else "-" for letter in text)
    return f"{words[:60]}-{sha256(text.encode()).hexdigest()[:8]}"


def generate(pipeline: Any, prompts: list[str], generators: list[torch.Generator], **options: Any) -> list[Any]:
    """Return one image for each prompt. CPU generators give the same noise on every device.

    Raises:
        RunError: The pipeline cannot be called like this, or there is too little memory.
    """
    pipeline.set_progress_bar_config(disable=True)
    with one_line_errors(f"a {type(pipeline).__name__} of --base cannot make {len(prompts)} images with these flags"):
        return pipeline(prompts, generator=generators, **options).images


def generate_images(
    pipeline: Any, folder: Path, specs: Sequence[ImageSpec], sampling: Sampling, device: torch.device, label: str
) -> None:
    """Generate the images that are missing in `folder`, which keeps their settings in a file.

    Raises:
        RunError: The folder's images were generated with other weights or settings.
    """
    _check_settings(folder, settings_of(pipeline, sampling))
    specs = list(dict.fromkeys(specs))  # subjects of one class share images of the base
    missing = [spec for spec in specs if not spec.path.is_file()]
    if missing:
        pipeline.to(device)
    with tqdm(total=len(specs), initial=len(specs) - len(missing), desc=label, unit="image") as bar:
        for start in range(0, len(missing), sampling.batch_size):
            batch = missing[start : start + sampling.batch_size]
            generators = [torch.Generator().manual_seed(spec.seed(sampling.seed)) for spec in batch]
            images = generate(pipeline, [spec.prompt for spec in batch], generators, **sampling.call)
            for spec, image in zip(batch, images, strict=True):
                write_whole(spec.path, image)
            bar.update(len(batch))


def settings_of(pipeline: Any, sampling: Sampling) -> dict[str, Any]:
    """Return everything except prompt and number that an image depends on."""
    scheduler = {name: value for name, value in pipeline.scheduler.config.items() if not name.startswith("_")}
    return {
        **sampling.call,
        "seed": sampling.seed,
        "scheduler": type(pipeline.scheduler).__name__,
        "scheduler_config": json.dumps(scheduler, sort_keys=True, default=str),
        "dtype": str(pipeline.dtype),
        "weights": _checksum(pipeline),
    }


def _checksum(pipeline: Any) -> str:
    """Return a checksum of the names and values of all weights."""
    checksum = 0
    for part in networks(pipeline).values():
        for name, tensor in part.state_dict().items():
            data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            checksum = zlib.crc32(data, zlib.crc32(name.encode(), checksum))
    return f"{checksum:08x}"


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write the settings of a folder's images, and refuse a folder whose images have others."""
    folder.mkdir(parents=True, exist_ok=True)
    file, stored = folder / SETTINGS, settings
    if any(folder.glob("*.png")):
        with one_line_errors(f"{file}: it cannot be read. Remove {folder} to generate its images again"):
            stored = dict(json.loads(file.read_text(encoding="utf-8")))
    for name in sorted(stored.keys() | settings.keys()):
        old, new = stored.get(name), settings.get(name)
        if old != new:
            raise RunError(
                f"{folder}: its images were generated with another {name} ({old}, now {new}). "
                "Choose another --output_dir, or remove that folder to generate them again."
            )
    write_whole(file, json.dumps(settings, indent=2) + "\n")


def write_whole(path: Path, content: Image.Image | str) -> None:
    """Write a file under a hidden name, then rename it: an interruption leaves no part of a file."""
    hidden = path.with_name(f".{path.name}")
    if isinstance(content, str):
        hidden.write_text(content, encoding="utf-8")
    else:
        content.save(hidden, format="PNG")
    os.replace(hidden, path)


def use_scheduler(pipeline: Any, name: str | None) -> Any:
    """Return the pipeline, with a scheduler of diffusers' class `name` if a name is given."""
    if name is not None:
        with one_line_errors(f"--scheduler {name}: it does not fit --base"):
            if not issubclass(getattr(diffusers, name), SchedulerMixin):
                raise TypeError("it is no scheduler")
            set_scheduler(pipeline, name)
    return pipeline
