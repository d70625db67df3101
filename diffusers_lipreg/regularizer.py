"""DriftRegularizer: the models of a training loop with their penalties, the yardstick, and the budget or best checkpoint."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from .budget import DriftBudget
from .errors import RunError, one_line
from .losses import LipschitzDriftLoss, Snapshot
from .output_drift import OutputDrift
from .outputs import OutputSnapshot
from .recording import eval_mode, fork_random, pipeline_networks
from .sharding import reshard
from .snapshot import rounding_error, trained_parameters

logger = logging.getLogger(__name__)

ROUNDING = 0.1  # largest rounding error of a teacher, as a fraction of the learning rate


class Penalty(NamedTuple):
    """A model and the penalty that holds it near its pretrained weights."""

    name: str
    model: nn.Module
    loss: LipschitzDriftLoss

    @property
    def prefix(self) -> str:
        """Return what log keys begin with: nothing for the UNet, the name for other models."""
        return "" if self.name == "unet" else f"{self.name}_"

    @property
    def logs(self) -> dict[str, float]:
        return {self.prefix + key: value for key, value in self.loss.logs.items()}


class BestCheckpoint:
    """Save the model whenever it has the best harmonic mean so far of what it learned and what it kept.

    Both are root mean squares, and at most 1: subject_similarity = 1 - sqrt(subject loss / pretrained subject loss),
    retention = 1 - sqrt(relative output drift), each at least 0.

    Args:
        models: Those in training.
        subject_loss: Returns the denoising loss on views of the subject that are not trained on.
        save: Writes the current model.
    """

    def __init__(
        self,
        accelerator: Any,
        models: Sequence[nn.Module],
        subject_loss: Callable[[], torch.Tensor],
        save: Callable[[], Any],
    ) -> None:
        self.accelerator = accelerator
        self.models = models
        self.subject_loss = subject_loss
        self.save = save
        self.best: dict[str, float] = {}  # its step and scores
        self.pretrained_loss = self.measure()

    def measure(self) -> float:
        """Return the subject loss in eval mode, always with the same random numbers; it is the same on all processes."""
        with eval_mode(*self.models), torch.no_grad(), fork_random(self.accelerator.device):
            torch.manual_seed(0)
            loss = self.accelerator.gather(self.subject_loss()).mean().item()
        for model in self.models:
            reshard(model)
        return loss

    def update(self, global_step: int, output_drift_relative: float) -> dict[str, float]:
        """Save the model if it is the best so far; return its scores."""
        similarity = max(0.0, 1 - math.sqrt(self.measure() / self.pretrained_loss))
        retention = max(0.0, 1 - math.sqrt(output_drift_relative))
        mean = 2 * similarity * retention / (similarity + retention) if similarity + retention > 0 else 0.0
        scores = {"harmonic_mean": mean, "subject_similarity": similarity, "retention": retention}
        if mean > self.best.get("harmonic_mean", 0.0):
            self.best = {"step": global_step, **scores}
            self.save()
            logger.info(
                f"Best so far is step {global_step}: harmonic mean {mean:.4f} of subject similarity {similarity:.4f} "
                f"and retention {retention:.4f}."
            )
        return scores


class Recordings(NamedTuple):
    """What the pretrained pipeline predicts, recorded before training."""

    outputs: Mapping[str, OutputSnapshot] = {}  # by the name of a model that they hold
    yardstick: OutputSnapshot | None = None  # for measuring output drift
    measured: Any = None  # what the yardstick measures: the UNet, or a pipeline if text encoders are trained, too

    @classmethod
    def from_args(
        cls,
        args: Any,
        accelerator: Any,
        load_pipeline: Callable[[], Any],
        models: Mapping[str, nn.Module],
        training_prompts: Sequence[str],
        measured_prompts: Sequence[str],
    ) -> "Recordings":
        """Record what a script's flags ask for, in the precision of training. Networks move to the accelerator's device.

        Args:
            load_pipeline: Returns the pretrained pipeline, which is kept if text encoders are trained.
            models: Those to be trained, by name, before accelerate prepares them.
            training_prompts, measured_prompts: What to record to hold the models, and to measure their drift; may be empty.

        Raises:
            RunError: The pipeline does not answer a prompt alone, and a flag asks for its predictions.
        """
        if not (training_prompts or measured_prompts):
            return cls()
        pipeline = load_pipeline()
        side = max(8, args.resolution // 8 * 8)
        size: dict[str, Any] = {"height": side, "width": side}
        held = {name: model for name, model in models.items() if _weight(args, name) != 0} if training_prompts else {}
        outputs, yardstick = {}, None
        networks = pipeline_networks(pipeline)
        devices = {name: next(part.parameters()).device for name, part in networks.items()}
        pipeline.to(accelerator.device)
        try:
            with accelerator.autocast():
                for name, model in held.items():
                    logger.info(f"Recording what the pretrained {name} predicts.")
                    prompts, options = training_prompts, {"points": args.lipreg_points, **size}
                    if name != "unet":  # called once for a prompt, whatever the sampler does
                        prompts = list(dict.fromkeys(training_prompts))
                        options |= {"points": len(prompts), "steps": (2, 2)}
                    outputs[name] = OutputSnapshot(
                        pipeline,
                        model,
                        prompts=prompts,
                        seed=(args.seed or 0) % 2**31,
                        batch_size=args.train_batch_size * args.gradient_accumulation_steps,
                        micro_batch_size=args.train_batch_size,
                        **options,
                    )
                if measured_prompts:
                    yardstick = OutputSnapshot.for_measuring(pipeline, models["unet"], measured_prompts, **size)
        except Exception as error:  # any pipeline of diffusers may be here, and some need more than a prompt
            problem = f"The predictions of this {type(pipeline).__name__} cannot be recorded ({one_line(error)})"
            if held or args.drift_budget is not None or args.keep_best:
                raise RunError(
                    f"{problem}: leave out --lipreg_reduction output, --drift_budget, --keep_best."
                ) from error
            logger.warning(f"{problem}, so no output drift is measured.")
        for name, part in networks.items():
            if name not in models:  # accelerate moves those
                part.to(devices[name])
        return cls(outputs, yardstick, models["unet"] if len(models) == 1 else pipeline)


def _weight(args: Any, name: str) -> float | None:
    """Return the weight of a model's penalty, `None` if a budget finds it."""
    return args.lipreg_weight if name == "unet" else args.lipreg_text_encoder_weight


class DriftRegularizer:
    """Hold models near their pretrained weights in a training loop, and measure how far they drift.

    Build it before a checkpoint is loaded, and keep its `state_dict()`, which is JSON, in checkpoints. Every process
    calls it:

        accelerator.backward(loss)
        if accelerator.sync_gradients:
            regularizer.add_gradient_()
        ...
        regularizer.after_step(global_step)         # after each update
        accelerator.log({"loss": ...} | regularizer.logs, step=global_step)
        ...
        regularizer.finish()                        # after the last update

    Args:
        accelerator: Its gradient scaler tells the scale of the gradients.
        penalties: The models to hold.
        yardstick: Recorded predictions to measure output drift on; `None` to measure none.
        measured: The module, or pipeline, in training that the yardstick measures.
        every: Updates between measurements.
        last_step: The last update, after which there is a measurement, too.
        budget: Finds the weight of the penalties, and asks for more measurements.
        best: Saves the best model at each measurement.
    """

    def __init__(
        self,
        accelerator: Any,
        penalties: Sequence[Penalty],
        yardstick: OutputSnapshot | None,
        measured: Any,
        every: int,
        *,
        last_step: int | None = None,
        budget: DriftBudget | None = None,
        best: BestCheckpoint | None = None,
    ) -> None:
        self.accelerator = accelerator
        self.penalties = list(penalties)
        self.yardstick = yardstick
        self.measured = measured
        self.every = every
        self.last_step = last_step
        self.budget = budget
        self.best = best
        self._unused_drift: float | None = None  # last measurement not yet passed to the budget
        self._output_drift: OutputDrift | None = None  # of the current weights, if measured
        self._logs: dict[str, float] = {}

    @classmethod
    def from_args(
        cls,
        args: Any,
        accelerator: Any,
        models: Mapping[str, nn.Module],
        *,
        take_snapshot: Callable[[str], Snapshot],
        recordings: Recordings,
        subject_loss: Callable[[], torch.Tensor],
        save_best: Callable[[], Any],
    ) -> "DriftRegularizer":
        """Build the regularizer that a script's flags ask for.

        Args:
            models: Those in training, by name. A model is held if its weight is above 0 or left to a budget.
            take_snapshot: Returns the snapshot of the weights of a model of that name.
            recordings: Of the pretrained pipeline. Without a yardstick no output drift is measured.
            subject_loss, save_best: The arguments of `BestCheckpoint`, for `--keep_best`.
        """
        take = recordings.outputs.__getitem__ if args.lipreg_reduction == "output" else take_snapshot
        penalties = [
            Penalty(name, model, LipschitzDriftLoss(take(name), _weight(args, name) or 0.0, args.lipreg_reduction))
            for name, model in models.items()
            if _weight(args, name) != 0
        ]
        budget = best = None
        if args.drift_budget is not None:
            held = {penalty.loss: penalty.model for penalty in penalties}
            budget = DriftBudget(args.drift_budget, args.max_train_steps, held)
        if args.keep_best:
            best = BestCheckpoint(accelerator, list(models.values()), subject_loss, save_best)
        last_step = args.max_train_steps
        every = args.probe_steps or last_step
        yardstick, measured = recordings.yardstick, recordings.measured
        return cls(accelerator, penalties, yardstick, measured, every, last_step=last_step, budget=budget, best=best)

    def add_gradient_(self) -> None:
        """Add the penalties' gradients to those of the loss: after backward, before clipping, on steps that update."""
        scaler = self.accelerator.scaler
        scale = 1.0 if scaler is None else scaler.get_scale()  # gradients carry it until they are clipped
        if self.budget is not None:
            self.budget.update(self._unused_drift, scale=scale)
        self._unused_drift = None
        for penalty in self.penalties:
            penalty.loss.add_gradient_(penalty.model, scale=scale)

    def after_step(self, global_step: int) -> None:
        """Measure the output drift after update `global_step`, if it is time to."""
        self._output_drift = None
        # Trackers draw this key at every update, so its last value stays.
        self._logs = {key: value for key, value in self._logs.items() if key == "output_drift_percent"}
        due = global_step % self.every == 0 or global_step == self.last_step
        if self.yardstick is not None and (due or (self.budget is not None and self.budget.due(global_step))):
            self._output_drift = self.yardstick.measure(self.measured)
            self._unused_drift = self._output_drift.output_drift_relative
            self._logs = self._output_drift.logs
            if self.best is not None:
                self._logs |= self.best.update(global_step, self._unused_drift)

    @property
    def logs(self) -> dict[str, float]:
        """Return each penalty's drift from before the last update, and the newest output drift."""
        logs = {key: value for penalty in self.penalties for key, value in penalty.logs.items()}
        if self.budget is not None:
            logs["lipreg_weight"] = self.budget.weight
        return logs | self._logs

    def finish(self) -> None:
        """Scale the change of weights down to the budget if weights are held, and measure what the run ends with.

        Raises:
            RunError: The predictions of the model are not finite.
        """
        if self.yardstick is not None:
            measure = partial(self.yardstick.measure, self.measured)
            output_drift = self._output_drift or measure()
            above = self.budget is not None and output_drift.output_drift_relative > self.budget.limit
            if self.budget is not None and above and self.budget.can_scale:
                before = output_drift.output_drift_percent
                self.budget.scale_to_budget(lambda: measure().output_drift_relative)
                output_drift = measure()
                logger.info(
                    f"Output drift was {before:.4g} percent: the change of the weights is scaled by "
                    f"{self.budget.alpha:.3f}, for the budget of {100 * self.budget.limit:g} percent."
                )
            if not math.isfinite(output_drift.output_drift_relative):
                raise RunError(
                    f"the output drift is {output_drift.output_drift_relative} after training, so the model is lost: start "
                    "again, or from a checkpoint, with a lower --learning_rate."
                )
            self._logs = output_drift.logs
        for penalty in self.penalties:
            penalty.loss.measure(penalty.model)
        logger.info(f"Final drift: {self.logs}")

    @property
    def card_metadata(self) -> dict[str, str]:
        """Return the rows of the model card."""
        metadata = {}
        for penalty in self.penalties:
            metadata[f"lipreg_{penalty.prefix}weight"] = f"{penalty.loss.weight:g}"
            metadata["lipreg_reduction"] = penalty.loss.reduction
            relative = f"{penalty.prefix}drift_relative"
            if relative in penalty.logs:
                metadata[relative] = f"{penalty.logs[relative]:.3g}"
        if "output_drift_percent" in self._logs:
            metadata["output_drift_percent"] = f"{self._logs['output_drift_percent']:.3g}"
        if self.budget is not None:
            metadata["drift_budget"] = f"{100 * self.budget.limit:g} percent"
        if self.best is not None and self.best.best:
            metadata["best step"] = f"{self.best.best['step']:g}"
        return metadata

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on as if it had not been interrupted."""
        return {
            "unused_drift": self._unused_drift,
            "logs": self._logs,
            "best": {} if self.best is None else self.best.best,
            "budget": {} if self.budget is None else self.budget.state_dict(),
            "outputs": {name: snapshot.state_dict() for name, snapshot in self._snapshots.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._unused_drift = state["unused_drift"]
        self._logs = dict(state["logs"])
        if self.best is not None:
            self.best.best = dict(state["best"])
        if self.budget is not None:
            self.budget.load_state_dict(state["budget"])
        for name, snapshot in self._snapshots.items():
            snapshot.load_state_dict(state["outputs"][name])

    @property
    def _snapshots(self) -> dict[str, OutputSnapshot]:
        """Return the recordings that models are held by, by name."""
        held = {penalty.name: penalty.loss.snapshot for penalty in self.penalties}
        return {name: snapshot for name, snapshot in held.items() if isinstance(snapshot, OutputSnapshot)}


def check_rounding(model: nn.Module, dtype: torch.dtype, learning_rate: float) -> None:
    """Refuse a dtype that would round the teacher of a model by more than `ROUNDING` times the learning rate.

    AdamW moves each parameter by about the learning rate. A teacher that is off by a tenth of that adds 1 % to the
    squared drift after one update, and less later. What counts is the worst tensor's root mean square error, since
    `tensor_mean` averages each tensor by itself.

    Raises:
        ValueError: The rounding error is larger.
    """
    error, name = max(
        (rounding_error(parameter, dtype), name) for name, parameter in trained_parameters(model).items()
    )
    if error > ROUNDING * learning_rate:
        raise ValueError(
            f"{name} would be rounded by {error:.1e} (root mean square), more than {ROUNDING:g} of an update's step at a "
            f"learning rate of {learning_rate:g}, and the model pulled to rounded weights: leave the type out."
        )
