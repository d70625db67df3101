"""Personalise diffusion models without distributional drift: one loss, one snapshot, one callback."""

from .adapters import AdapterSnapshot
from .budget import DriftBudget
from .callbacks import TeacherSnapshotCallback
from .losses import LipschitzDriftLoss
from .probe import Denoiser, OutputProbe
from .snapshot import TeacherSnapshot

__version__ = "0.1.0"
__all__ = [
    "AdapterSnapshot",
    "Denoiser",
    "DriftBudget",
    "LipschitzDriftLoss",
    "OutputProbe",
    "TeacherSnapshot",
    "TeacherSnapshotCallback",
]
