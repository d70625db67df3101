"""--lipreg_reduction output in both scripts: what it records, that it holds, and that nothing else changes."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.runs import PARITY, flags

import train_dreambooth_lipreg
import train_dreambooth_lora_lipreg_sdxl
from diffusers_lipreg.dreambooth import preflight
from diffusers_lipreg.errors import RunError
from diffusers_lipreg.outputs import MEASURED_PROMPTS, OutputSnapshot, generic_prompts
from diffusers_lipreg.recording import Chain

UNET = "unet/diffusion_pytorch_model.safetensors"
LORA = "pytorch_lora_weights.safetensors"
KINDS = {
    "full": ("train", UNET, ()),
    "adapters": ("train", LORA, ("--rank", "2", "--learning_rate", "1e-2")),
    "SDXL": ("train_sdxl", LORA, ("--learning_rate", "1e-2")),
}


@pytest.fixture
def hold(tmp_path: Path) -> tuple[str, ...]:
    """The flags that hold outputs, on few points."""
    (tmp_path / "held.txt").write_text("a tree\na house\n")
    return ("--lipreg_reduction", "output", "--lipreg_points", "12", "--lipreg_prompts", str(tmp_path / "held.txt"))


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Chain]:
    """Every chain that is sampled."""
    chains: list[Chain] = []
    sample = Chain.sample
    monkeypatch.setattr(
        Chain, "sample", lambda chain, *args, **options: (chains.append(chain), sample(chain, *args, **options))[1]
    )
    return chains


@pytest.mark.parametrize("kind", KINDS)
def test_it_holds_the_outputs(kind: str, hold: tuple, request: Any, tmp_path: Path, logs: list) -> None:
    """With nothing but the reduction the weight is 3; a larger one holds predictions on other prompts nearer."""
    script, _, more = KINDS[kind]
    train = request.getfixturevalue(script)
    ends = []
    for weight in ([], ["--lipreg_weight", "0"], ["--lipreg_weight", "1000"]):
        logs.clear()
        train(tmp_path / f"out{len(ends)}", *hold, *more, *weight, "--max_train_steps", "6", "--probe_steps", "6")
        ends.append(logs[-1][1])
    assert ends[0]["loss_drift"] == pytest.approx(3 * ends[0]["drift"]) and ends[0]["drift_percent"] > 0
    assert "drift_relative" not in ends[0] and "drift" not in ends[1]
    assert ends[2]["output_drift_percent"] < 0.5 * ends[1]["output_drift_percent"]
    assert ends[2]["output_drift_percent"] < ends[0]["output_drift_percent"] <= ends[1]["output_drift_percent"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_of_almost_nothing_changes_almost_nothing(
    kind: str, hold: tuple, request: Any, tmp_path: Path
) -> None:
    """No random number is drawn and no mode changed: the trajectory is that of the official script, to rounding."""
    script, file, more = KINDS[kind]
    train, more = request.getfixturevalue(script), (*more, "--adam_weight_decay", "0", "--max_train_steps", "4")
    plain = load_file(train(tmp_path / "plain", *more, "--lipreg_weight", "0") / file)
    held = load_file(train(tmp_path / "held", *more, *hold, "--lipreg_weight", "1e-30") / file)
    for name, weights in plain.items():
        torch.testing.assert_close(held[name], weights, rtol=1e-6, atol=1e-7)


RESUMED = {
    "full": ("train", UNET, ("--gradient_accumulation_steps", "2", "--gradient_checkpointing")),
    "text encoder": ("train", UNET, ("--train_text_encoder", "--train_batch_size", "2")),
    "budget": ("train", UNET, ("--drift_budget", "0.02", "--learning_rate", "2e-3")),
    "bf16": ("train", LORA, ("--rank", "2", "--learning_rate", "1e-2", "--mixed_precision", "bf16")),
    "SDXL": ("train_sdxl", LORA, ("--train_text_encoder", "--learning_rate", "1e-2", "--probe_steps", "2")),
}


@pytest.mark.parametrize("kind", RESUMED)
def test_a_resumed_run_equals_an_uninterrupted_one(
    kind: str, hold: tuple, request: Any, tmp_path: Path, logs: list
) -> None:
    script, file, more = RESUMED[kind]
    train, more = (
        request.getfixturevalue(script),
        (*hold, "--max_train_steps", "4", "--checkpointing_steps", "2", *more),
    )
    out = train(tmp_path / "out", *more)
    whole, weights = [entry for entry in logs if entry[0] > 2], load_file(out / file)
    logs.clear()
    train(out, *more, "--resume_from_checkpoint", "checkpoint-2")
    assert [entry for entry in logs if entry[0] > 2] == whole and "drift" in whole[-1][1]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in load_file(out / file).items())


@pytest.mark.parametrize("script", ["train", "train_sdxl"])
def test_text_encoders_are_held_too(script: str, hold: tuple, request: Any, tmp_path: Path, logs: list) -> None:
    train = request.getfixturevalue(script)
    rate = ("--learning_rate", "5e-3", *(("--text_encoder_lr", "5e-2") if script == "train_sdxl" else ()))
    ends = []
    for weight in ("1e-9", "1e4"):
        train(
            tmp_path / weight,
            *hold,
            *rate,
            "--train_text_encoder",
            "--lipreg_weight",
            weight,
            "--max_train_steps",
            "6",
        )
        ends.append(logs[-1][1])
    drifts = [key for key in ends[0] if key.endswith("drift_percent")]
    assert set(drifts) >= {"drift_percent", "text_encoder_drift_percent"}
    assert len(drifts) == (2 if script == "train" else 3)
    for key in drifts:
        assert 0 < ends[1][key] < 0.5 * ends[0][key], key


def test_the_prompts_of_training_are_the_files_and_the_class_prompt(
    train: Callable, hold: tuple, recorded: list[Chain], tmp_path: Path
) -> None:
    """Never that of the photos. Drift is measured on others, with other noise."""
    train(tmp_path / "out", *hold, "--lipreg_points", "75", "--class_prompt", "a dog", "--probe_steps", "2")
    training, measured = recorded[:-8], recorded[-8:]
    assert {chain.prompt for chain in training} == {"a dog", "a tree", "a house"}
    assert [chain.prompt for chain in measured] == list(MEASURED_PROMPTS)
    assert not {chain.seed for chain in training} & {chain.seed for chain in measured}


def test_prompts_that_are_trained_on_measure_nothing() -> None:
    args = train_dreambooth_lipreg.parse_args(
        flags("out", "--lipreg_reduction", "output", "--class_prompt", MEASURED_PROMPTS[0], "--probe_steps", "2")
    )
    training, measured = preflight.prompts_to_record(args, generic_prompts(), MEASURED_PROMPTS)
    assert training[0] == MEASURED_PROMPTS[0] and measured == list(MEASURED_PROMPTS[1:])
    assert set(generic_prompts()) < set(training) and not set(training) & set(measured)
    assert len(generic_prompts()) == len(set(generic_prompts())) > 200 and "" in generic_prompts()
    assert not set(generic_prompts()) & set(MEASURED_PROMPTS)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--lipreg_teacher_device", "cpu"), "are for weights, not for outputs"),
        (("--lipreg_points", "0"), "--lipreg_points must be at least 1, got 0"),
        (("--lipreg_reduction", "sum", "--lipreg_weight", "1"), "need --lipreg_reduction output"),
    ],
)
def test_flags_that_do_not_fit_are_refused(more: tuple, says: str, hold: tuple, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        train_dreambooth_lipreg.parse_args(flags("out", *hold, *more))
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lines", "more", "says"),
    [
        ("a tree\na photo of sks dog\n", (), "holds the --instance_prompt, whose outputs are to change"),
        ("a tree\n", ("--probe_steps", "1", "--probe_prompts", "held.txt"), "nothing is left to measure on"),
        ("\n", (), "there is nothing in it"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    train: Callable, lines: str, more: tuple, says: str, hold: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("held.txt").write_text(lines)
    with pytest.raises(RunError, match=re.escape(says)):
        train(tmp_path / "out", *hold, *more)


def test_the_points_take_the_memory_of_their_shapes_and_no_second_model_stays(
    train: Callable, hold: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[OutputSnapshot] = []
    original = OutputSnapshot.__init__

    def take(self: OutputSnapshot, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        taken.append(self)

    monkeypatch.setattr(OutputSnapshot, "__init__", take)
    train(tmp_path / "out", *hold, "--lipreg_points", "30")
    (snapshot,) = taken
    samples_and_predictions, prompt_embeds = 2 * 30 * 4 * 8 * 8 * 4, 2 * 77 * 32 * 4
    assert 0 < snapshot.nbytes - samples_and_predictions - prompt_embeds <= 30 * 8  # timesteps
    assert not any(isinstance(value, torch.nn.Module) for value in vars(snapshot).values())


def test_both_scripts_take_the_reduction_for_every_kind() -> None:
    for parse in (train_dreambooth_lipreg.parse_args, train_dreambooth_lora_lipreg_sdxl.parse_args):
        args = parse(flags("out", "--lipreg_reduction", "output"))
        assert (args.lipreg_weight, args.lipreg_text_encoder_weight, args.adam_weight_decay) == (3.0, 3.0, 0.0)
        budget = parse(flags("out", "--lipreg_reduction", "output", "--drift_budget", "0.02"))
        assert (budget.lipreg_weight, budget.lipreg_reduction) == (None, "output")
    assert (PARITY / "pipeline").is_dir()
