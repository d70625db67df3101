"""The output folder of a run. What the manifest lists is the run's to replace, delete and upload; nothing else is.

A result is written whole into `.lipreg/result.partial`, which is renamed to `.lipreg/result` and then moved into place
file by file. A run that is killed in between leaves `.lipreg/result`, and the next run into the folder moves the rest.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Literal

from accelerate.logging import get_logger
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from filelock import FileLock, Timeout

from ..errors import RunError, one_line
from .lora import KOHYA_WEIGHTS

logger = get_logger(__name__)
OWN = ".lipreg"
MANIFEST = f"{OWN}/manifest.json"
NAMES = "names.json"  # of the files of the result beside it
CONFIG = "config.yaml"  # the flags of the run, written at its start: part of every result
INDEX = DiffusionPipeline.config_name  # without it nothing takes the folder for a pipeline
DISK_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
Kind = Literal["result", "checkpoint", "log"]


class OutputFolder:
    """Keep the manifest of an output folder: names relative to it, with "/" between their parts, by kind.

    The manifest is read from the disk each time, so that several objects for one folder agree.

    Raises:
        RunError: The folder has a manifest that cannot be read, or names files outside of the folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.lock: FileLock | None = None
        self._read()

    def owned(self, kind: Kind) -> list[str]:
        """Return the names that runs into this folder wrote as `kind`, in the order in which they were added."""
        return self._read().get(kind, [])

    def add(self, kind: Kind, names: Iterable[str]) -> None:
        """Note names as written by a run. Call it before they appear, so that nothing of a killed run is a stranger's."""
        self._write(kind, [*self.owned(kind), *names])

    def discard(self, kind: Kind, names: Iterable[str]) -> None:
        """Strike names out. Call it when they are gone."""
        gone = set(names)
        self._write(kind, [name for name in self.owned(kind) if name not in gone])

    def claim(self) -> None:
        """Take the lock, which ends with the process, and finish what a run that was killed left half done.

        Raises:
            RunError: Another run has the lock, or a file of the user is in the way of the result to be moved.
        """
        if self.lock is not None:
            return
        (self.path / OWN).mkdir(parents=True, exist_ok=True)
        lock = FileLock((self.path / OWN / "lock").resolve(), timeout=0, is_singleton=True)  # one for the process
        holder = self.path / OWN / "holder"
        try:
            lock.acquire()
        except Timeout as error:
            name = holder.read_text(encoding="utf-8", errors="replace") if holder.is_file() else "of unknown name"
            raise RunError(
                f"--output_dir {self.path}: another run writes there (process {name}): let it end, or name another folder."
            ) from error
        except OSError as error:
            logger.warning(f"{self.path} cannot be locked ({one_line(error)}): let no other run write there.")
        self.lock = lock
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        holder.write_text(f"{os.getpid()} on {socket.gethostname()}, since {started}", encoding="utf-8")
        self._install()

    def open(self, needed: Iterable[str]) -> None:
        """Refuse a folder that another run uses, or that holds other files under the names that a result needs.

        It writes nothing into a new folder: a run that fails at once leaves no trace.
        """
        if (self.path / OWN).is_dir():
            self.claim()
        if strangers := self.strangers(needed):
            raise RunError(
                f"--output_dir {self.path}: {strangers[0]} is needed for the result, but stands there and was not written by "
                "a run: move it, or name another folder."
            )

    def strangers(self, names: Iterable[str]) -> list[str]:
        """Return what stands under these names, or in folders of these names, and is no result of our runs."""
        owned = set(self.owned("result"))
        found: list[str] = []
        for name in names:
            path = self.path / name
            if path.is_dir() and not path.is_symlink():
                inside = (other for other in sorted(path.rglob("*")) if other.is_symlink() or not other.is_dir())
                found += [other.relative_to(self.path).as_posix() for other in inside]
            elif os.path.lexists(path):
                found.append(name)
        return [name for name in found if name not in owned]

    def contents(self, logging_dir: str) -> str:
        """Say in words what is in the folder, but for logs, and what a run does to it; nothing if it is empty."""
        if not self.path.is_dir():
            return ""
        ours = {PurePosixPath(name).parts[0] for name in self.owned("result") if (self.path / name).exists()}
        found = {path.name for path in self.path.iterdir()} - {OWN, *Path(logging_dir).parts[:1]}
        checkpoints = sorted((n for n in found if re.fullmatch(r"checkpoint-\d+", n)), key=lambda n: int(n[11:]))
        others = found - ours - set(checkpoints)
        words = []
        if ours - {CONFIG}:
            words.append("a result of an earlier run, which is replaced when the new one is whole")
        if checkpoints:
            words.append(
                f"{checkpoints[0]} to {checkpoints[-1]}, of which only --checkpoints_total_limit removes any, and only ours"
            )
        if others:
            words.append(
                f"{len(others)} other files or folders ({min(others)} is one), which are not touched or uploaded"
            )
        return f"{self.path} holds {'; '.join(words)}." if words else ""

    @contextmanager
    def result(self, write_trained: Callable[[Path], None]) -> Iterator[Path]:
        """Give the folder for a new result, and put it in place of the earlier one when the block has ended.

        Args:
            write_trained: Writes what was trained into the folder. It comes first, for the block may fail.

        Raises:
            RunError: The block failed, and what was trained is kept; or the result cannot be moved into place.
        """
        self.claim()
        staged = self.path / OWN / "result.partial"
        shutil.rmtree(staged, ignore_errors=True)
        try:
            staged.mkdir()
            write_trained(staged)
            fsync_folder(staged)
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)  # makes room
            raise
        trained = files(staged)
        try:
            yield staged
            names = files(staged)
            (staged / NAMES).write_text(json.dumps(names), encoding="utf-8")
            fsync_folder(staged)
        except Exception as error:
            for name in set(files(staged)) - set(trained):
                (staged / name).unlink()
            kept = self.path / time.strftime("trained-weights-%Y%m%d-%H%M%S")
            staged.replace(kept)
            raise RunError(
                f"the result cannot be completed: {one_line(error)}. What was trained is whole in {kept}, to be loaded "
                f"with from_pretrained or load_lora_weights. {remedy(error)}, then run the same command with "
                "--resume_from_checkpoint latest."
            ) from error
        staged.replace(self.path / OWN / "result")
        self._install()

    def write_result(self, name: str, write: Callable[[Path], object]) -> None:
        """Add one file to the result in place, whole: `write(path)` writes it elsewhere first."""
        partial = self.path / OWN / f"partial{PurePosixPath(name).suffix}"
        write(partial)
        self.add("result", [name])
        partial.replace(self.path / name)

    def _install(self) -> None:
        """Move the whole result in `.lipreg/result` into place, or what a killed run left of it, and remove the old."""
        ready = self.path / OWN / "result"
        if not (ready / NAMES).is_file():
            return
        names = json.loads((ready / NAMES).read_text(encoding="utf-8"))
        waiting = [name for name in names if (ready / name).is_file()]
        if strangers := self.strangers(waiting):
            raise RunError(
                f"{self.path / strangers[0]} was not written by a run, so it is not overwritten. Move it, then run the same "
                f"command with --resume_from_checkpoint latest. The new result waits, whole, in {ready}."
            )
        try:
            self._move(ready, names, waiting)
        except OSError as error:
            raise RunError(
                f"The new result is whole in {ready}, but cannot be moved into place: {one_line(error)}."
            ) from error
        shutil.rmtree(ready)

    def _move(self, ready: Path, names: list[str], waiting: list[str]) -> None:
        stale = set(self.owned("result")) - {*names, CONFIG}
        self.add("result", names)
        if INDEX in waiting:  # no moment shows a pipeline of old and new parts
            (self.path / INDEX).unlink(missing_ok=True)
        for name in sorted(waiting, key=lambda name: (name == INDEX, name)):
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
            (ready / name).replace(self.path / name)
        for name in sorted(stale, key=lambda name: name != INDEX):
            (self.path / name).unlink(missing_ok=True)
            for folder in list((self.path / name).parents)[: len(PurePosixPath(name).parts) - 1]:
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()
        self.discard("result", stale)

    def _read(self) -> dict[str, list[str]]:
        path = self.path / MANIFEST
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            for name in (name for names in manifest.values() for name in names):
                if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or Path(name).drive:
                    raise ValueError(f"{name} is outside of the folder")
            return manifest
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except Exception as error:
            raise RunError(f"{path}: cannot be read ({one_line(error)}). Move {self.path / OWN} away.") from error

    def _write(self, kind: Kind, names: list[str]) -> None:
        self.claim()
        manifest = self._read() | {kind: list(dict.fromkeys(names))}
        partial = self.path / OWN / "manifest.partial"
        partial.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        partial.replace(self.path / MANIFEST)


def check_folders(args: Namespace) -> None:
    """Refuse folders that a run writes to, where they are or lie inside one that it reads.

    Raises:
        RunError: An output, log or class images folder overlaps with photos, a data set, class images or a base.
    """
    given = {name: folder for name, folder in vars(args).items() if isinstance(folder, str)}
    if not args.with_prior_preservation:
        given.pop("class_data_dir", None)
    given["logging_dir"] = str(Path(args.output_dir, args.logging_dir))
    read = ["instance_data_dir", "dataset_name", "class_data_dir", "pretrained_model_name_or_path"]
    read += ["pretrained_vae_model_name_or_path", "tokenizer_name"]
    for writes in ("output_dir", "class_data_dir", "logging_dir"):
        for reads in (name for name in read if name != writes and writes in given and name in given):
            source, target = Path(given[reads]), Path(given[writes])
            if (source.is_dir() or reads == "class_data_dir") and target.resolve().is_relative_to(source.resolve()):
                inside = "" if target.resolve() == source.resolve() else "inside of "
                raise RunError(f"--{writes} {target} is {inside}--{reads} {source}: name a folder of its own.")


def result_names(args: Namespace, parts: Iterable[str]) -> list[str]:
    """Return the files and folders that the result of these flags needs; `parts` are those of the base's pipeline."""
    names = [CONFIG]
    adapters = args.rank is not None
    if not adapters:
        names += [INDEX, *parts]
    if adapters or args.extract_lora_rank is not None:
        names.append(LORA_WEIGHT_NAME_SAFE)
    if vars(args).get("output_kohya_format"):
        names.append(KOHYA_WEIGHTS)
    if args.push_to_hub:
        names.append("README.md")
        if args.validation_prompt is not None:
            images = len(vars(args).get("validation_images") or ()) or args.num_validation_images
            names += [f"image_{number}.png" for number in range(images)]
    return names


def files(folder: Path) -> list[str]:
    """Return the names of all files in a folder and below, with "/" between their parts."""
    return [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]


def fsync_folder(folder: Path) -> None:
    """Have the system write the folder's files to the disk, so that its new name never stands for less than all."""
    for name in files(folder):
        with (folder / name).open("r+b") as file:  # some systems flush only what is open for writing
            os.fsync(file.fileno())


def remedy(error: BaseException) -> str:
    """Return what to do about an error in writing: advice about the disk only where the disk is full."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (named := re.search(r"os error (\d+)", str(error))):  # as safetensors says it
        number = int(named[1])
    return "Make room on the disk" if number in DISK_FULL else "Mend that"
