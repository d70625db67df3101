"""Find checkpoints on disk, tell whose they are, and whether they are whole."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from accelerate.utils.constants import OPTIMIZER_NAME, RNG_STATE_NAME, SCHEDULER_NAME

from ..errors import RunError
from . import run_config

logger = get_logger(__name__)
OFFICIAL_FILES = (f"{OPTIMIZER_NAME}.bin", f"{SCHEDULER_NAME}.bin", f"{RNG_STATE_NAME}_0.pkl")


def is_checkpoint(path: Path) -> bool:
    """Return whether a path is a folder named checkpoint-NUMBER; checkpoint-best is none."""
    return re.fullmatch(r"checkpoint-\d+", path.name) is not None and path.is_dir()


def step_of(checkpoint: Path) -> int:
    """Return the number of updates that a checkpoint was written after."""
    return int(checkpoint.name.split("-")[1])


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the checkpoints in a folder, by number."""
    return sorted(filter(is_checkpoint, Path(output_dir).glob("checkpoint-*")), key=step_of)


def run_of(checkpoint: Path) -> dict[str, Any] | None:
    """Return the "run" of a checkpoint's config.yaml, or `None` if it has no readable one: then it is not ours."""
    with suppress(RunError):
        if config := run_config.read(checkpoint):
            return config["run"]
    return None


def runs_of_checkpoints(output_dir: str | Path) -> dict[Path, dict[str, Any]]:
    """Return the checkpoints of runs of ours with these, in the order of writing."""
    runs = {checkpoint: run for checkpoint in list_checkpoints(output_dir) if (run := run_of(checkpoint))}
    return dict(sorted(runs.items(), key=lambda item: item[1]["time"]))


def latest_run(output_dir: str | Path) -> list[Path]:
    """Return the checkpoints of the run that wrote the last one, in the order of writing.

    The official scripts write no config.yaml. Their checkpoints follow if they are newer, by number.
    """
    runs = runs_of_checkpoints(output_dir)
    last: dict[str, Any] = list(runs.values())[-1] if runs else {"id": None, "time": 0}
    official = [path for path in list_checkpoints(output_dir) if path not in runs]
    newer = [path for path in official if path.stat().st_mtime > last["time"]]
    return [path for path, run in runs.items() if run["id"] == last["id"]] + newer


def fault_of(checkpoint: Path) -> str:
    """Return what a checkpoint lacks to be whole, or an empty string."""
    try:
        config = run_config.read(checkpoint)
    except RunError as error:
        return str(error)
    if config is not None:
        sizes = {checkpoint / name: size for name, size in config["run"]["files"].items()}
        wrong = [path.name for path, size in sizes.items() if not path.is_file() or path.stat().st_size != size]
        return f"{', '.join(wrong)} missing or cut off" if wrong else ""
    missing = [name for name in OFFICIAL_FILES if not (checkpoint / name).is_file()]
    if not [*checkpoint.rglob("*.safetensors"), *checkpoint.glob("pytorch_model*")]:
        missing.append("the model")
    return f"{', '.join(missing)} missing" if missing else ""


def find_checkpoint(output_dir: str, wanted: str | None) -> Path | None:
    """Return the checkpoint that `--resume_from_checkpoint` means: "latest", a name or a path; `None` for a new run."""
    if wanted is None:
        return None
    if wanted == "latest":
        if found := latest_run(output_dir):
            return last_whole(found)
        logger.warning(f"There is no checkpoint in {output_dir} yet: starting a new run.")
        return None
    # The official script takes the last part of any path for a name in the output folder; an existing path comes first.
    for checkpoint in (Path(output_dir, wanted), Path(wanted), Path(output_dir, Path(wanted).name)):
        if is_checkpoint(checkpoint):
            return last_whole([checkpoint])
    names = ", ".join(path.name for path in list_checkpoints(output_dir)) or "none"
    raise RunError(f"--resume_from_checkpoint {wanted}: there is no such checkpoint; {output_dir} has {names}.")


def last_whole(checkpoints: list[Path]) -> Path:
    """Return the last checkpoint that is whole, with a warning for each that is passed over."""
    *earlier, checkpoint = checkpoints
    fault = fault_of(checkpoint)
    if not fault:
        return checkpoint
    if not earlier:
        raise RunError(
            f"{checkpoint} is not whole: {fault}. Choose another one, or start again without --resume_from_checkpoint."
        )
    logger.warning(f"{checkpoint} is not whole: {fault}. Going on from {earlier[-1].name} instead.")
    return last_whole(earlier)
