"""Load the parts of the pipeline to train from their files."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_NAME

from ..errors import as_run_error, one_line

BASE_FLAGS = ("pretrained_model_name_or_path", "revision", "variant")
MODEL_FLAGS = (*BASE_FLAGS, "pretrained_vae_model_name_or_path", "tokenizer_name")
TEACHER_FLAGS = ("lipreg_teacher_device", "lipreg_teacher_dtype")


def loading_errors(args: Namespace, flags: Sequence[str] = MODEL_FLAGS) -> AbstractContextManager[None]:
    """Turn any error of a loader, the Hub or a snapshot into one line that begins with the flags it may come from."""
    given = " ".join(f"--{name} {vars(args)[name]}" for name in flags if vars(args).get(name))
    return as_run_error(lambda error: f"{given}: {one_line(error)}" if given else one_line(error))


@dataclass(frozen=True)
class Base:
    """The pipeline to train, as `base.open_base` found and checked it: files on this machine, of one commit.

    Parts are loaded from safetensors by these classes, so that no file of the pipeline can run code.
    """

    title: str  # Hub id, or the folder's name without its path: results show it to others
    commit: str | None  # None for a folder
    variant: str | None
    index: Mapping[str, Any]  # content of model_index.json
    pipeline_class: type[DiffusionPipeline]
    classes: Mapping[str, type]  # by part
    folders: Mapping[str, Path]  # by part

    def load(self, name: str, part_class: Any = None, **options: Any) -> Any:
        """Load a part as a `part_class`, by default as the class in the index; models take `options` such as `dtype`."""
        part_class, folder = part_class or self.classes[name], self.folders[name]
        if issubclass(part_class, nn.Module):
            variant, _ = find_weights(folder, part_class, self.variant)
            options |= {"variant": variant, "use_safetensors": True, "output_loading_info": True}
            model, found = part_class.from_pretrained(folder, **options)
            _check_complete(folder, found["missing_keys"])
            if isinstance(model, ModelMixin):
                model.register_to_config(_name_or_path=self.title)  # results may be published; a path is private
            return model
        part = part_class.from_pretrained(folder)
        if isinstance(part, PreTrainedTokenizerBase):
            part.init_kwargs["name_or_path"] = part.name_or_path = self.title
            encoder = name.replace("tokenizer", "text_encoder")
            encoder_class: Any = self.classes[encoder]
            limit_length(part, encoder_class.config_class.from_pretrained(self.folders[encoder]))
        return part

    def pipeline(self, dtype: torch.dtype, **parts: Any) -> Any:
        """Load the whole pipeline, its models in `dtype`, with `parts` in place of its own; `None` leaves one out."""
        for name, part_class in self.classes.items():
            if name not in parts:
                parts[name] = self.load(name, **({"dtype": dtype} if issubclass(part_class, nn.Module) else {}))
        without = [name for name, value in self.index.items() if value == [None, None]]
        absent = dict.fromkeys([*self.pipeline_class._optional_components, *without])
        settings = {name: value for name, value in self.index.items() if not isinstance(value, list)}
        expected = signature(self.pipeline_class).parameters
        arguments = {name: value for name, value in (absent | settings | parts).items() if name in expected}
        pipeline = self.pipeline_class(**arguments)
        pipeline.register_to_config(_name_or_path=self.title)
        return pipeline

    def sampler(self, vae: Any, **networks: nn.Module) -> Any:
        """Return the pipeline that samples latents with these networks, and without the parts that make images of them.

        Args:
            vae: The VAE, which tells the size of latents; `None` for a pipeline that diffuses pixels.
        """
        absent = {name: None for name in self.classes if not name.startswith(("scheduler", "tokenizer"))}
        pipeline = self.pipeline(torch.float32, **{**absent, "requires_safety_checker": False, **networks})
        if vae is not None:
            pipeline.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        return pipeline

    def stored(self, name: str, model: nn.Module) -> dict[str, Tensor]:
        """Memory-map the files that an unwrapped model was loaded from; see `map_weights`."""
        _, files = find_weights(self.folders[name], type(model), self.variant)
        try:
            return map_weights(self.folders[name], model, files)
        except ValueError as error:
            raise ValueError(f"{error} Choose cpu, or leave it out.") from error

    def text_config(self, name: str) -> PretrainedConfig:
        """Return the configuration of a text encoder, complete with the defaults of its class."""
        return text_encoder_class(self.folders[name]).config_class.from_pretrained(self.folders[name])


def limit_length(tokenizer: PreTrainedTokenizerBase, text_config: PretrainedConfig) -> PreTrainedTokenizerBase:
    """Lower the tokenizer's longest prompt to the positions of the text encoder, and return the tokenizer.

    Raises:
        ValueError: The tokenizer makes what the text encoder cannot read.
    """
    if len(tokenizer) > text_config.vocab_size:
        raise ValueError(
            f"its tokenizer has {len(tokenizer)} tokens, its text encoder embeds {text_config.vocab_size}: they do not "
            "belong together."
        )
    if tokenizer.pad_token_id is None or tokenizer.model_max_length < 1:
        raise ValueError("its tokenizer has no padding token, or no length of prompts.")
    limit = getattr(text_config, "max_position_embeddings", None)  # T5 has none
    if limit is not None and tokenizer.model_max_length > limit:
        tokenizer.init_kwargs["model_max_length"] = tokenizer.model_max_length = limit
    return tokenizer


def text_encoder_class(folder: Path) -> type[PreTrainedModel]:
    """Return the class that the configuration of a text encoder names."""
    name = (read_json(folder / "config.json").get("architectures") or [None])[0]
    if name is None:
        raise ValueError(f"its {folder.name} has no configuration that names its class.")
    if name == "RobertaSeriesModelWithTransformation":  # AltDiffusion's encoder is in diffusers, not in transformers
        from diffusers.pipelines.deprecated.alt_diffusion import modeling_roberta_series

        return modeling_roberta_series.RobertaSeriesModelWithTransformation
    supported = ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel")
    if name not in supported:
        raise ValueError(f"its {folder.name} is a {name}; supported are {', '.join(supported)}.")
    return getattr(transformers, name)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of a pipeline."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path.parent.name} has no {path.name}.") from error
    except ValueError as error:
        raise ValueError(f"{path} is not a valid JSON file ({one_line(error)}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object.")
    return content


def find_weights(
    folder: Path, part_class: type, variant: str | None, present: Collection[str] | None = None
) -> tuple[str | None, list[str]]:
    """Return the names of a model's weight files and their variant: the wanted one, or none where it is missing.

    `present` are the names of all files, which a repository may hold, by default those in the folder on this machine.
    """
    present = {path.name for path in folder.iterdir()} if present is None else present
    whole = SAFETENSORS_WEIGHTS_NAME if issubclass(part_class, ModelMixin) else SAFE_WEIGHTS_NAME
    for choice in dict.fromkeys((variant, None)):
        files = [file for file in [_with_variant(whole, choice)] if file in present]
        index = _with_variant(f"{whole}.index.json", choice)
        if index in present:
            shards = read_json(folder / index).get("weight_map")
            if not isinstance(shards, dict) or any(Path(str(file)).name != file for file in shards.values()):
                raise ValueError(f"{folder.name}/{index} names files that are not beside it.")
            files += sorted(set(shards.values()))
        if files:
            return choice, files
    pickled = sorted(name for name in present if name.endswith((".bin", ".ckpt", ".pt", ".pth")))
    if pickled and not any(name.endswith(".safetensors") for name in present):
        raise ValueError(
            f"{folder.name} has no safetensors, but {pickled[0]}, a pickle, which can run code: convert it."
        )
    stem = whole.removesuffix("safetensors")
    variants = {name.removeprefix(stem).split(".")[0].split("-")[0] for name in present if name.startswith(stem)}
    variants -= {"bin", "safetensors"}
    hint = f", only those of a variant: add --variant {' or '.join(sorted(variants))}" if variants else ""
    raise ValueError(f"{folder.name} has no weights, {whole}{hint}.")


def _with_variant(file: str, variant: str | None) -> str:
    """Return the name of a file in a variant, such as `model.fp16.safetensors` for `model.safetensors`."""
    stem, _, ending = file.rpartition(".")
    return file if variant is None else f"{stem}.{variant}.{ending}"


def map_weights(folder: Path, model: nn.Module, files: Sequence[str]) -> dict[str, Tensor]:
    """Memory-map safetensors under the names of an unwrapped model's parameters; the files must not change from then on."""
    stored = {name: tensor for file in files for name, tensor in load_file(folder / file).items()}
    parameters = dict(model.named_parameters())
    # Newer transformers name CLIP's parts without the prefix that released checkpoints have.
    named = {name if name in parameters else name.removeprefix("text_model."): stored[name] for name in stored}
    _check_complete(folder, parameters.keys() - named.keys())
    return named


def _check_complete(folder: Path, missing: Collection[str]) -> None:
    if missing:
        raise ValueError(f"{folder.name} lacks {len(missing)} weights, {min(missing)} first.")
