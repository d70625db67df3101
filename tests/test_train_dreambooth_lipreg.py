"""The SD1.5 script from end to end: the official script's weights, the penalty, resuming, the Hub."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from support.runs import PARITY, ROOT, assert_equal_weights, draw, load

from diffusers_lipreg.errors import RunError, read_lines
from diffusers_lipreg.output_drift import OutputDrift
from diffusers_lipreg.outputs import MEASURED_PROMPTS, OutputSnapshot

LORA = "pytorch_lora_weights.safetensors"
UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT_ENCODER = "text_encoder/model.safetensors"
OFF = ("--lipreg_weight", "0")


def distance(output_dir: Path, start: Path = PARITY / "pipeline", file: str = UNET) -> float:
    """||theta - theta_0|| between two pipelines on disk, in float64."""
    ours, base = load(output_dir / file), load(start / file)
    return sum((ours[name] - base[name]).double().square().sum().item() for name in base) ** 0.5


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
    steps = ("--max_train_steps", "12", "--adam_weight_decay", "0")
    free = train(tmp_path / "free", *OFF, *steps)
    held = train(tmp_path / "held", "--lipreg_weight", "1e6", "--lipreg_reduction", "sum", *steps)
    assert distance(held) < 0.1 * distance(free)
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
    assert {"drift", "text_encoder_drift", "text_encoder_drift_relative", "text_encoder_loss_drift"} <= logs[-1][
        1
    ].keys()


def test_where_the_teacher_is_kept_changes_nothing(train, tmp_path):
    plain = train(tmp_path / "plain")
    for flag, value in (("device", "cpu"), ("device", "disk"), ("dtype", "fp32")):
        assert_equal_weights(train(tmp_path / value, f"--lipreg_teacher_{flag}", value) / UNET, plain / UNET)


def test_a_teacher_on_the_disk_in_shards_of_a_variant(train, tmp_path):
    """Of both models, stored in float16 and trained in float32: the drift is that from a copy, to the last bit."""
    pipe = StableDiffusionPipeline.from_pretrained(PARITY / "pipeline", dtype=torch.float16)
    pipe.save_pretrained(tmp_path / "base", variant="fp16", max_shard_size="100KB")
    assert len(list(Path(tmp_path, "base", "unet").glob("*.fp16-0000*.safetensors"))) > 1
    assert len(list(Path(tmp_path, "base", "text_encoder").glob("*.fp16-0000*.safetensors"))) > 1
    more = ("--pretrained_model_name_or_path", str(tmp_path / "base"), "--variant", "fp16", "--train_text_encoder",
            "--lipreg_reduction", "sum", "--lipreg_weight", "10", "--max_train_steps", "3")  # fmt: skip
    kept = {place: train(tmp_path / place, *more, "--lipreg_teacher_device", place) for place in ("cpu", "disk")}
    for file in (UNET, TEXT_ENCODER):
        assert_equal_weights(kept["cpu"] / file, kept["disk"] / file)


def test_mixed_precision_trains_and_keeps_the_frozen_parts_exact(train, tmp_path):
    out = train(tmp_path / "out", "--mixed_precision", "bf16", "--validation_prompt", "a dog", "--validation_steps", "1",
                "--drift_budget", "1", "--keep_best", "--probe_steps", "1",
                "--num_validation_images", "1")  # fmt: skip
    assert_equal_weights(out / TEXT_ENCODER, PARITY / "pipeline" / TEXT_ENCODER)
    assert load_file(out / UNET)["conv_in.weight"].dtype == torch.float32
    assert distance(out) > 0


# --- resuming ---------------------------------------------------------------------------------------------------


def test_a_resumed_run_measures_drift_from_the_pretrained_model(train, tmp_path, logs):
    out = train(tmp_path, "--max_train_steps", "4", "--checkpointing_steps", "4")
    drift_at_4 = distance(out / "checkpoint-4")
    logs.clear()
    train(out, "--max_train_steps", "8", "--checkpointing_steps", "4", "--resume_from_checkpoint", "latest")
    base = (
        sum(tensor.double().square().sum().item() for tensor in load_file(PARITY / "pipeline" / UNET).values()) ** 0.5
    )
    assert [step for step, _ in logs] == [5, 6, 7, 8]
    assert logs[0][1]["drift_relative"] == pytest.approx(drift_at_4 / base, rel=1e-5)


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
    assert_equal_weights(plain / UNET, out / UNET)


def test_validation_with_a_seed_changes_no_weight(train, tmp_path):
    plain = train(tmp_path / "plain", "--max_train_steps", "4")
    more = ("--validation_prompt", "a dog", "--validation_steps", "2", "--num_validation_images", "2")
    assert_equal_weights(plain / UNET, train(tmp_path / "validated", "--max_train_steps", "4", *more) / UNET)


def test_missing_class_images_are_sampled(train, tmp_path):
    train(tmp_path / "out", "--with_prior_preservation", "--class_data_dir", str(tmp_path / "class"),
          "--class_prompt", "a photo of dog", "--num_class_images", "3", "--sample_batch_size", "2",
          "--snr_gamma", "5", "--train_batch_size", "2")  # fmt: skip
    assert sorted(path.name.split("-")[0] for path in (tmp_path / "class").iterdir()) == ["0", "1", "2"]


def test_the_text_encoder_can_be_left_out(train, tmp_path):
    out = train(tmp_path, "--skip_save_text_encoder")
    assert json.loads((out / "model_index.json").read_text())["text_encoder"] == [None, None]


# --- adapters -----------------------------------------------------------------------------------------------------


def test_adapters_have_the_papers_penalty_and_the_right_scale(train, tmp_path, logs):
    """alpha / rank, which not every tool reads, is in the weights: rank 2 and alpha 4 are loaded as they were trained."""
    out = train(tmp_path, "--rank", "2", "--lora_alpha", "4", "--train_text_encoder", "--learning_rate", "1e-2",
                "--lipreg_reduction", "product", "--lipreg_weight", "1e-9", "--checkpointing_steps", "2",
                "--max_train_steps", "3")  # fmt: skip
    weights = load_file(out / "checkpoint-2" / LORA)
    drift = sum(
        (weights[name.replace("down.weight", "up.weight")].double() @ down.double())
        .square()
        .sum()
        .item()  # at full strength
        for name, down in weights.items()
        if name.endswith("down.weight") and name.startswith("unet.")
    )
    assert logs[2][1]["drift"] == pytest.approx(drift, rel=1e-5)
    assert logs[2][1]["text_encoder_drift"] > 0
    trained = [f"{folder}/model_index.json" for folder in ("unet", "")]
    assert not [name for name in trained if (out / name).exists()]
    assert {"unet", "text_encoder"} == {name.split(".")[0] for name in load_file(out / LORA)}
    pipe = StableDiffusionPipeline.from_pretrained(PARITY / "pipeline")
    base = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    pipe.load_lora_weights(out)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    final = load_file(out / LORA)
    name = next(name for name in final if name.startswith("unet.") and name.endswith("to_q.lora.down.weight"))
    layer = name.removeprefix("unet.").removesuffix(".lora.down.weight") + ".weight"
    product = final[name.replace("down.weight", "up.weight")] @ final[name]
    torch.testing.assert_close(pipe.unet.state_dict()[layer] - base[layer], product, rtol=1e-3, atol=1e-6)


def test_the_plain_adapter_command_is_the_papers(train, tmp_path, logs):
    train(tmp_path, "--rank", "2")
    factors = logs[0][1]
    assert factors["drift"] > 0 == factors["drift_relative"]
    assert factors["loss_drift"] == pytest.approx(1e-7 * factors["drift"])


def test_extracted_adapters_are_the_best_of_their_rank(train, tmp_path, caplog):
    out = train(tmp_path, "--extract_lora_rank", "2", "--train_text_encoder", "--learning_rate", "1e-2")
    weights, kept = load_file(out / LORA), 0.0
    ours, base = load(out / UNET), load(PARITY / "pipeline" / UNET)
    for name, down in weights.items():
        if name.startswith("unet.") and name.endswith(".down.weight"):
            layer = name.removeprefix("unet.").removesuffix(".lora.down.weight") + ".weight"
            change = ours[layer] - base[layer]
            best = torch.linalg.svdvals(change.double())
            product = weights[name.replace("down.weight", "up.weight")] @ down
            error = (change - product).double().square().sum()
            torch.testing.assert_close(error, best[2:].square().sum(), rtol=1e-4, atol=1e-12)
            kept += best[:2].square().sum().item()
    assert kept / distance(out) ** 2 > 0.01
    assert any("ff.net.2" in name for name in weights) and any("attn2.to_v" in name for name in weights)
    assert any(name.startswith("text_encoder.text_model.encoder.layers.0.mlp.fc1") for name in weights)


# --- as a user runs it --------------------------------------------------------------------------------------------


def test_trained_pushed_and_loaded_elsewhere(train, hub, tmp_path, capfd):
    """The token is nowhere but in the command."""
    out = train(
        tmp_path / "sks-dog", "--checkpointing_steps", "1", "--validation_prompt", "a sks dog", "--validation_steps", "1",
        "--num_validation_images", "1", "--push_to_hub", "--hub_token", "hf_alice",
    )  # fmt: skip
    files = hub.files("alice/sks-dog")
    assert {"model_index.json", UNET, TEXT_ENCODER, "README.md", "image_0.png"} <= files.keys()
    assert not [name for name in files if "checkpoint" in name or name.startswith("logs")]
    written = [path for path in tmp_path.rglob("*") if path.is_file()]  # checkpoints, logs, the client's folders
    assert {"README.md", "optimizer.bin", "hparams.yml"} <= {path.name for path in written}
    assert not [path for path in written if b"hf_alice" in path.read_bytes()]
    assert not [name for name, content in files.items() if b"hf_alice" in content]
    assert "hf_alice" not in "".join(capfd.readouterr())
    card = files["README.md"].decode()
    for line in (
        "- lipschitz-drift",
        "| lipreg_reduction | tensor_mean |",
        "| lipreg_weight | 500 |",
        "| drift_relative | ",
    ):
        assert line in card
    loaded = draw("alice/sks-dog")
    assert loaded == draw(out)
    assert loaded != draw(PARITY / "pipeline")


@pytest.mark.parametrize("more", [("--rank", "4"), ("--extract_lora_rank", "4")], ids=["trained", "extracted"])
def test_adapters_pushed_and_loaded_elsewhere(more, train, hub, tmp_path):
    out = train(tmp_path / "sks-dog", *more, "--push_to_hub", "--hub_token", "hf_alice", "--learning_rate", "1e-2")
    card = hub.files("alice/sks-dog")["README.md"].decode()
    if "--rank" in more:
        assert 'pipe.load_lora_weights("alice/sks-dog")' in card
        assert "| lipreg_reduction | factors |" in card
    else:
        assert card.count('pipe.load_lora_weights("alice/sks-dog")') == 1
        assert "| extract_lora_rank | 4 |" in card and "| squared drift kept by these adapters | " in card
    loaded = draw(PARITY / "pipeline", "alice/sks-dog")
    assert loaded == draw(PARITY / "pipeline", out)
    assert loaded != draw(PARITY / "pipeline")


# --- output drift -------------------------------------------------------------------------------------------------


def test_measuring_output_drift_changes_no_weight(train, tmp_path, logs):
    """Nor does a choice of the best; what is measured at the end is what two pipelines on disk say."""
    steps = ("--max_train_steps", "4", "--learning_rate", "2e-3")
    plain = train(tmp_path / "plain", *steps)
    logs.clear()
    out = train(tmp_path / "out", *steps, "--probe_steps", "2", "--keep_best")
    assert_equal_weights(plain / UNET, out / UNET)
    at = {step: values.get("output_drift") for step, values in logs}
    assert at[1] is None and at[2] > 0 and at[3] is None and at[4] > 0
    assert {"output_drift_percent", "output_drift_percent_se", "subject_similarity", "retention", "harmonic_mean"} <= (
        logs[3][1].keys()
    )
    assert sum(key.startswith("output_drift_percent_t") for key in logs[3][1]) == 4
    assert drift_on_disk(out).output_drift == pytest.approx(at[4], rel=1e-4)


def drift_on_disk(out: Path, prompts: Sequence[str] = MEASURED_PROMPTS) -> OutputDrift:
    """The output drift of what a run left, pipeline or adapters, against the base."""
    base = StableDiffusionPipeline.from_pretrained(PARITY / "pipeline", safety_checker=None)
    recorded = OutputSnapshot.for_measuring(base, base.unet, prompts)
    if (out / LORA).exists():
        base.load_lora_weights(out)
        return recorded.measure(base)
    return recorded.measure(StableDiffusionPipeline.from_pretrained(out, safety_checker=None))


@pytest.mark.parametrize(
    "more",
    [
        ("--train_text_encoder",),
        pytest.param(
            ("--rank", "2", "--learning_rate", "1e-2"), marks=pytest.mark.slow
        ),  # as in the SDXL script's tests
    ],
    ids=["full", "adapters"],
)
def test_a_drift_budget_is_kept_and_resumed(more, train, tmp_path, logs):
    """Interrupted and resumed, the run logs and ends with the same bits, within the budget."""
    (tmp_path / "prompts.txt").write_text("a dog\na cat\n")
    steps = ("--drift_budget", "1e-3", "--probe_prompts", str(tmp_path / "prompts.txt"), "--max_train_steps", "6",
             "--checkpointing_steps", "3", "--learning_rate", "2e-3", *more)  # fmt: skip
    out = train(tmp_path / "out", *steps)
    seen = {step: values for step, values in logs}
    file = LORA if "--rank" in more else UNET
    weights = load_file(out / file)
    assert seen[1]["lipreg_weight"] == 0 < seen[6]["lipreg_weight"]
    assert drift_on_disk(out, ["a dog", "a cat"]).output_drift_relative <= 1.001e-3
    logs.clear()
    train(out, *steps, "--resume_from_checkpoint", "checkpoint-3")
    assert logs == [(step, seen[step]) for step in range(4, 7)]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in load_file(out / file).items())


def test_the_best_checkpoint_is_kept(train, tmp_path, caplog):
    """checkpoint-best is the model as it was at the step that the log names, with the reason."""
    caplog.set_level("INFO")
    pipeline = ROOT / "tests/testbed/pipeline"
    out = train(
        tmp_path, "--pretrained_model_name_or_path", str(pipeline), "--instance_data_dir", str(ROOT / "tests/testbed/subjects/smiley"),
        "--learning_rate", "1e-3", "--lr_scheduler", "linear", "--lr_warmup_steps", "100", "--probe_steps", "4", "--keep_best",
        "--max_train_steps", "8", "--checkpointing_steps", "4", "--train_batch_size", "4", *OFF,
    )  # fmt: skip
    lines = [record.getMessage() for record in caplog.records if "Best so far is step" in record.getMessage()]
    assert lines and "harmonic mean" in lines[-1] and "retention" in lines[-1]
    best = int(re.search(r"step (\d+)", lines[-1])[1])
    assert_equal_weights(out / "checkpoint-best" / UNET, out / f"checkpoint-{best}" / UNET)
    assert not list(out.glob(".checkpoint*"))


@pytest.mark.parametrize("content", [None, "", b"\xff\xfe\x00"], ids=["missing", "empty", "no text"])
def test_a_file_of_probe_prompts_that_is_none(content, tmp_path):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RunError, match="--probe_prompts"):
        read_lines(path, "--probe_prompts")
