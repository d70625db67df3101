"""Squared drift of parameters from their teacher, with its exact gradient. Pure functions.

With d_i = theta_i - theta_0,i for the i-th of the tensors and n_i its number of elements, two reductions have a name:

    sum          sum_i ||d_i||^2          the paper's penalty (Algorithm 1, line 9)
    tensor_mean  sum_i ||d_i||^2 / n_i    what the authors' released code computes (published weights 500, 175, 50)

Differences are taken in float32 at least, and before anything is multiplied: w * theta - w * theta_0 would cancel the
digits that carry the drift. Source: Kim, Park, Kim, "Preserve and Personalize", ICLR 2026, arXiv 2505.19519.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .sharding import local, summed

REDUCTIONS = ("sum", "tensor_mean")

SLICE_ELEMENTS = 2**22  # at a time, or one row if that is longer: 16 MiB of float32 as scratch for any tensor


class Drift(NamedTuple):
    """How far parameters are from their teacher, as two scalars, float32 or wider, on the parameters' device."""

    value: Tensor  # as the reduction defines it
    squared_distance: Tensor  # ||theta - theta_0||^2 over all elements, whatever the reduction


def _coefficient(parameter: Tensor, reduction: str) -> float:
    """What a squared difference in this tensor counts for."""
    return 1.0 / max(1, parameter.numel()) if reduction == "tensor_mean" else 1.0


def _difference(parameter: Tensor, teacher: Tensor) -> Tensor:
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return parameter.to(dtype) - teacher.to(device=parameter.device, dtype=dtype, non_blocking=parameter.device.type != "cpu")


def _slices(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of equally shaped tensors along their first dimension, whatever their memory format."""
    whole = [torch.atleast_1d(local(tensor)) for tensor in tensors]
    row_elements = max(1, whole[0][:1].numel())
    return zip(*(tensor.split(max(1, SLICE_ELEMENTS // row_elements)) for tensor in whole), strict=True)


def _squared_distance(parameter: Tensor, teacher: Tensor, gradient: Tensor | None, factor: float) -> Tensor:
    """||parameter - teacher||^2; on the way adds factor * (parameter - teacher) to `gradient`, if there is one."""
    terms = []
    for views in _slices(parameter, teacher, *([] if gradient is None else [gradient])):
        difference = _difference(*views[:2])
        if gradient is not None:
            views[2].add_(difference, alpha=factor)
        terms.append(difference.square_().sum())
    return torch.stack(terms).sum()


def _total(terms: list[Tensor]) -> Tensor:
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()  # a model may be spread over devices


def drift(pairs: Iterable[tuple[Tensor, Tensor]], reduction: str) -> Tensor:
    """The drift as a scalar to differentiate; `pairs` are parameter and teacher, of equal shape."""
    listed = list(pairs)
    terms = [_difference(local(p), local(t)).square().sum() * _coefficient(p, reduction) for p, t in listed]
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
    values, squares = [], []
    for parameter, teacher in pairs:
        coefficient = _coefficient(parameter, reduction)
        gradient = None
        if weight != 0 and parameter.requires_grad:
            gradient = parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        squares.append(_squared_distance(parameter, teacher, gradient, 2.0 * scale * weight * coefficient))
        values.append(squares[-1] * coefficient)
    return Drift(*summed(torch.stack([_total(values), _total(squares)]), parameter))
