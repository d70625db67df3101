"""Hold photos, their prompts and class images as data sets, and stack their items to batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .images import PhotoTransform

Encode = Callable[[Iterable[Tensor]], Iterable[Tensor]]  # pixels (3, size, size) to moments (2C, h, w)
MemoryFormats = Mapping[int, torch.memory_format]  # by batch size


class Photo(NamedTuple):
    """An instance photo and its prompt. `open` decodes it at each call, since photos may be large and many."""

    open: Callable[[], Image.Image]
    prompt: str
    path: Path | None = None  # None in a data set


class DreamBoothDataset(Dataset):
    """Photos of a folder with their prompts, and class images for prior preservation; the shorter list starts over.

    An item is {"instance": (3, size, size), "prompt": str}, and with class images "class": (3, size, size).
    """

    def __init__(self, photos: Sequence[Photo], class_images: Sequence[Path], transform: PhotoTransform) -> None:
        self.items: list[dict[str, Any]] = [{"instance": photo.path, "prompt": photo.prompt} for photo in photos]
        self.class_images = class_images
        self.load: Callable[[Path], Tensor] = transform.load

    def encode(self, encode: Encode) -> None:
        """Replace the pixels of all images by what `encode` makes of them."""
        self.load = precompute([*(item["instance"] for item in self.items), *self.class_images], self.load, encode)

    def instance(self, index: int) -> dict[str, Any]:
        """Return an item without its class image."""
        item = self.items[index]
        return {**item, "instance": self.load(item["instance"])}

    def __len__(self) -> int:
        return max(len(self.items), len(self.class_images))

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.instance(index % len(self.items))
        if self.class_images:
            item["class"] = self.load(self.class_images[index % len(self.class_images)])
        return item


class SDXLDreamBoothDataset(DreamBoothDataset):
    """Photos that are cropped once for the whole run; class images are cropped again each time, and never mirrored.

    Items have "time_ids", too: original height, original width, top, left, size, size.
    """

    def __init__(
        self, photos: Iterable[Photo], repeats: int, class_images: Sequence[Path], transform: PhotoTransform
    ) -> None:
        super().__init__([], class_images, replace(transform, random_flip=False))
        for photo in photos:
            image = photo.open()
            for _ in range(repeats):
                pixels, corner = transform.crop(image)
                time_ids = (image.height, image.width, *corner, transform.size, transform.size)
                self.items.append({"instance": pixels, "prompt": photo.prompt, "time_ids": time_ids})
            del image  # one original at a time is in memory

    def encode(self, encode: Encode) -> None:
        """Replace the pixels of all images by what `encode` makes of them."""
        for item, instance in zip(self.items, encode(item["instance"] for item in self.items), strict=True):
            item["instance"] = instance
        self.load = precompute(self.class_images, self.load, encode)

    def instance(self, index: int) -> dict[str, Any]:
        """Return an item without its class image."""
        return dict(self.items[index])


def precompute(images: Sequence[Path], load: Callable[[Path], Tensor], encode: Encode) -> Callable[[Path], Tensor]:
    """Return a loader like `load`, but of encodings that are made here, once for each image."""
    images = list(dict.fromkeys(images))
    return dict(zip(images, encode(map(load, images)), strict=True)).__getitem__


def collate(
    items: Sequence[dict[str, Any]], memory_formats: MemoryFormats | None = None, class_prompt: str | None = None
) -> dict[str, Any]:
    """Stack items to a batch, all instance photos before all class images, whose prompt is `class_prompt`.

    Returns "pixel_values" (B, 3, size, size), or "moments" (B, 2C, h, w) if there are `memory_formats`: the memory format for
    each number of images, in which noise will be drawn. "prompts" are B texts, and "has_class_images" is a bool. Class
    images get the "time_ids" (B, 6) of the photos.
    """
    images = torch.stack([item[kind] for kind in ("instance", "class") for item in items if kind in item])
    batch: dict[str, Any] = {"pixel_values": images}
    if memory_formats is not None:
        batch = {"moments": images.contiguous(memory_format=memory_formats[len(images)])}
    batch["has_class_images"] = len(images) > len(items)
    batch["prompts"] = [item["prompt"] for item in items] + [class_prompt] * (len(images) - len(items))
    if "time_ids" in items[0]:
        batch["time_ids"] = torch.tensor([item["time_ids"] for item in items] * (len(images) // len(items)))
    return batch
