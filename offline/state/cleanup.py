"""Deletes the folder of a run."""

import shutil
from pathlib import Path

from pgsvd_vllm.offline.state.manifest import RUN_FILE
from pgsvd_vllm.offline.state.run_lock import LOCK_FILE, RunLock


def delete_run(folder: Path, lock: RunLock) -> str | None:
    """Delete DIR.partial; its manifest goes last, so that an interrupted deletion is recognized.

    Args:
        folder: DIR.partial.
        lock: that this process holds on it.

    Returns:
        A line for the user if something cannot be deleted.
    """
    try:
        for path in folder.iterdir():
            if path.name not in (RUN_FILE, LOCK_FILE):
                remove(path)
        (folder / RUN_FILE).unlink(missing_ok=True)
        lock.delete()
    except OSError as error:
        return f"WARNING: {folder}: cannot be deleted ({error.strerror}); delete it"
    return None


def remove(path: Path) -> None:
    """Delete a file, a link or a folder with its content; raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
