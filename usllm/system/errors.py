"""The one exception that means "the user can fix this"."""

from __future__ import annotations

import errno
import re

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of the errors that mean: the disk takes no more."""


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


def no_space(error: BaseException) -> bool:
    """Whether an error says that the disk takes no more, or was raised because another one said it.

    Libraries written in Rust and C++ have errors of their own for it, with the system's number in the text.
    """
    seen: BaseException | None = error
    while seen is not None:
        number = re.search(r"\(os error (\d+)\)|\[Errno (\d+)\]", str(seen))
        numbers = {getattr(seen, "errno", None), *(int(part) for part in (number.groups() if number else ()) if part)}
        if numbers.intersection(NO_SPACE):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
