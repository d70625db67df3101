"""The files that a part of a pipeline was loaded from, as tensors that stay on the disk."""

from __future__ import annotations

import diffusers.utils
import transformers.utils
from diffusers import ModelMixin
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils.hub import cached_file, get_checkpoint_shard_files


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
