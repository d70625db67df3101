"""Keep a run from files that are not its own: a manifest lists what it may replace, delete and upload.

A result is written to `.lipreg/result.partial`, which is renamed to `.lipreg/result` when it is whole. Its files are then
moved into place one by one. If a run is killed in between, the next run into the folder moves the rest.
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
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from accelerate.logging import get_logger
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from filelock import FileLock, Timeout

from ..errors import RunError, as_run_error, one_line
from .lora import KOHYA_WEIGHTS

logger = get_logger(__name__)
OWN = ".lipreg"
MANIFEST = f"{OWN}/manifest.json"
NAMES = "names.json"  # lists the files of the result that it lies beside
CONFIG = "config.yaml"  # holds the flags of the run, is written at its start and belongs to every result
INDEX = DiffusionPipeline.config_name  # without this file no program takes the folder for a pipeline
READ_FOLDERS = ["instance_data_dir", "dataset_name", "class_data_dir", "pretrained_model_name_or_path"]
READ_FOLDERS += ["pretrained_vae_model_name_or_path", "tokenizer_name"]
DISK_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
T = TypeVar("T")


class OutputFolder:
    """Keep the manifest and the lock of an output folder, and replace its result.

    The manifest lists names relative to the folder, by kind, "result" or "checkpoint", with "/" between their parts. It is
    read anew each time.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.lock: FileLock | None = None
        self._read()

    def owned(self, kind: str = "result") -> list[str]:
        """Return the names that runs into this folder added as `kind`, in that order."""
        return self._read().get(kind, [])

    def add(self, names: Iterable[str], kind: str = "result") -> None:
        """Add names to the manifest. Call it before the files appear, so that a killed run leaves no unlisted file."""
        self._write(kind, [*self.owned(kind), *names])

    def discard(self, names: Iterable[str], kind: str = "result") -> None:
        """Remove names from the manifest. Call it when the files are gone."""
        gone = set(names)
        self._write(kind, [name for name in self.owned(kind) if name not in gone])

    def claim(self) -> None:
        """Take the lock, which ends with the process, and move what a killed run left of its result into place."""
        if self.lock is not None:
            return
        own = self.path / OWN
        own.mkdir(parents=True, exist_ok=True)
        lock = FileLock((own / "lock").resolve(), timeout=0, is_singleton=True)  # one for the process
        holder = own / "holder"
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

        It writes nothing into a new folder, so that a run that fails at once leaves no trace.
        """
        if (self.path / OWN).is_dir():
            self.claim()
        if strangers := self.strangers(needed):
            raise RunError(
                f"--output_dir {self.path}: {strangers[0]} is needed for the result, but stands there and was not written by "
                "a run: move it, or name another folder."
            )

    def strangers(self, names: Iterable[str]) -> list[str]:
        """Return the files under these names, or in folders of these names, that no run has written."""
        owned, found = set(self.owned()), list[str]()
        for name in names:
            path = self.path / name
            if path.is_dir() and not path.is_symlink():
                inside = (other for other in sorted(path.rglob("*")) if other.is_symlink() or not other.is_dir())
                found += [other.relative_to(self.path).as_posix() for other in inside]
            elif os.path.lexists(path):
                found.append(name)
        return [name for name in found if name not in owned or self._is_elsewhere(name)]

    def _is_elsewhere(self, name: str) -> bool:
        """Tell whether a name leads through a link to a folder outside, whose files no run has written."""
        return any((self.path / parent).is_symlink() for parent in PurePosixPath(name).parents)

    def contents(self, logging_dir: str) -> str:
        """Say what the folder holds apart from logs, and what a run does to it; an empty string for nothing."""
        present = {path.name for path in self.path.iterdir()} if self.path.is_dir() else set()
        names = present - {OWN, *Path(logging_dir).parts[:1]}
        ours = names & {PurePosixPath(name).parts[0] for name in self.owned()}
        steps = sorted(int(found[1]) for name in names if (found := re.fullmatch(r"checkpoint-(\d+)", name)))
        others = names - ours - {f"checkpoint-{step}" for step in steps}
        words = []
        if ours - {CONFIG}:
            words.append("a result of an earlier run, which is replaced when the new one is whole")
        if steps:
            span = f"checkpoint-{steps[0]} to checkpoint-{steps[-1]}"
            words.append(f"{span}, of which --checkpoints_total_limit neither counts nor removes those of other runs")
        if others:
            words.append(
                f"{len(others)} other files or folders ({min(others)} is one), which are not touched or uploaded"
            )
        return f"{self.path} holds {'; '.join(words)}." if words else ""

    @contextmanager
    def result(self, write_trained: Callable[[Path], None]) -> Iterator[Path]:
        """Yield the folder for a new result, which replaces the earlier one when the block has ended.

        `write_trained(folder)` writes what was trained before the block, which may fail: then that is kept elsewhere.
        """
        self.claim()
        staged = self.path / OWN / "result.partial"
        shutil.rmtree(staged, ignore_errors=True)
        try:
            staged.mkdir()
            write_trained(staged)
            fsync_folder(staged)
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)  # makes room on a full disk
            raise
        trained = files(staged)
        try:
            yield staged
            (staged / NAMES).write_text(json.dumps(files(staged)), encoding="utf-8")
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
        """Add one file to the result in place. `write(path)` writes it elsewhere first, so that it appears whole.

        Raises:
            RunError: A file of the user has that name.
        """
        self.claim()
        if self.strangers([name]):
            raise RunError(f"{self.path / name} was not written by a run, so it is not overwritten.")
        partial = self.path / OWN / f"partial{PurePosixPath(name).suffix}"
        write(partial)
        self.add([name])
        partial.replace(self.path / name)

    def _install(self) -> None:
        """Move the result in `.lipreg/result`, or what a killed run left of it, into place and remove the earlier one."""
        ready = self.path / OWN / "result"
        if not (ready / NAMES).is_file():
            return
        names = read_names(ready / NAMES, checked_names)
        waiting = [name for name in names if (ready / name).is_file()]
        if strangers := self.strangers(waiting):
            raise RunError(
                f"{self.path / strangers[0]} was not written by a run, so it is not overwritten. Move it, then run the same "
                f"command with --resume_from_checkpoint latest. The new result waits, whole, in {ready}."
            )
        stale = set(self.owned()) - {*names, CONFIG}
        self.add(names)
        with as_run_error(
            lambda error: f"The new result is whole in {ready}, but cannot be moved into place: {one_line(error)}."
        ):
            # The index goes first and comes last, so that the folder is never a pipeline of old and new parts.
            if INDEX in waiting:
                (self.path / INDEX).unlink(missing_ok=True)
            for name in sorted(waiting, key=lambda name: name == INDEX):
                (self.path / name).parent.mkdir(parents=True, exist_ok=True)
                (ready / name).replace(self.path / name)
            for name in sorted(stale, key=lambda name: name != INDEX):
                if self._is_elsewhere(name):
                    continue
                (self.path / name).unlink(missing_ok=True)
                for parent in PurePosixPath(name).parents[:-1]:
                    with suppress(OSError):  # there is no such folder, or it is not empty
                        (self.path / parent).rmdir()
        self.discard(stale)
        shutil.rmtree(ready)

    def _read(self) -> dict[str, list[str]]:
        try:
            return read_names(
                self.path / MANIFEST, lambda kinds: {kind: checked_names(names) for kind, names in kinds.items()}
            )
        except (FileNotFoundError, NotADirectoryError):
            return {}

    def _write(self, kind: str, names: list[str]) -> None:
        self.claim()
        manifest = self._read() | {kind: list(dict.fromkeys(names))}
        partial = self.path / OWN / "manifest.partial"
        partial.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        partial.replace(self.path / MANIFEST)


def read_names(path: Path, check: Callable[[Any], T]) -> T:
    """Read a list of names that `.lipreg` holds, as JSON, and return what `check` makes of it.

    Raises:
        OSError: There is no such file.
        RunError: It is damaged, or holds anything else.
    """
    try:
        return check(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        raise
    except Exception as error:  # JSON may hold anything
        raise RunError(f"{path}: cannot be read ({one_line(error)}). Move {path.parent} away.") from error


def checked_names(names: list[str]) -> list[str]:
    """Return names of files in an output folder.

    Raises:
        Exception: They are no list of names, or one of them is outside of the folder or in `.lipreg`.
    """
    for name in names:
        parts = PurePosixPath(name).parts
        plain = name.encode() and "\0" not in name and parts and "/".join(parts) == name
        if not plain or parts[0] in ("/", OWN) or ".." in parts or Path(name).drive:
            raise ValueError(f"{name!r} is outside of the folder")
    return [*names]


def check_folders(args: Namespace) -> None:
    """Refuse to write output, logs or class images into a folder that the run reads, or below it."""
    folders = {**vars(args), "logging_dir": str(Path(args.output_dir, args.logging_dir))}
    if not args.with_prior_preservation:
        folders["class_data_dir"] = None
    for writes, reads in product(("output_dir", "class_data_dir", "logging_dir"), READ_FOLDERS):
        if writes == reads or folders.get(writes) is None or folders.get(reads) is None:
            continue
        target, source = Path(folders[writes]), Path(folders[reads])
        may_be_read = source.is_dir() or reads == "class_data_dir"  # which the run creates
        if may_be_read and target.resolve().is_relative_to(source.resolve()):
            inside = "" if target.resolve() == source.resolve() else "inside of "
            raise RunError(f"--{writes} {target} is {inside}--{reads} {source}: name a folder of its own.")


def result_names(args: Namespace, parts: Iterable[str]) -> list[str]:
    """Return the files and folders that the result of these flags needs; `parts` are those of the base's pipeline."""
    names = [CONFIG] if args.rank is not None else [CONFIG, INDEX, *parts]
    if args.rank is not None or args.extract_lora_rank is not None:
        names.append(LORA_WEIGHT_NAME_SAFE)
    if vars(args).get("output_kohya_format"):
        names.append(KOHYA_WEIGHTS)
    if args.push_to_hub:
        names.append("README.md")
    if args.push_to_hub and args.validation_prompt is not None:
        images = len(vars(args).get("validation_images") or ()) or args.num_validation_images
        names += [f"image_{number}.png" for number in range(images)]
    return names


def files(folder: Path) -> list[str]:
    """Return the names of all files in a folder and below it, with "/" between their parts."""
    return [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]


def fsync_folder(folder: Path) -> None:
    """Have the system write a folder's files to the disk, so that a rename never shows a part of them."""
    for name in files(folder):
        with (folder / name).open("r+b") as file:  # Windows flushes only files that are open for writing
            os.fsync(file.fileno())


def remedy(error: BaseException) -> str:
    """Return what to do about an error in writing. It advises to make room only if the disk is full."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (named := re.search(r"os error (\d+)", str(error))):  # the words of safetensors
        number = int(named[1])
    return "Make room on the disk" if number in DISK_FULL else "Mend that"
