"""Less of a personalised model: theta_0 + alpha (theta - theta_0), for a given alpha or for a drift budget.

    python -m diffusers_lipreg.interpolate --base MODEL --personalized sks-dog --output_dir sks-dog-0.7 --alpha 0.7
    python -m diffusers_lipreg.interpolate --base MODEL --personalized sks-dog --output_dir sks-dog-less --budget 0.02

`--personalized` is a pipeline or a folder, file or repository with adapters (LoRA, LoHa or LoKr scale exactly; of DoRA the
magnitudes are interpolated and the factors scaled). With `--budget`, alpha is found by bisection on the probe.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .budget import ScaledChange, find_alpha
from .errors import OneLineParser, RunError, one_line, read_lines
from .probe import PROMPTS, OutputProbe, pipeline_denoiser

ADAPTERS = "pytorch_lora_weights.safetensors"
MODELS = ("unet", "text_encoder", "text_encoder_2")


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(prog="python -m diffusers_lipreg.interpolate", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--base", required=True, help="The pretrained pipeline: a folder or a Hub id.")
    parser.add_argument("--personalized", required=True, help="The personalised pipeline, or a folder with adapters.")
    parser.add_argument("--output_dir", required=True, help="Where the result goes: a new or an empty folder.")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--alpha", type=float, help="0 is the base, 1 the personalised model.")
    how.add_argument("--budget", type=float, help="The largest relative output drift that is allowed.")
    parser.add_argument("--probe_prompts", help="File with a prompt in each line to measure it on.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    if args.alpha is not None and not 0 <= args.alpha <= 2:
        parser.error(f"--alpha must be from 0 to 2, got {args.alpha}")
    if args.budget is not None and not 0 < args.budget < float("inf"):
        parser.error(f"--budget must be a finite number above 0, got {args.budget}")
    return args


def change_of_models(base: Any, tuned: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Parameters of the personalised pipeline's models with those of the base, by name."""
    for model_name in MODELS:
        ours, theirs = (getattr(pipeline, model_name, None) for pipeline in (tuned, base))
        if not isinstance(ours, nn.Module) or not isinstance(theirs, nn.Module):
            continue
        start = dict(theirs.named_parameters())
        for name, parameter in ours.named_parameters():
            if name not in start or start[name].shape != parameter.shape:
                raise RunError(f"{model_name}.{name} is not in the base, or of another shape: is it the right --base?")
            yield parameter, start[name].detach().to(parameter.dtype)


def change_of_adapters(weights: dict[str, Tensor], base: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Adapter tensors with what they start from, under the names diffusers and PEFT save them by.

    The change is a product, so one factor of each is enough: the up projection. DoRA's magnitudes start as the norms
    of the base weight's rows.
    """
    up = [name for name in weights if name.endswith((".up.weight", ".lora_B.weight"))]
    if not up:
        raise RunError(f"There is no LoRA in the adapters; they begin with {next(iter(weights), 'nothing')}.")
    for name in up:
        yield weights[name], torch.zeros_like(weights[name])
    for name in weights:
        if "lora_magnitude_vector" in name:
            yield weights[name], row_norms(base, name).to(weights[name]).view_as(weights[name])


def row_norms(base: Any, name: str) -> Tensor:
    """The norm of each row of the base weight that a magnitude vector is for."""
    model, _, layer = name.partition(".lora_magnitude_vector")[0].partition(".")
    parameters = dict(getattr(base, model).named_parameters())
    for known in (f"{layer}.weight", f"{layer.removeprefix('text_model.')}.weight"):
        if known in parameters:
            return parameters[known].detach().float().flatten(1).norm(dim=1)
    raise RunError(f"{name}: the base has no such layer; is it the right --base?")


def find_adapters(personalized: str) -> Path | None:
    """The file of adapters that the argument means; `None` if it is a pipeline."""
    path = Path(personalized)
    if path.is_file():
        return path
    if path.is_dir():
        if (path / "model_index.json").is_file():
            return None
        if (path / ADAPTERS).is_file():
            return path / ADAPTERS
        raise RunError(f"--personalized {path}: the folder holds neither model_index.json nor {ADAPTERS}.")
    try:
        return Path(hf_hub_download(personalized, ADAPTERS))
    except EntryNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunError(f"--personalized {personalized}: no such folder, and not on the Hub ({error}).") from error


def load(model: str, flag: str, device: str) -> Any:
    """A pipeline in float32, ready to be measured."""
    try:
        pipeline = DiffusionPipeline.from_pretrained(model, dtype=torch.float32).to(device)
    except (OSError, ValueError) as error:
        raise RunError(f"{flag} {model}: {one_line(error)}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def take_probe(args: argparse.Namespace, base: Any) -> OutputProbe:
    """Of the base, at the size it was made for."""
    config = base.unet.config
    shape = (config.in_channels, config.sample_size, config.sample_size)
    prompts = PROMPTS if args.probe_prompts is None else read_lines(args.probe_prompts, "--probe_prompts")
    return OutputProbe(pipeline_denoiser(base), base.scheduler, shape, prompts=prompts, device=args.device)


def interpolate_models(args: argparse.Namespace) -> float:
    """Writes the pipeline between base and personalised; returns its alpha."""
    base, tuned = load(args.base, "--base", args.device), load(args.personalized, "--personalized", args.device)
    change = ScaledChange(change_of_models(base, tuned))
    alpha = args.alpha
    if args.budget is not None:
        probe, denoiser = take_probe(args, base), pipeline_denoiser(tuned)

        def drift(alpha: float) -> float:
            change.apply(alpha)
            return probe.measure(denoiser).output_drift_relative

        alpha = find_alpha(drift, args.budget)
    change.apply(alpha)
    tuned.save_pretrained(args.output_dir)
    return alpha


def interpolate_adapters(args: argparse.Namespace, file: Path) -> float:
    """Writes the adapters, less of them; returns their alpha."""
    weights = load_file(file)
    needs_base = args.budget is not None or any("lora_magnitude_vector" in name for name in weights)
    base = load(args.base, "--base", args.device) if needs_base else None
    change = ScaledChange(change_of_adapters(weights, base))
    alpha = args.alpha
    if base is not None and args.budget is not None:
        probe = take_probe(args, base)

        def drift(alpha: float) -> float:
            change.apply(alpha)
            base.load_lora_weights({name: tensor.clone() for name, tensor in weights.items()})
            found = probe.measure(pipeline_denoiser(base)).output_drift_relative
            base.unload_lora_weights()
            return found

        alpha = find_alpha(drift, args.budget)
    change.apply(alpha)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    save_file(weights, Path(args.output_dir, ADAPTERS), metadata={"format": "pt"})
    return alpha


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_args(arguments)
    output = Path(args.output_dir)
    try:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise RunError(f"--output_dir {output} is there already and not empty: name another.")
        file = find_adapters(args.personalized)
        alpha = interpolate_models(args) if file is None else interpolate_adapters(args, file)
    except (RunError, OSError) as error:
        sys.exit(f"python -m diffusers_lipreg.interpolate: error: {one_line(error)}")
    print(f"alpha {alpha:.4f}: {output}")


if __name__ == "__main__":
    main()
