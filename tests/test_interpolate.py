"""python -m diffusers_lipreg.interpolate: pipelines and adapters, by alpha and by budget, and bad input."""

import json
import os
import shutil
import signal
import sys
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.pipelines import family
from support.runs import PARITY, load

from diffusers_lipreg import interpolate
from diffusers_lipreg.dreambooth import lora
from diffusers_lipreg.interpolate import main
from diffusers_lipreg.loading import load_pipeline
from diffusers_lipreg.outputs import OutputSnapshot

BASE = PARITY / "pipeline"
ADAPTERS = "pytorch_lora_weights.safetensors"
UNET = "unet/diffusion_pytorch_model.safetensors"


def call(base: Path, personalized: Path, out: Path, *more: str) -> Path:
    main(
        ["--base", str(base), "--personalized", str(personalized), "--output_dir", str(out), "--device", "cpu", *more]
    )
    return out


@pytest.fixture(scope="module")
def personalized(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("personalized")
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
    recorded = OutputSnapshot.for_measuring(base, base.unet)
    if (out / ADAPTERS).exists():
        base.load_lora_weights(out)
        return recorded.measure(base).output_drift_relative
    return recorded.measure(DiffusionPipeline.from_pretrained(out)).output_drift_relative


def test_a_pipeline_by_alpha(personalized, tmp_path):
    out = call(BASE, personalized, tmp_path / "out", "--alpha", "0.7")
    base, ours, full = (load(path / UNET) for path in (BASE, out, personalized))
    for name in base:
        torch.testing.assert_close(ours[name], base[name] + 0.7 * (full[name] - base[name]), rtol=1e-5, atol=1e-6)


def test_a_pipeline_by_budget(personalized, tmp_path, capsys):
    budget = drift(personalized) / 3
    out = call(BASE, personalized, tmp_path / "out", "--budget", str(budget))
    assert 0.97 * budget < drift(out) <= 1.001 * budget
    assert 0 < float(capsys.readouterr().out.split()[1].strip(":")) < 1


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_adapters(options, tmp_path):
    full = adapters(tmp_path / "full", **options)
    budget = drift(full) / 3
    assert 0.97 * budget < drift(call(BASE, full, tmp_path / "less", "--budget", str(budget))) <= 1.001 * budget
    assert drift(call(BASE, full, tmp_path / "none", "--alpha", "0")) < 1e-6 * budget
    if not options:
        half, whole = (
            load_file(call(BASE, full, tmp_path / "half", "--alpha", "0.5") / ADAPTERS),
            load_file(full / ADAPTERS),
        )
        for name, tensor in whole.items():
            torch.testing.assert_close(half[name], 0.5 * tensor if "up.weight" in name or "lora_B" in name else tensor)


def test_kohyas_files_keep_names_alphas_and_metadata(tmp_path):
    full = load_file(adapters(tmp_path / "full") / ADAPTERS)
    weights = lora.to_kohya({"unet": {name.removeprefix("unet."): tensor for name, tensor in full.items()}})
    (tmp_path / "kohya").mkdir()
    save_file(weights, tmp_path / "kohya" / "sks.safetensors", metadata={"ss_network_dim": "2"})
    result = call(BASE, tmp_path / "kohya", tmp_path / "less", "--alpha", "0.5") / "sks.safetensors"
    for name, tensor in load_file(result).items():
        torch.testing.assert_close(tensor, weights[name] * (0.5 if name.endswith(".lora_up.weight") else 1))
    with safe_open(result, "pt") as file:
        assert file.metadata() == {"ss_network_dim": "2"}


def refusal(*arguments: object, alpha: str = "0.5") -> str:
    with pytest.raises(SystemExit) as stopped:
        call(*arguments, "--alpha", alpha)
    assert isinstance(stopped.value.code, str) and "\n" not in stopped.value.code  # printed, with exit code 1
    return stopped.value.code.removeprefix("python -m diffusers_lipreg.interpolate: error: ")


def test_bad_input_ends_in_one_line_and_leaves_nothing(personalized, tmp_path):
    (tmp_path / "empty").mkdir()
    file = adapters(tmp_path / "lora") / ADAPTERS
    weights = load_file(file)
    cut, pickled, odd = (tmp_path / f"{name}.safetensors" for name in ("cut", "pickled", "odd"))
    cut.write_bytes(file.read_bytes()[:-100])
    torch.save(weights, pickled)
    save_file(weights | {"unet.conv_in.weight": torch.ones(1)}, odd)
    there, out = set(tmp_path.iterdir()), tmp_path / "out"
    for arguments, message in [
        ((BASE, cut, out), f"--personalized {cut}: it cannot be read as safetensors"),
        ((BASE, pickled, out), f"--personalized {pickled}: it cannot be read as safetensors"),
        ((BASE, odd, out), "expected adapters (LoRA, LoHa or LoKr) alone, found unet.conv_in.weight."),
        ((BASE, tmp_path / "empty", out), "expected a pipeline (model_index.json) or adapters"),
        ((BASE, tmp_path, out), "it holds cut.safetensors, odd.safetensors, pickled.safetensors: name one"),
        ((BASE, tmp_path / "none", out), "no such file or folder, and not to be had from the Hub"),
        ((tmp_path / "empty", personalized, out), f"--base {tmp_path / 'empty'}: it cannot be loaded as a pipeline"),
        (
            (PARITY / "pipeline_sdxl", personalized, out),
            "it is a StableDiffusionPipeline, but --base is a StableDiffusionXL",
        ),
        ((BASE, file, out, "--device", "attic"), "--device attic: it cannot be used"),
        ((BASE, file, out, "--device", "meta"), "--device meta: it cannot be used"),
        ((BASE, file, tmp_path / "lora"), "is there already and not empty"),
        ((BASE, file, cut / "out"), "it cannot be written"),
    ]:
        assert message in refusal(*arguments)
        assert set(tmp_path.iterdir()) == there
    if not torch.cuda.is_available():
        assert "--device cuda: it cannot be used" in refusal(BASE, file, out, "--device", "cuda")


@pytest.mark.parametrize(
    ("file", "settings", "says"),
    [
        ("model_index.json", {"_class_name": ["evil", "Evil"]}, "names no pipeline of the installed diffusers"),
        ("model_index.json", {"unet": ["evil", "Evil"]}, "its unet is a Evil of evil"),
        (
            "unet/config.json",
            {"quantization_config": {"quant_method": "evil"}},
            "sets quantization_config, by which code",
        ),
        ("tokenizer/tokenizer_config.json", {"vocab_file": "SECRET"}, "tokenizer_config.json names a file elsewhere"),
        ("text_encoder/adapter_config.json", {"base_model_name_or_path": "evil/model"}, "text_encoder holds adapters"),
    ],
)
def test_no_pipeline_runs_code_or_reads_files_elsewhere(file, settings, says, personalized, tmp_path):
    copy, secret, out = tmp_path / "copy", tmp_path / "secret", tmp_path / "out"
    secret.touch()
    shutil.copytree(BASE, copy)
    for name in ("evil.py", "unet/evil.py", "unet/diffusers.py", "tokenizer/transformers.py"):
        (copy / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    content = json.loads((copy / file).read_text()) if (copy / file).exists() else {}
    changed = json.dumps({**content, **settings}).replace("SECRET", str(secret))
    (copy / file).write_text(changed)
    for base, other, flag in ((copy, personalized, "--base"), (BASE, copy, "--personalized")):
        line = refusal(base, other, out)
        assert line.startswith(f"{flag} {copy}: it cannot be loaded as a pipeline") and says in line
    assert not (tmp_path / "ran").exists() and not out.exists()


def test_code_that_no_index_names_is_not_run_and_no_path_gets_into_the_result(personalized, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(personalized, copy)
    for name in ("evil.py", "unet/diffusers.py", "tokenizer/transformers.py"):
        (copy / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    out = call(BASE, copy, tmp_path / "out", "--alpha", "0.5")
    assert not (tmp_path / "ran").exists()
    assert all(str(tmp_path) not in path.read_text() for path in out.rglob("*.json"))


def test_a_result_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    full = adapters(tmp_path / "full")

    def full_disk(weights, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(interpolate, "save_file", full_disk)
        assert "it cannot be written ([Errno 28] No space left on device)" in refusal(BASE, full, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert [path.name for path in call(BASE, full, tmp_path / "out", "--alpha", "1").iterdir()] == [ADAPTERS]


def test_adapters_of_another_base_are_refused_with_a_budget(tmp_path):
    full = adapters(tmp_path / "full")
    weights = {
        name.replace("down_blocks.0", "down_blocks.7"): tensor for name, tensor in load_file(full / ADAPTERS).items()
    }
    save_file(weights, tmp_path / "other.safetensors")
    with pytest.raises(SystemExit) as stopped:
        call(BASE, tmp_path / "other.safetensors", tmp_path / "out", "--budget", "0.01")
    assert "of its 16 layers fit --base" in stopped.value.code


def test_the_bases_variant_and_revision_are_taken(personalized, tmp_path):
    StableDiffusionPipeline.from_pretrained(BASE, safety_checker=None).save_pretrained(
        tmp_path / "base", variant="fp16"
    )
    flags = ("--alpha", "0.5", "--variant", "fp16", "--revision", "main")
    half = call(tmp_path / "base", personalized, tmp_path / "out", *flags)
    assert (half / UNET).is_file()


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--alpha", "3"),
        ("--alpha", "nan"),
        ("--budget", "0"),
        ("--alpha", "1", "--budget", "1"),
        ("--alpha", "1", "--variant", ""),
    ],
)
def test_mistakes_on_the_command_line(more, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        call(BASE, BASE, tmp_path / "out", *more)
    assert stopped.value.code == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_without_a_traceback_and_leaves_nothing(tmp_path, monkeypatch, capsys, number, code):
    monkeypatch.setattr(interpolate, "interpolate_adapters", lambda *_: os.kill(os.getpid(), number))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest-xdist's processes ignore it
    with pytest.raises(SystemExit) as ended:
        call(BASE, adapters(tmp_path / "adapters"), tmp_path / "out", "--alpha", "0.5")
    signal.signal(signal.SIGINT, before)
    assert ended.value.code == code
    assert [path.name for path in tmp_path.iterdir()] == ["adapters"]


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_adapters_in_eight_bits_are_refused(tmp_path, dtype):
    folder = adapters(tmp_path / "adapters")
    save_file({name: tensor.to(dtype) for name, tensor in load_file(folder / ADAPTERS).items()}, folder / ADAPTERS)
    assert f"of {dtype}, of which no part can be taken" in refusal(BASE, folder, tmp_path / "out")


def test_a_path_that_the_terminal_cannot_show_is_shown_as_escapes(tmp_path, monkeypatch):
    output = BytesIO()
    monkeypatch.setattr(sys, "stdout", TextIOWrapper(output, encoding="ascii"))
    call(BASE, adapters(tmp_path / "adapters"), tmp_path / "\u65e5\u672c", "--alpha", "0.5")
    sys.stdout.flush()
    assert output.getvalue().strip().endswith(rb"\u65e5\u672c")


def test_a_transformer_that_matches_flows_ends_at_the_budget(tmp_path):
    """Stable Diffusion 3 without its third text encoder, of which another was trained along."""
    base, transformer, _ = family("SD3")
    base.save_pretrained(tmp_path / "base")
    recorded = OutputSnapshot.for_measuring(base, transformer)
    torch.manual_seed(0)
    for parameter in [*transformer.parameters(), *base.text_encoder.parameters()]:
        parameter.data += 0.05 * torch.randn_like(parameter)
    base.save_pretrained(tmp_path / "personalized")
    out = call(tmp_path / "base", tmp_path / "personalized", tmp_path / "out", "--budget", "0.02")
    found = recorded.measure(load_pipeline("--personalized", str(out), torch.float32)).output_drift_relative
    assert 0.019 <= found <= 0.02001 < recorded.measure(base).output_drift_relative
