"""Images come from their own seeds: batches, interruptions and other images change nothing."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.runs import PARITY, load_pipeline

from diffusers_lipreg import loading
from diffusers_lipreg.errors import RunError
from diffusers_lipreg.evaluation.generation import Sampling, generate_images, image_specs

CPU = torch.device("cpu")
SAMPLING = Sampling(num_inference_steps=2, batch_size=1)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path), dtype=int)


def test_batches_and_interruption_change_nothing(tmp_path, monkeypatch):
    prompts = ["a dog", "a dog in the snow"]
    one, other = (image_specs(tmp_path / name, prompts, 3) for name in ("one", "other"))
    generate_images(load_pipeline(), tmp_path / "one", sum(one, []), SAMPLING, CPU, "")

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
        generate_images(pipeline, tmp_path / "other", sum(other, []), four, CPU, "")
    assert sorted(path.name for path in (tmp_path / "other").glob("*.png")) == sorted(
        d.path.name for d in sum(other, [])[:4]
    )
    generate_images(pipeline, tmp_path / "other", sum(other, []), four, CPU, "")
    assert calls[2:] == [["a dog in the snow"] * 2]  # only what was missing
    generate_images(pipeline, tmp_path / "other", sum(other, []), four, CPU, "")
    assert len(calls) == 3

    for a, b in zip(sum(one, []), sum(other, []), strict=True):
        assert np.abs(pixels(a.path) - pixels(b.path)).max() <= 1  # batched sums round otherwise
    first, second, *_ = one[0]
    assert np.abs(pixels(first.path) - pixels(second.path)).max() > 5  # each has noise of its own


def test_a_half_written_image_is_not_one(tmp_path, monkeypatch):
    (wanted,) = image_specs(tmp_path, ["a dog"], 1)

    def full_disk(self, path, **options):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError):
        patched.setattr(Image.Image, "save", full_disk)
        generate_images(load_pipeline(), tmp_path, wanted, SAMPLING, CPU, "")
    assert not wanted[0].path.exists()
    generate_images(load_pipeline(), tmp_path, wanted, SAMPLING, CPU, "")
    assert pixels(wanted[0].path).shape == (64, 64, 3)


def test_images_of_other_weights_or_settings_are_refused(tmp_path):
    (wanted,) = image_specs(tmp_path, ["a dog"], 1)
    generate_images(load_pipeline(), tmp_path, wanted, SAMPLING, CPU, "")
    with pytest.raises(RunError, match="generated with another num_inference_steps .2, now 3..*--output_dir"):
        generate_images(load_pipeline(), tmp_path, wanted, SAMPLING._replace(num_inference_steps=3), CPU, "")
    moved = load_pipeline()
    moved.unet.conv_in.bias.data[0] += 1e-3
    with pytest.raises(RunError, match="generated with another weights"):
        generate_images(moved, tmp_path, wanted, SAMPLING, CPU, "")
    generate_images(load_pipeline(), tmp_path, wanted, SAMPLING._replace(batch_size=3), CPU, "")


def test_file_names_tell_prompts_apart(tmp_path):
    names = [d.path.name for row in image_specs(tmp_path, ["a dog, red", "a dog. red", "x" * 300], 2) for d in row]
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
