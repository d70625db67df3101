"""Squared drift of the weights that PEFT adapters change, with its exact gradient.

With W the merged weight of an adapted layer and W_0 its value at the snapshot, two reductions have a name:

    product  sum over layers of ||W - W_0||^2    the paper's penalty (Algorithm 1, line 9), on the merged weights
    factors  sum over factors of ||factor||^2    what the authors' released code computes for LoRA: A^2 + B^2

Each kind of adapter has one differentiable formula for ||W - W_0||^2, and autograd gives its gradient:

    LoRA    the change is a product P Q of thin matrices, whose r x r Gram matrices are enough
    DoRA    row by row, from the same P and Q and one product of the base weight with Q
    others  from PEFT's `get_delta_weight`, one layer at a time, if that is what PEFT merges and its gradient is right

Sums are taken in float32 or wider, outside autocast. Differences of products are taken in float64, because float32 loses
small changes; MPS has no float64 and keeps float32. Source: Kim, Park, Kim, "Preserve and Personalize", ICLR 2026, arXiv
2505.19519. PEFT's `merge` defines what an adapter does to its weight.
"""

import copy
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.func import functional_call

from .drift import Drift, total, upcast
from .errors import one_line
from .snapshot import is_adapter_layer, trained_parameters, unwrap

MAGNITUDE = "lora_magnitude_vector"

# Adapter elements in one batch of layers: 4 MiB of float32; on a GPU more, to hide the launch of kernels.
CPU_BATCH_ELEMENTS, BATCH_ELEMENTS = 2**20, 2**22


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

    @property
    def magnitude(self) -> Tensor:
        return self.tensors[f"{MAGNITUDE}.{self.name}.weight"].flatten()


class Change(NamedTuple):
    """An adapter now and at the snapshot, which keeps only the tensors that its formula needs."""

    now: Adapter
    start: Adapter


Layers = Sequence[Sequence[Change]]  # the active adapters of each layer, in one order
Formula = Callable[[Layers], Tensor]  # the squared drift of layers


def find_trained_layers(module: nn.Module, names: frozenset[str] | None) -> list[list[Adapter]]:
    """Return the active adapters of each layer of `module` that trains one.

    Args:
        names: The parameters that are trained. Default: all that require a gradient.

    Raises:
        ValueError: A trained parameter outside of adapters, a merged adapter, or no trained adapter.
    """
    tuners: dict[Any, str] = {}
    others_trained = False
    for name, part in _named_parts(unwrap(module)):
        if isinstance(part, nn.Parameter):
            others_trained = True
        else:
            tuners.setdefault(part, name)  # a layer that is tied has several names
    found = [
        [_adapter(tuner, layer, name, names) for name in tuner.active_adapters] for tuner, layer in tuners.items()
    ]
    layers = [[a for a in adapters if a.tensors] for adapters in found if any(a.trained for a in adapters)]
    if not layers or (others_trained and names is None):
        _refuse_others(module, names, layers)
    if not layers:
        raise ValueError("There is nothing to measure: the module trains no adapter.")
    for adapter, *_ in layers:
        if adapter.tuner.merged:
            merged = " and ".join(adapter.tuner.merged_adapters)
            raise ValueError(f"{adapter.layer} has merged {merged} into its base weight.")
    return layers


def _named_parts(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield PEFT's layers, and the parameters outside of them that require a gradient, by name."""
    # Every step needs this walk. `named_modules` also visits all parts of PEFT's layers and takes several times as long.
    if is_adapter_layer(module):
        yield prefix.rstrip("."), module
        yield from _named_parts(module.get_submodule("base_layer"), f"{prefix}base_layer.")
        return
    for name, parameter in module._parameters.items():
        if parameter is not None and parameter.requires_grad:
            yield prefix + name, parameter
    for name, child in module._modules.items():
        if child is not None:
            yield from _named_parts(child, prefix if name == "_orig_mod" else f"{prefix}{name}.")


def _adapter(tuner: Any, layer: str, name: str, names: frozenset[str] | None) -> Adapter:
    """Return the adapter `name` of PEFT's layer `tuner`, without tensors if the layer does not have it."""
    tensors: dict[str, Tensor] = {}
    for attribute in (*tuner.adapter_layer_names, MAGNITUDE):  # PEFT before 0.19 leaves out some magnitudes
        held = tuner._modules.get(attribute, {})
        if name in held and isinstance(held[name], nn.Module):
            tensors[f"{attribute}.{name}.weight"] = held[name].weight
        elif name in held and isinstance(held[name], nn.Parameter):
            tensors[f"{attribute}.{name}"] = held[name]
    prefix = f"{layer}." if layer else ""
    trained = [t for key, t in tensors.items() if t.requires_grad and (names is None or prefix + key in names)]
    return Adapter(layer, name, tuner, getattr(tuner, "scaling", {}).get(name, 1.0), tensors, trained)


def _refuse_others(module: nn.Module, names: frozenset[str] | None, layers: Sequence[Sequence[Adapter]]) -> None:
    """Raise if a trained parameter belongs to none of the adapters."""
    tuners = [part for part in module.modules() if is_adapter_layer(part)]
    covered = {tensor for adapters in layers for adapter in adapters for tensor in adapter.trained}
    for name, parameter in trained_parameters(module, names).items():
        if parameter not in covered:
            kind = next((_kind(tuner) for tuner in tuners if any(p is parameter for p in tuner.parameters())), None)
            owner = "no adapter" if kind is None else f"{kind}, and of no active adapter there"
            advice = "Freeze it, or give the snapshot the names of what is trained."
            raise ValueError(
                f"{name} is trained, but no exact drift is known for it: it is part of {owner}. "
                f"{advice if tuners else 'Use TeacherSnapshot.'}"
            )


def _kind(tuner: Any) -> str:
    return f"{type(tuner).__module__}.{type(tuner).__name__}"


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
        q, p = _stack(adapters)
        scale = adapters[0].scale
        if starts[0].factors:
            q_0, p_0 = (_widen(factor, p) for factor in _stack(starts))
            wide_p, wide_q, p_0 = scale * _widen(p, p), _widen(q, p), starts[0].scale * p_0
            # (P - P_0) Q + P_0 (Q - Q_0); the shorter [P, -P_0] [Q; Q_0] cancels the digits that carry a small change.
            p = torch.cat([wide_p - p_0, p_0], dim=-1).to(p)
            q = torch.cat([wide_q, wide_q - q_0], dim=-2).to(q)
        elif scale != 1:
            p = scale * p
        ps.append(p)
        qs.append(q)
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
    m, m0 = adapter.magnitude.to(q), start.magnitude.to(q)
    return ((m - m0).square() + m * m0 * (d_squared - (growth / (v + v0)).square()) / (v * v0)).sum()


def delta_drift(layers: Layers) -> Tensor:
    """Compute ||sum over adapters of delta - delta_0||^2 from the full weights of one layer."""
    changes = []
    for now, start in layers[0]:
        if now.scale != start.scale:
            raise ValueError(
                f"{now.layer}: the scale of {now.name} was {start.scale} at the snapshot and is {now.scale}."
            )
        like = now.factors[0]
        delta, delta_0 = (
            delta_weight(now.tuner, now.name, a.tensors, *(_widen(tensor, like) for tensor in a.tensors.values()))
            for a in (now, start)
        )
        if delta.dtype != _widen(like, like).dtype:
            raise ValueError(f"PEFT rounds its get_delta_weight to {delta.dtype}")
        changes.append(delta - delta_0)
    return torch.stack(changes).sum(dim=0).square().sum().to(upcast(like).dtype)


def delta_weight(tuner: Any, adapter: str, names: Iterable[str], *tensors: Tensor) -> Tensor:
    """Return what PEFT's layer would add to its base weight with these tensors in place of those of `names`."""
    function = nn.Module()
    function.tuner, function.forward = tuner, lambda: tuner.get_delta_weight(adapter)
    return functional_call(function, {f"tuner.{name}": t for name, t in zip(names, tensors, strict=True)}, ())


def choose_formula(adapters: Sequence[Adapter], checked: set[Hashable]) -> Formula:
    """Return the formula for a layer with these active adapters. `checked` collects the kinds that `delta_drift` fits."""
    from peft.tuners.lora import LoraLayer

    tuner, weight = adapters[0].tuner, base_matrix(adapters[0])
    if type(tuner.base_layer) is not type(tuner.get_base_layer()):
        raise ValueError(f"it adapts a layer of {_kind(tuner.base_layer)}")
    pairs = [adapter.factors for adapter in adapters if len(adapter.factors) == 2]
    thin = [a.shape[0] == b.flatten(1).shape[1] and b.shape[0] * a[0].numel() == weight.numel() for a, b in pairs]
    if isinstance(tuner, LoraLayer) and len(thin) == len(adapters) and all(thin):
        variants = [tuner.lora_variant.get(adapter.name) for adapter in adapters]
        if not any(variants):
            return lora_drift
        if len(adapters) == 1 and type(variants[0]).__name__.startswith("Dora"):
            return dora_drift
    for adapter in adapters:
        shapes = tuple((name, tensor.shape) for name, tensor in adapter.tensors.items())
        kind = (type(tuner), type(tuner.base_layer), weight.shape, adapter.name, shapes)
        if kind not in checked:
            _check_delta_weight(adapter)
            checked.add(kind)
    return delta_drift


def _check_delta_weight(adapter: Adapter) -> None:
    """Raise unless `get_delta_weight` is what PEFT merges and its gradient is right, at random values in a copy of the layer."""
    tuner = copy.deepcopy(adapter.tuner).to("cpu", torch.float64)
    tensors = {name: tuner.get_parameter(name).requires_grad_() for name in adapter.tensors}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for tensor in tensors.values():
            nn.init.normal_(tensor)
        delta_of = partial(delta_weight, tuner, adapter.name, tuple(tensors))
        if not gradcheck(delta_of, tuple(tensors.values()), fast_mode=True, raise_exception=False):
            raise ValueError("PEFT differentiates its get_delta_weight wrongly")
    before, delta = tuner.get_base_layer().weight.detach().clone(), tuner.get_delta_weight(adapter.name)
    tuner.merge(adapter_names=[adapter.name])
    change = tuner.get_base_layer().weight - before
    if change.shape != delta.shape or not torch.allclose(change, delta):
        raise ValueError("PEFT merges something else than its get_delta_weight")


class AdapterSnapshot:
    """The active adapters of a module as they are when the snapshot is taken, matched by name from then on.

    Take it before the first step, and before a checkpoint is loaded. LoRA and DoRA that start at zero are not copied.

    Args:
        module: A module with adapters, from PEFT or from diffusers' `add_adapter`. Wrapping it by DDP or `torch.compile`
            does not change the names.
        names: The parameters that the optimizer has; others are ignored. Default: all that require a gradient. Then it
            is an error if a parameter outside of adapters requires one later.

    Raises:
        ValueError: No trained adapter, one without an exact formula, anything else that is trained, or a name that the
            module does not have.
    """

    reductions = {"product": "Algorithm 1 on the merged weights", "factors": "the authors' released code"}

    def __init__(self, module: nn.Module, names: Iterable[str] | None = None) -> None:
        self.names = None if names is None else frozenset(names)
        layers = find_trained_layers(module, self.names)
        _refuse_others(module, self.names, layers)
        self._shapes = _shapes(layers)
        self._formulas: dict[str, Formula] = {}
        self._starts: dict[tuple[str, str], Adapter] = {}
        squared_norms, checked = [], set[Hashable]()
        for adapters in layers:
            layer, kind = adapters[0].layer, _kind(adapters[0].tuner)
            try:
                formula = choose_formula(adapters, checked)
                changes = [Change(adapter, _start(adapter, formula)) for adapter in adapters]
                formula([changes])
                squared_norms.append(base_matrix(adapters[0]).square().sum())
            except Exception as error:  # PEFT says in many ways that a layer cannot be read, merged or differentiated
                raise ValueError(f"{layer}: no exact drift is known for this {kind}: {one_line(error)}") from error
            self._formulas[layer] = formula
            self._starts.update({(layer, start.name): start for _, start in changes})
        self._squared_norm = total(squared_norms)

    def __repr__(self) -> str:
        return f"AdapterSnapshot({len(self._shapes)} tensors)"

    @property
    def squared_norm(self) -> float:
        """The sum over adapted layers of ||base weight||^2, to which `drift_relative` compares."""
        return self._squared_norm.item()

    def drift(self, module: nn.Module, reduction: str) -> Tensor:
        """Compute the drift as a scalar to differentiate, float32 or wider.

        Raises:
            ValueError: Adapters or shapes that are not those of the snapshot; an unknown reduction.
        """
        return total([self._value(layers, reduction) for layers in self._batches(module)])

    @torch.no_grad()
    def add_gradient_(self, module: nn.Module, reduction: str, weight: float, scale: float = 1.0) -> Drift:
        """Add scale * weight * d(drift)/d(parameter) to each trained parameter's `.grad` and return the drift.

        A missing gradient is created; at weight 0 everything is only measured. Raises as `drift` does.

        Args:
            weight: The paper's lambda.
            scale: Factor on the gradient alone: the loss scale that the gradients in place still carry (fp16).
        """
        values, squares = [], []
        for layers in self._batches(module):
            with torch.set_grad_enabled(weight != 0):
                value = self._value(layers, reduction)
            if value.requires_grad:
                _add_gradients(value, layers, scale * weight)
            squares.append(value.detach() if reduction == "product" else self._value(layers, "product"))
            values.append(value.detach())
        # Gram matrices can round a distance of zero to one just below.
        return Drift(total(values).clamp(min=0), total(squares).clamp(min=0))

    def pairs(self, module: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield tensors of the adapters with values at which the merged weights are those of the snapshot.

        Interpolating between the two scales the change of the weights. LoRA that started at zero changes them by a
        product, so its last factor is enough, and exact. Other adapters are interpolated tensor by tensor.
        """
        for now, start in (change for layers in self._batches(module) for changes in layers for change in changes):
            yield from ((now.tensors[name], tensor) for name, tensor in start.tensors.items())
            if not start.factors:
                yield now.factors[-1], torch.zeros_like(now.factors[-1])

    def _value(self, layers: Layers, reduction: str) -> Tensor:
        """Compute the drift of the layers of one batch."""
        if reduction not in self.reductions:
            raise ValueError(f"reduction must be one of {', '.join(self.reductions)}, got {reduction!r}.")
        first = layers[0][0].now
        with torch.autocast(first.factors[0].device.type, enabled=False):
            if reduction == "product":
                return self._formulas[first.layer](layers)
            stacks = [_stack([now for now, _ in changes]) for changes in zip(*layers, strict=True)]
            return total([factors.square().sum() for stack in stacks for factors in stack])

    def _batches(self, module: nn.Module) -> Iterator[Layers]:
        """Yield the layers: those with LoRA of one shape and scale in batches, others alone."""
        layers = find_trained_layers(module, self.names)
        expected, given = self._shapes, _shapes(layers)
        if expected != given:
            first = min(name for name in expected.keys() | given.keys() if expected.get(name) != given.get(name))
            was, shape = (None if size is None else tuple(size) for size in (expected.get(first), given.get(first)))
            raise ValueError(f"{first}: expected shape {was}, got {shape} (None: no trained adapter).")
        batches: dict[Hashable, list[list[Change]]] = {}
        for adapters in layers:
            changes = [Change(adapter, self._starts[adapter.layer, adapter.name]) for adapter in adapters]
            kind: Hashable = adapters[0].layer
            if self._formulas[adapters[0].layer] is lora_drift:
                scales = tuple((now.scale, start.scale, len(start.tensors)) for now, start in changes)
                kind = (scales, *((t.shape, t.dtype, t.device) for a in adapters for t in a.tensors.values()))
            batches.setdefault(kind, []).append(changes)
        for batch in batches.values():
            factors = [factor for now, _ in batch[0] for factor in now.factors]
            limit = CPU_BATCH_ELEMENTS if factors[0].device.type == "cpu" else BATCH_ELEMENTS
            size = max(1, limit // sum(factor.numel() for factor in factors))
            yield from (batch[i : i + size] for i in range(0, len(batch), size))


def _shapes(layers: Sequence[Sequence[Adapter]]) -> dict[str, torch.Size]:
    """Return the shapes of all tensors of the adapters, by their names in the module."""
    adapters = [adapter for adapters in layers for adapter in adapters]
    return {f"{a.layer}.{name}": tensor.shape for a in adapters for name, tensor in a.tensors.items()}


def _start(adapter: Adapter, formula: Formula) -> Adapter:
    """Copy what a formula needs of an adapter: no factors of LoRA and DoRA if one of them is zero, and so the change."""
    changed = formula is delta_drift or all(factor.any() for factor in adapter.factors)
    kept = {name: t.detach().clone() for name, t in adapter.tensors.items() if changed or name.startswith(MAGNITUDE)}
    return adapter._replace(tuner=None, tensors=kept, trained=[])


def _add_gradients(value: Tensor, layers: Layers, factor: float) -> None:
    """Add factor * d(value)/d(parameter) to the gradient of each parameter that the layers train."""
    trained = list(dict.fromkeys(tensor for changes in layers for now, _ in changes for tensor in now.trained))
    # The factor is put in at the top, in float32: a gradient in float16 might round to 0 before it.
    gradients = torch.autograd.grad(value, trained, value.new_tensor(factor), allow_unused=True)
    both = [(tensor, gradient) for tensor, gradient in zip(trained, gradients, strict=True) if gradient is not None]
    present = [(tensor.grad, gradient) for tensor, gradient in both if tensor.grad is not None]
    if present:
        torch._foreach_add_(*map(list, zip(*present, strict=True)))
    for tensor, gradient in both:
        tensor.grad = gradient if tensor.grad is None else tensor.grad
