"""TeacherSnapshotCallback: by hand in a loop, and in transformers.Trainer with resuming."""

import math
from pathlib import Path

import pytest
import torch
from support.pipelines import family
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.nn.utils import clip_grad_norm_
from transformers import Trainer, TrainingArguments, get_linear_schedule_with_warmup

from diffusers_lipreg import LipschitzDriftLoss, OutputSnapshot, TeacherSnapshot, TeacherSnapshotCallback
from diffusers_lipreg.drift import REDUCTIONS

STEPS, LEARNING_RATE, MAX_NORM = 8, 1e-2, 0.5
KEYS = ("loss_drift", "drift", "drift_relative")


class Model(nn.Module):
    """Small, and with the loss in its output, as the Trainer wants it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        prediction = self.layers(x)
        return {"loss": mse_loss(prediction, labels), "logits": prediction}


def photos() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"x": torch.randn(4, generator=generator), "labels": 3 * torch.randn(2, generator=generator)} for _ in range(6)
    ]


def flat(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def expected_logs(module: nn.Module, start: nn.Module, weight: float, reduction: str) -> dict[str, float]:
    """The three numbers by their definitions, in float64."""
    teachers = {name: teacher.detach().double() for name, teacher in start.named_parameters()}
    squares = {n: (p.detach().double() - teachers[n]).square() for n, p in module.named_parameters()}
    drift = sum((s.mean() if reduction == "tensor_mean" else s.sum()).item() for s in squares.values())
    distance = math.sqrt(sum(square.sum().item() for square in squares.values()))
    norm = math.sqrt(sum(teacher.square().sum().item() for teacher in teachers.values()))
    return {"loss_drift": weight * drift, "drift": drift, "drift_relative": distance / norm}


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_loop_that_calls_it_by_hand(reduction):
    """The weights are those of `add_gradient_` in the same loop; the logs are the drift that each step met."""
    theirs, ours = Model(), Model()
    callback = TeacherSnapshotCallback(20.0, reduction, prefix="unet_")
    callback.on_train_begin(model=ours)
    penalty = LipschitzDriftLoss(TeacherSnapshot(theirs), 20.0, reduction)
    assert callback.logs == {}
    for batch in photos():
        met = expected_logs(ours, Model(), 20.0, reduction)
        for model in (theirs, ours):
            model.zero_grad()
            (512.0 * model(**batch)["loss"]).backward()
        penalty.add_gradient_(theirs, scale=512.0)
        callback.on_pre_optimizer_step(model=ours, loss_scale=512.0)
        for parameter in [*theirs.parameters(), *ours.parameters()]:
            parameter.data.sub_(parameter.grad / 512.0, alpha=LEARNING_RATE)
        callback.on_log(logs=(logs := {"loss": 1.0}))
        assert logs == pytest.approx({"loss": 1.0} | {f"unet_{key}": met[key] for key in KEYS}, rel=1e-5)
    assert torch.equal(flat(ours), flat(theirs))

    callback.on_train_end(model=ours)
    final = expected_logs(ours, Model(), 20.0, reduction)
    assert callback.logs == pytest.approx({f"unet_{key}": final[key] for key in KEYS}, rel=1e-5)


def test_a_snapshot_of_ones_own():
    model = nn.Sequential(nn.Linear(1, 1))
    snapshot = TeacherSnapshot(model, names=["0.weight"])
    callback = TeacherSnapshotCallback(1.0, "sum", snapshot=snapshot)
    callback.on_train_begin(model=model)
    assert callback.loss.snapshot is snapshot and callback.loss.reduction == "sum" and callback.loss.weight == 1.0


def test_a_step_or_the_end_without_a_teacher_is_an_error():
    for event in ("on_pre_optimizer_step", "on_train_end"):
        with pytest.raises(ValueError, match="no teacher yet"):
            getattr(TeacherSnapshotCallback(1.0, "sum"), event)(model=nn.Linear(1, 1))


def trainer(output_dir: Path, callbacks: list, batches: list | None = None, max_steps: int = STEPS) -> Trainer:
    """A Trainer over `photos`, two at a time in random order, clipping; `batches` records what it trains on."""

    def collate(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch = {key: torch.stack([example[key] for example in examples]) for key in examples[0]}
        if batches is not None:
            batches.append(batch)
        return batch

    arguments = TrainingArguments(
        output_dir=str(output_dir),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        max_steps=max_steps,
        per_device_train_batch_size=2,
        learning_rate=LEARNING_RATE,
        optim="adamw_torch",
        weight_decay=0.0,
        max_grad_norm=MAX_NORM,
        logging_steps=1,
        save_steps=4,
    )
    return Trainer(Model(), arguments, train_dataset=photos(), data_collator=collate, callbacks=callbacks)


def steps_of(trainer: Trainer) -> list[dict[str, float]]:
    """What was logged at each step (the last entry of the history sums up the run)."""
    return [{key: entry[key] for key in ("step", *KEYS)} for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_in_a_trainer_it_is_the_loop_written_by_hand(fresh_accelerate, tmp_path, reduction):
    """In the Trainer's order: backward, clip, penalty, AdamW, linear schedule."""
    batches: list[dict[str, Tensor]] = []
    callback = TeacherSnapshotCallback(20.0, reduction)
    run = trainer(tmp_path, [callback], batches)
    run.train()

    model = Model()
    penalty = LipschitzDriftLoss(TeacherSnapshot(model), 20.0, reduction)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, STEPS)
    logs = []
    for step, batch in enumerate(batches[:STEPS], start=1):
        logs.append({"step": step} | expected_logs(model, Model(), 20.0, reduction))
        optimizer.zero_grad()
        model(**batch)["loss"].backward()
        assert clip_grad_norm_(model.parameters(), MAX_NORM) > MAX_NORM
        penalty.add_gradient_(model)
        optimizer.step()
        schedule.step()

    torch.testing.assert_close(flat(run.model), flat(model), rtol=1e-6, atol=1e-7)
    for met, expected in zip(steps_of(run), logs, strict=True):
        assert met == pytest.approx(expected, rel=1e-5)
    assert callback.logs == pytest.approx(expected_logs(model, Model(), 20.0, reduction), rel=1e-5)


def test_in_a_trainer_a_large_weight_holds_the_model(fresh_accelerate, tmp_path):
    distances = []
    for callbacks in ([], [TeacherSnapshotCallback(1e3, "sum")]):
        run = trainer(tmp_path, callbacks, max_steps=40)
        run.train()
        distances.append((flat(run.model) - flat(Model())).norm().item())
    assert distances[1] < 0.1 * distances[0]


def test_a_resumed_trainer_measures_from_the_pretrained_model(fresh_accelerate, tmp_path):
    """Step 5, the first after the resumption, meets the drift that it met in the run that was not interrupted."""
    whole = trainer(tmp_path, [TeacherSnapshotCallback(20.0, "sum")])
    whole.train()
    callback = TeacherSnapshotCallback(20.0, "sum")
    resumed = trainer(tmp_path, [callback])
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert len(steps_of(resumed)) == STEPS
    assert steps_of(resumed)[:5] == steps_of(whole)[:5]
    assert callback.logs == pytest.approx(expected_logs(resumed.model, Model(), 20.0, "sum"), rel=1e-5)


def test_a_resumed_trainer_needs_it_from_the_start(fresh_accelerate, tmp_path):
    """Added after construction, it would meet the checkpoint's weights first; without resumption it may come late."""
    first = trainer(tmp_path, [])
    first.add_callback(TeacherSnapshotCallback(20.0, "sum"))
    first.train()
    assert steps_of(first)[-1]["drift"] > 0
    second = trainer(tmp_path, [])
    second.add_callback(TeacherSnapshotCallback(20.0, "sum"))
    with pytest.raises(ValueError, match="resumes at step 4.*not to add_callback"):
        second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_logs_of_a_teacher_that_is_zero():
    module = nn.Linear(2, 2)
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    callback = TeacherSnapshotCallback(1.0, "sum")
    callback.on_train_begin(model=module)
    callback.on_pre_optimizer_step(model=module)
    assert callback.logs["drift"] == 0


def test_outputs_are_held_by_a_recording_that_is_given():
    """Which the callback cannot make itself, as it knows no pipeline."""
    pipeline, unet, _ = family("SD1.5")
    snapshot = OutputSnapshot(pipeline, unet, prompts=["a dog"], points=4, steps=(4, 4))
    callback = TeacherSnapshotCallback(2.0, "output", snapshot=snapshot)
    callback.on_train_begin(model=unet)
    unet.conv_in.weight.data += 0.1
    callback.on_pre_optimizer_step(model=unet)
    logs: dict[str, float] = {}
    callback.on_log(logs=logs)
    drift = snapshot.measure(unet)
    assert logs["loss_drift"] == pytest.approx(2 * drift.output_drift, rel=1e-5)
    assert logs["drift_percent"] == pytest.approx(drift.output_drift_percent, rel=1e-5)
    assert unet.conv_in.weight.grad.any()
    with pytest.raises(ValueError, match="reduction must be one of .*, got 'output'"):
        TeacherSnapshotCallback(2.0, "output").on_train_begin(model=unet)
