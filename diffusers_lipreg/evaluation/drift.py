"""How far a personalised pipeline is from its base: in its weights, its predictions and its sampler's distribution."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from diffusers import DDPMScheduler
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from ..adapters import AdapterSnapshot
from ..budget import ScaledChange
from ..errors import RunError
from ..loading import check_text_to_image, networks
from ..probe import OutputProbe, pipeline_denoiser
from .generation import Sampling

FRACTIONS = (0.25, 0.5, 1.0)  # the last one leaves the weights as they were


class Change(NamedTuple):
    """What became of one tensor, or of one layer's merged weight."""

    squared_drift: float  # ||theta - theta_0||^2
    squared_norm: float  # ||theta_0||^2

    @property
    def norm(self) -> float:
        return math.sqrt(self.squared_drift)

    @property
    def relative(self) -> float:
        return math.sqrt(self.squared_drift / self.squared_norm) if self.squared_norm else math.nan


def total(changes: Sequence[Change]) -> Change:
    """Of several tensors together."""
    return Change(sum(change.squared_drift for change in changes), sum(change.squared_norm for change in changes))


def parameter_drift(base: Any, tuned: Any) -> dict[str, dict[str, Change]]:
    """By part of the pipeline and by tensor, what changed; for adapters the merged weights, exactly (`adapters.py`).

    Raises:
        RunError: Adapters without an exact formula.
    """
    changes = {part: _changes(model, networks(tuned)[part]) for part, model in networks(base).items()}
    return {part: changed for part, changed in changes.items() if changed}


@torch.no_grad()
def _changes(base: nn.Module, tuned: nn.Module) -> dict[str, Change]:
    before = dict(base.named_parameters())
    if any(isinstance(module, LoraLayer) for module in tuned.modules()):
        try:
            with _adapters_at_zero(tuned):
                snapshot = AdapterSnapshot(tuned)
            drifts = {f"{layer}.weight": drift for layer, drift in snapshot.drift_by_layer(tuned).items()}
        except ValueError as error:
            raise RunError(f"--personalized: {error}") from error
    else:
        after = dict(tuned.named_parameters())
        drifts = {name: _square(after[name].cpu().double() - tensor.cpu().double()) for name, tensor in before.items()}
    return {name: Change(drift, _square(before[name].double())) for name, drift in drifts.items() if drift > 0}


def _square(tensor: Tensor) -> float:
    return tensor.square().sum().item()


@contextmanager
def _adapters_at_zero(module: nn.Module) -> Iterator[None]:
    """For a `with` block the adapters, as diffusers loads them, change nothing: B is 0, DoRA's magnitude the weight's."""
    kept: list[tuple[Tensor, Tensor]] = []
    for layer in module.modules():
        if not isinstance(layer, LoraLayer):
            continue
        rows = layer.get_base_layer().weight.flatten(1).norm(dim=1)
        for name in layer.active_adapters:
            start = {layer.lora_B[name].weight: 0.0}
            if name in layer.lora_magnitude_vector:
                magnitude = layer.lora_magnitude_vector[name].weight
                start[magnitude] = rows.view_as(magnitude)
            for tensor, value in start.items():
                kept.append((tensor, tensor.clone()))
                tensor.copy_(torch.as_tensor(value))
    try:
        yield
    finally:
        for tensor, value in kept:
            tensor.copy_(value)


def merge_adapters(pipeline: Any) -> None:
    """Adds adapters, if there are any, to the weights that they adapt, and takes them away."""
    if hasattr(pipeline, "get_list_adapters") and pipeline.get_list_adapters():
        pipeline.fuse_lora(components=list(pipeline.get_list_adapters()))
        pipeline.unload_lora_weights()


class Step(NamedTuple):
    """One step of the base's chain."""

    timestep: int
    prediction: Tensor  # (B, ...), guided
    next_sample: Tensor  # (B, ...)


class RecordedDDPM(DDPMScheduler):
    """Samples, and keeps each step."""

    chain: list[Step]

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        result = super().step(model_output, timestep, sample, generator=generator, return_dict=return_dict)
        self.chain.append(Step(int(timestep), model_output.cpu(), result[0].cpu()))
        return result


class ForcedDDPM(DDPMScheduler):
    """Leads a model along another one's chain, and keeps what it would have had to pay for each step.

    `costs` are the Kullback-Leibler divergences of its steps from the other model's, (B,) in nats:
    w_t ||d eps_t||^2 with w_t = c_t^2 / (2 sigma_t^2).
    """

    chain: list[Step]
    costs: list[Tensor]

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        taken = self.chain[len(self.costs)]
        squares = (model_output - taken.prediction.to(model_output)).double().square().flatten(1).sum(dim=1)
        self.costs.append(path_kl_weight(self, taken.timestep) * squares.cpu())
        following = taken.next_sample.to(sample)
        return (following, following)


def path_kl_weight(scheduler: DDPMScheduler, timestep: int) -> float:
    """w_t = c_t^2 / (2 sigma_t^2) with c_t = |d mean / d prediction|; 0 for the last step, if it adds no noise.

    For predicted noise c_t = beta_t / sqrt(alpha_t (1 - alphabar_t)), alpha_t = 1 - beta_t the step's own ratio of
    alphabars. Ho et al., "Denoising Diffusion Probabilistic Models", NeurIPS 2020, equations 6, 7 and 11. A scheduler
    that clips its estimate of the sample costs less: then it is a bound.
    """
    previous = int(scheduler.previous_timestep(timestep))
    alphabar = float(scheduler.alphas_cumprod[timestep].double())
    alphabar_previous = float(scheduler.alphas_cumprod[previous].double()) if previous >= 0 else 1.0
    beta = 1 - alphabar / alphabar_previous
    large = scheduler.config.variance_type in ("fixed_large", "fixed_large_log")
    variance = beta if large and timestep > 0 else beta * (1 - alphabar_previous) / (1 - alphabar)
    if variance == 0:
        return 0.0
    sample_per_prediction = {
        "epsilon": math.sqrt((1 - alphabar) / alphabar),
        "v_prediction": math.sqrt(1 - alphabar),
        "sample": 1.0,
    }[scheduler.config.prediction_type]
    mean_per_sample = math.sqrt(alphabar_previous) * beta / (1 - alphabar)
    return (mean_per_sample * sample_per_prediction) ** 2 / (2 * variance)


class PathKL:
    """An upper bound on KL(base || tuned) of the images drawn by a stochastic sampler, from the base's own chains.

    KL(base || tuned) <= sum_t w_t E_{x_t ~ base} ||d eps_t||^2, for chains as they are run: guided, in as many steps,
    of latents. The last step, which adds no noise, is not in it. Takes the pipeline with its own text encoders.

    Args:
        base: A pipeline with a `DDPMScheduler`, on its device.
        prompts: One chain each.
    """

    def __init__(self, base: Any, prompts: Sequence[str], how: Sampling) -> None:
        self.how = how
        self.batches = [list(prompts[i : i + how.batch_size]) for i in range(0, len(prompts), how.batch_size)]
        self.chains: list[list[Step]] = []
        for number in range(len(self.batches)):
            recorder = RecordedDDPM.from_config(base.scheduler.config)
            recorder.chain = []
            self._run(base, recorder, number)
            self.chains.append(recorder.chain)

    @staticmethod
    def fits(pipeline: Any) -> bool:
        """Whether the pipeline's sampler is one that the formula is for."""
        scheduler = pipeline.scheduler
        return type(scheduler) is DDPMScheduler and not scheduler.config.variance_type.startswith("learned")

    @property
    def timesteps(self) -> list[int]:
        return [step.timestep for step in self.chains[0]]

    def measure(self, tuned: Any) -> Tensor:
        """What each step of each chain adds to the bound, in nats, (steps, chains), float64."""
        costs = []
        for number, chain in enumerate(self.chains):
            forced = ForcedDDPM.from_config(tuned.scheduler.config)
            forced.chain, forced.costs = chain, []
            self._run(tuned, forced, number)
            costs.append(torch.stack(forced.costs))
        return torch.cat(costs, dim=1)

    def _run(self, pipeline: Any, scheduler: DDPMScheduler, number: int) -> None:
        own, pipeline.scheduler = pipeline.scheduler, scheduler
        prompts = self.batches[number]
        first = number * self.how.batch_size
        generators = [torch.Generator().manual_seed(self.how.seed + first + i) for i in range(len(prompts))]
        pipeline.set_progress_bar_config(desc="path-KL", leave=False)
        try:
            pipeline(prompts, generator=generators, output_type="latent", **self.how.call)
        finally:
            pipeline.scheduler = own


class DriftMeter:
    """Measures the drift of pipelines from one base, in float32.

    Args:
        base: The pretrained pipeline, as loaded; between measurements its weights are in host memory.
        prompts: Of output drift and path-KL, one chain each.
        how: How images are drawn, for path-KL.

    Raises:
        RunError: A pipeline without a UNet.
    """

    def __init__(self, base: Any, prompts: Sequence[str], how: Sampling, device: torch.device) -> None:
        check_text_to_image(base)
        side = base.unet.config.sample_size
        shape = (base.unet.config.in_channels, side, side)
        self.base, self.device, self.elements = base, device, math.prod(shape)
        base.to(device)
        self.probe = OutputProbe(pipeline_denoiser(base), base.scheduler, shape, prompts=prompts, device=device, seed=how.seed)
        self.path_kl = PathKL(base, prompts, how) if PathKL.fits(base) else None
        base.to("cpu")

    def measure(self, tuned: Any) -> dict[str, Any]:
        """All of it, ready for the report; takes adapters apart, so that `tuned` is of no further use."""
        changes = parameter_drift(self.base, tuned)
        merge_adapters(tuned)
        tuned.to(self.device)
        return {
            "parameters": {part: _parameter_report(changed) for part, changed in changes.items()},
            "output": self._output_report(tuned),
            "slopes": self._slopes(tuned, changes),
            "path_kl": self._path_kl_report(tuned),
        }

    def _output_report(self, tuned: Any) -> dict[str, Any]:
        drift = self.probe.measure(pipeline_denoiser(tuned))
        chains = drift.differences.shape[1]
        errors = drift.differences.std(dim=1) / math.sqrt(chains) / drift.squares.mean(dim=1)
        return {
            "output_drift": drift.output_drift,
            "output_drift_relative": drift.output_drift_relative,
            "standard_error": _number(drift.standard_error),
            "chains": chains,
            "by_timestep": [
                {"timestep": timestep, "output_drift_relative": value, "standard_error": _number(error)}
                for (timestep, value), error in zip(drift.by_timestep.items(), errors.tolist(), strict=True)
            ],
        }

    def _slopes(self, tuned: Any, changes: dict[str, dict[str, Change]]) -> list[dict[str, Any]]:
        """||d eps|| / ||d theta|| along the drift, at `FRACTIONS` of it: constant where predictions change linearly.

        ||d eps|| is the root of the mean, over probes, of the squared norm of the change of a prediction. At the end
        `tuned` is what it was.
        """
        pairs = []
        for part, changed in changes.items():
            before, after = (dict(networks(pipeline)[part].named_parameters()) for pipeline in (self.base, tuned))
            pairs += [(after[name], before[name].detach()) for name in changed]
        change, distance = ScaledChange(pairs), total([c for part in changes.values() for c in part.values()]).norm
        points = []
        for fraction in FRACTIONS:
            change.apply(fraction)
            moved = math.sqrt(self.probe.measure(pipeline_denoiser(tuned)).output_drift * self.elements)
            there = fraction * distance
            slope = moved / there if there else None
            points.append({"fraction": fraction, "parameters": there, "predictions": moved, "slope": slope})
        return points

    def _path_kl_report(self, tuned: Any) -> dict[str, Any]:
        if self.path_kl is None:
            scheduler = type(tuned.scheduler).__name__
            return {"nats": None, "reason": f"{scheduler} is not a DDPMScheduler: the formula does not cover it."}
        costs = self.path_kl.measure(tuned)  # (steps, chains)
        chains = costs.sum(dim=0)
        return {
            "nats": chains.mean().item(),
            "standard_error": _number(chains.std().item() / math.sqrt(len(chains))),
            "chains": len(chains),
            "by_step": [
                {"timestep": timestep, "nats": nats}
                for timestep, nats in zip(self.path_kl.timesteps, costs.mean(dim=1).tolist(), strict=True)
            ],
        }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _parameter_report(changes: dict[str, Change]) -> dict[str, Any]:
    def described(change: Change) -> dict[str, float | None]:
        return {"drift": change.norm, "drift_relative": _number(change.relative)}

    blocks: dict[str, list[Change]] = {}
    for name, change in changes.items():
        blocks.setdefault(re.findall(r".*?\.\d+(?=\.)|\w+", name)[0], []).append(change)
    return {
        **described(total(list(changes.values()))),
        "by_block": {block: described(total(inside)) for block, inside in blocks.items()},
        "by_tensor": {name: described(change) for name, change in changes.items()},
    }
