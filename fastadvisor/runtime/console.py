"""What is logged under ``fastadvisor``, as a terminal shows it: progress (INFO), which a caller may silence, and notes of what
one must know (WARNING). Every module logs by ``logging.getLogger(__name__)``; a library's user who wants the records elsewhere
gives that logger, or the root, a handler.
"""

import codecs
import contextlib
import errno
import logging
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
"""Replacements for characters that the encoding of the output lacks; others become an escape such as \\xe9."""

DEAD = (errno.EPIPE, errno.EIO)
"""Error numbers of a write to a pipe without a reader, or to a terminal that has been closed."""

LOGGER = logging.getLogger("fastadvisor")
"""The parent of the loggers of all modules."""


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(PLAIN.get(one, one.encode("ascii", "backslashreplace").decode()) for one in text), error.end


codecs.register_error("fastadvisor", _plain)


def accept_any_character() -> None:
    """Let standard output and standard error accept any text, whatever their encoding, so that a run does not fail when it
    prints a ``±`` or a file name with invalid characters.
    """
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="fastadvisor")


def make_printable(text: str, stream: TextIO) -> str:
    """Return ``text`` with the characters replaced that the encoding of ``stream`` lacks."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "fastadvisor").decode(encoding)


class Console(logging.Handler):
    """Prints records as plain lines, above a progress bar if there is one: what is below WARNING to standard output, the rest
    to standard error. Of several ranks the first prints.
    """

    threshold = logging.INFO
    """The lowest level that is printed."""
    onwards = False
    """Whether this handler passes records on to the handlers of the root logger, in place of propagation."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print ``record``, and pass it on."""
        if record.levelno >= self.threshold and int(os.environ.get("RANK", "0")) == 0:
            if record.levelno < logging.WARNING:
                write(record.getMessage(), sys.stdout)
            else:
                write(f"fastadvisor: {record.getMessage()}", sys.stderr)
        if self.onwards and record.levelno >= logging.root.level:
            logging.root.callHandlers(record)


@contextlib.contextmanager
def show_log(progress: bool = True) -> Iterator[None]:
    """Print what is logged inside the block: warnings, and progress if both this block and the blocks around it ask for it.

    Progress needs the level INFO, which the caller's own handlers at the root may not have asked for: they get what the level
    of the root lets through, as ever.
    """
    outer = next((handler for handler in LOGGER.handlers if isinstance(handler, Console)), None)
    console = Console() if outer is None else outer
    before = console.threshold, LOGGER.level, LOGGER.propagate
    console.threshold = max(before[0], logging.INFO if progress else logging.WARNING)
    if outer is None:
        LOGGER.addHandler(console)
        console.onwards, LOGGER.propagate = LOGGER.propagate and bool(logging.root.handlers), False
        if LOGGER.level == logging.NOTSET:
            LOGGER.setLevel(min(logging.INFO, logging.root.level))
    try:
        yield
    finally:
        console.threshold, LOGGER.propagate = before[0], before[2]
        LOGGER.setLevel(before[1])
        if outer is None:
            LOGGER.removeHandler(console)


def write(text: str, stream: TextIO | None) -> None:
    """Print a line to ``stream``, above a progress bar if there is one; ignore a stream that is closed.

    A terminal that has been closed, or the reader of a pipe that has left, is no reason to end a run.
    """
    if stream is None:  # Python started without one
        return
    with contextlib.suppress(OSError, ValueError):  # ValueError: it has been closed
        tqdm.write(make_printable(text, stream), file=stream)
        stream.flush()


def detach_dead_streams() -> None:
    """Redirect standard output and standard error to the null device if they can no longer be written to. Otherwise Python
    would fail to flush their buffers at exit, and end with its own status, 120.
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


def log_notes(lines: Iterable[str]) -> None:
    """Log each line as a warning: what the user must know about the data or the run."""
    for line in lines:
        LOGGER.warning("%s", line)
