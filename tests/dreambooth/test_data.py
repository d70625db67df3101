"""Photos to batches: the pixels, crops and random draws of the official scripts, also after a resume."""

import io
import random
import struct
import subprocess
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import EpsImagePlugin, Image, PngImagePlugin, features
from support.runs import as_photos
from torch import Tensor
from torch.utils.data import DataLoader

from diffusers_lipreg.dreambooth.data import (
    DreamBoothDataset,
    PhotoTransform,
    collate,
    decode,
    find_instance_images,
    list_images,
    open_image,
    silence_decoders,
)
from diffusers_lipreg.dreambooth.resumable import ResumableDataset
from diffusers_lipreg.errors import RunError


@pytest.fixture
def accelerator(fresh_accelerate) -> Accelerator:
    """Also what the package's logger needs."""
    return Accelerator(cpu=True)


def map_of_pixels(width: int, height: int) -> Image.Image:
    """An image whose every pixel says where it is: red is its column, green its row."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([columns, rows, 0 * rows], axis=-1).astype(np.uint8))


def corner(pixels: Tensor) -> tuple[int, int]:
    """Row and column that the upper left pixel of a cropped `map_of_pixels` had."""
    column, row = ((pixels[:2, 0, 0] / 2 + 0.5) * 255).round().int().tolist()
    return row, column


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the log says, without the rank that newer versions of accelerate put before it."""
    return [message.removeprefix("[RANK 0] ") for message in caplog.messages]


# Resize


@pytest.mark.parametrize(
    ("size", "resized"),
    [
        ((96, 80), (76, 64)),  # 64 * 96 / 80 = 76.8: cut, not rounded
        ((72, 128), (64, 113)),  # 113.8
        ((101, 67), (96, 64)),  # 96.5
        ((67, 101), (64, 96)),
        ((100, 100), (64, 64)),
        ((30, 20), (96, 64)),  # upwards, too
        ((65, 4000), (64, 3938)),
    ],
)
def test_the_short_side_is_resized_bilinearly(size: tuple[int, int], resized: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    result = PhotoTransform(64, center_crop=False).resize(image)
    assert result.size == resized
    assert result.tobytes() == image.resize(resized, Image.Resampling.BILINEAR).tobytes()


@pytest.mark.parametrize("size", [(64, 64), (64, 200), (200, 64)])
def test_a_short_side_of_the_right_size_is_left_alone(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size)
    assert PhotoTransform(64, center_crop=False).resize(image) is image


# Crop


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("width", "height"), [(100, 64), (64, 100)])
def test_a_random_crop_draws_row_then_column(width: int, height: int, seed: int) -> None:
    torch.manual_seed(seed)
    row = torch.randint(0, height - 64 + 1, size=(1,)).item()
    column = torch.randint(0, width - 64 + 1, size=(1,)).item()
    state = torch.get_rng_state()

    torch.manual_seed(seed)
    pixels = PhotoTransform(64, center_crop=False)(map_of_pixels(width, height))
    assert corner(pixels) == (row, column)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("size", [(64, 64), (100, 100), (32, 32)])
def test_a_square_photo_draws_nothing(size: tuple[int, int]) -> None:
    state = torch.get_rng_state()
    PhotoTransform(64, center_crop=False)(Image.new("RGB", size))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("width", "height", "row", "column"),
    [
        (65, 64, 0, 0),  # halves go to the even neighbour: 0.5 to 0,
        (67, 64, 0, 2),  # 1.5 to 2,
        (69, 64, 0, 2),  # 2.5 to 2
        (66, 64, 0, 1),
        (64, 67, 2, 0),
        (64, 64, 0, 0),
    ],
)
def test_the_centre_crop_rounds_halves_to_even_and_draws_nothing(
    width: int, height: int, row: int, column: int
) -> None:
    state = torch.get_rng_state()
    pixels = PhotoTransform(64, center_crop=True)(map_of_pixels(width, height))
    assert pixels.shape == (3, 64, 64)
    assert corner(pixels) == (row, column)
    assert torch.equal(torch.get_rng_state(), state)


# Values


def test_values_are_scaled_exactly() -> None:
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.stack([values, values.T, 255 - values], axis=-1))
    pixels = PhotoTransform(16, center_crop=False)(image)
    scaled = (values.astype(np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
    assert (scaled.min(), scaled.max()) == (-1, 1)
    expected = torch.from_numpy(np.stack([scaled, scaled.T, scaled[::-1, ::-1]]))
    torch.testing.assert_close(pixels, expected, rtol=0, atol=0)
    assert pixels.is_contiguous()


@pytest.mark.parametrize(
    ("mode", "color", "suffix", "expected"),
    [
        ("L", 51, "png", 51),
        ("1", 0, "png", 0),
        ("P", 0, "png", 51),
        ("CMYK", (0, 0, 0, 204), "jpg", 51),
        ("RGBA", (51, 51, 51, 255), "png", 51),
        ("RGBA", (51, 51, 51, 127), "png", 153),  # (51 * 127 + 255 * 128) / 255: half of the way to white
        ("RGBA", (51, 51, 51, 0), "webp", 255),
        ("LA", (51, 0), "png", 255),
        ("I;16", 51 << 8, "png", 51),
        ("I", 51, "tif", 51),
        ("I", 51 << 8, "tif", 51),
        ("F", 0.2, "tif", 51),
        ("F", 51.0, "tif", 51),
        ("F", float("nan"), "tif", 0),
    ],
)
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str, color: Any, suffix: str, expected: int) -> None:
    image = Image.new(mode, (8, 8), color)
    if mode == "P":
        image.putpalette([51, 51, 51])
    image.save(tmp_path / f"photo.{suffix}", lossless=True)
    opened = open_image(tmp_path / f"photo.{suffix}")
    assert opened.mode == "RGB"
    assert opened.getpixel((3, 3)) == pytest.approx((expected,) * 3, abs=2)  # JPEG is not exact


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "LA", "CMYK"])
def test_without_transparency_pixels_are_those_of_pils_own_conversion(tmp_path: Path, mode: str) -> None:
    image = Image.open(save_photo(tmp_path / "photo.png")).convert(mode)
    image.save(tmp_path / "photo.tif")
    if mode == "P":
        image.save(tmp_path / "photo.png", transparency=b"\xff" * 256)  # a palette with opacities, all full
    for path in tmp_path.iterdir():
        with Image.open(path) as stored:
            assert open_image(path).tobytes() == stored.convert("RGB").tobytes()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_cut_outs_lie_on_white_which_is_said_once(
    tmp_path: Path, accelerator: Accelerator, caplog: pytest.LogCaptureFixture, mode: str
) -> None:
    caplog.set_level("INFO")
    save_photo(tmp_path / "whole.png")
    for name in ("0.png", "1.png"):
        image = Image.new(mode, (16, 8), 0)  # black, and all of it transparent
        if mode == "P":
            image.putpalette([0, 0, 0])
            image.save(tmp_path / name, transparency=0)
        else:
            image.save(tmp_path / name)
    assert len(find_instance_images(tmp_path)) == 3
    assert said(caplog) == ["2 images have transparent parts, which are white here."]
    assert open_image(tmp_path / "0.png").getextrema() == ((255, 255),) * 3


def exif(*entries: tuple[int, int, int, bytes]) -> bytes:
    """EXIF data of (tag, type, count, value); values of more than four bytes are at its end."""
    at, rows, values = 8 + 2 + 12 * len(entries) + 4, b"", b""
    for tag, kind, count, value in entries:
        rows += struct.pack("<HHL", tag, kind, count)
        rows += value.ljust(4, b"\0") if len(value) <= 4 else struct.pack("<L", at + len(values))
        values += value if len(value) > 4 else b""
    return b"Exif\0\0II*\0" + struct.pack("<LH", 8, len(entries)) + rows + bytes(4) + values


ROTATED = (0x0112, 3, 1, struct.pack("<H", 6))


@pytest.mark.parametrize(
    ("data", "turned"),
    [
        (
            exif(ROTATED, (0x011A, 10, 1, struct.pack("<ll", -1, 0))),
            True,
        ),  # a resolution of -1/0, which PIL cannot write
        (exif(ROTATED)[:20], False),
        (b"Exif\0\0garbage", False),
    ],
    ids=["resolution of -1/0", "cut off", "garbage"],
)
def test_broken_exif_data_costs_no_photo(train, tmp_path: Path, data: bytes, turned: bool) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (80, 64)).save(photos / "photo.jpg", exif=data)
    assert open_image(photos / "photo.jpg").size == ((64, 80) if turned else (80, 64))
    out = train(tmp_path / "out", "--instance_data_dir", str(photos), "--max_train_steps", "1", "--rank", "1")
    assert (out / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize(
    "error",
    [struct.error("x"), TypeError(), AttributeError(), KeyError(7), MemoryError(), RecursionError(), AssertionError()],
    ids=lambda error: type(error).__name__,
)
def test_whatever_a_decoder_raises_becomes_one_line(
    tmp_path: Path,
    accelerator: Accelerator,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    def load(image: Image.Image) -> None:
        raise error

    save_photo(tmp_path / "photo.png")
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    assert list_images(tmp_path) == []
    (line,) = said(caplog)
    assert line.startswith(f"Skipped {tmp_path / 'photo.png'}: not an image that can be read ({type(error).__name__}")


def test_mutated_images_are_rgb_or_refused_and_nothing_else_is_said(tmp_path: Path, capfd) -> None:
    """A decoder sees three hundred damaged files of six formats."""
    chance, seeds = random.Random(0), []
    image = Image.open(save_photo(tmp_path / "photo.png", (60, 40)))
    for number, kind in enumerate(("jpeg", "png", "webp", "gif", "tiff", "tiff")):
        options = {"compression": "tiff_deflate"} if number == 5 else {}
        image.save(path := tmp_path / f"{number}.{kind}", exif=exif(ROTATED), **options)
        seeds.append(path.read_bytes())
    seen = Counter()
    with silence_decoders(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(300):
            data = bytearray(chance.choice(seeds))
            for _ in range(chance.choice((1, 2, 8))):
                data[chance.randrange(min(len(data), 600))] = chance.randrange(256)
            try:
                decoded, _ = decode(io.BytesIO(data), "damaged")
            except RunError:
                seen["refused"] += 1
            else:
                assert decoded.mode == "RGB" and decoded.getextrema()
                seen["read"] += 1
    assert min(seen.values()) > 50
    assert capfd.readouterr() == ("", "")


def test_no_image_starts_a_program(tmp_path: Path, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    """PIL hands EPS, whatever its name, to Ghostscript."""
    started = []
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", "gs")
    monkeypatch.setattr(subprocess, "check_call", lambda *args, **_: started.append(args))
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.eps")
    (tmp_path / "photo.eps").rename(tmp_path / "photo.png")
    assert list_images(tmp_path) == []
    assert not started


def test_a_photo_is_turned_the_way_its_exif_data_says(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20), "blue")
    image.paste("red", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: the left edge is up
    image.save(tmp_path / "photo.png", exif=exif)
    opened = open_image(tmp_path / "photo.png")
    assert opened.size == (20, 40)
    assert (opened.getpixel((0, 0)), opened.getpixel((19, 39))) == ((255, 0, 0), (0, 0, 255))
    item = DreamBoothDataset(as_photos([tmp_path / "photo.png"]), [], PhotoTransform(20, center_crop=True))[0]
    assert item["instance"][:, 0].mean(dim=-1).tolist() == [1, -1, -1]  # a red row on top


# Folders


def save_photo(path: Path, size: tuple[int, int] = (16, 16), seed: int = 0) -> Path:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def broken(kind: str, folder: Path) -> Path:
    """A file that looks like an image by its name."""
    path = folder / f"{kind.replace(' ', '-')}.png"
    if kind == "truncated":
        path.write_bytes(save_photo(path).read_bytes()[:200])
    elif kind == "truncated jpeg":
        path = save_photo(path.with_suffix(".jpg"), (64, 64))
        path.write_bytes(path.read_bytes()[:-500])
    elif kind == "damaged avif":
        path = save_photo(path.with_suffix(".avif"))
        head, _, data = path.read_bytes().partition(b"mdat")
        path.write_bytes(head + b"mdat" + bytes(len(data)))
    elif kind == "dangling link":
        path.symlink_to(folder / "gone.png")
    else:
        path.write_bytes({"zero bytes": b"", "noise": b"\x93" * 500, "text": b"a red dog"}[kind])
    return path


def test_images_come_sorted_without_what_else_is_in_the_folder(
    tmp_path: Path, accelerator: Accelerator, caplog: pytest.LogCaptureFixture
) -> None:
    good = [save_photo(tmp_path / name) for name in ("b.png", "a.jpg", "10.webp", "9.bmp", "C.PNG")]
    for name in (".hidden.png", "sub/inside.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save_photo(tmp_path / name)
    (tmp_path / "sub.png").mkdir()
    Path(tmp_path, ".DS_Store").write_bytes(b"\x00")
    assert list_images(tmp_path) == list_images(str(tmp_path)) == sorted(good)
    assert not caplog.records


@pytest.mark.parametrize(
    "kind",
    [
        "zero bytes",
        "noise",
        "text",
        "truncated",
        "truncated jpeg",
        pytest.param(
            "damaged avif",
            marks=[
                pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF"),
            ],
        ),
    ],
)
def test_a_broken_image_is_left_out_with_a_warning(
    tmp_path: Path, accelerator: Accelerator, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    bad = broken(kind, tmp_path)
    good = save_photo(tmp_path / "good.png")
    assert list_images(tmp_path) == [good]
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert str(bad) in record.getMessage()
    assert "\n" not in record.getMessage()


def test_other_files_are_named_in_one_line_and_broken_images_up_to_five(
    tmp_path: Path, accelerator: Accelerator, caplog: pytest.LogCaptureFixture
) -> None:
    save_photo(tmp_path / "0.png")
    (tmp_path / "0.txt").write_text("its caption")
    (tmp_path / "metadata.jsonl").write_text("")
    for number in range(1000):
        (tmp_path / f"{number:04}.json").write_text("{}")
    for number in range(8):
        (tmp_path / f"broken-{number}.jpg").write_bytes(b"no image")
    assert list_images(tmp_path) == [tmp_path / "0.png"]
    *broken, more, others = said(caplog)
    assert [f"broken-{number}.jpg" in line for number, line in enumerate(broken)] == [True] * 5
    assert more == "Skipped 3 more images that cannot be read."
    assert (
        others
        == f"Skipped 1,000 files of {tmp_path} that are no images: 0000.json, 0001.json, 0002.json and 997 more."
    )


def test_images_in_sub_folders_get_a_hint(
    tmp_path: Path, accelerator: Accelerator, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("10_sks dog/0.png", "10_sks dog/1.png", "reg/1_dog/2.png", ".thumbnails/0.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        save_photo(tmp_path / name)
    where = "2 in 10_sks dog, 1 in reg/1_dog"
    with pytest.raises(RunError, match=f"can be read. There are {where}: point --instance_data_dir there.$"):
        find_instance_images(tmp_path)
    save_photo(tmp_path / "0.png")
    assert find_instance_images(tmp_path) == [tmp_path / "0.png"]
    assert said(caplog) == [
        f"{tmp_path}: images in its sub-folders are not used ({where}): --instance_data_dir takes one folder."
    ]


def test_a_dangling_link_is_left_out(tmp_path: Path) -> None:
    broken("dangling link", tmp_path)
    assert list_images(tmp_path) == []


@pytest.mark.parametrize("content", ["missing", "file", "empty", "only broken"])
def test_a_folder_without_images_is_an_error_that_names_it(
    tmp_path: Path, accelerator: Accelerator, content: str
) -> None:
    folder = tmp_path / "photos"
    if content == "file":
        save_photo(tmp_path / "photos.png").rename(folder)
    elif content != "missing":
        folder.mkdir()
    if content == "only broken":
        broken("zero bytes", folder)
        broken("text", folder)
    with pytest.raises(RunError) as refused:
        find_instance_images(folder)
    assert f"--instance_data_dir {folder}: there is no" in str(refused.value)


def test_a_folder_with_images_gives_them(tmp_path: Path) -> None:
    path = save_photo(tmp_path / "a.png")
    assert find_instance_images(tmp_path) == [path]


# Items and batches


def plain(folder: Path, *values: int) -> list[Path]:
    """8x8 photos, each of one grey value."""
    paths = [folder / f"{value}.png" for value in values]
    for path, value in zip(paths, values, strict=True):
        Image.new("RGB", (8, 8), (value,) * 3).save(path)
    return paths


def grey(pixels: Tensor) -> int:
    """The grey value of a plain photo."""
    assert pixels.shape == (3, 8, 8)
    return round((pixels.mean().item() / 2 + 0.5) * 255)


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
    assert [(grey(item["instance"]), grey(item["class"]) if "class" in item else None) for item in items] == pairs


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


def test_each_visit_crops_anew(tmp_path: Path) -> None:
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
    assert [grey(pixels) for pixels in batch["pixel_values"]] == [20, 10, 120, 110]
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["pixel_values"].is_contiguous()


def test_a_batch_without_class_images(tmp_path: Path) -> None:
    dataset = DreamBoothDataset(as_photos(plain(tmp_path, 10, 20)), [], PhotoTransform(8, False))
    assert [grey(pixels) for pixels in collate([dataset[1], dataset[0]])["pixel_values"]] == [20, 10]


# The order of batches, and taking it up again

BATCHES = 4  # of 2, 2, 2 and 1 photos


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    """Seven photos, one of them square, that no two crops of look alike."""
    sizes = [(40, 16), (16, 40), (16, 16), (48, 16), (16, 24), (30, 16), (16, 60)]
    return [save_photo(tmp_path / f"{seed}.png", size, seed) for seed, size in enumerate(sizes)]


def resumable(
    accelerator: Accelerator, photos: list[Path], size: int = 16, **options: Any
) -> DataLoader[ResumableDataset]:
    """The loader as the script makes it."""
    dataset = DreamBoothDataset(as_photos(photos), [], PhotoTransform(size, center_crop=False))
    resumable = ResumableDataset(dataset, options.get("persistent_workers", False))
    loader = DataLoader(resumable, batch_size=2, sampler=resumable.sampler, collate_fn=collate, **options)
    return accelerator.prepare(loader)


def train(loader: DataLoader, epochs: int) -> list[tuple[Tensor, Tensor]]:
    """The batches, and what the steps on them drew."""
    return [(batch["pixel_values"], torch.randn(3)) for _ in range(epochs) for batch in loader]


def assert_same_run(actual: list[tuple[Tensor, Tensor]], expected: list[tuple[Tensor, Tensor]]) -> None:
    assert len(actual) == len(expected)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("read_ahead", [False, True])
def test_order_crops_and_draws_are_those_of_torchs_shuffle(
    accelerator: Accelerator, photos: list[Path], read_ahead: bool
) -> None:
    dataset = DreamBoothDataset(as_photos(photos), [], PhotoTransform(16, center_crop=False))
    runs = []
    for options in (
        {"batch_size": 2, "shuffle": True},
        {"batch_size": 2, "dataset": (again := ResumableDataset(dataset)), "sampler": again.sampler},
    ):
        loader = DataLoader(**{"dataset": dataset, "collate_fn": collate, **options})
        assert len(loader) == BATCHES
        torch.manual_seed(0)
        seen = train(accelerator.prepare(loader) if read_ahead else loader, epochs=2)
        runs.append((seen, torch.get_rng_state()))
    (expected, expected_state), (actual, state) = runs
    assert_same_run(actual, expected)
    assert torch.equal(state, expected_state)


class Uninterrupted:
    """Two epochs in one go, and after each step what a checkpoint would hold."""

    def __init__(self, accelerator: Accelerator, photos: list[Path], **options: Any) -> None:
        loader = resumable(accelerator, photos, **options)
        torch.manual_seed(0)
        self.seen: list[tuple[Tensor, Tensor]] = []
        self.saved = []
        for _ in range(2):
            for batch in loader:
                self.seen.append((batch["pixel_values"], torch.randn(3)))
                self.saved.append((loader.dataset.state_dict(), torch.get_rng_state()))
        self.final_state = torch.get_rng_state()


def resume(loader: DataLoader[ResumableDataset], step: int, saved: tuple[dict[str, Tensor], Tensor]) -> None:
    """What loading a checkpoint does, in a process that has drawn other numbers."""
    torch.manual_seed(1234)
    state, now = saved
    torch.set_rng_state(now)
    if step % BATCHES:
        loader.dataset.resume(loader, step % BATCHES, state)
    # What is drawn from here to the first batch, such as the loader's seed of its workers, leaves no trace.


@pytest.mark.parametrize("step", range(1, 2 * BATCHES + 1))
def test_a_resumed_run_is_the_uninterrupted_one(accelerator: Accelerator, photos: list[Path], step: int) -> None:
    whole = Uninterrupted(accelerator, photos)
    loader = resumable(accelerator, photos)
    resume(loader, step, whole.saved[step - 1])
    assert_same_run(train(loader, epochs=2 - step // BATCHES), whole.seen[step:])
    assert torch.equal(torch.get_rng_state(), whole.final_state)


def test_a_run_may_be_interrupted_twice_in_an_epoch(accelerator: Accelerator, photos: list[Path]) -> None:
    whole = Uninterrupted(accelerator, photos)
    loader = resumable(accelerator, photos)
    resume(loader, 1, whole.saved[0])
    steps = iter(loader)
    for step in (1, 2):
        seen = next(steps)["pixel_values"], torch.randn(3)
        assert_same_run([seen], [whole.seen[step]])
    saved = loader.dataset.state_dict(), torch.get_rng_state()

    loader = resumable(accelerator, photos)
    resume(loader, 3, saved)
    assert_same_run(train(loader, epochs=2), whole.seen[3:])
    assert torch.equal(torch.get_rng_state(), whole.final_state)


def test_a_state_is_not_changed_by_the_batches_after_it(accelerator: Accelerator, photos: list[Path]) -> None:
    loader = resumable(accelerator, photos)
    steps = iter(loader)
    next(steps)
    state = loader.dataset.state_dict()
    kept = {name: tensor.clone() for name, tensor in state.items()}
    for _ in steps:
        torch.randn(3)
    assert loader.dataset.state_dict().keys() == kept.keys()
    assert not all(torch.equal(tensor, kept[name]) for name, tensor in loader.dataset.state_dict().items())
    torch.testing.assert_close(state, kept, rtol=0, atol=0)


def test_workers_that_stay_draw_as_new_ones(accelerator: Accelerator, photos: list[Path]) -> None:
    """Which is how the official script's loader has them."""
    new, stay = (Uninterrupted(accelerator, photos, num_workers=2, persistent_workers=on) for on in (False, True))
    assert_same_run(stay.seen, new.seen)
    assert torch.equal(stay.final_state, new.final_state)
    assert not torch.equal(new.seen[0][0], new.seen[BATCHES][0])


@pytest.mark.parametrize("step", [1, BATCHES + 1])
def test_with_workers_a_resumed_run_is_the_uninterrupted_one(
    accelerator: Accelerator, photos: list[Path], step: int
) -> None:
    """Their crops, too, which come from random states of their own."""
    workers = {"num_workers": 2, "persistent_workers": True}
    whole = Uninterrupted(accelerator, photos, **workers)
    loader = resumable(accelerator, photos, **workers)
    resume(loader, step, whole.saved[step - 1])
    assert_same_run(train(loader, epochs=2 - step // BATCHES), whole.seen[step:])
    assert torch.equal(torch.get_rng_state(), whole.final_state)


@pytest.mark.parametrize("step", range(1, BATCHES))
def test_an_official_checkpoint_has_the_rest_of_the_epoch_shuffled_anew(
    accelerator: Accelerator, tmp_path: Path, step: int
) -> None:
    greys = [10, 20, 30, 40, 50, 60, 70]
    loader = resumable(accelerator, plain(tmp_path, *greys), size=8)
    loader.dataset.resume(loader, step, {})
    torch.manual_seed(0)
    rest, whole = ([grey(image) for batch in loader for image in batch["pixel_values"]] for _ in range(2))
    assert len(rest) == len(greys) - 2 * step
    assert max(Counter(rest).values()) == 1
    assert sorted(whole) == greys
    torch.manual_seed(0)
    assert [grey(image) for batch in loader for image in batch["pixel_values"]][2 * step :] == rest
