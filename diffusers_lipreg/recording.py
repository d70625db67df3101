"""Calls of a module, recorded while a pipeline of diffusers works, and replayed. OutputSnapshot is made of them.

A call is kept in the form in which the pipeline makes it, so nothing here knows a family of models.
"""

import copy
import hashlib
import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .drift import upcast

Store = dict[Any, Tensor]  # tensors in host memory, by dtype, shape and content: equal ones are held once


class Chain(NamedTuple):
    """A chain of denoising steps that a pipeline can sample again."""

    prompt: str
    steps: int
    seed: int

    def sample(self, pipeline: Any, **options: Any) -> None:
        """Let a pipeline sample the chain, by default without guidance; it and its scheduler stay as they are.

        Global random numbers that a sampler draws are given back.
        """
        pipeline = copy.copy(pipeline)  # a call leaves attributes on the pipeline
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
        pipeline.set_progress_bar_config(disable=True)
        takes = inspect.signature(type(pipeline).__call__).parameters
        configs = [part.config for part in pipeline.components.values() if hasattr(part, "config")]
        distilled = any(getattr(config, "guidance_embeds", False) for config in configs)
        # For a model that was distilled with guidance, `guidance_scale` is an input, and the pipeline has its default.
        if "true_cfg_scale" in takes:
            options.setdefault("true_cfg_scale", 1.0)
        elif "guidance_scale" in takes and not distilled:
            options.setdefault("guidance_scale", 1.0)
        output_type = "latent" if "vae" in pipeline.components else "pt"
        generator = torch.Generator().manual_seed(self.seed)
        device = pipeline.device
        with fork_random(device):
            pipeline(
                prompt=self.prompt,
                num_inference_steps=self.steps,
                generator=generator,
                output_type=output_type,
                **options,
            )


class Call(NamedTuple):
    """A call of a module, with what it returned; all tensors are in host memory."""

    chain: int
    position: float  # in the chain, from 0 for noise to 1
    number: int  # among the calls of the chain
    inputs: Any  # (args, kwargs)
    shared: Any  # a tree like `inputs` that says of each leaf whether other calls of the chain get an equal tensor
    taken: tuple[int, ...]  # of the output's tensors, those that the pipeline takes
    prediction: list[Tensor]  # these, each with one row for a sample
    timestep: float  # nan for a module that takes none

    @property
    def rows(self) -> int:
        """Return the number of samples, of which guidance makes two."""
        return len(self.prediction[0])

    @property
    def mean_square(self) -> float:
        """Return the mean square of the elements of the prediction."""
        squares = sum(tensor.double().square().sum().item() for tensor in self.prediction)
        return squares / sum(tensor.numel() for tensor in self.prediction)

    @property
    def kind(self) -> Any:
        """Return what calls have in common whose inputs may be joined along their first dimension."""

        def describe(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return repr(leaf)
            joined = leaf.ndim == 0 or len(leaf) == self.rows
            return (leaf.shape, leaf.dtype) if joined else id(leaf)  # others have to be the same tensor

        shapes = tuple(tensor.shape for tensor in self.prediction)
        return repr(_map(describe, self.inputs)), self.taken, shapes

    def with_conditions(self, args: Any, kwargs: Any) -> Any:
        """Return the inputs of the call, (args, kwargs), with the conditions of another in place of its own."""

        def choose(shared: bool, now: Any, recorded: Any) -> Any:
            return now if shared or not isinstance(recorded, Tensor) else recorded.to(now.device)

        return _map(choose, self.shared, (args, kwargs), self.inputs)


class Output:
    """The output of a model, which notes the tensors that a pipeline takes out of it.

    A text encoder may return the hidden states of all its layers, of which the pipeline uses one.
    """

    def __init__(self, output: Any, taken: list[Tensor]) -> None:
        self._output = output
        self._taken = taken

    def _take(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            self._taken.append(value)
        return Output(value, self._taken) if isinstance(value, (tuple, list)) else value

    def __getattr__(self, name: str) -> Any:
        return self._take(getattr(self._output, name))

    def __getitem__(self, key: Any) -> Any:
        return self._take(self._output[key])

    def __len__(self) -> int:
        return len(self._output)


def pipeline_networks(pipeline: Any) -> dict[str, nn.Module]:
    """Return the networks of a pipeline by part."""
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def fork_random(device: torch.device) -> AbstractContextManager[None]:
    """Give the random numbers of the CPU and of `device` back that are drawn inside a `with` block."""
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng([device.index or 0], device_type=device.type)


@contextmanager
def eval_mode(*modules: nn.Module) -> Iterator[None]:
    """Keep modules in eval mode inside a `with` block, uncompiled, and give each of their parts its own mode back."""
    modes = {part: part.training for module in modules for part in module.modules()}
    try:
        for module in modules:
            module.eval()
        with torch.compiler.set_stance("force_eager"):  # compiled for training, not for this
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def record(
    pipeline: Any, module: nn.Module, chain: Chain, number: int, store: Store, options: Mapping[str, Any]
) -> list[Call]:
    """Return the calls of the bare `module` while `pipeline` samples chain `number`; their tensors go into `store`."""
    inputs: list[Any] = []
    outputs: list[tuple[list[Tensor], list[Tensor]]] = []  # all tensors, and those that the pipeline takes
    known: dict[int, tuple[Any, Tensor]] = {}  # with the tensor itself, so that no other gets its id

    def keep(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in known:
            host = _to_host(leaf)
            known[id(leaf)] = leaf, store.setdefault(_content(host), host)
        return known[id(leaf)][1]

    def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        inputs.append(_map(keep, (args, kwargs)))
        if not isinstance(output, Mapping):  # a tuple of which the pipeline takes the first and only tensor
            outputs.append((floats(output), floats(output)))
            return None
        outputs.append((floats(output), []))
        return Output(output, outputs[-1][1])

    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        chain.sample(pipeline, **options)
    finally:
        handle.remove()
    uses = Counter(key for tree in inputs for key in {id(leaf) for leaf in tensors(tree)})
    calls = []
    for place, (tree, (found, used)) in enumerate(zip(inputs, outputs, strict=True)):
        taken = tuple(i for i, tensor in enumerate(found) if any(tensor is one for one in used or found))
        prediction = [_to_host(found[i]) for i in taken]
        shared = _map(lambda leaf: isinstance(leaf, Tensor) and uses[id(leaf)] > 1, tree)
        position = (place + 0.5) / len(inputs)
        calls.append(Call(number, position, place, tree, shared, taken, prediction, _timestep(module, *tree)))
    return calls


def replay(module: nn.Module, calls: Sequence[Call]) -> list[Tensor]:
    """Return the prediction of a bare module for a batch of calls of one kind, or for a single call."""
    device = next(module.parameters()).device

    def join(*leaves: Any) -> Any:
        first = leaves[0]
        if not isinstance(first, Tensor):
            return first
        if len(leaves) > 1 and first.ndim == 0:
            first = torch.cat([leaf.expand(call.rows) for leaf, call in zip(leaves, calls, strict=True)])
        elif len(leaves) > 1 and len(first) == calls[0].rows:
            first = torch.cat(leaves)
        return first.to(device, non_blocking=True)

    args, kwargs = _map(join, *(call.inputs for call in calls))
    return prediction_of(module(*args, **kwargs), calls[0])


def prediction_of(output: Any, call: Call) -> list[Tensor]:
    """Return the tensors of a module's output that the pipeline takes from that of `call`."""
    found = floats(output)
    return [found[i] for i in call.taken]


def squared_error(prediction: Sequence[Tensor], calls: Sequence[Call]) -> Tensor:
    """Return the mean over calls and elements of the squared difference from the recorded prediction, float32 or wider."""
    terms = [
        (upcast(e) - upcast(e_0)).square() for e, e_0 in zip(prediction, _recorded(calls, prediction), strict=True)
    ]
    return torch.stack([term.sum() for term in terms]).sum() / sum(term.numel() for term in terms)


@torch.no_grad()
def can_be_joined(module: nn.Module, calls: Sequence[Call]) -> bool:
    """Say whether a bare module predicts for a batch of calls what is recorded of each, but for rounding."""
    # Whether all inputs of a model have the samples along their first dimension is nowhere written down, so it is tried.
    try:
        prediction = replay(module, calls)
        pairs = list(zip(prediction, _recorded(calls, prediction), strict=True))
        return all(
            bool((e.float() - e_0.float()).norm() <= max(2e-3, torch.finfo(e_0.dtype).eps ** 0.5) * e_0.float().norm())
            for e, e_0 in pairs
        )
    except Exception:  # the module refuses the batch, for whatever reason
        return False


def _recorded(calls: Sequence[Call], prediction: Sequence[Tensor]) -> list[Tensor]:
    parts = zip(*(call.prediction for call in calls), strict=True)
    return [torch.cat(part).to(e.device, non_blocking=True) for part, e in zip(parts, prediction, strict=True)]


def tensors(tree: Any) -> list[Tensor]:
    """Return the tensors in nested dicts, lists and tuples."""
    leaves: list[Any] = []
    _map(leaves.append, tree)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def floats(output: Any) -> list[Tensor]:
    """Return the floating-point tensors in the output of a model, each once."""
    found = tensors(dict(output) if isinstance(output, Mapping) else output)
    return list({id(tensor): tensor for tensor in found if tensor.is_floating_point()}.values())


def _map(function: Callable[..., Any], *trees: Any) -> Any:
    """Apply a function to the leaves of nested dicts, lists and tuples, which all are built alike."""
    first = trees[0]
    if isinstance(first, dict):
        return {key: _map(function, *(tree[key] for tree in trees)) for key in first}
    if isinstance(first, (list, tuple)):
        return type(first)([_map(function, *parts) for parts in zip(*trees, strict=True)])
    return function(*trees)


def _to_host(tensor: Tensor) -> Tensor:
    """Copy a tensor to host memory, pinned if it comes from a GPU."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return host.copy_(tensor.detach())


def _content(tensor: Tensor) -> Any:
    """Return what tensors that are equal bit by bit have in common."""
    return tensor.dtype, tensor.shape, hashlib.sha1(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).digest()


def _timestep(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
    """Return the timestep of a call in the module's own units."""
    signature = inspect.signature(type(module).forward)
    timestep = signature.bind_partial(module, *args, **kwargs).arguments.get("timestep")
    if timestep is None:
        return math.nan
    return float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)
