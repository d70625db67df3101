"""Loading parts of a pipeline, and weights mapped from a checkpoint: under the module's names, and no memory."""

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from support.runs import PARITY
from torch import nn
from transformers import CLIPTextModel, PreTrainedModel

from diffusers_lipreg import TeacherSnapshot
from diffusers_lipreg.dreambooth.models import Base, map_weights, text_encoder_class


def anonymous_memory() -> float:
    """What this process holds beside files, in MB."""
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1e3


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux counts it")
def test_a_mapped_teacher_takes_no_memory(tmp_path: Path) -> None:
    """Stored in float16 beside float32 parameters: neither the check, nor the norm, nor the gradient copies it."""
    with torch.no_grad():
        module = nn.Linear(4096, 8192, bias=False).half().float()  # 134 MB, 67 MB in the file
    (tmp_path / "text_encoder").mkdir()
    save_file({"weight": module.weight.half()}, tmp_path / "text_encoder" / "model.safetensors")
    module.weight.grad = torch.ones_like(module.weight)
    before = anonymous_memory()
    snapshot = TeacherSnapshot(
        module, state_dict=map_weights(tmp_path / "text_encoder", module, ["model.safetensors"])
    )
    assert snapshot.squared_norm > 0
    snapshot.add_gradient_(module, "sum", weight=1.0)
    assert anonymous_memory() - before < 30
    del snapshot
    copied = TeacherSnapshot(module)
    assert anonymous_memory() - before > 60 and copied.squared_norm > 0


def test_names_with_the_prefix_of_released_checkpoints(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    save_file({f"text_model.{name}": p for name, p in module.state_dict().items()}, tmp_path / "model.safetensors")
    assert map_weights(tmp_path, module, ["model.safetensors"]).keys() == {"0.weight", "0.bias"}


def test_a_parameter_that_is_not_in_the_file_is_an_error(tmp_path: Path) -> None:
    module = nn.Linear(2, 2)
    save_file({"weight": module.weight, "beta": module.bias}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="lacks 1 weights, bias first"):
        map_weights(tmp_path, module, ["model.safetensors"])


def test_weights_that_cannot_be_mapped_end_in_advice(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    base = Base("base", None, None, {}, DiffusionPipeline, {}, {"text_encoder": tmp_path})
    with pytest.raises(ValueError, match="lacks 1 weights, bias first. Choose cpu, or leave it out"):
        base.stored("text_encoder", nn.Linear(2, 2))


# Which text encoder


def test_the_text_encoders_class_is_the_pipelines() -> None:
    assert text_encoder_class(PARITY / "pipeline" / "text_encoder") is CLIPTextModel


def text_encoder(folder: Path, name: str) -> Path:
    Path(folder, "text_encoder").mkdir()
    Path(folder, "text_encoder", "config.json").write_text(json.dumps({"architectures": [name]}))
    return folder / "text_encoder"


@pytest.mark.parametrize(
    "name",
    ["CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel", "RobertaSeriesModelWithTransformation"],
)
def test_official_text_encoders_are_known(tmp_path: Path, name: str) -> None:
    found = text_encoder_class(text_encoder(tmp_path, name))
    assert found.__name__ == name
    assert issubclass(found, PreTrainedModel)


def test_an_unknown_text_encoder_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="its text_encoder is a ChatGLMModel; supported are CLIPTextModel"):
        text_encoder_class(text_encoder(tmp_path, "ChatGLMModel"))
