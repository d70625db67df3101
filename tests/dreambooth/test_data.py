"""Photos to items and batches: which come together, in which order, cropped how."""

from pathlib import Path

import pytest
import torch
from support.images import corner, gray, map_of_pixels, plain
from support.runs import as_photos

from diffusers_lipreg.dreambooth.data import DreamBoothDataset, collate
from diffusers_lipreg.dreambooth.images import PhotoTransform


@pytest.mark.parametrize(
    ("instance", "classes", "pairs"),
    [
        ([10, 20], [], [(10, None), (20, None)]),
        ([10, 20], [110, 120], [(10, 110), (20, 120)]),
        ([10, 20], [110, 120, 130], [(10, 110), (20, 120), (10, 130)]),
        ([10, 20, 30], [110], [(10, 110), (20, 110), (30, 110)]),
    ],
)
def test_the_shorter_list_starts_over(
    tmp_path: Path, instance: list[int], classes: list[int], pairs: list[tuple[int, int | None]]
) -> None:
    transform = PhotoTransform(8, center_crop=False)
    dataset = DreamBoothDataset(as_photos(plain(tmp_path, *instance)), plain(tmp_path, *classes), transform)
    assert len(dataset) == len(pairs)
    items = [dataset[index] for index in range(len(dataset))]
    assert [(gray(item["instance"]), gray(item["class"]) if "class" in item else None) for item in items] == pairs


def test_the_instance_photo_is_cropped_before_its_class_image(tmp_path: Path) -> None:
    for name in ("instance.png", "class.png"):
        map_of_pixels(100, 64).save(tmp_path / name)
    transform = PhotoTransform(64, center_crop=False)
    torch.manual_seed(0)
    first, second = (corner(transform(map_of_pixels(100, 64))) for _ in range(2))
    assert first != second
    torch.manual_seed(0)
    item = DreamBoothDataset(as_photos([tmp_path / "instance.png"]), [tmp_path / "class.png"], transform)[0]
    assert (corner(item["instance"]), corner(item["class"])) == (first, second)


def test_each_visit_crops_again(tmp_path: Path) -> None:
    map_of_pixels(200, 64).save(tmp_path / "photo.png")
    dataset = DreamBoothDataset(as_photos([tmp_path / "photo.png"]), [], PhotoTransform(64, center_crop=False))
    torch.manual_seed(0)
    assert len({corner(dataset[0]["instance"]) for _ in range(5)}) > 1


def test_a_batch_is_instance_photos_then_class_images(tmp_path: Path) -> None:
    dataset = DreamBoothDataset(
        as_photos(plain(tmp_path, 10, 20)), plain(tmp_path, 110, 120), PhotoTransform(8, False)
    )
    batch = collate([dataset[1], dataset[0]])
    assert batch["has_class_images"] and batch["prompts"][:2] == ["20.png", "10.png"]
    assert [gray(pixels) for pixels in batch["pixel_values"]] == [20, 10, 120, 110]
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["pixel_values"].is_contiguous()


def test_a_batch_without_class_images(tmp_path: Path) -> None:
    dataset = DreamBoothDataset(as_photos(plain(tmp_path, 10, 20)), [], PhotoTransform(8, False))
    assert [gray(pixels) for pixels in collate([dataset[1], dataset[0]])["pixel_values"]] == [20, 10]
