"""Drift of weights, interpolation and path-KL, against merged weights, closed forms and diffusers' own sampler."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file
from support.runs import PARITY, load_pipeline

from diffusers_lipreg.evaluation import analysis, drift
from diffusers_lipreg.evaluation.generation import Sampling
from diffusers_lipreg.loading import load_personalized
from diffusers_lipreg.outputs import MEASURED_PROMPTS

BASE = str(PARITY / "pipeline")
CPU = torch.device("cpu")


def load(personalized) -> object:
    return load_personalized(str(personalized), BASE, torch.float32)


def test_weight_changes_are_those_of_every_tensor(full):
    base, personalized = load_pipeline(), load(full)
    changes = drift.weight_changes(base.unet, personalized.unet)
    for (name, start), end in zip(base.unet.named_parameters(), personalized.unet.parameters(), strict=True):
        moved, before = (end - start).double().square().sum().item(), start.double().square().sum().item()
        assert changes[name] == pytest.approx((moved, before), rel=1e-6)
    assert drift.weight_changes(base.vae, personalized.vae) == {}


def test_weight_changes_of_adapters_are_their_products(lora):
    """Of LoRA with alpha = rank: ||B A||^2, from the file."""
    personalized, weights = load(lora), load_file(lora / "pytorch_lora_weights.safetensors")
    drift.merge_adapters(personalized)
    changes = drift.weight_changes(load_pipeline().unet, personalized.unet)
    for name, change in changes.items():
        down, up = (
            weights[f"unet.{name.removesuffix('.weight')}.lora.{side}.weight"].double() for side in ("down", "up")
        )
        assert change.squared_drift == pytest.approx((up @ down).square().sum().item(), rel=1e-4)
    assert len(changes) == len(weights) / 2


@pytest.mark.parametrize("kind", ["full", "dora"])
def test_slopes_are_changes_of_predictions_over_changes_of_weights(kind, request):
    meter = drift.DriftMeter(load_pipeline(), MEASURED_PROMPTS[:2], Sampling(num_inference_steps=2), CPU)
    personalized, again = load(request.getfixturevalue(kind)), load(request.getfixturevalue(kind))
    report = meter.measure(personalized, "personalized")
    drift.merge_adapters(again)
    assert all(map(torch.equal, personalized.unet.parameters(), again.unet.parameters()))  # the way back is exact
    distance = math.sqrt(sum(part["drift_norm"] ** 2 for part in report["parameters"].values()))
    quarter, half, whole = report["slopes"]
    assert [point["parameters"] / distance for point in (quarter, half, whole)] == pytest.approx([0.25, 0.5, 1])
    assert whole["slope"] == pytest.approx(math.sqrt(report["output"]["output_drift"] * 4 * 8 * 8) / distance)
    assert 0 < quarter["predictions"] < half["predictions"] < whole["predictions"]
    assert report["path_kl"]["nats"] is None and "PNDMScheduler" in report["path_kl"]["reason"]
    unmoved = meter.measure(load_pipeline(), "base")
    assert unmoved["parameters"] == {} and unmoved["output"]["output_drift"] == 0
    assert [point["slope"] for point in unmoved["slopes"]] == [None, None, None]


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_small_log", "fixed_large"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_steps_weight_is_that_of_the_samplers_own_gaussians(variance_type, prediction_type):
    """KL of two Gaussians of one variance: ||difference of means||^2 / (2 variance), both taken from `step`."""
    scheduler = DDPMScheduler(
        clip_sample=False,
        variance_type=variance_type,
        prediction_type=prediction_type,
        steps_offset=1,
        timestep_spacing="leading",
    )
    scheduler.set_timesteps(7)
    generator = torch.Generator().manual_seed(0)
    sample, one, other = torch.randn(3, 1, 4, 8, 8, generator=generator, dtype=torch.float64)

    def step(prediction: torch.Tensor, timestep: int, seed: int) -> torch.Tensor:
        return scheduler.step(prediction, timestep, sample, generator=torch.Generator().manual_seed(seed)).prev_sample

    for timestep in scheduler.timesteps.tolist()[:-1]:
        means_apart = step(one, timestep, 0) - step(other, timestep, 0)  # equal noise cancels
        first, second = (
            torch.randn(one.shape, generator=torch.Generator().manual_seed(s), dtype=one.dtype) for s in (0, 1)
        )
        noise = step(one, timestep, 0) - step(one, timestep, 1)
        variance = (noise.square().sum() / (first - second).square().sum()).item()
        expected = means_apart.square().sum().item() / (2 * variance)
        weight = analysis.path_kl_weight(scheduler, timestep)
        assert weight * (one - other).square().sum().item() == pytest.approx(expected, rel=1e-4)
    last = analysis.path_kl_weight(scheduler, scheduler.timesteps.tolist()[-1])
    assert (last > 0) == (variance_type == "fixed_large")  # which adds noise even there


def test_the_weight_for_noise_is_ho_and_others():
    """With every timestep a step: beta_t^2 / (2 sigma_t^2 alpha_t (1 - alphabar_t)), sigma_t^2 = beta_t."""
    scheduler = DDPMScheduler(variance_type="fixed_large")
    beta, alphabar = scheduler.betas[500].item(), scheduler.alphas_cumprod[500].item()
    assert analysis.path_kl_weight(scheduler, 500) == pytest.approx(beta / (2 * (1 - beta) * (1 - alphabar)), rel=1e-4)


def test_path_kl_equals_two_models_along_one_chain(full):
    """The base is sampled by hand, without guidance, and both UNets are asked at each of its samples."""
    base, personalized = load_pipeline(), load(full)
    for pipeline in (base, personalized):
        pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    assert analysis.PathKL.covers(base)
    sampling = Sampling(num_inference_steps=4, guidance_scale=1.0, batch_size=2, seed=5)
    prompts = MEASURED_PROMPTS[:3]
    meter = analysis.PathKL(base, prompts, sampling)
    assert meter.measure(base).abs().max() == 0
    got = meter.measure(personalized)

    scheduler = DDPMScheduler.from_config(base.scheduler.config)
    scheduler.set_timesteps(4)
    for chain, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(5 + chain)
        sample = torch.randn(1, 4, 8, 8, generator=generator)
        for row, timestep in enumerate(scheduler.timesteps):
            with torch.no_grad():
                base_noise, personalized_noise = (
                    p.unet(sample, timestep, p.encode_prompt(prompt, CPU, 1, False)[0]).sample
                    for p in (base, personalized)
                )
            cost = (
                analysis.path_kl_weight(scheduler, int(timestep))
                * (personalized_noise - base_noise).square().sum().item()
            )
            assert got[row, chain].item() == pytest.approx(cost, rel=1e-3, abs=1e-12)
            sample = scheduler.step(base_noise, timestep, sample, generator=generator).prev_sample
    assert got[-1].max() == 0 and got[:-1].min() > 0
