"""Squared drift of parameters from their teacher, with its exact gradient. Pure functions.

With d_i = theta_i - theta_0,i for the i-th tensor and n_i its number of elements, two reductions have a name:

    sum          sum_i ||d_i||^2          the paper's penalty (Algorithm 1, line 9)
    tensor_mean  sum_i ||d_i||^2 / n_i    what the authors' released code computes (published weights 500, 175, 50)

Differences are taken in float32 or wider and before any scaling: w * theta - w * theta_0 would cancel the digits that
carry the drift. Source: Kim, Park, Kim, "Preserve and Personalize", ICLR 2026, arXiv 2505.19519.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .sharding import all_reduce_sum, to_local

REDUCTIONS = {"sum": "Algorithm 1", "tensor_mean": "the authors' released code, published weights 500, 175, 50"}

# Elements per chunk. On a CPU a chunk stays in the cache; on a GPU it is large enough to hide the launch of kernels.
CPU_ELEMENTS, ELEMENTS = 2**19, 2**23


class Drift(NamedTuple):
    """Drift as two scalars on the parameters' device, float32 or wider."""

    value: Tensor  # as the reduction defines it
    squared_distance: Tensor  # ||theta - theta_0||^2 over all elements; of outputs, what grows in proportion to it

    def relative_to(self, squared_norm: float) -> dict[str, float]:
        """Return the ratio of norms of the weights' change and of the pretrained weights, under its log key."""
        return {"drift_relative": (float(self.squared_distance) / max(squared_norm, sys.float_info.min)) ** 0.5}


class Slice(NamedTuple):
    """Views of the same rows of a parameter, its teacher and, if it is trained, its gradient."""

    parameter: Tensor
    teacher: Tensor
    gradient: Tensor | None = None


def drift(pairs: Iterable[tuple[Tensor, Tensor]], reduction: str) -> Tensor:
    """Compute the drift of (parameter, teacher) pairs of equal shape: a scalar to differentiate."""
    pairs = list(pairs)
    terms = [
        _coefficient(p, reduction) * (upcast(to_local(p)) - upcast(to_local(t).to(p.device))).square().sum()
        for p, t in pairs
    ]
    return all_reduce_sum(total(terms), pairs[0][0])


@torch.no_grad()
def add_drift_gradient_(
    pairs: Iterable[tuple[Tensor, Tensor]], reduction: str, weight: float, scale: float = 1.0
) -> Drift:
    """Add d(weight * drift)/d(theta) to each parameter's `.grad`, in one pass without a graph, and return the drift.

    The gradient is 2 * weight * d_i for `sum` and 2 * weight * d_i / n_i for `tensor_mean`. A missing gradient is created.
    Frozen parameters are only measured, and so are all at weight 0. Of parameters sharded by FSDP2, each process handles
    its own part; one all-reduce adds up the sums.

    Args:
        pairs: Parameters with their teachers. A teacher on another device is copied chunk by chunk.
        weight: The paper's lambda.
        scale: Factor on the gradient alone: the loss scale that the gradients in place still carry (fp16).
    """
    pairs = list(pairs)
    scratch: dict[torch.device, Tensor] = {}
    values, squares = [], []
    for coefficient, chunk in _chunks(pairs, reduction, with_gradients=weight != 0):
        parameters = [piece.parameter for piece in chunk]
        flat, differences = _scratch_like(parameters, scratch)
        torch._foreach_copy_(differences, [piece.teacher for piece in chunk], non_blocking=True)
        torch._foreach_sub_(differences, parameters)  # theta_0 - theta: either may be of the narrower dtype
        gradients = [piece.gradient for piece in chunk if piece.gradient is not None]
        if gradients:
            torch._foreach_add_(gradients, differences, alpha=-2.0 * scale * weight * coefficient)
        squares.append(flat.square_().sum())
        values.append(coefficient * squares[-1])
    return Drift(*all_reduce_sum(torch.stack([total(values), total(squares)]), pairs[0][0]))


def _chunks(
    pairs: Iterable[tuple[Tensor, Tensor]], reduction: str, with_gradients: bool
) -> Iterator[tuple[float, list[Slice]]]:
    """Yield slices of one kind, as many as fit into scratch memory, with the coefficient of their squares."""
    groups: dict[tuple, list[Slice]] = {}
    filled: dict[tuple, int] = {}
    for parameter, teacher in pairs:
        tensors = [parameter, teacher]
        if with_gradients and parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            tensors.append(parameter.grad)
        coefficient = _coefficient(parameter, reduction)
        key = (coefficient, *((tensor.device, tensor.dtype) for tensor in tensors))
        for views in slices(*tensors):
            elements = views[0].numel()
            if key in groups and filled[key] + elements > _limit(views[0]):
                yield coefficient, groups.pop(key)
            if key not in groups:
                groups[key], filled[key] = [], 0
            groups[key].append(Slice(*views))
            filled[key] += elements
    for (coefficient, *_), group in groups.items():
        yield coefficient, group


def slices(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield tensors of equal shape as they are if they are small, else views of them along the first dimension."""
    parts = tuple(to_local(tensor) for tensor in tensors)
    if parts[0].numel() <= _limit(parts[0]):
        return iter([parts])
    rows = max(1, _limit(parts[0]) // parts[0][:1].numel())
    return zip(*(part.split(rows) for part in parts), strict=True)


def _scratch_like(tensors: list[Tensor], scratch: dict[torch.device, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return a flat buffer, reused from chunk to chunk, and views of it with the tensors' shapes and strides."""
    sizes, device = [tensor.numel() for tensor in tensors], tensors[0].device
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    buffer = scratch.get(device)
    if buffer is None or buffer.numel() < sum(sizes) or buffer.dtype != dtype:
        buffer = scratch[device] = torch.empty(max(sum(sizes), _limit(tensors[0])), dtype=dtype, device=device)
    flat = buffer[: sum(sizes)]

    def view(part: Tensor, like: Tensor) -> Tensor:
        if like.is_contiguous():
            return part.view(like.shape)
        return part.as_strided(like.shape, torch.empty_like(like, device="meta").stride())

    return flat, [view(part, like) for part, like in zip(flat.split(sizes), tensors, strict=True)]


def _coefficient(parameter: Tensor, reduction: str) -> float:
    """Return the factor of a tensor's squared difference: 1 or 1 / n_i."""
    return 1.0 / max(1, parameter.numel()) if reduction == "tensor_mean" else 1.0


def _limit(tensor: Tensor) -> int:
    return CPU_ELEMENTS if tensor.device.type == "cpu" else ELEMENTS


def upcast(tensor: Tensor) -> Tensor:
    """Return the tensor in float32 or wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def total(terms: Sequence[Tensor]) -> Tensor:
    """Add up scalars, which may be on several devices."""
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()
