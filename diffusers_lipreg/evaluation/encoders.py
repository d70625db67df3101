"""Embed images by DINO and CLIP, and texts by CLIP, for scores that are cosines of embeddings.

DINO embeddings are the [CLS] output of a ViT after its last norm. Its pixels are resized to 256/224 of the model's size
(bicubic), cropped in the center and normalized by ImageNet's statistics, as in Caron et al., ICCV 2021. CLIP embeddings
are projected features.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL.Image import Resampling
from torch import Tensor
from transformers import AutoModel, AutoProcessor, CLIPImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..dreambooth.images import open_image
from ..errors import RunError
from ..loading import one_line_errors

BATCH = 32  # images embedded at a time


def short_name(model: str) -> str:
    """Return the Hub id of a model, or the name of its folder without the path: others may see the report."""
    return Path(model).resolve().name if Path(model).exists() else model


class Encoder:
    """A model of transformers, in float32 on the CPU.

    Args:
        name: A folder or Hub id, which the flag `flag` gives.

    Raises:
        RunError: It cannot be loaded, or is another kind of model.
    """

    metric: str  # the cosine of its embeddings of two images
    processor: Any

    def __init__(self, flag: str, name: str) -> None:
        self.column = f"{self.metric} {short_name(name)}"
        with one_line_errors(f"{flag} {name}: no model of transformers can be read from such a folder, or the Hub"):
            self.model = AutoModel.from_pretrained(name, dtype=torch.float32).eval()

    def features(self, pixel_values: Tensor) -> Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def images(self, paths: Sequence[Path]) -> Tensor:
        """Return normalized embeddings (n, d) of image files on the CPU."""
        parts = []
        for start in range(0, len(paths), BATCH):
            images = [open_image(path) for path in paths[start : start + BATCH]]
            pixels = self.processor(images=images, return_tensors="pt")["pixel_values"]
            parts.append(self.features(pixels.to(self.model.device)))
        return F.normalize(torch.cat(parts), dim=-1).cpu()


class DinoEncoder(Encoder):
    """A DINO model, or another ViT with a [CLS] token."""

    metric = "DINO"

    def __init__(self, name: str) -> None:
        super().__init__("--dino", name)
        size = getattr(self.model.config, "image_size", None)
        if not isinstance(size, int):
            kind = type(self.model).__name__
            raise RunError(f"--dino {name}: expected a ViT such as facebook/dino-vits16, got a {kind}.")
        self.processor = CLIPImageProcessor(
            size={"shortest_edge": round(size * 256 / 224)},
            crop_size={"height": size, "width": size},
            resample=Resampling.BICUBIC,
            image_mean=IMAGENET_DEFAULT_MEAN,
            image_std=IMAGENET_DEFAULT_STD,
        )

    def features(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values=pixel_values).last_hidden_state[:, 0]


class ClipEncoder(Encoder):
    """A CLIP model."""

    metric = "CLIP-I"

    def __init__(self, name: str) -> None:
        super().__init__("--clip", name)
        self.text_column = self.column.replace("CLIP-I", "CLIP-T", 1)
        if not hasattr(self.model, "get_text_features"):
            kind = type(self.model).__name__
            raise RunError(f"--clip {name}: expected a CLIP such as openai/clip-vit-base-patch32, got a {kind}.")
        with one_line_errors(f"--clip {name}: its tokenizer or image processor cannot be read"):
            self.processor = AutoProcessor.from_pretrained(name)

    def features(self, pixel_values: Tensor) -> Tensor:
        return self.model.get_image_features(pixel_values=pixel_values).pooler_output

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Return normalized embeddings (n, d) on the CPU. Long texts are truncated."""
        tokens = self.processor(text=list(texts), return_tensors="pt", padding=True, truncation=True)
        tokens = {name: tokens[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
        return F.normalize(self.model.get_text_features(**tokens).pooler_output, dim=-1).cpu()
