"""The SD1.5 script from end to end: the official script's weights, the penalty, resuming, the Hub."""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import PARITY, ROOT, command, flags
from diffusers import StableDiffusionPipeline
from loopback_hub import Account, LoopbackHub
from safetensors.torch import load_file

UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT_ENCODER = "text_encoder/model.safetensors"
CASES = json.loads((PARITY / "cases.json").read_text())
OFF = ("--lipreg_weight", "0")


def load(path: Path) -> dict[str, torch.Tensor]:
    """Weights by name. Newer transformers leave out the prefix that CLIP's text encoder has in older checkpoints."""
    return {name.removeprefix("text_model."): tensor for name, tensor in load_file(path).items()}


def distance(output_dir: Path, start: Path = PARITY / "pipeline", file: str = UNET) -> float:
    """||theta - theta_0|| between two pipelines on disk, in float64."""
    ours, base = load(output_dir / file), load(start / file)
    return sum((ours[name] - base[name]).double().square().sum().item() for name in base) ** 0.5


def assert_equal_weights(one: Path, other: Path, file: str = UNET) -> None:
    ours, theirs = load(one / file), load(other / file)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.fixture
def logs(monkeypatch) -> list[tuple[int, dict]]:
    """Everything the runs of a test hand to the trackers, as (step, values)."""
    seen: list[tuple[int, dict]] = []
    monkeypatch.setattr(Accelerator, "log", lambda self, values, step, **_: seen.append((step, dict(values))))
    return seen


# --- off is the official script ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_weight_zero_writes_the_official_weights(case, train, tmp_path, monkeypatch):
    for folder in ("pipeline", "instance", "class_images"):
        shutil.copytree(PARITY / folder, tmp_path / folder)
    shutil.copytree(PARITY / "pipeline", tmp_path / "pipeline_vpred")
    scheduler = tmp_path / "pipeline_vpred" / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace('"epsilon"', '"v_prediction"'))
    monkeypatch.chdir(tmp_path)

    out = train(tmp_path / "out", *case["arguments"], *OFF)

    samples = load_file(PARITY / "samples.safetensors")
    for file, expected in case["sha256"].items():
        weights, digest = load(out / file), hashlib.sha256()
        errors = []
        for name in sorted(weights):
            digest.update(name.encode())
            digest.update(weights[name].numpy().tobytes())
            flat = weights[name].flatten()
            sample = flat[:: max(1, flat.numel() // 16)][:16]
            errors.append((sample - samples[f"{case['name']}/{file}/{name}"]).abs())
        # Adam turns the sign of a gradient that is zero but for rounding into a whole step, hence the mean.
        assert torch.cat(errors).mean() < 1e-5
        if platform.machine() == "x86_64" and torch.__version__.startswith("2.13."):
            assert digest.hexdigest() == expected


def test_the_penalty_draws_no_random_numbers(train, tmp_path):
    decay = ("--adam_weight_decay", "0.01", "--max_train_steps", "6")
    off = load_file(train(tmp_path / "off", *OFF, *decay) / UNET)
    on = load_file(train(tmp_path / "on", "--lipreg_weight", "1e-30", *decay) / UNET)
    for name in off:
        torch.testing.assert_close(on[name], off[name], rtol=0, atol=1e-6)


# --- the penalty ------------------------------------------------------------------------------------------------


def test_the_plain_command_is_the_papers_configuration(train, tmp_path, logs):
    out = train(tmp_path / "out", "--max_train_steps", "3")
    ours, base = load_file(out / UNET), load_file(PARITY / "pipeline" / UNET)
    assert [step for step, _ in logs] == [1, 2, 3]
    assert all(values.keys() == {"loss", "lr", "loss_drift", "drift", "drift_relative"} for _, values in logs)
    assert logs[0][1]["drift"] == 0
    assert logs[1][1]["loss_drift"] == pytest.approx(500 * logs[1][1]["drift"])
    squares = {name: (ours[name] - base[name]).double().square() for name in base}
    assert 0 < logs[1][1]["drift"] < sum(square.mean().item() for square in squares.values())


def test_a_huge_weight_holds_the_model(train, tmp_path):
    steps = ("--max_train_steps", "20", "--adam_weight_decay", "0")
    free = train(tmp_path / "free", *OFF, *steps)
    held = train(tmp_path / "held", "--lipreg_weight", "1e6", "--lipreg_reduction", "sum", *steps)
    assert distance(held) < 0.05 * distance(free)
    ours, base = load_file(held / UNET), load_file(PARITY / "pipeline" / UNET)
    assert max((ours[name] - base[name]).abs().max().item() for name in base) <= 5e-4


def test_the_text_encoder_has_a_penalty_of_its_own(train, tmp_path, logs):
    both = ("--train_text_encoder", "--max_train_steps", "4", "--adam_weight_decay", "0")
    free = train(tmp_path / "free", *both, *OFF)
    held = train(
        tmp_path / "held", *both, "--lipreg_weight", "1e-9", "--lipreg_text_encoder_weight", "1e6",
        "--lipreg_reduction", "sum",
    )  # fmt: skip
    assert distance(held, file=TEXT_ENCODER) < 0.4 * distance(free, file=TEXT_ENCODER)
    assert distance(held) == pytest.approx(distance(free), rel=0.1)
    assert {"drift", "text_encoder_drift", "text_encoder_drift_relative", "text_encoder_loss_drift"} <= logs[-1][1].keys()


@pytest.mark.parametrize("storage", [("--lipreg_teacher_device", "cpu"), ("--lipreg_teacher_dtype", "fp32")])
def test_where_the_teacher_is_kept_changes_nothing(storage, train, tmp_path):
    assert_equal_weights(train(tmp_path / "one"), train(tmp_path / "other", *storage))


def test_mixed_precision_trains_and_keeps_the_frozen_parts_exact(train, tmp_path):
    out = train(tmp_path / "out", "--mixed_precision", "bf16", "--validation_prompt", "a dog", "--validation_steps", "1",
                "--num_validation_images", "1")  # fmt: skip
    assert_equal_weights(out, PARITY / "pipeline", TEXT_ENCODER)
    assert load_file(out / UNET)["conv_in.weight"].dtype == torch.float32
    assert distance(out) > 0


# --- resuming ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [2, 3, 4], ids=["mid-epoch", "one batch before the epoch's end", "epoch's end"])
@pytest.mark.parametrize("more", [(), ("--train_text_encoder", "--gradient_accumulation_steps", "2")], ids=["", "te"])
def test_a_resumed_run_equals_an_uninterrupted_one(stop, more, train, tmp_path):
    """Four photos, two of which are not square, so that crops draw from the stream that noise draws from, too."""
    steps = ("--checkpointing_steps", str(stop), *more)
    whole = train(tmp_path / "whole", "--max_train_steps", "7", *steps)
    out = train(tmp_path / "parts", "--max_train_steps", str(stop), *steps)
    train(out, "--max_train_steps", "7", "--resume_from_checkpoint", "latest", *steps)
    assert_equal_weights(whole, out)


def test_a_resumed_run_measures_drift_from_the_pretrained_model(train, tmp_path, logs):
    out = train(tmp_path, "--max_train_steps", "4", "--checkpointing_steps", "4")
    drift_at_4 = distance(out / "checkpoint-4")
    logs.clear()
    train(out, "--max_train_steps", "8", "--checkpointing_steps", "4", "--resume_from_checkpoint", "latest")
    base = sum(tensor.double().square().sum().item() for tensor in load_file(PARITY / "pipeline" / UNET).values()) ** 0.5
    assert [step for step, _ in logs] == [5, 6, 7, 8]
    assert logs[0][1]["drift_relative"] == pytest.approx(drift_at_4 / base, rel=1e-5)


def test_a_checkpoint_of_the_official_script_resumes(train, tmp_path, logs):
    out = train(tmp_path, "--max_train_steps", "3", "--checkpointing_steps", "3")
    (out / "checkpoint-3" / "sampler_state.pt").unlink()
    logs.clear()
    train(out, "--max_train_steps", "6", "--resume_from_checkpoint", "checkpoint-3")
    assert [step for step, _ in logs] == [4, 5, 6]


def test_resuming_a_finished_run_changes_nothing(train, tmp_path, logs):
    out = train(tmp_path, "--max_train_steps", "3", "--checkpointing_steps", "3")
    finished = load_file(out / UNET)
    logs.clear()
    train(out, "--max_train_steps", "3", "--resume_from_checkpoint", "latest")
    assert logs == []
    assert all(torch.equal(tensor, finished[name]) for name, tensor in load_file(out / UNET).items())


def test_the_checkpoint_limit_keeps_the_newest(train, tmp_path):
    out = train(tmp_path, "--max_train_steps", "5", "--checkpointing_steps", "1", "--checkpoints_total_limit", "2")
    assert sorted(path.name for path in out.glob("*checkpoint*")) == ["checkpoint-4", "checkpoint-5"]


# --- prompts, class images, validation ----------------------------------------------------------------------------


def test_precomputed_text_embeddings_validate_and_resume(train, tmp_path):
    more = ("--pre_compute_text_embeddings", "--validation_prompt", "a dog", "--validation_steps", "2",
            "--num_validation_images", "1", "--checkpointing_steps", "2")  # fmt: skip
    plain = train(tmp_path / "plain", "--max_train_steps", "4")
    out = train(tmp_path / "out", *more)
    train(out, *more, "--max_train_steps", "4", "--resume_from_checkpoint", "latest")
    assert_equal_weights(plain, out)


def test_validation_with_a_seed_changes_no_weight(train, tmp_path):
    plain = train(tmp_path / "plain", "--max_train_steps", "4")
    more = ("--validation_prompt", "a dog", "--validation_steps", "2", "--num_validation_images", "2")
    assert_equal_weights(plain, train(tmp_path / "validated", "--max_train_steps", "4", *more))


def test_missing_class_images_are_sampled(train, tmp_path):
    train(tmp_path / "out", "--with_prior_preservation", "--class_data_dir", str(tmp_path / "class"),
          "--class_prompt", "a photo of dog", "--num_class_images", "3", "--sample_batch_size", "2",
          "--snr_gamma", "5", "--train_batch_size", "2")  # fmt: skip
    assert sorted(path.name.split("-")[0] for path in (tmp_path / "class").iterdir()) == ["0", "1", "2"]


def test_the_text_encoder_can_be_left_out(train, tmp_path):
    out = train(tmp_path, "--skip_save_text_encoder")
    assert json.loads((out / "model_index.json").read_text())["text_encoder"] == [None, None]


# --- as a user runs it --------------------------------------------------------------------------------------------


def sample(source: str | Path, env: dict[str, str]) -> bytes:
    """The pixels that a new process draws with the pipeline from `source`: a folder or a repository."""
    code = (
        "import sys, torch; from diffusers import StableDiffusionPipeline as P\n"
        "pipe = P.from_pretrained(sys.argv[1], safety_checker=None); pipe.set_progress_bar_config(disable=True)\n"
        "image = pipe('a photo of sks dog', num_inference_steps=3, height=64, width=64,"
        " generator=torch.Generator().manual_seed(0)).images[0]\n"
        "sys.stdout.buffer.write(image.tobytes())"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(source)], env=env, capture_output=True, timeout=300)
    assert ran.returncode == 0, ran.stderr.decode()
    return ran.stdout


def test_trained_pushed_and_loaded_elsewhere(tmp_path):
    with LoopbackHub({"hf_secret_of_alice": Account("alice")}) as hub:
        env = {**hub.environment(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
        ran = subprocess.run(
            [
                *(sys.executable, "-m", "accelerate.commands.launch", str(ROOT / "train_dreambooth_lipreg.py")),
                *flags(tmp_path / "sks-dog"),
                *("--checkpointing_steps", "1", "--validation_prompt", "a sks dog", "--validation_steps", "1"),
                *("--num_validation_images", "1", "--push_to_hub", "--hub_token", "hf_secret_of_alice"),
            ],
            env=env, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr
        files = hub.files("alice/sks-dog")
        assert {"model_index.json", UNET, TEXT_ENCODER, "README.md", "image_0.png"} <= files.keys()
        assert not [name for name in files if "checkpoint" in name or name.startswith(("logs", "."))]
        written = [path for path in (tmp_path / "sks-dog").rglob("*") if path.is_file()]
        assert not [path for path in written if b"hf_secret_of_alice" in path.read_bytes()]
        assert not [name for name, content in files.items() if b"hf_secret_of_alice" in content]
        assert "hf_secret_of_alice" not in ran.stdout + ran.stderr
        card = files["README.md"].decode()
        assert all(line in card for line in ("- lipschitz-drift", "| lipreg_reduction | tensor_mean |",
                                             "| lipreg_weight | 500 |", "| drift_relative | "))  # fmt: skip

        loaded = sample("alice/sks-dog", {**hub.environment(tmp_path / "empty"), "PYTHONPATH": str(ROOT)})
        assert loaded == sample(tmp_path / "sks-dog", env)
        assert loaded != sample(PARITY / "pipeline", env)


def test_two_processes_end_with_one_model(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    launch = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    ran = subprocess.run(
        [*launch, str(ROOT / "train_dreambooth_lipreg.py"), *flags(tmp_path, "--max_train_steps", "3"),
         *("--checkpointing_steps", "2", "--train_text_encoder", "--gradient_accumulation_steps", "2")],
        env=env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert {"random_states_0.pkl", "random_states_1.pkl"} <= {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    StableDiffusionPipeline.from_pretrained(tmp_path)
    assert distance(tmp_path) > 0


def test_help_needs_no_model():
    ran = command("unused", "--help")
    assert ran.returncode == 0
    assert "--lipreg_weight" in ran.stdout
