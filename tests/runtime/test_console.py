"""What is logged, and who gets to see it."""

import logging
import subprocess
import sys

from fastadvisor.runtime import console
from tests.faults import kills

logger = logging.getLogger("fastadvisor.somewhere")


def say():
    logger.debug("a detail")
    logger.info("100 % progress")
    logger.warning("a note of 3 % bad images")


def test_progress_goes_to_standard_output_and_notes_to_standard_error(capsys):
    with console.show_log():
        say()
    assert capsys.readouterr() == ("100 % progress\n", "fastadvisor: a note of 3 % bad images\n")
    assert (console.LOGGER.handlers, console.LOGGER.level, console.LOGGER.propagate) == ([], logging.NOTSET, True)


def test_without_progress_notes_are_left_and_the_quieter_of_two_blocks_wins(capsys):
    quiet = ("", "fastadvisor: a note of 3 % bad images\n")
    with console.show_log(False):
        say()
        assert capsys.readouterr() == quiet
        with console.show_log():
            say()
        assert capsys.readouterr() == quiet
    with console.show_log():
        with console.show_log(False):
            say()
        assert capsys.readouterr() == quiet
        say()
    assert capsys.readouterr().out == "100 % progress\n"


def test_ranks_but_the_first_print_nothing(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with console.show_log():
        say()
    assert capsys.readouterr() == ("", "")


def test_handlers_at_the_root_get_what_their_level_lets_through(caplog, capsys):
    with console.show_log():
        say()
        assert caplog.messages == ["a note of 3 % bad images"]
    caplog.clear()
    caplog.set_level(logging.INFO)
    for progress in (True, False):
        with console.show_log(progress):
            say()
        assert caplog.messages == ["100 % progress", "a note of 3 % bad images"]
        caplog.clear()


def test_as_a_library_without_a_run_only_notes_are_printed():
    """By Python's last resort, where nobody has configured logging."""
    code = "import logging; l = logging.getLogger('fastadvisor.x'); l.info('progress'); l.warning('note')"
    done = subprocess.run(
        [sys.executable, "-c", code], env=kills.ENVIRONMENT, capture_output=True, text=True, timeout=60, check=True
    )
    assert (done.stdout, done.stderr) == ("", "note\n")


def test_lines_stand_above_a_progress_bar(capsys):
    from tqdm import tqdm

    with console.show_log(), tqdm(total=2, file=sys.stderr) as bar:
        bar.update()
        logger.info("a line")
    out, err = capsys.readouterr()
    assert out == "a line\n"
    assert "a line" not in err
