"""run.json, which tells what a folder's work depends on, so that only the same run continues it."""

import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.state.run_lock import LOCK_FILE
from pgsvd_vllm.offline.state.work_files import WRITING, replace_durably

RUN_FILE = "run.json"
_SETTINGS, _ENVIRONMENT, _PUBLISHED = "settings", "environment", "published"
# Bytes at the beginning of every published file that identify it.
_HEAD = 65536


@dataclass(frozen=True)
class Manifest:
    """What identifies a run.

    Attributes:
        identity: name -> value of everything that calibration depends on.
        settings: name -> value of resolved settings that a resumed run keeps.
        environment: name -> version of the software and hardware; another one may change the last bits of results.
    """

    identity: dict[str, str]
    settings: dict[str, str]
    environment: dict[str, str]

    def without_settings(self) -> "Manifest":
        """The manifest of a calibration folder, which runs with other settings may share."""
        return replace(self, settings={})

    def write(self, folder: Path, published: dict[str, str] | None = None) -> None:
        """Write or replace the manifest of a folder; one that exists keeps its environment.

        Args:
            folder: of the run.
            published: request and fingerprint of a finished checkpoint.

        Raises:
            OSError: it cannot be written.
        """
        environment = _read(folder).get(_ENVIRONMENT, self.environment)
        rows = self.identity | {_SETTINGS: self.settings, _ENVIRONMENT: environment, _PUBLISHED: published}
        part = folder / f"{RUN_FILE}{WRITING}"
        try:
            part.write_text(json.dumps(rows, indent=2), encoding="utf-8")
            replace_durably(part, folder / RUN_FILE)
        except OSError:
            part.unlink(missing_ok=True)
            raise

    def check(self, folder: Path, label: str) -> list[str]:
        """Check that a folder belongs to this run.

        Returns:
            One line if the environment has changed.

        Raises:
            InputError: the manifest of the folder is damaged, or belongs to another run; starts with `label`.
            OSError: it cannot be opened.
        """
        with (folder / RUN_FILE).open("rb"):
            old = _read(folder)
        if not old:
            raise InputError(f"{folder / RUN_FILE}: damaged, this run cannot be resumed; delete {folder}")
        changed = [key for key, value in self.identity.items() if old.get(key) != value]
        if changed:
            raise InputError(
                f"{label} belongs to a run with another {', '.join(changed)}; use the same options or delete it"
            )
        return self._changes(folder, old.get(_ENVIRONMENT))

    def _changes(self, folder: Path, recorded: object) -> list[str]:
        """One line with what differs from the environment in which the folder's work began."""
        old = recorded if isinstance(recorded, dict) else {}
        changed = [f"{key} {old.get(key)}, now {now}" for key, now in self.environment.items() if old.get(key) != now]
        if not changed:
            return []
        return [
            f"WARNING: {folder} was begun with {'; '.join(changed)}: its calibration is kept, factors of another "
            "version of this program are computed again, and the result may differ in its last bits"
        ]

    @staticmethod
    def settings_in(folder: Path) -> dict[str, str]:
        """The settings recorded in a folder; empty if they cannot be read."""
        found = _read(folder).get(_SETTINGS)
        return found if isinstance(found, dict) else {}

    @staticmethod
    def published(folder: Path) -> dict[str, str]:
        """What `write` recorded of the published checkpoint; empty if nothing is published."""
        found = _read(folder).get(_PUBLISHED)
        return found if isinstance(found, dict) else {}


def _read(folder: Path) -> dict[str, Any]:
    """The manifest of a folder; empty if it cannot be read."""
    path = folder / RUN_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if os.path.isfile(path) else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def is_blank(folder: Path) -> bool:
    """Whether a folder is missing or empty, but for what a run creates before its manifest."""
    if not os.path.lexists(folder):
        return True
    return folder.is_dir() and {path.name for path in folder.iterdir()} <= {LOCK_FILE, f"{RUN_FILE}{WRITING}"}


def fingerprint(folder: Path) -> str:
    """SHA-256 over the names, the sizes and the first 64 KiB of all files of a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                digest.update(file.read(_HEAD))
    return digest.hexdigest()
