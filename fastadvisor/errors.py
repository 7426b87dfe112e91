"""Errors whose message is written for the user."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """An error that the user can correct: one sentence that says what is wrong and how to correct it.

    The command line prints it without a traceback and exits with status 2; from Python it is an ordinary exception.
    """


class OutOfMemoryError(UserError):
    """The memory of the device or of the machine has run out."""


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop and has saved a checkpoint; the message says how to continue it.

    The command line exits with 128 plus ``signal``, as a shell reports a process that a signal ended.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


def cannot_write(path: object, error: OSError) -> UserError:
    """Return the error for a file of a run that cannot be written, for example because the disk is full."""
    return UserError(f"{path} cannot be written ({error.strerror}); free some space or choose another --output.")


def too_many_open_files() -> UserError:
    """Return the error for a process that has reached its limit of open files."""
    return UserError("Too many files are open at once: raise the limit (ulimit -n 65536), or lower --workers.")


def suggest(word: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the closest entry of ``known``, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
