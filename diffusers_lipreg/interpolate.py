"""Interpolate between base and personalized model: theta_0 + alpha (theta - theta_0), by alpha or by a drift budget.

    python -m diffusers_lipreg.interpolate --base MODEL --personalized sks-dog --output_dir sks-dog-0.7 --alpha 0.7
    python -m diffusers_lipreg.interpolate --base MODEL --personalized sks-dog --output_dir sks-dog-less --budget 0.02

`--personalized` is a pipeline, or adapters of any tool. LoRA, LoHa and LoKr scale exactly; of DoRA the magnitudes are
interpolated and the factors scaled. A file of adapters keeps its names and metadata, so that its own tool reads it.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import loading
from .adapter_drift import MAGNITUDE
from .budget import WeightInterpolation, bisect_alpha
from .errors import OneLineParser, RunError, one_line, run_cli

NAME = "python -m diffusers_lipreg.interpolate"


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(prog=NAME, description=(__doc__ or "").split("\n")[0])
    flag = parser.add_argument
    flag("--base", required=True, help="The pretrained pipeline: a folder or a Hub id.")
    flag("--revision", help="Its Git revision on the Hub.")
    flag("--variant", help="Variant of its weight files, for example fp16.")
    flag("--personalized", required=True, help="The personalized pipeline, or adapters for the base.")
    flag("--output_dir", required=True, help="Folder for the result, new or empty.")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--alpha", type=float, help="0 is the base, 1 the personalized model.")
    target.add_argument("--budget", type=float, help="Largest output drift, a fraction: 0.02 is 2 %%.")
    flag("--probe_prompts", help="File with a prompt in each line to measure the output drift on.")
    flag("--device", help="Default: the GPU, if there is one.")
    args = parser.parse_args(arguments)
    parser.check_texts(args)
    if args.alpha is not None and not 0 <= args.alpha <= 2:
        parser.error(f"--alpha must be from 0 to 2, got {args.alpha}")
    if args.budget is not None and not 0 < args.budget < float("inf"):
        parser.error(f"--budget must be a finite number above 0, got {args.budget}")
    if args.budget is None and args.probe_prompts is not None:
        parser.error("--probe_prompts does nothing without --budget")
    return args


@contextmanager
def new_folder(name: str) -> Iterator[Path]:
    """Yield a hidden folder to write into, which becomes `name` at the end of the block. An error or SIGTERM removes it."""
    path = Path(name).resolve()
    in_main_thread = threading.current_thread() is threading.main_thread()  # Python has no handlers in others
    before = signal.signal(signal.SIGTERM, _exit) if in_main_thread else None
    try:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise RunError(f"--output_dir {name} is there already and not empty: name another.")
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".interpolate-", dir=path.parent) as hidden:
            result = Path(hidden, "result")
            result.mkdir()
            yield result
            if path.exists():
                path.rmdir()
            result.rename(path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"--output_dir {name}: it cannot be written ({one_line(error)})") from error
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, before)


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def choose_alpha(args: argparse.Namespace, base: Any, set_alpha: Callable[[float], Any]) -> float:
    """Return `--alpha`, or find the alpha at which the output drift is `--budget` by bisection.

    Args:
        set_alpha: Returns the personalized pipeline with the weights for an alpha.
    """
    if args.budget is None:
        return args.alpha
    recorded = loading.record_outputs(base, loading.read_probe_prompts(args.probe_prompts))

    def drift(alpha: float) -> float:
        return loading.measure_drift(recorded, set_alpha(alpha), args.personalized).output_drift_relative

    return bisect_alpha(drift, args.budget)


def interpolate_pipeline(args: argparse.Namespace, folder: Path) -> float:
    """Write the pipeline between base and personalized into `folder` and return its alpha."""
    base = load_base(args)
    personalized = loading.load_pipeline("--personalized", args.personalized, torch.float32).to(args.device)
    loading.check_same_architecture(base, personalized, args.personalized)
    starts = {part: dict(model.named_parameters()) for part, model in loading.networks(base).items()}
    change = WeightInterpolation(
        (parameter, starts[part][name].detach())
        for part, model in loading.networks(personalized).items()
        for name, parameter in model.named_parameters()
    )

    def set_alpha(alpha: float) -> Any:
        change.set_alpha(alpha)
        return personalized

    alpha = choose_alpha(args, base, set_alpha)
    set_alpha(alpha).save_pretrained(folder)
    return alpha


def interpolate_adapters(args: argparse.Namespace, file: Path, folder: Path) -> float:
    """Write the adapters between none and those of `file` into `folder` and return their alpha."""
    with safe_open(file, "pt") as stored:
        weights, metadata = {name: stored.get_tensor(name) for name in stored.keys()}, stored.metadata()
    for name, tensor in weights.items():
        if not tensor.is_floating_point() or tensor.element_size() < 2:  # scaled, 8 bits would be others or an error
            raise RunError(f"--personalized {file}: {name} is of {tensor.dtype}, of which no part can be taken.")
    needs_base = args.budget is not None or any(MAGNITUDE in name for name in weights)
    base: Any = load_base(args) if needs_base else None
    change = WeightInterpolation(pair_with_starts(weights, base))
    result = folder / file.name

    def write(alpha: float) -> None:
        change.set_alpha(alpha)
        save_file(weights, result, metadata=metadata)

    def set_alpha(alpha: float) -> Any:
        write(alpha)
        base.unload_lora_weights()
        loading.load_adapters(base, result, args.personalized)
        return base

    alpha = choose_alpha(args, base, set_alpha)
    write(alpha)
    return alpha


def load_base(args: argparse.Namespace) -> Any:
    """Load the base in float32 onto `args.device`, without a safety checker."""
    options = {"revision": args.revision, "variant": args.variant, "safety_checker": None}
    return loading.load_pipeline("--base", args.base, torch.float32, **options).to(args.device)


def pair_with_starts(weights: dict[str, Tensor], base: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the tensors of adapters to interpolate, each with its value at alpha 0.

    The change of a layer is a product, so one factor of it is enough. DoRA's magnitudes are the norms of the base
    weight's rows at alpha 0.
    """
    for name, tensor in weights.items():
        if loading.UP.search(name):
            yield tensor, torch.zeros_like(tensor)
        elif MAGNITUDE in name:
            yield tensor, row_norms(base, name, tensor)


def row_norms(base: Any, name: str, magnitudes: Tensor) -> Tensor:
    """Return the norms of the rows of the base weight that the magnitudes `name` belong to, in their shape."""
    part, _, layer = name.partition(f".{MAGNITUDE}")[0].partition(".")
    network = loading.networks(base).get(part)
    parameters = {} if network is None else dict(network.named_parameters())
    for known in (f"{layer}.weight", f"{layer.removeprefix('text_model.')}.weight"):
        if known in parameters and len(parameters[known]) == magnitudes.numel():
            return parameters[known].detach().float().flatten(1).norm(dim=1).to(magnitudes).view_as(magnitudes)
    raise RunError(f"{name}: the base has no such layer; is it the right --base?")


def interpolate(args: argparse.Namespace) -> None:
    """Write the result to `--output_dir` and print its alpha."""
    loading.silence_libraries()
    args.device = loading.find_device(args.device)
    with new_folder(args.output_dir) as folder:
        file = loading.find_adapters(args.personalized)
        alpha = interpolate_pipeline(args, folder) if file is None else interpolate_adapters(args, file, folder)
    print(f"alpha {alpha:.4f}: {args.output_dir}")


def main(arguments: Sequence[str] | None = None) -> None:
    run_cli(interpolate, parse_args(arguments), NAME)


if __name__ == "__main__":
    main()
