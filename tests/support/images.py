"""Photos that say what became of them."""

from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor


def map_of_pixels(width: int, height: int) -> Image.Image:
    """An image whose every pixel says where it is: red is its column, green its row."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([columns, rows, 0 * rows], axis=-1).astype(np.uint8))


def corner(pixels: Tensor) -> tuple[int, int]:
    """Row and column that the upper left pixel of a cropped `map_of_pixels` had."""
    column, row = ((pixels[:2, 0, 0] / 2 + 0.5) * 255).round().int().tolist()
    return row, column


def save_photo(path: Path, size: tuple[int, int] = (16, 16), seed: int = 0) -> Path:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def plain(folder: Path, *values: int) -> list[Path]:
    """8x8 photos, each of one gray value."""
    paths = [folder / f"{value}.png" for value in values]
    for path, value in zip(paths, values, strict=True):
        Image.new("RGB", (8, 8), (value,) * 3).save(path)
    return paths


def gray(pixels: Tensor) -> int:
    """The gray value of a plain photo."""
    assert pixels.shape == (3, 8, 8)
    return round((pixels.mean().item() / 2 + 0.5) * 255)
