"""Score the images of one subject by cosines of embeddings.

Public code disagrees on the details of these scores. Here, cosines are raw (not times 2.5 or 100), the text of CLIP-T
lacks the subject's unique token, and the score of a subject is the mean over all pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..dreambooth.images import open_image
from .encoders import ClipEncoder, Encoder
from .generation import ImageSpec, SubjectFiles
from .prompts import Subject

SIDES = {"personalized": "personalized", "base": "base", "real": "photos among themselves"}


def score_subject(subject: Subject, files: SubjectFiles, encoders: Sequence[Encoder]) -> dict[str, Any]:
    """Return `scores` by side and column, and `unrelated_change` by column; the columns name the encoders.

    DINO, CLIP-I: cosines of images and photos, and of the photos among themselves.
    CLIP-T: cosines of images and the texts of their prompts.
    diversity: 1 - cosine between images of one prompt.
    class resemblance: Cosines of images of the class alone and photos. If those of the personalized pipeline exceed the
        base's, the subject leaks into its class.
    unrelated_change: Difference of the two pipelines' images of unrelated prompts from the same noise: 1 - cosine,
        and the mean squared difference of pixel values in [0, 1].
    """
    photos, images, folders = files
    scores: dict[str, dict[str, float | None]] = {side: {} for side in SIDES}
    changes = {}
    for encoder in encoders:
        column, real = encoder.column, encoder.images(photos).double()
        scores["real"][column] = mean_cosine_within(real)
        for side, folder in folders.items():
            of_subject, of_class = (_embed(encoder, rows, folder) for rows in (images.subject, images.of_class))
            scores[side][column] = mean_cosine(of_subject.flatten(0, 1), real)
            if isinstance(encoder, ClipEncoder):
                texts = encoder.texts(subject.texts).double()
                scores[side][encoder.text_column] = (of_subject * texts[:, None]).sum(dim=-1).mean().item()
            within = mean_cosine_within(of_subject)
            scores[side][f"diversity, {column}"] = None if within is None else 1 - within
            scores[side][f"class resemblance, {column}"] = mean_cosine(of_class[0], real)
        before, after = (_embed(encoder, images.unrelated, folders[side]) for side in ("base", "personalized"))
        changes[column] = mean_and_error(1 - (before * after).sum(dim=-1))
    pixels = [[pixel_change(*map(image.path, folders.values())) for image in row] for row in images.unrelated]
    changes["pixels"] = mean_and_error(torch.tensor(pixels, dtype=torch.float64))
    return {"scores": scores, "unrelated_change": changes}


def _embed(encoder: Encoder, rows: list[list[ImageSpec]], folder: Path) -> Tensor:
    """Return embeddings (prompts, images, d)."""
    return encoder.images([image.path(folder) for row in rows for image in row]).double().unflatten(0, (len(rows), -1))


def mean_cosine(one: Tensor, other: Tensor) -> float:
    """Return the mean cosine over all pairs of normalized rows: the dot product of the two means."""
    return (one.mean(0) @ other.mean(0)).item()


def mean_cosine_within(rows: Tensor) -> float | None:
    """Return the mean cosine over pairs of different rows of (..., n, d), `None` for a single row."""
    n = rows.shape[-2]
    if n < 2:
        return None
    all_pairs, same_row = rows.sum(dim=-2).square().sum(dim=-1), rows.square().sum(dim=(-2, -1))
    return ((all_pairs - same_row) / (n * (n - 1))).mean().item()


def pixel_change(one: Path, other: Path) -> float:
    """Return the mean squared difference of pixel values in [0, 1] of two image files of one size.

    If a deterministic sampler generated both from the same noise, its mean times the number of values bounds the squared
    2-Wasserstein distance between the images of the two models.
    """
    before, after = (np.asarray(open_image(path), dtype=np.float64) / 255 for path in (one, other))
    return float(np.square(after - before).mean())


def mean_and_error(rows: Tensor) -> dict[str, float | None]:
    """Return the mean of values (prompts, images) and its standard error over prompts."""
    means = rows.mean(dim=1)
    error = means.std().item() / math.sqrt(len(means)) if len(means) > 1 else None
    return {"mean": means.mean().item(), "mean_se": error}


def mean_over_subjects(values: Sequence[float | None]) -> dict[str, Any] | None:
    """Return the mean over subjects and its 95 % bootstrap interval, by percentiles over resampled subjects."""
    known = np.array([value for value in values if value is not None])  # a single photo has no score among the photos
    if not len(known):
        return None
    picks = np.random.default_rng(0).integers(len(known), size=(10_000, len(known)))
    interval = np.percentile(known[picks].mean(axis=1), [2.5, 97.5]).tolist()
    return {"mean": float(known.mean()), "interval": interval, "subjects": len(known)}
