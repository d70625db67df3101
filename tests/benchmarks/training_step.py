"""Updates per second and peak memory of the training scripts themselves, at the published sizes with random weights.

    python tests/benchmarks/training_step.py --output_dir step-results                        # SD1.5, 512 pixels
    python tests/benchmarks/training_step.py --output_dir step-results --models sdxl --precision fp16
    python tests/benchmarks/training_step.py --output_dir step-results --models testbed --batch_sizes 4 --updates 20

It finds a GPU itself. Every combination of the flags is a run of its own in a process of its own; finished ones are kept
in the folder, so it can be interrupted. `work` is `official`: no cache, prompts encoded at each step of the SD script, and
AdamW not fused, which at penalty `off` is the official script's loop (its weights are equal to the last bit, see
tests/test_parity.py); `once`: as our scripts do it. `penalty` is `off`, `on`, or a
value of --lipreg_teacher_device, such as `cpu`. SD1.5 trains the whole UNet, SDXL adapters. An update's time is the median
of those after the warm-up; memory is the highest while they last.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from PIL import Image  # noqa: E402
from published import conditions, save_pipeline, versions  # noqa: E402

import train_dreambooth_lipreg  # noqa: E402
import train_dreambooth_lora_lipreg_sdxl  # noqa: E402
from diffusers_lipreg.dreambooth import optimization, prompts  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCRIPTS = {
    "testbed": train_dreambooth_lipreg,
    "sd15": train_dreambooth_lipreg,
    "sdxl": train_dreambooth_lora_lipreg_sdxl,
}
RESOLUTIONS = {"testbed": 64, "sd15": 512, "sdxl": 1024}
AXES = ("model", "penalty", "work", "batch_size", "precision", "checkpointing")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=SCRIPTS, default=["sd15"])
    parser.add_argument("--penalties", nargs="+", default=["off", "on", "cpu"])
    parser.add_argument("--work", nargs="+", choices=["official", "once"], default=["official", "once"])
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--precision", nargs="+", choices=["no", "bf16", "fp16"], default=["no"])
    parser.add_argument("--checkpointing", nargs="+", choices=["off", "on"], default=["off"], help="Of gradients.")
    parser.add_argument("--resolution", type=int, help="Default: 512 for SD1.5, 1024 for SDXL, 64 for the testbed.")
    parser.add_argument("--updates", type=int, default=20, help="That are timed.")
    parser.add_argument("--warm_up", type=int, default=5, help="Updates before.")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)  # for the processes it starts itself
    return parser.parse_args()


# What a run starts from


def pipeline_of(model: str, folder: Path) -> Path:
    """The testbed's pipeline, or one of the published sizes, which is made once."""
    if model == "testbed":
        return ROOT / "tests" / "testbed" / "pipeline"
    if not (folder / model / "model_index.json").exists():
        save_pipeline(model, folder / model)
    return folder / model


def photos_in(folder: Path, batch_size: int) -> Path:
    """Square photos of 1024 pixels, of noise: four or more, as many as make full batches."""
    number = 4 + -4 % batch_size
    if not (folder / str(number)).exists():
        (folder / str(number)).mkdir(parents=True)
        generator = torch.Generator().manual_seed(0)
        for photo in range(number):
            coarse = torch.randint(0, 256, (64, 64, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(coarse.numpy()).resize((1024, 1024)).save(folder / str(number) / f"{photo}.jpg")
    return folder / str(number)


def common_flags(model: str, folder: Path, batch_size: int, resolution: int | None) -> list[str]:
    flags = {
        "--pretrained_model_name_or_path": pipeline_of(model, folder),
        "--instance_data_dir": photos_in(folder / "photos", batch_size), "--train_batch_size": batch_size,
        "--instance_prompt": "a photo of sks dog", "--resolution": resolution or RESOLUTIONS[model], "--seed": 0,
        "--lr_warmup_steps": 0, "--checkpointing_steps": 10**9, "--probe_steps": 0,
    }  # fmt: skip
    return [str(part) for pair in flags.items() for part in pair]


def penalty_flags(penalty: str) -> list[str]:
    if penalty in ("off", "on"):
        return ["--lipreg_weight", "0"] if penalty == "off" else []
    return ["--lipreg_teacher_device", penalty]


def work_flags(work: str) -> list[str]:
    return {"official": ["--no-cache_latents"], "once": []}[work]


@contextmanager
def official_work(on: bool) -> Iterator[None]:
    """In the block, prompts are encoded at each step, and AdamW is not fused."""
    adamw, precompute = optimization.create_adamw, prompts.PromptEncoder.precompute

    def at_each_step(self, text_encoder, device, batches):
        def states(prompts):
            with torch.no_grad():
                return self.encode(text_encoder, prompts)

        return states

    if on:
        optimization.create_adamw = lambda args, parameters, fused: adamw(args, parameters, fused=False)
        prompts.PromptEncoder.precompute = at_each_step
    try:
        yield
    finally:
        optimization.create_adamw, prompts.PromptEncoder.precompute = adamw, precompute


# One run, in a process of its own


class Enough(Exception):
    """The updates that are timed are over."""


def measure(cell: dict[str, Any], args: argparse.Namespace) -> dict[str, float]:
    """Seconds of an update, its peak memory in MiB, and the seconds from the start to the first update."""
    script, marks = SCRIPTS[cell["model"]], [time.perf_counter()]

    def log(self: Accelerator, values: dict, step: int, **_: Any) -> None:
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        marks.append(time.perf_counter())
        if len(marks) == 1 + args.warm_up:
            reset_peak()
        if len(marks) == 1 + args.warm_up + args.updates:
            raise Enough

    Accelerator.log = log
    more = ["--gradient_checkpointing"] if cell["checkpointing"] == "on" else []
    more += work_flags(cell["work"]) + penalty_flags(cell["penalty"])
    arguments = [
        *common_flags(cell["model"], args.output_dir, cell["batch_size"], args.resolution),
        "--output_dir", str(args.output_dir / "run"),
        "--mixed_precision", cell["precision"], "--max_train_steps", "10000", *more,
    ]  # fmt: skip
    try:
        with official_work(cell["work"] == "official"):
            script.main(script.parse_args(arguments))
    except Enough:
        pass
    seconds = [after - before for before, after in itertools.pairwise(marks[args.warm_up :])]
    return {"seconds": statistics.median(seconds), "MiB": peak_mib(), "start": marks[1] - marks[0]}


def reset_peak() -> None:
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak is counted anew


def peak_mib() -> float:
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


# All of them


def measured(cell: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The result of a combination, from a run that is made if it is not there yet."""
    name = (
        "-".join(str(cell[axis]) for axis in AXES) + f"-{args.resolution or RESOLUTIONS[cell['model']]}-{args.updates}"
    )
    path = args.output_dir / f"{name}.json"
    if not path.exists():
        ran = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--one", json.dumps(cell)],
            capture_output=True, text=True, env={**os.environ, "TQDM_DISABLE": "1"},
        )  # fmt: skip
        if ran.returncode != 0:
            return {"failed": ran.stderr.strip().splitlines()[-1][:80]}
        path.write_text(ran.stdout.splitlines()[-1])
    return json.loads(path.read_text())


def row(cell: dict[str, Any], result: dict[str, Any]) -> str:
    what = " | ".join(str(cell[axis]) for axis in AXES)
    if "failed" in result:
        return f"| {what} | {result['failed']} | | |"
    return f"| {what} | {1 / result['seconds']:.3g} | {result['MiB']:,.0f} | {result['start']:.1f} |"


def main() -> None:
    args = parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if args.one:
        print(json.dumps(measure(args.one, args)))
        return
    for model, batch_size in itertools.product(args.models, args.batch_sizes):
        common_flags(
            model, args.output_dir, batch_size, args.resolution
        )  # pipeline and photos are made once, not in a run
    print(f"{conditions(DEVICE)}, {versions()}; median of {args.updates} updates after {args.warm_up}.\n")
    print("| model | penalty | work | batch | precision | checkpointing | updates/s | peak MiB | start, s |")
    print("|---" * 9 + "|")
    values = (args.models, args.penalties, args.work, args.batch_sizes, args.precision, args.checkpointing)
    for combination in itertools.product(*values):
        cell = dict(zip(AXES, combination, strict=True))
        if cell["model"] == "sdxl" and cell["penalty"] not in ("off", "on"):
            continue  # adapters have no teacher to store
        print(row(cell, measured(cell, args)), flush=True)


if __name__ == "__main__":
    main()
