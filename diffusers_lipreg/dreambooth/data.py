"""Photos from a folder to batches, with the pixels and random draws of the official scripts, without torchvision."""

from __future__ import annotations

import json
import random
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from datasets import Image as ImageFeature
from datasets import load_dataset
from diffusers import AutoencoderKL
from PIL import Image
from PIL.ImageOps import exif_transpose
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, get_worker_info

from ..errors import RunError, one_line
from .interruption import ignore_signals

logger = get_logger(__name__)
# What Pillow's decoders raise on damaged files; AVIF's raises RuntimeError.
UNREADABLE = (OSError, RuntimeError, SyntaxError, ValueError, Image.DecompressionBombError)
Encode = Callable[[Iterable[Tensor]], Iterable[Tensor]]  # of pixels (3, size, size) moments (2C, h, w)
Layouts = Mapping[int, torch.memory_format]  # by batch size


def as_photo(image: Image.Image) -> Image.Image:
    """The image as RGB, turned the way its EXIF data says; a strip, which would be huge when resized, is a ValueError."""
    if max(image.size) > 100 * min(image.size):
        raise ValueError(f"{image.width} x {image.height} pixels, one side more than 100 times the other")
    image = exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits a pixel: convert would cut them off at 255, which leaves white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def open_image(path: str | Path) -> Image.Image:
    """The file as `as_photo` has it; raises one of `UNREADABLE`."""
    with Image.open(path) as image:
        return as_photo(image)


def list_images(folder: str | Path) -> list[Path]:
    """The images of a folder in the order of their names; sub-folders and hidden files are passed over.

    Every image is decoded once: a broken one is left out here, with a warning, and not met in mid-run.
    """
    images = []
    try:
        paths = sorted(Path(folder).iterdir())
    except OSError as error:
        raise RunError(f"{folder}: cannot be read ({error.strerror}).") from error
    for path in paths:
        if path.name.startswith(".") or not path.is_file():
            continue
        try:
            open_image(path)
        except UNREADABLE as error:
            logger.warning(f"Skipped {path}: not an image that can be read ({type(error).__name__}: {error}).")
        else:
            images.append(path)
    return images


def find_instance_images(folder: str | Path, flag: str = "--instance_data_dir") -> list[Path]:
    """As `list_images`, of a folder that has to be there and hold at least one image; `flag` is where it was named."""
    if not Path(folder).is_dir():
        raise RunError(f"{flag} {folder}: there is no such folder.")
    images = list_images(folder)
    if not images:
        raise RunError(f"{flag} {folder}: there is no image in it that can be read.")
    return images


class PhotoTransform:
    """Resize the short side, crop a square, scale to [-1, 1]: a (3, size, size) float32 tensor.

    A random crop draws two numbers from torch's default generator, row then column, or none when the resized photo is
    the square already: as torchvision, on which the official scripts' random stream rests.
    """

    def __init__(self, size: int, center_crop: bool, interpolation: str = "bilinear", random_flip: bool = False) -> None:
        self.size = size
        self.center_crop = center_crop
        self.interpolation = interpolation
        # To PIL, nearest is what torchvision calls nearest_exact, and the other one there is the same on images.
        self.resampling = Image.Resampling[interpolation.removesuffix("_exact").upper()]
        self.random_flip = random_flip

    def without_flip(self) -> PhotoTransform:
        """The same for class images, which are never mirrored."""
        return PhotoTransform(self.size, self.center_crop, self.interpolation)

    def __call__(self, image: Image.Image) -> Tensor:
        return self.crop(image)[0]

    def crop(self, image: Image.Image) -> tuple[Tensor, tuple[int, int]]:
        """The tensor, and the row and column of the crop in the resized photo."""
        image = self.resize(image)
        if self.random_flip and random.random() < 0.5:
            torch.rand(1)  # torchvision's flip draws, even where it is certain
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        width, height = image.size
        if self.center_crop:
            top, left = round((height - self.size) / 2), round((width - self.size) / 2)
        elif (width, height) == (self.size, self.size):
            top, left = 0, 0
        else:
            top = int(torch.randint(0, height - self.size + 1, size=(1,)))
            left = int(torch.randint(0, width - self.size + 1, size=(1,)))
        image = image.crop((left, top, left + self.size, top + self.size))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return pixels.float().div_(255).sub_(0.5).div_(0.5), (top, left)

    def resize(self, image: Image.Image) -> Image.Image:
        size = self.resized(*image.size)
        return image if size == image.size else image.resize(size, self.resampling)

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height after `resize`."""
        if min(width, height) == self.size:
            return width, height
        if width < height:
            return self.size, int(self.size * height / width)
        return int(self.size * width / height), self.size


def first_random_crop(images: Sequence[Path], transform: PhotoTransform) -> Path | None:
    """The first of the files that the transform does not make the same pixels of each time; `None` if there is none."""
    if transform.center_crop:
        return None
    for path in images:
        with Image.open(path) as image:  # reads the header only
            width, height = transform.resized(*image.size)
        if width != height:
            return path
    return None


def latent_shape(vae: AutoencoderKL | None, size: int) -> tuple[int, int, int]:
    """What is denoised for images of `size` pixels: latents, or pixels where there is no VAE."""
    if vae is None:
        return (3, size, size)
    side = size // 2 ** (len(vae.config.block_out_channels) - 1)
    return (vae.config.latent_channels, side, side)


def held_out_crops(images: Iterable[Image.Image], size: int) -> Tensor:
    """The middle four fifths of photos, closer than any crop that is trained on: (B, 3, size, size) in [-1, 1]."""
    transform = PhotoTransform(size, center_crop=True)
    crops = []
    for image in images:
        width, height = image.size
        left, top = width // 10, height // 10
        crops.append(transform(image.crop((left, top, width - left, height - top))))
    return torch.stack(crops)


class DreamBoothDataset(Dataset):
    """Instance photos, each with a class image beside it where prior preservation asks for one.

    An item is {"instance": (3, size, size)} and perhaps {"class": (3, size, size)}. The shorter list starts over.
    """

    def __init__(
        self, instance_images: Sequence[Path], class_images: Sequence[Path], transform: PhotoTransform
    ) -> None:
        self.instance_images = instance_images
        self.class_images = class_images
        self.load: Callable[[Path], Tensor] = partial(load, transform)

    def encode(self, encode: Encode) -> None:
        """Puts what `encode` makes of the images in place of their pixels."""
        self.load = encoded([*self.instance_images, *self.class_images], self.load, encode)

    def __len__(self) -> int:
        return max(len(self.instance_images), len(self.class_images))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = {"instance": self.load(self.instance_images[index % len(self.instance_images)])}
        if self.class_images:
            item["class"] = self.load(self.class_images[index % len(self.class_images)])
        return item


def load(transform: PhotoTransform, path: Path) -> Tensor:
    """The transformed image of a file."""
    return transform(open_image(path))


def encoded(images: Sequence[Path], load: Callable[[Path], Tensor], encode: Encode) -> Callable[[Path], Tensor]:
    """`load`, but of what `encode` makes of the pixels, once."""
    images = list(dict.fromkeys(images))
    return dict(zip(images, encode(map(load, images)), strict=True)).__getitem__


def collate(items: Sequence[dict[str, Tensor]], layouts: Layouts | None = None) -> dict[str, Tensor]:
    """Stacks items to {"pixel_values": (B, 3, size, size)}: the instance half first, then the class half, if any.

    Of items with moments in place of pixels it makes {"moments": (B, 2C, h, w)}, in the order in memory that `layouts`
    has for their number: noise is drawn in that order.
    """
    images = torch.stack([item[kind] for kind in ("instance", "class") for item in items if kind in item])
    if layouts is None:
        return {"pixel_values": images}
    return {"moments": images.contiguous(memory_format=layouts[len(images)])}


class PreparedPhotos(Dataset):
    """Photos cropped once for the whole run, each with its prompt and with what SDXL is told of its size and crop.

    An item has "instance" (3, size, size), "prompt", "time_ids" (original height, original width, top, left, size,
    size) and, with prior preservation, "class", which is cropped anew each time. The shorter list starts over.
    """

    def __init__(
        self,
        photos: Iterable[tuple[Image.Image, str]],
        repeats: int,
        class_images: Sequence[Path],
        transform: PhotoTransform,
    ) -> None:
        self.items: list[dict] = []
        self.class_images = class_images
        self.load_class: Callable[[Path], Tensor] = partial(load, transform.without_flip())
        for image, prompt in photos:
            for _ in range(repeats):
                pixels, corner = transform.crop(image)
                time_ids = (image.height, image.width, *corner, transform.size, transform.size)
                self.items.append({"instance": pixels, "prompt": prompt, "time_ids": time_ids})

    def encode(self, encode: Encode) -> None:
        """Puts what `encode` makes of the images in place of their pixels."""
        for item, instance in zip(self.items, encode(item["instance"] for item in self.items), strict=True):
            item["instance"] = instance
        self.load_class = encoded(self.class_images, self.load_class, encode)

    def __len__(self) -> int:
        return max(len(self.items), len(self.class_images))

    def __getitem__(self, index: int) -> dict:
        item = dict(self.items[index % len(self.items)])
        if self.class_images:
            item["class"] = self.load_class(self.class_images[index % len(self.class_images)])
        return item


def collate_prepared(items: Sequence[dict], layouts: Layouts | None = None) -> dict:
    """As `collate`, with "prompts", a list of the instance half, and "time_ids" (B, 6), for both halves the same."""
    batch: dict = collate(items, layouts)
    batch["prompts"] = [item["prompt"] for item in items]
    batch["time_ids"] = torch.tensor([item["time_ids"] for item in items] * (2 if "class" in items[0] else 1))
    return batch


def photos_with_prompts(args: Namespace) -> list[tuple[Image.Image, str]]:
    """The photos of `--instance_data_dir` or `--dataset_name`, each with its caption or else `--instance_prompt`."""
    if args.dataset_name is not None:
        return _from_dataset(args)
    images = find_instance_images(args.instance_data_dir)
    captions = _folder_captions(args) if args.caption_column is not None else {}
    return [(open_image(path), captions.get(path.name) or args.instance_prompt) for path in images]


def _folder_captions(args: Namespace) -> dict[str, str]:
    """Captions by file name, from the metadata.jsonl beside the photos."""
    metadata = Path(args.instance_data_dir, "metadata.jsonl")
    if not metadata.is_file():
        raise RunError(f"--caption_column {args.caption_column}: there is no {metadata} to take captions from.")
    try:
        rows = [json.loads(line) for line in metadata.read_text(encoding="utf-8").splitlines() if line.strip()]
        columns = sorted({column for row in rows for column in row})
        captions = {row["file_name"]: row.get(args.caption_column, "") for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{metadata}: expected a JSON object with a file_name in each line ({error!r}).") from error
    _check_column(args.caption_column, columns, "--caption_column")
    return captions


def _from_dataset(args: Namespace) -> list[tuple[Image.Image, str]]:
    try:
        loaded = load_dataset(args.dataset_name, args.dataset_config_name, cache_dir=args.cache_dir)
    except (OSError, ValueError) as error:
        raise RunError(f"--dataset_name {args.dataset_name}: cannot be loaded ({one_line(error)}).") from error
    if "train" not in loaded:
        raise RunError(f"--dataset_name {args.dataset_name}: it has no split train, but {', '.join(loaded)}.")
    rows = loaded["train"]
    _check_column(args.image_column, rows.column_names, "--image_column")
    if not isinstance(rows.features[args.image_column], ImageFeature):
        raise RunError(f"--image_column {args.image_column}: it holds no images, but {rows.features[args.image_column]}.")
    if args.caption_column is not None:
        _check_column(args.caption_column, rows.column_names, "--caption_column")
    photos = []
    for index in range(len(rows)):
        try:
            row = rows[index]
            image = as_photo(row[args.image_column])
        except UNREADABLE as error:
            logger.warning(f"Skipped row {index} of {args.dataset_name}: {type(error).__name__}: {error}.")
            continue
        photos.append((image, (args.caption_column and row[args.caption_column]) or args.instance_prompt))
    if not photos:
        raise RunError(f"--dataset_name {args.dataset_name}: there is no image in it that can be read.")
    return photos


def _check_column(column: str, columns: Sequence[str], flag: str) -> None:
    if column not in columns:
        raise RunError(f"{flag} {column}: there is no such column; there are {', '.join(columns)}.")


class ResumableDataset(Dataset):
    """A data set whose shuffled order and random crops can be taken up again in the middle of an epoch.

    Both come from torch's default generator, which the steps between draw from, too. So three of its states are needed
    to go on as if nothing had happened: at the start of the epoch, before the batch that comes next was loaded
    (accelerate reads one batch ahead), and now. The last is in accelerate's checkpoint, the others are `state_dict()`,
    with that of the generator that several processes share for their order. What was seen is loaded once more and
    dropped, for that is what brings back the random states that workers have of their own.

    Workers that stay for all epochs (`persistent_workers`) draw as new ones would: each epoch has a seed for them, drawn
    where the loader would draw it, which reaches them in shared memory.
    """

    def __init__(self, dataset: Dataset, persistent_workers: bool = False) -> None:
        self.dataset = dataset
        self.persistent_workers = persistent_workers
        self.worker_seed = torch.zeros((), dtype=torch.int64).share_memory_()  # 0: the one that workers began with
        self.seeded = 0
        self.epochs = 0
        self.sampler = _Order(self)
        self.loader: Any = None
        self.skip = self.first = self.batch = 0
        self.resume_from: dict[str, Tensor] = {}
        self.saved: dict[str, Tensor] = {}
        self.state: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def resume(self, loader: DataLoader, batches: int, state: dict[str, Tensor]) -> None:
        """Makes the next epoch of the prepared loader begin behind its first `batches` batches (of this process).

        With 0 batches it is the epoch after the one that `state` was taken in. Call it when the random state is
        restored. `state` is what `state_dict` gave, or empty (a checkpoint of the official script): then the order is
        a new one.
        """
        self.loader, self.skip = loader, batches
        if state and batches:
            self.resume_from = {**state, "now": torch.get_rng_state()}
        elif state and self.sampler.generator is not None:
            self.sampler.generator.set_state(state["next_order"])

    def state_dict(self) -> dict[str, Tensor]:
        """The states to hand to `resume`, as they are after a step and before the next batch is asked for."""
        if self.sampler.generator is None:
            return dict(self.state)
        return {**self.state, "next_order": self.sampler.generator.get_state()}

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's loader before it draws anything for an epoch."""
        self.first, self.saved, self.batch = self.skip, self.resume_from, 0
        self.skip, self.resume_from = 0, {}
        if self.loader is not None:
            self.loader.skip_batches = self.first
        if self.saved:
            torch.set_rng_state(self.saved["epoch_start"])
            if self.sampler.generator is not None:
                self.sampler.generator.set_state(self.saved["order"])
        self.state = {"epoch_start": torch.get_rng_state()}
        if self.sampler.generator is not None:
            self.state["order"] = self.sampler.generator.get_state()

    def order_begins(self) -> None:
        """Called by the sampler before it draws."""
        if self.persistent_workers and self.epochs > 0:
            self.worker_seed.random_()
        self.epochs += 1

    def order_is_drawn(self) -> None:
        """Called by the sampler: with workers, this process draws nothing more for the epoch."""
        if self.saved:
            torch.set_rng_state(self.saved["now"])

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        """The items of a batch."""
        worker = get_worker_info()
        if worker is not None and self.seeded != self.worker_seed.item():
            self.seeded = int(self.worker_seed.item())
            random.seed(self.seeded + worker.id)
            torch.manual_seed(self.seeded + worker.id)
        resumed = self.saved and self.batch == self.first and worker is None
        if resumed:
            torch.set_rng_state(self.saved["before_batch"])
        self.batch += 1
        self.state["before_batch"] = torch.get_rng_state()
        items = [self.dataset[index] for index in indices]
        if resumed:
            torch.set_rng_state(self.saved["now"])
        return items


class _Order(RandomSampler):
    """A shuffle that says when it is drawn."""

    def __iter__(self) -> Iterator[int]:
        self.data_source.order_begins()
        for number, index in enumerate(super().__iter__()):
            if number == 0:
                self.data_source.order_is_drawn()
            yield index


def make_loader(
    args: Namespace,
    dataset: Dataset,
    collate_fn: Callable[[Sequence[dict], Layouts | None], dict],
    layouts: Layouts | None,
) -> DataLoader[ResumableDataset]:
    """The loader of a run, whose data set knows the place in the epoch, which checkpoints need.

    With `layouts` the images are encoded already, and workers have nothing to do.
    """
    workers = args.dataloader_num_workers if layouts is None else 0
    resumable = ResumableDataset(dataset, persistent_workers=workers > 0)
    return DataLoader(
        resumable,
        batch_size=args.train_batch_size,
        sampler=resumable.sampler,
        collate_fn=partial(collate_fn, layouts=layouts),
        num_workers=workers,
        worker_init_fn=ignore_signals,
        persistent_workers=workers > 0,  # an epoch is five photos: starting new ones takes longer
    )
