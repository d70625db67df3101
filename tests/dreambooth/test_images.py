"""Files to pixels: which images are read, and how they are resized and cropped, as in the official scripts."""

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
from support.images import corner, map_of_pixels, save_photo
from support.runs import as_photos, said

from diffusers_lipreg.dreambooth.data import DreamBoothDataset
from diffusers_lipreg.dreambooth.images import (
    PhotoTransform,
    find_instance_images,
    list_images,
    open_image,
)
from diffusers_lipreg.errors import RunError


@pytest.fixture
def accelerator(fresh_accelerate) -> Accelerator:
    """Also what the package's logger needs."""
    return Accelerator(cpu=True)


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
        (65, 64, 0, 0),  # halves go to the even neighbor: 0.5 to 0,
        (67, 64, 0, 2),  # 1.5 to 2,
        (69, 64, 0, 2),  # 2.5 to 2
        (66, 64, 0, 1),
        (64, 67, 2, 0),
        (64, 64, 0, 0),
    ],
)
def test_the_center_crop_rounds_halves_to_even_and_draws_nothing(
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


def test_mutated_images_are_rgb_or_refused(tmp_path: Path) -> None:
    """A decoder sees three hundred damaged files of six formats."""
    chance, seeds = random.Random(0), []
    image = Image.open(save_photo(tmp_path / "photo.png", (60, 40)))
    for number, kind in enumerate(("jpeg", "png", "webp", "gif", "tiff", "tiff")):
        options = {"compression": "tiff_deflate"} if number == 5 else {}
        image.save(path := tmp_path / f"{number}.{kind}", exif=exif(ROTATED), **options)
        seeds.append(path.read_bytes())
    seen = Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(300):
            data = bytearray(chance.choice(seeds))
            for _ in range(chance.choice((1, 2, 8))):
                data[chance.randrange(min(len(data), 600))] = chance.randrange(256)
            try:
                decoded = open_image(io.BytesIO(data), "damaged")
            except RunError:
                seen["refused"] += 1
            else:
                assert decoded.mode == "RGB" and decoded.getextrema()
                seen["read"] += 1
    assert min(seen.values()) > 50


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
