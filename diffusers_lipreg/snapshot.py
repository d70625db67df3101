"""The teacher: the pretrained parameters theta_0, frozen and kept by name."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .drift import REDUCTIONS, Drift, add_drift_gradient_, drift, slices
from .sharding import all_reduce_sum, to_local


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
    return {n.replace("_orig_mod.", ""): p for n, p in module.named_parameters()}


def _few(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _squared_norm(tensor: Tensor, change: Callable[[Tensor], Tensor] = Tensor.float) -> float:
    """||change(tensor)||^2 of the whole tensor, in float32, with no more memory than a slice takes."""
    total = torch.zeros((), device=tensor.device)
    for (part,) in slices(tensor):
        total += change(part).square().sum()
    return all_reduce_sum(total, tensor).item()


def exact_dtype(tensor: Tensor) -> torch.dtype:
    """The smallest of the tensor's own type, float16 and bfloat16 that holds its values without loss."""
    alone = tensor.dtype == torch.float32 and to_local(tensor) is tensor  # processes might not agree on that of shards
    halves = (torch.float16, torch.bfloat16) if alone else ()
    for half in halves:
        if all(torch.equal(part.to(half).to(part.dtype), part) for (part,) in slices(tensor)):
            return half
    return tensor.dtype


def rounding_error(tensor: Tensor, dtype: torch.dtype) -> float:
    """The root mean square, over the tensor's elements, of what rounding them to `dtype` changes."""
    squares = _squared_norm(tensor, lambda part: part.to(dtype).float() - part.float())
    return (squares / max(1, tensor.numel())) ** 0.5


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape hold the same numbers; compared in slices, so that nothing large is copied."""
    wide = torch.promote_types(one.dtype, other.dtype)
    return all(torch.equal(a.to(wide), b.to(a.device, wide)) for a, b in slices(one, other))


@torch.no_grad()
def _equal(name: str, parameter: Tensor, stored: Tensor | None) -> Tensor:
    """The stored tensor, if it holds what the parameter does."""
    if to_local(parameter) is not parameter:
        raise ValueError(f"{name} is sharded: stored weights, which are whole, cannot be its teacher.")
    if stored is None or not (stored.shape == parameter.shape and _same(parameter, stored)):
        raise ValueError(f"{name}: the stored weights are not those of the module: is it another model, or a converted one?")
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
            stored in float16 is that; a coarser one pulls the model towards a rounded copy of itself, off by
            `rounding_error`.
        device: Where to store, for example `"cpu"` to spare GPU memory; such a teacher is pinned and brought to the
            parameter in slices. Default: beside each parameter, and a module that moves away afterwards is an error.
        stored: The pretrained weights by name, held as and where they are in place of copies;
            `safetensors.torch.load_file` maps them from the disk, and then the teacher takes no memory.

    Raises:
        ValueError: No parameter to copy, a name that the module does not have, a dtype that is not floating point, a
            stored tensor that is missing or not equal to the parameter, or a dtype or device beside `stored`.
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
        if stored is not None and (dtype is not None or device is not None):
            raise ValueError("Stored weights are held as they are: give a dtype or device, or `stored`, not both.")
        self.device = None if device is None else torch.device(device)
        self.dtype = dtype
        if stored is None:
            self._teacher = {name: self._kept(parameters[name]) for name in chosen}
        else:
            self.device = torch.device("cpu")
            self._teacher = {name: _equal(name, parameters[name], stored.get(name)) for name in chosen}

    def _kept(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        kept = tensor.to(device=self.device, dtype=self.dtype or exact_dtype(tensor), copy=True)
        return kept.pin_memory() if tensor.is_cuda and kept.device.type == "cpu" and to_local(kept) is kept else kept

    @cached_property
    def squared_norm(self) -> float:
        """||theta_0||^2, what a drift is relative to."""
        return sum(map(_squared_norm, self._teacher.values()))

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
