"""What the README shows is what the package does."""

import re
import shlex

import pytest
import torch
from support.runs import ROOT

import train_dreambooth_lipreg
import train_dreambooth_lora_lipreg_sdxl
from diffusers_lipreg import LipschitzDriftLoss, TeacherSnapshot
from diffusers_lipreg.evaluation import __main__ as evaluation

README = (ROOT / "README.md").read_text()
BASH = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.S)).replace("\\\n", " ")


@pytest.mark.parametrize("line", [line for line in BASH.splitlines() if "train_dreambooth" in line])
def test_commands_parse(line):
    required = "--instance_data_dir x --instance_prompt x --pretrained_model_name_or_path x"
    arguments = shlex.split(line.replace("...", required))
    name = next(word for word in arguments if word.startswith("train_dreambooth"))
    script = {"train_dreambooth_lipreg.py": train_dreambooth_lipreg}.get(name, train_dreambooth_lora_lipreg_sdxl)
    assert (ROOT / name).is_file()
    script.parse_args(arguments[arguments.index(name) + 1 :])


def test_the_evaluation_parses():
    (line,) = [line for line in BASH.splitlines() if "diffusers_lipreg.evaluation" in line]
    arguments = shlex.split(line)
    evaluation.parse_args(arguments[arguments.index("diffusers_lipreg.evaluation") + 1 :])


def test_the_offline_command_finds_its_files():
    for path in re.findall(r"tests/[\w/.]+", BASH):
        assert (ROOT / path).exists(), path


def test_the_tables_defaults_are_the_scripts():
    required = "--pretrained_model_name_or_path m --instance_data_dir d --instance_prompt p".split()
    args = train_dreambooth_lipreg.parse_args(required)
    assert f"| `--lipreg_weight` | {args.lipreg_weight:g} |" in README
    assert f"| `--lipreg_reduction` | `{args.lipreg_reduction}` |" in README


def test_the_diffs_lines_run():
    """The lines marked + in the diff, executed around a loop of one step."""
    added = [
        line[1:] for line in re.search(r"```diff\n(.*?)```", README, re.S)[1].splitlines() if line.startswith("+")
    ]
    assert len(added) == 3
    unet = torch.nn.Linear(2, 1)
    scope = {"unet": unet}
    exec("\n".join(added[:2]), scope)
    assert isinstance(scope["drift_loss"], LipschitzDriftLoss) and isinstance(scope["TeacherSnapshot"], type)
    assert scope["TeacherSnapshot"] is TeacherSnapshot
    unet.weight.data += 1
    exec(added[2].strip(), scope)
    torch.testing.assert_close(unet.weight.grad, torch.full((1, 2), 2 * 500 / 2.0))
