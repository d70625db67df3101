"""The command lines: the official flags, a few of our own, and mistakes answered in one line."""

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import pytest

import train_dreambooth_lipreg
import train_dreambooth_lora_lipreg_sdxl
from train_dreambooth_lipreg import parse_args

SCRIPTS = {"sd": train_dreambooth_lipreg, "sdxl": train_dreambooth_lora_lipreg_sdxl}
OFFICIAL: dict[str, list[dict[str, Any]]] = {
    name: json.loads(Path(__file__).parent.with_name(f"flags_{name}.json").read_text()) for name in SCRIPTS
}
OWN = {
    "sd": {"--rank", "--lora_alpha", "--lora_dropout", "--use_dora", "--extract_lora_rank", "--caption_column"},
    "sdxl": set(),
}
# To the official parser these are --use_8bit_adam, --enable_xformers... and --dataloader_num_workers; --use_dora,
# --extract_lora_rank, --debug and --drift_budget end that.
# To the SDXL script's they are --cache_dir; --cache_latents ends that.
TAKEN = {
    "sd": {"--u", "--us", "--use", "--use_", "--e", "--d"},
    "sdxl": {"--ca", "--cac", "--cach", "--cache", "--cache_"},
}
OWN_TO_BOTH = {"--debug", "--cache_latents", "--no-cache_latents"}
LIPREG = {
    "--lipreg_weight",
    "--lipreg_reduction",
    "--lipreg_text_encoder_weight",
    "--lipreg_teacher_device",
    "--lipreg_teacher_dtype",
    "--lipreg_prompts",
    "--lipreg_points",
    "--drift_budget",
    "--probe_steps",
    "--probe_prompts",
    "--keep_best",
}
REQUIRED = [
    *("--pretrained_model_name_or_path", "model"),
    *("--instance_data_dir", "photos"),
    *("--instance_prompt", "a photo of sks dog"),
]
PRIOR = ["--with_prior_preservation", "--class_data_dir", "dogs", "--class_prompt", "a photo of dog"]


def every_official_flag(test):
    """Runs a test for each script and each of its official flags."""
    cases = [(name, flag) for name, flags in OFFICIAL.items() for flag in flags]
    ids = [f"{name} {flag['flag']}" for name, flag in cases]
    return pytest.mark.parametrize(("script", "official"), cases, ids=ids)(test)


def parse(*more: str) -> argparse.Namespace:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return parse_args([*REQUIRED, *more])


def options(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {option: action for action in parser._actions for option in action.option_strings}


# Drop-in: the official flags


def described(action: argparse.Action) -> dict[str, Any]:
    """An action as the list of official flags describes it."""
    return {
        "flag": action.option_strings[0],
        "aliases": action.option_strings[1:],
        "type": action.type and action.type.__name__,
        "default": action.default,
        "action": type(action).__name__.lstrip("_"),
        "choices": action.choices,
        "required": action.required,
        "nargs": action.nargs,
    }


def with_type(flag: dict[str, Any]) -> dict[str, Any]:
    """A flag that takes a value takes text where no type is named."""
    return {**flag, "type": flag["type"] or {"StoreAction": "str"}.get(flag["action"])}


@every_official_flag
def test_an_official_flag_means_the_same(script: str, official: dict[str, Any]) -> None:
    action = options(SCRIPTS[script].build_parser())[official["flag"]]
    if official["type"] == "bool":  # any text is true to bool, also "False"; to ours it is not
        assert [action.type(text) for text in ("True", "false", "0", "yes")] == [True, False, False, True]
        action.type = bool
    assert with_type(described(action)) == with_type(official)


@pytest.mark.parametrize(("script", "count"), [("sd", 61), ("sdxl", 72)])
def test_there_are_our_flags_and_no_others(script: str, count: int) -> None:
    official = {flag["flag"] for flag in OFFICIAL[script]}
    assert len(official) == count
    assert options(SCRIPTS[script].build_parser()).keys() - official == LIPREG | OWN[script] | OWN_TO_BOTH | {
        "-h",
        "--help",
    }


def abbreviations(script: str, flag: str) -> set[str]:
    """What the official parser takes for this flag beside its name."""
    names = [*(official["flag"] for official in OFFICIAL[script]), "--help"]
    prefixes = (flag[:length] for length in range(len("--x"), len(flag)))
    return {prefix for prefix in prefixes if [name for name in names if name.startswith(prefix)] == [flag]}


@every_official_flag
def test_an_official_abbreviation_still_works(script: str, official: dict[str, Any]) -> None:
    parser = SCRIPTS[script].build_parser()
    value = (official["choices"] or [{"int": "7", "float": "0.5", "bool": "false"}.get(official["type"], "text")])[-1]
    values = [] if official["action"] == "StoreTrueAction" else [value]
    expected = parser.parse_args([*REQUIRED, official["flag"], *values])
    assert expected != parser.parse_args(REQUIRED)
    for prefix in abbreviations(script, official["flag"]) - TAKEN[script]:
        assert parser.parse_args([*REQUIRED, prefix, *values]) == expected


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_every_flag(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = SCRIPTS[script].build_parser()
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for option, action in options(parser).items():
        assert option in text
        assert action.help


def test_the_launchers_local_rank_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert parse("--local_rank", "3").local_rank == 3
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert parse("--local_rank", "3").local_rank == 1


@pytest.mark.parametrize("rank", ["", "abc", "1.5"])
def test_a_local_rank_that_is_no_number_is_refused_in_one_line(monkeypatch, capsys, rank: str) -> None:
    monkeypatch.setenv("LOCAL_RANK", rank)
    with pytest.raises(SystemExit):
        parse()
    assert f"LOCAL_RANK in the environment is {rank!r}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags", [["--max_grad_norm", "0"], ["--snr_gamma", "0"], ["--lora_alpha", "0", "--rank", "2"]], ids=lambda f: f[0]
)
def test_a_zero_by_which_nothing_would_be_trained_is_refused(flags: list[str], capsys) -> None:
    with pytest.raises(SystemExit):
        parse(*flags)
    assert f"{flags[0]} must be above 0: nothing would be trained" in capsys.readouterr().err


def test_a_number_that_no_tensor_can_hold_is_refused(capsys) -> None:
    parse("--gradient_accumulation_steps", str(2**63 - 1))
    with pytest.raises(SystemExit):
        parse("--gradient_accumulation_steps", str(2**63))
    assert "--gradient_accumulation_steps must be below" in capsys.readouterr().err


@pytest.mark.parametrize("flag", [["--class_data_dir", "dogs"], ["--class_prompt", "a photo of dog"]])
def test_class_flags_without_prior_preservation_are_only_warned_of(flag: list[str]) -> None:
    with pytest.warns(UserWarning, match="--with_prior_preservation"):
        parse_args([*REQUIRED, *flag])


# The penalty's flags


def test_the_plain_command_is_the_paper() -> None:
    args = parse()
    assert (args.lipreg_weight, args.lipreg_reduction) == (500.0, "tensor_mean")
    assert (args.lipreg_teacher_device, args.lipreg_teacher_dtype) == (None, None)


@pytest.mark.parametrize("weight", ["0", "500", "1e-4"])
def test_another_reduction_needs_a_weight_of_its_own(weight: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--lipreg_reduction", "sum")
    assert "--lipreg_reduction sum needs a --lipreg_weight" in capsys.readouterr().err
    args = parse("--lipreg_reduction", "sum", "--lipreg_weight", weight)
    assert (args.lipreg_weight, args.lipreg_reduction) == (float(weight), "sum")


@pytest.mark.parametrize("abbreviation", ["--lipreg_red", "--lipreg_reduction"])
def test_the_default_reduction_may_be_spelled_out(abbreviation: str) -> None:
    assert parse(abbreviation, "tensor_mean") == parse()


TEXT_ENCODER = ["--train_text_encoder", "--lipreg_text_encoder_weight", "5"]


@pytest.mark.parametrize(
    ("flags", "weight_decay"),
    [
        ([], 0.0),
        (["--lipreg_weight", "500"], 0.0),
        (["--adam_weight_decay", "0.01"], 0.01),  # the official default, but asked for
        (["--adam_weight_decay", "0.3"], 0.3),
        (["--lipreg_weight", "0"], 0.01),
        (["--lipreg_weight", "0", "--adam_weight_decay", "0.3"], 0.3),
        (["--lipreg_weight", "0", "--train_text_encoder"], 0.01),
        (["--lipreg_weight", "0", *TEXT_ENCODER], 0.0),
        ([*TEXT_ENCODER, "--adam_weight_decay", "0.01"], 0.01),
    ],
)
def test_weight_decay_does_not_pull_against_the_penalty(flags: list[str], weight_decay: float) -> None:
    assert parse(*flags).adam_weight_decay == weight_decay


def test_a_budget_has_no_weight_and_algorithm_ones_reduction() -> None:
    for more, reduction in ([], "sum"), (["--rank", "4"], "product"), (["--lipreg_reduction", "sum"], "sum"):
        args = parse("--drift_budget", "0.02", *more)
        assert (args.lipreg_weight, args.lipreg_text_encoder_weight, args.lipreg_reduction) == (None, None, reduction)
        assert args.adam_weight_decay == 0


def test_a_text_encoder_that_is_not_trained_has_no_say_in_weight_decay() -> None:
    with pytest.warns(UserWarning, match="--train_text_encoder"):
        args = parse_args([*REQUIRED, "--lipreg_weight", "0", "--lipreg_text_encoder_weight", "5"])
    assert args.adam_weight_decay == 0.01


@pytest.mark.parametrize(
    ("flags", "weight"),
    [
        ([], 500.0),
        (["--lipreg_weight", "7"], 7.0),
        (["--lipreg_weight", "0"], 0.0),
        (["--lipreg_weight", "7", *TEXT_ENCODER], 5.0),
        (["--train_text_encoder", "--lipreg_text_encoder_weight", "0"], 0.0),
    ],
)
def test_the_text_encoders_weight_is_the_unets_unless_given(flags: list[str], weight: float) -> None:
    assert parse(*flags).lipreg_text_encoder_weight == weight


# Mistakes

MISTAKES = [
    (["--no_such_flag"], "--no_such_flag"),
    (["--class"], "ambiguous"),
    (["--resolution", "large"], "--resolution"),
    (["--resolution", "0"], "--resolution must be at least 1, got 0"),
    (["--train_batch_size", "0"], "--train_batch_size"),
    (["--max_train_steps", "-1"], "--max_train_steps"),
    (["--gradient_accumulation_steps", "0"], "--gradient_accumulation_steps"),
    (["--checkpointing_steps", "0"], "--checkpointing_steps"),
    (["--validation_steps", "0"], "--validation_steps"),
    (["--learning_rate", "nan"], "--learning_rate"),
    (["--max_grad_norm", "-1"], "--max_grad_norm"),
    (["--lipreg_weight", "-1"], "--lipreg_weight must be a finite number, 0 or more, that float32 can hold, got -1.0"),
    (["--lipreg_weight", "nan"], "--lipreg_weight"),
    (["--lipreg_weight", "inf"], "--lipreg_weight"),
    (["--lipreg_weight", "much"], "--lipreg_weight"),
    (["--lipreg_text_encoder_weight", "nan"], "--lipreg_text_encoder_weight"),
    (["--lipreg_reduction", "mean"], "--lipreg_reduction"),
    (["--lipreg_reduction", "sum"], "--lipreg_weight"),
    (["--lipreg_teacher_dtype", "int8"], "--lipreg_teacher_dtype"),
    (["--drift_budget", "0"], "--drift_budget must be above 0"),
    (["--drift_budget", "-0.1"], "--drift_budget must be a finite number"),
    (["--drift_budget", "0.02", "--lipreg_weight", "500"], "--lipreg_weight exclude each other"),
    (["--drift_budget", "0.02", "--lipreg_text_encoder_weight", "1"], "exclude each other"),
    (["--drift_budget", "0.02", "--rank", "4", "--lipreg_reduction", "factors", "--lipreg_weight", "1"], "exclude"),
    (["--probe_steps", "-1"], "--probe_steps must be 0 or more, got -1"),
    (["--keep_best", "--probe_steps", "0"], "--keep_best"),
    (["--with_prior_preservation"], "--class_data_dir"),
    (["--with_prior_preservation", "--class_prompt", "a photo of dog"], "--class_data_dir"),
    (["--with_prior_preservation", "--class_data_dir", "dogs"], "--class_prompt"),
    (["--train_text_encoder", "--pre_compute_text_embeddings"], "--pre_compute_text_embeddings"),
    (["--lr_scheduler", "stairs"], "--lr_scheduler must be one of linear"),
    (["--lr_scheduler", "piecewise_constant"], "--lr_scheduler"),  # needs rules that no flag gives
    (["--report_to", "none"], "--report_to must be one of"),
    (["--report_to", "wandb", "--hub_token", "hf_secret"], "--hub_token"),
    (["--report_to", "comet_ml", "--hub_token", "hf_secret"], "--hub_token"),
    (["--hub-token", "hf_secret"], "unrecognized arguments: --hub-token"),
    (["--hf_token=hf_secret"], "unrecognized arguments: --hf_token"),
    (["--hub_=hf_secret"], "ambiguous option: --hub_"),
    (["--seed", "hf_secret"], "--seed"),
    (["--instance_prompt", "a", "photo"], "unrecognized arguments: photo"),
    (["--mixed_precision", "fp8"], "--mixed_precision"),
    (["--validation_scheduler", "DDIMScheduler"], "--validation_scheduler"),
]


@pytest.mark.parametrize(("flags", "named"), MISTAKES, ids=[" ".join(flags) for flags, _ in MISTAKES])
def test_a_mistake_ends_in_one_line(flags: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(*flags)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert ": error: " in line
    assert named in line
    assert "hf_secret" not in line


@pytest.mark.parametrize("missing", REQUIRED[::2])
def test_a_missing_flag_is_named_in_one_line(missing: str, capsys: pytest.CaptureFixture[str]) -> None:
    index = REQUIRED.index(missing)
    with pytest.raises(SystemExit) as stopped:
        parse_args(REQUIRED[:index] + REQUIRED[index + 2 :])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert missing in line


def test_prior_preservation_with_both_its_flags_is_fine() -> None:
    assert parse(*PRIOR).with_prior_preservation
