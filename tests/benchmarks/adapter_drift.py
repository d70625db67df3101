"""Drift of LoRA on the attention of SDXL: from r x r Gram matrices against the materialised m x n product.

    python tests/benchmarks/adapter_drift.py --rank 16 --repeats 5

Times one value with its gradient, added to existing gradients, over all attention projections of the SDXL UNet, in
turn. Needs no weights and no network: the UNet is built from its published config on the meta device, and only its
adapters are real.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from published import conditions, make_unet
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))
from diffusers_lipreg.adapters import AdapterSnapshot

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


def sdxl_with_adapters(rank: int) -> tuple[nn.Module, AdapterSnapshot]:
    """The UNet with LoRA on its attention as it is after some training, with gradients, and its snapshot."""
    unet = make_unet("sdxl").requires_grad_(False)
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(PROJECTIONS)))
    torch.manual_seed(0)
    for layer in adapted(unet):
        for factor, std in ((layer.lora_A["default"], 1 / rank), (layer.lora_B["default"], 0.0)):
            nn.init.normal_(factor.to_empty(device="cpu").weight, std=std)
            factor.weight.grad = torch.zeros_like(factor.weight)
    snapshot = AdapterSnapshot(unet)
    for layer in adapted(unet):
        nn.init.normal_(layer.lora_B["default"].weight, std=1e-3)
    return unet, snapshot


def warm_up() -> tuple[nn.Module, AdapterSnapshot]:
    """One small layer."""
    net = inject_adapter_in_model(LoraConfig(target_modules=["to_q"]), nn.ModuleDict({"to_q": nn.Linear(256, 256)}))
    return net, AdapterSnapshot(net)


def adapted(unet: nn.Module) -> list[nn.Module]:
    return [module for name, module in unet.named_modules() if name.endswith(PROJECTIONS)]


def gram(unet: nn.Module, snapshot: AdapterSnapshot) -> float:
    """What the training scripts do before each step of the optimizer, walk over the module's 6,000 parts included."""
    return snapshot.add_gradient_(unet, "product", weight=1.0).value.item()


def gram_graph(unet: nn.Module, snapshot: AdapterSnapshot) -> float:
    """The same as a loss."""
    drift = snapshot.drift(unet, "product")
    drift.backward()
    return drift.item()


def materialised(unet: nn.Module, _: AdapterSnapshot) -> float:
    """||s B A||^2 from the product, one layer after another: the least memory that this form can do with."""
    total = 0.0
    for layer in adapted(unet):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        drift = (layer.scaling["default"] * (b @ a)).square().sum()
        drift.backward()
        total += drift.item()
    return total


FORMS: dict[str, Callable[[nn.Module, AdapterSnapshot], float]] = {
    "ours, `add_gradient_`": gram,
    "ours, `drift().backward()`": gram_graph,
    "materialised, layer by layer": materialised,
}


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux


def extra_mib(form: str, rank: int) -> float:
    """How much one call adds to the peak memory of a process of its own."""
    command = [sys.executable, __file__, "--rank", str(rank), "--memory-of", form]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-of", choices=FORMS, help=argparse.SUPPRESS)  # for the processes it starts itself
    args = parser.parse_args()
    if args.memory_of:
        unet, snapshot = sdxl_with_adapters(args.rank)
        FORMS[args.memory_of](*warm_up())  # what torch sets up once is not to count
        before = peak_mib()
        FORMS[args.memory_of](unet, snapshot)
        print(peak_mib() - before)
        return

    memory = {form: extra_mib(form, args.rank) for form in FORMS}  # first: a process inherits the peak of its parent
    unet, snapshot = sdxl_with_adapters(args.rank)
    times: dict[str, list[float]] = {form: [] for form in FORMS}
    values = {}
    for _ in range(args.repeats + 1):
        for form, call in FORMS.items():
            start = time.perf_counter()
            values[form] = call(unet, snapshot)
            times[form].append(1000 * (time.perf_counter() - start))
    median = {form: statistics.median(measured[1:]) for form, measured in times.items()}  # the first one warms up

    shapes = Counter(tuple(layer.get_base_layer().weight.shape) for layer in adapted(unet))
    listed = ", ".join(f"{count} of {m} x {n}" for (m, n), count in shapes.most_common())
    products = sum(count * m * n for (m, n), count in shapes.items())
    print(f"SDXL UNet, LoRA of rank {args.rank} on {shapes.total()} attention projections: {listed}.")
    print(f"{conditions()}; {args.repeats} turns.\n")
    print("| form | median ms | of the first | extra memory, MiB | value |")
    print("|---|---|---|---|---|")
    for form, value in values.items():
        ratio = median[form] / median[next(iter(FORMS))]
        print(f"| {form} | {median[form]:.0f} | {ratio:.1f} | {memory[form]:.0f} | {value:.6e} |")
    print(f"\nAs one loss, the materialised form keeps every product for backward: {products * 4 / 2**30:.1f} GiB.")


if __name__ == "__main__":
    main()
