"""Class images: those that are there are counted, those that are missing are sampled."""

import re
from argparse import Namespace
from hashlib import sha1
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import PARITY, flags
from diffusers import DiffusionPipeline
from PIL import Image

from diffusers_lipreg.dreambooth import prior
from diffusers_lipreg.dreambooth.models import Base
from diffusers_lipreg.dreambooth.preflight import open_base
from train_dreambooth_lipreg import parse_args


@pytest.fixture
def accelerator(fresh_accelerate) -> Accelerator:
    return Accelerator(cpu=True)


@pytest.fixture
def no_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    def sample(*_: object) -> None:
        pytest.fail("class images were sampled")

    monkeypatch.setattr(prior, "sample_class_images", sample)


def arguments(folder: Path, number: int, *more: str) -> Namespace:
    return parse_args(
        flags(
            *("out", "--with_prior_preservation", "--class_data_dir", str(folder)),
            *("--class_prompt", "a photo of dog", "--num_class_images", str(number), *more),
        )
    )


def save_images(folder: Path, *names: str) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (8, 8)).save(folder / name)
    return [folder / name for name in names]


@pytest.mark.parametrize(
    ("precision", "device", "dtype"),
    [
        (None, "cpu", torch.float32),
        (None, "cuda", torch.float16),
        (None, "mps", torch.float32),
        ("no", "cpu", torch.float32),
        ("no", "cuda", torch.float16),
        ("fp32", "cuda", torch.float32),
        ("fp16", "cpu", torch.float16),
        ("bf16", "cpu", torch.bfloat16),
        ("bf16", "cuda", torch.bfloat16),
    ],
)
def test_precision(precision: str | None, device: str, dtype: torch.dtype) -> None:
    assert prior.prior_dtype(precision, torch.device(device)) == dtype


def test_enough_images_are_used_as_they_are(tmp_path: Path, accelerator: Accelerator, no_sampling: None) -> None:
    images = save_images(tmp_path, "c.png", "a.jpg", "b.png")
    assert prior.ensure_class_images(arguments(tmp_path, 3), accelerator, base=None) == sorted(images)


def test_no_more_are_used_than_asked_for(tmp_path: Path, accelerator: Accelerator, no_sampling: None) -> None:
    images = save_images(tmp_path, "c.png", "a.jpg", "b.png")
    assert prior.ensure_class_images(arguments(tmp_path, 2), accelerator, base=None) == sorted(images)[:2]


def test_what_is_no_image_does_not_count(
    tmp_path: Path, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = save_images(tmp_path, "b.png")
    save_images(tmp_path / "sub", "inside.png")
    save_images(tmp_path, ".hidden.png")
    Path(tmp_path, "captions.txt").write_text("a dog")
    Path(tmp_path, "broken.jpg").write_bytes(b"")
    asked = []

    def sample(args: Namespace, accelerator: Accelerator, folder: Path, present: int, base: Base) -> None:
        asked.append((folder, present))
        good.extend(save_images(folder, "1-sampled.jpg", "2-sampled.jpg"))

    monkeypatch.setattr(prior, "sample_class_images", sample)
    assert prior.ensure_class_images(arguments(tmp_path, 3), accelerator, base=None) == sorted(good)
    assert asked == [(tmp_path, 1)]


def test_missing_images_are_sampled_without_a_generator_of_their_own(tmp_path: Path, accelerator: Accelerator) -> None:
    folder = tmp_path / "class" / "images"
    (present,) = save_images(folder, "there.png")
    torch.manual_seed(0)
    args = arguments(folder, 3, "--sample_batch_size", "2")
    base = open_base(args, accelerator, sdxl=False)
    images = prior.ensure_class_images(args, accelerator, base)
    state = torch.get_rng_state()

    # As the official script: the loader's seed, then a batch of the plain pipeline.
    torch.manual_seed(0)
    torch.empty((), dtype=torch.int64).random_()
    pipeline = DiffusionPipeline.from_pretrained(PARITY / "pipeline", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(["a photo of dog"] * 2).images
    assert torch.equal(torch.get_rng_state(), state)
    sampled = [folder / f"{n + 1}-{sha1(image.tobytes()).hexdigest()}.jpg" for n, image in enumerate(expected)]
    assert images == [*sampled, present]
    for path, image in zip(sampled, expected, strict=True):
        assert re.fullmatch(r"\d+-[0-9a-f]{40}\.jpg", path.name)
        assert Image.open(path).size == image.size == (64, 64)


def test_the_folder_is_made_and_batches_fill_it_exactly(
    tmp_path: Path, accelerator: Accelerator
) -> None:
    asked = []

    class Pipeline:
        """Paints instead of sampling: the n-th image is n times 10 grey."""

        def pipeline(self, dtype: torch.dtype, safety_checker: None) -> "Pipeline":
            asked.append(dtype)
            return self

        def to(self, device: torch.device) -> "Pipeline":
            asked.append(device)
            return self

        def set_progress_bar_config(self, **_: object) -> None:
            pass

        def __call__(self, prompts: list[str]) -> Namespace:
            asked.append(prompts)
            first = 10 * sum(len(prompts) for prompts in asked[2:-1])
            return Namespace(images=[Image.new("RGB", (8, 8), (first + 10 * i,) * 3) for i in range(len(prompts))])

    more = ["--sample_batch_size", "3", "--prior_generation_precision", "bf16"]
    images = prior.ensure_class_images(arguments(tmp_path / "new" / "dogs", 5, *more), accelerator, Pipeline())
    assert asked == [
        torch.bfloat16,
        accelerator.device,
        ["a photo of dog"] * 3,
        ["a photo of dog"] * 2,
    ]
    assert [path.name.split("-")[0] for path in images] == ["0", "1", "2", "3", "4"]
    assert [Image.open(path).getpixel((0, 0))[0] for path in images] == [0, 10, 20, 30, 40]
