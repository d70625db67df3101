"""Measure two quantities of the theory: the Lipschitz slope of predictions, and path-KL of a stochastic sampler."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from ..budget import WeightInterpolation
from ..loading import networks
from ..outputs import OutputSnapshot
from .generation import Sampling, generate

FRACTIONS = (0.25, 0.5, 1.0)  # the last one restores the weights


def lipschitz_slopes(
    recorded: OutputSnapshot, base: Any, personalized: Any, changed: Mapping[str, Iterable[str]], distance: float
) -> list[dict[str, float | None]]:
    """Return ||d eps|| / ||d theta|| at `FRACTIONS` of the drift: constant if predictions change linearly.

    ||d eps|| is the root mean square, over the recorded calls, of the norm of the change of a prediction. The weights of
    `personalized` end as they began.

    Args:
        changed: Names of the parameters that changed, by part.
        distance: Norm of their change.
    """
    pairs = []
    for part, names in changed.items():
        before, after = (dict(networks(pipeline)[part].named_parameters()) for pipeline in (base, personalized))
        pairs += [(after[name], before[name].detach()) for name in names]
    change = WeightInterpolation(pairs)
    points = []
    for fraction in FRACTIONS:
        change.set_alpha(fraction)
        moved = math.sqrt(recorded.measure(personalized).output_drift * recorded.elements)
        slope = moved / (fraction * distance) if distance else None
        points.append({"fraction": fraction, "parameters": fraction * distance, "predictions": moved, "slope": slope})
    return points


class Step(NamedTuple):
    """One step of a chain."""

    timestep: int
    model_output: Tensor  # (1, ...), guided
    next_sample: Tensor  # (1, ...)


class RecordedDDPM(DDPMScheduler):
    """Sample as DDPM does, and append each step to `chain`."""

    chain: list[Step]

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        result = super().step(model_output, timestep, sample, generator=generator, return_dict=return_dict)
        self.chain.append(Step(int(timestep), model_output.cpu(), result[0].cpu()))
        return result


class ForcedDDPM(DDPMScheduler):
    """Lead a model along the `chain` of another one, and append the divergence of each step to `costs`.

    The Kullback-Leibler divergence of a step from the other model's is w_t ||d eps_t||^2 in nats, see `path_kl_weight`.
    """

    chain: list[Step]
    costs: list[float]

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        recorded = self.chain[len(self.costs)]
        change = model_output - recorded.model_output.to(model_output)
        self.costs.append(path_kl_weight(self, recorded.timestep) * change.double().square().sum().item())
        return (recorded.next_sample.to(sample),) * 2


def path_kl_weight(scheduler: DDPMScheduler, timestep: int) -> float:
    """Return w_t = c_t^2 / (2 sigma_t^2) with c_t = |d mean / d prediction|; 0 for a last step that adds no noise.

    For predicted noise c_t = beta_t / sqrt(alpha_t (1 - alphabar_t)), where alpha_t = 1 - beta_t is the ratio of the
    alphabars of neighboring steps: Ho et al., "Denoising Diffusion Probabilistic Models", NeurIPS 2020, equations 6,
    7 and 11. For a scheduler that clips its estimate of the sample, this is an upper bound.
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
    """Measure an upper bound of KL(base || personalized) between the images of a stochastic sampler.

    KL(base || personalized) <= sum_t w_t E_{x_t ~ base} ||d eps_t||^2, over chains of latents that are sampled from the
    base with the guidance and the number of steps of the images. A last step that adds no noise does not count.

    Args:
        base: A pipeline with a `DDPMScheduler`, on its device.
        prompts: One chain each.
    """

    def __init__(self, base: Any, prompts: Sequence[str], sampling: Sampling) -> None:
        self.prompts, self.sampling = prompts, sampling
        self.chains: list[list[Step]] = []
        for number in range(len(prompts)):
            recorder = RecordedDDPM.from_config(base.scheduler.config)
            recorder.chain = []
            self._run(base, recorder, number)
            self.chains.append(recorder.chain)

    @staticmethod
    def covers(pipeline: Any) -> bool:
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
            costs.append(forced.costs)
        return torch.tensor(costs, dtype=torch.float64).T

    def _run(self, pipeline: Any, scheduler: DDPMScheduler, number: int) -> None:
        """Sample the chain of a prompt with `scheduler` in place of the pipeline's own."""
        own, pipeline.scheduler = pipeline.scheduler, scheduler
        generator = torch.Generator().manual_seed(self.sampling.seed + number)
        try:
            generate(pipeline, [self.prompts[number]], [generator], output_type="latent", **self.sampling.call)
        finally:
            pipeline.scheduler = own
