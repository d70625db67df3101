"""OutputSnapshot: what the pretrained pipeline predicts, recorded while it works and replayed in training.

Along the pretrained model's own chain of denoising steps, the KL divergence of its images from the trained model's is a sum
over steps of weighted squared changes of the prediction (Girsanov). With call i of the module recorded from such chains, e_i
the trained module's prediction for it and e_0,i the pretrained one, a reduction has a name:

    output  mean over calls and elements of (e_i - e_0,i)^2

A call is kept as the pipeline makes it, so this serves every pipeline of diffusers, and its text encoders as well. The same
class with other prompts and another seed is the yardstick: `measure` tells the change on calls that are not trained on.
"""

import inspect
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor, distributed, nn
from tqdm.auto import tqdm

from .drift import Drift
from .output_drift import OutputDrift
from .recording import (
    Call,
    Chain,
    Store,
    can_be_joined,
    eval_mode,
    pipeline_networks,
    prediction_of,
    record,
    replay,
    squared_error,
    tensors,
)
from .sharding import is_sharded, reshard
from .snapshot import unwrap

STEPS = (8, 24)  # fewest and most steps of a chain
WINDOW = 16  # updates over which `Drift.squared_distance` is averaged
POINTS_PER_MEASURED_CHAIN = 4
BINS = 4  # parts of a chain, from noise to image, that `OutputDrift.by_timestep` tells apart

# For measuring, what is never trained on.
MEASURED_PROMPTS = (
    "a photo of a dog",
    "a woman reading a book in a cafe",
    "a red car parked on a city street",
    "an oil painting of a mountain lake at sunset",
    "a bowl of fruit on a wooden table",
    "a black and white drawing of an old house",
    "two children playing on the beach",
    "a close-up of a flower in a garden",
)
MEASURED_SEED = 2**31


def generic_prompts() -> tuple[str, ...]:
    """Return some hundred short prompts on all kinds of things, people, places, styles and ideas, and the empty one."""
    text = files(__package__).joinpath("generic_prompts.txt").read_text(encoding="utf-8")
    return ("", *text.splitlines())


class OutputSnapshot:
    """Record calls of a module in a pretrained pipeline, and compute how far its predictions are from the recorded ones.

    Take it while the module holds the pretrained weights, before a checkpoint is loaded. Each chain is the pipeline's own
    sampler at work, from noise and by default without guidance, and its calls of the module are kept. Neither recording nor
    replaying draws a global random number, changes a mode or the pipeline, or leaves a hook.

    Points are replayed on the bare module in eval mode, in batches where the module proved to be able to. A batch may round
    in another way than the recorded calls did: at the pretrained weights the drift is zero but for rounding. `measure`
    replays one call at a time, and there finds exactly zero wherever the device computes reproducibly.

    With torch.distributed every process calls the same methods. Each replays its own points, and the gradients are
    averaged in place.

    Args:
        pipeline: The pretrained pipeline, on its device; it is not kept. Samplers and models that need more than a prompt
            cannot be recorded.
        module: The part of it that is trained, its denoiser or a text encoder, bare or wrapped, with or without adapters.
        prompts: What the pipeline is asked for, in turn: anything but the subject. Default: some hundred generic prompts.
        chains: How many chains to sample; of each, as many calls are kept, one at random from each of equal parts of it.
            Default: all calls of as many chains as are needed.
        points: Calls to keep in all. A text encoder is called once for a prompt, and gives fewer.
        seed: Seed of the noise, of the numbers of steps, and of the order in which points are replayed.
        batch_size: Points of an update, on each process.
        micro_batch_size: Points of one forward and backward pass, to save memory. Default: all of them.
        steps: Fewest and most steps of a chain. They vary, so that timesteps spread.
        options: Further arguments of the pipeline's call, such as `height` and `width`, or `guidance_scale`.

    Raises:
        ValueError: No prompt or point, a module that is no part of the pipeline, or one that it did not call.
    """

    reductions = {"output": "mean squared change of predictions; a usual weight is 3"}

    def __init__(
        self,
        pipeline: Any,
        module: nn.Module,
        *,
        prompts: Sequence[str] | None = None,
        chains: int | None = None,
        points: int = 1024,
        seed: int = 0,
        batch_size: int = 4,
        micro_batch_size: int | None = None,
        steps: tuple[int, int] = STEPS,
        **options: Any,
    ) -> None:
        prompts = generic_prompts() if prompts is None else prompts
        if not prompts or points < 1:
            raise ValueError(f"Expected a prompt and a point at least, got {len(prompts)} prompts, {points} points.")
        bare = unwrap(module)
        networks = pipeline_networks(pipeline)
        names = [name for name, part in networks.items() if unwrap(part) is bare]
        if not names:
            raise ValueError(f"The {type(bare).__name__} is no part of the {type(pipeline).__name__}.")
        if "image" in inspect.signature(type(pipeline).__call__).parameters:
            raise ValueError(f"Expected a text-to-image pipeline, got a {type(pipeline).__name__}.")
        self.part, self.seed, self.options = names[0], seed, options
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size or batch_size
        self._chains: list[Chain] = []
        self._calls: list[Call] = []
        self._store: Store = {}
        generator = torch.Generator().manual_seed(seed)
        limit = chains or max(len(prompts), math.ceil(points / steps[0]))
        hidden = True if _rank() > 0 else None  # `None` shows it in a terminal alone
        progress = tqdm(desc="recorded calls", total=points, leave=False, disable=hidden)
        with eval_mode(*networks.values()), progress:
            while len(self._calls) < points and len(self._chains) < limit:
                number = len(self._chains)
                length = int(torch.randint(steps[0], steps[1] + 1, (), generator=generator))
                noise = int(torch.randint(2**31, (), generator=generator))
                self._chains.append(Chain(prompts[number % len(prompts)], length, noise))
                calls = record(pipeline, bare, self._chains[-1], number, self._store, options)
                share = points if chains is None else (number + 1) * points // chains
                kept = min(len(calls), share - len(self._calls))
                progress.update(kept)
                edges = [part * len(calls) // kept for part in range(kept + 1)] if kept else []
                for first, end in zip(edges, edges[1:], strict=False):
                    self._calls.append(calls[int(torch.randint(first, end, (), generator=generator))])
                used = {id(tensor) for call in self._calls for tensor in tensors(call.inputs)}
                self._store = {key: tensor for key, tensor in self._store.items() if id(tensor) in used}
            if not self._calls:
                raise ValueError(f"The {type(pipeline).__name__} did not call its {self.part}.")
            self._kinds: list[Any] = [call.kind for call in self._calls]
            kind, found = Counter(self._kinds).most_common(1)[0]
            alike = [call for call, its_kind in zip(self._calls, self._kinds, strict=True) if its_kind == kind]
            if found < 2 or not can_be_joined(bare, [alike[0], alike[-1]]):
                self._kinds = list(range(len(self._calls)))  # each is one of its kind
        self._squares = torch.tensor([call.mean_square for call in self._calls], dtype=torch.float64)
        self._drawn = 0  # points replayed so far, by all processes
        self._updates = 0
        self._average: Tensor | float = 0.0  # of the drift in the latest updates

    @classmethod
    def for_measuring(
        cls, pipeline: Any, module: nn.Module, prompts: Sequence[str] = MEASURED_PROMPTS, seed: int = 0, **options: Any
    ) -> "OutputSnapshot":
        """Record what output drift is measured on: prompts and noise that no recording to train on has by default."""
        points = POINTS_PER_MEASURED_CHAIN * len(prompts)
        options |= {"prompts": prompts, "chains": len(prompts), "points": points, "seed": MEASURED_SEED + seed}
        return cls(pipeline, module, **options)

    def __repr__(self) -> str:
        return f"OutputSnapshot({len(self._calls)} points)"

    @property
    def nbytes(self) -> int:
        """Return the bytes of host memory that the recorded tensors take."""
        predictions = [tensor for call in self._calls for tensor in call.prediction]
        return sum(tensor.nbytes for tensor in [*self._store.values(), *predictions])

    @property
    def elements(self) -> int:
        """Return the number of elements of a prediction."""
        return sum(tensor.numel() for tensor in self._calls[0].prediction)

    def drift(self, module: nn.Module, reduction: str) -> Tensor:
        """Compute the drift on the next points of this process: a scalar to differentiate, float32 or wider.

        Raises:
            ValueError: An unknown reduction.
        """
        self._check(reduction)
        bare = unwrap(module)
        with eval_mode(bare):
            return torch.stack([part * _error(bare, calls) for part, calls in self._next_batch(bare)]).sum()

    def add_gradient_(self, module: nn.Module, reduction: str, weight: float, scale: float = 1.0) -> Drift:
        """Add scale * weight * d(drift)/d(theta) on the next points to the module's gradients, and return the drift.

        That is one forward and backward pass of `batch_size` points; at weight 0 it is only measured. What is returned is
        the mean over the points of all processes, and its average over the latest updates as the squared distance.

        Args:
            weight: The factor of the drift in the loss.
            scale: Factor on the gradient alone: the loss scale that the gradients in place still carry (fp16).

        Raises:
            ValueError: An unknown reduction.
        """
        self._check(reduction)
        bare = unwrap(module)
        values = []
        with eval_mode(bare), torch.set_grad_enabled(weight != 0):
            for part, calls in self._next_batch(bare):
                value = part * _error(bare, calls)
                if value.requires_grad:
                    (value * (weight * scale)).backward()
                values.append(value.detach())
        value = torch.stack(values).sum()
        if weight == 0:
            reshard(bare)
        if _world_size() > 1:
            gradients = [p.grad for p in bare.parameters() if p.grad is not None] if weight != 0 else []
            # FSDP2 has averaged those of shards.
            _average_([value, *(gradient for gradient in gradients if not is_sharded(gradient))])
        self._updates += 1
        self._average = self._average + (value - self._average) / min(self._updates, WINDOW)
        return Drift(value, self._average)

    def relative(self, drift: Drift) -> dict[str, float]:
        """Return the drift in percent of the mean square of the pretrained predictions, under its log key."""
        return {"drift_percent": 100 * float(drift.value) / self._squares.mean().item()}

    @torch.no_grad()
    def measure(self, trained: Any) -> OutputDrift:
        """Measure the drift on all points, of a module or of a pipeline; gradients and the order of points stay.

        A pipeline encodes the prompts anew, so that changes of its text encoders count; its denoiser gets the recorded
        samples with them. With torch.distributed the work is shared out, and all processes get the same numbers.
        """
        is_module = isinstance(trained, nn.Module)
        bare = unwrap(trained if is_module else getattr(trained, self.part))
        errors = torch.zeros(len(self._calls), device=next(bare.parameters()).device)
        with eval_mode(*([bare] if is_module else pipeline_networks(trained).values())):
            if is_module:
                self._measure_calls(bare, errors)
            else:
                for chain in range(_rank(), len(self._chains), _world_size()):
                    self._measure_chain(trained, bare, chain, errors)
        reshard(bare)
        if _world_size() > 1:
            distributed.all_reduce(errors)  # Each sum has one term that is not zero, so nothing is rounded.
        columns = zip(*((call.chain, int(BINS * call.position), call.timestep) for call in self._calls), strict=True)
        chains, bins, timesteps = (torch.tensor(column) for column in columns)
        return OutputDrift(errors.cpu().double(), self._squares, chains, bins, timesteps.double())

    def _measure_calls(self, module: nn.Module, errors: Tensor) -> None:
        """Put this process's share of the errors of a bare module into `errors`."""
        for first in range(0, len(errors), _world_size()):
            # Every process makes the same number of forward passes: a sharded model needs all of them.
            number = min(first + _rank(), len(errors) - 1)
            error = _error(module, [self._calls[number]])
            if number == first + _rank():
                errors[number] = error

    def _measure_chain(self, pipeline: Any, module: nn.Module, chain: int, errors: Tensor) -> None:
        """Put the errors on the points of a chain into `errors`, with what the pipeline makes of its prompt now."""
        points = {call.number: (row, call) for row, call in enumerate(self._calls) if call.chain == chain}
        forward, own = module.forward, vars(module).get("forward")
        number, output = -1, None

        def answer(*args: Any, **kwargs: Any) -> Any:
            nonlocal number, output
            number += 1
            if number in points:
                row, call = points[number]
                args, kwargs = call.with_conditions(args, kwargs)
                output = forward(*args, **kwargs)
                errors[row] = squared_error(prediction_of(output, call), [call])
            elif output is None:
                output = forward(*args, **kwargs)
            return output  # the sampler may go astray, because its samples are not used

        module.forward = answer
        try:
            self._chains[chain].sample(pipeline, **self.options)
        finally:
            if own is None:
                del module.forward
            else:
                module.forward = own

    def state_dict(self) -> dict[str, float]:
        """Return what a resumed run needs to go on with the same points, as JSON can hold it.

        The recording is not in it: the pretrained pipeline and the same arguments make it again.
        """
        return {"drawn": self._drawn, "updates": self._updates, "average": float(self._average)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self._drawn, self._updates = state_dict["drawn"], state_dict["updates"]
        self._average = state_dict["average"]

    def _check(self, reduction: str) -> None:
        if reduction not in self.reductions:
            raise ValueError(f"reduction must be one of {', '.join(self.reductions)}, got {reduction!r}.")

    def _next_batch(self, module: nn.Module) -> list[tuple[float, list[Call]]]:
        """Return this process's next points, each kind in a batch, with its share of them.

        All points come once, in random order, before one comes again.
        """
        first = self._drawn + self.batch_size * _rank()
        self._drawn += self.batch_size * _world_size()
        # Shards ask for equally many passes of all processes, whose points may be of different kinds.
        alone = len(set(self._kinds)) > 1 and any(is_sharded(parameter) for parameter in module.parameters())
        groups: dict[Any, list[Call]] = {}
        orders: dict[int, list[int]] = {}  # by turn
        for place in range(first, first + self.batch_size):
            turn, place_in_turn = divmod(place, len(self._calls))
            if turn not in orders:
                generator = torch.Generator().manual_seed((self.seed + 1) * 2**16 + turn)
                orders[turn] = torch.randperm(len(self._calls), generator=generator).tolist()
            number = orders[turn][place_in_turn]
            groups.setdefault(place if alone else self._kinds[number], []).append(self._calls[number])
        size = self.micro_batch_size
        parts = [calls[i : i + size] for calls in groups.values() for i in range(0, len(calls), size)]
        return [(len(calls) / self.batch_size, calls) for calls in parts]


def _error(module: nn.Module, calls: Sequence[Call]) -> Tensor:
    return squared_error(replay(module, calls), calls)


def _rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def _world_size() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def _average_(values: Sequence[Tensor]) -> None:
    """Replace each tensor by its mean over processes."""
    for work in [distributed.all_reduce(tensor, async_op=True) for tensor in values]:
        work.wait()
    torch._foreach_div_(list(values), float(_world_size()))
