"""The two scripts are one program: who has read one of them knows where to look in the other."""

import ast
import subprocess
import sys

import pytest
from support.runs import ROOT

import train_dreambooth_lipreg
import train_dreambooth_lora_lipreg_sdxl

SD, SDXL = train_dreambooth_lipreg, train_dreambooth_lora_lipreg_sdxl
# What only one of the pipelines has.
OWN = {"predict", "noise_scheduler_class", "load_vae", "sample_model_input", "complete_pipeline", "extract_adapters"}


def definitions(script) -> dict[str, ast.stmt]:
    tree = ast.parse((ROOT / f"{script.__name__}.py").read_text())
    return {node.name: node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def test_both_scripts_have_the_same_functions_in_the_same_order() -> None:
    names = [[name for name in definitions(script) if name not in OWN] for script in (SD, SDXL)]
    assert names[0] == names[1]


def test_functions_of_a_name_take_the_same_arguments() -> None:
    for name, one in definitions(SD).items():
        other = definitions(SDXL).get(name)
        if isinstance(one, ast.FunctionDef) and isinstance(other, ast.FunctionDef) and name != "validate":
            assert [arg.arg for arg in one.args.args] == [arg.arg for arg in other.args.args], name


@pytest.mark.parametrize("script", [SD, SDXL], ids=lambda script: script.__name__)
def test_main_is_short_and_shows_the_new_line_after_backward(script) -> None:
    main = definitions(script)["main"]
    lines = ast.unparse(main).splitlines()
    assert main.end_lineno - main.lineno < 60
    assert len(script.main.__wrapped__.__code__.co_varnames) - len({"batch", "loss", "card_rows"}) <= 12
    after_backward = lines[next(number for number, line in enumerate(lines) if "accelerator.backward" in line) + 2]
    assert after_backward.strip() == "regularizer.add_gradient_()"


@pytest.mark.parametrize("script", [SD, SDXL], ids=lambda script: script.__name__)
def test_flags_are_read_before_the_imports_that_take_seconds(script) -> None:
    show_help = f"""
import runpy, sys
sys.argv = ["{script.__name__}.py", "--help"]
try:
    runpy.run_path({str(script.__file__)!r}, run_name="__main__")
except SystemExit as end:
    sys.exit(end.code or ("diffusers" in sys.modules and "diffusers is imported"))
"""
    done = subprocess.run([sys.executable, "-c", show_help], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--lipreg_weight" in done.stdout
