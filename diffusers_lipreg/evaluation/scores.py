"""Score images by cosines of embeddings: DINO, CLIP-I, CLIP-T and diversity.

Public code disagrees on the details of these scores. Here, cosines are raw (not times 2.5 or 100), the text lacks the
subject's unique token, and the score of a subject is the mean over all pairs. DINO embeddings are the [CLS] output of a
ViT after its last norm. Its pixels are resized to 256/224 of the model's size (bicubic), cropped in the center and
normalized by ImageNet's statistics, as in Caron et al., ICCV 2021. CLIP embeddings are projected features.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoModel, AutoProcessor

from ..dreambooth.images import open_image
from ..errors import RunError
from ..loading import one_line_errors

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
RESIZE_PER_CROP = 256 / 224
BATCH = 32  # images or texts encoded at a time


def short_name(model: str) -> str:
    """Return the Hub id of a model, or the name of its folder without the path: others may see the report."""
    return Path(model).resolve().name if Path(model).exists() else model


def _load(flag: str, model: str) -> Any:
    with one_line_errors(f"{flag} {model}: no model of transformers can be read from such a folder, or the Hub"):
        return AutoModel.from_pretrained(model, dtype=torch.float32).eval()


def _features(output: Any) -> Tensor:
    """Return the features that CLIP returns, which newer transformers put into an output object."""
    return output if isinstance(output, Tensor) else output.pooler_output


class DinoEncoder:
    """A DINO model, or another ViT of transformers with a [CLS] token, in float32.

    Raises:
        RunError: It cannot be loaded, or is another kind of model.
    """

    metric = "DINO"

    def __init__(self, model: str, device: torch.device) -> None:
        self.name = short_name(model)
        self.device = device
        self.model = _load("--dino", model)
        config = self.model.config
        if not isinstance(getattr(config, "image_size", None), int) or not hasattr(config, "patch_size"):
            raise RunError(
                f"--dino {model}: expected a ViT such as facebook/dino-vits16, got a {type(self.model).__name__}."
            )
        self.size = config.image_size

    def pixels(self, image: Image.Image) -> Tensor:
        """Return the pixels (3, size, size) of an RGB image as the model takes them."""
        short = round(self.size * RESIZE_PER_CROP)
        scale = short / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = (image.width - self.size) // 2, (image.height - self.size) // 2
        image = image.crop((left, top, left + self.size, top + self.size))
        values = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        return (values - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[:, None, None]

    @torch.no_grad()
    def images(self, images: Iterable[Image.Image]) -> Tensor:
        """Return normalized embeddings (n, d) on the CPU."""
        self.model.to(self.device)
        batch = torch.stack([self.pixels(image) for image in images]).to(self.device)
        return F.normalize(self.model(pixel_values=batch).last_hidden_state[:, 0], dim=-1).cpu()


class ClipEncoder:
    """A CLIP model of transformers, in float32.

    Raises:
        RunError: It cannot be loaded, or is another kind of model.
    """

    metric = "CLIP-I"

    def __init__(self, model: str, device: torch.device) -> None:
        self.name = short_name(model)
        self.device = device
        self.model = _load("--clip", model)
        if not hasattr(self.model, "get_text_features"):
            raise RunError(
                f"--clip {model}: expected a CLIP such as openai/clip-vit-base-patch32, got a {type(self.model).__name__}."
            )
        with one_line_errors(f"--clip {model}: its tokenizer or image processor cannot be read"):
            self.processor = AutoProcessor.from_pretrained(model)

    @torch.no_grad()
    def images(self, images: Iterable[Image.Image]) -> Tensor:
        """Return normalized embeddings (n, d) on the CPU."""
        self.model.to(self.device)
        pixels = self.processor(images=list(images), return_tensors="pt")["pixel_values"].to(self.device)
        return F.normalize(_features(self.model.get_image_features(pixel_values=pixels)), dim=-1).cpu()

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Return normalized embeddings (n, d) on the CPU. Long texts are truncated."""
        self.model.to(self.device)
        tokens = self.processor(text=list(texts), return_tensors="pt", padding=True, truncation=True).to(self.device)
        tokens = {name: tokens[name] for name in ("input_ids", "attention_mask")}
        return F.normalize(_features(self.model.get_text_features(**tokens)), dim=-1).cpu()


def embed(encoder: DinoEncoder | ClipEncoder, paths: Sequence[Path]) -> Tensor:
    """Return embeddings (n, d) of image files."""
    parts = [paths[start : start + BATCH] for start in range(0, len(paths), BATCH)]
    return torch.cat([encoder.images([open_image(path) for path in part]) for part in parts])


def mean_cosine(one: Tensor, other: Tensor) -> float:
    """Return the mean cosine over all pairs of normalized rows: the dot product of the two means."""
    return (one.double().mean(0) @ other.double().mean(0)).item()


def mean_cosine_within(rows: Tensor) -> float | None:
    """Return the mean cosine over pairs of different rows of (..., n, d), `None` for a single row."""
    n = rows.shape[-2]
    if n < 2:
        return None
    rows = rows.double()
    all_pairs, same_row = rows.sum(dim=-2).square().sum(dim=-1), rows.square().sum(dim=(-2, -1))
    return ((all_pairs - same_row) / (n * (n - 1))).mean().item()


def diversity(rows: Tensor) -> float | None:
    """Return 1 - the mean cosine between images of one prompt, for embeddings (prompts, images, d)."""
    within = mean_cosine_within(rows)
    return None if within is None else 1 - within


def text_score(images: Tensor, texts: Tensor) -> float:
    """Return the mean cosine between images (prompts, images, d) and the text of their prompt (prompts, d)."""
    return (images.double() * texts.double()[:, None]).sum(dim=-1).mean().item()


def pixel_change(pairs: Sequence[tuple[Path, Path]]) -> list[float]:
    """Return the mean squared difference of pixel values in [0, 1] for each pair of image files of one size.

    If a deterministic sampler generated each pair from the same noise, the mean times the number of values bounds the
    squared 2-Wasserstein distance between the images of the two models.
    """

    def values(path: Path) -> np.ndarray:
        return np.asarray(open_image(path), dtype=np.float64) / 255

    return [float(np.square(values(one) - values(other)).mean()) for one, other in pairs]


def bootstrap_interval(values: Sequence[float], draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean, by percentiles over resampled subjects."""
    sample = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(len(sample), size=(draws, len(sample)))
    low, high = np.percentile(sample[picks].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)
