"""AdapterSnapshot: the pretrained state of PEFT adapters, and the squared drift of the weights that they change.

With W the merged weight of an adapted layer and W_0 its value at the snapshot, two reductions have a name:

    product  sum over layers of ||W - W_0||^2    the paper's penalty (Algorithm 1, line 9), on the merged weights
    factors  sum over factors of ||factor||^2    what the authors' released code computes for LoRA: A^2 + B^2

Source: Kim, Park, Kim, "Preserve and Personalize", ICLR 2026, arXiv 2505.19519. The formulas are in adapter_drift.py.
"""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .adapter_drift import (
    MAGNITUDE,
    Adapter,
    Change,
    Formula,
    Layers,
    base_matrix,
    choose_formula,
    class_path,
    factors_drift,
    lora_drift,
    take_start,
)
from .drift import Drift, total
from .errors import one_line
from .snapshot import is_adapter_layer, trained_parameters, unwrap

# Adapter elements in one batch of layers: 4 MiB of float32; on a GPU more, to hide the launch of kernels.
CPU_BATCH_ELEMENTS, BATCH_ELEMENTS = 2**20, 2**22


def find_trained_layers(module: nn.Module, names: frozenset[str] | None) -> list[list[Adapter]]:
    """Return the active adapters of each layer of `module` that trains one.

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
    for attribute in (*tuner.adapter_layer_names, MAGNITUDE):  # PEFT 0.19 leaves the last one out
        held = tuner._modules.get(attribute)
        if held is not None and (module := held._modules.get(name)) is not None:
            tensors[f"{attribute}.{name}.weight"] = module.weight
        elif held is not None and (parameter := held._parameters.get(name)) is not None:
            tensors[f"{attribute}.{name}"] = parameter
    prefix = f"{layer}." if layer else ""
    trained = [t for key, t in tensors.items() if t.requires_grad and (names is None or prefix + key in names)]
    return Adapter(layer, name, tuner, getattr(tuner, "scaling", {}).get(name, 1.0), tensors, trained)


def _refuse_others(module: nn.Module, names: frozenset[str] | None, layers: Sequence[Sequence[Adapter]]) -> None:
    """Raise if a trained parameter belongs to none of the adapters."""
    tuners = [part for part in module.modules() if is_adapter_layer(part)]
    covered = {tensor for adapters in layers for adapter in adapters for tensor in adapter.trained}
    for name, parameter in trained_parameters(module, names).items():
        if parameter not in covered:
            kind = next(
                (class_path(tuner) for tuner in tuners if any(p is parameter for p in tuner.parameters())), None
            )
            owner = "no adapter" if kind is None else f"{kind}, and of no active adapter there"
            advice = "Freeze it, or give the snapshot the names of what is trained."
            raise ValueError(
                f"{name} is trained, but no exact drift is known for it: it is part of {owner}. "
                f"{advice if tuners else 'Use TeacherSnapshot.'}"
            )


class AdapterSnapshot:
    """Keep the active adapters of a module as they are now, to compute the drift of its weights from then on.

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
            layer, kind = adapters[0].layer, class_path(adapters[0].tuner)
            try:
                formula = choose_formula(adapters, checked)
                changes = [Change(adapter, take_start(adapter, formula)) for adapter in adapters]
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
        """Return the sum over adapted layers of ||base weight||^2, to which `drift_relative` compares."""
        return self._squared_norm.item()

    def relative(self, drift: Drift) -> dict[str, float]:
        """Return the ratio of norms of the change of the adapted weights and of the base weights, under its log key."""
        return drift.relative_to(self.squared_norm)

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
            return (self._formulas[first.layer] if reduction == "product" else factors_drift)(layers)

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
