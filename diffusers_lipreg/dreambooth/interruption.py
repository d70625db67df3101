"""Signals end a run where nothing is lost, whatever has launched it."""

from __future__ import annotations

import argparse
import atexit
import functools
import multiprocessing
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO

import psutil
import torch
from accelerate import Accelerator

from ..errors import run_cli, secrets

# A terminal and a launcher may both pass on one Ctrl-C: what comes so soon after is the same interruption.
ECHO_SECONDS = 1.0
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]
ELASTIC = "TORCHELASTIC_RUN_ID" in os.environ  # torchrun's agent passes signals on and waits, other launchers do not


class GracefulExit:
    """Hear the signals that end a run, and end it where nothing is lost.

    Until `defer` and after `at_once` a signal ends the process at once; between them it is noted, for the loop to ask
    about after each update. A second one always ends the process at once, and the end of the launcher counts as SIGTERM.

    Attributes:
        signal: The number of the first signal; 0 if there was none.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._received_at = 0.0
        self._deferred_for = ""
        self._last_words = "Nothing is lost: there was no update yet."

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Hear signals in the block. Python hears them in the main thread only."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        # nohup has a run ignore that its terminal is closed. torchrun does not, and kills what goes on after that.
        heard = [
            number
            for number in SIGNALS
            if signal.getsignal(number) != signal.SIG_IGN or number == signal.SIGINT or ELASTIC
        ]
        before = {number: signal.signal(number, self._on_signal) for number in heard}
        streams = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = map(_Deaf, streams)  # type: ignore[assignment]
        launcher = find_launcher()
        if launcher is not None:
            threading.Thread(target=self._end_after, args=(launcher[0],), daemon=True).start()
        try:
            yield
        finally:
            sys.stdout, sys.stderr = streams
            for number, handler in before.items():
                signal.signal(number, handler)

    def defer(self, activity: str) -> None:
        """Have signals wait from here on. `activity` says for what, after "SIGTERM: "."""
        self._deferred_for = activity

    def at_once(self, last_words: str) -> None:
        """Have signals end the process at once from here on, with `last_words`; end it here if there was one."""
        self._deferred_for, self._last_words = "", last_words
        if self.signal:
            self._leave()

    def requested(self, accelerator: Accelerator) -> bool:
        """Return whether any process of the run was told to end; every process has to ask."""
        received = torch.tensor([self.signal], device=accelerator.device)
        anywhere = int(accelerator.gather(received).max())
        if anywhere and not self.signal:  # the signal may still be on its way to this process
            self.signal, self._received_at = anywhere, time.monotonic()
        return anywhere > 0

    def exit(self, accelerator: Accelerator, checkpoint: str | os.PathLike[str]) -> NoReturn:
        """End the run, the trackers first, with the command that goes on from its checkpoint."""
        accelerator.end_training()
        if not accelerator.is_main_process:
            sys.exit(128 + self.signal)
        note = " (with HF_TOKEN in the environment, or after `hf auth login`)" if secrets() else ""
        self._last_words = f"{checkpoint} is written. To go on{note}:\n{resume_command(checkpoint)}"
        self._leave()

    def _leave(self) -> NoReturn:
        _say(f"Interrupted. {self._last_words}")
        sys.exit(128 + self.signal)  # the shell's exit code: 143 for SIGTERM, 130 for Ctrl-C

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if not self._deferred_for:
            self._end_process(number, f"Interrupted by {name}. {self._last_words}")
        if not self.signal:
            self.signal, self._received_at = number, time.monotonic()
            _say(f"{name}: {self._deferred_for}; once more to stop at once.")
        elif time.monotonic() - self._received_at > ECHO_SECONDS:
            self._end_process(number, f"Stopped by a second {name}.")

    def _end_process(self, number: int, message: str) -> NoReturn:
        """End without unwinding, which would wait for downloads, uploads and workers, and may be caught on its way."""
        _say(message)
        for worker in multiprocessing.active_children():
            worker.terminate()
        silence_launcher()
        os._exit(128 + number)

    def _end_after(self, launcher: int) -> None:
        """Take the end of the launcher for SIGTERM: nobody would see or stop this run."""
        while os.getppid() == launcher:
            time.sleep(0.5)
        if not self.signal:
            os.kill(os.getpid(), signal.SIGTERM)


def guarded(main: Callable[[argparse.Namespace, GracefulExit], None]) -> Callable[[argparse.Namespace], None]:
    """Run `main(args, graceful_exit)` under the guard of its `GracefulExit`."""

    @functools.wraps(main)
    def run(args: argparse.Namespace) -> None:
        graceful_exit = GracefulExit()
        with graceful_exit.guard():
            main(args, graceful_exit)

    return run


def run_script(main: Callable[[argparse.Namespace], None], parse_args: Callable[[], argparse.Namespace]) -> None:
    """Run a training script as `run_cli` does, so that a launcher does not print a token that is in its command line."""
    try:
        args = parse_args()
        warn_of_launcher()
        run_cli(main, args)
    except BaseException as end:
        if not (isinstance(end, SystemExit) and end.code in (0, None)):
            atexit.register(silence_launcher)  # after the message or the traceback
        raise


@functools.cache
def find_launcher() -> tuple[int, list[str]] | None:
    """Return number and command line of the Python process that started this one as that command line says.

    That of `accelerate launch --cpu train.py --seed 0` ends with the arguments of `python train.py --seed 0`. What was
    found first stays, for a launcher may end before this process.
    """
    parent, own = os.getppid(), sys.argv[1:]
    try:
        words = psutil.Process(parent).cmdline()
    except psutil.Error:
        return None
    launches = own and words[-len(own) :] == own and "python" in Path(words[0]).name.lower()
    return (parent, words) if launches else None


def warn_of_launcher() -> None:
    """Say what a launcher that does not wait cannot keep of README's promises."""
    if ELASTIC or find_launcher() is None:
        return
    script = Path(sys.argv[0]).name
    _say(
        f"Under this launcher an interrupted run writes its checkpoint after the launcher has ended; `python {script}` waits."
    )
    if secrets():
        _say("The launcher may print its command line, and the token in it: `hf auth login` or set HF_TOKEN instead.")


def silence_launcher() -> None:
    """End a launcher that is about to print its command line with a token in it, since this process has failed."""
    launcher = find_launcher()
    if launcher is not None and launcher[0] == os.getppid() and not ELASTIC and secrets():
        os.kill(launcher[0], signal.SIGTERM)


def resume_command(checkpoint: str | os.PathLike[str]) -> str:
    """Return the command line of this run, its launcher's if it has one, to go on from a checkpoint; without the token."""
    launcher = find_launcher()
    words = iter([sys.executable, *sys.orig_argv[1:]] if launcher is None else launcher[1])
    kept = []
    for word in words:
        if not word.startswith(("--hub_t", "--resu")):  # the shortest forms that the parser takes
            kept.append(word)
        elif "=" not in word:
            next(words, None)
    return shlex.join([*kept, "--resume_from_checkpoint", Path(checkpoint).name])


def ignore_signals(worker_id: int) -> None:
    """Have a worker of a `DataLoader` live through signals to its process group: the main process ends it.

    What the main process ends it with is SIGTERM, too: where the system says who sent a signal, others' are ignored.
    """
    for number in set(SIGNALS) - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_by, args=(os.getppid(),), daemon=True).start()


def _end_by(main_process: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != main_process:
        pass
    os._exit(0)


class _Deaf:
    """A stream that goes on when nobody reads it: a closed terminal, a `tee` that Ctrl-C ended, a full disk."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            pass


def _say(message: str) -> None:
    """Write a message below the progress bar; not by `print`, which a signal may find in the middle of another."""
    if os.environ.get("LOCAL_RANK", "0") != "0":  # all processes of a machine hear the same
        return
    try:
        os.write(2, f"\n{message}\n".encode())
    except OSError:
        pass
