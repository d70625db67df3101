"""OutputDrift: how far predictions are from the pretrained ones, as `OutputSnapshot.measure` finds it."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class OutputDrift(NamedTuple):
    """Measured change of predictions, with one row for each recorded call, float64 and in host memory."""

    squared_error: Tensor  # mean over elements of (e - e_0)^2
    squared_reference: Tensor  # mean over elements of e_0^2
    chains: Tensor  # number of the chain
    bins: Tensor  # part of the chain, 0 for the one that begins with noise
    timesteps: Tensor  # nan for a module that takes none

    @property
    def output_drift(self) -> float:
        """Return the mean squared change per element."""
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
    def standard_error_percent(self) -> float:
        """Return the standard error of `output_drift_percent` over prompts and noise, at these timesteps.

        Chains are independent, the calls of one chain are not. This is the delta method for a ratio of sums over chains;
        a single chain gives nan.
        """
        residuals = self.squared_error - self.output_drift_relative * self.squared_reference
        sums = torch.stack([residuals[self.chains == chain].sum() for chain in self.chains.unique()])
        return 100 * sums.std().item() * math.sqrt(len(sums)) / self.squared_reference.sum().item()

    @property
    def by_timestep(self) -> dict[float, "OutputDrift"]:
        """Return the drift in each part of the chains, by its mean timestep; nothing for a module that takes none."""
        parts = [OutputDrift(*(rows[self.bins == number] for rows in self)) for number in self.bins.unique()]
        return {part.timesteps.mean().item(): part for part in parts if not part.timesteps.isnan().any()}

    @property
    def logs(self) -> dict[str, float]:
        """Return all numbers for trackers."""
        return {
            "output_drift": self.output_drift,
            "output_drift_percent": self.output_drift_percent,
            "output_drift_percent_se": self.standard_error_percent,
            **{f"output_drift_percent_t{t:.3g}": part.output_drift_percent for t, part in self.by_timestep.items()},
        }
