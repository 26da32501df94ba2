"""The errors a user can cause, each with a message that names what to change."""


def reason_of(error: Exception) -> str:
    """The first line of an error's message, or its class where the message is empty."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


class PgsvdError(Exception):
    """Base of every error whose message is written for the user.

    The command line prints it as one line and exits with status 2. Messages of numeric code name an option by its
    field in backticks, such as `ratio`; the command line shows the flag instead.
    """


class CheckpointError(PgsvdError, ValueError):
    """A checkpoint is missing, damaged or not of this format; names the file or tensor."""


class InputError(PgsvdError, ValueError):
    """An option, a model or a calibration text cannot be used as given; names it."""


class ChoiceError(InputError):
    """No ranks give the requested size, latency or error; another value may, on the same calibration."""
