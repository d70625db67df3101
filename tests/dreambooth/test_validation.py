"""Sampling along the way: what is sampled, and what it leaves untouched."""

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)
from PIL import Image
from support.runs import PARITY, flags

from diffusers_lipreg.dreambooth.validation import sample_images, set_scheduler
from train_dreambooth_lipreg import parse_args

PROMPT = {"prompt": "a photo of sks dog"}


@pytest.fixture
def accelerator(fresh_accelerate, tmp_path: Path) -> Accelerator:
    configuration = ProjectConfiguration(project_dir=str(tmp_path), logging_dir=str(tmp_path / "logs"))
    return Accelerator(cpu=True, log_with="tensorboard", project_config=configuration)


def arguments(*more: str) -> Namespace:
    return parse_args(flags("out", "--validation_prompt", PROMPT["prompt"], *more))


class Recorder:
    """Stands in for a pipeline: keeps what it was asked for and gives a gray image."""

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
    for path, color in zip(paths, ("red", "blue"), strict=True):
        Image.new("RGB", (8, 8), color).save(path)
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


def test_a_vae_in_float32_decodes_in_float32_under_autocast(accelerator: Accelerator, monkeypatch) -> None:
    """With activations above 65504, as those of SDXL's VAE, float16 gives black images."""
    pipeline = DiffusionPipeline.from_pretrained(PARITY / "pipeline_sdxl")
    pipeline.vae.decoder.conv_in.weight.data *= 1e7
    monkeypatch.setattr(Accelerator, "autocast", lambda self: torch.autocast("cpu", torch.float16))
    with torch.autocast("cpu", torch.float16):
        black = pipeline(**PROMPT, num_inference_steps=2).images
    assert pixels(black).max() == 0
    args = arguments("--num_validation_images", "1")
    assert pixels(sample_images(args, accelerator, pipeline, PROMPT, steps=2)).std() > 1


def test_an_error_is_a_warning_and_the_training_goes_on(train, tmp_path: Path, monkeypatch, caplog) -> None:
    def out_of_memory(self: StableDiffusionPipeline, **call: object) -> None:
        assert not self.unet.training
        failed.append(self.unet)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    failed: list[torch.nn.Module] = []
    monkeypatch.setattr(StableDiffusionPipeline, "__call__", out_of_memory)
    train(tmp_path, "--validation_prompt", "a dog", "--validation_steps", "1")
    assert len(failed) == 2 and failed[0].training
    assert caplog.text.count("Validation failed, training goes on: CUDA out of memory.") == 2
    assert (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").is_file()
