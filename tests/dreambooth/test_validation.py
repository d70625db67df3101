"""Sampling along the way: what is sampled, what it leaves untouched, and where it is shown."""

from argparse import Namespace
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from conftest import PARITY, flags
from diffusers import DDPMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, PNDMScheduler
from PIL import Image

from diffusers_lipreg.dreambooth.validation import log_images, sample_images, set_scheduler
from train_dreambooth_lipreg import parse_args

PROMPT = {"prompt": "a photo of sks dog"}


@pytest.fixture
def accelerator(fresh_accelerate, tmp_path: Path) -> Accelerator:
    configuration = ProjectConfiguration(project_dir=str(tmp_path), logging_dir=str(tmp_path / "logs"))
    return Accelerator(cpu=True, log_with="tensorboard", project_config=configuration)


def arguments(*more: str) -> Namespace:
    return parse_args(flags("out", "--validation_prompt", PROMPT["prompt"], *more))


class Recorder:
    """Stands in for a pipeline: keeps what it was asked for and gives a grey image."""

    def __init__(self) -> None:
        self.calls: list[dict] = []
        self.device: torch.device | None = None
        self.components = {"unet": torch.nn.Dropout(), "vae": torch.nn.Identity().eval(), "tokenizer": "no module"}

    def to(self, device: torch.device) -> "Recorder":
        self.device = device
        return self

    def set_progress_bar_config(self, **_: object) -> None:
        pass

    def __call__(self, **call: object) -> SimpleNamespace:
        assert not self.components["unet"].training  # no dropout in samples
        self.calls.append(call)
        return SimpleNamespace(images=[Image.new("RGB", (8, 8), (100 + len(self.calls),) * 3)])


# Schedulers


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("DPMSolverMultistepScheduler", DPMSolverMultistepScheduler),
        ("DDPMScheduler", DDPMScheduler),
        (None, PNDMScheduler),
    ],
)
def test_the_scheduler_is_the_named_one_or_the_pipelines_own(name: str | None, expected: type) -> None:
    pipeline = SimpleNamespace(scheduler=PNDMScheduler(beta_start=0.002))
    before = pipeline.scheduler
    set_scheduler(pipeline, name)
    assert type(pipeline.scheduler) is expected
    assert pipeline.scheduler is not before
    assert pipeline.scheduler.config.beta_start == 0.002


@pytest.mark.parametrize(
    ("variance_type", "expected"),
    [
        ("learned", "fixed_small"),
        ("learned_range", "fixed_small"),
        ("fixed_large", "fixed_large"),
        ("fixed_small", "fixed_small"),
    ],
)
@pytest.mark.parametrize("name", [None, "DDPMScheduler"])
def test_a_learned_variance_is_no_longer_used(name: str | None, variance_type: str, expected: str) -> None:
    pipeline = SimpleNamespace(scheduler=DDPMScheduler(variance_type=variance_type))
    set_scheduler(pipeline, name)
    assert pipeline.scheduler.config.variance_type == expected


# Sampling


def test_as_many_images_as_asked_for_in_25_steps(accelerator: Accelerator) -> None:
    pipeline = Recorder()
    images = sample_images(arguments("--num_validation_images", "3"), accelerator, pipeline, PROMPT, steps=25)
    assert pipeline.components["unet"].training and not pipeline.components["vae"].training
    assert [image.getpixel((0, 0))[0] for image in images] == [101, 102, 103]
    assert pipeline.device == accelerator.device
    for call in pipeline.calls:
        assert call.pop("generator").initial_seed() == 0
        assert call == {**PROMPT, "num_inference_steps": 25}


def test_one_image_for_each_validation_image(accelerator: Accelerator, tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{name}.png") for name in "ab"]
    for path, colour in zip(paths, ("red", "blue"), strict=True):
        Image.new("RGB", (8, 8), colour).save(path)
    pipeline = Recorder()
    prompt = {"prompt_embeds": torch.zeros(1), "negative_prompt_embeds": torch.ones(1)}
    args = arguments("--num_validation_images", "9", "--validation_images", *paths)
    assert len(sample_images(args, accelerator, pipeline, prompt, steps=25)) == 2
    assert [call["image"].getpixel((0, 0)) for call in pipeline.calls] == [(255, 0, 0), (0, 0, 255)]
    assert all(call.keys() == {*prompt, "image", "generator"} for call in pipeline.calls)


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def test_a_seed_gives_the_same_images_and_leaves_the_runs_stream_alone(accelerator: Accelerator) -> None:
    pipeline = DiffusionPipeline.from_pretrained(PARITY / "pipeline")
    set_scheduler(pipeline, "DPMSolverMultistepScheduler")
    args = arguments("--num_validation_images", "2", "--seed", "7")
    state = torch.get_rng_state()
    first, second = (pixels(sample_images(args, accelerator, pipeline, PROMPT, steps=25)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.shape == (2, 64, 64, 3)
    assert (first == second).all()
    assert (first[0] != first[1]).any()


def test_without_a_seed_images_come_from_the_runs_stream(accelerator: Accelerator) -> None:
    pipeline = Recorder()
    args = arguments("--num_validation_images", "1")
    args.seed = None
    sample_images(args, accelerator, pipeline, PROMPT, steps=25)
    assert pipeline.calls[0]["generator"] is None


# Showing


def test_tensorboard_gets_the_images(accelerator: Accelerator, tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    accelerator.init_trackers("dreambooth")
    images = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    log_images(accelerator, images, PROMPT["prompt"], step=30)
    accelerator.end_training()
    events = event_accumulator.EventAccumulator(str(tmp_path / "logs" / "dreambooth"))
    events.Reload()
    (tag,) = events.Tags()["images"]
    (event,) = events.Images(tag)
    assert (tag, event.step) == ("validation", 30)
    shown = Image.open(BytesIO(event.encoded_image_string))  # side by side
    assert sorted(shown.getcolors()) == [(64, (0, 0, 255)), (64, (255, 0, 0))]


def test_wandb_gets_the_images_with_their_prompt_and_others_nothing() -> None:
    class Tracker:
        def __init__(self, name: str) -> None:
            self.name = name
            self.logged: list[tuple] = []

        def log_images(self, *args: object, **options: object) -> None:
            self.logged.append((args, options))

    wandb, other = Tracker("wandb"), Tracker("comet_ml")
    images = [Image.new("RGB", (8, 8))] * 2
    log_images(SimpleNamespace(trackers=[other, wandb]), images, "a dog", step=30)
    assert wandb.logged == [(({"validation": images},), {"step": 30, "caption": ["a dog", "a dog"]})]
    assert other.logged == []
