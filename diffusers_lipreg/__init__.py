"""Personalize diffusion models without distributional drift: one loss, three snapshots, one callback."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters import AdapterSnapshot as AdapterSnapshot
    from .budget import DriftBudget as DriftBudget
    from .callbacks import TeacherSnapshotCallback as TeacherSnapshotCallback
    from .losses import LipschitzDriftLoss as LipschitzDriftLoss
    from .outputs import OutputSnapshot as OutputSnapshot
    from .snapshot import TeacherSnapshot as TeacherSnapshot

__version__ = "0.1.0"
_MODULES = {
    "AdapterSnapshot": "adapters",
    "DriftBudget": "budget",
    "LipschitzDriftLoss": "losses",
    "OutputSnapshot": "outputs",
    "TeacherSnapshot": "snapshot",
    "TeacherSnapshotCallback": "callbacks",
}
__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for (PEP 562): importing the package alone costs nothing."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
