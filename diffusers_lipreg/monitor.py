"""What a script watches while it trains, and steers by: output drift, its budget, the best checkpoint."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .budget import DriftBudget
from .errors import RunError
from .losses import LipschitzDriftLoss
from .probe import Denoiser, OutputDrift, OutputProbe

logger = logging.getLogger(__name__)


class DriftMonitor:
    """Measures output drift along a run, hands it to the logs, and to a budget and a choice of the best if there are any.

    Build it of the pretrained model, before a checkpoint is loaded; in the loop call `on_pre_optimizer_step` before
    the penalties act, and after backward until a budget has started, `on_step_end` after each update, `on_log` and, last,
    `on_train_end`. Keep `state_dict()`, which JSON can hold, in checkpoints. Every process has to call it.

    Args:
        probe: Of the pretrained model, or `None`, to measure nothing.
        denoiser: The model in training.
        every: Updates between measurements.
        budget: Measured as often as it asks for.
        subject_loss: The denoising loss on views of the subject that are not trained on; the same draws each time.
        save_best: Writes the model as it is.
    """

    def __init__(
        self,
        probe: OutputProbe | None,
        denoiser: Denoiser,
        every: int,
        *,
        budget: DriftBudget | None = None,
        subject_loss: Callable[[], torch.Tensor] | None = None,
        save_best: Callable[[], Any] | None = None,
    ) -> None:
        self.probe = probe
        self.denoiser = denoiser
        self.every = every
        self.budget = budget
        self.save_best = save_best
        self._subject_loss = subject_loss
        self._step = 0
        self._measured: float | None = None  # and not yet handed to the budget
        self._reading: OutputDrift | None = None  # of the weights as they are
        self._fresh: dict[str, float] = {}
        self._shown: dict[str, float] = {}
        self._best: dict[str, float] = {}
        self._pretrained_loss = self.subject_loss() if save_best is not None else math.nan

    def subject_loss(self) -> float:
        """The loss on held-out views, in eval mode, from random numbers of its own."""
        if self._subject_loss is None:
            raise ValueError("There are no held-out views: pass subject_loss beside save_best.")
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with self.denoiser.evaluating(), torch.random.fork_rng(devices):
            torch.manual_seed(0)
            return self._subject_loss().item()

    def on_pre_optimizer_step(self, loss_scale: float = 1.0) -> None:
        """Adapts the weight of the penalties, where there is a budget."""
        if self.budget is not None:
            self.budget.update(self._measured, scale=loss_scale)
        self._measured = None

    def on_step_end(self, step: int) -> None:
        """Measures after update `step`, where it is time to."""
        self._step, self._reading = step, None
        if self.probe is None or not (step % self.every == 0 or (self.budget is not None and self.budget.due(step))):
            return
        reading = self._reading = self.probe.measure(self.denoiser)
        self._measured = reading.output_drift_relative
        self._note(reading)
        if self.save_best is not None:
            self._keep_if_best(step, reading)

    def on_log(self, logs: dict) -> None:
        """Adds all that was measured in this step, else what the progress bar goes on showing."""
        if self.budget is not None:
            logs["lipreg_weight"] = self.budget.weight
        logs.update(self._fresh or self._shown)
        self._fresh = {}

    def on_train_end(self) -> None:
        """Measures what the run ended with; with a budget it then ends within it."""
        if self.probe is None:
            return
        reading = self._reading or self.probe.measure(self.denoiser)
        if self.budget is not None and reading.output_drift_relative > self.budget.limit:
            probe, before = self.probe, reading.output_drift_relative
            self.budget.scale_to_budget(lambda: probe.measure(self.denoiser).output_drift_relative)
            reading = probe.measure(self.denoiser)
            logger.info(
                f"Output drift was {before:.4g}: the change of the weights is scaled by {self.budget.alpha:.3f}, for "
                f"the budget of {self.budget.limit:g}."
            )
        if not math.isfinite(reading.output_drift_relative):
            raise RunError(
                f"the output drift is {reading.output_drift_relative} after training, so the model is lost: start again, or "
                "from a checkpoint, with a lower --learning_rate."
            )
        self._note(reading)
        logger.info(f"Final output drift: {reading.logs}")

    def _note(self, reading: OutputDrift) -> None:
        self._fresh = reading.logs
        self._shown = {"output_drift_relative": reading.output_drift_relative}

    def _keep_if_best(self, step: int, reading: OutputDrift) -> None:
        """Has the model written if it beats the best so far: the harmonic mean of what it learned and what it kept.

        Both as root mean squares, in which 1 is all: subject = 1 - sqrt(loss / pretrained loss), retention = 1 -
        sqrt(relative output drift), each 0 at least.
        """
        subject = max(0.0, 1 - math.sqrt(self.subject_loss() / self._pretrained_loss))
        retention = max(0.0, 1 - math.sqrt(reading.output_drift_relative))
        best = 2 * subject * retention / (subject + retention) if subject + retention > 0 else 0.0
        self._fresh |= {"subject_similarity": subject, "retention": retention, "harmonic_mean": best}
        if self.save_best is not None and best > self._best.get("harmonic_mean", 0.0):
            self._best = {"step": step, "harmonic_mean": best, "subject_similarity": subject, "retention": retention}
            self.save_best()
            logger.info(
                f"Best so far is step {step}: harmonic mean {best:.4f} of subject similarity {subject:.4f} and "
                f"retention {retention:.4f}."
            )

    @property
    def facts(self) -> dict[str, str]:
        """What a model card says of it, under the names of flags and log keys."""
        facts = {name: f"{value:.3g}" for name, value in self._shown.items()}
        if self.budget is not None:
            facts["drift_budget"] = f"{self.budget.limit:g}"
        if self._best:
            facts["best step"] = f"{self._best['step']:g}"
        return facts

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on from."""
        budget = {} if self.budget is None else self.budget.state_dict()
        return {"step": self._step, "measured": self._measured, "shown": self._shown, "best": self._best, "budget": budget}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state_dict` gave."""
        self._step, self._measured = state["step"], state["measured"]
        self._shown, self._best = dict(state["shown"]), dict(state["best"])
        if self.budget is not None:
            self.budget.load_state_dict(state["budget"])


def watch(
    args: Any,
    accelerator: Any,
    denoiser: Denoiser,
    scheduler: Any,
    shape: Sequence[int],
    prompts: Sequence[str],
    penalties: Mapping[LipschitzDriftLoss, nn.Module],
    *,
    subject_loss: Callable[[], torch.Tensor],
    save_best: Callable[[], Any],
) -> DriftMonitor:
    """The monitor that a script's flags ask for: call it before a checkpoint is loaded.

    `scheduler`, `shape` and `prompts` are those of `OutputProbe`, `penalties` those of `DriftBudget`. Without prompts
    nothing is measured.
    """
    probe = budget = None
    if prompts:
        probe = OutputProbe(denoiser, scheduler, shape, prompts=prompts, device=accelerator.device)
    if args.drift_budget is not None:
        budget = DriftBudget(args.drift_budget, args.max_train_steps, penalties)
    return DriftMonitor(
        probe,
        denoiser,
        args.probe_steps or args.max_train_steps,
        budget=budget,
        subject_loss=subject_loss if args.keep_best else None,
        save_best=save_best if args.keep_best else None,
    )
