"""What a run says: lines of progress, which a caller may silence, and notes, which nobody may."""

import codecs
import contextlib
import errno
import os
import sys
from collections.abc import Iterable, Iterator
from typing import TextIO

from tqdm import tqdm

PLAIN = {
    "±": "+-",
    "×": "x",
    "…": "...",
    "→": "->",
    "–": "-",
    "−": "-",
    "σ": "sigma",
    "β": "beta",
    "µ": "u",
    "≤": "<=",
    "≥": ">=",
}
"""What stands for a character where the output cannot hold it; others become their escape, as \\xe9."""

DEAD = (errno.EPIPE, errno.EIO)
"""Errors of writing to a pipe that nobody reads, and to a terminal that has been closed."""

_silent = False


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(PLAIN.get(one, one.encode("ascii", "backslashreplace").decode()) for one in text), error.end


codecs.register_error("fastadvisor", _plain)


def hold_any_character() -> None:
    """Let standard output and error take any text, whatever their encoding: hours of training are not to end in a ``±``, or in
    the name of a file that is in no encoding at all.
    """
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="fastadvisor")


def printable(text: str, stream: TextIO) -> str:
    """Return ``text`` as ``stream`` can hold it."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "fastadvisor").decode(encoding)


@contextlib.contextmanager
def silent(yes: bool) -> Iterator[None]:
    """If ``yes``, :func:`tell` prints nothing inside the block."""
    global _silent
    before, _silent = _silent, yes or _silent
    try:
        yield
    finally:
        _silent = before


def write(text: str, stream: TextIO | None) -> None:
    """Print a line to ``stream``, above a progress bar if there is one; drop it where nobody listens any more.

    A terminal that has been closed, or the reader of a pipe that has left, is no reason to end a run.
    """
    if stream is None:  # Python started without one
        return
    with contextlib.suppress(OSError, ValueError):  # ValueError: it has been closed
        tqdm.write(printable(text, stream), file=stream)
        stream.flush()


def leave_dead_streams() -> None:
    """Point standard output and error to nowhere if they cannot be written to any more. What is left in their buffers would be
    written when the interpreter ends, which would end with a status of its own (120).
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except OSError as error:
            if error.errno not in DEAD:
                raise
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())


def tell(text: str) -> None:
    """Print a line of progress to standard output, above a progress bar if there is one."""
    if not _silent:
        write(text, sys.stdout)


def note(lines: Iterable[str]) -> None:
    """Print what the user must know of the data or the run to standard error, by one of several ranks."""
    if int(os.environ.get("RANK", "0")) == 0:
        for line in lines:
            write(f"fastadvisor: {line}", sys.stderr)
