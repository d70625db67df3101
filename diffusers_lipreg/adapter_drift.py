"""Squared drift of layers with PEFT adapters. Pure functions, which autograd differentiates.

With W the merged weight of a layer and W_0 its value at the snapshot, each kind of adapter has one formula for
||W - W_0||^2:

    LoRA    the change is a product P Q of thin matrices, whose r x r Gram matrices are enough
    DoRA    row by row, from the same P and Q and one product of the base weight with Q
    others  from PEFT's `get_delta_weight`, one layer at a time, if that is what PEFT merges and its gradient is right

Sums are taken in float32 or wider. Differences of products are taken in float64, because float32 loses small changes; MPS
has no float64 and keeps float32. PEFT's `merge` defines what an adapter does to its weight.
"""

import copy
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.func import functional_call

from .drift import total, upcast

MAGNITUDE = "lora_magnitude_vector"


class Adapter(NamedTuple):
    """One adapter of one layer."""

    layer: str
    name: str
    tuner: Any  # PEFT's layer
    scale: float
    tensors: dict[str, Tensor]  # by their names in PEFT's layer, such as lora_A.default.weight
    trained: list[Tensor]

    @property
    def factors(self) -> list[Tensor]:
        """Return all tensors but DoRA's magnitude, which scales the whole weight."""
        return [tensor for name, tensor in self.tensors.items() if not name.startswith(MAGNITUDE)]


class Change(NamedTuple):
    """An adapter now and at the snapshot, which keeps only the tensors that its formula needs."""

    now: Adapter
    start: Adapter


Layers = Sequence[Sequence[Change]]  # the active adapters of each layer, in one order
Formula = Callable[[Layers], Tensor]  # the squared drift of layers


def base_matrix(adapter: Adapter) -> Tensor:
    """Return the base weight, dequantized, as a matrix: the dimensions of a kernel join the inputs."""
    from peft.utils.integrations import dequantize_module_weight

    return upcast(dequantize_module_weight(adapter.tuner.get_base_layer()).detach()).flatten(1)


def _widen(tensor: Tensor, like: Tensor) -> Tensor:
    """Return the tensor on the device of `like`, in the dtype in which a difference of products is taken."""
    return tensor.to(like.device, torch.float32 if like.device.type == "mps" else torch.float64)


def _stack(adapters: Sequence[Adapter]) -> list[Tensor]:
    """Return the factors A (layers, r, in) and B (layers, out, r) of layers of equal shape."""
    same_place = zip(*(adapter.factors for adapter in adapters), strict=True)
    return [upcast(torch.stack([factor.flatten(1) for factor in factors])) for factors in same_place]


def _product(layers: Layers) -> tuple[Tensor, Tensor]:
    """Return P (layers, out, r) and Q (layers, r, in), with P Q the sum over LoRA adapters of s B A - s_0 B_0 A_0."""
    ps, qs = [], []
    for changes in zip(*layers, strict=True):
        adapters, starts = zip(*changes, strict=True)
        (q, p), scale = _stack(adapters), adapters[0].scale
        if not starts[0].factors:
            ps.append(p if scale == 1 else scale * p)
            qs.append(q)
            continue
        q_0, p_0 = (_widen(factors, p) for factors in _stack(starts))
        p_0 = starts[0].scale * p_0
        # (P - P_0) Q + P_0 (Q - Q_0); the shorter [P, -P_0] [Q; Q_0] cancels the digits that carry a small change.
        ps += [(scale * _widen(p, p) - p_0).to(p), p_0.to(p)]
        qs += [q, (_widen(q, q) - q_0).to(q)]
    return (ps[0], qs[0]) if len(ps) == 1 else (torch.cat(ps, dim=-1), torch.cat(qs, dim=-2))


def lora_drift(layers: Layers) -> Tensor:
    """Compute ||P Q||^2 = sum((P^T P) o (Q Q^T))."""
    p, q = _product(layers)
    return ((p.mT @ p) * (q @ q.mT)).sum()


def dora_drift(layers: Layers) -> Tensor:
    """Sum over output rows of ||m b / v - m0 b0 / v0||^2, b = w0 + s (B A)_row, v = ||b|| (DoRA, ICML 2024, eq. 5).

    With d = b - b0 that is (m - m0)^2 + m m0 (||d||^2 - (v - v0)^2) / (v v0); v - v0 = (v^2 - v0^2) / (v + v0) and
    v^2 - v0^2 = 2 <b0, d> + ||d||^2, so that no two nearly equal numbers are subtracted.
    """
    adapter, start = layers[0][0]
    p, q = (matrices[0] for matrices in _product(layers))
    base = base_matrix(adapter).to(q)
    if adapter.tuner.lora_magnitude_vector[adapter.name].fan_in_fan_out:
        base = base.T  # to have a row for each magnitude

    def inner(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """Compute <w0, (P Q)_row> and ||(P Q)_row||^2 for each row."""
        return (p * (base @ q.T)).sum(dim=1), (p @ (q @ q.T) * p).sum(dim=1)

    v0_squared = base.square().sum(dim=1)
    cross, d_squared = inner(p, q)
    if start.factors:
        q0, p0 = (factors[0].to(q) for factors in _stack([start]))
        p0 = start.scale * p0
        cross_0, squared_0 = inner(p0, q0)
        v0_squared = v0_squared + 2 * cross_0 + squared_0
        cross = cross + (p0 @ (q0 @ q.T) * p).sum(dim=1)
    growth = 2 * cross + d_squared
    v, v0 = (v0_squared + growth).sqrt(), v0_squared.sqrt()
    m, m0 = (each.tensors[f"{MAGNITUDE}.{each.name}.weight"].flatten().to(q) for each in (adapter, start))
    return ((m - m0).square() + m * m0 * (d_squared - (growth / (v + v0)).square()) / (v * v0)).sum()


def delta_drift(layers: Layers) -> Tensor:
    """Compute ||sum over adapters of delta - delta_0||^2 from the full weights of one layer."""
    (changes,) = layers
    deltas = []
    for now, start in changes:
        if now.scale != start.scale:
            raise ValueError(
                f"{now.layer}: the scale of {now.name} was {start.scale} at the snapshot, is {now.scale}."
            )
        like = now.factors[0]
        wide, wide_0 = ({name: _widen(t, like) for name, t in adapter.tensors.items()} for adapter in (now, start))
        deltas.append(delta_weight(now, wide) - delta_weight(now, wide_0))
        if deltas[-1].dtype != _widen(like, like).dtype:
            raise ValueError(f"PEFT rounds its get_delta_weight to {deltas[-1].dtype}")
    return torch.stack(deltas).sum(dim=0).square().sum().to(upcast(like).dtype)


def delta_weight(adapter: Adapter, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return what PEFT's layer would add to its base weight with these tensors in place of its own."""
    function = nn.Module()
    function.tuner, function.forward = adapter.tuner, lambda: adapter.tuner.get_delta_weight(adapter.name)
    return functional_call(function, {f"tuner.{name}": tensor for name, tensor in tensors.items()}, ())


def factors_drift(layers: Layers) -> Tensor:
    """Compute the sum of squares of all factors, whatever they were at the snapshot."""
    stacks = [_stack([now for now, _ in changes]) for changes in zip(*layers, strict=True)]
    return total([factors.square().sum() for stack in stacks for factors in stack])


def choose_formula(adapters: Sequence[Adapter], weight: Tensor, checked: set[Hashable]) -> Formula:
    """Return the formula for a layer with these active adapters. `checked` collects the kinds that `delta_drift` fits."""
    from peft.tuners.lora import LoraLayer

    tuner = adapters[0].tuner
    if type(tuner.base_layer) is not type(tuner.get_base_layer()):
        raise ValueError("it adapts another adapter")
    pairs = [adapter.factors for adapter in adapters if len(adapter.factors) == 2]
    thin = [b.shape[0] * a[0].numel() == weight.numel() for a, b in pairs]  # false of grouped convolutions
    if isinstance(tuner, LoraLayer) and len(thin) == len(adapters) and all(thin):
        variants = [tuner.lora_variant.get(adapter.name) for adapter in adapters]
        if not any(variants):
            return lora_drift
        if len(adapters) == 1 and type(variants[0]).__name__.startswith("Dora"):
            return dora_drift
    for adapter in adapters:
        kind = (type(tuner), weight.shape, *((name, tensor.shape) for name, tensor in adapter.tensors.items()))
        if kind not in checked:
            _check_delta_weight(adapter)
            checked.add(kind)
    return delta_drift


def _check_delta_weight(adapter: Adapter) -> None:
    """Raise unless `get_delta_weight` is what PEFT merges and its gradient is right, at random values in a copy of the layer."""
    tuner = copy.deepcopy(adapter.tuner).to("cpu", torch.float64)
    adapter, tensors = adapter._replace(tuner=tuner), [tuner.get_parameter(name) for name in adapter.tensors]
    before = tuner.get_base_layer().weight.detach().clone()

    def delta(*values: Tensor) -> Tensor:
        return delta_weight(adapter, dict(zip(adapter.tensors, values, strict=True)))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for tensor in tensors:
            nn.init.normal_(tensor.requires_grad_())
        expected = delta(*tensors)
        if not gradcheck(delta, tensors, fast_mode=True, raise_exception=False):
            raise ValueError("PEFT differentiates its get_delta_weight wrongly")
    tuner.merge(adapter_names=[adapter.name])
    change = tuner.get_base_layer().weight - before
    if change.shape != expected.shape or not torch.allclose(change, expected):
        raise ValueError("PEFT merges something else than its get_delta_weight")


def take_start(adapter: Adapter, formula: Formula) -> Adapter:
    """Copy what a formula needs of an adapter: no factors of LoRA and DoRA if one of them is zero, and so the change."""
    changed = formula is delta_drift or all(factor.any() for factor in adapter.factors)
    kept = {name: t.detach().clone() for name, t in adapter.tensors.items() if changed or name.startswith(MAGNITUDE)}
    return adapter._replace(tuner=None, tensors=kept, trained=[])
