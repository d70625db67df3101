"""The adapters of PEFT that a module trains, layer by layer, as far as the drift of the merged weights is known for them."""

from collections.abc import Mapping
from operator import is_
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.loha.layer import LoHaLayer
from peft.tuners.lokr.layer import LoKrLayer
from peft.tuners.lora.layer import LoraLayer, MultiheadAttention, ParamWrapper
from peft.tuners.lora.tp_layer import LoraParallelLinear
from peft.tuners.lora.variants import DoraConv1dVariant, DoraConv2dVariant, DoraConv3dVariant, DoraLinearVariant
from peft.tuners.oft.layer import Linear as OFTLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from .snapshot import named_parameters

SUPPORTED = (LoraLayer, LoHaLayer, LoKrLayer, OFTLinear)
LORA_BY_NAME_ONLY = (AdaLoraLayer, LoraParallelLinear, MultiheadAttention, ParamWrapper)
DORA = (DoraLinearVariant, DoraConv1dVariant, DoraConv2dVariant, DoraConv3dVariant)  # the first has embeddings, too
MAGNITUDE = "lora_magnitude_vector"


class Adapter(NamedTuple):
    """One trained adapter of one layer: its tensors under the names PEFT gives them, and its scale s."""

    layer: str
    name: str
    module: Any  # PEFT's layer
    tensors: dict[str, Tensor]
    scale: float

    @property
    def factors(self) -> list[Tensor]:
        """All but DoRA's magnitude, which is a size of the pretrained weight, not of a change."""
        return [tensor for name, tensor in self.tensors.items() if name != MAGNITUDE]

    @property
    def device(self) -> torch.device:
        return self.factors[0].device

    @property
    def dtype(self) -> torch.dtype:
        """What sums are taken in."""
        return torch.promote_types(self.factors[0].dtype, torch.float32)

    @property
    def wide(self) -> torch.dtype:
        """What differences of products are taken in."""
        return torch.float32 if self.device.type == "mps" else torch.float64

    def to(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        return {name: tensor.to(device, dtype) for name, tensor in self.tensors.items()}


class _Seen(NamedTuple):
    """What a module was made of when its adapters were last looked for, and what was found."""

    modules: list[nn.Module | None]
    parameters: list[nn.Parameter | None]
    settings: list[object]
    layers: list[list[Adapter]]


_seen: WeakKeyDictionary[nn.Module, _Seen] = WeakKeyDictionary()


def trained_adapters(module: nn.Module) -> list[list[Adapter]]:
    """The adapters that `module` trains, by layer: active ones, as a frozen one cancels out of W - W_0.

    They are looked for anew only when something in the module has changed since the last time, for the search takes
    several times as long as seeing that nothing has.

    Raises:
        ValueError: A layer without a formula, anything else that is trained, or no adapter at all.
    """
    if isinstance(module, BaseTunerLayer):  # one layer alone: what was found would hold what it was found in
        return _find(module)
    modules, parameters = _parts(module)
    settings, seen = _settings(modules, parameters), _seen.get(module)
    if seen is None or not (
        settings == seen.settings  # and so as many modules and parameters
        and all(map(is_, modules, seen.modules))
        and all(map(is_, parameters, seen.parameters))
    ):
        seen = _seen[module] = _Seen(modules, parameters, settings, _find(module))
    return seen.layers


def _parts(module: nn.Module) -> tuple[list[nn.Module | None], list[nn.Parameter | None]]:
    """The modules in this one, and all parameters; by hand, for `named_modules` is slow."""
    modules: list[nn.Module | None] = [module]
    parameters: list[nn.Parameter | None] = []
    for each in modules:  # which grows meanwhile
        if each is not None and each._modules:
            modules += each._modules.values()
        if each is not None and each._parameters:
            parameters += each._parameters.values()
    return modules[1:], parameters  # not the module itself, which may go when nobody else holds it


def _settings(modules: list[nn.Module | None], parameters: list[nn.Parameter | None]) -> list[object]:
    """What can change in the parts of a module while they stay the same objects, and how many there are."""
    kinds = {kind for kind in set(map(type, modules)) if issubclass(kind, BaseTunerLayer)}
    tuners: list[Any] = [module for module in modules if type(module) in kinds]
    return [
        (len(modules), len(parameters)),
        [parameter is not None and parameter.requires_grad for parameter in parameters],
        [(list(t.active_adapters), list(t.merged_adapters), dict(vars(t).get("scaling", {}))) for t in tuners],
    ]


def _find(module: nn.Module) -> list[list[Adapter]]:
    names = {parameter: name for name, parameter in named_parameters(module).items()}
    others = {parameter: name for parameter, name in names.items() if parameter.requires_grad}
    tuners = [tuner for tuner in module.modules() if isinstance(tuner, BaseTunerLayer)]
    layers: list[list[Adapter]] = []
    for tuner in tuners:
        if not isinstance(tuner, SUPPORTED) or isinstance(tuner, LORA_BY_NAME_ONLY):
            continue
        active = [a for name in tuner.active_adapters if (a := _adapter(tuner, name, names)).tensors]
        trained = [adapter for adapter in active if any(t.requires_grad for t in adapter.tensors.values())]
        if not trained:
            continue
        if objection := _objection(tuner, active, trained):
            raise ValueError(f"{trained[0].layer}: no exact drift is known for this {_kind(tuner)}, which {objection}.")
        layers.append(trained)
        for tensor in _tensors(trained):
            others.pop(tensor, None)
    for parameter, name in others.items():
        kind = next((_kind(tuner) for tuner in tuners if any(p is parameter for p in tuner.parameters())), "no adapter")
        raise ValueError(
            f"{name} is trained, but no exact drift is known for it: it is part of {kind}, not of an active LoRA, DoRA, "
            "LoHa, LoKr or OFT adapter."
        )
    if not layers:
        raise ValueError("There is nothing to measure: the module trains no adapter.")
    return layers


def _kind(tuner: BaseTunerLayer) -> str:
    return f"{type(tuner).__module__}.{type(tuner).__name__}"


def _adapter(tuner: Any, name: str, names: Mapping[Tensor, str]) -> Adapter:
    tensors, layer = {}, ""
    attributes = tuner.adapter_layer_names
    if isinstance(tuner, LoraLayer):
        attributes += (MAGNITUDE,)  # PEFT before 0.19 leaves it out for convolutions and embeddings
    for attribute in attributes:
        if name in (held := getattr(tuner, attribute)):  # as a parameter, or as the weight of a module
            tensors[attribute] = held[name].weight if isinstance(held[name], nn.Module) else held[name]
            layer = names[tensors[attribute]].rpartition(f".{attribute}.{name}")[0]
    return Adapter(layer, name, tuner, tensors, 1.0 if isinstance(tuner, OFTLinear) else tuner.scaling.get(name, 1.0))


def _objection(tuner: Any, active: list[Adapter], trained: list[Adapter]) -> str | None:
    """Why the formulas for its kind would not be exact for this layer, if they would not."""
    base = tuner.get_base_layer()
    variants = [tuner.lora_variant.get(a.name) for a in active] if isinstance(tuner, LoraLayer) else []
    unknown = [type(variant).__name__ for variant in variants if variant and not isinstance(variant, DORA)]
    if tuner.merged:
        return f"has merged {' and '.join(tuner.merged_adapters)} into its base weight"
    if isinstance(tuner.base_layer, BaseTunerLayer):
        return f"adapts a layer of {type(tuner.base_layer).__module__}"
    if isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and base.groups > 1:
        return f"adapts a convolution in {base.groups} groups"
    if unknown:
        return f"is the variant {unknown[0]}"
    if isinstance(tuner, OFTLinear) and (tuner.fan_in_fan_out or any(tuner.oft_R[a.name].coft for a in active)):
        return "is set to coft or fan_in_fan_out"
    acts_on_others = any(variants) or isinstance(tuner, OFTLinear)  # scales or turns the sum that they are part of
    if len(active) > 1 and acts_on_others or len(trained) > 1 and isinstance(tuner, LoKrLayer):
        return f"has {' and '.join(a.name for a in active)} active at once"
    return None


def _tensors(adapters: list[Adapter]) -> list[Tensor]:
    return [tensor for adapter in adapters for tensor in adapter.tensors.values()]


def _base_matrix(adapter: Adapter) -> Tensor:
    """The base weight, dequantised, as a matrix: the dimensions of a kernel join the inputs."""
    base = adapter.module.get_base_layer()
    try:
        weight = dequantize_module_weight(base).detach()
    except (AttributeError, TypeError) as error:
        raise ValueError(f"{adapter.layer}: PEFT cannot read the weight of {type(base).__name__}: {error}.") from error
    return weight.to(torch.promote_types(weight.dtype, torch.float32)).flatten(1)
