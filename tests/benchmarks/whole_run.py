"""How long a whole run takes, from the command to the saved pipeline: the penalty against prior preservation.

    python tests/benchmarks/whole_run.py --output_dir run-results                                # testbed, 400 updates
    python tests/benchmarks/whole_run.py --output_dir run-results --model sd15 --updates 1000 --batch_size 1   # on a GPU

Prior preservation samples its class images first, at every start anew here. Each run is a process of its own; finished
ones are kept in the folder, so it can be interrupted. `official` and `once` are those of training_step.py: work done at
each step as in the official script, or once. The probe is off, as nothing of it is in the official script; what it adds,
drift_budget.py measures.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from training_step import DEVICE, SCRIPTS, common_flags, official_work, penalty_flags, work_flags

from accelerate import Accelerator  # isort: skip
from published import conditions, versions

# Name: the work, the penalty and how many class images.
RUNS = {
    "no penalty, official": ("official", "off", 0),
    "no penalty": ("once", "off", 0),
    "penalty, work at each step": ("official", "on", 0),
    "penalty": ("once", "on", 0),
    "prior preservation, 100 class images, official": ("official", "off", 100),
    "prior preservation, 100 class images": ("once", "off", 100),
    "prior preservation, 200 class images, official": ("official", "off", 200),
    "prior preservation, 200 class images": ("once", "off", 200),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--model", choices=SCRIPTS, default="testbed")
    parser.add_argument("--resolution", type=int)
    parser.add_argument("--updates", type=int, default=400)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--precision", choices=["no", "bf16", "fp16"], default="no")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--repeats", type=int, default=1, help="The fastest counts.")
    parser.add_argument("--one", choices=RUNS, help=argparse.SUPPRESS)  # for the processes it starts itself
    return parser.parse_args()


def run(args: argparse.Namespace) -> None:
    """The run, in this process; prints when its first and its last update were made."""
    work, penalty, class_images = RUNS[args.one]
    marks: list[float] = []
    Accelerator.log = lambda self, values, step, **_: marks.append(time.time())
    more = [*work_flags(work), *penalty_flags(penalty)]
    if class_images:
        more += [
            "--with_prior_preservation",
            "--class_prompt",
            "a photo of a dog",
            "--num_class_images",
            str(class_images),
        ]
        more += ["--class_data_dir", str(args.output_dir / "class")]
    script = SCRIPTS[args.model]
    arguments = [
        *common_flags(args.model, args.output_dir, args.batch_size, args.resolution),
        "--output_dir", str(args.output_dir / "model"), "--mixed_precision", args.precision,
        "--max_train_steps", str(args.updates), *more,
    ]  # fmt: skip
    with official_work(work == "official"):
        script.main(script.parse_args(arguments))
    print(json.dumps({"first": marks[0], "last": marks[-1]}))


def timed(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Seconds in all, to the first update, and of the updates after it."""
    for folder in ("class", "model"):
        shutil.rmtree(args.output_dir / folder, ignore_errors=True)
    start = time.time()
    ran = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--one", name],
        stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "TQDM_DISABLE": "1"},
    )  # fmt: skip
    end, marks = time.time(), json.loads(ran.stdout.splitlines()[-1])
    return {"all": end - start, "first": marks["first"] - start, "updates": marks["last"] - marks["first"]}


def kept(name: str, args: argparse.Namespace) -> dict[str, float]:
    """The fastest of the repeats, made if they are not there yet."""
    settings = f"{args.model}-{args.resolution}-{args.updates}-{args.batch_size}-{args.precision}-{args.repeats}"
    path = args.output_dir / f"{name.replace(', ', '-').replace(' ', '-')}-{settings}.json"
    if not path.exists():
        results: list[dict[str, Any]] = [timed(name, args) for _ in range(args.repeats)]
        path.write_text(json.dumps(min(results, key=lambda result: result["all"])))
    return json.loads(path.read_text())


def main() -> None:
    args = parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if args.one:
        run(args)
        return
    common_flags(
        args.model, args.output_dir, args.batch_size, args.resolution
    )  # the pipeline is made outside of what is timed
    print(f"{conditions(DEVICE)}, {versions()}; {args.model}, {args.updates} updates at batch {args.batch_size}.\n")
    print("| run | seconds | of these to the first update | updates/s |\n|---|---|---|---|")
    for name in args.runs:
        result = kept(name, args)
        rate = (args.updates - 1) / result["updates"]
        print(f"| {name} | {result['all']:.1f} | {result['first']:.1f} | {rate:.3g} |", flush=True)


if __name__ == "__main__":
    main()
