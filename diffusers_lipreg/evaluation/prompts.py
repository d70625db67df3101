"""The subjects to evaluate, and the prompts and class nouns of DreamBooth's benchmark (Ruiz et al., CVPR 2023).

In a template, {} stands for the subject: the unique token and the class noun in prompts, the noun alone in CLIP's texts.
"""

from __future__ import annotations

import re
from argparse import Namespace
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
        return [template.replace("{}", self.text) for template in self.templates]

    @property
    def texts(self) -> list[str]:
        """The texts that CLIP compares images with, without the unique token, which CLIP does not know."""
        return [template.replace("{}", self.class_noun) for template in self.templates]

    @property
    def class_prompt(self) -> str:
        return f"a photo of a {self.class_noun}"


def find_subjects(args: Namespace) -> list[Subject]:
    """Return the subject that the flags describe, or all of `--dataset`, whose names replace {} in `--personalized`.

    Raises:
        RunError: A value of these flags or a line of `--templates_file` that does not fit.
    """
    templates = () if args.templates_file is None else read_lines(args.templates_file, "--templates_file")
    if strange := [template for template in templates if template.count("{}") != 1]:
        raise RunError(
            f"--templates_file {args.templates_file}: expected one {{}} for the subject in each line, got {strange[0]!r}."
        )

    def subject(name: str, text: str, noun: str, photos: Path, personalized: str) -> Subject:
        of_class = TEMPLATES["live" if noun in LIVE_NOUNS else "object"]
        return Subject(name, text, noun, photos, personalized, templates or of_class)

    if args.dataset is None:
        text, noun = args.subject, args.class_noun
        if not noun.strip() or noun not in text:
            raise RunError(
                f"--subject {text!r}: it does not contain the class noun {noun!r}; expected a unique token and the noun, "
                f"as the prompts in training had, for example 'sks {noun}'."
            )
        name = re.sub(r"\W", "_", text)[:60]  # a folder's name has at most 255 bytes
        return [subject(name, text, noun, Path(args.instance_data_dir), args.personalized)]

    if "{}" not in args.personalized:
        raise RunError(f"--personalized {args.personalized}: expected {{}} in it, for the name of each subject.")
    subjects = []
    for folder in sorted(path for path in Path(args.dataset).glob("[!.]*") if path.is_dir()):
        name, noun = folder.name, CLASS_NOUNS.get(folder.name)
        if noun is None:
            raise RunError(
                f"--dataset {args.dataset}: the benchmark has no class noun for {name}. Evaluate such a subject on its own, "
                "with --instance_data_dir, --subject and --class_noun."
            )
        text, personalized = f"{args.unique_token} {noun}", args.personalized.replace("{}", name)
        subjects.append(subject(name, text, noun, folder, personalized))
    if not subjects:
        raise RunError(f"--dataset {args.dataset}: expected a folder of photos for each subject, found none.")
    return subjects
