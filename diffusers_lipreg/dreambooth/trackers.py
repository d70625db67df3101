"""Start the trackers. One that cannot start ends the run before training; one that fails later ends nothing."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.tracking import GeneralTracker
from PIL import Image

from ..errors import as_run_error, one_line

logger = get_logger(__name__)


class Tracker:
    """Wrap one of accelerate's trackers. Its first error, such as a full disk, is a warning; later ones are silent."""

    def __init__(self, tracker: GeneralTracker) -> None:
        self.tracker = tracker
        self.name = tracker.name
        self.warned = False

    def log(self, values: Mapping[str, Any], step: int | None = None, **options: Any) -> None:
        self._attempt(lambda: self.tracker.log(values, step=step, **options))

    def log_images(self, name: str, images: Sequence[Image.Image], prompt: str, step: int) -> None:
        """Log images under `name`, if the tracker is one to which the official scripts send them, too."""
        if self.name == "tensorboard":
            pixels = np.stack([np.asarray(image) for image in images])
            self._attempt(lambda: self.tracker.log_images({name: pixels}, step=step, dataformats="NHWC"))
        elif self.name == "wandb":
            import wandb

            shown = [wandb.Image(image, caption=prompt) for image in images]
            self._attempt(lambda: self.tracker.log({name: shown}, step=step))

    def finish(self) -> None:
        self._attempt(self.tracker.finish)

    def _attempt(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:
            if not self.warned:
                logger.warning(f"{self.name} fails, and may miss what follows: {one_line(error)}")
            self.warned = True


def start_trackers(args: Namespace, accelerator: Accelerator, project: str) -> None:
    """Start the trackers of `--report_to` on the main process."""
    with as_run_error(lambda error: f"--report_to {args.report_to}: a tracker cannot start ({one_line(error)})"):
        accelerator.init_trackers(project, config=tracker_config(args))
    accelerator.trackers = [Tracker(tracker) for tracker in accelerator.trackers]


def tracker_config(args: Namespace) -> dict[str, str | int | float | bool | None]:
    """Return the flags without the token. Lists are text, since trackers accept plain values only."""
    flags = {name: value for name, value in vars(args).items() if name != "hub_token"}
    plain = (str, int, float, bool, type(None))
    return {name: value if isinstance(value, plain) else str(value) for name, value in flags.items()}
