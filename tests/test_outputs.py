"""OutputSnapshot: what it records of any family, what it computes, and what it leaves as it was."""

import copy
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from support.pipelines import FAMILIES, family
from support.runs import ROOT
from torch import Tensor, nn

from diffusers_lipreg.losses import LipschitzDriftLoss
from diffusers_lipreg.output_drift import OutputDrift
from diffusers_lipreg.outputs import OutputSnapshot
from diffusers_lipreg.recording import floats, tensors

PROMPTS = ["a dog", "a house on a hill"]
FEW = {"prompts": PROMPTS, "chains": 2, "points": 6, "steps": (2, 5)}


def disturb(module: nn.Module, size: float = 0.02) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data += size * torch.randn(parameter.shape, generator=generator).to(parameter)


@contextmanager
def watched(module: nn.Module) -> Iterator[list[tuple[tuple, dict, Any]]]:
    """The calls of a module inside the block: arguments and output."""
    calls: list[tuple[tuple, dict, Any]] = []
    handle = module.register_forward_hook(
        lambda _, args, kwargs, output: calls.append((args, kwargs, output)), with_kwargs=True
    )
    yield calls
    handle.remove()


def inputs_of(snapshot: OutputSnapshot, module: nn.Module) -> list[Tensor]:
    """All tensors that are replayed, but for single numbers such as timesteps."""
    with watched(module) as calls:
        snapshot.measure(module)
    return [tensor for args, kwargs, _ in calls for tensor in tensors((args, kwargs)) if tensor.numel() > 1]


def holds(pool: list[Tensor], tensor: Tensor) -> bool:
    return any(torch.equal(tensor, other) for other in pool)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_recorded_and_replayed(name: str) -> None:
    """Nothing at the base, something after a change, and a gradient for every weight that the prediction depends on."""
    pipeline, denoiser, size = family(name)
    snapshot = OutputSnapshot(pipeline, denoiser, **FEW, **size)
    assert snapshot.measure(denoiser).output_drift == snapshot.measure(pipeline).output_drift == 0
    disturb(denoiser)
    reading = snapshot.measure(denoiser)
    assert 0 < reading.output_drift_percent < 300
    assert len(reading.by_timestep) > 1
    assert snapshot.measure(pipeline).output_drift == pytest.approx(reading.output_drift, rel=1e-5)
    with watched(denoiser) as calls:
        snapshot.add_gradient_(denoiser, "output", 1.0)
    reached = [n for n, p in denoiser.named_parameters() if p.grad is not None and p.grad.any()]
    denoiser.zero_grad()
    args, kwargs, _ = calls[0]
    floats(denoiser(*args, **kwargs))[0].square().sum().backward()
    assert reached == [n for n, p in denoiser.named_parameters() if p.grad is not None and p.grad.any()]
    assert len(reached) > 0.8 * len(list(denoiser.parameters()))


@pytest.mark.parametrize("name", FAMILIES)
def test_text_encoders_are_held_by_their_own_calls(name: str) -> None:
    pipeline, denoiser, size = family(name)
    encoder = pipeline.text_encoder
    snapshot = OutputSnapshot(pipeline, encoder, **FEW, **size)
    yardstick = OutputSnapshot(pipeline, denoiser, **FEW, **size)
    assert snapshot.measure(encoder).output_drift == 0
    disturb(encoder, 0.1)
    snapshot.add_gradient_(encoder, "output", 1.0)
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in encoder.parameters())
    assert snapshot.measure(encoder).output_drift > 0 == yardstick.measure(denoiser).output_drift
    assert yardstick.measure(pipeline).output_drift > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_value_and_gradient_are_those_of_two_models(name: str) -> None:
    """The pretrained model computes its predictions again, from the calls that the trained one is given."""
    pipeline, denoiser, size = family(name)
    snapshot = OutputSnapshot(pipeline, denoiser, batch_size=5, **FEW, **size)
    base = copy.deepcopy(denoiser).eval()
    disturb(denoiser)
    held = next(denoiser.parameters())
    held.grad = torch.ones_like(held)
    with watched(denoiser) as calls:
        drift = snapshot.add_gradient_(denoiser, "output", 3.0, scale=8.0)
    denoiser.eval()
    errors = [
        (floats(denoiser(*args, **kwargs))[0] - floats(base(*args, **kwargs))[0].detach()).square().flatten(1)
        for args, kwargs, _ in calls
    ]
    expected = torch.cat(errors).mean()
    assert len(torch.cat(errors)) == 5
    torch.testing.assert_close(drift.value, expected.detach(), rtol=1e-6, atol=0)
    parameters = dict(denoiser.named_parameters())
    gradients = torch.autograd.grad(24.0 * expected, parameters.values(), allow_unused=True)
    for (key, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        if gradient is not None:
            found = parameter.grad - 1 if parameter is held else parameter.grad
            tolerance = 1e-6 * max(gradient.abs().max().item(), 1.0)
            torch.testing.assert_close(found, gradient, rtol=1e-5, atol=tolerance, msg=key)


def test_the_loss_can_be_differentiated_too() -> None:
    pipeline, unet, _ = family("SD1.5")
    routes = [LipschitzDriftLoss(OutputSnapshot(pipeline, unet, **FEW), 2.0, "output") for _ in range(2)]
    disturb(unet)
    loss = routes[0](unet)
    loss.backward()
    gradients = [parameter.grad for parameter in unet.parameters()]
    unet.zero_grad()
    assert routes[1].add_gradient_(unet).value.item() == pytest.approx(loss.item() / 2, rel=1e-6)
    torch.testing.assert_close([parameter.grad for parameter in unet.parameters()], gradients)


def test_logs_are_in_percent_of_the_pretrained_predictions() -> None:
    pipeline, unet, _ = family("SD1.5")
    snapshot = OutputSnapshot(pipeline, unet, **FEW, batch_size=6)
    penalty = LipschitzDriftLoss(snapshot, 2.0, "output")
    disturb(unet)
    penalty.measure(unet)
    reading = snapshot.measure(unet)
    assert penalty.logs == {
        "loss_drift": pytest.approx(2 * reading.output_drift), "drift": pytest.approx(reading.output_drift),
        "drift_percent": pytest.approx(reading.output_drift_percent),
    }  # fmt: skip


def test_nothing_is_changed_besides_gradients() -> None:
    """Dropout of one half is off; modes, hooks, the random stream, the pipeline and its scheduler stay."""
    pipeline, unet, _ = family("SD1.5")
    for part in unet.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.5
    unet.train()
    unet.mid_block.eval()
    pipeline.set_progress_bar_config(disable=False, desc="mine")
    pipeline.scheduler.set_timesteps(7)
    modes = {name: part.training for name, part in pipeline.unet.named_modules()}
    before, stream = {**vars(pipeline)}, torch.get_rng_state()
    scheduler = {key: str(value) for key, value in vars(pipeline.scheduler).items()}
    snapshot = OutputSnapshot(pipeline, unet, **FEW)
    assert snapshot.measure(unet).output_drift == snapshot.measure(pipeline).output_drift == 0
    assert snapshot.add_gradient_(unet, "output", 1.0).value < 1e-10
    assert vars(pipeline) == before and torch.equal(torch.get_rng_state(), stream)
    assert {key: str(value) for key, value in vars(pipeline.scheduler).items()} == scheduler
    assert {name: part.training for name, part in pipeline.unet.named_modules()} == modes
    assert not any(part._forward_hooks or "forward" in vars(part) for part in unet.modules())


def test_a_sampler_that_draws_global_numbers_gives_them_back() -> None:
    class Noisy(DDPMScheduler):
        def step(self, *args: Any, generator: Any = None, **options: Any) -> Any:
            return super().step(*args, **options)

    pipeline, unet, _ = family("SD1.5")
    pipeline.scheduler = Noisy.from_config(pipeline.scheduler.config)
    stream = torch.get_rng_state()
    OutputSnapshot(pipeline, unet, **FEW)
    assert torch.equal(torch.get_rng_state(), stream)


def test_recordings_share_neither_prompt_nor_noise_with_others() -> None:
    pipeline, unet, _ = family("SD1.5")
    first = inputs_of(OutputSnapshot(pipeline, unet, **FEW), unet)
    again = inputs_of(OutputSnapshot(pipeline, unet, **FEW), unet)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    other = inputs_of(OutputSnapshot(pipeline, unet, **{**FEW, "prompts": ["the sea", "a hat"]}, seed=1), unet)
    assert not any(holds(first, tensor) for tensor in other)


def test_steps_and_noise_vary_from_chain_to_chain() -> None:
    pipeline, unet, _ = family("SD1.5")
    reading = OutputSnapshot(pipeline, unet, prompts=["a dog"], chains=8, points=24).measure(unet)
    assert reading.chains.unique().tolist() == list(range(8))
    assert len(reading.timesteps.unique()) > 18 and reading.timesteps.min() < 150 < 800 < reading.timesteps.max()
    samples = [t for t in inputs_of(OutputSnapshot(pipeline, unet, prompts=["a dog"], chains=4, points=4), unet)]
    assert sum(holds(samples[:number], tensor) for number, tensor in enumerate(samples)) == 3  # the prompt, again


def test_as_many_chains_are_sampled_as_the_points_need() -> None:
    """All calls of a chain count, in the order of the prompts, which begins again."""
    pipeline, unet, _ = family("SD1.5")
    snapshot = OutputSnapshot(pipeline, unet, prompts=["a dog", "a cat"], points=50, steps=(8, 10))
    reading = snapshot.measure(unet)
    sizes = [int((reading.chains == chain).sum()) for chain in reading.chains.unique()]
    assert sum(sizes) == 50 and len(sizes) in (5, 6) and min(sizes[:-1]) >= 9  # one call more than steps
    distinct = {str(tensor) for tensor in inputs_of(snapshot, unet) if tensor.ndim == 3}
    assert len(distinct) == 2  # prompt embeddings


def test_guidance_can_be_asked_for() -> None:
    """Then each call has two samples, of which one belongs to the empty prompt."""
    pipeline, unet, _ = family("SD1.5")
    snapshot = OutputSnapshot(pipeline, unet, **FEW, guidance_scale=4.0)
    assert {len(tensor) for tensor in inputs_of(snapshot, unet)} == {2}
    assert snapshot.measure(unet).output_drift == 0 and snapshot.add_gradient_(unet, "output", 1.0).value < 1e-10


def test_memory_is_that_of_the_shapes() -> None:
    pipeline, unet, _ = family("SD1.5")
    snapshot = OutputSnapshot(pipeline, unet, **FEW)
    timesteps = len(snapshot.measure(unet).timesteps.unique())
    samples, predictions, prompt_embeds = (6 * 4 * 8 * 8 * 4,) * 2 + (2 * 77 * 32 * 4,)
    assert snapshot.nbytes == samples + predictions + prompt_embeds + 8 * timesteps


def test_of_a_text_encoder_only_what_the_pipeline_uses_is_held() -> None:
    """SDXL takes the next to last hidden states of its second text encoder, and the pooled embeddings."""
    pipeline, _, _ = family("SDXL")
    snapshot = OutputSnapshot(pipeline, pipeline.text_encoder_2, prompts=PROMPTS, points=2, steps=(2, 2))
    assert snapshot.nbytes == 2 * (77 * 32 * 4 + 32 * 4 + 77 * 8)
    assert snapshot.elements == 77 * 32 + 32


def test_a_compiled_module_is_recorded_and_replayed_as_it_was_before() -> None:
    pipeline, unet, _ = family("SD1.5")
    compiled = torch.compile(unet)
    for pipeline.unet in (unet, compiled):
        snapshot = OutputSnapshot(pipeline, compiled, **FEW)
        assert snapshot.measure(compiled).output_drift == snapshot.measure(unet).output_drift == 0
        assert snapshot.add_gradient_(compiled, "output", 1.0).value < 1e-10


def test_adapters_are_held_and_need_no_switching() -> None:
    pipeline, unet, _ = family("SD1.5")
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], lora_dropout=0.5))
    snapshot = OutputSnapshot(pipeline, unet, **FEW)
    assert snapshot.measure(unet).output_drift == 0
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.3
    assert snapshot.add_gradient_(unet, "output", 1.0).value > 0
    assert all((p.grad is not None and p.grad.any()) == ("lora_" in n) for n, p in unet.named_parameters())
    drift = snapshot.measure(unet).output_drift
    unet.disable_adapters()
    assert drift > 0 == snapshot.measure(unet).output_drift


def test_every_point_comes_once_before_one_comes_again_and_a_resumed_run_goes_on() -> None:
    pipeline, unet, _ = family("SD1.5")
    disturb(unet)
    first, second = (OutputSnapshot(pipeline, unet, **FEW, batch_size=4) for _ in range(2))
    disturb(unet, 0.01)
    seen: list[Tensor] = []
    drifts = []
    for step in range(6):
        if step == 3:
            second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        with watched(unet) as calls:
            drifts.append(first.add_gradient_(unet, "output", 1.0))
        seen += calls[0][0][0].unbind()
        assert step < 3 or second.add_gradient_(unet, "output", 1.0) == drifts[-1]
    turns = [{str(sample) for sample in seen[turn : turn + 6]} for turn in (0, 6, 12, 18)]
    assert [len(turn) for turn in turns] == [6, 6, 6, 6] and turns[0] == turns[1] == turns[2]
    assert [str(sample) for sample in seen[:6]] != [str(sample) for sample in seen[6:12]]
    assert drifts[-1].squared_distance == pytest.approx(sum(drift.value.item() for drift in drifts) / 6)


def test_at_weight_0_it_only_measures() -> None:
    pipeline, unet, _ = family("SD1.5")
    snapshot = OutputSnapshot(pipeline, unet, **FEW)
    disturb(unet)
    assert snapshot.add_gradient_(unet, "output", 0.0).value > 0
    assert all(parameter.grad is None for parameter in unet.parameters())


class Mixing(UNet2DConditionModel):
    """A model whose samples are not independent of each other."""

    def forward(self, sample: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        return (super().forward(sample, *args, **kwargs)[0] + sample.mean(dim=0),)


def test_a_model_that_cannot_take_batches_gets_its_points_one_by_one() -> None:
    pipeline, unet, _ = family("SD1.5")
    unet.__class__ = Mixing
    snapshot = OutputSnapshot(pipeline, unet, **FEW)
    with watched(unet) as calls:
        assert snapshot.add_gradient_(unet, "output", 1.0).value == 0
    assert [len(args[0]) for args, *_ in calls] == [1, 1, 1, 1]


def test_half_precision_by_autocast() -> None:
    pipeline, unet, _ = family("SD1.5")
    with torch.autocast("cpu", torch.bfloat16):
        snapshot = OutputSnapshot(pipeline, unet, **FEW)
        assert snapshot.measure(unet).output_drift == 0
        assert snapshot.add_gradient_(unet, "output", 1.0).value < 1e-4
        with watched(unet) as calls:
            snapshot.add_gradient_(unet, "output", 1.0)
    assert [len(args[0]) for args, *_ in calls] == [4]


def test_gradient_checkpointing_changes_nothing() -> None:
    pipeline, unet, _ = family("SD1.5")
    snapshots = [OutputSnapshot(pipeline, unet, **FEW) for _ in range(2)]
    disturb(unet)
    gradients = []
    for snapshot in snapshots:
        unet.zero_grad()
        snapshot.add_gradient_(unet, "output", 1.0)
        gradients.append([parameter.grad for parameter in unet.parameters()])
        unet.enable_gradient_checkpointing()
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("scheduler", [DDPMScheduler(), EulerDiscreteScheduler()], ids=lambda s: type(s).__name__)
def test_other_samplers(scheduler: Any) -> None:
    pipeline, unet, _ = family("SD1.5")
    pipeline.scheduler = scheduler
    snapshot = OutputSnapshot(pipeline, unet, **FEW)
    assert snapshot.measure(unet).output_drift == snapshot.measure(pipeline).output_drift == 0
    disturb(unet)
    assert snapshot.measure(pipeline).output_drift == pytest.approx(snapshot.measure(unet).output_drift, rel=1e-5)


def test_a_reading_by_hand() -> None:
    """Two chains of two points; the standard error is that of the ratio of their two independent sums."""
    reading = OutputDrift(*(torch.tensor(row, dtype=torch.float64) for row in (
        [0.1, 0.3, 0.2, 0.2], [1.0, 1.0, 1.0, 3.0], [0, 0, 1, 1], [0, 3, 0, 3], [900.0, 100.0, 800.0, 140.0],
    )))  # fmt: skip
    residuals = [0.4 - 2.0 * 0.8 / 6, 0.4 - 4.0 * 0.8 / 6]
    assert reading.output_drift == pytest.approx(0.2)
    assert reading.output_drift_relative == pytest.approx(0.8 / 6)
    assert reading.standard_error_percent == pytest.approx(100 * abs(residuals[0] - residuals[1]) / 6)
    assert reading.logs.keys() == {
        "output_drift", "output_drift_percent", "output_drift_percent_se", "output_drift_percent_t850",
        "output_drift_percent_t120",
    }  # fmt: skip
    assert reading.logs["output_drift_percent_t120"] == pytest.approx(100 * 0.5 / 4)


def test_its_standard_error_is_honest() -> None:
    """Over recordings of other prompts and noise, the readings scatter as each of them says."""
    pipeline, unet, _ = family("SD1.5")
    tuned = copy.deepcopy(unet)
    disturb(tuned, 0.05)
    readings = []
    for seed in range(30):
        prompts = [f"{seed} {word}" for word in ("dog", "cat", "house", "sea", "tree", "hat")]
        snapshot = OutputSnapshot(pipeline, unet, prompts=prompts, chains=6, points=12, seed=seed, steps=(2, 4))
        readings.append(snapshot.measure(tuned))
    scatter = torch.tensor([reading.output_drift_percent for reading in readings]).std().item()
    said = math.sqrt(sum(reading.standard_error_percent**2 for reading in readings) / 30)
    assert said == pytest.approx(scatter, rel=0.35)  # 30 readings know their scatter to 13 %
    assert scatter > 0.01 * readings[0].output_drift_percent


def test_the_chains_are_samples_of_the_model() -> None:
    """The last calls in a pipeline that knows a world are about its world: a blue background."""
    pipeline = StableDiffusionPipeline.from_pretrained(ROOT / "tests/testbed/pipeline", dtype=torch.float32)
    prompts = ["a photo of a red circle on a blue background"] * 4
    snapshot = OutputSnapshot(pipeline, pipeline.unet, prompts=prompts, chains=4, points=32, steps=(16, 24))
    with watched(pipeline.unet) as calls:
        snapshot.measure(pipeline.unet)
    args, _, (prediction,) = min(calls, key=lambda call: call[0][1])
    alpha = pipeline.scheduler.alphas_cumprod[args[1]]
    clean = (args[0] - (1 - alpha).sqrt() * prediction) / alpha.sqrt()
    with torch.no_grad():
        picture = pipeline.vae.decode(clean / pipeline.vae.config.scaling_factor).sample.clamp(-1, 1)
    corner = picture[:, :, :8, :8].mean(dim=(0, 2, 3))
    assert corner[2] > corner[0] + 0.5


def test_what_cannot_be_recorded_is_refused() -> None:
    pipeline, unet, _ = family("SD1.5")
    with pytest.raises(ValueError, match="got 0 prompts, 6 points"):
        OutputSnapshot(pipeline, unet, prompts=[], points=6)
    with pytest.raises(ValueError, match="The Linear is no part of the StableDiffusionPipeline"):
        OutputSnapshot(pipeline, nn.Linear(1, 1), prompts=PROMPTS)
    with pytest.raises(ValueError, match="The StableDiffusionPipeline did not call its vae"):
        OutputSnapshot(pipeline, pipeline.vae, **FEW)
    with pytest.raises(ValueError, match=r"must be one of output .*, got 'sum'"):
        LipschitzDriftLoss(OutputSnapshot(pipeline, unet, **FEW), 1.0, "sum")
