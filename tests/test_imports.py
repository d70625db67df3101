"""Imports go one way: torch <- drift <- snapshot, adapters <- losses <- callbacks.

Only commands join the core and `dreambooth`: the scripts, `interpolate`, and `evaluation`; nothing imports those.
"""

import ast
import sys
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "diffusers_lipreg"
SNAPSHOT = {"diffusers_lipreg.drift", "diffusers_lipreg.snapshot"}
CORE = {  # beside the standard library; another core module states here what it needs
    "errors.py": {"diffusers_lipreg.hub_client"},
    "hub_client.py": {"huggingface_hub"},
    "sharding.py": {"torch"},
    "drift.py": {"torch", "diffusers_lipreg.sharding"},
    "snapshot.py": {"torch", "diffusers_lipreg.drift", "diffusers_lipreg.sharding"},
    "peft_layers.py": {"torch", "peft", "diffusers_lipreg.snapshot"},
    "adapters.py": {"torch", "peft", "diffusers_lipreg.drift", "diffusers_lipreg.peft_layers"},
    "losses.py": {"torch", "diffusers_lipreg.adapters", *SNAPSHOT},
    "callbacks.py": {"torch", "transformers", "diffusers_lipreg.adapters", "diffusers_lipreg.losses", "diffusers_lipreg.snapshot"},
    "penalties.py": {
        *("torch", "diffusers_lipreg.callbacks", "diffusers_lipreg.monitor", "diffusers_lipreg.snapshot"),
    },
    "probe.py": {"torch", "diffusers", "diffusers_lipreg.sharding"},
    "budget.py": {
        *("torch", "diffusers_lipreg.adapters", "diffusers_lipreg.losses", "diffusers_lipreg.peft_layers"),
        *("diffusers_lipreg.sharding", "diffusers_lipreg.snapshot"),
    },
    "loading.py": {
        *("torch", "accelerate", "diffusers", "huggingface_hub", "peft", "safetensors", "transformers", "diffusers_lipreg.errors"),
    },
    "monitor.py": {
        *("torch", "diffusers_lipreg.budget", "diffusers_lipreg.errors"),
        *("diffusers_lipreg.losses", "diffusers_lipreg.probe"),
    },
    "__init__.py": {
        *(f"diffusers_lipreg.{module}" for module in ("adapters", "budget", "callbacks", "losses", "probe", "snapshot")),
    },
}


def imports(source: str, package: str) -> set[str]:
    """All that a module of `package` imports: the package's own modules by their full names, others by their first."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            is_folder = (ROOT / base.replace(".", "/")).is_dir()  # then each name may be a module of it
            found |= {f"{base}.{alias.name}" for alias in node.names} if is_folder else {base}
    return {name if name.startswith("diffusers_lipreg") else name.split(".")[0] for name in found}


def imports_of(path: Path) -> set[str]:
    return imports(path.read_text(), ".".join(path.parent.relative_to(ROOT).parts))


@pytest.mark.parametrize(
    ("statement", "found"),
    [
        ("import torch.nn as nn, os", {"torch", "os"}),
        ("def f():\n    from torchvision.io import read_image", {"torchvision"}),
        ("from .data import list_images", {"diffusers_lipreg.dreambooth.data"}),
        ("from . import data, prior", {"diffusers_lipreg.dreambooth.data", "diffusers_lipreg.dreambooth.prior"}),
        ("from .. import drift", {"diffusers_lipreg.drift"}),
        ("from ..losses import LipschitzDriftLoss", {"diffusers_lipreg.losses"}),
        ("from diffusers_lipreg import TeacherSnapshot", {"diffusers_lipreg.TeacherSnapshot"}),
    ],
)
def test_every_form_of_import_is_found(statement, found):
    assert imports(statement, "diffusers_lipreg.dreambooth") == found


@pytest.mark.parametrize("path", sorted(set(PACKAGE.glob("*.py")) - {PACKAGE / "interpolate.py"}), ids=lambda path: path.name)
def test_core_imports_torch_and_what_stands_before_it(path):
    assert imports_of(path) - sys.stdlib_module_names <= CORE[path.name]


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("dreambooth/**/*.py")), ids=lambda path: path.name)
def test_dreambooth_never_imports_the_core(path):
    ours = {name for name in imports_of(path) if name.startswith("diffusers_lipreg")}
    assert all(name.startswith("diffusers_lipreg.dreambooth.") for name in ours - {"diffusers_lipreg.errors", "diffusers_lipreg.__version__"})


@pytest.mark.parametrize(
    "path",
    sorted({*PACKAGE.rglob("*.py"), *ROOT.glob("*.py")} - set(PACKAGE.glob("evaluation/*.py"))),
    ids=lambda path: path.name,
)
def test_nothing_imports_a_command(path):
    commands = ("diffusers_lipreg.evaluation", "diffusers_lipreg.interpolate")
    assert not any(name.startswith(commands) for name in imports_of(path))


@pytest.mark.parametrize("path", [*PACKAGE.rglob("*.py"), *ROOT.glob("*.py")], ids=lambda path: path.name)
def test_nothing_needs_torchvision(path):
    assert "torchvision" not in imports_of(path)
