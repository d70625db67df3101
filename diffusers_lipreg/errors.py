"""How every command of the package ends: with its result, or with one line that says what to mend."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

# A flag for a token, misspelled or not; and what looks like a token of the Hub.
TOKEN_FLAG = re.compile(r"-{1,2}(hub(?![_-]?m)|[\w-]*token(?!iz))", re.I)
HUB_TOKEN = re.compile(r"(?<![\w/.-])hf_\w+(?![\w/.-])")


class RunError(Exception):
    """A run that cannot start or go on. The message is one line: what is wrong and how to mend it."""


class OneLineParser(argparse.ArgumentParser):
    """Answer a mistake with one line; the usage of 66 flags would bury it."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """Refuse unknown flags by name; what follows one may be a secret."""
        parsed, rest = self.parse_known_args(args, namespace)
        if rest:
            flags = [word.partition("=")[0] for word in rest if word.startswith("-")]
            self.error(f"unrecognized arguments: {' '.join(flags or rest)}")
        return parsed

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {printable(message)} (--help lists all flags)\n")

    def check_texts(self, args: argparse.Namespace) -> None:
        """Refuse texts that are empty, prompts excepted, or no UTF-8, which files and models do not take."""
        for name, text in vars(args).items():
            if text == "" and not name.endswith("prompt"):
                self.error(f"--{name} is empty")
            if isinstance(text, str) and any("\ud800" <= letter <= "\udfff" for letter in text):
                self.error(f"--{name} is not valid UTF-8: {text}")


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


@contextmanager
def as_run_error(describe: Callable[[Exception], str]) -> Iterator[None]:
    """Turn whatever the block raises into a `RunError` with the line `describe(error)`; a `RunError` stays as it is."""
    try:
        yield
    except RunError:
        raise
    except Exception as error:
        raise RunError(describe(error)) from error


def secrets() -> set[str]:
    """Return what the command line may hold of tokens: what follows a flag for one, and what looks like one."""
    flags = [TOKEN_FLAG.match(word) for word in sys.argv]
    beside = [word.partition("=")[2] for word, flag in zip(sys.argv, flags, strict=True) if flag]
    behind = [word for word, flag in zip(sys.argv[1:], flags, strict=False) if flag and not word.startswith("-")]
    return {word for word in [*beside, *behind, *HUB_TOKEN.findall(" ".join(sys.argv))] if word}


def masked(text: str) -> str:
    """Return the text with "***" for each token that it quotes: of the command line, the environment, or by its look."""
    tokens = {*secrets(), os.environ.get("HF_TOKEN", ""), os.environ.get("HUGGING_FACE_HUB_TOKEN", "")}
    for token in sorted((token for token in tokens if len(token) > 3), key=len, reverse=True):
        text = text.replace(token, "***")
    return HUB_TOKEN.sub("***", text)


def one_line(error: BaseException) -> str:
    """Return an error's message without line breaks and links to general advice, 300 characters at most."""
    text = re.sub(r"For more information check: \S+", "", masked(" ".join(str(error).split())))
    return text.strip()[:300] or type(error).__name__


def printable(text: str) -> str:
    """Return the text with control characters, as a path may hold them, written out, and without tokens."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in masked(text))


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
