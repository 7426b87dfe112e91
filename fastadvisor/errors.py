"""The one exception that reaches a user."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can put right: one sentence that names the thing and the way out.

    The command line prints it without a traceback and exits with status 2; from Python it is an ordinary exception.
    """


class OutOfMemoryError(UserError):
    """The device's memory, or the machine's, is not enough."""


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop, and has saved: says how to continue it.

    The command line exits with 128 plus ``signal``, as a shell reports a process that a signal ended.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


def cannot_write(path: object, error: OSError) -> UserError:
    """Return what to raise where a file of a run cannot be written, such as on a full disk."""
    return UserError(f"{path} cannot be written ({error.strerror}); free some space or choose another --output.")


def too_many_open_files() -> UserError:
    """Return what to raise where the system opens no more files for this process."""
    return UserError("Too many files are open at once: raise the limit (ulimit -n 65536), or lower --workers.")


def suggest(word: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the closest entry of ``known``, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
