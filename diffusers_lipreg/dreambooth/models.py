"""The pipeline that training starts from, its parts, and the files they were loaded from."""

from __future__ import annotations

import inspect
import json
from argparse import Namespace
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers.utils
import torch
import transformers
import transformers.utils
from diffusers import DiffusionPipeline, ModelMixin
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import as_run_error, one_line

BASE_FLAGS = ("pretrained_model_name_or_path", "revision", "variant")
MODEL_FLAGS = (*BASE_FLAGS, "pretrained_vae_model_name_or_path", "tokenizer_name")
TEACHER_FLAGS = ("lipreg_teacher_device", "lipreg_teacher_dtype")


def loading(args: Namespace, flags: Sequence[str] = MODEL_FLAGS) -> AbstractContextManager[None]:
    """Turn whatever a loader, a client or a teacher raises in the block into one line, after the flags that led there."""
    given = " ".join(f"--{name} {vars(args)[name]}" for name in flags if vars(args).get(name))
    return as_run_error(lambda error: f"{given}: {one_line(error)}" if given else one_line(error))


@dataclass(frozen=True)
class Base:
    """A pipeline as `preflight.open_base` found it: files on this machine, of one commit, that were looked at.

    Parts are loaded by the classes named here, from safetensors alone: no other file of the folder can run code.
    """

    title: str  # as others may read it: its Hub id, or the folder's own name
    commit: str | None  # of a repository on the Hub
    variant: str | None
    index: Mapping[str, Any]  # what model_index.json holds
    pipeline_class: type[DiffusionPipeline]
    classes: Mapping[str, type]  # of each part that the index names
    folders: Mapping[str, Path]  # of each part

    def load(self, name: str, part_class: Any = None, **options: Any) -> Any:
        """Load a part as a `part_class`, by default as what the index says. Models take options, such as `dtype`."""
        part_class, folder = part_class or self.classes[name], self.folders[name]
        if issubclass(part_class, nn.Module):
            variant, _ = find_weights(folder, list_files(folder), part_class, self.variant)
            part = load_part(part_class, folder, variant=variant, **options)
            if isinstance(part, ModelMixin):
                part.register_to_config(_name_or_path=self.title)  # the result may be published, the path is private
            return part
        part = part_class.from_pretrained(folder)
        if isinstance(part, PreTrainedTokenizerBase):
            part.init_kwargs["name_or_path"] = part.name_or_path = self.title
            encoder = name.replace("tokenizer", "text_encoder")
            limit_length(part, self.classes[encoder].config_class.from_pretrained(self.folders[encoder]))
        return part

    def pipeline(self, dtype: torch.dtype, **parts: Any) -> Any:
        """Load the whole pipeline, its models in `dtype`, with `parts` in place of its own; `None` leaves one out."""
        expected = inspect.signature(self.pipeline_class).parameters
        absent = dict.fromkeys(name for name in expected if name in self.pipeline_class._optional_components)
        settings = {name: value for name, value in self.index.items() if not isinstance(value, (list, tuple))}
        for name, part_class in self.classes.items():
            if name not in parts:
                parts[name] = self.load(name, **({"dtype": dtype} if issubclass(part_class, nn.Module) else {}))
        arguments = {name: value for name, value in (absent | settings | parts).items() if name in expected}
        pipeline = self.pipeline_class(**arguments)
        pipeline.register_to_config(_name_or_path=self.title)
        return pipeline

    def stored(self, name: str, part: nn.Module) -> dict[str, Tensor]:
        """Map the files that the bare model `part` was loaded from; see `mapped_weights`."""
        folder = self.folders[name]
        _, files = find_weights(folder, list_files(folder), type(part), self.variant)
        return mapped_weights(part, [folder / file for file in files])

    def text_config(self, name: str) -> PretrainedConfig:
        """Return the configuration of a text encoder, complete with its class's defaults."""
        return text_encoder_class(self.folders[name]).config_class.from_pretrained(self.folders[name])


def load_part(part_class: Any, folder: str | Path, **options: Any) -> Any:
    """Load a model by its `from_pretrained`, with all of its weights and from safetensors alone."""
    part, found = part_class.from_pretrained(folder, use_safetensors=True, output_loading_info=True, **options)
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"{Path(folder).name} lacks {len(missing)} weights, {missing[0]} first.")
    return part


def limit_length(tokenizer: PreTrainedTokenizerBase, text_config: PretrainedConfig) -> PreTrainedTokenizerBase:
    """Have the tokenizer cut prompts to the positions that the text encoder has, where its own limit is above them."""
    limit = getattr(text_config, "max_position_embeddings", None)  # T5 has none
    if limit is not None and tokenizer.model_max_length > limit:
        tokenizer.init_kwargs["model_max_length"] = tokenizer.model_max_length = limit
    return tokenizer


def text_encoder_class(folder: Path) -> type[PreTrainedModel]:
    """Return the class that the configuration of a text encoder names, if DreamBooth knows how to feed it."""
    name = (read_json(folder / "config.json").get("architectures") or [None])[0]
    if name is None:
        raise ValueError(f"its {folder.name} has no configuration that names its class.")
    if name == "RobertaSeriesModelWithTransformation":  # AltDiffusion; diffusers holds its encoder, not transformers
        from diffusers.pipelines.deprecated.alt_diffusion.modeling_roberta_series import (
            RobertaSeriesModelWithTransformation,
        )

        return RobertaSeriesModelWithTransformation
    supported = ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel")
    if name not in supported:
        raise ValueError(f"its {folder.name} is a {name}; supported are {', '.join(supported)}.")
    return getattr(transformers, name)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of the base."""
    content = parse_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object.")
    return content


def parse_json(path: Path) -> Any:
    """Read any JSON value from a file of the base."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path.parent.name} has no {path.name}.") from error
    except ValueError as error:
        raise ValueError(f"{path} is not a valid JSON file ({one_line(error)}).") from error


def list_files(folder: Path) -> set[str]:
    """Return the names of the files in a part's folder."""
    return {path.name for path in folder.iterdir()}


def find_weights(
    folder: Path, present: Collection[str], part_class: type, variant: str | None
) -> tuple[str | None, list[str]]:
    """Return the variant of a part that is there, the wanted one or else none, and the names of its weight files.

    Args:
        folder: The part's folder, whose JSON files are on this machine.
        present: The names of its files; of a repository, those that are yet to be fetched, too.

    Raises:
        ValueError: There are no safetensors, or none without a variant, or an index names files elsewhere.
    """
    whole = diffusers.utils.SAFETENSORS_WEIGHTS_NAME
    if not issubclass(part_class, ModelMixin):
        whole = transformers.utils.SAFE_WEIGHTS_NAME
    for choice in dict.fromkeys((variant, None)):
        files = [file for file in [_of(choice, whole)] if file in present]
        index = _of(choice, f"{whole}.index.json")
        if index in present:
            shards = read_json(folder / index).get("weight_map")
            if not isinstance(shards, dict) or any(Path(str(file)).name != file for file in shards.values()):
                raise ValueError(f"{folder.name}/{index} names files that are not beside it.")
            files += sorted(set(shards.values()))
        if files:
            return choice, files
    stem = whole.removesuffix("safetensors")
    variants = {name.removeprefix(stem).split(".")[0].split("-")[0] for name in present if name.startswith(stem)}
    variants -= {"bin", "safetensors"}
    pickled = sorted(name for name in present if name.endswith((".bin", ".ckpt", ".pt", ".pth")))
    if not any(name.endswith(".safetensors") for name in present) and pickled:
        raise ValueError(
            f"{folder.name} has no safetensors, but {pickled[0]}, a pickle, which can run code: convert it."
        )
    hint = f", only those of a variant: add --variant {' or '.join(sorted(variants))}" if variants else ""
    raise ValueError(f"{folder.name} has no weights, {whole}{hint}.")


def mapped_weights(part: nn.Module, files: Sequence[Path]) -> dict[str, Tensor]:
    """Map the tensors of files under the names of the parameters of `part`, so that no copy is in memory.

    The files have to stay as they are meanwhile.

    Args:
        part: A bare model of diffusers or transformers.

    Raises:
        ValueError: Parameters have other names in the files.
    """
    stored = {name: tensor for file in files for name, tensor in load_file(file).items()}
    parameters = dict(part.named_parameters())
    # Newer transformers call CLIP's parts without the prefix that released checkpoints have.
    named = {name if name in parameters else name.removeprefix("text_model."): stored[name] for name in stored}
    if missing := sorted(parameters.keys() - named.keys()):
        where = files[0].parent.name
        raise ValueError(
            f"{where} has {missing[0]} under another name in its file, or not at all: choose cpu, or leave it out."
        )
    return named


def _of(variant: str | None, file: str) -> str:
    """Return the name that the file has in a variant, `model.fp16.safetensors` for `model.safetensors`."""
    stem, _, ending = file.rpartition(".")
    return file if variant is None else f"{stem}.{variant}.{ending}"
