"""A small world with known truth: captioned pictures of one colored shape, and subjects it does not contain.

Everything is a function of a seed. Pictures are float tensors of shape (n, 3, 64, 64) in [-1, 1], as a pipeline's VAE
takes them. `python tests/testbed/world.py` draws the subjects' training photos anew.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

SIZE = 64
SUPERSAMPLING = 3
HERE = Path(__file__).resolve().parent
PHOTOS = HERE / "subjects"

COLORS = {
    "red": (214, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 220, 50),
    "green": (50, 160, 70),
    "cyan": (70, 205, 220),
    "blue": (40, 70, 200),
    "purple": (135, 50, 165),
    "white": (243, 243, 243),
}
PALETTE = torch.tensor(list(COLORS.values())) / 127.5 - 1
BLACK = (25, 25, 25)

# A shape tells which points belong to it, in coordinates that run from -1 to 1 over the object, y upwards.
Region = Callable[[Tensor, Tensor], Tensor]


def _star(x: Tensor, y: Tensor) -> Tensor:
    """Five points of radius 1, dents of radius 0.45; one tenth of the star is tested, the others folded onto it."""
    fifth = 2 * math.pi / 5
    angle = torch.remainder(torch.atan2(x, y) + fifth / 2, fifth) - fifth / 2
    radius = torch.hypot(x, y)
    along, across = radius * angle.cos(), radius * angle.abs().sin()
    dent_along, dent_across = 0.45 * math.cos(fifth / 2), 0.45 * math.sin(fifth / 2)
    return (1 - along) * dent_across >= across * (1 - dent_along)


def _heart(x: Tensor, y: Tensor) -> Tensor:
    x, y = 1.25 * x, 1.25 * y + 0.05
    return (x**2 + y**2 - 1) ** 3 <= x**2 * y**3


SHAPES: dict[str, Region] = {
    "circle": lambda x, y: torch.hypot(x, y) <= 0.88,
    "square": lambda x, y: torch.maximum(x.abs(), y.abs()) <= 0.78,
    "triangle": lambda x, y: (y >= -0.72) & (y <= 0.95 - 1.75 * x.abs()),
    "star": _star,
    "heart": _heart,
    "cross": lambda x, y: (torch.minimum(x.abs(), y.abs()) <= 0.28) & (torch.maximum(x.abs(), y.abs()) <= 0.9),
    "ring": lambda x, y: (torch.hypot(x, y) <= 0.92) & (torch.hypot(x, y) >= 0.5),
    "moon": lambda x, y: (torch.hypot(x, y) <= 0.92) & (torch.hypot(x - 0.45, y) >= 0.72),
}
SHAPE_NAMES, COLOR_NAMES = list(SHAPES), list(COLORS)


@dataclass(frozen=True)
class Subject:
    """Something to personalize: a shape of the world with marks that the world does not have."""

    name: str
    class_noun: str
    color: tuple[int, int, int]
    marks: tuple[tuple[tuple[int, int, int], Region], ...]


def _disc(centre_x: float, centre_y: float, radius: float) -> Region:
    return lambda x, y: torch.hypot(x - centre_x, y - centre_y) <= radius


SUBJECTS = {
    subject.name: subject
    for subject in (
        Subject(
            "smiley",
            "circle",
            COLORS["yellow"],
            (
                (BLACK, _disc(-0.36, 0.26, 0.22)),
                (BLACK, _disc(0.36, 0.26, 0.22)),
                (BLACK, lambda x, y: (y <= -0.2) & (torch.hypot(x, y + 0.2) <= 0.5)),
            ),
        ),
        Subject(
            "striped_heart",
            "heart",
            COLORS["purple"],
            ((COLORS["yellow"], lambda x, y: torch.remainder(y + 0.3, 0.9) <= 0.45),),
        ),
        Subject(
            "window",
            "square",
            COLORS["blue"],
            (
                (COLORS["orange"], lambda x, y: x * y >= 0),
                (COLORS["white"], lambda x, y: torch.minimum(x.abs(), y.abs()) <= 0.1),
            ),
        ),
        Subject(
            "eyed_star",
            "star",
            COLORS["cyan"],
            ((COLORS["white"], _disc(0, 0, 0.46)), (BLACK, _disc(0, 0, 0.26))),
        ),
    )
}

FULL_CAPTIONS = (
    "{a_color} {shape} on {a_background} background",
    "{color} {shape}, {background} background",
    "a photo of {a_color} {shape} on {a_background} background",
    "a picture of {a_color} {shape} in front of {a_background} background",
    "{a_background} background with {a_color} {shape}",
    "{a_background} picture of {a_color} {shape}",
    "{a_color} {shape} in front of {a_background} wall",
    "there is {a_color} {shape} on {a_background} background",
    "{a_color} {shape} with {a_background} background behind it",
)
PARTIAL_CAPTIONS = (
    "a {shape}",
    "a photo of a {shape}",
    "{a_color} {shape}",
    "a photo of {a_color} {shape}",
    "a {shape} on {a_background} background",
    "a photo of a {shape} on {a_background} background",
    "a {shape} in front of {a_background} wall",
)
# Tokens that no caption gives a meaning to. A few captions contain one, so that the pipeline is not thrown by it.
RARE_TOKENS = ("sks", "zwx", "olis", "pll", "ucv")


@dataclass(frozen=True)
class Scene:
    """What a caption speaks of, as indices into `SHAPE_NAMES` and `COLOR_NAMES`."""

    shape: int
    color: int
    background: int

    @property
    def held_out(self) -> bool:
        """One scene in eight is kept from pretraining; every pair of its attributes occurs there in other company."""
        return (self.shape + self.color + self.background) % 8 == 0

    def caption(self, template: str) -> str:
        color, background = COLOR_NAMES[self.color], COLOR_NAMES[self.background]
        return template.format(
            shape=SHAPE_NAMES[self.shape],
            color=color,
            background=background,
            a_color=with_article(color),
            a_background=with_article(background),
        )


def with_article(color: str) -> str:
    return f"an {color}" if color == "orange" else f"a {color}"


SCENES = tuple(
    Scene(shape, color, background)
    for shape, color, background in itertools.product(range(8), repeat=3)
    if color != background
)


def captioned(count: int, generator: torch.Generator, held_out: bool | None = None) -> list[tuple[Scene, str]]:
    """Draw different fully captioned scenes: of pretraining (False), kept from it (True), or both (None)."""
    scenes = [scene for scene in SCENES if held_out is None or scene.held_out is held_out]
    pairs = [(scene, scene.caption(template)) for scene in scenes for template in FULL_CAPTIONS]
    if count > len(pairs):
        raise ValueError(f"{count} captions asked for, the world has {len(pairs)} of this kind")
    return [pairs[index] for index in torch.randperm(len(pairs), generator=generator)[:count].tolist()]


def caption_templates(generator: torch.Generator, count: int) -> list[str]:
    """Draw phrasings as pretraining sees them: a quarter leave attributes out, a twentieth contain a rare token."""
    chance = torch.rand(count, 2, generator=generator)
    which = torch.randint(2**31, (count, 2), generator=generator)
    templates = []
    for (partial, rare), (template, token) in zip(chance.tolist(), which.tolist(), strict=True):
        choices = PARTIAL_CAPTIONS if partial < 0.25 else FULL_CAPTIONS
        text = choices[template % len(choices)]
        if rare < 0.05:
            text = text.replace("{shape}", f"{RARE_TOKENS[token % len(RARE_TOKENS)]} {{shape}}")
        templates.append(text)
    return templates


def _coordinates(count: int, generator: torch.Generator, smallest: float = 13) -> tuple[Tensor, Tensor]:
    """Every pixel's coordinates in the frame of an object of random place, half size (to 22 pixels) and slight tilt."""
    draws = torch.rand(count, 4, generator=generator)
    half = smallest + (22 - smallest) * draws[:, 0]
    room = SIZE / 2 - half - 1
    centre_x, centre_y = ((2 * draws[:, i] - 1) * room for i in (1, 2))
    tilt = (2 * draws[:, 3] - 1) * 0.15
    axis = (torch.arange(SIZE * SUPERSAMPLING) + 0.5) / SUPERSAMPLING - SIZE / 2
    x = (axis[None, None, :] - centre_x[:, None, None]) / half[:, None, None]
    y = (-axis[None, :, None] - centre_y[:, None, None]) / half[:, None, None]
    cos, sin = tilt.cos()[:, None, None], tilt.sin()[:, None, None]
    return x * cos + y * sin, y * cos - x * sin


def _coverage(inside: Tensor) -> Tensor:
    """Share of each pixel that a region covers: (n, 1, 64, 64)."""
    return F.avg_pool2d(inside.float()[:, None], SUPERSAMPLING)


def _lit(colors: Tensor, generator: torch.Generator) -> Tensor:
    """The colors under slightly different light: (n, 3, 1, 1)."""
    return (colors + 0.06 * torch.randn(colors.shape, generator=generator)).clamp(-1, 1)[:, :, None, None]


def _paint(below: Tensor, color: Tensor, coverage: Tensor) -> Tensor:
    return below + (color - below) * coverage


def draw_scenes(scenes: list[Scene], generator: torch.Generator) -> Tensor:
    """Draw one picture of each scene."""
    x, y = _coordinates(len(scenes), generator)
    shapes = torch.tensor([scene.shape for scene in scenes])
    inside = torch.zeros(x.shape, dtype=torch.bool)
    for index, region in enumerate(SHAPES.values()):
        chosen = shapes == index
        inside[chosen] = region(x[chosen], y[chosen])
    background = _lit(PALETTE[[scene.background for scene in scenes]], generator)
    color = _lit(PALETTE[[scene.color for scene in scenes]], generator)
    return _paint(background, color, _coverage(inside))


def draw_subject(subject: Subject, backgrounds: list[int], generator: torch.Generator) -> Tensor:
    """Draw one view of the subject, near enough to see its marks, before each background (`COLOR_NAMES`' index)."""
    x, y = _coordinates(len(backgrounds), generator, smallest=18)
    outline = SHAPES[subject.class_noun](x, y)
    picture = _lit(PALETTE[backgrounds], generator)
    for color, region in ((subject.color, outline), *((c, outline & mark(x, y)) for c, mark in subject.marks)):
        paint = (torch.tensor(color) / 127.5 - 1).expand(len(backgrounds), 3)
        picture = _paint(picture, _lit(paint, generator), _coverage(region))
    return picture


def draw_clutter(count: int, generator: torch.Generator) -> Tensor:
    """Draw discs, bars, stripes and blocks of any color over each other: what the VAE learns besides the world."""
    picture = 2 * torch.rand(count, 3, 1, 1, generator=generator) - 1
    picture = picture.expand(-1, -1, SIZE, SIZE)
    for _ in range(5):
        x, y = _coordinates(count, generator)
        stretch = (0.3 + 1.2 * torch.rand(count, 3, generator=generator))[:, :, None, None]
        x, y = x / stretch[:, 0], y / stretch[:, 1]
        kinds = torch.randint(4, (count,), generator=generator)[:, None, None]
        block = torch.maximum(x.abs(), y.abs()) <= 0.8
        inside = torch.where(kinds == 0, torch.hypot(x, y) <= 0.8, block)
        inside = torch.where(kinds == 1, block & (torch.remainder(x + y, stretch[:, 2]) <= stretch[:, 2] / 2), inside)
        inside = torch.where(kinds == 2, (torch.hypot(x, y) <= 0.9) & (torch.hypot(x, y) >= 0.6), inside)
        color = 2 * torch.rand(count, 3, 1, 1, generator=generator) - 1
        picture = _paint(picture, color, _coverage(inside))
    return picture


# Training photos and held-out views of a subject stand before different backgrounds, none in a color it wears.
def training_backgrounds(subject: Subject) -> list[int]:
    return _backgrounds(subject)[:3] + _backgrounds(subject)[:2]


def held_out_backgrounds(subject: Subject) -> list[int]:
    return _backgrounds(subject)[3:]


def _backgrounds(subject: Subject) -> list[int]:
    seed = list(SUBJECTS).index(subject.name)
    worn = {subject.color, *(color for color, _ in subject.marks)}
    free = [i for i, color in enumerate(COLORS.values()) if color not in worn]
    return [free[i] for i in torch.randperm(len(free), generator=torch.Generator().manual_seed(seed)).tolist()]


def to_images(pictures: Tensor) -> list[Image.Image]:
    """Pictures as 8-bit RGB images."""
    values = ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in values]


def main() -> None:
    for number, subject in enumerate(SUBJECTS.values()):
        photos = draw_subject(subject, training_backgrounds(subject), torch.Generator().manual_seed(100 + number))
        folder = PHOTOS / subject.name
        folder.mkdir(parents=True, exist_ok=True)
        for index, photo in enumerate(to_images(photos)):
            photo.save(folder / f"{index:02}.png")
        print(f"{folder}: {len(photos)} photos of a {subject.class_noun}")


if __name__ == "__main__":
    main()
