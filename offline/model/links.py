"""Where a file of a folder may lie: links are followed inside the folder and inside its repository in a hub cache."""

import os
from pathlib import Path


def stays_inside(file: Path, folder: Path) -> bool:
    """Whether a file, with links followed, lies in a folder, or among the files of the folder's repository.

    A hub cache has the files of a repository in blobs/HASH, to which those in snapshots/COMMIT link.

    Args:
        file: in the folder by its name.
        folder: which may be a folder inside snapshots/COMMIT.

    Raises:
        OSError, ValueError: a name that no file can have.
    """
    root = folder.resolve()
    commits = [one for one in (root, *root.parents) if one.parent.name == "snapshots"]
    roots = [root, *(commit.parent.parent / "blobs" for commit in commits)]
    target = Path(os.path.realpath(file))  # unlike Path.resolve, also for links in a circle
    return any(target.is_relative_to(one) for one in roots)
