"""A run that was interrupted after DIR had appeared is complete: only DIR.partial is left to delete."""

import os
from pathlib import Path

from pgsvd_vllm.offline.state.cleanup import delete_run
from pgsvd_vllm.offline.state.manifest import Manifest, fingerprint, is_blank
from pgsvd_vllm.offline.state.run_lock import RunLock

# The folder of DIR.partial that becomes DIR.
CHECKPOINT = "checkpoint"


def partial_folder(output: Path) -> Path:
    """DIR.partial of a run that publishes `output`."""
    return output.with_name(output.name + ".partial")


def is_complete(output: Path) -> bool:
    """Whether DIR is what the run of DIR.partial has published."""
    folder = partial_folder(output)
    files = Manifest.published(folder).get("files")
    try:
        return files is not None and not (folder / CHECKPOINT).exists() and files == fingerprint(output)
    except OSError:
        return False


def finish_published(output: Path, request: str) -> bool:
    """Delete DIR.partial beside a DIR that this run has completed, as an interrupted `RunState.publish` leaves it.

    Args:
        output: DIR.
        request: that `RunState.publish` got.

    Returns:
        Whether DIR is the result of the request.

    Raises:
        InputError: another process writes into DIR.partial.
    """
    folder = partial_folder(output)
    complete = is_complete(output) and Manifest.published(folder).get("request") == request
    # The deletion may have been interrupted after that of the manifest.
    if complete or (os.path.lexists(output) and os.access(folder, os.R_OK) and is_blank(folder)):
        lock = RunLock(folder, output)
        try:
            delete_run(folder, lock)
        finally:
            lock.release()
    return complete
