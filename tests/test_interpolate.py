"""python -m diffusers_lipreg.interpolate: pipelines and adapters, by alpha and by budget, and bad input."""

from pathlib import Path

import pytest
import torch
from conftest import PARITY, load
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from peft import LoraConfig
from safetensors.torch import load_file

from diffusers_lipreg.dreambooth import lora
from diffusers_lipreg.interpolate import main
from diffusers_lipreg.probe import OutputProbe, pipeline_denoiser

BASE = PARITY / "pipeline"
ADAPTERS = "pytorch_lora_weights.safetensors"
UNET = "unet/diffusion_pytorch_model.safetensors"


def call(base: Path, tuned: Path, out: Path, *more: str) -> Path:
    main(["--base", str(base), "--personalized", str(tuned), "--output_dir", str(out), "--device", "cpu", *more])
    return out


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tuned")
    pipeline = StableDiffusionPipeline.from_pretrained(BASE, safety_checker=None)
    torch.manual_seed(0)
    for parameter in pipeline.unet.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    pipeline.save_pretrained(folder)
    return folder


def adapters(folder: Path, **options) -> Path:
    """Adapters with a change in them, saved as the training scripts do."""
    pipeline = StableDiffusionPipeline.from_pretrained(BASE, safety_checker=None)
    torch.manual_seed(0)
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], **options))
    for name, parameter in pipeline.unet.named_parameters():
        if "lora_B" in name or "magnitude" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    lora.save_adapters(StableDiffusionPipeline, folder, lora.adapter_weights({"unet": pipeline.unet}))
    return folder


def drift(out: Path) -> float:
    """Relative output drift of what is on disk."""
    base = StableDiffusionPipeline.from_pretrained(BASE, safety_checker=None)
    side = base.unet.config.sample_size
    probe = OutputProbe(pipeline_denoiser(base), base.scheduler, (4, side, side))
    if (out / ADAPTERS).exists():
        base.load_lora_weights(out)
        return probe.measure(pipeline_denoiser(base)).output_drift_relative
    return probe.measure(pipeline_denoiser(DiffusionPipeline.from_pretrained(out))).output_drift_relative


def test_a_pipeline_by_alpha(tuned, tmp_path):
    out = call(BASE, tuned, tmp_path / "out", "--alpha", "0.7")
    base, ours, full = (load(path / UNET) for path in (BASE, out, tuned))
    for name in base:
        torch.testing.assert_close(ours[name], base[name] + 0.7 * (full[name] - base[name]), rtol=1e-5, atol=1e-6)


def test_a_pipeline_by_budget(tuned, tmp_path, capsys):
    budget = drift(tuned) / 3
    out = call(BASE, tuned, tmp_path / "out", "--budget", str(budget))
    assert 0.97 * budget < drift(out) <= 1.001 * budget
    assert 0 < float(capsys.readouterr().out.split()[1].strip(":")) < 1


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_adapters(options, tmp_path):
    full = adapters(tmp_path / "full", **options)
    budget = drift(full) / 3
    assert 0.97 * budget < drift(call(BASE, full, tmp_path / "less", "--budget", str(budget))) <= 1.001 * budget
    assert drift(call(BASE, full, tmp_path / "none", "--alpha", "0")) < 1e-6 * budget
    if not options:
        half, whole = load_file(call(BASE, full, tmp_path / "half", "--alpha", "0.5") / ADAPTERS), load_file(full / ADAPTERS)
        for name, tensor in whole.items():
            torch.testing.assert_close(half[name], 0.5 * tensor if "up.weight" in name or "lora_B" in name else tensor)


def test_bad_input_ends_in_one_line(tuned, tmp_path):
    (tmp_path / "empty").mkdir()
    for more, message in [
        ((BASE, tmp_path / "empty", tmp_path / "out"), "expected a pipeline (model_index.json) or adapters"),
        ((BASE, tuned, tuned), "is there already and not empty"),
        ((tmp_path / "empty", tuned, tmp_path / "out"), "--base"),
        ((PARITY / "pipeline_sdxl", tuned, tmp_path / "out"), "it is a StableDiffusionPipeline, but --base is a StableDiffusionXLPipeline"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            call(*more, "--alpha", "0.5")
        assert message in stopped.value.code and "\n" not in stopped.value.code


@pytest.mark.parametrize("more", [(), ("--alpha", "3"), ("--alpha", "nan"), ("--budget", "0"), ("--alpha", "1", "--budget", "1")])
def test_mistakes_on_the_command_line(more, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        call(BASE, BASE, tmp_path / "out", *more)
    assert stopped.value.code == 2
