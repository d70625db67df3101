"""Trackers: the real wandb, offline; what a tracker that fails does to a run."""

import struct
import warnings
from argparse import Namespace
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker
from accelerate.utils import ProjectConfiguration
from PIL import Image
from support.runs import flags

from diffusers_lipreg.dreambooth.trackers import start_trackers, tracker_config
from diffusers_lipreg.dreambooth.validation import log_images
from diffusers_lipreg.errors import RunError
from train_dreambooth_lipreg import parse_args

VALIDATE = ("--validation_prompt", "a dog", "--num_validation_images", "1")


def arguments(*more: str) -> Namespace:
    return parse_args(flags("out", *more))


@pytest.fixture
def accelerator(fresh_accelerate, tmp_path: Path) -> Accelerator:
    configuration = ProjectConfiguration(project_dir=str(tmp_path), logging_dir=str(tmp_path / "logs"))
    return Accelerator(cpu=True, log_with="tensorboard", project_config=configuration)


@pytest.fixture
def wandb_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    wandb = pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    yield
    wandb.teardown()  # which forgets these settings


def wandb_history(folder: Path) -> Iterator[dict[str, str]]:
    """Yield the rows of the one run under `folder` from its file: chunks in blocks of 32 KiB, as LevelDB's log has them."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # The service of wandb may still hold a part of the file, which it writes before it ends.
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    data, position, parts = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if (left := 2**15 - position % 2**15) < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record, parts = Record.FromString(parts), b""
            if record.WhichOneof("record_type") == "history":
                yield {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}


def test_wandb_gets_every_scalar_and_image_at_the_update_it_is_of(train_sdxl, wandb_offline, tmp_path):
    """Images after the first epoch, which has 4 updates, and at the end: a step that goes back would be dropped."""
    train_sdxl(
        tmp_path / "out", "--max_train_steps", "5", "--report_to", "wandb", "--validation_epochs", "2", *VALIDATE
    )
    rows = {int(row["_step"]): row for row in wandb_history(tmp_path)}
    assert sorted(rows) == [1, 2, 3, 4, 5] and all("loss" in row for row in rows.values())
    images = {
        (step, key): text for step, row in rows.items() for key, text in row.items() if key.endswith("/captions")
    }
    assert images == {(4, "validation/captions"): '["a dog"]', (5, "test/captions"): '["a dog"]'}
    assert len(list(tmp_path.glob("wandb/latest-run/files/media/images/*.png"))) == 2


def test_wandb_without_a_key_ends_in_one_line_before_training(train, wandb_offline, tmp_path, monkeypatch, logs):
    for name, value in {"WANDB_MODE": "online", "HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(RunError, match=r"--report_to wandb: a tracker cannot start \(.*key"):
        train(tmp_path / "out", "--report_to", "wandb")
    assert logs == []


def test_a_tracker_that_fails_is_one_warning(train, tmp_path, monkeypatch, caplog):
    """A disk that is full for the event file alone: the run ends as if nothing were the matter."""

    def full(self, *args, **options):
        raise OSError(28, "No space left on device")

    for method in ("log", "log_images", "finish"):
        monkeypatch.setattr(TensorBoardTracker, method, full)
    out = train(tmp_path / "out", "--rank", "2", "--validation_steps", "1", *VALIDATE)
    assert (out / "pytorch_lora_weights.safetensors").is_file()
    (line,) = [record.message for record in caplog.records if "tensorboard" in record.message]
    assert line.removeprefix("[RANK 0] ") == (  # accelerate's, from some release on
        "tensorboard fails, and may miss what follows: [Errno 28] No space left on device"
    )


def test_tensorboard_gets_the_images(accelerator: Accelerator, tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    start_trackers(arguments("--instance_prompt", "dog"), accelerator, "dreambooth")
    log_images(accelerator, [Image.new("RGB", (8, 8), color) for color in ("red", "blue")], "a dog", step=30)
    accelerator.end_training()
    events = event_accumulator.EventAccumulator(str(tmp_path / "logs" / "dreambooth"))
    events.Reload()
    (tag,) = events.Tags()["images"]
    (event,) = events.Images(tag)
    assert (tag, event.step) == ("validation", 30)
    shown = Image.open(BytesIO(event.encoded_image_string))  # side by side
    assert sorted(shown.getcolors()) == [(64, (0, 0, 255)), (64, (255, 0, 0))]


def test_trackers_get_all_flags_but_the_token_as_plain_values() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        args = arguments("--hub_token", "hf_secret", "--validation_images", "a.png", "b.png")
    config = tracker_config(args)
    assert config.keys() == vars(args).keys() - {"hub_token"} and "hf_secret" not in repr(config)
    assert config["validation_images"] == "['a.png', 'b.png']"
    assert all(isinstance(value, (str, int, float, bool, type(None))) for value in config.values())
