"""Personalise diffusion models without distributional drift: one loss, one snapshot, one callback."""

from .adapters import AdapterSnapshot
from .callbacks import TeacherSnapshotCallback
from .losses import LipschitzDriftLoss
from .snapshot import TeacherSnapshot

__version__ = "0.1.0"
__all__ = ["AdapterSnapshot", "LipschitzDriftLoss", "TeacherSnapshot", "TeacherSnapshotCallback"]
