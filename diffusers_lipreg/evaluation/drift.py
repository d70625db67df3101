"""Measure how far a personalized pipeline is from its base: in its weights and in its predictions."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from ..loading import measure_drift, networks, record_outputs
from ..output_drift import OutputDrift
from .analysis import PathKL, lipschitz_slopes
from .generation import Sampling


class WeightChange(NamedTuple):
    """Squared norms of the change of one or several tensors, and of their pretrained values."""

    squared_drift: float  # ||theta - theta_0||^2
    squared_norm: float  # ||theta_0||^2

    @property
    def report(self) -> dict[str, float | None]:
        """The norm of the change, alone and as a fraction of the norm of the pretrained values."""
        relative = math.sqrt(self.squared_drift / self.squared_norm) if self.squared_norm else None
        return {"drift_norm": math.sqrt(self.squared_drift), "drift_relative": relative}

    @classmethod
    def total(cls, changes: Iterable[WeightChange]) -> WeightChange:
        return cls(*map(sum, zip(*changes, strict=True)))


@torch.no_grad()
def weight_changes(base: nn.Module, personalized: nn.Module) -> dict[str, WeightChange]:
    """Return the change of each parameter that changed, by name. Adapters have to be merged."""
    after = dict(personalized.named_parameters())
    changes = {}
    for name, parameter in base.named_parameters():
        before = parameter.cpu().double()
        difference = after[name].cpu().double() - before
        if difference.any():
            changes[name] = WeightChange(difference.square().sum().item(), before.square().sum().item())
    return changes


def merge_adapters(pipeline: Any) -> None:
    """Add the adapters of a pipeline, if it has any, to the weights that they adapt, and remove them."""
    if hasattr(pipeline, "get_list_adapters") and pipeline.get_list_adapters():
        pipeline.fuse_lora(components=list(pipeline.get_list_adapters()))
        pipeline.unload_lora_weights()


class DriftMeter:
    """Measure the drift of pipelines from one base, in float32.

    Args:
        base: The pretrained pipeline. Between measurements its weights are in host memory.
        prompts: Prompts for output drift and path-KL, one chain of denoising steps each.
        sampling: Settings of the images, for path-KL.

    Raises:
        RunError: The base does not make images from a prompt alone.
    """

    def __init__(self, base: Any, prompts: tuple[str, ...], sampling: Sampling, device: torch.device) -> None:
        self.base, self.device = base.to(device), device
        self.recorded = record_outputs(base, prompts, sampling.seed)
        self.path_kl = PathKL(base, prompts, sampling) if PathKL.covers(base) else None
        base.to("cpu")

    def measure(self, personalized: Any, name: str) -> dict[str, Any]:
        """Return every drift of a pipeline for the report, and merge its adapters into its weights.

        Args:
            name: What `--personalized` says; errors begin with it.

        Raises:
            RunError: A prediction is not a number.
        """
        merge_adapters(personalized)
        parts = networks(personalized)
        changes = {part: weight_changes(model, parts[part]) for part, model in networks(self.base).items()}
        changes = {part: changed for part, changed in changes.items() if changed}
        distance = math.sqrt(sum(change.squared_drift for changed in changes.values() for change in changed.values()))
        personalized.to(self.device)
        return {
            "parameters": {part: _report_weights(changed) for part, changed in changes.items()},
            "output": self._report_output(personalized, name),
            "slopes": lipschitz_slopes(self.recorded, self.base, personalized, changes, distance),
            "path_kl": self._report_path_kl(personalized),
        }

    def _report_output(self, personalized: Any, name: str) -> dict[str, Any]:
        drift = measure_drift(self.recorded, personalized, name)
        return {
            "output_drift": drift.output_drift,
            **_report_percent(drift),
            "chains": len(drift.chains.unique()),
            "by_timestep": [
                {"timestep": float(f"{t:.3g}"), **_report_percent(part)} for t, part in drift.by_timestep.items()
            ],
        }

    def _report_path_kl(self, personalized: Any) -> dict[str, Any]:
        if self.path_kl is None:
            scheduler = type(personalized.scheduler).__name__
            return {"nats": None, "reason": f"{scheduler} is not a DDPMScheduler: the formula does not cover it."}
        costs = self.path_kl.measure(personalized)  # (steps, chains)
        chains = costs.sum(dim=0)
        by_step = zip(self.path_kl.timesteps, costs.mean(dim=1).tolist(), strict=True)
        return {
            "nats": chains.mean().item(),
            "nats_se": _none_if_nan(chains.std().item() / math.sqrt(len(chains))),
            "chains": len(chains),
            "by_step": [{"timestep": timestep, "nats": nats} for timestep, nats in by_step],
        }


def _report_percent(drift: OutputDrift) -> dict[str, float | None]:
    return {
        "output_drift_percent": drift.output_drift_percent,
        "output_drift_percent_se": _none_if_nan(drift.standard_error_percent),
    }


def _none_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else value  # JSON has no nan


def _report_weights(changes: Mapping[str, WeightChange]) -> dict[str, Any]:
    """Return the change of all tensors together, by block, and by tensor."""
    blocks: dict[str, list[WeightChange]] = {}
    for name, change in changes.items():
        block = re.findall(r".*?\.\d+(?=\.)|\w+", name)[0]  # "down_blocks.0", "conv_in"
        blocks.setdefault(block, []).append(change)
    return {
        **WeightChange.total(changes.values()).report,
        "by_block": {block: WeightChange.total(inside).report for block, inside in blocks.items()},
        "by_tensor": {name: change.report for name, change in changes.items()},
    }
