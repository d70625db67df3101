"""Images come from their own seeds: batches, interruptions and other images change nothing."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from support.runs import PARITY, load_pipeline

from diffusers_lipreg import loading
from diffusers_lipreg.errors import RunError
from diffusers_lipreg.evaluation.generation import ImageSet, ImageSpec, Sampling, generate_images, image_folder

CPU = torch.device("cpu")
SAMPLING = Sampling(num_inference_steps=2, batch_size=1)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path), dtype=int)


def images_of(*prompts: str, count: int = 3) -> ImageSet:
    return ImageSet([[ImageSpec(prompt, number) for number in range(count)] for prompt in prompts], [], [])


def generate(pipeline, folder: Path, images: ImageSet, sampling: Sampling = SAMPLING) -> list[Path]:
    """Return the files of the images in their order."""
    folder = image_folder(folder, pipeline, sampling)
    generate_images(pipeline, folder, [images], sampling, CPU)
    return [image.path(folder) for row in images.subject for image in row]


def test_batches_and_interruption_change_nothing(tmp_path, monkeypatch):
    images = images_of("a dog", "a dog in the snow")
    one = generate(load_pipeline(), tmp_path / "one", images)

    pipeline, calls = load_pipeline(), []
    real = type(pipeline).__call__

    def interrupted(self, prompts, **options):
        calls.append(list(prompts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, prompts, **options)

    monkeypatch.setattr(type(pipeline), "__call__", interrupted)
    four = SAMPLING._replace(batch_size=4)
    with pytest.raises(KeyboardInterrupt):
        generate(pipeline, tmp_path / "other", images, four)
    assert len(list(tmp_path.glob("other*/*.png"))) == 4
    other = generate(pipeline, tmp_path / "other", images, four)
    assert calls[2:] == [["a dog in the snow"] * 2]  # only what was missing
    generate(pipeline, tmp_path / "other", images, four)
    assert len(calls) == 3

    for a, b in zip(one, other, strict=True):
        assert np.abs(pixels(a) - pixels(b)).max() <= 1  # batched sums round otherwise
    assert np.abs(pixels(one[0]) - pixels(one[1])).max() > 5  # each has noise of its own


def test_a_half_written_image_is_not_one(tmp_path, monkeypatch):
    def full_disk(self, path, **options):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError):
        patched.setattr(Image.Image, "save", full_disk)
        generate(load_pipeline(), tmp_path / "images", images_of("a dog", count=1))
    assert not list(tmp_path.rglob("*.png"))
    (file,) = generate(load_pipeline(), tmp_path / "images", images_of("a dog", count=1))
    assert pixels(file).shape == (64, 64, 3)


def test_images_of_other_weights_or_settings_are_not_taken_for_these(tmp_path):
    def folder(pipeline, **settings) -> Path:
        sampling = SAMPLING._replace(**settings)
        return generate(pipeline, tmp_path / "images", images_of("a dog", count=1), sampling)[0].parent

    first = folder(load_pipeline())
    moved, ddpm = load_pipeline(), load_pipeline()
    moved.unet.conv_in.bias.data[0] += 1e-3
    ddpm.scheduler = DDPMScheduler.from_config(ddpm.scheduler.config)
    others = [
        folder(load_pipeline(), num_inference_steps=3),
        folder(load_pipeline(), seed=1),
        folder(moved),
        folder(ddpm),
    ]
    assert len({first, *others}) == 5
    assert folder(load_pipeline(), batch_size=3) == first


def test_file_names_tell_prompts_apart():
    names = [
        ImageSpec(prompt, i).path(Path()).name for prompt in ("a dog, red", "a dog. red", "x" * 300) for i in range(2)
    ]
    assert len(set(names)) == 6 and max(map(len, names)) < 100


def refusal(personalized: object, base: str = "pipeline") -> str:
    with pytest.raises(RunError) as raised:
        pipeline = loading.load_personalized(str(personalized), str(PARITY / base), torch.float32)
        loading.check_same_architecture(load_pipeline(base), pipeline, str(personalized))
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_another_architecture_is_refused(sdxl_lora, tmp_path):
    assert "it is a StableDiffusionXLPipeline, but --base is a StableDiffusionPipeline" in refusal(
        PARITY / "pipeline_sdxl"
    )
    assert "cannot be loaded onto --base" in refusal(sdxl_lora)
    wider = load_pipeline()
    config = {**wider.unet.config, "block_out_channels": (16, 48)}
    wider.unet = type(wider.unet).from_config(config)
    wider.save_pretrained(tmp_path / "wider")
    assert "it is of another architecture than --base: unet." in refusal(tmp_path / "wider")


def test_what_holds_no_model_is_refused(tmp_path):
    assert "expected a pipeline (model_index.json) or adapters" in refusal(tmp_path)
    assert "no such file or folder" in refusal(tmp_path / "none")
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"broken")
    assert "cannot be read as safetensors" in refusal(tmp_path)
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]})
    )
    assert "it cannot be loaded as a pipeline" in refusal(tmp_path)
