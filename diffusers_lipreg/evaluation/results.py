"""Score the images of one subject."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .generation import ImageSpec, image_specs
from .prompts import Subject
from .scores import (
    ClipEncoder,
    DinoEncoder,
    diversity,
    embed,
    mean_cosine,
    mean_cosine_within,
    pixel_change,
    text_score,
)

BASE = "images/base"
CLASS_IMAGES = 16


def personalized_folder(subject: Subject) -> str:
    return f"images/personalized/{subject.name}"


class ImageSet(NamedTuple):
    """The images of one pipeline for a subject, by prompt and number."""

    subject: list[list[ImageSpec]]  # prompts with the subject
    of_class: list[list[ImageSpec]]  # the one prompt with the class alone
    unrelated: list[list[ImageSpec]]  # prompts that have nothing to do with the subject

    @property
    def all(self) -> list[ImageSpec]:
        return [image for rows in self for row in rows for image in row]


class Images:
    """The images of the base and of the personalized pipeline for a subject, from the same prompts and seeds."""

    def __init__(self, output_dir: Path, subject: Subject, unrelated: Sequence[str], images_per_prompt: int) -> None:
        def image_set(folder: Path) -> ImageSet:
            return ImageSet(
                image_specs(folder, subject.prompts, images_per_prompt),
                image_specs(folder, [subject.class_prompt], CLASS_IMAGES),
                image_specs(folder, unrelated, images_per_prompt),
            )

        self.base = image_set(output_dir / BASE)
        self.personalized = image_set(output_dir / personalized_folder(subject))


def _grid(encoder: DinoEncoder | ClipEncoder, rows: list[list[ImageSpec]]) -> Tensor:
    """Return embeddings (prompts, images, d)."""
    return embed(encoder, [image.path for row in rows for image in row]).unflatten(0, (len(rows), -1))


def _mean_and_error(rows: Tensor) -> dict[str, float | None]:
    """Return the mean of values (prompts, images) and its standard error over prompts."""
    means = rows.double().mean(dim=1)
    error = means.std().item() / math.sqrt(len(means)) if len(means) > 1 else None
    return {"mean": means.mean().item(), "mean_se": error}


def score_subject(
    subject: Subject, photos: Sequence[Path], images: Images, encoders: Sequence[DinoEncoder | ClipEncoder]
) -> dict[str, Any]:
    """Return all scores, by what they compare and by column: a metric and the name of its encoder.

    scores: Cosines of images and photos (DINO, CLIP-I) or prompts (CLIP-T), and of the photos among themselves.
    diversity: 1 - cosine between images of one prompt.
    class_resemblance: Cosines of images of the class alone and the subject's photos. If the personalized pipeline's
        exceed the base's, the subject leaks into its class.
    unrelated_change: Difference of the two pipelines' images of unrelated prompts from the same noise: 1 - cosine,
        and the mean squared difference of pixel values in [0, 1].
    """
    sides = {"personalized": images.personalized, "base": images.base}
    scores: dict[str, dict[str, float | None]] = {"personalized": {}, "base": {}, "real": {}}
    diversities: dict[str, dict[str, float | None]] = {side: {} for side in sides}
    resemblance: dict[str, dict[str, float]] = {side: {} for side in sides}
    unrelated: dict[str, dict[str, float | None]] = {}
    for encoder in encoders:
        column = f"{encoder.metric} {encoder.name}"
        real = embed(encoder, photos)
        scores["real"][column] = mean_cosine_within(real)
        for side, generated in sides.items():
            of_subject = _grid(encoder, generated.subject)
            scores[side][column] = mean_cosine(of_subject.flatten(0, 1), real)
            diversities[side][column] = diversity(of_subject)
            resemblance[side][column] = mean_cosine(_grid(encoder, generated.of_class)[0], real)
            if isinstance(encoder, ClipEncoder):
                scores[side][f"CLIP-T {encoder.name}"] = text_score(of_subject, encoder.texts(subject.texts))
        before, after = (_grid(encoder, side.unrelated).double() for side in (images.base, images.personalized))
        unrelated[column] = _mean_and_error(1 - (before * after).sum(dim=-1))
    rows = zip(images.base.unrelated, images.personalized.unrelated, strict=True)
    changes = [pixel_change([(a.path, b.path) for a, b in zip(*row, strict=True)]) for row in rows]
    unrelated["pixels"] = _mean_and_error(torch.tensor(changes, dtype=torch.float64))
    return {
        "scores": scores,
        "diversity": diversities,
        "class_resemblance": resemblance,
        "unrelated_change": unrelated,
    }
