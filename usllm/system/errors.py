"""The one exception that means "the user can fix this"."""

from __future__ import annotations


class UserError(Exception):
    """Something in the user's input is wrong.

    The message names the key or file, the value, and the way out. Command-line programs print it as it is, without a
    traceback, and exit with :attr:`status`.
    """

    status = 2


class RunError(UserError):
    """Something failed on the way, whatever the input says: numbers that are not finite, for example.

    The message names where, and the way out. Command-line programs exit with status 1.
    """

    status = 1


class PackedFormatError(ValueError):
    """A packed layer or folder is not what its format says; the message begins with the tensor's or file's name."""


def first_line(error: BaseException) -> str:
    """Type and first line of an error of some library, to be put into one message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
