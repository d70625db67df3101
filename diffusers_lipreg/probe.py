"""Output drift: how far a model's predictions are from those of its pretrained self, measured on fixed probes.

A probe is a noisy sample, a timestep and a prompt. Samples come from the pretrained model alone, no image is needed:
one chain of denoising steps from noise for each prompt, of which a step in the middle of each bin of timesteps is kept,
with what the model predicted there. With e_i the prediction for the i-th of the probes,

    output_drift           mean over probes and elements of (e_i - e_0,i)^2
    output_drift_relative  output_drift / mean over probes and elements of e_0,i^2

For a model that predicts noise the second is about the first, for noise has mean square 1.
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

    `predict(sample, timestep, prompts)` takes noisy samples (B, ...) as the network sees them, one timestep as a scalar
    tensor and B prompts, and returns the prediction (B, ...). It may encode the prompts anew, for a text encoder that
    is trained, or look them up. Call bare modules in it: wrappers such as DDP synchronise where only some call them.

    `modules` are in eval mode while it is measured: dropout is no drift.
    """

    predict: Callable[[Tensor, Tensor, list[str]], Tensor]
    modules: Sequence[nn.Module]

    @contextmanager
    def evaluating(self) -> Iterator[Callable[[Tensor, Tensor, list[str]], Tensor]]:
        """`predict`, without gradients and in eval mode; every module is then put back into the mode it was in."""
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
    """The denoiser of a Stable Diffusion or SDXL pipeline of diffusers, adapters and text encoders included."""
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


class Probe(NamedTuple):
    """One call of the denoiser, and what the pretrained one answered to it."""

    sample: Tensor  # (B, ...)
    timestep: Tensor  # ()
    prompts: list[str]  # B
    prediction: Tensor  # (B, ...)


class OutputDrift(NamedTuple):
    """What a probe measured: mean squares for each bin of timesteps and each chain, (bins, chains), float64."""

    timesteps: list[float]  # one for each bin
    differences: Tensor  # of the predictions from the pretrained ones
    squares: Tensor  # of the pretrained ones

    @property
    def output_drift(self) -> float:
        """Mean squared difference per element."""
        return self.differences.mean().item()

    @property
    def output_drift_relative(self) -> float:
        """The same, over the mean square of the pretrained predictions."""
        return (self.differences.mean() / self.squares.mean()).item()

    @property
    def output_drift_percent(self) -> float:
        """`output_drift_relative` in percent."""
        return 100 * self.output_drift_relative

    @property
    def standard_error(self) -> float:
        """Of `output_drift_relative` as an estimate for all prompts and noise, at these timesteps; nan of one chain.

        Chains are independent, the steps of one chain are not. To first order the ratio varies as the differences do,
        less their share of the squares.
        """
        residuals = (self.differences - self.output_drift_relative * self.squares).mean(dim=0) / self.squares.mean()
        return residuals.std().item() / math.sqrt(residuals.numel())

    @property
    def by_timestep(self) -> dict[float, float]:
        """`output_drift_relative` of each bin of timesteps."""
        return dict(zip(self.timesteps, (self.differences.mean(1) / self.squares.mean(1)).tolist(), strict=True))

    @property
    def logs(self) -> dict[str, float]:
        """All of it, for trackers."""
        return {
            "output_drift": self.output_drift,
            "output_drift_percent": self.output_drift_percent,
            "output_drift_percent_se": 100 * self.standard_error,
            **{f"output_drift_percent_t{timestep:g}": 100 * value for timestep, value in self.by_timestep.items()},
        }


def chain_scheduler(scheduler: Any) -> Any:
    """A new scheduler that walks from noise to sample without further noise: DDIM where that fits, else its own class."""
    if DDIMScheduler in scheduler.compatibles or isinstance(scheduler, DDIMScheduler):
        return DDIMScheduler.from_config(scheduler.config, timestep_spacing="trailing")
    fixed = {"use_dynamic_shifting": False} if _matches_flows(scheduler) else {}  # which would ask for a size
    return type(scheduler).from_config(scheduler.config, **fixed)


def _matches_flows(scheduler: Any) -> bool:
    """Whether its samples go to the model as they are, and begin as noise of variance 1."""
    return isinstance(scheduler, FlowMatchEulerDiscreteScheduler)


class OutputProbe:
    """The pretrained model's predictions on fixed probes; measures how far those of another model are from them.

    Take it while the model holds the pretrained weights, before any checkpoint is loaded. All its random numbers come
    from a generator of its own, so that taking it and measuring change nothing else, and a resumed run takes the same
    probes again. It keeps samples and predictions (2 MiB for the default probes at 512 pixels), no weights.

    With torch.distributed, processes share the work, and every one of them has to measure; all get the same numbers.

    Args:
        denoiser: The pretrained model. What it predicts for equal input must not depend on anything but its weights.
        scheduler: A diffusers scheduler that the model can be sampled with, or is trained with. It is not changed.
        shape: Of one sample without the batch dimension, such as (4, 64, 64).
        prompts: One chain each. What they say should have nothing to do with what is learned.
        bins: Into how many bins of equal width the timesteps are divided. A chain has twice as many steps.
        batch_size: Chains computed at a time.
        device, seed: Where samples are, and what they are drawn from.

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
        scheduler = chain_scheduler(scheduler)
        flow = _matches_flows(scheduler)
        noise = torch.randn((len(prompts), *shape), generator=torch.Generator().manual_seed(seed)).to(device)
        self.bins = bins
        self._probes: list[Probe] = []
        with denoiser.evaluating() as predict:
            for first in range(0, len(prompts), batch_size):
                texts = list(prompts[first : first + batch_size])
                scheduler.set_timesteps(2 * bins, device=device)
                sample = noise[first : first + batch_size] * (1.0 if flow else scheduler.init_noise_sigma)
                for step, timestep in enumerate(scheduler.timesteps):
                    seen = sample if flow else scheduler.scale_model_input(sample, timestep)
                    prediction = predict(seen, timestep, texts).float()
                    if step % 2 == 1:  # steps are half a bin apart, beginning at the edge
                        self._probes.append(Probe(seen, timestep, texts, prediction))
                    sample = scheduler.step(prediction, timestep, sample).prev_sample

    def measure(self, denoiser: Denoiser) -> OutputDrift:
        """The output drift of `denoiser`: exactly zero for the one that the probe was taken of."""
        rank, world = (
            (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
        )
        rows = [probe.prediction.new_zeros(len(probe.prompts)) for probe in self._probes]
        with denoiser.evaluating() as predict:
            for first in range(0, len(rows), world):
                # All call the model equally often, also where none is left: one that is sharded they gather together.
                number = min(first + rank, len(rows) - 1)
                probe = self._probes[number]
                difference = predict(probe.sample, probe.timestep, probe.prompts).float() - probe.prediction
                if number == first + rank:
                    rows[number] = _mean_squares(difference)
        differences = torch.cat(rows)
        if world > 1:
            distributed.all_reduce(differences)  # of one number and zeros: no rounding, the same on all
        squares = torch.cat([_mean_squares(probe.prediction) for probe in self._probes])
        timesteps = [probe.timestep.item() for probe in self._probes[: self.bins]]
        return OutputDrift(timesteps, self._by_bin(differences), self._by_bin(squares))

    def _by_bin(self, rows: Tensor) -> Tensor:
        """Rows in the order of the probes, batch by batch and in it bin by bin, as (bins, chains)."""
        batches = [len(probe.prompts) * self.bins for probe in self._probes[:: self.bins]]
        return torch.cat([batch.unflatten(0, (self.bins, -1)) for batch in rows.cpu().double().split(batches)], dim=1)


def _mean_squares(rows: Tensor) -> Tensor:
    return rows.square().flatten(1).mean(dim=1)
