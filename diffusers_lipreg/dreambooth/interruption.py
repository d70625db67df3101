"""SIGTERM and Ctrl-C in training: the first ends the run after the update it is in, the second at once."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import NoReturn, TypeVar

import torch
from accelerate import Accelerator

T = TypeVar("T")
# A terminal and a launcher may both pass on one Ctrl-C: what comes so soon after is the same interruption.
ECHO_SECONDS = 1.0


class Interruption:
    """Notes the first signal, for the loop to ask about after each update.

    Args:
        accelerator: that of the run, over whose processes the interruption is agreed on.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.received: int = 0
        self.received_at = 0.0
        self.stopping = False

    def during(self, epochs: Iterable[T]) -> Iterator[T]:
        """The epochs, with signals noted while they last. Python hears signals in the main thread only."""
        if threading.current_thread() is not threading.main_thread():
            yield from epochs
            return
        before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield from epochs
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self.received_at = number, time.monotonic()
            name = signal.Signals(number).name
            print(f"\n{name}: finishing this update and writing a checkpoint; once more to stop at once.", file=sys.stderr)
        elif time.monotonic() - self.received_at > ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def agreed(self) -> bool:
        """Whether any process of the run was interrupted; every process has to ask."""
        received = torch.tensor([self.received], device=self.accelerator.device)
        anywhere = int(self.accelerator.gather(received).max())
        if anywhere and not self.received:  # the signal may still be on its way to this process
            self.received, self.received_at = anywhere, time.monotonic()
        self.stopping = anywhere > 0
        return self.stopping

    def leave(self) -> NoReturn:
        """Ends the run, the trackers first, with the shell's exit code for the signal: 143 or 130."""
        self.accelerator.end_training()
        if self.accelerator.is_main_process:
            print(f"Interrupted. To go on: {resume_command(sys.argv)}", file=sys.stderr)
        sys.exit(128 + self.received)


def resume_command(argv: list[str]) -> str:
    """The command line that goes on from the latest checkpoint: that of this run, without its token."""
    kept: list[str] = []
    words = iter(argv)
    for word in words:
        if not word.startswith("--hub_t"):  # --hub_token, also abbreviated
            kept.append(word)
        elif "=" not in word:
            next(words, None)
    return shlex.join(["accelerate", "launch", *kept, "--resume_from_checkpoint", "latest"])
