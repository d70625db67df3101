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
    factors_drift,
    lora_drift,
    take_start,
)
from .drift import Drift, total
from .errors import one_line
from .snapshot import is_adapter_layer, trained_parameters, unwrap

# Adapter elements in one batch of layers: 4 MiB of float32; on a GPU more, to hide the launch of kernels.
CPU_BATCH_ELEMENTS, BATCH_ELEMENTS = 2**20, 2**22
OTHERS = (
    "{} is trained, but no exact drift is known for it: it belongs to no active adapter. Freeze it, or give the snapshot "
    "the names of what is trained. Without adapters, use TeacherSnapshot."
)


def find_trained_layers(module: nn.Module, names: frozenset[str] | None) -> list[list[Adapter]]:
    """Return the active adapters of each layer of `module` that trains one.

    Raises:
        ValueError: A trained parameter outside of adapters, a merged adapter, or no trained adapter.
    """
    tuners: dict[Any, str] = {}
    for name, part in _named_parts(unwrap(module)):
        if not isinstance(part, nn.Parameter):
            tuners.setdefault(part, name)  # a layer that is tied has several names
        elif names is None:
            raise ValueError(OTHERS.format(name))
    layers = []
    for tuner, layer in tuners.items():
        found = [_adapter(tuner, layer, name, names) for name in tuner.active_adapters]
        if any(adapter.trained for adapter in found):
            if tuner.merged:
                raise ValueError(f"{layer} has merged {' and '.join(tuner.merged_adapters)} into its base weight.")
            layers.append([adapter for adapter in found if adapter.tensors])
    if not layers:
        raise ValueError("There is nothing to measure: the module trains no adapter.")
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


class AdapterSnapshot:
    """Keep the active adapters of a module as they are now, to compute the drift of its weights from then on.

    Take it before the first step, and before a checkpoint is loaded. LoRA and DoRA that start at zero are not copied.

    Args:
        module: A module with adapters, from PEFT or from diffusers' `add_adapter`. Wrapping it by DDP or `torch.compile`
            does not change the names.
        names: The parameters that the optimizer has; others are ignored. Default: all that require a gradient. Then it
            is an error if a parameter outside of adapters requires one later.

    Raises:
        ValueError: No trained adapter, one without an exact formula, or anything else that is trained.
    """

    reductions = {"product": "Algorithm 1 on the merged weights", "factors": "the authors' released code"}
    _squared_norm: Tensor

    def __init__(self, module: nn.Module, names: Iterable[str] | None = None) -> None:
        self.names = None if names is None else frozenset(names)
        trained = trained_parameters(module, self.names)
        layers = find_trained_layers(module, self.names)
        covered = {tensor for adapters in layers for adapter in adapters for tensor in adapter.trained}
        if others := [name for name, parameter in trained.items() if parameter not in covered]:
            raise ValueError(OTHERS.format(others[0]))
        self._shapes = _shapes(layers)
        self._formulas: dict[str, Formula] = {}
        self._starts: dict[tuple[str, str], Adapter] = {}
        checked = set[Hashable]()
        for adapters in layers:
            layer = adapters[0].layer
            try:
                weight = base_matrix(adapters[0])
                formula = choose_formula(adapters, weight, checked)
                changes = [Change(adapter, take_start(adapter, formula)) for adapter in adapters]
                formula([changes])
            except Exception as error:  # PEFT says in many ways that a layer cannot be read, merged or differentiated
                kind = f"{type(adapters[0].tuner).__module__}.{type(adapters[0].tuner).__name__}"
                raise ValueError(f"{layer}: no exact drift is known for this {kind}: {one_line(error)}") from error
            # Scalars that stayed between the large squares would keep the memory of all from being used again.
            squares = weight.square().sum()
            if self._starts:
                self._squared_norm.add_(squares.to(self._squared_norm.device))
            else:
                self._squared_norm = squares
            self._formulas[layer] = formula
            self._starts.update({(layer, start.name): start for _, start in changes})

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
        formulas = {"product": self._formulas[first.layer], "factors": factors_drift}
        with torch.autocast(first.factors[0].device.type, enabled=False):
            return formulas[reduction](layers)

    def _batches(self, module: nn.Module) -> Iterator[Layers]:
        """Yield the layers: those with LoRA of one shape and scale in batches, others alone."""
        layers = find_trained_layers(module, self.names)
        expected, given = self._shapes, _shapes(layers)
        if expected != given:
            name = min(name for name in expected.keys() | given.keys() if expected.get(name) != given.get(name))
            was, found = (tuple(shapes[name]) if name in shapes else None for shapes in (expected, given))
            raise ValueError(f"{name}: expected shape {was}, got {found} (None: no trained adapter).")
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
    present, added = [], []
    for tensor, gradient in zip(trained, gradients, strict=True):
        if gradient is not None:
            if tensor.grad is None:
                tensor.grad = torch.zeros_like(tensor)
            present.append(tensor.grad)
            added.append(gradient)
    torch._foreach_add_(present, added)
