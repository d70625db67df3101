"""Squared drift of parameters from their teacher, with its exact gradient. Pure functions.

With d_i = theta_i - theta_0,i for the i-th of the tensors and n_i its number of elements, two reductions have a name:

    sum          sum_i ||d_i||^2          the paper's penalty (Algorithm 1, line 9)
    tensor_mean  sum_i ||d_i||^2 / n_i    what the authors' released code computes (published weights 500, 175, 50)

Differences are taken in float32 at least, and before anything is multiplied: w * theta - w * theta_0 would cancel the
digits that carry the drift. Source: Kim, Park, Kim, "Preserve and Personalize", ICLR 2026, arXiv 2505.19519.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from .sharding import local, summed

REDUCTIONS = ("sum", "tensor_mean")

# Elements handled at a time (or one row, if that is longer): so few that scratch stays in the cache, and memory is read
# and written no more than it must be; on a GPU, where starting kernels costs, more.
CPU_ELEMENTS, ELEMENTS = 2**19, 2**23


class Batch(NamedTuple):
    """Small pairs, or some rows of a large one, of equal types and devices."""

    coefficient: float  # what a squared difference in them counts for
    pairs: list[tuple[Tensor, Tensor]]  # parameter and teacher, as far as they are on this process
    trained: list[Tensor]  # the whole parameters, if they are to get a gradient
    rows: slice | None = None  # of the one large parameter

    @property
    def device(self) -> torch.device:
        return self.pairs[0][0].device

    @property
    def elements(self) -> int:
        return sum(parameter.numel() for parameter, _ in self.pairs)

    @property
    def gradients(self) -> list[Tensor]:
        """What to add to; zeros, where there is no gradient yet."""
        gradients = [local(_gradient(parameter)) for parameter in self.trained]
        return gradients if self.rows is None else [gradient[self.rows] for gradient in gradients]


class Drift(NamedTuple):
    """How far parameters are from their teacher, as two scalars, float32 or wider, on the parameters' device."""

    value: Tensor  # as the reduction defines it
    squared_distance: Tensor  # ||theta - theta_0||^2 over all elements, whatever the reduction


def _coefficient(parameter: Tensor, reduction: str) -> float:
    """What a squared difference in this whole tensor counts for."""
    return 1.0 / max(1, parameter.numel()) if reduction == "tensor_mean" else 1.0


def _wide(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor in float32 at least, on the device of `like`."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return tensor.to(device=like.device, dtype=dtype, non_blocking=like.device.type != "cpu")


def _limit(tensor: Tensor) -> int:
    return CPU_ELEMENTS if tensor.device.type == "cpu" else ELEMENTS


def _rows(tensor: Tensor) -> int:
    """How many rows are handled at a time."""
    return max(1, _limit(tensor) // tensor[:1].numel())


def slices(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Equally shaped tensors as they are if they are small, else views along their first dimension."""
    whole = tuple(local(tensor) for tensor in tensors)
    if whole[0].numel() <= _limit(whole[0]):
        return iter([whole])
    return zip(*(tensor.split(_rows(whole[0])) for tensor in whole), strict=True)


def _gradient(parameter: Tensor) -> Tensor:
    """The parameter's gradient to add to; zeros, if it has none yet."""
    parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return parameter.grad


def _sliced(pair: tuple[Tensor, Tensor], trained: list[Tensor], coefficient: float) -> Iterator[Batch]:
    """A large pair, some rows at a time."""
    rows = _rows(pair[0])
    for i, (parameter, teacher) in enumerate(slices(*pair)):
        yield Batch(coefficient, [(parameter, teacher)], trained, slice(i * rows, (i + 1) * rows))


def _together(alike: Iterable[tuple[tuple[Tensor, Tensor], list[Tensor]]], coefficient: float) -> Iterator[Batch]:
    """Small pairs of one kind, as many as may be handled at a time."""
    batch, elements = Batch(coefficient, [], []), 0
    for pair, trained in alike:
        elements += pair[0].numel()
        if batch.pairs and elements > _limit(pair[0]):
            yield batch
            batch, elements = Batch(coefficient, [], []), pair[0].numel()
        batch.pairs.append(pair)
        batch.trained.extend(trained)
    yield batch


def _batched(pairs: Iterable[tuple[Tensor, Tensor]], reduction: str, with_gradients: bool) -> list[Batch]:
    """All pairs; if asked, with the parameters that are to get a gradient."""
    batches: list[Batch] = []
    small: dict[tuple, list[tuple[tuple[Tensor, Tensor], list[Tensor]]]] = {}
    for parameter, teacher in pairs:
        pair, coefficient = (local(parameter), local(teacher)), _coefficient(parameter, reduction)
        trained = [parameter] if with_gradients and parameter.requires_grad else []
        if pair[0].numel() > _limit(pair[0]):
            batches.extend(_sliced(pair, trained, coefficient))
        else:
            kind = (coefficient, len(trained), *((tensor.dtype, tensor.device) for tensor in pair))
            small.setdefault(kind, []).append((pair, trained))
    for (coefficient, *_), alike in small.items():
        batches.extend(_together(alike, coefficient))
    return batches


def _views(scratch: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """As much of the flat `scratch` as the tensors need, whole and in their shapes and memory formats."""
    sizes = [tensor.numel() for tensor in tensors]
    flat = scratch[: sum(sizes)]

    def view(part: Tensor, like: Tensor) -> Tensor:
        if like.is_contiguous():
            return part.view(like.shape)
        return part.as_strided(like.shape, torch.empty_like(like, device="meta").stride())

    return flat, [view(part, tensor) for part, tensor in zip(flat.split(sizes), tensors, strict=True)]


def _total(terms: Sequence[Tensor], coefficients: Sequence[float] | None = None) -> Tensor:
    stacked = torch.stack([term.to(terms[0].device) for term in terms])  # a model may be spread over devices
    return (stacked if coefficients is None else stacked * stacked.new_tensor(coefficients)).sum()


def drift(pairs: Iterable[tuple[Tensor, Tensor]], reduction: str) -> Tensor:
    """The drift as a scalar to differentiate; `pairs` are parameter and teacher, of equal shape."""
    listed = list(pairs)
    differences = [_wide(local(p), p) - _wide(local(t), p) for p, t in listed]
    terms = [d.square().sum() * _coefficient(p, reduction) for d, (p, _) in zip(differences, listed, strict=True)]
    return summed(_total(terms), listed[0][0])


@torch.no_grad()
def _worked_on(batches: Sequence[Batch], factor: float) -> Iterator[Tensor]:
    """Adds `factor` times the differences to the gradients, a batch at a time, and gives the sum of its squares."""
    dtypes = {parameter.dtype for batch in batches for parameter, _ in batch.pairs}
    dtype = reduce(torch.promote_types, dtypes, torch.float32)
    # All that the loop needs is made before it: small tensors that stay between large ones that go would leave holes.
    squares = [torch.empty((), dtype=dtype, device=batch.device) for batch in batches]
    longest = {batch.device: batch.elements for batch in sorted(batches, key=lambda batch: batch.elements)}
    scratch = {device: torch.empty(elements, dtype=dtype, device=device) for device, elements in longest.items()}
    for batch, square in zip(batches, squares, strict=True):
        step = -factor * batch.coefficient  # of theta_0 - theta
        parameters, teachers = zip(*batch.pairs, strict=True)
        flat, differences = _views(scratch[batch.device], parameters)
        torch._foreach_copy_(differences, teachers, non_blocking=True)
        torch._foreach_sub_(differences, parameters)  # theta_0 - theta: either may be of the narrower type
        if batch.trained:
            torch._foreach_add_(batch.gradients, differences, alpha=step)
        yield torch.sum(flat.square_(), dim=0, out=square)  # in pairs, while torch.dot adds up an error of 1e-4


def _drift(batches: Sequence[Batch], squares: Sequence[Tensor], like: Tensor) -> Drift:
    value = _total(squares, [batch.coefficient for batch in batches])
    return Drift(*summed(torch.stack([value, _total(squares)]), like))


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
    listed = list(pairs)
    batches = _batched(listed, reduction, with_gradients=weight != 0)
    return _drift(batches, list(_worked_on(batches, 2.0 * scale * weight)), listed[0][0])
