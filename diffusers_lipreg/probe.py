"""Output drift: how far a model's predictions are from those of its pretrained self, measured on fixed probes.

A probe is a noisy sample, a timestep and a prompt. The pretrained model draws the samples, so no image is needed: one
chain of denoising steps from noise for each prompt. From each bin of timesteps the chain keeps its middle step with the
prediction there. With e_i the prediction for probe i and e_0,i the pretrained one,

    output_drift           mean over probes and elements of (e_i - e_0,i)^2
    output_drift_relative  output_drift / mean over probes and elements of e_0,i^2

The two are about equal for a model that predicts noise, whose mean square is 1.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, distributed, nn

from .sharding import reshard

PROMPTS = (
    "a photo of a dog",
    "a woman reading a book in a cafe",
    "a red car parked on a city street",
    "an oil painting of a mountain lake at sunset",
    "a bowl of fruit on a wooden table",
    "a black and white drawing of an old house",
    "two children playing on the beach",
    "a close-up of a flower in a garden",
)


class Denoiser(NamedTuple):
    """A conditional denoiser as the probe calls it, whatever it is made of.

    `predict(sample, timestep, prompts)` takes noisy samples (B, ...) as the network gets them, one timestep as a scalar
    tensor and B prompts, and returns the prediction (B, ...). It may look prompts up, or encode them again if a text
    encoder is trained. It should call unwrapped modules: wrappers such as DDP synchronize, and not every process calls.

    `modules` are in eval mode while the drift is measured, because dropout is no drift.
    """

    predict: Callable[[Tensor, Tensor, list[str]], Tensor]
    modules: Sequence[nn.Module]

    @contextmanager
    def eval_mode(self) -> Iterator[Callable[[Tensor, Tensor, list[str]], Tensor]]:
        """Yield `predict`, without gradients and with all modules in eval mode; restore their modes at the end."""
        modes = {part: part.training for module in self.modules for part in module.modules()}
        try:
            for module in self.modules:
                module.eval()
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # compiled for training, not for this
                yield self.predict
        finally:
            for part, mode in modes.items():
                part.training = mode
            for module in self.modules:
                reshard(module)


def pipeline_denoiser(pipeline: Any) -> Denoiser:
    """Return the denoiser of a Stable Diffusion or SDXL pipeline of diffusers, adapters and text encoders included."""
    unet = pipeline.unet
    sdxl = "text_encoder_2" in pipeline.components
    encoders = [pipeline.text_encoder, *([pipeline.text_encoder_2] if sdxl else [])]
    side = float(unet.config.sample_size * pipeline.vae_scale_factor)

    def predict(sample: Tensor, timestep: Tensor, prompts: list[str]) -> Tensor:
        options = {"device": sample.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        states, _, *pooled = pipeline.encode_prompt(prompt=prompts, **options)
        conditions = {}
        if sdxl:
            time_ids = sample.new_tensor([side, side, 0.0, 0.0, side, side], dtype=states.dtype)
            conditions = {"text_embeds": pooled[0], "time_ids": time_ids.repeat(len(sample), 1)}
        return unet(
            sample.to(unet.dtype), timestep, states.to(unet.dtype), added_cond_kwargs=conditions, return_dict=False
        )[0]

    return Denoiser(predict, [unet, *encoders])


class ProbePoint(NamedTuple):
    """One call of the denoiser, with the prediction of the pretrained one."""

    sample: Tensor  # (B, ...)
    timestep: Tensor  # ()
    prompts: list[str]  # B
    prediction: Tensor  # (B, ...)


class OutputDrift(NamedTuple):
    """Measurement of a probe: mean squares for each bin of timesteps and each chain, (bins, chains), float64."""

    timesteps: list[float]  # one for each bin
    squared_error: Tensor  # differences from the pretrained predictions
    squared_reference: Tensor  # pretrained predictions

    @property
    def output_drift(self) -> float:
        """Return the mean squared difference per element."""
        return self.squared_error.mean().item()

    @property
    def output_drift_relative(self) -> float:
        """Return `output_drift` divided by the mean square of the pretrained predictions."""
        return (self.squared_error.mean() / self.squared_reference.mean()).item()

    @property
    def output_drift_percent(self) -> float:
        """Return `output_drift_relative` in percent."""
        return 100 * self.output_drift_relative

    @property
    def standard_error(self) -> float:
        """Return the standard error of `output_drift_relative` over prompts and noise, at these timesteps.

        Chains are independent, the steps of one chain are not. This is the delta method for a ratio of means over chains;
        a single chain gives nan.
        """
        residuals = (self.squared_error - self.output_drift_relative * self.squared_reference).mean(
            dim=0
        ) / self.squared_reference.mean()
        return residuals.std().item() / math.sqrt(residuals.numel())

    @property
    def by_timestep(self) -> dict[float, float]:
        """Return `output_drift_relative` of each bin of timesteps."""
        return dict(
            zip(self.timesteps, (self.squared_error.mean(1) / self.squared_reference.mean(1)).tolist(), strict=True)
        )

    @property
    def logs(self) -> dict[str, float]:
        """Return all numbers for trackers."""
        return {
            "output_drift": self.output_drift,
            "output_drift_percent": self.output_drift_percent,
            "output_drift_percent_se": 100 * self.standard_error,
            **{f"output_drift_percent_t{timestep:g}": 100 * value for timestep, value in self.by_timestep.items()},
        }


def sampling_scheduler(scheduler: Any) -> Any:
    """Return a new scheduler that samples without further noise: DDIM if it is compatible, else one of the same class."""
    if DDIMScheduler in scheduler.compatibles or isinstance(scheduler, DDIMScheduler):
        return DDIMScheduler.from_config(scheduler.config, timestep_spacing="trailing")
    fixed = {"use_dynamic_shifting": False} if _is_flow_matching(scheduler) else {}  # which would ask for a size
    return type(scheduler).from_config(scheduler.config, **fixed)


def _is_flow_matching(scheduler: Any) -> bool:
    """Say whether samples go to the model unscaled, and begin as noise of variance 1."""
    return isinstance(scheduler, FlowMatchEulerDiscreteScheduler)


class OutputProbe:
    """Record the pretrained model's predictions on fixed probes, and measure how far another model's are from them.

    Take it while the model holds the pretrained weights, before any checkpoint is loaded. It has its own random generator:
    neither recording nor measuring changes training, and a resumed run records the same probes again. It keeps samples
    and predictions (2 MiB for the default probes at 512 pixels), no weights.

    With torch.distributed, all processes have to measure: they share the work and get the same numbers.

    Args:
        denoiser: The pretrained model. Its predictions may depend on nothing but input and weights.
        scheduler: A diffusers scheduler that the model can be sampled with, or is trained with. It is not changed.
        shape: Shape of one sample without the batch dimension, such as (4, 64, 64).
        prompts: Prompts that have nothing to do with the subject, for one chain each.
        bins: Number of timestep bins of equal width. A chain has twice as many steps.
        batch_size: Chains that are computed together.
        device, seed: Device of the samples, and seed of their noise.

    Raises:
        ValueError: No prompt.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        scheduler: Any,
        shape: Sequence[int],
        *,
        prompts: Sequence[str] = PROMPTS,
        bins: int = 4,
        batch_size: int = 8,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        if not prompts:
            raise ValueError("A probe needs at least one prompt, got none.")
        scheduler = sampling_scheduler(scheduler)
        flow = _is_flow_matching(scheduler)
        noise = torch.randn((len(prompts), *shape), generator=torch.Generator().manual_seed(seed)).to(device)
        self.bins = bins
        self._probes: list[ProbePoint] = []
        with denoiser.eval_mode() as predict:
            for first in range(0, len(prompts), batch_size):
                texts = list(prompts[first : first + batch_size])
                scheduler.set_timesteps(2 * bins, device=device)
                sample = noise[first : first + batch_size] * (1.0 if flow else scheduler.init_noise_sigma)
                for step, timestep in enumerate(scheduler.timesteps):
                    seen = sample if flow else scheduler.scale_model_input(sample, timestep)
                    prediction = predict(seen, timestep, texts).float()
                    if step % 2 == 1:  # steps are half a bin apart, beginning at the edge
                        self._probes.append(ProbePoint(seen, timestep, texts, prediction))
                    sample = scheduler.step(prediction, timestep, sample).prev_sample

    def measure(self, denoiser: Denoiser) -> OutputDrift:
        """Measure the output drift of `denoiser`, which is exactly zero for the recorded one."""
        rank, world = (
            (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
        )
        rows = [probe.prediction.new_zeros(len(probe.prompts)) for probe in self._probes]
        with denoiser.eval_mode() as predict:
            for first in range(0, len(rows), world):
                # Every process makes the same number of forward passes: a sharded model needs all of them.
                number = min(first + rank, len(rows) - 1)
                probe = self._probes[number]
                difference = predict(probe.sample, probe.timestep, probe.prompts).float() - probe.prediction
                if number == first + rank:
                    rows[number] = _mean_squares(difference)
        differences = torch.cat(rows)
        if world > 1:
            distributed.all_reduce(differences)  # Each sum has one term that is not zero, so nothing is rounded.
        squares = torch.cat([_mean_squares(probe.prediction) for probe in self._probes])
        timesteps = [probe.timestep.item() for probe in self._probes[: self.bins]]
        return OutputDrift(timesteps, self._by_bin(differences), self._by_bin(squares))

    def _by_bin(self, rows: Tensor) -> Tensor:
        """Reorder rows, which come batch by batch and bin by bin, as (bins, chains)."""
        batches = [len(probe.prompts) * self.bins for probe in self._probes[:: self.bins]]
        return torch.cat([batch.unflatten(0, (self.bins, -1)) for batch in rows.cpu().double().split(batches)], dim=1)


def _mean_squares(rows: Tensor) -> Tensor:
    return rows.square().flatten(1).mean(dim=1)
