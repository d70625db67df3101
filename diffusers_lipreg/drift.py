"""Squared drift of parameters from their teacher, with its exact gradient. Pure functions.

With d_i = theta_i - theta_0,i for the i-th of the tensors and n_i its number of elements, two reductions have a name:

    sum          sum_i ||d_i||^2          the paper's penalty (Algorithm 1, line 9)
    tensor_mean  sum_i ||d_i||^2 / n_i    what the authors' released code computes (published weights 500, 175, 50)

Differences are taken in float32 at least, and before anything is multiplied: w * theta - w * theta_0 would cancel the
digits that carry the drift. Source: Kim, Park, Kim, "Preserve and Personalize", ICLR 2026, arXiv 2505.19519.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, reduce
from itertools import chain
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

    @property
    def joined(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Parameter, teacher and gradient, flat, if they are one tensor each, on one device and without gaps."""
        if len(self.pairs) != 1 or not self.trained:
            return None
        (parameter, teacher), gradient = self.pairs[0], self.gradients[0]
        without_gaps = parameter.is_contiguous() and teacher.is_contiguous() and gradient.is_contiguous()
        if parameter.device != teacher.device or not without_gaps:
            return None
        # Views remember what they are of, and a compiler would begin anew for each shape of that; `data` forgets it.
        return parameter.view(-1).data, teacher.view(-1).data, gradient.view(-1).data


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


@cache
def _copies(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Event]:
    """The stream on which teachers come to this GPU, one for all steps, for memory is kept by stream; and what it awaits."""
    return torch.cuda.Stream(device), torch.cuda.Event()


def _brought(batch: Batch) -> tuple[Batch, torch.cuda.Event | None]:
    """A batch with its teachers on its device, at once or, from host memory to a GPU, when the event has come."""
    (parameter, teacher), device = batch.pairs[0], batch.device
    if not parameter.is_cuda or teacher.is_cuda:
        return batch, None
    stream, worked = _copies(device)
    stream.wait_event(worked)
    with torch.cuda.stream(stream):
        pairs = [(parameter, teacher.to(device, non_blocking=True)) for parameter, teacher in batch.pairs]
        return batch._replace(pairs=pairs), stream.record_event()


def _prefetched(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Batches with their teachers: while a GPU works on one, the next comes from (pinned) host memory.

    Two events order the streams: work on a batch waits until its copy is there, and a copy waits for the work before
    the batch that is worked on, whose memory it may get; the first two come while the GPU is still busy with backward.
    No more than three batches of the teacher are there at a time.
    """
    coming = None
    for batch in chain(batches, [None]):
        ready, coming = coming, _brought(batch) if batch is not None else None
        if ready is None:
            continue
        here, arrived = ready
        if arrived is not None:
            torch.cuda.current_stream(here.device).wait_event(arrived)
        yield here
        if arrived is not None:
            _copies(here.device)[1].record(torch.cuda.current_stream(here.device))


def _total(terms: Sequence[Tensor], coefficients: Sequence[float] | None = None) -> Tensor:
    stacked = torch.stack([term.to(terms[0].device) for term in terms])  # a model may be spread over devices
    return (stacked if coefficients is None else stacked * stacked.new_tensor(coefficients)).sum()


def drift(pairs: Iterable[tuple[Tensor, Tensor]], reduction: str) -> Tensor:
    """The drift as a scalar to differentiate; `pairs` are parameter and teacher, of equal shape."""
    listed = list(pairs)
    differences = [_wide(local(p), p) - _wide(local(t), p) for p, t in listed]
    terms = [d.square().sum() * _coefficient(p, reduction) for d, (p, _) in zip(differences, listed, strict=True)]
    return summed(_total(terms), listed[0][0])


def _join(parameter: Tensor, teacher: Tensor, gradient: Tensor, step: Tensor) -> Tensor:
    """Adds `step` times the difference to the gradient and gives its sum of squares: a compiler makes one pass of it."""
    difference = teacher.to(step.dtype) - parameter.to(step.dtype)
    gradient.add_(difference * step)
    # A compiled sum on a CPU goes on from number to number, and adds up an error of 5e-5 in float32.
    return difference.square().sum(dtype=torch.float64 if parameter.device.type == "cpu" else None)


@cache
def _compiled_join() -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    return torch.compile(_join, dynamic=True)  # one kernel for all lengths


@torch.no_grad()
def _worked_on(batches: Sequence[Batch], factor: float, compile: bool) -> Iterator[Tensor]:
    """Adds `factor` times the differences to the gradients, a batch at a time, and gives the sum of its squares."""
    dtypes = {parameter.dtype for batch in batches for parameter, _ in batch.pairs}
    dtype = reduce(torch.promote_types, dtypes, torch.float32)
    # All that the loop needs is made before it: small tensors that stay between large ones that go would leave holes.
    squares = [torch.empty((), dtype=dtype, device=batch.device) for batch in batches]
    longest = {batch.device: batch.elements for batch in sorted(batches, key=lambda batch: batch.elements)}
    scratch = {device: torch.empty(elements, dtype=dtype, device=device) for device, elements in longest.items()}
    for batch, square in zip(_prefetched(batches), squares, strict=True):
        step = -factor * batch.coefficient  # of theta_0 - theta
        if compile and (tensors := batch.joined) is not None:
            yield square.copy_(_compiled_join()(*tensors, torch.full((), step, dtype=dtype, device=batch.device)))
            continue
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
    pairs: Iterable[tuple[Tensor, Tensor]], reduction: str, weight: float, scale: float = 1.0, compile: bool = False
) -> Drift:
    """Adds d(weight * drift)/d(theta) to every parameter's `.grad` and returns the drift, in one pass.

    The gradient is 2 * weight * d_i for `sum` and 2 * weight * d_i / n_i for `tensor_mean`. A parameter that has no
    gradient yet gets one, as autograd would give it; a frozen one, or any with weight 0, is only measured. Parameters
    sharded by FSDP2 are worked on where they lie, with one all-reduce of the sums. `weight` is the paper's lambda,
    `scale` a factor on the gradient alone: the loss scale, while the gradients it joins are still scaled (fp16).
    With `compile` a tensor that is worked on alone, as large ones are, takes one kernel by `torch.compile`, not five.
    """
    listed = list(pairs)
    batches = _batched(listed, reduction, with_gradients=weight != 0)
    return _drift(batches, list(_worked_on(batches, 2.0 * scale * weight, compile)), listed[0][0])


@contextmanager
@torch.no_grad()  # of what is done here, not of the block
def adding_drift_gradient(
    pairs: Iterable[tuple[Tensor, Tensor]],
    reduction: str,
    weight: float,
    scale: float,
    order: list[int],
    compile: bool = False,
) -> Iterator[Callable[[], Drift]]:
    """What `add_drift_gradient_` does, beside a backward in the block; the call that it gives returns the drift.

    Batches are worked on one after another, each when backward has come to the gradients it joins, and the teacher of
    the next comes meanwhile; what backward has not come to by then waits for that call. `order` holds the ids of the
    parameters in the order in which the last backward came to them, and gets that of this one: without it, most waits.
    Nothing may take the gradients away while backward goes on, as DDP does.
    """
    listed = list(pairs)
    batches = _batched(listed, reduction, with_gradients=weight != 0)
    awaited = [{id(parameter) for parameter in batch.trained} for batch in batches]
    place = {parameter: i for i, parameter in enumerate(order)}
    last = [max((place.get(parameter, len(order)) for parameter in ids), default=0) for ids in awaited]
    queue = sorted(range(len(batches)), key=last.__getitem__)
    steps = _worked_on([batches[i] for i in queue], 2.0 * scale * weight, compile)
    squares: dict[int, Tensor] = {}
    complete: set[int] = set()
    order.clear()

    def on_gradient(parameter: Tensor) -> None:
        order.append(id(parameter))
        complete.add(id(parameter))
        while len(squares) < len(queue) and awaited[queue[len(squares)]] <= complete:
            squares[queue[len(squares)]] = next(steps)

    def finish() -> Drift:
        squares.update(zip(queue[len(squares) :], steps, strict=True))
        return _drift(batches, [square for _, square in sorted(squares.items())], listed[0][0])

    hooks = [p.register_post_accumulate_grad_hook(on_gradient) for p, _ in listed if p.requires_grad]
    try:
        yield finish
    finally:
        for hook in hooks:
            hook.remove()
