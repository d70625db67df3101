"""End a run on a signal without losing anything, whatever has launched it."""

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
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO

import psutil
import torch
from accelerate import Accelerator

from ..errors import one_line, run_cli, secrets

# A terminal and a launcher may both pass on one Ctrl-C. A signal so soon after the first is the same interruption.
ECHO_SECONDS = 1.0
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]
ELASTIC = "TORCHELASTIC_RUN_ID" in os.environ  # torchrun passes signals on and waits, other launchers do not


class GracefulExit:
    """Handle the signals that end a run.

    Until `defer` and after `at_once` a signal ends the process at once. In between it is noted, and the loop asks for it
    after each update. A second signal always ends the process at once. The end of the launcher counts as SIGTERM.
    """

    def __init__(self) -> None:
        self.signal = 0  # the number of the first one; 0 if there was none
        self._received_at = 0.0
        self._deferred_for = ""
        self._last_words = "Nothing is lost: there was no update yet."

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Handle signals in the block, if it runs in the main thread: Python has no handlers in others."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {}
        for number in SIGNALS:
            # nohup has a run ignore that its terminal is closed. torchrun hears it all the same and kills what goes on.
            ignored = signal.getsignal(number) == signal.SIG_IGN and number != signal.SIGINT
            if ELASTIC or not ignored:
                before[number] = signal.signal(number, self._on_signal)
        streams = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = map(_UnreadStream, streams)  # type: ignore[assignment]
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
        """Have signals wait from here on. The answer to one names the `activity` that it waits for."""
        self._deferred_for = activity

    def at_once(self, last_words: str) -> None:
        """Have signals end the process from here on, with `last_words`. An earlier signal ends it now."""
        self._deferred_for, self._last_words = "", last_words
        if self.signal:
            _say(f"Interrupted. {last_words}")
            sys.exit(128 + self.signal)  # the exit code of a shell: 143 for SIGTERM, 130 for Ctrl-C

    def requested(self, accelerator: Accelerator) -> bool:
        """Return whether any process of the run has received a signal. Every process has to call it."""
        received = torch.tensor([self.signal], device=accelerator.device)
        anywhere = int(accelerator.gather(received).max())
        if anywhere and not self.signal:  # the signal may still be on its way to this process
            self.signal, self._received_at = anywhere, time.monotonic()
        return anywhere > 0

    def exit(self, accelerator: Accelerator, checkpoint: str | os.PathLike[str]) -> None:
        """End the trackers and the run, and print the command that goes on from the checkpoint."""
        accelerator.end_training()
        note = " (with HF_TOKEN in the environment, or after `hf auth login`)" if secrets() else ""
        self.at_once(f"{checkpoint} is written. To go on{note}:\n{resume_command(checkpoint)}")

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
        """End without unwinding. An exception would wait for downloads, uploads and workers, or be caught on its way."""
        _say(message)
        for worker in multiprocessing.active_children():
            worker.terminate()
        silence_launcher()
        os._exit(128 + number)

    def _end_after(self, launcher: int) -> None:
        """Wait for the end of the launcher, after which nobody could see or stop this run, and send it SIGTERM."""
        while os.getppid() == launcher:
            time.sleep(0.5)
        if not self.signal:
            os.kill(os.getpid(), signal.SIGTERM)


def guarded(main: Callable[[argparse.Namespace, GracefulExit], None]) -> Callable[[argparse.Namespace], None]:
    """Run `main(args, graceful_exit)` under the guard of a new `GracefulExit`."""

    @functools.wraps(main)
    def run(args: argparse.Namespace) -> None:
        graceful_exit = GracefulExit()
        with graceful_exit.guard():
            main(args, graceful_exit)

    return run


def read_flags(parse_args: Callable[[], argparse.Namespace]) -> argparse.Namespace:
    """Return the flags of a training script, and warn of what its launcher may do."""
    with _quiet_launcher():
        args = parse_args()
        threading.excepthook = _say_of_thread
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `guard`, Ctrl-C ends the imports without a traceback
        warn_of_launcher()
        return args


def run_script(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Run a training script by `run_cli`."""
    with _quiet_launcher():
        run_cli(main, args)


@contextmanager
def _quiet_launcher() -> Iterator[None]:
    """Keep the launcher of a script that fails from printing its command line, which may hold a token."""
    try:
        yield
    except BaseException as end:
        if not (isinstance(end, SystemExit) and end.code in (0, None)):
            atexit.register(silence_launcher)  # after the message or the traceback
        raise


@functools.cache
def find_launcher() -> tuple[int, list[str]] | None:
    """Return the process number and command line of the launcher, or `None` if there is none.

    A launcher is the Python process that started this one and has the same last arguments: `accelerate launch --cpu
    train.py --seed 0` starts `python train.py --seed 0`. The answer is cached, since a launcher may end before this process.
    """
    parent, own = os.getppid(), sys.argv[1:]
    try:
        words = psutil.Process(parent).cmdline()
    except psutil.Error:
        return None
    launches = own and words[-len(own) :] == own and "python" in Path(words[0]).name.lower()
    return (parent, words) if launches else None


def warn_of_launcher() -> None:
    """Warn of what a launcher that does not wait for its process may do."""
    if ELASTIC or find_launcher() is None:
        return
    script = Path(sys.argv[0]).name
    _say(
        f"Under this launcher an interrupted run writes its checkpoint after the launcher has ended; `python {script}` waits."
    )
    if secrets():
        _say("The launcher may print its command line, and the token in it: `hf auth login` or set HF_TOKEN instead.")


def silence_launcher() -> None:
    """End a launcher that would print its command line, with a token in it, since this process has failed."""
    launcher = find_launcher()
    if launcher is not None and launcher[0] == os.getppid() and not ELASTIC and secrets():
        os.kill(launcher[0], signal.SIGTERM)


def resume_command(checkpoint: str | os.PathLike[str]) -> str:
    """Return the command line of this run or its launcher, without the token, to go on from a checkpoint."""
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
    """Have a worker of a `DataLoader` ignore signals to its process group, so that the main process can finish.

    The main process ends its workers by SIGTERM, too. Where the system names the sender of a signal, only those of other
    processes are ignored.
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


class _UnreadStream:
    """A stream that does not fail when nobody reads it: a closed terminal, a `tee` that Ctrl-C ended, a full disk."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()


def _say_of_thread(failure: threading.ExceptHookArgs) -> None:
    """Say in one line that a thread has failed: a tracker's does on a full disk, which ends nothing."""
    if failure.exc_value is not None:
        _say(f"warning: a thread in the background ended ({one_line(failure.exc_value)}).")


def _say(message: str) -> None:
    """Write a message below the progress bar, without `print`, which a signal may interrupt in another message."""
    if os.environ.get("LOCAL_RANK", "0") == "0":  # all processes of a machine receive the same signal
        with suppress(OSError):
            os.write(2, f"\n{message}\n".encode())
