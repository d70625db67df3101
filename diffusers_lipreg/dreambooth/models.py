"""Loading the parts of a pipeline, and the files that they were loaded from."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import diffusers
import diffusers.utils
import transformers
import transformers.utils
from diffusers import DiffusionPipeline, ModelMixin
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from ..errors import RunError, one_line


def load_part(part_class: Any, model: str, **options: Any) -> Any:
    """A part of a pipeline, by its `from_pretrained`, with all of its weights and from safetensors alone."""
    part, found = part_class.from_pretrained(model, use_safetensors=True, output_loading_info=True, **options)
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"{options.get('subfolder', '')} lacks {len(missing)} weights, {missing[0]} first.")
    return part


MODEL_FLAGS = (
    "pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "tokenizer_name", "revision", "variant"
)  # fmt: skip
TEACHER_FLAGS = ("lipreg_teacher_device", "lipreg_teacher_dtype")


@contextmanager
def loading(args: Namespace, flags: Sequence[str] = MODEL_FLAGS) -> Iterator[None]:
    """Turns what `from_pretrained` or a teacher raises in the block into one line that names the flags that led there."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        given = [f"--{name} {vars(args)[name]}" for name in flags if vars(args).get(name)]
        raise RunError(": ".join([" ".join(given), one_line(error)] if given else [one_line(error)])) from error


def text_encoder_class(model: str, revision: str | None, subfolder: str = "text_encoder") -> type[PreTrainedModel]:
    """The class that the pipeline's configuration names, if DreamBooth knows how to feed it."""
    config, _ = PretrainedConfig.get_config_dict(model, subfolder=subfolder, revision=revision)
    if not config.get("architectures"):
        raise RunError(f"{model}: its {subfolder} has no configuration that names its class.")
    name = config["architectures"][0]
    if name == "RobertaSeriesModelWithTransformation":  # AltDiffusion; diffusers holds its encoder, not transformers
        from diffusers.pipelines.deprecated.alt_diffusion.modeling_roberta_series import (
            RobertaSeriesModelWithTransformation,
        )

        return RobertaSeriesModelWithTransformation
    supported = ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel")
    if name not in supported:
        raise RunError(f"{model}: its {subfolder} is a {name}; supported are {', '.join(supported)}.")
    return getattr(transformers, name)


def load_tokenizer(model: str, revision: str | None, subfolder: str = "tokenizer") -> PreTrainedTokenizerBase:
    """The pipeline's tokenizer, of the class its index names: older AutoTokenizers do not find a cached one offline."""
    name = DiffusionPipeline.load_config(model, revision=revision)[subfolder][1]
    return getattr(transformers, name).from_pretrained(model, subfolder=subfolder, revision=revision)


def mapped_weights(
    part: nn.Module, model: str, subfolder: str, revision: str | None, variant: str | None
) -> dict[str, Tensor]:
    """What `from_pretrained` read `part` from, under the names of its parameters, mapped: no copy is in memory.

    The files have to stay as they are meanwhile.

    Args:
        part: A bare model of diffusers or transformers.
        model, subfolder, revision, variant: As `from_pretrained` took them; on the Hub or in a folder.

    Raises:
        OSError, ValueError: No file of safetensors for this variant, or parameters that have other names in it.
    """
    if isinstance(part, ModelMixin):
        whole, index = diffusers.utils.SAFETENSORS_WEIGHTS_NAME, diffusers.utils.SAFE_WEIGHTS_INDEX_NAME
    else:
        whole, index = transformers.utils.SAFE_WEIGHTS_NAME, transformers.utils.SAFE_WEIGHTS_INDEX_NAME
    place = {"subfolder": subfolder, "revision": revision}
    if file := cached_file(model, _of(variant, whole), _raise_exceptions_for_missing_entries=False, **place):
        files = [file]
    else:
        files, _ = get_checkpoint_shard_files(model, cached_file(model, _of(variant, index), **place), **place)
    stored = {name: tensor for file in files for name, tensor in load_file(file).items()}
    parameters = dict(part.named_parameters())
    # Newer transformers call CLIP's parts without the prefix that released checkpoints have.
    named = {name if name in parameters else name.removeprefix("text_model."): stored[name] for name in stored}
    if missing := sorted(parameters.keys() - named.keys()):
        raise ValueError(f"{subfolder} has {missing[0]} under another name in its file, or not at all: choose cpu, or leave it out.")
    return named


def _of(variant: str | None, file: str) -> str:
    """The name that the file has in a variant, `model.fp16.safetensors` for `model.safetensors`."""
    stem, _, ending = file.rpartition(".")
    return file if variant is None else f"{stem}.{variant}.{ending}"
