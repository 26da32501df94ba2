"""A folder that appears under its name complete, or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pgsvd_vllm.errors import InputError, PgsvdError, as_interruption, reason_of, refusal_of

# The subfolder that becomes the output.
NEW = "new"


def refuse_existing(output: Path) -> None:
    """Refuse an output folder that exists; raises InputError."""
    if os.path.lexists(output):
        raise InputError(f"`output_dir` {output}: already exists; remove it or choose another folder")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """An empty folder on the disk of `output`, whose subfolder NEW takes that name once the context ends.

    Whatever else is in it is deleted, and all of it if the context ends with an error.

    Args:
        output: must not exist.

    Raises:
        InputError: the output exists or cannot be written, or the system refuses something inside of the context.
    """
    refuse_existing(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        made = tempfile.TemporaryDirectory(prefix=f"{output.name}.", dir=output.parent)
    except OSError as error:
        raise InputError(f"`output_dir` {output}: cannot be written ({reason_of(error)})") from None
    with made as name:
        new = Path(name) / NEW
        new.mkdir()
        try:
            with as_interruption():
                yield Path(name)
            new.rename(output)
        except PgsvdError as error:
            raise type(error)(str(error).replace(str(new), str(output))) from None
        except Exception as error:  # the converters raise many kinds
            refused = refusal_of(error, f"`output_dir` {output}")
            if refused is None:
                raise
            raise InputError(refused) from None
