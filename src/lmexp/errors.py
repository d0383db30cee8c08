"""The one exception that users are meant to read."""

from __future__ import annotations


class LmexpError(Exception):
    """Bad input, said in one line: the thing, the reason, the way out.

    The command line prints the message alone and exits with status 2; a library
    caller catches it like any exception. Everything else that escapes is a bug.
    """
