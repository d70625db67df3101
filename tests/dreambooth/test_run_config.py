"""config.yaml: what it says, what it never says, and one rule for each flag when a run is resumed."""

import copy
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from support.runs import PARITY, flags

import train_dreambooth_lipreg
import train_dreambooth_lora_lipreg_sdxl
from diffusers_lipreg.dreambooth import run_config
from diffusers_lipreg.dreambooth.output import CONFIG
from diffusers_lipreg.errors import RunError

SCRIPTS = (train_dreambooth_lipreg, train_dreambooth_lora_lipreg_sdxl)


@pytest.fixture(autouse=True)
def _accelerate(fresh_accelerate: None, caplog: pytest.LogCaptureFixture) -> None:
    from accelerate.state import PartialState

    PartialState()  # which accelerate's loggers ask for
    caplog.set_level(logging.INFO)


def start(*more: str, checkpoint: Path | None = None) -> dict[str, Any]:
    args = train_dreambooth_lipreg.parse_args(flags("out", *more))
    base: Any = SimpleNamespace(commit=None, folders={"unet": Path(args.pretrained_model_name_or_path, "unet")})
    return run_config.start(args, base, checkpoint)


def checkpoint_of(folder: Path, *more: str) -> Path:
    folder.mkdir()
    run_config.write(start(*more), folder / CONFIG, files={})
    return folder


def test_every_flag_of_both_scripts_has_one_rule() -> None:
    flagged = {action.dest for script in SCRIPTS for action in script.build_parser()._actions} - {"help"}
    ruled = [name for names in run_config.RULES.values() for name in names]
    assert sorted(ruled) == sorted(flagged)


def test_it_holds_all_flags_and_no_token(tmp_path: Path) -> None:
    written = checkpoint_of(tmp_path / "checkpoint-1", "--hub_token", "hf_secret", "--push_to_hub")
    text = Path(written, CONFIG).read_text()
    assert "secret" not in text
    config = yaml.safe_load(text)
    args = vars(train_dreambooth_lipreg.parse_args(flags("out")))
    assert args.keys() - config.keys() == {"hub_token", "resume_from_checkpoint"}
    assert (config["learning_rate"], config["seed"], config["adam_epsilon"]) == (5e-4, 0, 1e-8)
    assert config["run"]["versions"].keys() >= {"diffusers_lipreg", "torch", "accelerate"}
    assert config["run"]["photos"].keys() == {path.name for path in (PARITY / "instance").iterdir()}


def test_the_same_flags_say_nothing_and_keep_the_id(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = checkpoint_of(tmp_path / "checkpoint-1")
    moved = shutil.copytree(PARITY / "pipeline", tmp_path / "moved")  # the same base, and the same photos
    photos = shutil.copytree(PARITY / "instance", tmp_path / "photos")
    again = start(
        "--pretrained_model_name_or_path", str(moved), "--instance_data_dir", str(photos), checkpoint=checkpoint
    )
    assert not caplog.records
    assert again["run"]["id"] == run_config.read(checkpoint)["run"]["id"] != start()["run"]["id"]


def test_a_checkpoint_of_the_official_script_is_not_compared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    start(checkpoint=tmp_path)
    assert "its flags are not compared" in caplog.text


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (("--rank", "8"), "--rank was 4 and is 8"),
        (("--use_dora",), "--use_dora was False and is True"),
        (("--train_text_encoder",), "--train_text_encoder was False and is True"),
        (("--lipreg_reduction", "product", "--lipreg_weight", "1"), "--lipreg_reduction was factors and is product"),
    ],
)
def test_what_a_checkpoint_does_not_fit_is_refused(tmp_path: Path, more: tuple[str, ...], named: str) -> None:
    checkpoint = checkpoint_of(tmp_path / "checkpoint-1", "--rank", "4")
    with pytest.raises(RunError, match=named):
        start("--rank", "4", *more, checkpoint=checkpoint)


def test_a_base_with_other_weights_is_refused_even_under_its_name(tmp_path: Path) -> None:
    base = shutil.copytree(PARITY / "pipeline", tmp_path / "base")
    checkpoint = checkpoint_of(tmp_path / "checkpoint-1", "--pretrained_model_name_or_path", str(base))
    weights = base / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(RunError, match="--pretrained_model_name_or_path was .*sha256.* and is .*sha256"):
        start("--pretrained_model_name_or_path", str(base), checkpoint=checkpoint)


def test_what_takes_effect_and_what_mixes_two_runs_are_named_apart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    photos = shutil.copytree(PARITY / "instance", tmp_path / "photos")
    for path in sorted(photos.iterdir())[:2]:
        path.unlink()
    (photos / "more.png").write_bytes(b"another")
    checkpoint = checkpoint_of(tmp_path / "checkpoint-1")
    start(
        *("--learning_rate", "1e-6", "--resolution", "128", "--instance_data_dir", str(photos)), checkpoint=checkpoint
    )
    warning, information = caplog.records
    assert warning.levelname == "WARNING" and information.levelname == "INFO"
    assert "--learning_rate was 0.0005 and is 1e-06" in information.getMessage()
    assert "--resolution was 64 and is 128" in warning.getMessage()
    assert "--instance_data_dir has other photos or captions (2 removed, 1 added)" in warning.getMessage()


def test_another_subject_is_refused(tmp_path: Path) -> None:
    """As where a command line says `latest` for good, and the output folder was another subject's."""
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "0.png").write_bytes(b"a cat")
    checkpoint = checkpoint_of(tmp_path / "checkpoint-1")
    with pytest.raises(RunError, match="another subject"):
        cat = ("--instance_data_dir", str(tmp_path / "cat"), "--instance_prompt", "a photo of sks cat")
        start(*cat, checkpoint=checkpoint)


BOMB = "a: &a [x, x]\nb: &b [*a, *a]\n" + "".join(
    f"k{n}: &k{n} [{', '.join([f'*k{n - 1}' if n else '*b'] * 9)}]\n" for n in range(30)
)
FILE_5 = "run: {id: a, base: a, photos: {}, time: 1.0, files: {5: 5}}"
LONG = f"run: {{id: a, base: a, photos: {{}}, time: 1.0, files: {{}}}}\nseed: 0x{'f' * 9999}"


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch marker']",
        "[" * 10_000,
        "run: 1",
        "- a",
        "\0",
        BOMB,
        "run: {id: 1}",
        FILE_5,
        LONG,
    ],
    ids=["code", "depth", "a number", "a list", "not text", "a bomb", "no run", "a file named 5", "a long number"],
)
def test_what_is_no_configuration_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    Path(tmp_path, CONFIG).write_text(text)
    with pytest.raises(RunError, match="config.yaml: cannot be read"):
        run_config.read(tmp_path)


def test_a_configuration_from_elsewhere_prints_no_control_characters(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = copy.deepcopy(start())
    config["seed"] = "\x1b[2J"
    run_config.write(config, tmp_path / CONFIG, files={})
    start(checkpoint=tmp_path)
    assert "\x1b" not in caplog.text and "--seed was \\x1b[2J and is 0" in caplog.text
