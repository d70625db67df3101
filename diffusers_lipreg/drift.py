"""Squared drift of parameters from their teacher, with its exact gradient. Pure functions.

With d_i = theta_i - theta_0,i for the i-th of the tensors and n_i its number of elements, two reductions have a name:

    sum          sum_i ||d_i||^2          the paper's penalty (Algorithm 1, line 9)
    tensor_mean  sum_i ||d_i||^2 / n_i    what the authors' released code computes (published weights 500, 175, 50)

Differences are taken in float32 at least, and before anything is multiplied: w * theta - w * theta_0 would cancel the
digits that carry the drift. Source: Kim, Park, Kim, "Preserve and Personalize", ICLR 2026, arXiv 2505.19519.
"""

from collections.abc import Iterable, Iterator
from functools import cache
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from .sharding import local, summed

REDUCTIONS = ("sum", "tensor_mean")

# Elements handled at a time (or one row, if that is longer): on a CPU so few that scratch stays in its cache, and memory
# is read and written no more than it must be; elsewhere so many that starting kernels costs little.
CPU_ELEMENTS, ELEMENTS = 2**19, 2**24

Batch = list[tuple[int, tuple[Tensor, ...]]]  # the number of a pair, and slices of parameter, teacher and gradient


class Drift(NamedTuple):
    """How far parameters are from their teacher, as two scalars, float32 or wider, on the parameters' device."""

    value: Tensor  # as the reduction defines it
    squared_distance: Tensor  # ||theta - theta_0||^2 over all elements, whatever the reduction


def _coefficient(parameter: Tensor, reduction: str) -> float:
    """What a squared difference in this tensor counts for."""
    return 1.0 / max(1, parameter.numel()) if reduction == "tensor_mean" else 1.0


def _wide(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor in float32 at least, on the device of `like`."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return tensor.to(device=like.device, dtype=dtype, non_blocking=like.device.type != "cpu")


def _limit(tensor: Tensor) -> int:
    return CPU_ELEMENTS if tensor.device.type == "cpu" else ELEMENTS


def slices(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of equally shaped tensors along their first dimension, whatever their memory format."""
    whole = [torch.atleast_1d(local(tensor)) for tensor in tensors]
    rows = max(1, _limit(tensors[0]) // max(1, whole[0][:1].numel()))
    return zip(*(tensor.split(rows) for tensor in whole), strict=True)


def _batches(groups: Iterable[tuple[Tensor, ...]]) -> Iterator[Batch]:
    """Slices of equally shaped tensors, each with the number of its group: a large tensor's alone, small ones together."""
    batch: Batch = []
    for number, group in enumerate(groups):
        for views in slices(*group):
            elements = sum(first.numel() for _, (first, *_) in batch) + views[0].numel()
            if batch and (elements > _limit(views[0]) or len(views) != len(batch[0][1])):
                yield batch
                batch = []
            batch.append((number, views))
    yield batch


@cache
def _copies(device: torch.device) -> torch.cuda.Stream:
    """The stream on which teachers come to this GPU: one for all steps, for memory is kept by stream."""
    return torch.cuda.Stream(device)


def _prefetched(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Batches with their teachers on the GPU: while one is worked on, the next comes from (pinned) host memory.

    Two events order the streams: work on a batch waits until its copy is there, and a copy waits for the work before
    the batch that is worked on, whose memory it may get. So no more than three batches of the teacher are there at a time.
    """
    copies, work = _copies(device), torch.cuda.current_stream(device)

    def bring(batch: Batch) -> tuple[Batch, torch.cuda.Event]:
        copies.wait_stream(work)
        with torch.cuda.stream(copies):
            moved = [(n, (p, teacher.to(p.device, non_blocking=True), *g)) for n, (p, teacher, *g) in batch]
            return moved, copies.record_event()

    coming = None
    for batch in chain(batches, [None]):
        ready, coming = coming, bring(batch) if batch is not None else None
        if ready is not None:
            work.wait_event(ready[1])
            yield ready[0]


def _total(terms: list[Tensor]) -> Tensor:
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()  # a model may be spread over devices


def drift(pairs: Iterable[tuple[Tensor, Tensor]], reduction: str) -> Tensor:
    """The drift as a scalar to differentiate; `pairs` are parameter and teacher, of equal shape."""
    listed = list(pairs)
    differences = [_wide(local(p), p) - _wide(local(t), p) for p, t in listed]
    terms = [d.square().sum() * _coefficient(p, reduction) for d, (p, _) in zip(differences, listed, strict=True)]
    return summed(_total(terms), listed[0][0])


@torch.no_grad()
def add_drift_gradient_(
    pairs: Iterable[tuple[Tensor, Tensor]], reduction: str, weight: float, scale: float = 1.0
) -> Drift:
    """Adds d(weight * drift)/d(theta) to every parameter's `.grad` and returns the drift, in one pass.

    The gradient is 2 * weight * d_i for `sum` and 2 * weight * d_i / n_i for `tensor_mean`. A parameter that has no
    gradient yet gets one, as autograd would give it; a frozen one, or any with weight 0, is only measured. Parameters
    sharded by FSDP2 are worked on where they lie, with one all-reduce of the sums. `weight` is the paper's lambda,
    `scale` a factor on the gradient alone: the loss scale, while the gradients it joins are still scaled (fp16).
    """
    groups: list[tuple[Tensor, ...]] = []
    coefficients = []
    for parameter, teacher in pairs:
        coefficients.append(_coefficient(parameter, reduction))
        if weight != 0 and parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            groups.append((parameter, teacher, parameter.grad))
        else:
            groups.append((parameter, teacher))
    # Made before the loop: small tensors kept between large ones that are freed would leave holes in memory.
    distances = [torch.zeros((), dtype=torch.promote_types(p.dtype, torch.float32), device=p.device) for p, *_ in groups]
    streamed = groups[0][0].is_cuda and groups[0][1].device.type == "cpu"
    batches = _prefetched(_batches(groups), groups[0][0].device) if streamed else _batches(groups)
    for batch in batches:
        numbers, views = zip(*batch, strict=True)
        parameters, teachers, *gradients = zip(*views, strict=True)
        anchors = [_wide(t, p) for t, p in zip(teachers, parameters, strict=True)]
        differences = torch._foreach_sub([_wide(p, p) for p in parameters], anchors)
        for number, square in zip(numbers, torch._foreach_mul(differences, differences), strict=True):
            distances[number] += square.sum()
        if gradients:
            torch._foreach_mul_(differences, [2.0 * scale * weight * coefficients[number] for number in numbers])
            torch._foreach_add_(gradients[0], differences)
    value = _total([d * c for d, c in zip(distances, coefficients, strict=True)])
    return Drift(*summed(torch.stack([value, _total(distances)]), groups[0][0]))
