"""How far a personalized pipeline is from its base: in its weights, its predictions and its sampler's distribution."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from ..budget import WeightInterpolation
from ..errors import RunError
from ..loading import check_text_to_image, networks
from ..probe import OutputProbe, pipeline_denoiser
from .generation import Sampling, generate

FRACTIONS = (0.25, 0.5, 1.0)  # the last one leaves the weights as they were


class WeightChange(NamedTuple):
    """Squared norms of the change of one or several tensors, and of what they were before."""

    squared_drift: float  # ||theta - theta_0||^2
    squared_norm: float  # ||theta_0||^2

    @property
    def norm(self) -> float:
        return math.sqrt(self.squared_drift)

    @property
    def report(self) -> dict[str, float | None]:
        relative = math.sqrt(self.squared_drift / self.squared_norm) if self.squared_norm else None
        return {"drift": self.norm, "drift_relative": relative}

    @classmethod
    def total(cls, changes: Sequence[WeightChange]) -> WeightChange:
        return cls(sum(change.squared_drift for change in changes), sum(change.squared_norm for change in changes))


@torch.no_grad()
def weight_changes(base: nn.Module, personalized: nn.Module) -> dict[str, WeightChange]:
    """Return the change of each parameter that changed, by name. Adapters have to be merged."""
    after = dict(personalized.named_parameters())
    changes = {}
    for name, parameter in base.named_parameters():
        before = parameter.cpu().double()
        change = WeightChange(
            (after[name].cpu().double() - before).square().sum().item(), before.square().sum().item()
        )
        if change.squared_drift != 0:
            changes[name] = change
    return changes


def merge_adapters(pipeline: Any) -> None:
    """Add adapters, if there are any, to the weights that they adapt, and remove them."""
    if hasattr(pipeline, "get_list_adapters") and pipeline.get_list_adapters():
        pipeline.fuse_lora(components=list(pipeline.get_list_adapters()))
        pipeline.unload_lora_weights()


class Step(NamedTuple):
    """One step of the base's chain."""

    timestep: int
    prediction: Tensor  # (B, ...), guided
    next_sample: Tensor  # (B, ...)


class RecordedDDPM(DDPMScheduler):
    """Sample as DDPM does, and keep each step in `chain`."""

    chain: list[Step]

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        result = super().step(model_output, timestep, sample, generator=generator, return_dict=return_dict)
        self.chain.append(Step(int(timestep), model_output.cpu(), result[0].cpu()))
        return result


class ForcedDDPM(DDPMScheduler):
    """Lead a model along another one's `chain`.

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
    """Return w_t = c_t^2 / (2 sigma_t^2) with c_t = |d mean / d prediction|; 0 for a last step that adds no noise.

    For predicted noise c_t = beta_t / sqrt(alpha_t (1 - alphabar_t)), alpha_t = 1 - beta_t the step's own ratio of
    alphabars. Ho et al., "Denoising Diffusion Probabilistic Models", NeurIPS 2020, equations 6, 7 and 11. For a
    scheduler that clips its estimate of the sample this is an upper bound.
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
    """Measure an upper bound on KL(base || personalized) of the images of a stochastic sampler, on the base's chains.

    KL(base || personalized) <= sum_t w_t E_{x_t ~ base} ||d eps_t||^2, for guided chains of latents as images have
    them, in as many steps. The last step, which adds no noise, is not in it.

    Args:
        base: A pipeline with a `DDPMScheduler`, on its device. Its own text encoders are used.
        prompts: One chain each.
    """

    def __init__(self, base: Any, prompts: Sequence[str], sampling: Sampling) -> None:
        size = sampling.batch_size
        self.sampling = sampling
        self.batches = [list(prompts[start : start + size]) for start in range(0, len(prompts), size)]
        self.chains: list[list[Step]] = []
        for number in range(len(self.batches)):
            recorder = RecordedDDPM.from_config(base.scheduler.config)
            recorder.chain = []
            self._run(base, recorder, number)
            self.chains.append(recorder.chain)

    @staticmethod
    def fits(pipeline: Any) -> bool:
        """Return whether the formula covers the pipeline's sampler."""
        scheduler = pipeline.scheduler
        return type(scheduler) is DDPMScheduler and not scheduler.config.variance_type.startswith("learned")

    @property
    def timesteps(self) -> list[int]:
        return [step.timestep for step in self.chains[0]]

    def measure(self, personalized: Any) -> Tensor:
        """Return what each step of each chain adds to the bound, in nats, (steps, chains), float64."""
        costs = []
        for number, chain in enumerate(self.chains):
            forced = ForcedDDPM.from_config(personalized.scheduler.config)
            forced.chain, forced.costs = chain, []
            self._run(personalized, forced, number)
            costs.append(torch.stack(forced.costs))
        return torch.cat(costs, dim=1)

    def _run(self, pipeline: Any, scheduler: DDPMScheduler, number: int) -> None:
        own, pipeline.scheduler = pipeline.scheduler, scheduler
        prompts, first = self.batches[number], self.sampling.seed + number * self.sampling.batch_size
        generators = [torch.Generator().manual_seed(first + index) for index in range(len(prompts))]
        try:
            generate(pipeline, prompts, generators, output_type="latent", **self.sampling.call)
        finally:
            pipeline.scheduler = own


class DriftMeter:
    """Measure the drift of pipelines from one base, in float32.

    Args:
        base: The pretrained pipeline, as loaded; between measurements its weights are in host memory.
        prompts: Of output drift and path-KL, one chain each.
        sampling: How images are generated, for path-KL.

    Raises:
        RunError: The base makes no images from a prompt alone, or is neither Stable Diffusion nor SDXL.
    """

    def __init__(self, base: Any, prompts: Sequence[str], sampling: Sampling, device: torch.device) -> None:
        check_text_to_image(base)
        side = base.unet.config.sample_size
        shape = (base.unet.config.in_channels, side, side)
        self.base, self.device, self.elements = base, device, math.prod(shape)
        base.to(device)
        options = {"prompts": prompts, "device": device, "seed": sampling.seed}
        self.probe = OutputProbe(pipeline_denoiser(base), base.scheduler, shape, **options)
        self.path_kl = PathKL(base, prompts, sampling) if PathKL.fits(base) else None
        base.to("cpu")

    def measure(self, personalized: Any) -> dict[str, Any]:
        """Return all of it, ready for the report. Adapters are merged into the weights of `personalized`.

        Raises:
            RunError: A prediction is not a number.
        """
        merge_adapters(personalized)
        parts = networks(personalized)
        changes = {part: weight_changes(model, parts[part]) for part, model in networks(self.base).items()}
        changes = {part: changed for part, changed in changes.items() if changed}
        personalized.to(self.device)
        return {
            "parameters": {part: _parameter_report(changed) for part, changed in changes.items()},
            "output": self._output_report(personalized),
            "slopes": self._slopes(personalized, changes),
            "path_kl": self._path_kl_report(personalized),
        }

    def _output_report(self, personalized: Any) -> dict[str, Any]:
        drift = self.probe.measure(pipeline_denoiser(personalized))
        if not math.isfinite(drift.output_drift_relative):
            raise RunError("--personalized: its predictions are not numbers.")
        chains = drift.squared_error.shape[1]
        errors = drift.squared_error.std(dim=1) / math.sqrt(chains) / drift.squared_reference.mean(dim=1)
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

    def _slopes(self, personalized: Any, changes: Mapping[str, Mapping[str, WeightChange]]) -> list[dict[str, Any]]:
        """Return ||d eps|| / ||d theta|| at `FRACTIONS` of the drift: constant where predictions change linearly.

        ||d eps|| is the root of the mean, over probes, of the squared norm of the change of a prediction. At the end
        `personalized` is what it was.
        """
        pairs = []
        for part, changed in changes.items():
            before, after = (
                dict(networks(pipeline)[part].named_parameters()) for pipeline in (self.base, personalized)
            )
            pairs += [(after[name], before[name].detach()) for name in changed]
        change = WeightInterpolation(pairs)
        distance = WeightChange.total([change for changed in changes.values() for change in changed.values()]).norm
        points = []
        for fraction in FRACTIONS:
            change.set_alpha(fraction)
            moved = math.sqrt(self.probe.measure(pipeline_denoiser(personalized)).output_drift * self.elements)
            there = fraction * distance
            slope = moved / there if there else None
            points.append({"fraction": fraction, "parameters": there, "predictions": moved, "slope": slope})
        return points

    def _path_kl_report(self, personalized: Any) -> dict[str, Any]:
        if self.path_kl is None:
            scheduler = type(personalized.scheduler).__name__
            return {"nats": None, "reason": f"{scheduler} is not a DDPMScheduler: the formula does not cover it."}
        costs = self.path_kl.measure(personalized)  # (steps, chains)
        chains = costs.sum(dim=0)
        by_step = zip(self.path_kl.timesteps, costs.mean(dim=1).tolist(), strict=True)
        return {
            "nats": chains.mean().item(),
            "standard_error": _number(chains.std().item() / math.sqrt(len(chains))),
            "chains": len(chains),
            "by_step": [{"timestep": timestep, "nats": nats} for timestep, nats in by_step],
        }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _parameter_report(changes: Mapping[str, WeightChange]) -> dict[str, Any]:
    blocks: dict[str, list[WeightChange]] = {}
    for name, change in changes.items():
        blocks.setdefault(re.findall(r".*?\.\d+(?=\.)|\w+", name)[0], []).append(change)
    return {
        **WeightChange.total(list(changes.values())).report,
        "by_block": {block: WeightChange.total(inside).report for block, inside in blocks.items()},
        "by_tensor": {name: change.report for name, change in changes.items()},
    }
