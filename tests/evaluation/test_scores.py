"""Scores against plain computations: loops over pairs, the libraries' own transforms, numbers by hand."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoModel, AutoProcessor, CLIPImageProcessor, CLIPModel

from diffusers_lipreg.errors import RunError
from diffusers_lipreg.evaluation import scores
from diffusers_lipreg.evaluation.generation import ImageSpec
from diffusers_lipreg.evaluation.prompts import one_subject
from diffusers_lipreg.evaluation.results import ImageSet, score_subject

CPU = torch.device("cpu")


def noise_images(folder: Path, count: int, seed: int, size: tuple[int, int] = (48, 40)) -> list[Path]:
    """Smooth random pictures: resizing noise would leave one gray."""
    generator, paths = np.random.default_rng(seed), []
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = generator.integers(0, 256, (6, 5, 3), dtype=np.uint8)
        paths.append(folder / f"{seed}-{number}.png")
        Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(paths[-1])
    return paths


def plain_mean(one: torch.Tensor, other: torch.Tensor, same: bool = False) -> float:
    """The mean cosine over pairs, one at a time."""
    pairs = [(i, j) for i, j in product(range(len(one)), range(len(other))) if not (same and i == j)]
    return sum(F.cosine_similarity(one[i], other[j], dim=0).item() for i, j in pairs) / len(pairs)


@torch.no_grad()
def plain_dino(model: Path, paths: list[Path]) -> torch.Tensor:
    """The original transform, by the processor of another model family."""
    processor = CLIPImageProcessor(
        size={"shortest_edge": 37},  # 32 * 256 / 224, rounded
        crop_size={"height": 32, "width": 32},
        resample=Image.Resampling.BICUBIC,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    pixels = processor(images=[Image.open(path) for path in paths], return_tensors="pt")["pixel_values"]
    return AutoModel.from_pretrained(model)(pixel_values=pixels).last_hidden_state[:, 0]


def test_a_subjects_scores_equal_a_plain_computation(tmp_path, clip, dino):
    photos = noise_images(tmp_path, 3, seed=0)
    subject = one_subject("sks dog", "dog", str(tmp_path), "p", ["a {} here", "a red {}"])

    def image_set(seed: int) -> ImageSet:
        def rows(prompts: int, images: int, seed: int) -> list[list[ImageSpec]]:
            paths = iter(noise_images(tmp_path, prompts * images, seed))
            return [[ImageSpec(f"{row}", number, next(paths)) for number in range(images)] for row in range(prompts)]

        return ImageSet(rows(2, 3, seed), rows(1, 4, seed + 1), rows(3, 2, seed + 2))

    class Generated:
        personalized, base = image_set(10), image_set(20)

    got = score_subject(
        subject, photos, Generated, [scores.DinoEncoder(str(dino), CPU), scores.ClipEncoder(str(clip), CPU)]
    )

    model, processor = CLIPModel.from_pretrained(clip), AutoProcessor.from_pretrained(clip)

    @torch.no_grad()
    def plain_clip(paths: list[Path]) -> torch.Tensor:
        images = [Image.open(path) for path in paths]
        return model(**processor(text=["x"], images=images, return_tensors="pt")).image_embeds

    def paths(rows: list[list[ImageSpec]]) -> list[Path]:
        return [image.path for row in rows for image in row]

    embedders = {"DINO tiny-dino": lambda p: plain_dino(dino, p), "CLIP-I tiny-clip": plain_clip}
    for column, embed in embedders.items():
        real = embed(photos)
        assert got["scores"]["real"][column] == pytest.approx(plain_mean(real, real, same=True), abs=1e-6)
        for side in ("personalized", "base"):
            generated_set = getattr(Generated, side)
            generated = embed(paths(generated_set.subject))
            assert got["scores"][side][column] == pytest.approx(plain_mean(generated, real), abs=1e-6)
            within = [plain_mean(rows, rows, same=True) for rows in generated.split(3)]
            assert got["diversity"][side][column] == pytest.approx(1 - sum(within) / 2, abs=1e-6)
            of_class = plain_mean(embed(paths(generated_set.of_class)), real)
            assert got["class_resemblance"][side][column] == pytest.approx(of_class, abs=1e-6)
        before, after = (
            embed(paths(generated_set.unrelated)) for generated_set in (Generated.base, Generated.personalized)
        )
        change = (1 - F.cosine_similarity(before, after, dim=1)).mean().item()
        assert got["unrelated_change"][column]["mean"] == pytest.approx(change, abs=1e-6)

    with torch.no_grad():
        text = model(
            **processor(
                text=["a dog here", "a red dog"], images=[Image.open(photos[0])], return_tensors="pt", padding=True
            )
        )
    plain = torch.stack(
        [
            F.cosine_similarity(rows, t, dim=-1).mean()
            for rows, t in zip(plain_clip(paths(Generated.base.subject)).split(3), text.text_embeds, strict=True)
        ]
    )
    assert got["scores"]["base"]["CLIP-T tiny-clip"] == pytest.approx(plain.mean().item(), abs=1e-6)
    assert "CLIP-T tiny-clip" not in got["scores"]["real"]


def test_means_over_pairs_by_hand():
    east, north = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert scores.mean_cosine(torch.stack([east, north]), east[None]) == 0.5
    assert scores.mean_cosine_within(torch.stack([east, east, north])) == pytest.approx(1 / 3)  # of pairs 12, 13, 23
    assert scores.mean_cosine_within(east[None]) is None
    assert scores.diversity(torch.stack([torch.stack([east, east]), torch.stack([east, north])])) == pytest.approx(0.5)
    assert scores.text_score(torch.stack([east, north])[None], east[None]) == 0.5


def test_pixel_change_by_hand(tmp_path):
    for name, level in (("black", 0), ("gray", 51)):
        Image.new("RGB", (4, 4), (level, level, level)).save(tmp_path / f"{name}.png")
    assert scores.pixel_change([(tmp_path / "black.png", tmp_path / "gray.png")]) == [pytest.approx(0.2**2)]


def test_the_bootstrap_interval_is_that_of_the_mean():
    values = np.random.default_rng(0).normal(0.6, 0.1, 200).tolist()
    low, high = scores.bootstrap_interval(values)
    error = np.std(values) / 200**0.5
    assert low == pytest.approx(np.mean(values) - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(np.mean(values) + 1.96 * error, abs=0.1 * error)
    assert scores.bootstrap_interval([0.5]) == (0.5, 0.5)


def test_texts_longer_than_the_model_takes_are_cut(clip):
    assert scores.ClipEncoder(str(clip), CPU).texts(["dog " * 200, "a dog"]).shape == (2, 8)


@pytest.mark.parametrize(("encoder", "flag"), [(scores.DinoEncoder, "--dino"), (scores.ClipEncoder, "--clip")])
def test_a_missing_encoder_is_named(encoder, flag, tmp_path):
    with pytest.raises(RunError, match=f"^{flag} {tmp_path}/none: no model of transformers can be read") as raised:
        encoder(f"{tmp_path}/none", CPU)
    assert "\n" not in str(raised.value)


def test_an_encoder_of_another_kind_is_refused(clip, dino):
    with pytest.raises(RunError, match="expected a CLIP such as .*, got a ViTModel"):
        scores.ClipEncoder(str(dino), CPU)
    with pytest.raises(RunError, match="expected a ViT such as .*, got a CLIPModel"):
        scores.DinoEncoder(str(clip), CPU)
