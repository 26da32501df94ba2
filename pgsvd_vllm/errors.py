"""The errors a user can cause, each with a message that names what to change."""


class PgsvdError(Exception):
    """Base of every error whose message is written for the user.

    The command line prints it as one line and exits with status 2.
    """


class CheckpointError(PgsvdError, ValueError):
    """A checkpoint is missing, damaged or not of this format; names the file or tensor."""


class InputError(PgsvdError, ValueError):
    """An option, a model or a calibration text cannot be used as given; names it."""
