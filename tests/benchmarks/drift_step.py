"""The drift step at full size: against a plain copy of the bytes it must move, and against the naive loop.

    python tests/benchmarks/drift_step.py
    python tests/benchmarks/drift_step.py --device cuda
    python tests/benchmarks/drift_step.py --models sd15 --ranks 16 --repeats 1
    python tests/benchmarks/drift_step.py --models sdxl --ranks 0 --dtype bfloat16
    python tests/benchmarks/drift_step.py --models sd15 --against CHECKOUT    # of another commit, in the same process

One Markdown table: the UNets of SD1.5 and SDXL, trained whole, with each place where the teacher may be kept, and by
LoRA on their attention. The step adds the gradient of the penalty to gradients that are there and returns the drift; of
a whole model it reads parameters, teacher and gradients and writes gradients, and two copies of as many numbers move as
many bytes. The naive loop sums over tensors (of adapters: over the products s B A) in Python and differentiates that.

Shapes are those of the published UNets, values are random; no weights and no network are needed. Each row has a process
of its own, for its peak memory, and is left out with a line that says so where memory is short: whole, SD1.5 in float32
takes 10 GiB and SDXL 29 GiB, a third less with the teacher on the disk; the naive loop half as much again.
"""

import argparse
import importlib.util
import inspect
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import peft
import psutil
import torch
from published import PARAMETERS, UNETS, conditions, make_unet
from safetensors.torch import load_file, save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))
import diffusers_lipreg

WEIGHT = 0.1
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
Forms = dict[str, Callable[[], Any]]


class Row(NamedTuple):
    """What is trained (`rank` is 0 for the whole model), and where its teacher is."""

    model: str
    rank: int
    teacher: str


def rows(args: argparse.Namespace) -> Iterator[Row]:
    places = ["beside", "disk"] if args.device == "cpu" else ["beside", "host", "disk"]
    for model in args.models:
        for rank in args.ranks:
            yield from (Row(model, rank, teacher) for teacher in (["none needed"] if rank else places))


def packages(args: argparse.Namespace) -> dict[str, Any]:
    """Return this package and, if asked for, that of another commit, by the name of their step."""
    if args.against is None:
        return {"step": diffusers_lipreg}
    spec = importlib.util.spec_from_file_location("before", args.against / "diffusers_lipreg" / "__init__.py")
    before = sys.modules["before"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(before)
    return {"step": diffusers_lipreg, "before": before}


def whole(row: Row, args: argparse.Namespace) -> Forms:
    """The forms for a UNet a little away from its teacher, with gradients."""
    unet = make_unet(row.model).to(args.dtype).to_empty(device=args.device)
    torch.manual_seed(0)
    for parameter in unet.parameters():
        nn.init.normal_(parameter, std=0.02)
    if row.teacher == "disk":
        with tempfile.TemporaryDirectory() as folder:  # what is mapped stays when the name is gone
            save_file(dict(unet.named_parameters()), Path(folder, "unet.safetensors"))
            teacher = load_file(Path(folder, "unet.safetensors"))
    else:
        teacher = {name: p.detach().clone() for name, p in unet.named_parameters()}
        if row.teacher == "host":
            teacher = {name: tensor.cpu().pin_memory() for name, tensor in teacher.items()}
    snapshots = {
        name: package.TeacherSnapshot(unet, **{option(package): teacher}) for name, package in packages(args).items()
    }
    snapshot = snapshots["step"]
    for parameter in unet.parameters():
        parameter.grad = torch.full_like(parameter, 1e-4)
        parameter.data.add_(parameter.grad)

    @torch.no_grad()
    def copies() -> None:
        for parameter, teacher in snapshot.pairs(unet):
            parameter.grad.copy_(parameter)
            parameter.grad.copy_(teacher)

    def naive() -> None:
        squares = [(p - teacher.to(p.device)).square().sum() for p, teacher in snapshot.pairs(unet)]
        (WEIGHT * torch.stack(squares).sum()).backward()

    return {"copies": copies, **steps(snapshots, unet, "sum"), "naive": naive}


def steps(snapshots: dict[str, Any], unet: nn.Module, reduction: str) -> Forms:
    return {name: partial(snapshot.add_gradient_, unet, reduction, WEIGHT) for name, snapshot in snapshots.items()}


def option(package: Any) -> str:
    """Return how its TeacherSnapshot calls the tensors that it holds in place of copies."""
    return "state_dict" if "state_dict" in inspect.signature(package.TeacherSnapshot).parameters else "stored"


def adapters(row: Row, args: argparse.Namespace) -> Forms:
    """The forms for LoRA as it is after some training; the frozen weights are shapes only."""
    unet = make_unet(row.model).requires_grad_(False)
    unet.add_adapter(peft.LoraConfig(r=row.rank, lora_alpha=row.rank, target_modules=list(ATTENTION)))
    layers = [module for name, module in unet.named_modules() if name.endswith(ATTENTION)]
    torch.manual_seed(0)
    for layer in layers:
        for factor, std in ((layer.lora_A["default"], 1 / row.rank), (layer.lora_B["default"], 0.0)):
            nn.init.normal_(factor.to_empty(device=args.device).weight, std=std)
            factor.weight.grad = torch.zeros_like(factor.weight)
    snapshots = {name: package.AdapterSnapshot(unet) for name, package in packages(args).items()}
    for layer in layers:
        nn.init.normal_(layer.lora_B["default"].weight, std=1e-3)

    def naive() -> None:
        """One layer after another: the least memory that products can do with."""
        for layer in layers:
            product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            (WEIGHT * (layer.scaling["default"] * product).square().sum()).backward()

    return {**steps(snapshots, unet, "product"), "naive": naive}


def seconds(call: Callable[[], Any], device: str) -> float:
    if device == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1000


def memory(field: str) -> float:
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def extra_mib(call: Callable[[], Any], device: str) -> float:
    """How much the call adds to the peak memory."""
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        before = memory("VmRSS")
        call()
        return memory("VmHWM") - before
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure(row: Row, args: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Milliseconds, median of turns, and extra MiB of each form there is memory for."""
    free = psutil.virtual_memory().available if args.device == "cpu" else torch.cuda.mem_get_info()[0]
    size = 0 if row.rank else PARAMETERS[row.model] * args.dtype.itemsize
    needed = size * (3 if row.teacher == "beside" else 2)
    if needed > 0.95 * free:
        sys.exit(f"needs {needed / 2**30:.0f} GiB, {free / 2**30:.0f} are free")
    forms = adapters(row, args) if row.rank else whole(row, args)
    if needed + 1.5 * size > 0.95 * free:
        del forms["naive"]
    small = nn.Linear(4, 4, bias=False, device=args.device, dtype=args.dtype)
    diffusers_lipreg.TeacherSnapshot(small).add_gradient_(
        small, "sum", WEIGHT
    )  # what torch sets up once is not to count
    extra = {form: extra_mib(call, args.device) for form, call in forms.items()}  # and warms up
    turns = [{form: seconds(call, args.device) for form, call in forms.items()} for _ in range(args.repeats)]
    return {form: (1000 * statistics.median(turn[form] for turn in turns), extra[form]) for form in forms}


def cells(found: dict[str, list[float]]) -> str:
    step, extra = found["step"]
    copies, naive = (found.get(form, [float("nan"), float("nan")]) for form in ("copies", "naive"))
    times = f"{step:.0f} | {copies[0]:.0f} | {step / copies[0]:.2f} | {naive[0]:.0f} | {naive[0] / step:.1f}"
    before = found.get("before", [float("nan")])[0]
    return f"{times} | {extra:.0f} | {naive[1]:.0f} | {step / before:.2f}".replace("nan", "-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", choices=UNETS, nargs="*", default=list(UNETS))
    parser.add_argument("--ranks", type=int, nargs="*", default=[0, 4, 16, 64], help="of LoRA; 0: the whole model")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--dtype", type=lambda name: getattr(torch, name), default=torch.float32, help="of whole models"
    )
    parser.add_argument(
        "--against", type=Path, help="a checkout of another commit, whose step is timed beside this one"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--row", type=json.loads, help=argparse.SUPPRESS)  # for the processes it starts itself
    args = parser.parse_args()
    if args.row:
        print(json.dumps(measure(Row(*args.row), args)))
        return
    versions = f"diffusers {diffusers.__version__}, peft {peft.__version__}"
    print(f"{conditions(args.device)}, {versions}; {args.dtype}, "
          f"median of {args.repeats} turns, load of the machine before: {os.getloadavg()[0]:.1f}.\n")  # fmt: skip
    print("| UNet | trained | teacher | step, ms | two copies, ms | of copies | naive, ms | faster than naive | "
          "extra memory, MiB | naive's | of the step of --against |\n" + 11 * "|---" + "|")  # fmt: skip
    for row in rows(args):
        command = [sys.executable, __file__, *sys.argv[1:], "--row", json.dumps(row)]
        done = subprocess.run(command, capture_output=True, text=True)
        trained = f"rank {row.rank}" if row.rank else "whole"
        if done.returncode:
            result = f"left out: {done.stderr.splitlines()[-1]}" + 7 * " | "
        else:
            result = cells(json.loads(done.stdout.splitlines()[-1]))
        print(f"| {row.model} | {trained} | {row.teacher} | {result} |", flush=True)


if __name__ == "__main__":
    main()
