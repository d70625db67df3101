"""Exact drift of adapters: PEFT's own merge in float64, for every kind and from every start; the rest is refused."""

import copy
import gc
import re
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from support.runs import PARITY
from torch import Tensor, nn
from torch.nn.parallel import DataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPTextModel
from transformers.pytorch_utils import Conv1D

import diffusers_lipreg.adapters as adapters_module
from diffusers_lipreg.adapters import AdapterSnapshot

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")

LINEAR = ["to_q", "to_out"]
CONV = ["conv", "one", "line"]


class Net(nn.Module):
    """One of each layer that takes an adapter; none is square, so that no transpose goes unnoticed."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(24, 40)
        self.to_out = nn.Linear(40, 24)
        self.conv = nn.Conv2d(8, 12, 3)
        self.one = nn.Conv2d(12, 8, 1)
        self.line = nn.Conv1d(8, 12, 3)
        self.embed = nn.Embedding(30, 16)
        self.transposed = Conv1D(36, 20)  # GPT-2's: its weight is (in, out)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)


def lora(target_modules: list[str] = LINEAR, r: int = 4, **options) -> LoraConfig:
    return LoraConfig(target_modules=target_modules, r=r, **options)


def loha(target_modules: list[str] = LINEAR, r: int = 4, **options) -> LoHaConfig:
    return LoHaConfig(target_modules=target_modules, r=r, **options)


def lokr(target_modules: list[str] = LINEAR, r: int = 2, **options) -> LoKrConfig:
    return LoKrConfig(target_modules=target_modules, r=r, **options)


def oft(target_modules: list[str] = LINEAR, oft_block_size: int = 8, **options) -> OFTConfig:
    return OFTConfig(target_modules=target_modules, r=0, oft_block_size=oft_block_size, **options)


EVERYWHERE = [*LINEAR, *CONV, "embed"]
AT_ZERO = {
    "lora": lora(lora_alpha=4),
    "alpha": lora(lora_alpha=27),
    "rslora": lora(lora_alpha=8, use_rslora=True),
    "rank_pattern": lora(rank_pattern={"to_q": 7}, alpha_pattern={"to_q": 3}),
    "gaussian": lora(init_lora_weights="gaussian"),
    "conv": lora(CONV, lora_alpha=6),
    "embedding": lora(["embed"], lora_alpha=6),
    "transposed": lora(["transposed"], fan_in_fan_out=True),
    "all_layers": lora(EVERYWHERE, lora_alpha=2),
    "dora": lora(use_dora=True, lora_alpha=8),
    "dora_conv": lora(CONV, use_dora=True, lora_alpha=8),
    "dora_embedding": lora(["embed"], use_dora=True),
    "dora_transposed": lora(["transposed"], use_dora=True, fan_in_fan_out=True),
    "loha": loha(alpha=5),
    "loha_conv": loha(CONV),
    "lokr": lokr(alpha=5),
    "lokr_both": lokr(decompose_both=True, r=1),
    "lokr_whole": lokr(r=30),
    "lokr_factor": lokr(decompose_factor=4),
    "lokr_lycoris": lokr(init_weights="lycoris"),
    "lokr_conv": lokr(CONV),
    "lokr_tucker": lokr(["conv"], use_effective_conv2d=True, r=1),  # on a Conv1d, PEFT's own merge raises
}
AWAY_FROM_ZERO = {
    "pissa": lora(init_lora_weights="pissa", lora_alpha=3),
    "olora": lora(init_lora_weights="olora", lora_alpha=3),
    "lora_random": lora(init_lora_weights=False),
    "loha_random": loha(init_weights=False),
    "lokr_random": lokr(init_weights=False),
}


def tuners(module: nn.Module) -> dict[str, BaseTunerLayer]:
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)}


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def train_(module: nn.Module, size: float = 0.3) -> None:
    """Moves every trained parameter, at random, by about `size` of what it is or could be."""
    for parameter in trained(module).values():
        spread = max(parameter.std().item() if parameter.numel() > 1 else 0.0, 0.1)
        parameter.add_(size * spread * torch.randn_like(parameter))


def adapted(config: peft.PeftConfig, *more: peft.PeftConfig) -> Net:
    """A net with these adapters, named default, 1, 2, ..., all active and trained."""
    net = inject_adapter_in_model(config, Net())
    for i, other in enumerate(more, start=1):
        net = inject_adapter_in_model(other, net, adapter_name=str(i))
    for layer in tuners(net).values():
        layer.set_adapter(["default", *map(str, range(1, len(more) + 1))])
    return net


def continued(config: peft.PeftConfig, *more: peft.PeftConfig) -> Net:
    net = adapted(config, *more)
    train_(net)
    return net


STARTS: dict[str, Callable[[], Net]] = {
    **{name: partial(adapted, config) for name, config in (AT_ZERO | AWAY_FROM_ZERO).items()},
    **{f"{name}_continued": partial(continued, config) for name, config in AT_ZERO.items()},
    "two_loras": partial(adapted, lora(lora_alpha=4), lora(r=2, lora_alpha=7)),
    "two_loras_one_continued": lambda: inject_two(lora(lora_alpha=4), lora(r=2, lora_alpha=7)),
    "two_loras_continued": partial(continued, lora(lora_alpha=4), lora(r=2, lora_alpha=7)),
    "two_lohas": partial(adapted, loha(), loha(r=1)),
    "two_lokrs": partial(adapted, lokr(), lokr(r=1)),
    "two_loras_elsewhere": partial(adapted, lora(["to_q"]), lora(LINEAR, r=2)),
}


def inject_two(first: peft.PeftConfig, second: peft.PeftConfig) -> Net:
    net = continued(first)
    net = inject_adapter_in_model(second, net, adapter_name="1")
    for layer in tuners(net).values():
        layer.set_adapter(["default", "1"])
    return net


def materialized(layer: BaseTunerLayer) -> Tensor:
    """The merged weight, to differentiate; that it is PEFT's own is a test below."""
    weight = layer.get_base_layer().weight
    held = {name for attribute in layer.adapter_layer_names for name in getattr(layer, attribute)}
    names = [name for name in layer.active_adapters if name in held]
    weight = weight + sum(layer.get_delta_weight(name) for name in names)
    for name in getattr(layer, "lora_magnitude_vector", ()):  # DoRA: rows to their magnitudes
        by_columns = layer.lora_magnitude_vector[name].fan_in_fan_out
        rows = weight.T if by_columns else weight.flatten(1)
        rows = layer.lora_magnitude_vector[name].weight.view(-1, 1) * rows / rows.norm(dim=1, keepdim=True)
        weight = rows.T if by_columns else rows.view_as(weight)
    return weight


class Reference:
    """||W - W_0||^2 in float64, from materialized weights; what its module is when it is built is the start."""

    def __init__(self, module: nn.Module) -> None:
        double = copy.deepcopy(module).double()
        self.start = {name: materialized(layer).detach() for name, layer in tuners(double).items()}

    @property
    def squared_norm(self) -> float:
        return sum(weight.square().sum().item() for weight in self.start.values())

    def __call__(self, module: nn.Module) -> tuple[float, dict[str, Tensor]]:
        """The squared distance and its gradient by parameter."""
        module = copy.deepcopy(module).double()
        squares = [(materialized(layer) - self.start[name]).square().sum() for name, layer in tuners(module).items()]
        parameters = trained(module)
        gradients = torch.autograd.grad(torch.stack(squares).sum(), list(parameters.values()))
        return sum(square.item() for square in squares), dict(zip(parameters, gradients, strict=True))


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], rtol: float = 1e-5) -> None:
    """Each tensor to `rtol` of its norm."""
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        error = (tensor.double() - theirs[name].double()).norm().item()
        assert error <= rtol * theirs[name].double().norm().item(), f"{name}: off by {error}"


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in trained(module).items()}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def starts(default: set[str]) -> pytest.MarkDecorator:
    """Parametrize a test by all starts; those that are not in `default` are slow tests."""
    assert default <= STARTS.keys()
    params = [
        pytest.param(build, id=name, marks=[] if name in default else pytest.mark.slow)
        for name, build in STARTS.items()
    ]
    return pytest.mark.parametrize("build", params)


FORMULAS = {"two_loras_one_continued", "dora_continued", "lokr"}
each_formula = starts(FORMULAS)
each_branch = starts(
    FORMULAS
    | {"lora", "all_layers", "pissa", "dora", "dora_conv", "dora_transposed", "loha_random", "lokr_conv", "two_lokrs"}
)


@each_branch
def test_the_reference_is_pefts_merge(build):
    net = build().double()
    train_(net)
    expected = {name: materialized(layer) for name, layer in tuners(net).items()}
    for name, layer in tuners(net).items():
        layer.merge()
        torch.testing.assert_close(layer.get_base_layer().weight, expected[name])


@each_branch
def test_product_and_its_gradient(build):
    check_product(build(), torch.float32, 1e-5)


@each_formula
def test_product_and_its_gradient_in_float64(build):
    check_product(build().double(), torch.float64, 1e-10)


def check_product(net: Net, dtype: torch.dtype, tolerance: float) -> None:
    snapshot, reference = AdapterSnapshot(net), Reference(net)
    train_(net)
    value, expected = reference(net)
    drift = snapshot.drift(net, "product")
    drift.backward()
    assert drift.dtype == dtype and drift.shape == ()
    assert drift.item() == pytest.approx(value, rel=tolerance)
    assert_close(gradients(net), expected, tolerance)


@each_branch
def test_zero_at_the_start_with_zero_gradient(build):
    """Not NaN either, though every LoRA starts where a norm has no derivative."""
    net = build()
    snapshot = AdapterSnapshot(net)
    drift = snapshot.drift(net, "product")
    drift.backward()
    assert drift.item() == 0
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients(net).values())


@each_branch
def test_small_drifts_keep_their_digits(build):
    """To 1e-4, at a millionth of the weights' norm; the factors are the float32 that an optimizer would leave."""
    net = build()
    snapshot, reference, start = AdapterSnapshot(net), Reference(net), copy.deepcopy(net.state_dict())
    directions = {name: torch.randn_like(parameter) for name, parameter in trained(net).items()}

    def go_(step: float) -> float:
        net.load_state_dict(start)
        with torch.no_grad():
            for name, parameter in trained(net).items():
                parameter.add_(directions[name], alpha=step)
        return (reference(net)[0] / reference.squared_norm) ** 0.5

    relative = go_(1e-6 * 1e-3 / go_(1e-3))
    assert 5e-7 < relative < 2e-6
    value, expected = reference(net)
    drift = snapshot.drift(net, "product")
    drift.backward()
    assert drift.item() == pytest.approx(value, rel=1e-4)
    assert_close(gradients(net), expected, 1e-4)


@pytest.mark.parametrize("reduction", AdapterSnapshot.reductions)
@each_formula
def test_the_gradient_in_place_is_that_of_autograd(build, reduction):
    net = build()
    snapshot, reference = AdapterSnapshot(net), Reference(net)
    train_(net)
    names, parameters = zip(*trained(net).items(), strict=True)
    drift = snapshot.drift(net, reduction)
    expected = dict(zip(names, torch.autograd.grad(drift, parameters, allow_unused=True), strict=True))
    had = {name: torch.randn_like(parameter) for name, parameter in trained(net).items()}
    had.pop(names[0])  # one has no gradient yet
    for name, gradient in had.items():
        net.get_parameter(name).grad = gradient.clone()
    met = snapshot.add_gradient_(net, reduction, weight=0.5, scale=64.0)
    for name in names:
        summands = [] if expected[name] is None else [32 * expected[name]]
        summands += [had[name]] if name in had else []
        if summands:
            torch.testing.assert_close(net.get_parameter(name).grad, sum(summands), rtol=1e-5, atol=1e-5)
    assert not (met.value.requires_grad or met.squared_distance.requires_grad)
    assert met.value.item() == pytest.approx(drift.item(), rel=1e-6)
    assert met.squared_distance.item() == pytest.approx(reference(net)[0], rel=1e-5)


@pytest.mark.parametrize("reduction", AdapterSnapshot.reductions)
@each_formula
def test_weight_zero_only_measures(build, reduction):
    net = build()
    snapshot = AdapterSnapshot(net)
    train_(net)
    met = snapshot.add_gradient_(net, reduction, weight=0.0)
    assert met.value.item() == pytest.approx(snapshot.drift(net, reduction).item(), rel=1e-6)
    assert all(gradient is None for gradient in gradients(net).values())


def test_random_states_are_left_alone():
    net = adapted(lora(EVERYWHERE))
    state = torch.get_rng_state()
    snapshot = AdapterSnapshot(net)
    snapshot.drift(net, "product").backward()
    snapshot.add_gradient_(net, "factors", weight=1.0)
    assert torch.equal(torch.get_rng_state(), state)


def by_hand_net() -> tuple[nn.Module, AdapterSnapshot]:
    """s = 6 / 1 = 6, B = (1, 2), A = (3, 4): ||s B A||^2 = 36 * 5 * 25 = 4500, A^2 + B^2 = 5 + 25 = 30."""
    net = inject_adapter_in_model(lora(["0"], r=1, lora_alpha=6), nn.Sequential(nn.Linear(2, 2)))
    snapshot = AdapterSnapshot(net)
    with torch.no_grad():
        net[0].base_layer.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        net[0].lora_A["default"].weight.copy_(torch.tensor([[3.0, 4.0]]))
        net[0].lora_B["default"].weight.copy_(torch.tensor([[1.0], [2.0]]))
    return net, snapshot


def test_product_by_hand():
    """dA = 2 s^2 ||B||^2 A = 360 A and dB = 2 s^2 ||A||^2 B = 1800 B."""
    net, snapshot = by_hand_net()
    assert snapshot.add_gradient_(net, "product", weight=1.0) == (4500, 4500)
    assert net[0].lora_A["default"].weight.grad.tolist() == [[1080, 1440]]
    assert net[0].lora_B["default"].weight.grad.tolist() == [[1800], [3600]]


def test_factors_by_hand():
    """The authors' penalty, with its gradient 2 A and 2 B; the distance it comes with is that of the merged weight."""
    net, snapshot = by_hand_net()
    assert snapshot.add_gradient_(net, "factors", weight=10.0) == (30, 4500)
    assert net[0].lora_A["default"].weight.grad.tolist() == [[60, 80]]
    assert net[0].lora_B["default"].weight.grad.tolist() == [[20], [40]]


def test_the_magnitude_of_dora_is_no_factor():
    net = adapted(lora(use_dora=True))
    snapshot = AdapterSnapshot(net)
    train_(net)
    expected = sum(p.square().sum().item() for n, p in trained(net).items() if "lora_A" in n or "lora_B" in n)
    assert snapshot.add_gradient_(net, "factors", weight=1.0).value.item() == pytest.approx(expected)
    assert net.to_q.lora_magnitude_vector["default"].weight.grad is None


def test_squared_norm_is_that_of_the_base_weights():
    net = Net()
    expected = sum(net.get_submodule(name).weight.square().sum().item() for name in [*LINEAR, *CONV])
    snapshot = AdapterSnapshot(inject_adapter_in_model(lora([*LINEAR, *CONV]), net))
    assert snapshot.squared_norm == pytest.approx(expected)


@pytest.mark.parametrize(("name", "c"), [("all_layers", 1000.0), ("pissa", 3.0)])
def test_only_the_product_of_the_factors_matters(name, c):
    """(c A, B / c) is the same weight as (A, B)."""
    net = STARTS[name]()
    snapshot = AdapterSnapshot(net)
    train_(net)
    before = snapshot.drift(net, "product").item()
    with torch.no_grad():
        for name, parameter in trained(net).items():
            parameter.mul_(c if "_A" in name else 1 / c)
    assert snapshot.drift(net, "product").item() == pytest.approx(before, rel=1e-5)


def test_a_distance_is_never_negative():
    """From PiSSA, (3 A, B / 3) is where it began: two large terms cancel, and rounding decides on the sign."""
    signs = set()
    for seed in range(20):
        torch.manual_seed(seed)
        net = adapted(lora(init_lora_weights="pissa"))
        snapshot = AdapterSnapshot(net)
        with torch.no_grad():
            for name, parameter in trained(net).items():
                parameter.mul_(3.0 if "_A" in name else 1 / 3)
        signs.add(snapshot.drift(net, "product").item() < 0)
        met = snapshot.add_gradient_(net, "product", weight=0.0)
        assert 0 <= met.value.item() < 1e-5 and 0 <= met.squared_distance.item() < 1e-5
    assert signs == {True, False}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_neither_overflows_nor_underflows(dtype):
    """In fp16, A A^T = 2e6 would be infinite, B^T B = 4e-11 zero, and so would A's gradient, before it is weighted."""
    net = adapted(lora(lora_alpha=4))
    snapshot, reference = AdapterSnapshot(net), Reference(net)
    for name, parameter in trained(net).items():
        parameter.data = (torch.randn_like(parameter) * (300.0 if "lora_A" in name else 1e-6)).to(dtype)
    value, expected = reference(net)
    assert snapshot.drift(net, "product").item() == pytest.approx(value, rel=1e-5)
    assert snapshot.add_gradient_(net, "product", weight=1e3, scale=1e3).value.item() == pytest.approx(value, rel=1e-5)
    assert {gradient.dtype for gradient in gradients(net).values()} == {dtype}
    for name, gradient in gradients(net).items():
        if "lora_A" in name:  # that of B is 1e10 times larger, and infinite in fp16 as it would be for any loss
            assert_close({name: gradient}, {name: 1e6 * expected[name]}, 1e-2)


@each_formula
def test_half_precision_and_autocast_cost_no_digits(build):
    """The base weight in bf16, its adapters in bf16 too: the value is that of float64 on the same numbers."""
    net = build().bfloat16()
    snapshot, reference = AdapterSnapshot(net), Reference(net)
    train_(net)
    drift = snapshot.drift(net, "product")
    assert drift.dtype == torch.float32
    assert drift.item() == pytest.approx(reference(net)[0], rel=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(snapshot.drift(net, "product"), drift)
        assert torch.equal(snapshot.add_gradient_(net, "product", 1.0).value, drift)


def test_a_frozen_active_adapter_cancels_out():
    net = continued(lora(), lora(r=2))
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(".1." in name)
    snapshot, reference = AdapterSnapshot(net), Reference(net)
    train_(net)
    value, expected = reference(net)
    assert snapshot.add_gradient_(net, "product", 1.0).value.item() == pytest.approx(value, rel=1e-5)
    assert_close(gradients(net), expected)
    assert net.to_q.lora_A["default"].weight.grad is None


def test_an_inactive_adapter_does_not_count():
    net = continued(lora(), lora(r=2))
    for layer in tuners(net).values():
        layer.set_adapter("1")
    snapshot, reference = AdapterSnapshot(net), Reference(net)
    train_(net)
    assert snapshot.drift(net, "product").item() == pytest.approx(reference(net)[0], rel=1e-5)


def test_a_frozen_factor_gets_no_gradient():
    net = adapted(lora())
    for name, parameter in net.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    snapshot, reference = AdapterSnapshot(net), Reference(net)
    train_(net)
    snapshot.add_gradient_(net, "product", 1.0)
    assert_close(gradients(net), reference(net)[1])
    assert net.to_q.lora_A["default"].weight.grad is None


@pytest.mark.parametrize("name", ["lora", "lora_continued", "dora_continued"])
def test_a_scale_that_changed_is_part_of_the_drift(name):
    net = STARTS[name]()
    snapshot, reference = AdapterSnapshot(net), Reference(net)
    train_(net)
    net.to_q.set_scale("default", 3.0)
    assert snapshot.drift(net, "product").item() == pytest.approx(reference(net)[0], rel=1e-5)


def test_a_scale_that_changed_in_other_kinds_is_an_error():
    net = STARTS["loha"]()
    snapshot = AdapterSnapshot(net)
    net.to_q.set_scale("default", 3.0)
    with pytest.raises(ValueError, match="to_q: the scale of default was 1.25 at the snapshot, is 3.75"):
        snapshot.drift(net, "product")


def test_a_dropout_changes_nothing():
    net = adapted(lora(lora_dropout=0.5)).train()
    snapshot, reference = AdapterSnapshot(net), Reference(net)
    train_(net)
    assert snapshot.drift(net, "product").item() == pytest.approx(reference(net)[0], rel=1e-5)


@pytest.mark.parametrize(  # an adapter here has 8 * 4 + 4 * 12 elements, the last 8 * 4 + 4 * 16
    ("batch_elements", "sizes"), [(1, [1] * 10), (240, [3, 3, 1, 2, 1]), (2**20, [7, 2, 1])]
)
def test_layers_of_a_shape_are_taken_in_batches(monkeypatch, batch_elements, sizes):
    """Seven alike, two that differ in scale, one of another shape: the same sums however they are cut."""
    monkeypatch.setattr(adapters_module, "CPU_BATCH_ELEMENTS", batch_elements)
    net = nn.ModuleList(nn.Linear(8, 12 if i < 9 else 16) for i in range(10))
    net = inject_adapter_in_model(lora([str(i) for i in range(10)], alpha_pattern={"[56]": 3.0}), net)
    snapshot, reference = AdapterSnapshot(net), Reference(net)
    train_(net)
    assert [len(group) for group in snapshot._batches(net)] == sizes
    value, expected = reference(net)
    assert snapshot.add_gradient_(net, "product", 1.0).value.item() == pytest.approx(value, rel=1e-5)
    assert_close(gradients(net), expected)


@pytest.mark.parametrize("start", [True, False], ids=["zero", "random"])
def test_layers_of_a_shape_are_worked_on_together(start):
    """A GPU starts as many kernels for 40 of them as for 4."""

    class Kernels(TorchDispatchMode):
        started = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.started += function is not torch.ops.aten.select.int  # a view
            return function(*args, **(kwargs or {}))

    def kernels(number: int) -> int:
        names = [str(i) for i in range(number)]
        net = inject_adapter_in_model(
            lora(names, init_lora_weights=start), nn.ModuleList(nn.Linear(8, 12) for _ in names)
        )
        snapshot = AdapterSnapshot(net)
        snapshot.add_gradient_(net, "product", 1.0)
        with Kernels() as mode:
            snapshot.add_gradient_(net, "product", 1.0)
        return mode.started

    assert kernels(40) == kernels(4)


def test_layers_of_a_shape_with_different_starts():
    net = inject_adapter_in_model(lora(["0", "1"]), nn.ModuleList(nn.Linear(8, 12) for _ in range(2)))
    nn.init.normal_(net[1].lora_B["default"].weight)
    snapshot, reference = AdapterSnapshot(net), Reference(net)
    train_(net)
    assert snapshot.drift(net, "product").item() == pytest.approx(reference(net)[0], rel=1e-5)


def test_a_linear_layer_beside_an_embedding_of_its_shape():
    net = inject_adapter_in_model(lora(["0", "1"]), nn.ModuleList([nn.Linear(8, 12), nn.Embedding(8, 12)]))
    snapshot, reference = AdapterSnapshot(net), Reference(net)
    train_(net)
    value, expected = reference(net)
    assert snapshot.add_gradient_(net, "product", 1.0).value.item() == pytest.approx(value, rel=1e-5)
    assert_close(gradients(net), expected)


@pytest.mark.parametrize("reduction", ["product", "factors"])
def test_layers_of_a_shape_of_which_one_is_frozen_in_part(reduction):
    net = inject_adapter_in_model(lora(["0", "1"]), nn.ModuleList(nn.Linear(8, 12) for _ in range(2)))
    net[1].lora_A["default"].requires_grad_(False)
    snapshot = AdapterSnapshot(net)
    train_(net)
    (2.0 * snapshot.drift(net, reduction)).backward()
    by_autograd = gradients(net)
    net.zero_grad()
    snapshot.add_gradient_(net, reduction, 2.0)
    assert net[1].lora_A["default"].weight.grad is None
    assert_close(gradients(net), by_autograd)


@pytest.mark.parametrize("with_gradients", [False, True])
def test_layers_that_share_a_factor(with_gradients):
    net = inject_adapter_in_model(lora(["0", "1"]), nn.ModuleList(nn.Linear(8, 12) for _ in range(2)))
    net[1].lora_A["default"].weight = net[0].lora_A["default"].weight
    snapshot = AdapterSnapshot(net)
    train_(net)
    (2.0 * snapshot.drift(net, "product")).backward()
    expected = gradients(net)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter) if with_gradients else None
    snapshot.add_gradient_(net, "product", 2.0)
    assert_close({name: gradients(net)[name] for name in expected}, expected)


@pytest.mark.parametrize("name", ["lora", "lora_continued", "dora", "lokr"])
def test_autocast_to_another_type_than_the_adapters(name):
    net = STARTS[name]().half()
    snapshot = AdapterSnapshot(net)
    train_(net)
    expected = snapshot.add_gradient_(net, "product", 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert snapshot.add_gradient_(net, "product", 1.0) == expected


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("start", [True, False, "pissa"], ids=["zero", "random", "pissa"])
def test_lora_never_builds_the_weight(start):
    net = nn.Sequential(nn.Linear(300, 200))
    net = inject_adapter_in_model(lora(["0"], r=4, init_lora_weights=start), net)
    snapshot = AdapterSnapshot(net)
    with Largest() as largest:
        snapshot.drift(net, "product").backward()
        snapshot.add_gradient_(net, "product", 1.0)
        snapshot.add_gradient_(net, "factors", 1.0)
    assert largest.elements <= 2 * 4 * (300 + 200)  # of 60,000


def test_what_starts_at_zero_is_not_stored():
    for name in ("all_layers", "dora"):
        starts = AdapterSnapshot(adapted(AT_ZERO[name]))._starts
        kept = {key for start in starts.values() for key in start.tensors}
        assert kept == ({"lora_magnitude_vector.default.weight"} if name == "dora" else set())


def test_the_snapshot_does_not_depend_on_its_module():
    """It copies, and keeps no layer alive: a twin of the module has the same drift when the module is gone."""
    net = adapted(AWAY_FROM_ZERO["pissa"])
    snapshot, twin, alive = AdapterSnapshot(net), copy.deepcopy(net), weakref.ref(net.to_q)
    train_(twin)
    expected = snapshot.drift(twin, "product").item()
    train_(net)
    assert snapshot.drift(twin, "product").item() == expected
    del net
    gc.collect()
    assert alive() is None


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


def compile_layer(module: nn.Module) -> nn.Module:
    module.to_q = compiled(module.to_q)
    return module


WRAPPERS = {"DataParallel": DataParallel, "compile": compiled, "compile of a layer": compile_layer}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("name", ["pissa", "dora", "lokr"])
def test_wrappers_change_no_names(wrap, name):
    net = STARTS[name]()
    snapshot = AdapterSnapshot(net)
    train_(net)
    expected = snapshot.drift(net, "product")
    wrapped = wrap(net)
    assert torch.equal(snapshot.drift(wrapped, "product"), expected)
    assert torch.equal(snapshot.add_gradient_(wrapped, "product", 1.0).value, expected)
    assert AdapterSnapshot(wrapped)._shapes == snapshot._shapes


def test_names_are_those_of_the_layers():
    assert {layer for layer, _ in AdapterSnapshot(adapted(lora(EVERYWHERE)))._starts} == set(EVERYWHERE)
    inside = inject_adapter_in_model(lora(["0"]), nn.Sequential(nn.Linear(2, 3)))[0]
    assert {layer for layer, _ in AdapterSnapshot(inside)._starts} == {""}  # the module is the layer itself


# Refusals


def with_attention() -> nn.Module:
    net = nn.Module()
    net.attention = nn.MultiheadAttention(8, 2)
    return inject_adapter_in_model(lora(["attention"]), net)


def merged() -> Net:
    net = adapted(lora())
    net.to_q.merge()
    return net


def unfrozen() -> Net:
    net = adapted(lora())
    net.embed.requires_grad_(True)
    return net


def trained_but_inactive() -> Net:
    net = continued(lora(), lora(r=2))
    for layer in tuners(net).values():
        layer.set_adapter("1")
    net.to_q.lora_A["default"].requires_grad_(True)
    return net


def unreadable() -> Net:
    """As with GPTQ, whose layers have no weight."""
    net = adapted(lora())
    base = nn.Identity()
    base.qweight = torch.zeros(3, dtype=torch.int32)
    net.to_q.base_layer = base
    return net


def nested() -> nn.Module:
    model = peft.PeftMixedModel(Net(), lora(["to_q"]))
    model.add_adapter("1", loha(["to_q"]))
    model.set_adapter(["default", "1"])
    return model


LORA = r"peft\.tuners\.lora\.layer\."
UNKNOWN = "no exact drift is known for this"
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "nothing": (lambda: Net().requires_grad_(False), "nothing to measure: the module trains no adapter"),
    "no adapter": (
        Net,
        r"^to_q\.weight is trained, but .*no active adapter\..* Without adapters, use TeacherSnapshot\.$",
    ),
    "another parameter": (unfrozen, r"^embed\.weight is trained, but .*no active adapter"),
    "modules_to_save": (
        lambda: get_peft_model(Net(), lora(modules_to_save=["embed"])),
        r"embed\.modules_to_save\.default\.weight is trained, but .*no active adapter",
    ),
    "inactive": (
        trained_but_inactive,
        r"^to_q\.lora_A\.default\.weight is trained, but .*no active adapter",
    ),
    "lora_bias": (
        lambda: adapted(lora(lora_bias=True)),
        r"^to_q\.lora_B\.default\.bias is trained, but .*no active adapter",
    ),
    "ia3": (
        lambda: adapted(peft.IA3Config(target_modules=["to_q"], feedforward_modules=[])),
        rf"^to_q: {UNKNOWN} peft\.tuners\.ia3\.layer\.Linear: .*no attribute 'get_delta_weight'",
    ),
    "boft": (lambda: adapted(peft.BOFTConfig(target_modules=["to_q"], boft_block_size=4)), r"^to_q: .*tuners\.boft\."),
    "oft": (lambda: adapted(oft()), rf"^to_q: {UNKNOWN} peft\.tuners\.oft\.layer\.Linear: PEFT merges something else"),
    "oft on a convolution": (
        lambda: adapted(oft(["conv"])),
        "^conv: .*PEFT merges something else than its get_delta_weight",
    ),
    "loha with PEFT's wrong gradient": (
        lambda: adapted(loha(["conv"], use_effective_conv2d=True)),
        r"^conv: .*loha\.layer\.Conv2d: PEFT differentiates its get_delta_weight wrongly",
    ),
    "c3a": (
        lambda: adapted(peft.C3AConfig(target_modules=["to_q"], block_size=8)),
        r"^to_q: .*c3a\.layer\.C3ALinear: PEFT rounds its get_delta_weight to torch\.float32",
    ),
    "attention": (with_attention, rf"^attention: {UNKNOWN} {LORA}MultiheadAttention"),
    "alora": (
        lambda: adapted(lora(alora_invocation_tokens=[1])),
        rf"^to_q: {UNKNOWN} {LORA}Linear: aLoRA does not support",
    ),
    "grouped": (lambda: adapted(lora(["grouped"])), rf"^grouped: {UNKNOWN} {LORA}Conv2d"),
    "merged": (merged, "^to_q has merged default into its base weight"),
    "nested": (nested, "to_q: .*it adapts another adapter"),
    "dora twice": (lambda: adapted(lora(use_dora=True), lora()), rf"^to_q: {UNKNOWN} .*PEFT merges something else"),
    "unreadable weight": (unreadable, f"^to_q: {UNKNOWN} .*'Identity' object has no attribute 'weight'"),
}


@pytest.mark.filterwarnings("ignore")  # PEFT warns of some of these
@pytest.mark.parametrize(("build", "message"), REFUSED.values(), ids=REFUSED)
def test_what_has_no_exact_formula_is_refused_by_name(build, message):
    try:
        net = build()
    except AttributeError as error:
        if "float8_e8m0fnu" in str(error) and not hasattr(torch, "float8_e8m0fnu"):
            pytest.skip("PEFT 0.19 cannot build this with torch 2.6, which lacks a dtype that PEFT asks for.")
        raise
    with pytest.raises(ValueError, match=message):
        AdapterSnapshot(net)


def test_what_appears_later_is_refused_too():
    net = adapted(lora())
    snapshot = AdapterSnapshot(net)
    net.embed.requires_grad_(True)
    for call in (partial(snapshot.drift, net, "product"), partial(snapshot.add_gradient_, net, "factors", 1.0)):
        with pytest.raises(ValueError, match=r"^embed\.weight is trained"):
            call()


CHANGES: dict[str, Callable[[Net], Any]] = {
    "merged": lambda net: net.to_q.merge(),
    "frozen": lambda net: net.to_q.requires_grad_(False),
    "another adapter": lambda net: net.to_q.set_adapter("1"),
    "another parameter": lambda net: net.register_parameter("own", nn.Parameter(torch.ones(1))),
    "base weight": lambda net: net.to_q.base_layer.requires_grad_(True),
    "layer removed": lambda net: setattr(net, "to_q", net.to_q.get_base_layer()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_after_the_snapshot_is_refused(change):
    net = adapted(lora(), lora(r=2))
    snapshot = AdapterSnapshot(net)
    change(net)
    with pytest.raises(ValueError, match="to_q|own"):
        snapshot.add_gradient_(net, "product", 1.0)


def test_what_is_trained_is_what_the_names_say():
    """Scripts switch gradients on for embeddings that no optimizer has, so that checkpointing works."""
    net = adapted(lora())
    names = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    snapshot, reference = AdapterSnapshot(net, names), Reference(net)
    train_(net)
    value, expected = reference(net)
    net.embed.requires_grad_(True)
    assert AdapterSnapshot(net, names).squared_norm == snapshot.squared_norm
    assert snapshot.add_gradient_(net, "product", 1.0).value.item() == pytest.approx(value, rel=1e-5)
    assert_close({name: net.get_parameter(name).grad for name in names}, expected)
    assert net.embed.weight.grad is None


def test_names_that_are_not_all_of_an_adapter_get_all_the_gradient():
    """Of a layer whose A alone is in the optimizer, the drift is that of the layer."""
    net = adapted(lora(["to_q"], init_lora_weights=False))
    snapshot, reference = AdapterSnapshot(net, ["to_q.lora_A.default.weight"]), Reference(net)
    train_(net)
    value, expected = reference(net)
    assert snapshot.add_gradient_(net, "product", 1.0).value.item() == pytest.approx(value, rel=1e-5)
    assert_close(
        {"to_q.lora_A.default.weight": net.to_q.lora_A["default"].weight.grad},
        {"to_q.lora_A.default.weight": expected["to_q.lora_A.default.weight"]},
    )
    assert net.to_q.lora_B["default"].weight.grad is None


def test_names_have_to_be_of_adapters():
    net = adapted(lora())
    with pytest.raises(ValueError, match=r"no parameter named to_q\.lora_C"):
        AdapterSnapshot(net, ["to_q.lora_C"])
    with pytest.raises(ValueError, match=r"^embed\.weight is trained, but .*no active adapter"):
        AdapterSnapshot(net, ["embed.weight", "to_q.lora_A.default.weight"])


def test_repr_counts_tensors():
    assert repr(AdapterSnapshot(adapted(lora()))) == "AdapterSnapshot(4 tensors)"


MISMATCHES = {
    "rank": (lora(r=4), lora(r=8), r"^to_out\.lora_A\.default\.weight: expected shape \(4, 40\), got \(8, 40\)"),
    "missing layer": (lora(), lora(["to_q"]), r"^to_out\.lora_A\.default\.weight: expected .*got None \(None: no tr"),
    "further layer": (lora(["to_q"]), lora(), r"^to_out\.lora_A\.default\.weight: expected shape None, got \(4, 40\)"),
    "kind": (
        lora(["to_q"]),
        lora(["to_q"], use_dora=True),
        r"^to_q\.lora_magnitude_vector\.default\.weight: .* None, got",
    ),
    "other kind": (loha(["to_q"]), lora(["to_q"]), r"^to_q\.hada_w1_a\.default: expected shape \(40, 4\), got None"),
}


@pytest.mark.parametrize(("first", "second", "message"), MISMATCHES.values(), ids=MISMATCHES)
def test_another_module_than_that_of_the_snapshot(first, second, message):
    snapshot, other = AdapterSnapshot(adapted(first)), adapted(second)
    for call in (partial(snapshot.drift, other, "product"), partial(snapshot.add_gradient_, other, "product", 1.0)):
        with pytest.raises(ValueError, match=message):
            call()
    assert all(gradient is None for gradient in gradients(other).values())


def test_a_missing_adapter_is_named():
    both = adapted(lora(), lora(r=2))
    snapshot = AdapterSnapshot(both)
    for layer in tuners(both).values():
        layer.set_adapter("default")
    with pytest.raises(ValueError, match=r"^to_out\.lora_A\.1\.weight: expected shape \(2, 40\), got None"):
        snapshot.drift(both, "product")


def test_an_unknown_reduction_is_an_error():
    net = adapted(lora())
    with pytest.raises(ValueError, match="one of product, factors, got 'sum'"):
        AdapterSnapshot(net).drift(net, "sum")


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="only Linux counts it")
def test_a_snapshot_keeps_no_memory_of_the_base_weights():
    def anonymous_memory() -> float:
        return int(re.search(r"Anonymous:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text())[1]) / 1e3

    layers = [str(number) for number in range(40)]
    net = nn.Sequential(*(nn.Linear(1280, 1280) for _ in layers)).requires_grad_(False)  # 262 MB
    net = inject_adapter_in_model(LoraConfig(r=4, target_modules=layers), net)
    before = anonymous_memory()
    assert AdapterSnapshot(net).squared_norm > 0
    assert anonymous_memory() - before < 60


# As diffusers and PEFT put them on


def parity_model(kind: str) -> nn.Module:
    if kind == "unet":
        return UNet2DConditionModel.from_pretrained(PARITY / "pipeline" / "unet").requires_grad_(False)
    return CLIPTextModel.from_pretrained(PARITY / "pipeline" / "text_encoder").requires_grad_(False)


MODELS = {
    "unet": ("unet", lora(["to_k", "to_q", "to_v", "to_out.0"], init_lora_weights="gaussian")),
    "unet_dora": ("unet", lora(["to_k", "to_q", "to_v", "to_out.0", "conv1"], use_dora=True)),
    "text_encoder": ("text_encoder", lora(["q_proj", "k_proj", "v_proj", "out_proj"], lora_alpha=8)),
}


@pytest.mark.parametrize(("kind", "config"), MODELS.values(), ids=MODELS)
def test_add_adapter(kind, config):
    model = parity_model(kind)
    if kind.startswith("unet"):
        model.add_adapter(config)
    else:  # as this package's scripts do, for transformers' own asks for a PEFT that may not be out yet
        inject_adapter_in_model(config, model)
    snapshot, reference = AdapterSnapshot(model), Reference(model)
    train_(model)
    value, expected = reference(model)
    assert snapshot.add_gradient_(model, "product", 1.0).value.item() == pytest.approx(value, rel=1e-5)
    assert_close(gradients(model), expected)
    assert snapshot.squared_norm == pytest.approx(reference.squared_norm, rel=1e-5)  # the adapters start at zero
