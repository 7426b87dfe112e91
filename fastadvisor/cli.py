"""The command line: ``fastadvisor train | compare | evaluate | export | replay | data check | recipes | env``.

Flags are the fields of ``config.Config``. Whatever a user can put right ends as one sentence on stderr, exit status 2.
Heavy modules (torch) are imported by the command that needs them: ``--help`` and a mistyped flag answer at once.
"""

import argparse
import contextlib
import dataclasses
import errno
import io
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

import tyro

from fastadvisor import config, recipes
from fastadvisor.commands.text import result_rows, table
from fastadvisor.config import local
from fastadvisor.errors import Interrupted, UserError, nearest, too_many_open_files
from fastadvisor.runtime import console
from fastadvisor.version import __version__

C = TypeVar("C", bound=config.Config)
DECIDE_DEFAULTS = ("dataset", "noise", "labels")
"""Flags that other settings' defaults depend on (``config.resolve``), so they are read before the rest."""

HELP = """\
usage: fastadvisor COMMAND [flags]

Train image classifiers on wrong labels and unequal classes.

commands:
  train      train one classifier; without flags on the data set that comes along (under a minute on two CPU cores)
  compare    train with several methods and seeds, and print a table
  evaluate   test a finished run again
  export     write the plain classifier as state dict, torch.export program and ONNX
  replay     find where values that are not finite began, after a run that stopped for them
  data check count, open and compare all images of a data set: classes, broken files, duplicates, overlap
  recipes    list the settings that come along, for --config
  env        print versions, the device, and which optional parts are active

'fastadvisor COMMAND --help' lists a command's flags; 'fastadvisor --version' prints the version.
"""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are ours: one sentence instead of the usage and a message."""

    def __init__(self, prog: str, description: str = "", add_help: bool = True) -> None:
        super().__init__(prog=prog, description=description, add_help=add_help, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise the message as a UserError."""
        raise UserError(f"{message[0].upper()}{message[1:]}; see '{self.prog} --help'.")

    def parse_all(self, args: Sequence[str]) -> argparse.Namespace:
        """Parse ``args``; what is left over raises a UserError that names the nearest flag."""
        values, left = self.parse_known_args(args)
        check_flags(left, [flag for flag in self._option_string_actions if flag.startswith("--")])
        if left:
            raise UserError(f"Unexpected argument {left[0]!r}; see '{self.prog} --help'.")
        return values


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0, 2 for what the user can put right, 128 + the signal when interrupted."""
    args = list(sys.argv[1:] if argv is None else argv)
    console.hold_any_character()
    try:
        return run(args)
    finally:
        console.leave_dead_streams()


def run(args: list[str]) -> int:
    """Run one command; what goes wrong becomes a sentence and a status."""
    try:
        with console.shown():
            return dispatch(args)
    except UserError as error:
        # A file's name may hold line breaks.
        say(f"fastadvisor: error: {' '.join(str(error).splitlines())}")
        return 2
    except Interrupted as stop:
        say(f"fastadvisor: {stop}")
        return 128 + stop.signal
    except KeyboardInterrupt:
        say("fastadvisor: interrupted.")
        return 130
    except BrokenPipeError:  # `fastadvisor recipes | head`: the reader has left
        return 141
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
        say(f"fastadvisor: error: {too_many_open_files()}")
        return 2
    except RuntimeError as error:
        if not lost(error):
            raise
        say("fastadvisor: another process of this run has ended, and so does this one; its message tells why.")
        return 1


def say(message: str) -> None:
    """Print ``message`` to stderr; of several ranks with the same message one does."""
    if "WORLD_SIZE" in os.environ:
        from fastadvisor.runtime.ranks import speaks

        if not speaks(message):
            return
    console.write(message, sys.stderr)


def lost(error: RuntimeError) -> bool:
    """Whether ``error`` only says that another rank is gone."""
    if "WORLD_SIZE" not in os.environ:
        return False
    from fastadvisor.runtime.ranks import is_lost

    return is_lost(error)


def dispatch(args: list[str]) -> int:
    """Find the command and run it."""
    commands: dict[str, Callable[[list[str]], None]] = {
        "train": run_train,
        "compare": run_compare,
        "evaluate": run_evaluate,
        "export": run_export,
        "replay": run_replay,
        "data": run_data,
        "recipes": run_recipes,
        "env": run_env,
    }
    if not args or args[0] in ("-h", "--help", "help"):
        print(HELP, end="")
    elif args[0] == "--version":
        print(f"fastadvisor {__version__}")
    elif args[0] in commands:
        try:
            commands[args[0]](args[1:])
        except SystemExit as stop:  # the parsers' own way out after --help
            return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    elif args[0].startswith("-"):
        raise UserError(f"The command comes before the flags, as in 'fastadvisor train {args[0]}'.")
    else:
        raise UserError(f"Unknown command {args[0]!r}.{nearest(args[0], commands)} Commands: {', '.join(commands)}.")
    return 0


def run_train(args: list[str]) -> None:
    """``fastadvisor train``."""
    settings = parse_config(config.Config, "train", "Train one classifier.", args)
    from fastadvisor.commands.train import train_config
    from fastadvisor.training.messages import finished
    from fastadvisor.training.trainer import TrainResult

    result = train_config(settings)
    if not settings.progress and int(os.environ.get("RANK", "0")) == 0:  # else the run has said so itself
        result_line = finished(result.summary, result.folder) if isinstance(result, TrainResult) else result.sentence()
        console.write(result_line, sys.stdout)


def run_compare(args: list[str]) -> None:
    """``fastadvisor compare``."""
    settings = parse_config(config.CompareConfig, "compare", "Train with several methods and print a table.", args)
    from fastadvisor.commands import compare
    from fastadvisor.commands.compare import compare_config

    result = compare_config(settings)
    if not settings.progress:
        console.write(compare.table(result["rows"]), sys.stdout)


def run_evaluate(args: list[str]) -> None:
    """``fastadvisor evaluate``."""
    parser = Parser("fastadvisor evaluate", "Test a finished run again.")
    parser.add_argument("run", metavar="RUN", type=local, help="the run's folder")
    parser.add_argument("--checkpoint", choices=("model", "best", "last"), default="model", help="weights (default: model)")
    parser.add_argument("--data-root", metavar="DIR", type=local, help="folder of the data set, if it has moved since")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="device (default: auto)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    flags = parser.parse_all(args)
    from fastadvisor.commands.evaluate import evaluate_run

    with speaking_of(parser, flags.run):
        result = evaluate_run(flags.run, checkpoint=flags.checkpoint, data_root=flags.data_root, device=flags.device)
    if flags.json:
        print(json.dumps(result, indent=2))
        return
    console.note(result.pop("notes"))
    print(table(result_rows(result)))


def run_export(args: list[str]) -> None:
    """``fastadvisor export``."""
    parser = Parser("fastadvisor export", "Write the plain classifier of a run, compared with the original on test images.")
    parser.add_argument("run", metavar="RUN", type=local, help="the run's folder")
    parser.add_argument("--output", metavar="DIR", type=local, help="where to (default: RUN/export)")
    parser.add_argument("--formats", default="state-dict,torch-export,onnx", help="separated by commas (default: all three)")
    parser.add_argument("--checkpoint", choices=("model", "best", "last"), default="model", help="weights (default: model)")
    parser.add_argument("--data-root", metavar="DIR", type=local, help="folder of the data set, if it has moved since")
    flags = parser.parse_all(args)
    from fastadvisor.commands.export import export_run

    formats = [name.strip() for name in flags.formats.split(",") if name.strip()]
    settings = {"output": flags.output, "formats": formats, "checkpoint": flags.checkpoint, "data_root": flags.data_root}
    with speaking_of(parser, flags.run):
        about = export_run(flags.run, **settings)
    console.note(about["notes"])
    files = about["files"].values()
    rows = [(one["file"], f"{one['bytes'] / 1e6:.1f} MB", f"{one['largest_difference']:.1e}") for one in files]
    print(table([("file", "size", "difference"), *rows]))
    print(f"Compared with the original on {about['compared_on']} test images; in {flags.output or Path(flags.run, 'export')}.")


def run_replay(args: list[str]) -> None:
    """``fastadvisor replay``."""
    parser = Parser("fastadvisor replay", "Take the step again at which a run met values that are not finite.")
    parser.add_argument("run", metavar="RUN", type=local, help="the run's folder")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="device (default: auto)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    flags = parser.parse_all(args)
    from fastadvisor.training.replay_record import replay

    with speaking_of(parser, flags.run):
        result = replay(flags.run, device=flags.device)
    if flags.json:
        peaks = [(name, peak if math.isfinite(peak) else str(peak)) for name, peak in result["peaks"]]  # JSON has no NaN
        print(json.dumps({**result, "peaks": peaks}, indent=2, allow_nan=False))
        return
    print(table((name, f"{peak:.4g}") for name, peak in result["peaks"]))
    again = "the same" if result["found"] == result["said"] else result["found"] or "everything is finite here"
    print(f"Iteration {result['iteration']} (epoch {result['epoch']}): the run met {result['said']}; now: {again}.")
    if result["first"] is not None:
        print(f"The first output that is not finite is that of {result['first']}.")


def run_data(args: list[str]) -> None:
    """``fastadvisor data check``."""
    if args and args[0] in ("-h", "--help"):
        args = ["check", "--help"]
    if not args or args[0] != "check":
        raise UserError(
            "'fastadvisor data' has one command, check, as in 'fastadvisor data check --dataset cifar10 --data-root ROOT'."
        )
    settings = parse_config(config.CheckConfig, "data check", "Count, open and compare all images of a data set.", args[1:])
    from fastadvisor.data import load_source
    from fastadvisor.data.check import check_data, make_folder

    if settings.output is not None:
        make_folder(Path(settings.output))  # before every image is read
    report = check_data(load_source(settings), settings)
    print(f"{report.name}: {report.classes} classes")
    print(table(report.rows()), table(report.class_rows()), sep="\n\n", end="\n\n")
    for line in report.remarks():
        print(line)
    if settings.output is not None:
        report.write(Path(settings.output))
        print(f"The report is in {settings.output}.")
    if report.problems:
        more = f" (and {len(report.problems) - 1} more, above)" if len(report.problems) > 1 else ""
        raise UserError(f"{report.problems[0]}{more}")


def run_recipes(args: list[str]) -> None:
    """``fastadvisor recipes``."""
    Parser("fastadvisor recipes", "List the settings that come along, for --config.").parse_all(args)
    print(table(recipe_rows()))


def run_env(args: list[str]) -> None:
    """``fastadvisor env``."""
    Parser("fastadvisor env", "Print versions, the device, and which optional parts are active.").parse_all(args)
    from fastadvisor.runtime.environment import environment, optional_parts

    print(table((name, "none" if value is None else str(value)) for name, value in environment().items()))
    print("\noptional parts")
    print(table((name, "active" if active else "inactive", why) for name, active, why in optional_parts()))


@contextlib.contextmanager
def speaking_of(parser: Parser, run: str) -> Iterator[None]:
    """Let messages of the block name no flag that the command lacks: a setting of a run is a line of its config.yaml."""
    own = [flag for flag in parser._option_string_actions if flag.startswith("--")]
    known = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(config.Config)}
    file = os.path.join(run, "config.yaml")

    def named(match: re.Match[str]) -> str:
        flag = match[0]
        return flag if flag in own or flag not in known else f"{flag[2:].replace('-', '_')} in {file}"

    try:
        yield
    except UserError as error:
        parts = re.split(r"(\(fastadvisor [^)]*\)|'fastadvisor [^']*')", str(error))  # commands, which have flags of their own
        raise UserError(
            "".join(
                p if at % 2 else re.sub(r"(?<![\w/.-])--[a-z][a-z0-9-]*(?![\w/]|\.\w)", named, p) for at, p in enumerate(parts)
            )
        ) from None


def parse_config(kind: type[C], command: str, description: str, args: list[str]) -> C:
    """Build a command's configuration from its flags, on top of ``--config`` and the data set's recipe.

    Raises:
        UserError: an unknown flag (names the nearest one), or a bad value.
    """
    pre = Parser(f"fastadvisor {command}", add_help=False)
    pre.add_argument("--config", metavar="RECIPE|FILE")
    for name in DECIDE_DEFAULTS:
        pre.add_argument(f"--{name}")
    known, rest = pre.parse_known_args(args)
    rest = with_resume(rest)
    switches = [field.name for field in dataclasses.fields(kind) if field.type is bool]
    names = [field.name for field in dataclasses.fields(kind)] + [f"no_{name}" for name in switches]
    check_flags(rest, ["--help", "--config", *(f"--{name.replace('_', '-')}" for name in names)])
    check_switches(rest, switches)
    chosen = {name: value for name in DECIDE_DEFAULTS if (value := getattr(known, name)) is not None}
    base = config.resolve(kind, known.config, **{name: value for name, value in chosen.items() if value != "None"})
    rest += [part for name, value in chosen.items() for part in (f"--{name}", value)]  # typed and checked with the others
    return config.validated(kind, dataclasses.asdict(parse_flags(kind, base, command, description, rest)))


def with_resume(args: list[str]) -> list[str]:
    """Return ``args`` with the value of ``--resume``, which may stand alone, be followed by ``auto``, or be ``--no-resume``."""
    given: list[str] = []
    for at, arg in enumerate(args):
        if arg == "--no-resume":
            given += ["--resume", "False"]
        elif arg == "--resume" and args[at + 1 : at + 2] not in (["auto"], ["True"], ["False"]):
            given += ["--resume", "True"]
        else:
            given.append(arg)
    return given


def check_flags(args: Iterable[str], known: Sequence[str]) -> None:
    """Raise a UserError that names the nearest flag for the first ``--flag`` in ``args`` that is not in ``known``."""
    for arg in args:
        flag = arg.partition("=")[0].replace("_", "-")
        if arg.startswith("--") and arg != "--" and flag not in known:
            raise UserError(f"Unknown flag {arg.partition('=')[0]}.{nearest(flag, known)}")


def check_switches(args: Iterable[str], switches: Sequence[str]) -> None:
    """Raise a UserError for ``--amp=true``: switches take no value, and tyro's message names only the value."""
    for arg in args:
        flag, equals, _ = arg.partition("=")
        name = flag.removeprefix("--").replace("_", "-").removeprefix("no-")
        if equals and name.replace("-", "_") in switches:
            raise UserError(f"{flag} takes no value; write --{name} or --no-{name}.")


def parse_flags(kind: type[C], base: C, command: str, description: str, args: list[str]) -> C:
    """Read the flags with tyro, whose defaults are ``base``; its boxed message becomes one sentence.

    Raises:
        UserError: a missing value, a bad choice or number, or an argument that belongs to no flag.
    """
    prog = f"fastadvisor {command}"
    if "-h" in args or "--help" in args:  # printed straight to the terminal, at its width and in its colours
        listed = "\n".join(f"  {name}: {line}" for name, line in recipe_rows())
        text = f"{description}\n\n--config RECIPE|FILE: settings of a recipe or a YAML file; flags win. Recipes:\n{listed}"
        return tyro.cli(kind, default=base, args=args, prog=prog, description=text)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            return tyro.cli(kind, default=base, args=args, prog=prog)
    except SystemExit:
        raise UserError(f"{sentence(printed.getvalue())} See '{prog} --help'.") from None


def sentence(box: str) -> str:
    """Return the message in what tyro prints: the paragraph under the title, without the frame."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip(" │|") for line in box.strip().splitlines()[1:]]
    lines = [re.sub(r"^[-─╭╮╰╯├┤]{4,}$", "", line).strip() for line in lines]
    paragraph = re.split(r"\n{2,}", "\n".join(lines).strip())[0]
    # Titles vary with tyro's version; so does the frame. The first paragraph is the message in all of them.
    text = " ".join(paragraph.split()).removeprefix("Error parsing ").rstrip(".") or "The flags could not be read"
    text = re.sub(r"invalid literal for int\(\) with base 10: ('.*')", r"\1 is not a whole number", text)
    text = re.sub(r"could not convert string to float: ('.*')", r"\1 is not a number", text)
    text = re.sub(r"no type matching (.*) could be instantiated from \[(.*)\]", r"\2 is not of the form \1", text)
    choice = re.search(r"invalid choice '(.*?)' .*?\((.*)\)", text)
    near = nearest(choice[1], re.findall(r"'(.*?)'", choice[2])) if choice else ""
    return f"{text[0].upper()}{text[1:]}.{near}"


def recipe_rows() -> list[tuple[str, str]]:
    """Return each recipe's name and the comment in its first line."""
    return [(name, recipes.read(name).partition("\n")[0].removeprefix("#").strip()) for name in recipes.names()]
