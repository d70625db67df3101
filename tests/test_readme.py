"""What README.md and the pages that it links to show is what the package does."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from support.runs import ROOT

import train_dreambooth_lipreg
import train_dreambooth_lora_lipreg_sdxl
from diffusers_lipreg import LipschitzDriftLoss, TeacherSnapshot, interpolate
from diffusers_lipreg.evaluation import __main__ as evaluation

README = (ROOT / "README.md").read_text()
PAGES = ["README.md", *(f"{folder}/README.md" for folder in ("diffusers_lipreg/dreambooth", "tests/benchmarks"))]
PAGES += ["tests/README.md", "tests/testbed/README.md", "tests/testbed/budgets.md"]
MODULES = {"diffusers_lipreg.evaluation": evaluation, "diffusers_lipreg.interpolate": interpolate}


def commands(text: str) -> list[str]:
    """Return the lines of a page's bash blocks, each with those that it continues on."""
    return "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S)).replace("\\\n", " ").splitlines()


def anchors(text: str) -> set[str]:
    """Return what GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


COMMANDS = [line for page in PAGES for line in commands((ROOT / page).read_text())]
INLINE = [line for page in PAGES for line in re.findall(r"`(python [^`]+)`", (ROOT / page).read_text())]


@pytest.mark.parametrize("line", [line for line in COMMANDS if "train_dreambooth" in line])
def test_training_commands_parse(line):
    required = "--instance_data_dir x --instance_prompt x --pretrained_model_name_or_path x"
    arguments = shlex.split(line.replace("...", required))
    name = next(word for word in arguments if word.startswith("train_dreambooth"))
    script = {"train_dreambooth_lipreg.py": train_dreambooth_lipreg}.get(name, train_dreambooth_lora_lipreg_sdxl)
    assert (ROOT / name).is_file()
    script.parse_args(arguments[arguments.index(name) + 1 :])


@pytest.mark.parametrize("module", MODULES)
def test_the_other_commands_of_the_package_parse(module):
    (line,) = [line for line in COMMANDS if module in line]
    arguments = shlex.split(line)
    MODULES[module].parse_args(arguments[arguments.index(module) + 1 :])


@pytest.mark.parametrize("line", [line for line in COMMANDS + INLINE if re.search(r"tests/\w+/\w+\.py", line)])
def test_commands_of_the_tests_folder_use_flags_that_exist(line):
    script = next(word for word in shlex.split(line) if re.fullmatch(r"tests/\w+/\w+\.py", word))
    source = (ROOT / script).read_text()
    for flag in re.findall(r" (--\w+)", line.partition(script)[2]):
        assert f'"{flag}"' in source, flag


def test_the_commands_files_are_there():
    for path in re.findall(r"tests/[\w/.]+", "\n".join(COMMANDS)):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    text = (ROOT / page).read_text()
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        path, _, heading = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        assert not heading or heading in anchors(Path(target).read_text()), link


def test_the_tables_defaults_are_the_scripts():
    required = "--pretrained_model_name_or_path m --instance_data_dir d --instance_prompt p".split()
    args = train_dreambooth_lipreg.parse_args(required)
    assert f"| `--lipreg_weight` | {args.lipreg_weight:g} |" in README
    assert f"| `--lipreg_reduction` | `{args.lipreg_reduction}` |" in README
    assert f"| `--probe_steps` | {args.probe_steps} |" in README


def test_the_problem_tables_flags_parse():
    (remedy,) = re.findall(r"^\| out of memory \| `([^`]+)`", README, re.M)
    required = "--pretrained_model_name_or_path m --instance_data_dir d --instance_prompt p".split()
    train_dreambooth_lipreg.parse_args([*required, *remedy.split(), "--use_8bit_adam"])


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
