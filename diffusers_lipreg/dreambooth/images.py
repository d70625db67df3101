"""Read images from files whatever is in them, and turn photos into pixels with the random draws of the official scripts."""

from __future__ import annotations

import logging
import random
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from accelerate.logging import get_logger
from PIL import ExifTags, Image
from torch import Tensor

from ..errors import RunError, one_line, printable
from . import captions

logger = get_logger(__name__)
logging.getLogger("PIL").setLevel(logging.CRITICAL)  # our own line says what its decoders find
TURNS = {  # value of EXIF's orientation tag -> what turns the photo upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image as RGB, upright by its EXIF data and on white; `info["was_transparent"]` says if that shows."""
    if max(image.size) > 100 * min(image.size):
        raise ValueError(f"{image.width} x {image.height} pixels, one side more than 100 times the other")
    image.load()
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a photo with damaged EXIF data is used as it is stored
        turn = None
    transparent = False
    if image.mode[0] in "IF":
        image = Image.fromarray(eight_bits(np.asarray(image), image.mode))
    elif image.has_transparency_data:
        layer = image.convert("RGBA")
        transparent = layer.getchannel("A").getextrema() != (255, 255)
        if transparent:  # a conversion to RGB would show the color that is stored under the transparency
            image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    image = image.convert("RGB")
    image = image if turn is None else image.transpose(turn)
    image.info["was_transparent"] = transparent
    return image


def eight_bits(values: np.ndarray, mode: str) -> np.ndarray:
    """Scale pixels of more than 8 bits to 0..255; the largest value tells their range unless `mode` says 16 bits.

    PIL would clip them at 255, which turns 16 bits white and floats up to 1 black.
    """
    values = np.nan_to_num(values.astype(np.float64))
    top = 65535 if ";16" in mode else values.max()
    scale = 255 if top <= 1 else 1 if top <= 255 else 1 / 256 if top <= 65535 else 255 / top
    return (values * scale).clip(0, 255).astype(np.uint8)


@cache
def formats() -> list[str]:
    """List the formats that Pillow decodes itself. It hands EPS to Ghostscript, and no photo may start a program."""
    Image.init()
    return [name for name in Image.ID if name != "EPS"]


def open_image(source: str | Path | BinaryIO | Callable[[], str | BinaryIO], name: str = "") -> Image.Image:
    """Read an image as `to_rgb` returns it. `source` may be a function that opens it; errors call it `name`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(source() if callable(source) else source, formats=formats()) as image:
                return to_rgb(image)
    except Exception as error:  # decoders raise anything on damaged files
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise RunError(f"{name or source}: not an image that can be read ({reason}).") from error


def list_images(folder: str | Path) -> list[Path]:
    """List the images of a folder sorted by name, without those in sub-folders and hidden ones.

    Each is decoded once, so that a broken one is left out here with a warning and does not end the run later. One line
    names the other files, except captions.
    """
    images, broken, others, transparent = [], [], [], 0
    try:
        paths = [path for path in sorted(Path(folder).iterdir()) if path.name[0] != "." and path.is_file()]
    except OSError as error:
        raise RunError(f"{folder}: cannot be read ({error.strerror}).") from error
    for path in paths:
        try:
            transparent += open_image(path).info["was_transparent"]
            images.append(path)
        except RunError as error:
            if has_image_name(path):
                broken.append(str(error))
            else:
                others.append(path)
    report(broken, transparent)
    texts = {*captions.caption_files(images, others).values(), Path(folder, captions.METADATA)}
    if names := [path.name for path in others if path not in texts]:
        warn(f"Skipped {len(names):,} files of {folder} that are no images: {captions.abbreviate(names)}.")
    return images


def has_image_name(path: Path) -> bool:
    """Tell by its suffix whether a file is meant to be an image."""
    return path.suffix.lower() in Image.registered_extensions()


def report(broken: Sequence[str], transparent: int) -> None:
    """Warn of broken images, naming five at most, and log the number of images with transparent parts."""
    for reason in broken[:5]:
        warn(f"Skipped {reason}")
    if len(broken) > 5:
        warn(f"Skipped {len(broken) - 5:,} more images that cannot be read.")
    if transparent:
        logger.info(f"{transparent:,} images have transparent parts, which are white here.")


def warn(message: str) -> None:
    """Log a warning that may quote file names."""
    logger.warning(printable(message))


def find_instance_images(folder: str | Path, flag: str = "--instance_data_dir") -> list[Path]:
    """List the images of the folder that `flag` names, as `list_images` does; warn of others in its sub-folders."""
    folder = Path(folder)
    if not folder.is_dir():
        raise RunError(f"{flag} {folder}: there is no such folder.")
    images = list_images(folder)
    inside = [*sorted(folder.glob("*/*")), *sorted(folder.glob("*/*/*"))]  # deeper ones could be very many
    seen = [path.relative_to(folder) for path in inside if has_image_name(path) and path.is_file()]
    below = Counter(path.parent.as_posix() for path in seen if not any(name[0] == "." for name in path.parts))
    hint = ", ".join(f"{number:,} in {name}" for name, number in list(below.items())[:3])
    if not images:
        more = f" There are {hint}: point {flag} there." if hint else ""
        raise RunError(f"{flag} {folder}: there is no image in it that can be read.{more}")
    if hint:
        warn(f"{folder}: images in its sub-folders are not used ({hint}): {flag} takes one folder.")
    return images


@dataclass(frozen=True)
class PhotoTransform:
    """Resize the short side to `size`, crop a square, scale to [-1, 1]: a (3, size, size) float32 tensor.

    A random crop draws its row, then its column from torch's default generator, and nothing if the resized photo is
    the square already. torchvision does the same, and the official scripts' random numbers depend on that.
    """

    size: int
    center_crop: bool
    interpolation: str = "bilinear"
    random_flip: bool = False

    def __call__(self, image: Image.Image) -> Tensor:
        return self.crop(image)[0]

    def load(self, path: Path) -> Tensor:
        """Return the pixels of an image file."""
        return self(open_image(path))

    def crop(self, image: Image.Image) -> tuple[Tensor, tuple[int, int]]:
        """Return the pixels, and the row and column of the crop in the resized photo."""
        image = self.resize(image)
        if self.random_flip and random.random() < 0.5:
            torch.rand(1)  # torchvision's flip draws a number even if it is certain
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
        """Return the image with a short side of `size`."""
        size = self.resized(*image.size)
        # PIL's nearest is torchvision's nearest_exact; its other one gives the same on images.
        resampling = Image.Resampling[self.interpolation.removesuffix("_exact").upper()]
        return image if size == image.size else image.resize(size, resampling)

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Return width and height after `resize`."""
        short = min(width, height)
        return int(self.size * width / short), int(self.size * height / short)


def first_random_crop(images: Sequence[Path], transform: PhotoTransform) -> Path | None:
    """Return the first file from which the transform makes other pixels each time, or `None`."""
    if transform.center_crop:
        return None
    for path in images:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:  # it reads the header only
                width, height = transform.resized(*image.size)
        if width != height:
            return path
    return None
