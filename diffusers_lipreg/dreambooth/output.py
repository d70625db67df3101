"""The output folder of a run. What the manifest lists is the run's to replace, delete and upload; nothing else is."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from ..errors import RunError, one_line

MANIFEST = ".lipreg/manifest.json"
Kind = Literal["result", "checkpoint", "log"]


class OutputFolder:
    """Keep the manifest of an output folder: names relative to it, with "/" between their parts, by kind.

    Raises:
        RunError: The folder has a manifest that cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest: dict[str, list[str]] = {}
        try:
            self.manifest = json.loads(Path(path, MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            raise RunError(f"{self.path / MANIFEST}: cannot be read ({one_line(error)}).") from error

    def owned(self, kind: Kind) -> list[str]:
        """Return the names that runs into this folder wrote as `kind`, in the order in which they were added."""
        return list(self.manifest.get(kind, []))

    def add(self, kind: Kind, names: Iterable[str]) -> None:
        """Note names as written by a run. Call it before they appear, so that nothing of a killed run is a stranger's."""
        self._write(kind, [*self.owned(kind), *names])

    def discard(self, kind: Kind, names: Iterable[str]) -> None:
        """Strike names out. Call it when they are gone."""
        gone = set(names)
        self._write(kind, [name for name in self.owned(kind) if name not in gone])

    def _write(self, kind: Kind, names: list[str]) -> None:
        self.manifest[kind] = list(dict.fromkeys(names))
        final = self.path / MANIFEST
        final.parent.mkdir(parents=True, exist_ok=True)
        partial = final.with_suffix(".partial")
        partial.write_text(json.dumps(self.manifest, indent=1), encoding="utf-8")
        os.replace(partial, final)
