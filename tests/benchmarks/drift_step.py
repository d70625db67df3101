"""The drift step of a full fine-tune against its limits: a plain copy of the bytes it must move, and the naive loop.

    python tests/benchmarks/drift_step.py --model sd15 --repeats 5
    python tests/benchmarks/drift_step.py --model sdxl --device cuda --dtype bfloat16

The step adds the gradient of the penalty to gradients that are there and returns the drift: it reads parameters, teacher
and gradients, and writes gradients. Two copies of as many numbers read and write the same bytes. Parameters have the
exact shapes of the published UNets and random values; no weights and no network are needed. SD1.5 in float32 takes 14
GiB with the naive loop, which keeps every difference for backward.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from published import UNETS, conditions, make_unet
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))
from diffusers_lipreg.snapshot import TeacherSnapshot

WEIGHT = 0.1


def trained(model: str, device: str, dtype: torch.dtype) -> tuple[nn.Module, TeacherSnapshot]:
    """The UNet a little away from its teacher, with gradients."""
    unet = make_unet(model).to(dtype).to_empty(device=device)
    torch.manual_seed(0)
    for parameter in unet.parameters():
        nn.init.normal_(parameter, std=0.02)
    snapshot = TeacherSnapshot(unet)
    for parameter in unet.parameters():
        parameter.grad = torch.full_like(parameter, 1e-4)
        parameter.data.add_(parameter.grad)
    return unet, snapshot


def ours(unet: nn.Module, snapshot: TeacherSnapshot) -> float:
    """What the training script does before each step of the optimizer."""
    return snapshot.add_gradient_(unet, "sum", WEIGHT).value.item()


def naive(unet: nn.Module, snapshot: TeacherSnapshot) -> float:
    """A loss that is summed over tensors in Python, and differentiated."""
    loss = torch.zeros((), device=next(unet.parameters()).device)
    for parameter, teacher in snapshot.pairs(unet):
        loss = loss + (parameter - teacher).square().sum()
    (WEIGHT * loss).backward()
    return loss.item()


@torch.no_grad()
def copy(unet: nn.Module, snapshot: TeacherSnapshot) -> float:
    """As many bytes read and written, and no arithmetic."""
    for parameter, teacher in snapshot.pairs(unet):
        parameter.grad.copy_(parameter)
        parameter.grad.copy_(teacher)
    return float("nan")


FORMS: dict[str, Callable[[nn.Module, TeacherSnapshot], float]] = {"copy": copy, "ours": ours, "naive": naive}


def extra_mib(form: str, args: argparse.Namespace) -> float:
    """How much one call adds to the peak memory, beyond parameters, gradients and teacher."""
    if args.device == "cuda":
        unet, snapshot = trained(args.model, args.device, args.dtype)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.max_memory_allocated()
        FORMS[form](unet, snapshot)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    command = [sys.executable, __file__, "--model", args.model, "--dtype", str(args.dtype).split(".")[1]]
    done = subprocess.run([*command, "--memory-of", form], stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.split()[-1])


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux


def seconds(form: str, unet: nn.Module, snapshot: TeacherSnapshot, device: str) -> float:
    start = time.perf_counter()
    FORMS[form](unet, snapshot)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=UNETS, default="sd15")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.float32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-of", choices=FORMS, help=argparse.SUPPRESS)  # for the processes it starts itself
    args = parser.parse_args()
    if args.memory_of:
        unet, snapshot = trained(args.model, args.device, args.dtype)
        small = nn.Linear(4, 4)
        FORMS[args.memory_of](small, TeacherSnapshot(small)) if args.memory_of != "copy" else None  # torch's set-up
        before = peak_mib()
        FORMS[args.memory_of](unet, snapshot)
        print(peak_mib() - before)
        return

    memory = {form: extra_mib(form, args) for form in FORMS}  # first: a process inherits the peak of its parent
    unet, snapshot = trained(args.model, args.device, args.dtype)
    times: dict[str, list[float]] = {form: [] for form in FORMS}
    for _ in range(args.repeats + 1):
        for form in FORMS:
            times[form].append(seconds(form, unet, snapshot, args.device))
    median = {form: statistics.median(measured[1:]) for form, measured in times.items()}  # the first one warms up

    count = sum(parameter.numel() for parameter in unet.parameters())
    print(f"UNet of {args.model}: {count / 1e6:.1f} M parameters in {len(list(unet.parameters()))} tensors, {args.dtype}.")
    print(f"{conditions(args.device)}; median of {args.repeats} turns.\n")
    print("| drift step | ms | of the copy | faster than naive | extra memory, MiB |")
    print("|---|---|---|---|---|")
    for form in FORMS:
        ratios = f"{median[form] / median['copy']:.2f} | {median['naive'] / median[form]:.1f}"
        print(f"| {form} | {1000 * median[form]:.0f} | {ratios} | {memory[form]:.0f} |")


if __name__ == "__main__":
    main()
