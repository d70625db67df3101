"""End every command of the package with its result, or with one line that says what to mend."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn

# TOKEN_FLAG finds flags for tokens, also misspelled ones; HUB_TOKEN finds words that look like tokens of the Hub.
TOKEN_FLAG = re.compile(r"-{1,2}(hub(?![_-]?m)|[\w-]*token(?!iz))", re.I)
HUB_TOKEN = re.compile(r"(?<![\w/.-])hf_\w+(?![\w/.-])")


class RunError(Exception):
    """An error that ends a run. The message is one line: what is wrong and how to mend it."""


class OneLineParser(argparse.ArgumentParser):
    """Answer a mistake with one line, without the usage of 66 flags, which would bury it."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse the arguments. An error repeats unknown flags, but not their values, which may be secrets."""
        parsed, rest = self.parse_known_args(args, namespace)
        if rest:
            flags = [word.partition("=")[0] for word in rest if word.startswith("-")]
            self.error(f"unrecognized arguments: {' '.join(flags or rest)}")
        return parsed

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {printable(message)} (--help lists all flags)\n")

    def check_texts(self, args: argparse.Namespace) -> None:
        """Refuse values that are not UTF-8, and empty ones except prompts."""
        for name, text in vars(args).items():
            if text == "" and not name.endswith("prompt"):
                self.error(f"--{name} is empty")
            if isinstance(text, str) and any("\ud800" <= letter <= "\udfff" for letter in text):
                self.error(f"--{name} is not valid UTF-8: {text}")


def run_cli(main: Callable[[argparse.Namespace], None], args: argparse.Namespace, name: str | None = None) -> None:
    """Call `main(args)`. A `RunError` or `OSError` ends the process with one line on standard error and exit code 1.

    Ctrl-C ends it with one line and exit code 130. What standard output cannot encode, such as a path on a terminal of
    another language, it shows as escapes.

    Args:
        args: Its `debug` asks for the traceback instead.
        name: The command that the line names; default: the file name of the script.
    """
    from .hub_client import bound_waiting  # imported late, since only commands talk to the Hub

    bound_waiting()
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main(args)
    except KeyboardInterrupt:
        print(f"{name or Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except (RunError, OSError) as error:  # an OSError comes from a disk or file that no other code has described
        if vars(args).get("debug"):
            raise
        sys.exit(f"{name or Path(sys.argv[0]).name}: error: {printable(str(error))}")


@contextmanager
def as_run_error(describe: Callable[[Exception], str]) -> Iterator[None]:
    """Turn any exception in the block into a `RunError` with the line `describe(error)`. A `RunError` stays as it is."""
    try:
        yield
    except RunError:
        raise
    except Exception as error:
        raise RunError(describe(error)) from error


def secrets() -> set[str]:
    """Return the words of the command line that may be tokens: values of flags for tokens, and what looks like one."""
    found = set(HUB_TOKEN.findall(" ".join(sys.argv)))
    for word, following in zip(sys.argv, [*sys.argv[1:], ""], strict=True):
        if TOKEN_FLAG.match(word):
            value = word.partition("=")[2] if "=" in word else following
            found.add("" if value.startswith("-") else value)
    return found - {""}


def masked(text: str) -> str:
    """Return the text with "***" in place of tokens: those of command line and environment, and what looks like one."""
    tokens = {*secrets(), os.environ.get("HF_TOKEN", ""), os.environ.get("HUGGING_FACE_HUB_TOKEN", "")}
    for token in sorted((token for token in tokens if len(token) > 3), key=len, reverse=True):
        text = text.replace(token, "***")
    return HUB_TOKEN.sub("***", text)


def one_line(error: BaseException) -> str:
    """Return an error's message in one line of at most 300 characters, without tokens and links to general advice."""
    text = re.sub(r"For more information check: \S+", "", masked(" ".join(str(error).split())))
    return text.strip()[:300] or type(error).__name__


def printable(text: str) -> str:
    """Return the text without tokens, and with control characters, which a path may hold, as escapes."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in masked(text))


def read_lines(path: str | Path, flag: str) -> tuple[str, ...]:
    """Return the lines of a text file without the empty ones.

    Args:
        flag: The flag that names the file, for errors.

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
