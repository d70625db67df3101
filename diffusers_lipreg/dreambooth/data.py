"""Photos from a folder to batches, with the pixels and random draws of the official scripts, without torchvision."""

from __future__ import annotations

import logging
import os
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from accelerate.logging import get_logger
from PIL import ExifTags, Image
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import RunError, one_line, printable
from . import captions

logger = get_logger(__name__)
logging.getLogger("PIL").setLevel(logging.CRITICAL)  # what its decoders find is told in one line of ours
Encode = Callable[[Iterable[Tensor]], Iterable[Tensor]]  # of pixels (3, size, size) moments (2C, h, w)
Layouts = Mapping[int, torch.memory_format]  # by batch size
# What undoes the turn that EXIF's tag of that value tells of.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_rgb(image: Image.Image) -> tuple[Image.Image, bool]:
    """Return an image as RGB, turned the way its EXIF data says, and whether parts of it were transparent: now white.

    Raises:
        ValueError: It is a strip, which would be huge when resized.
    """
    if max(image.size) > 100 * min(image.size):
        raise ValueError(f"{image.width} x {image.height} pixels, one side more than 100 times the other")
    image.load()
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # EXIF data that cannot be read costs the photo its turn, not its place in the run
        turn = None
    transparent = False
    if image.mode[0] in "IF":
        image = Image.fromarray(eight_bits(np.asarray(image), image.mode))
    elif image.has_transparency_data:
        layer = image.convert("RGBA")
        transparent = layer.getextrema()[3][0] < 255
        if transparent:  # converted to RGB, it would show whatever color is stored there
            image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    image = image.convert("RGB")
    return (image if turn is None else image.transpose(turn)), transparent


def eight_bits(values: np.ndarray, mode: str) -> np.ndarray:
    """Scale pixels of more than 8 bits to 0..255. Where `mode` does not say 16 bits, the largest tells the range.

    PIL would cut them off at 255, which leaves 16 bits white and floats up to 1 black.
    """
    values = np.nan_to_num(values.astype(np.float64))
    top = 65535 if ";16" in mode else values.max()
    scale = 255 if top <= 1 else 1 if top <= 255 else 1 / 256 if top <= 65535 else 255 / top
    return (values * scale).clip(0, 255).astype(np.uint8)


@cache
def formats() -> list[str]:
    """Name the formats that Pillow decodes itself: EPS it hands to Ghostscript, and no photo may start a program."""
    Image.init()
    return [name for name in Image.ID if name != "EPS"]


def decode(source: str | Path | BinaryIO | Callable[[], BinaryIO], name: str) -> tuple[Image.Image, bool]:
    """Read an image as `to_rgb` returns it.

    Raises:
        RunError: It cannot be read, whatever the decoder raised. `name` is what the message calls it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(source() if callable(source) else source, formats=formats()) as image:
                return to_rgb(image)
    except Exception as error:  # decoders raise anything on damaged files
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise RunError(f"{name}: not an image that can be read ({reason}).") from error


@contextmanager
def silence_decoders() -> Iterator[None]:
    """In the block, keep what C libraries write to standard error from it, as libtiff does for each line of a broken file."""
    try:
        kept = os.dup(2)
    except OSError:  # there is no standard error
        yield
        return
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def open_image(path: str | Path) -> Image.Image:
    """Read a file as RGB, turned the way its EXIF data says, on white where it is transparent.

    Raises:
        RunError: It cannot be read.
    """
    return decode(path, str(path))[0]


def list_images(folder: str | Path) -> list[Path]:
    """List the images of a folder in the order of their names; sub-folders and hidden files are passed over.

    Every image is decoded once: a broken one is left out here, with a warning, and not met in mid-run. Files that are
    no images are named in one line, but for captions.

    Raises:
        RunError: The folder cannot be read.
    """
    images, broken, others, transparent = [], [], [], 0
    try:
        paths = [path for path in sorted(Path(folder).iterdir()) if path.name[0] != "." and path.is_file()]
    except OSError as error:
        raise RunError(f"{folder}: cannot be read ({error.strerror}).") from error
    with silence_decoders():
        for path in paths:
            try:
                transparent += decode(path, str(path))[1]
                images.append(path)
            except RunError as error:
                if has_image_name(path):
                    broken.append(str(error))
                else:
                    others.append(path)
    report(broken, transparent)
    texts = {*captions.beside(images, others).values(), Path(folder, captions.METADATA)}
    if names := [path.name for path in others if path not in texts]:
        warn(f"Skipped {len(names):,} files of {folder} that are no images: {captions.few(names)}.")
    return images


def warn(message: str) -> None:
    logger.warning(printable(message))


def has_image_name(path: Path) -> bool:
    """Tell by its suffix whether a file is meant to be an image."""
    return path.suffix.lower() in Image.registered_extensions()


def report(broken: Sequence[str], transparent: int) -> None:
    """Warn of images that cannot be read, five at most one by one; say how many have transparent parts."""
    for reason in broken[:5]:
        warn(f"Skipped {reason}")
    if len(broken) > 5:
        logger.warning(f"Skipped {len(broken) - 5:,} more images that cannot be read.")
    if transparent:
        logger.info(f"{transparent:,} images have transparent parts, which are white here.")


def find_instance_images(folder: str | Path, flag: str = "--instance_data_dir") -> list[Path]:
    """As `list_images`, of a folder that has to be there and hold at least one image; `flag` is where it was named."""
    folder = Path(folder)
    if not folder.is_dir():
        raise RunError(f"{flag} {folder}: there is no such folder.")
    images = list_images(folder)
    below = Counter(
        path.parent.relative_to(folder).as_posix()
        for pattern in ("*/*", "*/*/*")
        for path in sorted(folder.glob(pattern))
        if has_image_name(path) and path.is_file() and "/." not in f"/{path.relative_to(folder).as_posix()}"
    )
    hint = ", ".join(f"{number:,} in {name}" for name, number in list(below.items())[:3])
    if not images:
        more = f" There are {hint}: point {flag} there." if hint else ""
        raise RunError(f"{flag} {folder}: there is no image in it that can be read.{more}")
    if hint:
        warn(f"{folder}: images in its sub-folders are not used ({hint}): {flag} takes one folder.")
    return images


class PhotoTransform:
    """Resize the short side, crop a square, scale to [-1, 1]: a (3, size, size) float32 tensor.

    A random crop draws two numbers from torch's default generator, row then column, or none when the resized photo is
    the square already: as torchvision, on which the official scripts' random stream rests.
    """

    def __init__(
        self, size: int, center_crop: bool, interpolation: str = "bilinear", random_flip: bool = False
    ) -> None:
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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:  # reads the header only
                width, height = transform.resized(*image.size)
        if width != height:
            return path
    return None


class Photo(NamedTuple):
    """An instance photo and its prompt; `open` decodes it each time, since photos may be large and many."""

    open: Callable[[], Image.Image]
    prompt: str
    path: Path | None = None  # of a photo in a folder


def held_out_crops(photos: Iterable[Callable[[], Image.Image]], size: int) -> Tensor:
    """The middle four fifths of photos, closer than any crop that is trained on: (B, 3, size, size) in [-1, 1]."""
    transform = PhotoTransform(size, center_crop=True)

    def crop(image: Image.Image) -> Tensor:
        left, top = image.width // 10, image.height // 10
        return transform(image.crop((left, top, image.width - left, image.height - top)))

    return torch.stack([crop(open_photo()) for open_photo in photos])


class DreamBoothDataset(Dataset):
    """Photos of a folder with their prompts, and class images for prior preservation; the shorter list starts over.

    An item is {"instance": (3, size, size), "prompt": str}, and with class images "class": (3, size, size).
    """

    def __init__(self, photos: Sequence[Photo], class_images: Sequence[Path], transform: PhotoTransform) -> None:
        self.photos = photos
        self.class_images = class_images
        self.load: Callable[[Path], Tensor] = partial(load, transform)

    def encode(self, encode: Encode) -> None:
        """Replace the pixels of all images by what `encode` makes of them."""
        self.load = encoded([*(photo.path for photo in self.photos), *self.class_images], self.load, encode)

    def __len__(self) -> int:
        return max(len(self.photos), len(self.class_images))

    def __getitem__(self, index: int) -> dict[str, Any]:
        photo = self.photos[index % len(self.photos)]
        item: dict[str, Any] = {"instance": self.load(photo.path), "prompt": photo.prompt}
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


def collate(
    items: Sequence[dict[str, Any]], layouts: Layouts | None = None, class_prompt: str | None = None
) -> dict[str, Any]:
    """Stacks items to {"pixel_values": (B, 3, size, size)}: the instance half first, then the class half, if any.

    Of items with moments in place of pixels it makes {"moments": (B, 2C, h, w)}, in the order in memory that `layouts`
    has for their number: noise is drawn in that order. "has_class_images" tells whether there is a class half. Where
    items have them, the batch has "prompts", a list of B with `class_prompt` for the class half, and "time_ids" (B, 6),
    for both halves the same.
    """
    images = torch.stack([item[kind] for kind in ("instance", "class") for item in items if kind in item])
    batch: dict[str, Any] = {"pixel_values": images}
    if layouts is not None:
        batch = {"moments": images.contiguous(memory_format=layouts[len(images)])}
    batch["has_class_images"] = len(images) > len(items)
    if "prompt" in items[0]:
        batch["prompts"] = [item["prompt"] for item in items] + [class_prompt] * (len(images) - len(items))
    if "time_ids" in items[0]:
        batch["time_ids"] = torch.tensor([item["time_ids"] for item in items] * (len(images) // len(items)))
    return batch


class SDXLDreamBoothDataset(Dataset):
    """Photos cropped once for the whole run, each with its prompt and with what SDXL is told of its size and crop.

    An item has "instance" (3, size, size), "prompt", "time_ids" (original height, original width, top, left, size,
    size) and, with prior preservation, "class", which is cropped anew each time. The shorter list starts over.
    """

    def __init__(
        self, photos: Iterable[Photo], repeats: int, class_images: Sequence[Path], transform: PhotoTransform
    ) -> None:
        self.items: list[dict] = []
        self.class_images = class_images
        self.load_class: Callable[[Path], Tensor] = partial(load, transform.without_flip())
        for photo in photos:
            self._crop(photo, repeats, transform)

    def _crop(self, photo: Photo, repeats: int, transform: PhotoTransform) -> None:
        image = photo.open()  # which is let go before the next one is read
        for _ in range(repeats):
            pixels, corner = transform.crop(image)
            time_ids = (image.height, image.width, *corner, transform.size, transform.size)
            self.items.append({"instance": pixels, "prompt": photo.prompt, "time_ids": time_ids})

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
