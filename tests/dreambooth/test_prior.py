"""Class images: those that are there are counted, those that are missing are sampled."""

import re
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from support.runs import assert_equal_weights, flags

from diffusers_lipreg.dreambooth import prior
from diffusers_lipreg.errors import RunError
from train_dreambooth_lipreg import parse_args

LORA = "pytorch_lora_weights.safetensors"


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


def ensure(args: Namespace, accelerator: Accelerator) -> list[Path]:
    """`ensure_class_images` with a base that draws noise."""
    return prior.ensure_class_images(args, accelerator, Noise())


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

    def sample(args: Namespace, accelerator: Accelerator, folder: Path, numbers: list[int], base: object) -> None:
        asked.append((folder, numbers))
        good.extend(save_images(folder, "0-sampled.jpg", "1-sampled.jpg"))

    monkeypatch.setattr(prior, "sample_class_images", sample)
    assert ensure(arguments(tmp_path, 3), accelerator) == sorted(good)
    assert asked == [(tmp_path, [0, 1])]


class Process(NamedTuple):
    """One of several processes, as far as sampling knows."""

    process_index: int
    num_processes: int
    device: torch.device = torch.device("cpu")
    is_local_main_process: bool = False

    def wait_for_everyone(self) -> None:
        pass


def drawn(folder: Path) -> dict[str, bytes]:
    """The class images by their numbers."""
    return {path.name.split("-")[0]: path.read_bytes() for path in folder.iterdir()}


class Noise:
    """A pipeline that shows the random numbers that it is given."""

    def pipeline(self, dtype: torch.dtype, safety_checker: None) -> "Noise":
        return self

    def to(self, device: torch.device) -> "Noise":
        return self

    def set_progress_bar_config(self, **_: object) -> None:
        pass

    def __call__(self, prompts: list[str], generator: list[torch.Generator]) -> Namespace:
        pixels = [torch.randint(256, (8, 8, 3), dtype=torch.uint8, generator=each).numpy() for each in generator]
        return Namespace(images=list(map(Image.fromarray, pixels)))


def test_each_image_has_its_own_random_numbers(tmp_path: Path, accelerator: Accelerator) -> None:
    """One process or two, at once or continued: the same set, and no image twice."""
    one = ("--sample_batch_size", "2")
    whole = ensure(arguments(tmp_path / "whole", 7, *one), accelerator)
    assert [path.name.split("-")[0] for path in whole] == ["0", "1", "2", "3", "4", "5", "6"]
    assert len(set(drawn(tmp_path / "whole").values())) == 7
    for path in whole:
        assert re.fullmatch(r"\d+-[0-9a-f]{40}\.jpg", path.name)

    for process in (Process(1, 2), Process(0, 2)):
        prior.sample_class_images(
            arguments(tmp_path / "two", 7, *one), process, tmp_path / "two", list(range(7)), Noise()
        )
    assert drawn(tmp_path / "two") == drawn(tmp_path / "whole")

    one_of_two = tmp_path / "continued"  # the other was killed, and so was this one in writing a file
    prior.sample_class_images(arguments(one_of_two, 7, *one), Process(0, 2), one_of_two, list(range(7)), Noise())
    last = max(one_of_two.iterdir())
    last.write_bytes(last.read_bytes()[:100])
    ensure(arguments(one_of_two, 7, *one), accelerator)
    assert drawn(one_of_two) == drawn(tmp_path / "whole")

    unseeded = arguments(tmp_path / "unseeded", 7)
    unseeded.seed = None
    for args in (unseeded, arguments(tmp_path / "another seed", 7, "--seed", "1")):
        ensure(args, accelerator)
    assert (
        len({image for name in ("whole", "unseeded", "another seed") for image in drawn(tmp_path / name).values()})
        == 21
    )


def test_training_after_sampling_is_training_with_images_that_are_there(train, tmp_path: Path) -> None:
    more = ("--with_prior_preservation", "--class_data_dir", str(tmp_path / "class"), "--class_prompt", "a dog")
    more += ("--num_class_images", "2", "--rank", "2")
    sampled = train(tmp_path / "sampled", *more)
    assert len(set(drawn(tmp_path / "class").values())) == 2
    assert_equal_weights(sampled / LORA, train(tmp_path / "found", *more) / LORA)


def test_an_image_that_was_not_written_whole_is_none(
    tmp_path: Path, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def save(image: Image.Image, path: Path, **options: object) -> None:
        path.write_bytes(b"half an im")
        raise Killed

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(Killed):
        ensure(arguments(tmp_path, 2, "--sample_batch_size", "1"), accelerator)
    assert [path for path in tmp_path.iterdir() if not path.name.startswith(".")] == []


def test_a_full_disk_is_named_by_the_folder(
    tmp_path: Path, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(RunError, match=f"^--class_data_dir {tmp_path}: cannot be written .*No space left"):
        ensure(arguments(tmp_path, 1), accelerator)


def test_the_folder_is_made_and_batches_fill_it_exactly(tmp_path: Path, accelerator: Accelerator) -> None:
    asked = []

    class Pipeline(Noise):
        """Paints instead of sampling: the n-th image is n times 10 gray."""

        def pipeline(self, dtype: torch.dtype, safety_checker: None) -> "Pipeline":
            asked.append(dtype)
            return self

        def to(self, device: torch.device) -> "Pipeline":
            asked.append(device)
            return self

        def __call__(self, prompts: list[str], generator: list[torch.Generator]) -> Namespace:
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
