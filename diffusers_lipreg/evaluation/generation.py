"""Generate images, each from a seed of its own.

Batches and interruptions change nothing, except that sums are rounded differently in batches of another size.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import SchedulerMixin
from tqdm.auto import tqdm

from ..dreambooth.validation import set_scheduler
from ..errors import RunError
from ..loading import networks, one_line_errors

SETTINGS = "settings.json"


class Sampling(NamedTuple):
    """How images are generated: the same for every pipeline."""

    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    resolution: int | None = None  # pixels; None: the pipeline's own
    batch_size: int = 4
    seed: int = 0

    @property
    def call(self) -> dict[str, Any]:
        """The pipeline's arguments except for prompts and generators."""
        size = {} if self.resolution is None else {"height": self.resolution, "width": self.resolution}
        return {"num_inference_steps": self.num_inference_steps, "guidance_scale": self.guidance_scale, **size}


class ImageSpec(NamedTuple):
    """One image to have: the `number`-th of its prompt, and its file, which may not exist yet."""

    prompt: str
    number: int
    path: Path

    def seed(self, seed: int) -> int:
        """Return the seed of its noise: equal for all pipelines, different for every prompt, number and `--seed`."""
        return int.from_bytes(sha256(f"{seed} {self.number} {self.prompt}".encode()).digest()[:6], "big")


def image_specs(folder: Path, prompts: Sequence[str], images: int) -> list[list[ImageSpec]]:
    """Return the images of each prompt in a folder. File names tell prompt and number."""

    def spec(prompt: str, number: int) -> ImageSpec:
        return ImageSpec(prompt, number, folder / f"{file_name(prompt)}-{number}.png")

    return [[spec(prompt, number) for number in range(images)] for prompt in prompts]


def file_name(text: str) -> str:
    """Return a file name for any text, 69 characters at most: its letters and digits, and a checksum."""
    words = "".join(letter if letter.isalnum() and letter.isascii() else "-" for letter in text)
    return f"{words[:60]}-{sha256(text.encode()).hexdigest()[:8]}"


def generate(
    pipeline: Any, prompts: Sequence[str], generators: Sequence[torch.Generator], **options: Any
) -> list[Any]:
    """Return one image for each prompt. Noise comes from the CPU, where it is the same for every device.

    Raises:
        RunError: The pipeline cannot be called like this, or there is too little memory.
    """
    pipeline.set_progress_bar_config(disable=True)
    with one_line_errors(f"a {type(pipeline).__name__} of --base cannot make {len(prompts)} images with these flags"):
        return pipeline(list(prompts), generator=list(generators), **options).images


def generate_images(
    pipeline: Any, folder: Path, specs: Sequence[ImageSpec], sampling: Sampling, device: torch.device, label: str
) -> None:
    """Generate those images of a folder that are missing.

    An image gets its name when it is complete. The folder keeps the settings that its images were generated with.

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
                write_whole(spec.path, partial(image.save, format="PNG"))
            bar.update(len(batch))


def settings_of(pipeline: Any, sampling: Sampling) -> dict[str, Any]:
    """Return everything that an image depends on besides its prompt and number."""
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
    checksum = 0
    for part in networks(pipeline).values():
        for name, tensor in part.state_dict().items():
            data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            checksum = zlib.crc32(data, zlib.crc32(name.encode(), checksum))
    return f"{checksum:08x}"


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write the settings of a folder's images, or compare them with those that are there."""
    folder.mkdir(parents=True, exist_ok=True)
    file, kept = folder / SETTINGS, settings
    if any(folder.glob("*.png")):
        with one_line_errors(f"{file}: it cannot be read. Remove {folder} to generate its images again"):
            kept = dict(json.loads(file.read_text(encoding="utf-8")))
    for name in sorted(kept.keys() | settings.keys()):
        if kept.get(name) != settings.get(name):
            raise RunError(
                f"{folder}: its images were generated with another {name} ({kept.get(name)}, now {settings.get(name)}). "
                "Choose another --output_dir, or remove that folder to generate them again."
            )
    text = json.dumps(settings, indent=2) + "\n"
    write_whole(file, lambda path: path.write_text(text, encoding="utf-8"))


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under a hidden name and then rename it, so that it is complete or missing."""
    hidden = path.with_name(f".{path.name}")
    write(hidden)
    os.replace(hidden, path)


def use_scheduler(pipeline: Any, name: str | None) -> Any:
    """Return the pipeline, with diffusers' scheduler class `name` instead of its own if a name is given."""
    if name is not None:
        with one_line_errors(f"--scheduler {name}: it does not fit --base"):
            if not issubclass(getattr(diffusers, name), SchedulerMixin):
                raise TypeError("it is no scheduler")
            set_scheduler(pipeline, name)
    return pipeline
