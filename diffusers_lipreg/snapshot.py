"""The teacher: the pretrained parameters theta_0, frozen and kept by name."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .drift import REDUCTIONS, Drift, add_drift_gradient_, drift
from .sharding import local, summed


def named_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters under the bare module's names, whatever `DistributedDataParallel` or `torch.compile` put around."""
    while True:
        if isinstance(module, (DistributedDataParallel, DataParallel)):
            module = module.module
        elif isinstance(compiled := getattr(module, "_orig_mod", None), nn.Module):
            module = compiled
        else:
            break
    # Submodules that were compiled one by one have the wrapper's name inside theirs.
    return {".".join(part for part in n.split(".") if part != "_orig_mod"): p for n, p in module.named_parameters()}


def _few(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def exact_dtype(tensor: Tensor) -> torch.dtype:
    """The smallest of the tensor's own type, float16 and bfloat16 that holds its values without loss."""
    alone = tensor.dtype == torch.float32 and local(tensor) is tensor  # processes might not agree on that of shards
    halves = (torch.float16, torch.bfloat16) if alone else ()
    return next((half for half in halves if torch.equal(tensor.to(half).to(tensor.dtype), tensor)), tensor.dtype)


def _equal(name: str, parameter: Tensor, stored: Tensor | None) -> Tensor:
    if stored is None or stored.shape != parameter.shape or not torch.equal(stored.to(parameter), parameter):
        raise ValueError(f"{name}: the stored weights are not those of the module: is it another model?")
    return stored


class TeacherSnapshot:
    """A detached copy of a module's parameters, taken when it is built and matched by name ever after.

    Take it while the module holds the pretrained weights, before any checkpoint is loaded. It belongs in no checkpoint:
    theta_0 comes back from `from_pretrained`.

    Args:
        module: The module to copy from; wrapping by DDP or `torch.compile` does not change the names.
        names: The parameters to copy. Default: all that require a gradient; then the module must keep exactly these
            trainable, so that no parameter escapes the penalty unnoticed.
        dtype: Floating-point type to store. Default: the smallest that loses nothing, which for a checkpoint that was
            stored in float16 is that; a coarser one pulls the model towards a rounded copy of itself.
        device: Where to store, for example `"cpu"` to spare GPU memory; such a teacher is brought to the parameter in
            slices. Default: beside each parameter, and a module that moves away afterwards is an error.
        stored: The pretrained weights by name, held as they are in place of copies; `safetensors.torch.load_file` maps
            them from the disk, and then the teacher takes no memory.

    Raises:
        ValueError: No parameter to copy, a name that the module does not have, a dtype that is not floating point, or
            a stored tensor that is missing or not equal to the parameter.
    """

    reductions = REDUCTIONS

    def __init__(
        self,
        module: nn.Module,
        *,
        names: Iterable[str] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        stored: Mapping[str, Tensor] | None = None,
    ) -> None:
        parameters = named_parameters(module)
        self.covers_all_trainable = names is None
        chosen = [n for n, p in parameters.items() if p.requires_grad] if names is None else list(names)
        if unknown := set(chosen) - set(parameters):
            raise ValueError(f"The module has no parameter named {_few(unknown)}; it has {_few(parameters)}.")
        if not chosen:
            raise ValueError("There is nothing to copy: no parameter requires a gradient and no names were given.")
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"Expected a floating-point dtype, got {dtype}.")
        self.device = None if device is None else torch.device(device)
        self.dtype = dtype
        if stored is None:
            self._teacher = {name: self._kept(parameters[name]) for name in chosen}
        else:
            self.device = torch.device("cpu") if device is None else self.device
            self._teacher = {name: _equal(name, parameters[name], stored.get(name)) for name in chosen}

    def _kept(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        return tensor.to(device=self.device, dtype=self.dtype or exact_dtype(tensor), copy=True)

    @cached_property
    def squared_norm(self) -> float:
        """||theta_0||^2, what a drift is relative to."""
        return sum(summed(local(t).float().square().sum(), t).item() for t in self._teacher.values())

    def pairs(self, module: nn.Module) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each parameter of `module` with its teacher; a name, shape or device that does not fit raises ValueError."""
        parameters = named_parameters(module)
        if missing := self._teacher.keys() - parameters.keys():
            raise ValueError(f"The teacher knows {_few(missing)}, the module does not: is it another model?")
        trainable = {name for name, parameter in parameters.items() if parameter.requires_grad}
        if self.covers_all_trainable and trainable != self._teacher.keys():
            raise ValueError(
                f"Trainable without a teacher: [{_few(trainable - self._teacher.keys())}]; with one, but not trainable: "
                f"[{_few(self._teacher.keys() - trainable)}]. Freeze before the snapshot, or give it names to hold."
            )
        for name, teacher in self._teacher.items():
            parameter = parameters[name]
            if parameter.shape != teacher.shape:
                raise ValueError(f"{name}: expected shape {tuple(teacher.shape)}, got {tuple(parameter.shape)}.")
            if self.device is None and parameter.device != teacher.device:
                raise ValueError(
                    f"{name}: expected on {teacher.device}, got it on {parameter.device}. Move the module before the "
                    "snapshot, or give the snapshot a device of its own."
                )
            yield parameter, teacher

    def drift(self, module: nn.Module, reduction: str) -> Tensor:
        """The drift of `module` from the teacher, a scalar to differentiate."""
        return drift(self.pairs(module), reduction)

    def add_gradient_(self, module: nn.Module, reduction: str, weight: float, scale: float = 1.0) -> Drift:
        """Adds scale * weight * d(drift)/d(theta) to the module's gradients; returns the drift."""
        return add_drift_gradient_(self.pairs(module), reduction, weight, scale)

    @contextmanager
    def applied_to(self, module: nn.Module) -> Iterator[nn.Module]:
        """Puts the teacher's weights into `module` for a `with` block; leaving it, even by an exception, undoes that."""
        swapped = [(parameter, teacher, parameter.detach().clone()) for parameter, teacher in self.pairs(module)]
        try:
            for parameter, teacher, _ in swapped:
                parameter.data.copy_(teacher)
            yield module
        finally:
            for parameter, _, student in swapped:
                parameter.data.copy_(student)

    def to(self, device: torch.device | str) -> "TeacherSnapshot":
        """Moves the stored tensors to `device`, which from then on is the snapshot's own; returns itself."""
        self.device = torch.device(device)
        self._teacher = {name: teacher.to(self.device) for name, teacher in self._teacher.items()}
        return self

    def pin_memory(self) -> "TeacherSnapshot":
        """Pins a teacher stored in host memory, so that it travels to the GPU beside other work; returns itself."""
        self._teacher = {name: teacher.pin_memory() for name, teacher in self._teacher.items()}
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """The stored tensors by name: the live ones, not copies, as everywhere in torch."""
        return dict(self._teacher)

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Overwrites the stored tensors; other names or shapes than theirs raise ValueError and overwrite nothing."""
        expected = {name: tuple(teacher.shape) for name, teacher in self._teacher.items()}
        given = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
        for name in sorted(expected.keys() | given.keys()):
            if expected.get(name) != given.get(name):
                raise ValueError(f"{name}: expected shape {expected.get(name)}, got {given.get(name)} (None: no such name).")
        for name, teacher in self._teacher.items():
            self._teacher[name] = self._kept(state_dict[name]).to(teacher.device)
        self.__dict__.pop("squared_norm", None)
