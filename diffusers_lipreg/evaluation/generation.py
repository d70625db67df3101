"""Pipelines, and the images they draw: each from a seed of its own.

So batches and interruptions change nothing, but for the rounding of sums, which depends on the size of a batch.
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

import torch
from tqdm.auto import tqdm

from ..dreambooth.validation import set_scheduler
from ..errors import RunError, one_line
from ..loading import networks

SETTINGS = "settings.json"


class Sampling(NamedTuple):
    """How images are drawn: the same for every pipeline."""

    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    resolution: int | None = None  # pixels; None: the pipeline's own
    batch_size: int = 4
    seed: int = 0

    @property
    def call(self) -> dict[str, Any]:
        """The pipeline's arguments beside prompt and noise."""
        size = {} if self.resolution is None else {"height": self.resolution, "width": self.resolution}
        return {"num_inference_steps": self.num_inference_steps, "guidance_scale": self.guidance_scale, **size}


def fingerprint(pipeline: Any) -> str:
    """A checksum of all weights of a pipeline, to know again what drew an image."""
    checksum = 0
    for part in networks(pipeline).values():
        for name, tensor in part.state_dict().items():
            data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            checksum = zlib.crc32(data, zlib.crc32(name.encode(), checksum))
    return f"{checksum:08x}"


class Drawing(NamedTuple):
    """One image to have: the `number`-th of its prompt."""

    prompt: str
    number: int
    path: Path

    def seed(self, seed: int) -> int:
        """The seed of its noise: the same with every pipeline, another for every prompt, number and `--seed`."""
        return int.from_bytes(sha256(f"{seed} {self.number} {self.prompt}".encode()).digest()[:6], "big")


def drawings(folder: Path, prompts: Sequence[str], images: int) -> list[list[Drawing]]:
    """The images of each prompt in a folder, there or not: file names say prompt and number."""

    def path(prompt: str, number: int) -> Path:
        words = "".join(letter if letter.isalnum() else "-" for letter in prompt)[:60]
        return folder / f"{words}-{sha256(prompt.encode()).hexdigest()[:8]}-{number}.png"

    return [[Drawing(prompt, number, path(prompt, number)) for number in range(images)] for prompt in prompts]


def settings_of(pipeline: Any, how: Sampling) -> dict[str, Any]:
    """All that an image depends on beside its prompt and number."""
    scheduler = {name: value for name, value in pipeline.scheduler.config.items() if not name.startswith("_")}
    return {
        **how.call,
        "seed": how.seed,
        "scheduler": type(pipeline.scheduler).__name__,
        "scheduler_config": json.dumps(scheduler, sort_keys=True, default=str),
        "dtype": str(pipeline.dtype),
        "weights": fingerprint(pipeline),
    }


def draw(pipeline: Any, folder: Path, wanted: Sequence[Drawing], how: Sampling, device: torch.device, label: str) -> None:
    """Draws those images of a folder that are not there yet.

    An image gets its name when it is whole. The folder keeps what its images were drawn with; noise comes from
    generators on the CPU, so that it is the same on every device.

    Raises:
        RunError: The folder's images were drawn with other weights or settings.
    """
    _keep_settings(folder, settings_of(pipeline, how))
    wanted = list(dict.fromkeys(wanted))  # subjects of one class share images of the base
    missing = [drawing for drawing in wanted if not drawing.path.is_file()]
    pipeline.set_progress_bar_config(disable=True)
    if missing:
        pipeline.to(device)
    with tqdm(total=len(wanted), initial=len(wanted) - len(missing), desc=label, unit="image") as bar:
        for start in range(0, len(missing), how.batch_size):
            batch = missing[start : start + how.batch_size]
            generators = [torch.Generator().manual_seed(drawing.seed(how.seed)) for drawing in batch]
            prompts = [drawing.prompt for drawing in batch]
            images = pipeline(prompts, generator=generators, **how.call).images
            for drawing, image in zip(batch, images, strict=True):
                write_whole(drawing.path, partial(image.save, format="PNG"))
            bar.update(len(batch))


def _keep_settings(folder: Path, settings: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / SETTINGS
    kept = json.loads(file.read_text()) if file.is_file() else settings
    for name in sorted(kept.keys() | settings.keys()):
        if kept.get(name) != settings.get(name):
            raise RunError(
                f"{folder}: the images in it were drawn with another {name} ({kept.get(name)}, now {settings.get(name)}). "
                "Choose another --output_dir, or remove that folder to draw them anew."
            )
    write_whole(file, lambda path: path.write_text(json.dumps(settings, indent=2) + "\n"))


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file under a hidden name and then gives it its own, so that it is whole or not there."""
    hidden = path.with_name(f".{path.name}")
    write(hidden)
    os.replace(hidden, path)


def use_scheduler(pipeline: Any, name: str | None) -> Any:
    """The pipeline, with the scheduler class `name` of diffusers in place of its own if there is a name."""
    if name is not None:
        try:
            set_scheduler(pipeline, name)
        except (AttributeError, ValueError, TypeError) as error:
            raise RunError(f"--scheduler {name}: {one_line(error)}") from error
    return pipeline
