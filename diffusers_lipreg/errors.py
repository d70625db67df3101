"""How every command of the package ends: with its result, or with one line that says what to mend."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


class RunError(Exception):
    """A run that cannot start or go on. The message is one line: what is wrong and how to mend it."""


class OneLineParser(argparse.ArgumentParser):
    """Answer a mistake with one line; the usage of 66 flags would bury it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {printable(message)} (--help lists all flags)\n")


def run_cli(main: Callable[[argparse.Namespace], None], args: argparse.Namespace, name: str | None = None) -> None:
    """Call `main(args)`. A `RunError` or `OSError` ends the process with one line on standard error and exit code 1.

    Args:
        args: With `debug` set, the traceback is shown instead.
        name: The command as the line names it; default: the file name of the script.
    """
    from .hub_client import bound_waiting  # here, for only commands talk to the Hub

    bound_waiting()
    try:
        main(args)
    except (RunError, OSError) as error:  # the second of a disk or file that nothing nearer knew how to name
        if vars(args).get("debug"):
            raise
        sys.exit(f"{name or Path(sys.argv[0]).name}: error: {printable(str(error))}")


def one_line(error: BaseException) -> str:
    """Return an error's message without line breaks and links to general advice, 300 characters at most."""
    text = re.sub(r"For more information check: \S+", "", " ".join(str(error).split()))
    return text.strip()[:300] or type(error).__name__


def printable(text: str) -> str:
    """Return the text with line breaks and other control characters, as a path may hold them, written out."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def read_lines(path: str | Path, flag: str) -> tuple[str, ...]:
    """Read the lines of a text file, without empty ones. `flag` is what named the file.

    Raises:
        RunError: The file cannot be read as UTF-8, or holds no text.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise RunError(f"{flag} {path}: cannot be read as text ({one_line(error)}).") from error
    if not text.strip():
        raise RunError(f"{flag} {path}: there is nothing in it.")
    return tuple(line.strip() for line in text.splitlines() if line.strip())
