"""Adapters are added, saved and read by PEFT alone; releases that cannot load them afterwards are named."""

import numpy as np
import peft
import pytest
import torch
import transformers
from diffusers import DPMSolverMultistepScheduler, StableDiffusionXLPipeline
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.loaders.peft import PeftAdapterMixin
from safetensors.torch import load_file
from support.runs import PARITY, SAMPLING_STEPS

from diffusers_lipreg.dreambooth import lora, validation

ADAPTERS = ("--rank", "2", "--train_text_encoder", "--learning_rate", "1e-2")
VALIDATION = ("--validation_prompt", "a sks dog", "--num_validation_images", "1")


@pytest.fixture
def no_mixin(monkeypatch):
    """Let whatever diffusers and transformers give a model for its adapters refuse the release of PEFT."""

    def refuse(*args, **kwargs):
        raise ValueError("The version of PEFT you are using is not compatible,\nplease use a version >= 0.99.0")

    for mixin in (PeftAdapterMixin, transformers.integrations.PeftAdapterMixin):
        for name in vars(mixin):
            if not name.startswith("_") and callable(getattr(mixin, name)):
                monkeypatch.setattr(mixin, name, refuse)
    lora.logger.warning_once.cache_clear()  # another test may have had the same warning


@pytest.mark.parametrize(
    ("script", "validation"), [pytest.param("train", (), marks=pytest.mark.slow), ("train_sdxl", VALIDATION)]
)
def test_training_and_resuming_need_no_mixin(script, validation, no_mixin, request, tmp_path, caplog):
    """The pair of releases is named once in one line, with what mends it; the model is not blamed."""
    train = request.getfixturevalue(script)
    out = train(tmp_path, *ADAPTERS, *validation, "--checkpointing_steps", "1")
    (line,) = [record.getMessage() for record in caplog.records if "cannot load adapters" in record.getMessage()]
    releases = (f"transformers {transformers.__version__}", f"PEFT {peft.__version__}")
    assert all(part in line for part in (*releases, ">= 0.99.0", "pip install --upgrade"))
    assert "\n" not in line and str(PARITY) not in line
    weights = load_file(out / LORA_WEIGHT_NAME_SAFE)
    assert {name.split(".")[0] for name in weights} >= {"unet", "text_encoder"}
    train(tmp_path, *ADAPTERS, "--resume_from_checkpoint", "checkpoint-1")
    again = load_file(out / LORA_WEIGHT_NAME_SAFE)
    assert weights.keys() == again.keys() and all(torch.equal(weights[name], again[name]) for name in weights)


def test_the_last_validation_draws_what_users_will(train_sdxl, tmp_path, monkeypatch, caplog):
    """`pipe.load_lora_weights` gives the same image: all adapters are there, and dropout is off."""
    images = {}
    monkeypatch.setattr(validation, "log_images", lambda *shown, name="validation": images.update({name: shown[1]}))
    out = train_sdxl(tmp_path, *ADAPTERS, *VALIDATION, "--lora_dropout", "0.9")
    assert "cannot load adapters" not in caplog.text
    pipe = StableDiffusionXLPipeline.from_pretrained(PARITY / "pipeline_sdxl")
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    drawn = {}
    for name in ("base", "test"):
        if name == "test":
            pipe.load_lora_weights(out)
        seeded = torch.Generator().manual_seed(0)
        drawn[name] = np.asarray(pipe("a sks dog", num_inference_steps=SAMPLING_STEPS, generator=seeded).images[0])
    assert np.array_equal(np.asarray(images["test"][0]), drawn["test"])
    assert not np.array_equal(drawn["base"], drawn["test"])
