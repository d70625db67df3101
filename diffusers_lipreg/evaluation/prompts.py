"""Prompts and class nouns of the DreamBooth benchmark (Ruiz et al., CVPR 2023, arXiv 2208.12242).

In a template, {} stands for the subject: the unique token and the class noun in prompts, the noun alone in CLIP's texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import RunError, read_lines

PLACES = """
a {} in the jungle, a {} in the snow, a {} on the beach, a {} on a cobblestone street,
a {} on top of pink fabric, a {} on top of a wooden floor, a {} with a city in the background,
a {} with a mountain in the background, a {} with a blue house in the background,
a {} on top of a purple rug in a forest
"""
CLOTHES = """
a {} wearing a red hat, a {} wearing a santa hat, a {} wearing a rainbow scarf,
a {} wearing a black top hat and a monocle, a {} in a chef outfit, a {} in a firefighter outfit,
a {} in a police outfit, a {} wearing pink glasses, a {} wearing a yellow shirt,
a {} in a purple wizard outfit
"""
MORE_PLACES = """
a {} with a wheat field in the background, a {} with a tree and autumn leaves in the background,
a {} with the Eiffel Tower in the background, a {} floating on top of water, a {} floating in an ocean of milk,
a {} on top of green grass with sunflowers around it, a {} on top of a mirror,
a {} on top of the sidewalk in a crowded street, a {} on top of a dirt road, a {} on top of a white rug
"""
PROPERTIES = """
a red {}, a purple {}, a shiny {}, a wet {}, a cube shaped {}
"""
TEMPLATES = {
    kind: tuple(template.strip() for part in (PLACES, own, PROPERTIES) for template in part.split(","))
    for kind, own in (("live", CLOTHES), ("object", MORE_PLACES))
}
LIVE_NOUNS = ("cat", "dog")
CLASS_TEMPLATE = "a photo of a {}"

_SUBJECTS_BY_CLASS = {
    "backpack": ("backpack", "backpack_dog"),
    "boot": ("fancy_boot",),
    "bowl": ("berry_bowl",),
    "can": ("can",),
    "candle": ("candle",),
    "cartoon": ("red_cartoon",),
    "cat": ("cat", "cat2"),
    "clock": ("clock",),
    "dog": ("dog", "dog2", "dog3", "dog5", "dog6", "dog7", "dog8"),
    "glasses": ("pink_sunglasses",),
    "sneaker": ("colorful_sneaker", "shiny_sneaker"),
    "stuffed animal": ("bear_plushie", "grey_sloth_plushie", "wolf_plushie"),
    "teapot": ("teapot",),
    "toy": ("duck_toy", "monster_toy", "poop_emoji", "rc_car", "robot_toy"),
    "vase": ("vase",),
}
CLASS_NOUNS = {name: noun for noun, names in _SUBJECTS_BY_CLASS.items() for name in names}


class Subject(NamedTuple):
    """One subject: its names, its photos, and the templates of its prompts."""

    name: str  # in folders and in the report
    text: str  # in prompts, for example "sks dog"
    class_noun: str  # for example "dog"
    photos: Path
    personalized: str
    templates: tuple[str, ...]

    @property
    def prompts(self) -> list[str]:
        """The prompts of its images."""
        return [template.replace("{}", self.text) for template in self.templates]

    @property
    def texts(self) -> list[str]:
        """The texts that CLIP compares images with, without the unique token, which CLIP does not know."""
        return [template.replace("{}", self.class_noun) for template in self.templates]

    @property
    def class_prompt(self) -> str:
        return CLASS_TEMPLATE.format(self.class_noun)


def templates_for(class_noun: str) -> tuple[str, ...]:
    """Return the benchmark's 25 templates for a class: those for live subjects if it is a cat or dog."""
    return TEMPLATES["live" if class_noun in LIVE_NOUNS else "object"]


def read_templates(path: Path) -> tuple[str, ...]:
    """Read templates from a file with one in each line.

    Raises:
        RunError: The file cannot be read, or a line does not contain {} once.
    """
    templates = read_lines(path, "--templates_file")
    for template in templates:
        if template.count("{}") != 1:
            raise RunError(
                f"--templates_file {path}: expected one {{}} for the subject in each line, got {template!r}."
            )
    return templates


def one_subject(
    text: str, class_noun: str, photos: str, personalized: str, templates: Sequence[str] | None
) -> Subject:
    """Return a subject that is not from the benchmark.

    Raises:
        RunError: Its text lacks the class noun.
    """
    if not class_noun.strip() or class_noun not in text:
        raise RunError(
            f"--subject {text!r}: it does not contain the class noun {class_noun!r}; expected a unique token and the noun, "
            f"as the prompts in training had, for example 'sks {class_noun}'."
        )
    name = "".join(letter if letter.isalnum() else "_" for letter in text)[
        :60
    ]  # a folder's name has at most 255 bytes
    return Subject(name, text, class_noun, Path(photos), personalized, tuple(templates or templates_for(class_noun)))


def benchmark_subjects(
    dataset: str, unique_token: str, personalized: str, templates: Sequence[str] | None
) -> list[Subject]:
    """Return every folder of the benchmark's data set as a subject, whose name replaces {} in `personalized`.

    Raises:
        RunError: There are no folders, the benchmark does not know one of them, or `personalized` lacks {}.
    """
    if not Path(dataset).is_dir():
        raise RunError(f"--dataset {dataset}: there is no such folder.")
    folders = sorted(path for path in Path(dataset).iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise RunError(f"--dataset {dataset}: expected a folder of photos for each subject, found none.")
    if "{}" not in personalized:
        raise RunError(
            f"--personalized {personalized}: expected {{}} in it, for the name of each subject of --dataset."
        )
    if unknown := [folder.name for folder in folders if folder.name not in CLASS_NOUNS]:
        raise RunError(
            f"--dataset {dataset}: the benchmark has no class noun for {', '.join(unknown)}. Evaluate such a subject on "
            "its own, with --instance_data_dir, --subject and --class_noun."
        )
    return [
        Subject(
            folder.name,
            f"{unique_token} {CLASS_NOUNS[folder.name]}",
            CLASS_NOUNS[folder.name],
            folder,
            personalized.replace("{}", folder.name),
            tuple(templates or templates_for(CLASS_NOUNS[folder.name])),
        )
        for folder in folders
    ]
