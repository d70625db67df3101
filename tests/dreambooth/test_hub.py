"""The model card and what goes to the Hub: enough to use the result, nothing that is nobody's business."""

import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate import Accelerator
from huggingface_hub import ModelCard
from PIL import Image
from support.loopback_hub import CUT, OTHER, PORTAL, STALL, LoopbackHub
from support.runs import flags

from diffusers_lipreg import hub_client
from diffusers_lipreg.dreambooth.hub import create_repository, model_card, push_advice, upload
from diffusers_lipreg.dreambooth.output import MANIFEST, OutputFolder
from diffusers_lipreg.errors import RunError
from train_dreambooth_lipreg import parse_args
from train_dreambooth_lora_lipreg_sdxl import parse_args as parse_args_sdxl

REPO = "alice/sks-dog"
TAGS = ["text-to-image", "dreambooth", "stable-diffusion"]
PENALTY = {"lipreg_weight": "500", "lipreg_reduction": "tensor_mean", "drift_relative": "0.0123"}


def arguments(*more: str) -> Namespace:
    return parse_args(flags("out", "--pretrained_model_name_or_path", "org/sd-1.5", *more))


def card(*more: str, penalty: dict[str, str] = PENALTY, images: int = 0) -> ModelCard:
    shown = [Image.new("RGB", (8, 8))] * images
    facts = {"license": "creativeml-openrail-m", "tags": TAGS, "penalty": penalty}
    return model_card(arguments(*more), REPO, shown, **facts)


def metadata(card: ModelCard) -> dict[str, Any]:
    """The card's head as the Hub reads it."""
    _, head, _ = str(card).split("---\n", 2)
    return yaml.safe_load(head)


# The card's head


def test_metadata() -> None:
    assert metadata(card()) == {
        "base_model": "org/sd-1.5",
        "inference": True,
        "instance_prompt": "a photo of sks dog",
        "library_name": "diffusers",
        "license": "creativeml-openrail-m",
        "pipeline_tag": "text-to-image",
        "tags": TAGS,
    }


@pytest.mark.parametrize("prompt", ['a "sks" dog: [it]', "it's a dog # sks", "ein grüner Hund", "犬"])
def test_any_prompt_survives_the_metadata_and_the_code(prompt: str) -> None:
    about = card("--instance_prompt", prompt)
    assert metadata(about)["instance_prompt"] == prompt
    code = about.text.split("```python\n")[1].split("```")[0]
    assert f'from_pretrained("{REPO}", dtype=dtype)' in code
    assert prompt in compile(code, "card", "exec").co_consts


@pytest.mark.parametrize("base", ["org/sd-1.5", "org_1/Model.v2", "gpt2"])
def test_a_base_model_on_the_hub_is_named(base: str) -> None:
    assert metadata(card("--pretrained_model_name_or_path", base))["base_model"] == base
    assert base in card("--pretrained_model_name_or_path", base).content


@pytest.mark.parametrize("spelling", ["{folder}/", "models/my-sd", ".", "../my-sd"])
def test_a_local_base_model_is_no_base_model_and_only_its_name_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelling: str
) -> None:
    folder = tmp_path / "models" / "my-sd"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path if "models" in spelling else folder)
    local = card("--pretrained_model_name_or_path", spelling.format(folder=folder))
    assert "base_model" not in metadata(local)
    assert "This is my-sd taught a subject" in local.content
    assert str(tmp_path) not in local.content
    assert "models/" not in local.content


def test_of_another_vae_only_the_name_is_told(tmp_path: Path) -> None:
    (tmp_path / "my-vae").mkdir()
    args = parse_args_sdxl(flags("out", "--pretrained_vae_model_name_or_path", str(tmp_path / "my-vae")))
    about = model_card(args, REPO, [], license="openrail++", tags=TAGS, penalty={}).content
    assert "The VAE in training was my-vae." in about and str(tmp_path) not in about


# The card's body


def test_the_penalty_is_a_table_and_without_one_nothing() -> None:
    rows = [f"| {name} | {value} |" for name, value in PENALTY.items()]
    assert "\n".join(["| penalty | |", "|---|---|", *rows]) in card().text
    assert "drift from the pretrained weights" in card().text
    held = card(penalty={"lipreg_reduction": "output"}).text
    assert "predictions was part of the loss" in held and "weights was part" not in held and "arxiv.org" not in held
    assert "penalty" not in card(penalty={}).content
    assert "arxiv.org" not in card(penalty={}).content


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [([], "The text encoder was not trained."), (["--train_text_encoder"], "The text encoder was trained, too.")],
)
def test_the_card_says_whether_the_text_encoder_was_trained(flag: list[str], sentence: str) -> None:
    assert sentence in card(*flag).text


def test_the_card_shows_its_images() -> None:
    text = card("--validation_prompt", "sks dog in a bucket", images=2).text
    for part in ("sks dog in a bucket", "(./image_0.png)", "(./image_1.png)"):
        assert part in text
    assert "image_2" not in text
    assert "![" not in card().text


# Secrets


def test_the_token_stays_where_it_is() -> None:
    secret = ["--push_to_hub", "--hub_token", "hf_secret", "--hub_model_id", REPO, "--validation_prompt", "a dog"]
    assert "hf_secret" not in str(card(*secret, images=1))


# A Hub that fails

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
PATIENCE = [2.0, 10.0]


@pytest.fixture
def waits(fresh_accelerate, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that a test would have waited; the client's own waits are in it, too."""
    Accelerator(cpu=True)  # which logs need
    seconds: list[float] = []
    monkeypatch.setattr(time, "sleep", seconds.append)
    return seconds


@pytest.fixture
def output(tmp_path: Path) -> OutputFolder:
    """An output folder that holds a result."""
    output = OutputFolder(tmp_path / "sks-dog")

    def write_trained(folder: Path) -> None:
        (folder / "unet").mkdir()
        (folder / WEIGHTS).write_bytes(bytes(range(256)) * 4096)

    with output.result(write_trained) as folder:
        (folder / "README.md").write_text("A dog.")
    return output


@pytest.fixture
def result(output: OutputFolder) -> Namespace:
    """The arguments of the run that made it."""
    return arguments("--output_dir", str(output.path), "--push_to_hub", "--hub_token", "hf_alice")


@pytest.mark.parametrize(
    ("fail", "waited"),
    [
        ({"create": [500, 500]}, PATIENCE),
        ({"auth_check": [503]}, PATIENCE[:1]),
        ({"commit": [409]}, PATIENCE[:1]),
        ({"commit": [429, 429]}, [7.0, 7.0]),
        ({"commit": [500, 500]}, PATIENCE),
        ({"commit": [CUT]}, PATIENCE[:1]),
        ({"commit": [500], "create": [CUT]}, [2.0, 2.0]),
    ],
)
def test_what_passes_is_waited_for(
    hub: LoopbackHub, output: OutputFolder, result: Namespace, waits: list[float], fail, waited
) -> None:
    hub.fail = fail
    upload(result, output, create_repository(result))
    assert hub.files("alice/sks-dog").keys() == {WEIGHTS, "README.md", MANIFEST}
    assert waits == waited


@pytest.mark.parametrize("endpoint", ["preupload", "lfs_batch", "lfs_put"])
@pytest.mark.parametrize("status", [500, CUT])
def test_an_upload_that_breaks_off_goes_on(
    hub: LoopbackHub, output: OutputFolder, result: Namespace, waits: list[float], endpoint: str, status: int
) -> None:
    """The client asks again by itself here; what it needs is that it is not in the way."""
    hub.fail = {endpoint: [status]}
    upload(result, output, create_repository(result))
    assert hub.files("alice/sks-dog")[WEIGHTS] == Path(result.output_dir, WEIGHTS).read_bytes()
    assert len(waits) == 1


@pytest.mark.parametrize(
    ("fail", "attempts"),
    [
        ({"commit": 401}, 1),
        ({"commit": 403}, 1),
        ({"commit": 409}, 3),
        ({"commit": 429}, 3),
        ({"commit": 500}, 3),
        ({"commit": CUT}, 3),
        ({"lfs_put": CUT}, 3),
        ({"lfs_put": 403}, 1),
    ],
)
def test_what_does_not_pass_ends_with_the_command_that_pushes(
    hub: LoopbackHub, output: OutputFolder, result: Namespace, waits: list[float], fail, attempts: int
) -> None:
    repo_id = create_repository(result)
    before = {path: path.read_bytes() for path in output.path.rglob("*") if path.is_file()}
    hub.fail = fail
    with pytest.raises(RunError) as failed:
        upload(result, output, repo_id)
    assert str(failed.value).startswith("the upload to alice/sks-dog failed (")
    assert str(failed.value).endswith(push_advice(output, repo_id))
    assert len([wait for wait in waits if wait in (*PATIENCE, 7.0)]) >= attempts - 1
    if "commit" in fail:
        assert len([request for request in hub.requests if "/commit/" in request.path]) == attempts
    assert {path: path.read_bytes() for path in before} == before
    assert sum(waits) < 90


# A Hub that is slow, or is none


@pytest.fixture
def impatient(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client as every command has it, but that gives up sooner."""
    monkeypatch.setattr(hub_client, "ANSWER", 0.2)
    hub_client.bound_waiting()


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("answer", [STALL, PORTAL, OTHER])
@pytest.mark.parametrize("endpoint", ["create", "resolve", "preupload", "lfs_batch", "lfs_put", "commit"])
def test_what_answers_as_no_hub_does_ends_in_one_line(
    hub: LoopbackHub, output: OutputFolder, result: Namespace, waits: list[float], endpoint: str, answer: int
) -> None:
    """What the client makes of such an answer is its own: any exception, or none."""
    hub.fail = {endpoint: answer}
    began = time.monotonic()
    if endpoint == "create":
        with pytest.raises(RunError, match="--push_to_hub: cannot write to sks-dog on http"):
            create_repository(result)
    else:
        with pytest.raises(
            RunError, match="the upload to alice/sks-dog failed .* push it with: hf upload alice/sks-dog"
        ):
            upload(result, output, create_repository(result))
    assert time.monotonic() - began < 10


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("endpoint", ["create", "auth_check", "preupload", "commit"])
def test_the_hub_does_not_say_how_long_we_wait(
    hub: LoopbackHub, output: OutputFolder, result: Namespace, waits: list[float], endpoint: str
) -> None:
    hub.fail, hub.retry_after = {endpoint: 429}, "9999"
    with pytest.raises(RunError, match="429"):
        upload(result, output, create_repository(result))
    assert 60 <= max(waits) <= 61
