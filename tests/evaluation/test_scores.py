"""Scores against plain computations: loops over pairs, the libraries' own transforms, numbers by hand."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoModel, AutoProcessor, CLIPModel

from diffusers_lipreg.errors import RunError
from diffusers_lipreg.evaluation import scores
from diffusers_lipreg.evaluation.encoders import ClipEncoder, DinoEncoder
from diffusers_lipreg.evaluation.generation import ImageSpec, SubjectFiles, image_set
from diffusers_lipreg.evaluation.prompts import Subject


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
    """The original transform: 32 * 256 / 224 = 37 pixels for the shorter side, then the 32 x 32 in the center."""
    batch = []
    for path in paths:
        image = Image.open(path)
        image = image.resize((37 * image.width // image.height, 37), Image.Resampling.BICUBIC)
        left, top = (image.width - 32) // 2, (image.height - 32) // 2
        values = np.asarray(image.crop((left, top, left + 32, top + 32)), dtype=np.float32) / 255
        batch.append((values - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225]))
    pixels = torch.tensor(np.array(batch), dtype=torch.float32).permute(0, 3, 1, 2)
    return AutoModel.from_pretrained(model)(pixel_values=pixels).last_hidden_state[:, 0]


def test_a_subjects_scores_equal_a_plain_computation(tmp_path, clip, dino):
    photos = noise_images(tmp_path, 3, seed=0)
    subject = Subject("sks_dog", "sks dog", "dog", tmp_path, "p", ("a {} here", "a red {}"))
    images = image_set(subject, ["a tree", "a house", "a car"], 3)
    folders = {side: tmp_path / side for side in ("base", "personalized")}
    for seed, folder in enumerate(folders.values(), start=1):
        generated = [image for rows in images for row in rows for image in row]
        for path, image in zip(noise_images(folder, len(generated), seed), generated, strict=True):
            path.rename(image.path(folder))
    got = scores.score_subject(
        subject, SubjectFiles(photos, images, folders), [DinoEncoder(str(dino)), ClipEncoder(str(clip))]
    )

    model, processor = CLIPModel.from_pretrained(clip), AutoProcessor.from_pretrained(clip)

    @torch.no_grad()
    def plain_clip(paths: list[Path]) -> torch.Tensor:
        images = [Image.open(path) for path in paths]
        return model(**processor(text=["x"], images=images, return_tensors="pt")).image_embeds

    def paths(rows: list[list[ImageSpec]], side: str) -> list[Path]:
        return [image.path(folders[side]) for row in rows for image in row]

    embedders = {"DINO tiny-dino": lambda p: plain_dino(dino, p), "CLIP-I tiny-clip": plain_clip}
    for column, embed in embedders.items():
        real = embed(photos)
        assert got["scores"]["real"][column] == pytest.approx(plain_mean(real, real, same=True), abs=1e-6)
        for side in folders:
            generated = embed(paths(images.subject, side))
            assert got["scores"][side][column] == pytest.approx(plain_mean(generated, real), abs=1e-6)
            within = [plain_mean(rows, rows, same=True) for rows in generated.split(3)]
            assert got["scores"][side][f"diversity, {column}"] == pytest.approx(1 - sum(within) / 2, abs=1e-6)
            of_class = plain_mean(embed(paths(images.of_class, side)), real)
            assert got["scores"][side][f"class resemblance, {column}"] == pytest.approx(of_class, abs=1e-6)
        before, after = (embed(paths(images.unrelated, side)) for side in folders)
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
            for rows, t in zip(plain_clip(paths(images.subject, "base")).split(3), text.text_embeds, strict=True)
        ]
    )
    assert got["scores"]["base"]["CLIP-T tiny-clip"] == pytest.approx(plain.mean().item(), abs=1e-6)
    assert "CLIP-T tiny-clip" not in got["scores"]["real"]


def test_means_over_pairs_by_hand():
    east, north = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert scores.mean_cosine(torch.stack([east, north]), east[None]) == 0.5
    assert scores.mean_cosine_within(torch.stack([east, east, north])) == pytest.approx(1 / 3)  # of pairs 12, 13, 23
    assert scores.mean_cosine_within(torch.stack([torch.stack([east, east]), torch.stack([east, north])])) == 0.5
    assert scores.mean_cosine_within(east[None]) is None


def test_pixel_change_by_hand(tmp_path):
    for name, level in (("black", 0), ("gray", 51)):
        Image.new("RGB", (4, 4), (level, level, level)).save(tmp_path / f"{name}.png")
    assert scores.pixel_change(tmp_path / "black.png", tmp_path / "gray.png") == pytest.approx(0.2**2)


def test_the_bootstrap_interval_is_that_of_the_mean():
    values = np.random.default_rng(0).normal(0.6, 0.1, 200).tolist()
    found = scores.mean_over_subjects([*values, None])
    low, high = found["interval"]
    error = np.std(values) / 200**0.5
    assert found["mean"] == pytest.approx(np.mean(values)) and found["subjects"] == 200
    assert low == pytest.approx(np.mean(values) - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(np.mean(values) + 1.96 * error, abs=0.1 * error)
    assert scores.mean_over_subjects([0.5]) == {"mean": 0.5, "interval": [0.5, 0.5], "subjects": 1}
    assert scores.mean_over_subjects([None]) is None


def test_texts_longer_than_the_model_takes_are_cut(clip):
    assert ClipEncoder(str(clip)).texts(["dog " * 200, "a dog"]).shape == (2, 8)


@pytest.mark.parametrize(("encoder", "flag"), [(DinoEncoder, "--dino"), (ClipEncoder, "--clip")])
def test_a_missing_encoder_is_named(encoder, flag, tmp_path):
    with pytest.raises(RunError, match=f"^{flag} {tmp_path}/none: no model of transformers can be read") as raised:
        encoder(f"{tmp_path}/none")
    assert "\n" not in str(raised.value)


def test_an_encoder_of_another_kind_is_refused(clip, dino):
    with pytest.raises(RunError, match="expected a CLIP such as .*, got a ViTModel"):
        ClipEncoder(str(dino))
    with pytest.raises(RunError, match="expected a ViT such as .*, got a CLIPModel"):
        DinoEncoder(str(clip))
