"""OutputProbe: by definition, honest about its error, without a trace on training; UNets, adapters, transformers."""

import math

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from support.runs import PARITY, ROOT
from torch import Tensor, nn

from diffusers_lipreg.probe import Denoiser, OutputProbe, pipeline_denoiser

SHAPE = (4, 8, 8)
PROMPTS = ["a dog", "a house", "the sea"]


def tiny_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4, dropout=0.5,
    )  # fmt: skip


def states(prompts: list[str]) -> Tensor:
    """Text states (B, 3, 16) that say which prompt it is."""
    return torch.stack([torch.randn(3, 16, generator=torch.Generator().manual_seed(len(p))) for p in prompts])


def denoiser(unet: nn.Module) -> Denoiser:
    return Denoiser(lambda x, t, prompts: unet(x, t, states(prompts), return_dict=False)[0], [unet])


def disturb(module: nn.Module, size: float = 0.02) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data += size * torch.randn(parameter.shape, generator=generator).to(parameter)


@pytest.mark.parametrize("scheduler", [DDPMScheduler(), EulerDiscreteScheduler()], ids=lambda s: type(s).__name__)
def test_it_is_the_direct_computation_with_two_models(scheduler):
    base, tuned = tiny_unet().eval(), tiny_unet().train()
    disturb(tuned)
    probe = OutputProbe(denoiser(base), scheduler, SHAPE, prompts=PROMPTS, batch_size=2)
    reading = probe.measure(denoiser(tuned))
    assert reading.timesteps == [874, 624, 374, 124]  # the middles of four bins of a thousand
    tuned.eval()
    ours, theirs, teacher = [], {}, []
    with torch.no_grad():
        for sample, timestep, prompts, _ in probe._probes:
            e0, e = (unet(sample, timestep, states(prompts)).sample.double() for unet in (base, tuned))
            ours.append((e - e0).square().flatten(1).mean(1))
            teacher.append(e0.square().flatten(1).mean(1))
            theirs.setdefault(timestep.item(), []).append((ours[-1], teacher[-1]))
    drift, squares = torch.cat(ours).mean().item(), torch.cat(teacher).mean().item()
    expected = {
        t: (torch.cat([d for d, _ in x]).mean() / torch.cat([s for _, s in x]).mean()).item()
        for t, x in theirs.items()
    }
    assert 0 < drift
    assert reading.output_drift == pytest.approx(drift, rel=1e-5)
    assert reading.output_drift_relative == pytest.approx(drift / squares, rel=1e-5)
    assert reading.by_timestep == pytest.approx(expected, rel=1e-5)


def test_it_is_exactly_zero_at_the_base_and_leaves_no_trace():
    """Dropout of one half is off while it is measured; the modes, the random stream and the scheduler stay."""
    unet, scheduler = tiny_unet().train(), DDPMScheduler()
    unet.mid_block.eval()
    before, timesteps = torch.get_rng_state(), scheduler.timesteps.clone()
    probe = OutputProbe(denoiser(unet), scheduler, SHAPE, prompts=PROMPTS)
    reading = probe.measure(denoiser(unet))
    assert set(reading.logs.values()) == {0.0}
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(scheduler.timesteps, timesteps)
    assert (
        unet.training
        and unet.conv_in.training
        and not unet.mid_block.training
        and not unet.mid_block.resnets[0].training
    )
    assert not any(probe_.prediction.requires_grad for probe_ in probe._probes)


def test_it_keeps_predictions_and_no_weights():
    unet = tiny_unet()
    probe = OutputProbe(denoiser(unet), DDPMScheduler(), SHAPE, prompts=PROMPTS)
    held = [tensor for kept in probe._probes for tensor in (kept.sample, kept.prediction)]
    assert sum(tensor.numel() for tensor in held) == 2 * len(PROMPTS) * 4 * math.prod(SHAPE)


def test_its_standard_error_is_honest():
    """Over probes of random prompts and noise, the readings scatter as each of them says."""
    base, tuned = tiny_unet(), tiny_unet()
    disturb(tuned, 0.05)
    readings = []
    for seed in range(30):
        prompts = [
            "x" * length for length in torch.randint(1, 500, (6,), generator=torch.Generator().manual_seed(seed))
        ]
        probe = OutputProbe(denoiser(base), DDPMScheduler(), SHAPE, prompts=prompts, bins=2, seed=seed)
        readings.append(probe.measure(denoiser(tuned)))
    scatter = torch.tensor([reading.output_drift_relative for reading in readings]).std().item()
    said = torch.tensor([reading.standard_error**2 for reading in readings]).mean().sqrt().item()
    assert said == pytest.approx(scatter, rel=0.3)  # 30 readings know their scatter to 13 %
    assert scatter > 0.01 * readings[0].output_drift_relative


def test_the_chains_are_samples_of_the_model():
    """The least noisy probes of a pipeline that knows a world look like its world: less like noise than the first."""
    pipe = StableDiffusionPipeline.from_pretrained(ROOT / "tests/testbed/pipeline", dtype=torch.float32)
    prompts = ["a photo of a red circle on a blue background"] * 4
    probe = OutputProbe(pipeline_denoiser(pipe), pipe.scheduler, (8, 8, 8), prompts=prompts)
    last = probe._probes[3]
    alpha = pipe.scheduler.alphas_cumprod[last.timestep]
    clean = (last.sample - (1 - alpha).sqrt() * last.prediction) / alpha.sqrt()
    with torch.no_grad():
        picture = pipe.vae.decode(clean / pipe.vae.config.scaling_factor).sample.clamp(-1, 1)
    corner = picture[:, :, :8, :8].mean(dim=(0, 2, 3))
    assert corner[2] > corner[0] + 0.5  # a blue background


def test_adapters():
    unet = tiny_unet()
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], lora_dropout=0.5))
    probe = OutputProbe(denoiser(unet), DDPMScheduler(), SHAPE, prompts=PROMPTS)
    assert probe.measure(denoiser(unet)).output_drift == 0
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.3
    drift = probe.measure(denoiser(unet)).output_drift
    unet.disable_adapters()
    assert drift > 0 == probe.measure(denoiser(unet)).output_drift


@pytest.mark.parametrize("kind", [StableDiffusionPipeline, StableDiffusionXLPipeline])
def test_pipelines_with_their_text_encoders(kind):
    folder = PARITY / ("pipeline_sdxl" if kind is StableDiffusionXLPipeline else "pipeline")
    base, tuned = (kind.from_pretrained(folder, safety_checker=None) for _ in range(2))
    shape = (base.unet.config.in_channels, 8, 8)
    probe = OutputProbe(pipeline_denoiser(base), base.scheduler, shape)
    assert probe.measure(pipeline_denoiser(tuned)).output_drift == 0
    disturb(tuned.text_encoder, 0.1)
    assert probe.measure(pipeline_denoiser(tuned)).output_drift > 0


def test_a_transformer_that_matches_flows():
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, out_channels=4,
    )  # fmt: skip

    def predict(sample: Tensor, timestep: Tensor, prompts: list[str]) -> Tensor:
        text = states(prompts)
        return model(sample, text, text[:, 0], timestep.expand(len(sample)), return_dict=False)[0]

    probe = OutputProbe(Denoiser(predict, [model]), FlowMatchEulerDiscreteScheduler(shift=3.0), SHAPE, prompts=PROMPTS)
    assert probe.measure(Denoiser(predict, [model])).output_drift == 0
    disturb(model)
    assert 0 < probe.measure(Denoiser(predict, [model])).output_drift_relative < 10


@pytest.mark.parametrize("scheduler", [EDMEulerScheduler(), PNDMScheduler()], ids=lambda s: type(s).__name__)
def test_other_schedulers(scheduler):
    unet = tiny_unet()
    probe = OutputProbe(denoiser(unet), scheduler, SHAPE, prompts=PROMPTS)
    assert probe.measure(denoiser(unet)).output_drift == 0
    disturb(unet)
    assert 0 < probe.measure(denoiser(unet)).output_drift_relative < 10


def test_a_probe_without_prompts_is_refused():
    with pytest.raises(ValueError, match="at least one prompt"):
        OutputProbe(denoiser(tiny_unet()), DDPMScheduler(), SHAPE, prompts=[])
