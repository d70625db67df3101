"""The shipped pipeline, its making, the experiment and the toy: what the testbed's README says of them."""

import csv
import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import experiment
import pytest
import report
import torch
import toy
from diffusers import StableDiffusionPipeline
from judge import Sampling, load_judge, prepare, world_accuracy
from safetensors.torch import load_file
from world import COLOR_NAMES, HERE, RARE_TOKENS, SHAPE_NAMES, captioned

PIPELINE = HERE / "pipeline"


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    return prepare(StableDiffusionPipeline.from_pretrained(PIPELINE, torch_dtype=torch.float32))


def test_the_pipeline_is_small_and_half_precision():
    files = [path for path in PIPELINE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12e6
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert len(weights) == 3 and not [path for path in files if path.suffix in (".bin", ".pt", ".ckpt")]
    assert {tensor.dtype for path in weights for tensor in load_file(path).values()} == {torch.float16}


def test_the_pipeline_is_stable_diffusions(pipeline):
    assert pipeline.vae_scale_factor == 8 and pipeline.unet.config.sample_size == 8
    schedule = json.loads((PIPELINE / "scheduler" / "scheduler_config.json").read_text())
    assert schedule["_class_name"] == "DDPMScheduler" and schedule["prediction_type"] == "epsilon"
    assert (schedule["beta_start"], schedule["beta_end"], schedule["beta_schedule"]) == (
        0.00085,
        0.012,
        "scaled_linear",
    )


def test_every_word_is_one_token(pipeline):
    for word in (*RARE_TOKENS, *SHAPE_NAMES, *COLOR_NAMES, "background"):
        assert len(pipeline.tokenizer(word).input_ids) == 3, word


def test_the_pipeline_draws_what_it_is_told(pipeline):
    """On few held-out captions and steps; `judge.py score` and the slow test do it on 500."""
    captions = captioned(40, torch.Generator().manual_seed(1), held_out=True)
    right = world_accuracy(pipeline, captions, load_judge(), Sampling(steps=10, batch_size=40))
    assert right["background"] >= 0.85 and right["color"] >= 0.8 and right["shape"] >= 0.7, right


@pytest.mark.slow
def test_the_pipelines_quality(pipeline):
    captions = captioned(500, torch.Generator().manual_seed(7), held_out=True)
    right = world_accuracy(pipeline, captions, load_judge(), Sampling())
    assert right["background"] >= 0.95 and right["color"] >= 0.9 and right["shape"] >= 0.85, right


def row(method: str, seed: int, step: int, seen: float, loss: float, gap: float, weight: float = 0.0) -> dict:
    return {
        "subject": "smiley", "method": method, "weight": weight, "seed": seed, "step": step,
        "subject_seen": seen, "subject_loss": loss, "epsilon_gap": gap,
    }  # fmt: skip


def test_methods_are_compared_where_they_have_learned_the_subject():
    """Means over seeds of plain: seen 0.4, 0.6, 0.5; loss 0.6, 0.5, 0.7; gap 0.02, 0.06, 0.08.

    So half of the pictures cost it 0.06, and its loss goes from 1 to 0.5 at best: 0.55 costs 0.06, too. The penalty at
    weight 1 is seen in 0.5 at loss 0.5 and gap 0.03; at weight 2 it has a loss of 0.54 at gap 0.01, seen in 0.1.
    """
    rows = [
        row("base", 0, 0, 0.0, 1.0, 0.0),
        *(row("plain", 0, *point) for point in ((1, 0.6, 0.5, 0.01), (2, 0.5, 0.5, 0.05), (3, 0.6, 0.7, 0.08))),
        *(row("plain", 1, *point) for point in ((1, 0.2, 0.7, 0.03), (2, 0.7, 0.5, 0.07), (3, 0.4, 0.7, 0.08))),
        *(row("sum", seed, 3, seen, 0.5, 0.03, weight=1.0) for seed, seen in enumerate((0.3, 0.7))),
        *(row("sum", seed, 3, 0.1, 0.54, 0.01, weight=2.0) for seed in range(2)),
        *(row("LoRA plain", seed, 3, 0.1, 0.9, 0.01) for seed in range(2)),
    ]
    args = Namespace(subjects=["smiley"], methods=["plain", "sum", "LoRA plain"])
    assert experiment.learned(rows, "smiley", "subject_loss") == pytest.approx(-0.55)
    seen = experiment.matched_table(rows, args, "subject_seen")
    assert seen.splitlines()[2:] == ["| plain | 0.060 |", "| sum | 0.030 (1 / 2.0) |", "| LoRA plain | not reached |"]
    loss = experiment.matched_table(rows, args, "subject_loss")
    assert loss.splitlines()[2:] == ["| plain | 0.060 |", "| sum | 0.010 (1 / 6.0) |", "| LoRA plain | not reached |"]


def results(output_dir: Path, *flags: str) -> list[dict]:
    """Run the experiment's command; return its rows."""
    command = [sys.executable, str(HERE / "experiment.py"), "--output_dir", str(output_dir), *flags]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True)
    log = output_dir / "workers.log"
    assert done.returncode == 0, done.stderr + (log.read_text() if log.exists() else "")
    with (output_dir / "runs.csv").open() as file:
        return [{name: _number(value) for name, value in row.items()} for row in csv.DictReader(file)]


def _number(value: str) -> float | str:
    return float(value) if value[:1].isdigit() else value


@pytest.mark.slow
def test_the_experiment_runs_and_is_not_done_twice(tmp_path):
    flags = ["--subjects", "smiley", "--methods", "plain", "LoRA product", "--seeds", "1", "--steps", "4"]
    flags += ["--checkpoints", "2", "--prompts", "8", "--sampling_steps", "2", "--workers", "2"]
    rows = results(tmp_path, *flags)
    points = 1 + (1 + len(experiment.METHODS["LoRA product"].weights)) * 2
    assert len(rows) == points
    assert {"runs.csv", "results.md", "grid.png", "curves.png"} <= {path.name for path in tmp_path.iterdir()}
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    results(tmp_path, *flags)
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}


@pytest.mark.slow
def test_the_penalty_helps(tmp_path):
    """At an equal loss on unseen views the penalty leaves the world nearer to where it was."""
    rows = results(tmp_path, "--subjects", "smiley", "--methods", "plain", "sum", "--seeds", "2", "--prompts", "100")
    plain, ours = (experiment.least_gap(rows, "smiley", method, "subject_loss") for method in ("plain", "sum"))
    assert ours < 0.8 * plain


@pytest.mark.slow
def test_the_report_of_the_base_says_that_nothing_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["report.py", str(PIPELINE), "--output_dir", str(tmp_path)])
    report.main()
    subject = json.loads((tmp_path / "report.json").read_text())["subjects"]["sks_circle"]
    assert subject["drift"]["output"]["output_drift"] == 0 and subject["drift"]["parameters"] == {}
    assert subject["unrelated_change"]["pixels"]["mean"] == 0
    assert subject["scores"]["personalized"] == subject["scores"]["base"]
    assert (tmp_path / "report.html").stat().st_size > 100_000  # with its images


@pytest.mark.slow
def test_pretraining_goes_on_where_it_stopped(tmp_path):
    """Eight updates at once, and five and three by way of the checkpoint, give the same VAE and UNet."""

    def pretrain(folder: Path) -> None:
        sizes = "--vae_steps 8 --text_steps 8 --unet_steps 8 --pictures 64 --checkpointing_steps 5".split()
        command = [sys.executable, str(HERE / "pretrain.py"), "--output_dir", str(folder), *sizes]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    pretrain(tmp_path / "whole")
    pretrain(tmp_path / "again")
    for part in ("pipeline", "unet", "vae", "text_encoder"):  # as if interrupted after each stage's last checkpoint
        for path in (tmp_path / "again").glob(part):
            path.rename(path.with_suffix(".gone"))
    (tmp_path / "again" / "scaling_factor.json").unlink()
    pretrain(tmp_path / "again")
    for name in ("unet", "vae"):
        file = f"pipeline/{name}/diffusion_pytorch_model.safetensors"
        one, other = (load_file(tmp_path / run / file) for run in ("whole", "again"))
        assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


@pytest.mark.slow
def test_the_toy_forgets_without_the_penalty():
    """A short run of the paper's illustration."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    pretrained = toy.pretrain(1500, generator)
    old = {
        name: sum(toy.distances(model, 300, 1)[0][: toy.CLASSES]) / toy.CLASSES
        for name, model in {
            "pretrained": pretrained,
            "naive": toy.finetune(pretrained, 500, generator),
            "penalty": toy.finetune(pretrained, 500, generator, weight=50),
        }.items()
    }
    assert old["pretrained"] < 0.02
    assert old["penalty"] < 0.3 * old["naive"]


def test_energy_distance():
    """Of points on a line: 2 E|X - Y| = 2 * 1, E|X - X'| = 0, E|Y - Y'| = 2."""
    zero, plus_minus = torch.zeros(2, 2), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert toy.energy_distance(zero, plus_minus) == pytest.approx(2 * 1 - 0 - 2)
    assert toy.energy_distance(zero, zero + 3) == pytest.approx(2 * 3 * 2**0.5)
