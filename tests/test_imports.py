"""Imports go one way: errors, sharding <- drift, adapter_drift <- snapshot <- adapters, outputs, losses <- callbacks, budget <- regularizer.

Only commands join the core and `dreambooth`: the scripts, `interpolate` and `evaluation`, and `loading` for those two.
"""

import ast
import sys

import pytest
from support.runs import ROOT, execute

PACKAGE = ROOT / "diffusers_lipreg"
CORE = {  # besides the standard library; another core module states here what it needs
    "errors": {"hub_client"},
    "hub_client": {"huggingface_hub"},
    "sharding": {"torch"},
    "drift": {"torch", "sharding"},
    "snapshot": {"torch", "drift", "sharding"},
    "adapter_drift": {"torch", "peft", "drift"},
    "adapters": {"torch", "adapter_drift", "drift", "errors", "snapshot"},
    "recording": {"torch", "drift"},
    "output_drift": {"torch"},
    "outputs": {"torch", "tqdm", "drift", "output_drift", "recording", "sharding", "snapshot"},
    "losses": {"torch", "drift"},
    "callbacks": {"torch", "transformers", "adapters", "losses", "snapshot"},
    "budget": {"torch", "losses", "sharding"},
    "regularizer": {
        "torch",
        "budget",
        "errors",
        "losses",
        "output_drift",
        "outputs",
        "recording",
        "sharding",
        "snapshot",
    },
    "__init__": {"adapters", "budget", "callbacks", "losses", "outputs", "snapshot"},
}
LIGHT = ("AdapterSnapshot", "DriftBudget", "LipschitzDriftLoss", "OutputSnapshot", "TeacherSnapshot")


def imports(source: str, package: str) -> set[str]:
    """Return all that a module of `package` imports: modules of ours by their full names, others by their first."""
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


IMPORTS = {
    path: imports(path.read_text(), ".".join(path.parent.relative_to(ROOT).parts))
    for path in [*PACKAGE.rglob("*.py"), *ROOT.glob("*.py")]
}


FORMS = {
    "import torch.nn as nn, os": {"torch", "os"},
    "def f():\n    from torchvision.io import read_image": {"torchvision"},
    "from .data import list_images": {"diffusers_lipreg.dreambooth.data"},
    "from . import data, prior": {"diffusers_lipreg.dreambooth.data", "diffusers_lipreg.dreambooth.prior"},
    "from .. import drift": {"diffusers_lipreg.drift"},
    "from ..losses import LipschitzDriftLoss": {"diffusers_lipreg.losses"},
    "from diffusers_lipreg import TeacherSnapshot": {"diffusers_lipreg.TeacherSnapshot"},
}


def test_every_form_of_import_is_found():
    for statement, found in FORMS.items():
        assert imports(statement, "diffusers_lipreg.dreambooth") == found, statement


def test_core_imports_torch_and_what_stands_before_it():
    core = {path.stem: found for path, found in IMPORTS.items() if path.parent == PACKAGE and path.stem in CORE}
    assert core.keys() == CORE.keys()
    for name, found in core.items():
        assert {module.removeprefix("diffusers_lipreg.") for module in found - sys.stdlib_module_names} <= CORE[
            name
        ], name


def test_dreambooth_never_imports_the_core():
    for path, found in IMPORTS.items():
        if path.parent == PACKAGE / "dreambooth":
            ours = {name for name in found if name.startswith("diffusers_lipreg")} - {
                "diffusers_lipreg.errors",
                "diffusers_lipreg.__version__",
            }
            assert all(name.startswith("diffusers_lipreg.dreambooth.") for name in ours), path


def test_nothing_imports_a_command_or_torchvision():
    commands = ("diffusers_lipreg.evaluation", "diffusers_lipreg.interpolate")
    for path, found in IMPORTS.items():
        assert path.parent.name == "evaluation" or not any(name.startswith(commands) for name in found), path
        is_command = path.parent.name == "evaluation" or path.name == "interpolate.py"
        assert is_command or "diffusers_lipreg.loading" not in found, path
        assert "torchvision" not in found, path


def test_private_names_stay_in_their_files():
    for path in IMPORTS:
        for node in ast.walk(ast.parse(path.read_text())):
            ours = isinstance(node, ast.ImportFrom) and (node.level or str(node.module).startswith("diffusers_lipreg"))
            names = [alias.name for alias in node.names] if ours else []
            assert not any(name.startswith("_") and not name.startswith("__") for name in names), path


def test_the_package_and_its_torch_only_names_import_torch_alone():
    """So that importing it costs about what torch costs, and `--help` no more than it must."""
    heavy = "sorted({'diffusers', 'transformers', 'peft', 'accelerate'} & set(sys.modules))"
    ran = execute(
        "-c", f"import sys, diffusers_lipreg; from diffusers_lipreg import {', '.join(LIGHT)}; print({heavy})"
    )
    assert ran.stdout.strip() == "[]", ran.stderr
    ran = execute("-c", "import sys, diffusers_lipreg; print('torch' in sys.modules)")
    assert ran.stdout.startswith("False"), ran.stderr


def test_public_names_are_there():
    import diffusers_lipreg

    assert all(getattr(diffusers_lipreg, name).__name__ == name for name in diffusers_lipreg.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Teacher'"):
        diffusers_lipreg.Teacher  # noqa: B018
