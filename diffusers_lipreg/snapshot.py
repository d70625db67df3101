"""The teacher: the pretrained parameters theta_0, frozen and kept by name."""

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .drift import REDUCTIONS, Drift, add_drift_gradient_, drift, slices
from .sharding import all_reduce_sum, to_local


def unwrap(module: Any) -> nn.Module:
    """Return the module inside `DistributedDataParallel`, `DataParallel` and `torch.compile`."""
    while hasattr(module, "_orig_mod") or isinstance(module, (DistributedDataParallel, DataParallel)):
        module = module._orig_mod if hasattr(module, "_orig_mod") else module.module
    return module


def named_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return parameters by name, without the prefixes that `DistributedDataParallel` and `torch.compile` add."""
    # Submodules that were compiled one by one have the prefix inside their names.
    return {name.replace("_orig_mod.", ""): p for name, p in unwrap(module).named_parameters()}


def trained_parameters(module: nn.Module, names: Iterable[str] | None = None) -> dict[str, nn.Parameter]:
    """Return the parameters of these names. Default: all that require a gradient.

    Raises:
        ValueError: A name that the module does not have.
    """
    parameters = named_parameters(module)
    names = [name for name, p in parameters.items() if p.requires_grad] if names is None else list(names)
    if unknown := set(names) - parameters.keys():
        raise ValueError(f"The module has no parameter named {abbreviate(unknown)}; it has {abbreviate(parameters)}.")
    return {name: parameters[name] for name in names}


def is_adapter_layer(part: nn.Module) -> bool:
    """Say whether `part` is a layer of PEFT, which need not be imported for this."""
    return hasattr(type(part), "get_base_layer")


def abbreviate(names: Iterable[str]) -> str:
    """List the first three names in alphabetical order, and the number of the others."""
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _exact_dtype(tensor: Tensor) -> torch.dtype:
    """Return the narrowest dtype that represents every value exactly: float16, bfloat16 or the tensor's own."""
    # A sharded tensor keeps its dtype: processes see different values, and so might choose different dtypes.
    if tensor.dtype == torch.float32 and to_local(tensor) is tensor:
        for half in (torch.float16, torch.bfloat16):
            if all(torch.equal(part.to(half).to(part.dtype), part) for (part,) in slices(tensor)):
                return half
    return tensor.dtype


def _copy(tensor: Tensor, dtype: torch.dtype | None, device: torch.device | str | None) -> Tensor:
    """Copy a tensor, and pin the copy if it came from a GPU into host memory."""
    copy = tensor.detach().to(device=device, dtype=dtype or _exact_dtype(tensor.detach()), copy=True)
    pin = tensor.is_cuda and copy.device.type == "cpu" and to_local(copy) is copy
    return copy.pin_memory() if pin else copy


@torch.no_grad()
def rounding_error(tensor: Tensor, dtype: torch.dtype) -> float:
    """Compute the root mean square, over the tensor's elements, of the change that rounding to `dtype` makes."""
    squares = _sum_of_squares(tensor, (part.to(dtype).float() - part.float() for (part,) in slices(tensor)))
    return (squares / max(1, tensor.numel())) ** 0.5


def _sum_of_squares(tensor: Tensor, parts: Iterable[Tensor]) -> float:
    """Add up the squares of parts in float32, over all processes that share `tensor`."""
    squares = torch.zeros((), device=tensor.device)
    for part in parts:  # scalars that stayed between the parts would keep the memory of all from being used again
        squares += part.square().sum()
    return all_reduce_sum(squares, tensor).item()


@torch.no_grad()
def _stored(name: str, parameter: Tensor, state_dict: Mapping[str, Tensor]) -> Tensor:
    """Return the tensor of a state dict, after a check that it has the parameter's values, in whatever dtype."""
    if to_local(parameter) is not parameter:
        raise ValueError(f"{name} is sharded: the whole tensors of a state_dict cannot be its teacher.")
    stored = state_dict.get(name)
    if stored is not None and stored.shape == parameter.shape:
        wide = torch.promote_types(stored.dtype, parameter.dtype)
        if all(torch.equal(a.to(wide), b.to(a.device, wide)) for a, b in slices(parameter, stored)):
            return stored
    raise ValueError(
        f"{name}: state_dict does not have the module's weights: is it another model, or a converted one?"
    )


class TeacherSnapshot:
    """A detached copy of a module's parameters, taken when it is built and matched by name from then on.

    Take it while the module holds the pretrained weights, before a checkpoint is loaded. It belongs in no checkpoint:
    `from_pretrained` gives theta_0 again.

    Args:
        module: The module to copy from. Wrapping it by DDP or `torch.compile` does not change the names.
        names: The parameters to copy. Default: all that require a gradient. Then the snapshot is `strict`: the module
            must keep exactly these trainable, so that no parameter escapes the penalty unnoticed.
        dtype: Floating-point dtype to store. Default: the narrowest lossless one, which is float16 for a checkpoint
            that was stored in float16. A lossy dtype regularizes towards rounded weights; see `rounding_error`.
        device: Where to store, for example `"cpu"` to save GPU memory: such a teacher is pinned, and copied to the
            parameters chunk by chunk. Default: beside each parameter; then a module that moves away is an error.
        state_dict: The pretrained weights by name, held as and where they are instead of copies. Weights that
            `safetensors.torch.load_file` maps from the disk take no memory.

    Raises:
        ValueError: No parameter to copy, a parameter of an adapter, or arguments that do not fit the module or each other.
    """

    reductions = REDUCTIONS

    def __init__(
        self,
        module: nn.Module,
        *,
        names: Iterable[str] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        parameters = trained_parameters(module, names)
        if not parameters:
            raise ValueError("There is nothing to copy: no parameter requires a gradient and no names were given.")
        tuners: list[Any] = [part for part in module.modules() if is_adapter_layer(part)]
        adapters = {attribute for tuner in tuners for attribute in tuner.adapter_layer_names}
        if of_adapters := [name for name in parameters if adapters.intersection(name.split("."))]:
            raise ValueError(f"{of_adapters[0]} is part of an adapter: use AdapterSnapshot.")
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"Expected a floating-point dtype, got {dtype}.")
        if state_dict is not None and (dtype is not None or device is not None):
            raise ValueError(
                "The weights of state_dict are held as they are: give a dtype or device, or state_dict, not both."
            )
        self.strict = names is None
        self.beside_parameters = device is None and state_dict is None
        self._teacher = {
            name: _copy(parameter, dtype, device) if state_dict is None else _stored(name, parameter, state_dict)
            for name, parameter in parameters.items()
        }

    def __repr__(self) -> str:
        return f"TeacherSnapshot({len(self._teacher)} tensors)"

    @cached_property
    def squared_norm(self) -> float:
        """Return ||theta_0||^2, to which `drift_relative` compares."""
        return sum(_sum_of_squares(t, (part.float() for (part,) in slices(t))) for t in self._teacher.values())

    def relative(self, drift: Drift) -> dict[str, float]:
        """Return the ratio of norms ||theta - theta_0|| / ||theta_0||, under its log key."""
        return drift.relative_to(self.squared_norm)

    def pairs(self, module: nn.Module) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield each parameter of `module` with its teacher.

        Raises:
            ValueError: A name, shape or device that does not fit.
        """
        parameters = named_parameters(module)
        if missing := self._teacher.keys() - parameters.keys():
            raise ValueError(f"The teacher knows {abbreviate(missing)}, the module does not: is it another model?")
        trainable = {name for name, parameter in parameters.items() if parameter.requires_grad}
        if self.strict and trainable != self._teacher.keys():
            raise ValueError(
                f"Trainable without a teacher: [{abbreviate(trainable - self._teacher.keys())}]; with one, but not trainable: "
                f"[{abbreviate(self._teacher.keys() - trainable)}]. Freeze before the snapshot, or give it names to hold."
            )
        for name, teacher in self._teacher.items():
            parameter = parameters[name]
            if parameter.shape != teacher.shape:
                raise ValueError(f"{name}: expected shape {tuple(teacher.shape)}, got {tuple(parameter.shape)}.")
            if self.beside_parameters and parameter.device != teacher.device:
                raise ValueError(
                    f"{name}: expected on {teacher.device}, got it on {parameter.device}. Move the module before the "
                    "snapshot, or give the snapshot a device of its own."
                )
            yield parameter, teacher

    def drift(self, module: nn.Module, reduction: str) -> Tensor:
        """Compute the drift of `module` from the teacher, a scalar to differentiate."""
        return drift(self.pairs(module), reduction)

    def add_gradient_(self, module: nn.Module, reduction: str, weight: float, scale: float = 1.0) -> Drift:
        """Add scale * weight * d(drift)/d(theta) to the module's gradients and return the drift."""
        return add_drift_gradient_(self.pairs(module), reduction, weight, scale)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the stored tensors by name: the live ones, not copies, as everywhere in torch."""
        return dict(self._teacher)
