"""Squared drift of the weights that PEFT adapters change, with its exact gradient.

With W the merged weight of an adapted layer and W_0 what it was at the snapshot, two reductions have a name:

    product  sum over layers of ||W - W_0||^2    the paper's penalty (Algorithm 1, line 9), on the merged weights
    factors  sum over factors of ||factor||^2    what the authors' released code computes for LoRA: A^2 + B^2

Each kind of adapter has one differentiable formula for ||W - W_0||^2, and autograd gives its gradient:

    LoRA    the change is a product P Q of thin matrices, whose r x r Gram matrices are enough
    DoRA    row by row, from the same P and Q and one product of the base weight with Q
    others  from PEFT's `get_delta_weight`, one layer at a time, if that is what PEFT merges and its gradient is right

Sums are taken in float32 or wider, outside autocast. A difference of products is taken in float64, since float32 loses small
changes (on MPS, which has no float64, it does). Source: Kim, Park, Kim, "Preserve and Personalize", ICLR 2026, arXiv
2505.19519; what an adapter does to its weight is PEFT's `merge`.
"""

import copy
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.func import functional_call

from .drift import Drift, total
from .errors import one_line
from .snapshot import abbreviate, named_parameters, unwrap

REDUCTIONS = {"product": "Algorithm 1 on the merged weights", "factors": "the authors' released code"}
MAGNITUDE = "lora_magnitude_vector"

# Adapter elements in one batch of layers: 4 MiB of float32; on a GPU more, to hide the launch of kernels.
CPU_BATCH_ELEMENTS, BATCH_ELEMENTS = 2**20, 2**22


class Adapter(NamedTuple):
    """An active adapter of one layer: as it is, or as it was at the snapshot, where only what is needed is kept."""

    layer: str
    name: str
    tuner: Any  # PEFT's layer
    scale: float
    tensors: dict[str, Tensor]  # by their names in PEFT's layer, such as lora_A.default.weight
    trained: list[Tensor]

    @property
    def factors(self) -> list[Tensor]:
        """All tensors but DoRA's magnitude, which is a size of the weight and not of its change."""
        return [tensor for name, tensor in self.tensors.items() if not name.startswith(MAGNITUDE)]

    @property
    def magnitude(self) -> Tensor:
        return self.tensors[f"{MAGNITUDE}.{self.name}.weight"].flatten()


Layers = Sequence[Sequence[Adapter]]
Formula = Callable[[Layers, Layers], Tensor]  # adapters by layer and in it by place, now and at the snapshot


def find_trained_layers(
    module: nn.Module, names: Collection[str] | None, thorough: bool = False
) -> list[list[Adapter]]:
    """Return the active adapters of `module`, for each layer that trains one.

    Args:
        names: The parameters that are trained. Default: all that require a gradient.
        thorough: Look inside PEFT's layers for what else is trained, which takes longer.

    Raises:
        ValueError: A trained parameter that is part of no active adapter, a merged adapter, or no trained adapter.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    tuners: dict[Any, str] = {}
    kinds: dict[type, bool] = {}
    others = False
    parts: list[tuple[str, Any]] = [("", unwrap(module))]
    for prefix, part in parts:  # each step needs this walk, for which `named_modules` takes several times as long
        if type(part) not in kinds:
            kinds[type(part)] = isinstance(part, BaseTunerLayer)
        if kinds[type(part)]:
            tuners.setdefault(part, prefix.rstrip("."))  # one that is tied has several names
            parts.append((f"{prefix}base_layer.", part.base_layer))
            continue
        for parameter in part._parameters.values() if part._parameters else ():
            others = others or (parameter is not None and parameter.requires_grad)
        for name, child in part._modules.items() if part._modules else ():
            if child is not None:
                parts.append((prefix if name == "_orig_mod" else f"{prefix}{name}.", child))
    found = [[_adapter(path, tuner, name, names) for name in tuner.active_adapters] for tuner, path in tuners.items()]
    layers = [[a for a in adapters if a.tensors] for adapters in found if any(a.trained for a in adapters)]
    if thorough or (
        others if names is None else len(names) != sum(len(a.trained) for adapters in layers for a in adapters)
    ):
        _refuse_others(module, names, tuners, {t for adapters in layers for a in adapters for t in a.trained})
    if not layers:
        raise ValueError("There is nothing to measure: the module trains no adapter.")
    if merged := next((adapters[0] for adapters in layers if adapters[0].tuner.merged), None):
        raise ValueError(
            f"{merged.layer} has merged {' and '.join(merged.tuner.merged_adapters)} into its base weight."
        )
    return layers


def _adapter(path: str, tuner: Any, name: str, names: Collection[str] | None) -> Adapter:
    tensors: dict[str, Tensor] = {}
    for attribute in (*tuner.adapter_layer_names, MAGNITUDE):  # PEFT before 0.19 leaves out some magnitudes
        held = tuner._modules.get(attribute)
        if held is not None and (module := held._modules.get(name)) is not None:
            tensors[f"{attribute}.{name}.weight"] = module.weight
        elif held is not None and (parameter := held._parameters.get(name)) is not None:
            tensors[f"{attribute}.{name}"] = parameter
    trained = [
        t for n, t in tensors.items() if t.requires_grad and (names is None or f"{path}.{n}".lstrip(".") in names)
    ]
    return Adapter(path, name, tuner, getattr(tuner, "scaling", {}).get(name, 1.0), tensors, trained)


def _refuse_others(
    module: nn.Module, names: Collection[str] | None, tuners: Collection[Any], covered: set[Tensor]
) -> None:
    """Raise if a trained parameter is not among those covered by adapters."""
    for name, parameter in named_parameters(module).items():
        if (parameter.requires_grad if names is None else name in names) and parameter not in covered:
            kind = next((_kind(tuner) for tuner in tuners if any(p is parameter for p in tuner.parameters())), None)
            owner = "no adapter" if kind is None else f"{kind}, and of no active adapter there"
            advice = (
                "Freeze it, or give the snapshot the names of what is trained." if tuners else "Use TeacherSnapshot."
            )
            raise ValueError(f"{name} is trained, but no exact drift is known for it: it is part of {owner}. {advice}")


def _kind(tuner: Any) -> str:
    return f"{type(tuner).__module__}.{type(tuner).__name__}"


def base_matrix(adapter: Adapter) -> Tensor:
    """Return the base weight, dequantized, as a matrix: the dimensions of a kernel join the inputs."""
    from peft.utils.integrations import dequantize_module_weight

    return _upcast(dequantize_module_weight(adapter.tuner.get_base_layer()).detach()).flatten(1)


def _upcast(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _widen(tensor: Tensor, like: Tensor) -> Tensor:
    """Return the tensor in the dtype in which a difference of products is taken."""
    return tensor.to(like.device, torch.float32 if like.device.type == "mps" else torch.float64)


# Formulas


def _change(layers: Layers, starts: Layers) -> tuple[Tensor, Tensor]:
    """Return P (layers, out, r) and Q (layers, r, in), with P Q the sum over LoRA adapters of s B A - s_0 B_0 A_0."""
    ps, qs = [], []
    for adapters, begun in zip(zip(*layers, strict=True), zip(*starts, strict=True), strict=True):
        (q, p), scale = _stack(adapters), adapters[0].scale
        if begun[0].factors:
            q_0, p_0 = (_widen(factor, p) for factor in _stack(begun))
            wide_p, wide_q, p_0 = scale * _widen(p, p), _widen(q, p), begun[0].scale * p_0
            # (P - P_0) Q + P_0 (Q - Q_0); the shorter [P, -P_0] [Q; Q_0] cancels the digits that carry a small change.
            p = torch.cat([wide_p - p_0, p_0], dim=-1).to(p)
            q = torch.cat([wide_q, wide_q - q_0], dim=-2).to(q)
        elif scale != 1:
            p = scale * p
        ps.append(p)
        qs.append(q)
    return (ps[0], qs[0]) if len(ps) == 1 else (torch.cat(ps, dim=-1), torch.cat(qs, dim=-2))


def _stack(adapters: Sequence[Adapter]) -> list[Tensor]:
    """Return the factors A (layers, r, in) and B (layers, out, r) of equally shaped layers."""
    alike = zip(*(adapter.factors for adapter in adapters), strict=True)
    return [_upcast(torch.stack([factor.flatten(1) for factor in factors])) for factors in alike]


def lora_drift(layers: Layers, starts: Layers) -> Tensor:
    """Compute ||P Q||^2 = sum((P^T P) o (Q Q^T))."""
    p, q = _change(layers, starts)
    return ((p.mT @ p) * (q @ q.mT)).sum()


def dora_drift(layers: Layers, starts: Layers) -> Tensor:
    """Sum over output rows of ||m b / v - m0 b0 / v0||^2, b = w0 + s (B A)_row, v = ||b|| (DoRA, ICML 2024, eq. 5).

    With d = b - b0 that is (m - m0)^2 + m m0 (||d||^2 - (v - v0)^2) / (v v0); v - v0 = (v^2 - v0^2) / (v + v0) and
    v^2 - v0^2 = 2 <b0, d> + ||d||^2, so that no two nearly equal numbers are subtracted.
    """
    ((adapter,),), ((start,),) = layers, starts
    p, q = (matrices[0] for matrices in _change(layers, starts))
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


def delta_drift(layers: Layers, starts: Layers) -> Tensor:
    """Compute ||sum over adapters of delta - delta_0||^2 from the full weights of one layer."""
    changes = []
    for now, start in zip(layers[0], starts[0], strict=True):
        if now.scale != start.scale:
            raise ValueError(
                f"{now.layer}: the scale of {now.name} was {start.scale} at the snapshot and is {now.scale}."
            )
        like = now.factors[0]
        delta, delta_0 = (
            delta_weight(now.tuner, now.name, {name: _widen(tensor, like) for name, tensor in of.tensors.items()})
            for of in (now, start)
        )
        if delta.dtype != _widen(like, like).dtype:
            raise ValueError(f"PEFT rounds its get_delta_weight to {delta.dtype}")
        changes.append(delta - delta_0)
    return torch.stack(changes).sum(dim=0).square().sum().to(_upcast(like).dtype)


def delta_weight(tuner: Any, adapter: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return what PEFT's layer would add to its base weight with these tensors."""
    function = nn.Module()
    function.tuner, function.forward = tuner, lambda: tuner.get_delta_weight(adapter)
    return functional_call(function, {f"tuner.{name}": tensor for name, tensor in tensors.items()}, ())


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
    shapes = tuple((name, tensor.shape) for adapter in adapters for name, tensor in adapter.tensors.items())
    kind = (type(tuner), type(tuner.get_base_layer()), weight.shape, shapes)
    if kind not in checked:
        _check_delta_weight(adapters)
        checked.add(kind)
    return delta_drift


def _check_delta_weight(adapters: Sequence[Adapter]) -> None:
    """Raise unless `get_delta_weight` is what PEFT merges and its gradient is right, at random values in a copy of the layer."""
    tuner = copy.deepcopy(adapters[0].tuner).to("cpu", torch.float64)
    before, delta = tuner.get_base_layer().weight.detach().clone(), torch.zeros(())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for adapter in adapters:
            tensors = {
                name: torch.randn(tensor.shape, dtype=torch.float64) for name, tensor in adapter.tensors.items()
            }
            inputs = [tensor.requires_grad_() for tensor in tensors.values()]

            def delta_of(*inputs: Tensor, name: str = adapter.name, names: Iterable[str] = tuple(tensors)) -> Tensor:
                return delta_weight(tuner, name, dict(zip(names, inputs, strict=True)))

            if not gradcheck(delta_of, inputs, fast_mode=True, raise_exception=False):
                raise ValueError("PEFT differentiates its get_delta_weight wrongly")
            tuner.load_state_dict(tensors, strict=False)
            delta = delta + tuner.get_delta_weight(adapter.name).detach()
    tuner.merge()
    weight = tuner.get_base_layer().weight.detach()
    if weight.shape != delta.shape or not torch.allclose(weight - before, delta):
        raise ValueError("PEFT merges something else than its get_delta_weight")


class AdapterSnapshot:
    """What the active adapters of a module are when it is built, to measure what they change from then on; matched by name.

    Take it before the first step, and before a checkpoint is loaded. LoRA and DoRA that start at zero are not copied.

    Args:
        module: A module with adapters, from PEFT or from diffusers' `add_adapter`. Wrapping it by DDP or `torch.compile`
            does not change the names.
        names: The parameters that are trained, which is what the optimizer has; others are ignored. Default: all that
            require a gradient, and one outside of adapters that does so later is an error.

    Raises:
        ValueError: No trained adapter, one without an exact formula, anything else that is trained, or a name that the
            module does not have.
    """

    reductions = REDUCTIONS

    def __init__(self, module: nn.Module, names: Iterable[str] | None = None) -> None:
        self.names = None if names is None else frozenset(names)
        if unknown := (self.names or frozenset()) - (parameters := named_parameters(module)).keys():
            raise ValueError(
                f"The module has no parameter named {abbreviate(unknown)}; it has {abbreviate(parameters)}."
            )
        layers, checked = find_trained_layers(module, self.names, thorough=True), set[Hashable]()
        self._shapes = _shapes(layers)
        self._formulas: dict[str, Formula] = {}
        self._starts: dict[tuple[str, str], Adapter] = {}
        self._squared_norms: list[Tensor] = []
        for adapters in layers:
            layer, kind = adapters[0].layer, _kind(adapters[0].tuner)
            try:
                formula = self._formulas[layer] = choose_formula(adapters, checked)
                starts = [_start(adapter, formula) for adapter in adapters]
                self._squared_norms.append(base_matrix(adapters[0]).square().sum())
                if formula is delta_drift:
                    delta_drift([adapters], [starts])
            except Exception as error:  # PEFT says in many ways that a layer cannot be read, merged or differentiated
                raise ValueError(f"{layer}: no exact drift is known for this {kind}: {one_line(error)}") from error
            self._starts.update({(layer, start.name): start for start in starts})

    def __repr__(self) -> str:
        return f"AdapterSnapshot({len(self._shapes)} tensors)"

    @cached_property
    def squared_norm(self) -> float:
        """The sum over adapted layers of ||base weight||^2, to which `drift_relative` compares."""
        return float(sum(squared_norm.item() for squared_norm in self._squared_norms))

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
                trained = list(dict.fromkeys(tensor for adapters in layers for a in adapters for tensor in a.trained))
                # The factor is put in at the top, in float32: a gradient in float16 might round to 0 before it.
                gradients = torch.autograd.grad(value, trained, value.new_tensor(scale * weight), allow_unused=True)
                _add_gradients(trained, gradients)
            squares.append(value.detach() if reduction == "product" else self._value(layers, "product"))
            values.append(value.detach())
        # Gram matrices can round a distance of zero to one just below.
        return Drift(total(values).clamp(min=0), total(squares).clamp(min=0))

    def pairs(self, module: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield tensors of the adapters with values at which the merged weights are those of the snapshot.

        Interpolating them scales the change of the weights. The change that LoRA makes is a product, so where it started
        at zero its last factor is enough, and exact; other adapters are interpolated tensor by tensor.
        """
        for adapter in (adapter for layers in self._batches(module) for adapters in layers for adapter in adapters):
            start = self._starts[adapter.layer, adapter.name]
            yield from ((adapter.tensors[name], tensor) for name, tensor in start.tensors.items())
            if not start.factors:
                yield adapter.factors[-1], torch.zeros_like(adapter.factors[-1])

    def _value(self, layers: Layers, reduction: str) -> Tensor:
        """Compute the drift of layers of one batch."""
        if reduction not in self.reductions:
            raise ValueError(f"reduction must be one of {', '.join(self.reductions)}, got {reduction!r}.")
        with torch.autocast(layers[0][0].factors[0].device.type, enabled=False):
            if reduction == "factors":
                return total(
                    [factors.square().sum() for adapters in zip(*layers, strict=True) for factors in _stack(adapters)]
                )
            starts = [[self._starts[adapter.layer, adapter.name] for adapter in adapters] for adapters in layers]
            return self._formulas[layers[0][0].layer](layers, starts)

    def _batches(self, module: nn.Module) -> Iterator[Layers]:
        """Yield the layers: those with LoRA of one shape and scale in batches, others alone."""
        layers = find_trained_layers(module, self.names)
        expected, given = self._shapes, _shapes(layers)
        if expected != given:
            first = min(name for name in expected.keys() | given.keys() if expected.get(name) != given.get(name))
            was, shape = (None if size is None else tuple(size) for size in (expected.get(first), given.get(first)))
            raise ValueError(f"{first}: expected shape {was}, got {shape} (None: no trained adapter).")
        batches: dict[Hashable, list[list[Adapter]]] = {}
        for adapters in layers:
            kind: Hashable = adapters[0].layer
            if self._formulas[adapters[0].layer] is lora_drift:
                starts = [self._starts[adapter.layer, adapter.name] for adapter in adapters]
                scales = tuple(
                    (adapter.scale, start.scale, len(start.tensors))
                    for adapter, start in zip(adapters, starts, strict=True)
                )
                kind = (
                    scales,
                    tuple((t.shape, t.dtype, t.device) for adapter in adapters for t in adapter.tensors.values()),
                )
            batches.setdefault(kind, []).append(adapters)
        for batch in batches.values():
            limit = CPU_BATCH_ELEMENTS if batch[0][0].factors[0].device.type == "cpu" else BATCH_ELEMENTS
            size = max(1, limit // sum(factor.numel() for adapter in batch[0] for factor in adapter.factors))
            yield from (batch[i : i + size] for i in range(0, len(batch), size))


def _shapes(layers: Layers) -> dict[str, torch.Size]:
    adapters = [adapter for adapters in layers for adapter in adapters]
    return {
        f"{adapter.layer}.{name}": tensor.shape for adapter in adapters for name, tensor in adapter.tensors.items()
    }


def _start(adapter: Adapter, formula: Formula) -> Adapter:
    """Copy what is needed of an adapter: of LoRA and DoRA no factors if one of them is zero, and so the change."""
    changed = formula is delta_drift or all(factor.any() for factor in adapter.factors)
    kept = {name: t.detach().clone() for name, t in adapter.tensors.items() if changed or name.startswith(MAGNITUDE)}
    return adapter._replace(tuner=None, tensors=kept, trained=[])


def _add_gradients(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    both = [
        (parameter, gradient)
        for parameter, gradient in zip(parameters, gradients, strict=True)
        if gradient is not None
    ]
    present = [(parameter.grad, gradient) for parameter, gradient in both if parameter.grad is not None]
    if present:
        torch._foreach_add_(*map(list, zip(*present, strict=True)))
    for parameter, gradient in both:
        parameter.grad = gradient if parameter.grad is None else parameter.grad
